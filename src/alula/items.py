"""Items: which tokens of a forward belong to which image, video or audio clip.

A host is given its media as tensors and finds the tokens they go to by placeholder tokens alone; where one medium ends
and the next begins it never says. The table at the end of this module does: for every family of hosts, how many tokens
each of its media takes, by the host's own arithmetic and without running a tower, and what may stand between and behind
these tokens. What cannot be told apart is marked unknown and never melted into one: a host outside the table, counts
that do not add up to the tokens found, tiles or windows of which the inputs do not say to which medium they belong.

Shapes use B = batch, S = tokens, N = media of one modality in a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alula.errors import HostError
from alula.media import MEDIA
from alula.tokens import UNKNOWN, Modality

Tokens = NDArray[np.int64]

FEATURES = "mm_encoder_outputs"  # what towers and projectors made of media beforehand, by modality: `generate` does so


def inputs_of(tower: str) -> tuple[str, ...]:
    """Keywords of a forward that bring media for a tower ("vision", "audio")."""
    return (*(keyword for medium in MEDIA.values() if medium.tower == tower for keyword in medium.inputs), FEATURES)


def brings_media(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward's inputs hold any media, raw or as features."""
    given = any(value is not None for value in (inputs.get(FEATURES) or {}).values())
    return given or any(inputs[keyword] is not None for keyword in MEDIA.keywords & inputs.keys())


def _keywords(modality: Modality) -> tuple[str, ...]:
    medium = MEDIA.numbered(modality)
    return () if medium is None else medium.inputs


class Host(NamedTuple):
    """What the table reads of a host."""

    backbone: Any  # the module that merges media into the text
    config: Any


class Piece(NamedTuple):
    """Tokens that stand together in the prompt: a medium, or a part of one.

    `goes_on`: the next piece, where it follows directly, may belong to the same medium, and nothing says whether.
    """

    tokens: int
    goes_on: bool = False


class UnknownItems(Exception):  # noqa: N818
    """A forward's inputs do not say how its tokens are divided. It never leaves this module."""


Count = Callable[[Host, Mapping[str, Any], int], list[Piece]]
Shape = Callable[[Host, Mapping[str, Any]], list[tuple[int, int]]]
SHAPES = ("image_grid_thw", "video_grid_thw", "image_merge_sizes")  # keywords that `shapes` reads


@dataclass(frozen=True)
class Way:
    """How one family places the media of one modality.

    Attributes:
        count: the pieces of a batch in order, from the raw inputs and the number of placeholders found.
        from_features: whether the tokens of features made beforehand (N tensors (tokens, D)) say the same.
        parts: features come in parts (tiles), several of which may make one medium.
        lines: an image stands in lines of patches, each closed by a token that is no patch; they are the image's too.
        spread: words may stand between the tokens of one medium (the times of a video's frames); they stay text.
        whole_runs: the host itself takes a run of placeholders for one medium.
        fence: ids (before, behind) by which published processors fence each medium; behind None: by the first alone.
        shape: rows and columns of tokens of the media of a batch in order, a film's frames one below the other.
        fence_inside: the fence, and what else stands in it, is made of the host's visual vocabulary: part of the image.
    """

    count: Count
    from_features: bool = True
    parts: bool = False
    lines: bool = False
    spread: bool = False
    whole_runs: bool = False
    fence: Callable[[Any], tuple[int, int | None]] | None = None
    fence_inside: bool = False
    shape: Shape | None = None


def shapes(host: Host, inputs: Mapping[str, Any]) -> dict[Modality, list[tuple[int, int]]]:
    """Rows and columns of tokens of every medium of a forward in order, by modality, where the host is told them."""
    found = {}
    for modality, way in _family(host).items():
        try:
            found[modality] = [] if way.shape is None else way.shape(host, inputs)
        except UnknownItems:
            continue
    return found


def locate(
    host: Host,
    inputs: Mapping[str, Any],
    modalities: Tokens,
    placeholders: Mapping[Modality, int],
    ids: Tokens | None,
) -> tuple[Tokens, Tokens]:
    """Modality and item of every token of a forward, found on the host.

    Args:
        host: the host.
        inputs: of the forward.
        modalities: (B, S) values of `Modality`, as placeholders or `mm_token_type_ids` tell them.
        placeholders: token id per modality.
        ids: (B, S) input ids of the forward; None where it was given embeddings.

    Returns:
        modalities (B, S), where the tokens that end an image's lines are image tokens too; items (B, S), counted within
        each sample from 0 over all modalities together, -1 for text and padding, `UNKNOWN` where they cannot be known.
    """
    spots = np.maximum(modalities, int(Modality.TEXT))
    if ids is not None:
        told = np.zeros_like(spots)
        for modality, token in placeholders.items():
            told[ids == token] = int(modality)
        spots[told != spots] = int(Modality.TEXT)
    given = np.full_like(modalities, -1) if ids is None else ids
    samples = [_Sample(*tokens) for tokens in zip(modalities, spots, given, strict=True)]
    try:
        if ids is not None and not brings_media(inputs) and _stand_together(host):
            _run_by_run(samples)
        else:
            _divide(host, inputs, samples)
    except UnknownItems:
        for sample in samples:
            sample.forget()
    return np.stack([sample.modality for sample in samples]), np.stack([sample.item for sample in samples])


class _Sample:
    """One sample of the batch, being divided."""

    def __init__(self, modality: Tokens, spots: Tokens, ids: Tokens) -> None:
        self.given, self.modality, self.spots, self.ids = modality, modality.copy(), spots, ids
        edges = [0, *(np.flatnonzero(np.diff(spots)) + 1).tolist(), len(spots)]
        self.runs = [(int(spots[a]), a, b) for a, b in pairwise(edges) if b > a and spots[a] > Modality.TEXT]
        self.item = np.full_like(modality, -1)
        self.items = 0
        self.unknown_from = len(modality)

    def forget(self) -> None:
        """Nothing is known of this sample's items."""
        self.modality = self.given
        self.item = np.where(self.modality > Modality.TEXT, UNKNOWN, -1)

    def add(self, modality: int, first: int, stop: int, *, filled: bool) -> None:
        """The next item: tokens first .. stop, all of them or those that hold features of it."""
        tokens = slice(first, stop)
        mine = np.ones(stop - first, bool) if filled else self.spots[tokens] == modality
        self.modality[tokens] = np.where(mine, modality, self.modality[tokens])
        self.item[tokens] = np.where(mine, self.items, self.item[tokens])
        self.items += 1

    def doubt(self, place: int) -> None:
        """From this token on the number of items is not known."""
        self.unknown_from = min(self.unknown_from, place)

    def close(self) -> None:
        """Give tokens that are marked as media, but hold no features (fences), to their items; mark what is unknown."""
        if ((self.modality > Modality.TEXT) & (self.item < 0)).any():
            edges = [0, *(np.flatnonzero(np.diff(self.modality)) + 1).tolist(), len(self.modality)]
            for first, stop in pairwise(edges):
                if self.modality[first] > Modality.TEXT:
                    self.item[first:stop] = _fences(self.item[first:stop])
        self.item[self.unknown_from :][self.modality[self.unknown_from :] > Modality.TEXT] = UNKNOWN


def _fences(items: Tokens) -> Tokens:
    """Items of a stretch of tokens where some (-1) hold no features: every item has as many before it as the first."""
    told = np.flatnonzero(items >= 0)
    if not len(told):
        return np.full_like(items, UNKNOWN)
    leading, made = int(told[0]), items.copy()
    made[:leading] = items[told[0]]
    for here, following in pairwise([*told.tolist(), len(items)]):
        turn = following if following == len(items) else max(here + 1, following - leading)
        made[here + 1 : turn] = items[here]
        made[turn:following] = items[following] if following < len(items) else items[here]
    return made


# -- walking the prompts ------------------------------------------------------------------------------------------


def _divide(host: Host, inputs: Mapping[str, Any], samples: Sequence[_Sample]) -> None:
    tokens: dict[int, int] = {}
    for sample in samples:
        for modality, first, stop in sample.runs:
            tokens[modality] = tokens.get(modality, 0) + stop - first
    ways = {modality: _way(host, Modality(modality)) for modality in tokens}
    try:
        supply = {
            modality: deque(_pieces(host, ways[modality], inputs, Modality(modality), tokens[modality]))
            for modality in tokens
        }
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnknownItems from error  # inputs that this arithmetic was not written for; the host itself judges them
    for sample in samples:
        _walk(host, ways, supply, sample)
    if any(pieces for pieces in supply.values()):
        raise UnknownItems
    for sample in samples:
        sample.close()


def _run_by_run(samples: Sequence[_Sample]) -> None:
    """A host that is given placeholders and no media has nothing to put there: each run of them counts as one item."""
    for sample in samples:
        for modality, first, stop in sample.runs:
            sample.add(modality, first, stop, filled=False)
        sample.close()


def _walk(host: Host, ways: Mapping[int, Way], supply: Mapping[int, deque[Piece]], sample: _Sample) -> None:
    index = 0
    while index < len(sample.runs):
        modality, start, stop = sample.runs[index]
        way, pieces = ways[modality], supply[modality]
        fence = _fenced(host, way, sample, index)
        if fence is not None:
            first, behind, index = fence
            _take_exactly(pieces, int((sample.spots[first:behind] == modality).sum()))
            sample.add(modality, first, behind, filled=way.fence_inside)
            continue
        while start < stop:
            piece, first = _take(pieces), start
            index, start, stop, broken = _lay(way, sample, index, start, piece.tokens)
            if piece.goes_on and start < stop:
                sample.doubt(first)
            last = start
            if way.lines and start == stop and _line_ends(host, sample, start, broken):
                last += 1
            sample.add(modality, first, last, filled=way.lines)
        index += 1


def _lay(way: Way, sample: _Sample, index: int, start: int, tokens: int) -> tuple[int, int, int, bool]:
    """Lay `tokens` tokens from `start` in run `index` on: the run and token behind, and if they are in lines."""
    modality, _, stop = sample.runs[index]
    lengths = []
    while tokens > stop - start:
        lengths.append(stop - start)
        tokens -= stop - start
        index += 1
        if index == len(sample.runs) or sample.runs[index][0] != modality or not (way.lines or way.spread):
            raise UnknownItems
        if way.lines and sample.runs[index][1] != stop + 1:
            raise UnknownItems
        _, start, stop = sample.runs[index]
    lengths.append(tokens)
    if way.lines and len(set(lengths)) > 1:
        raise UnknownItems
    return index, start + tokens, stop, len(lengths) > 1


def _line_ends(host: Host, sample: _Sample, place: int, broken: bool) -> bool:
    """Whether this token closes an image's last line.

    An image of one line shows no structure: there the token itself must be that of Mistral's tokenizers, in which
    [IMG], [IMG_BREAK] and [IMG_END] are 10, 12 and 13.
    """
    if place == len(sample.modality) or sample.modality[place] < Modality.TEXT:
        return False
    return broken or sample.ids[place] == host.config.image_token_id + 3


def _fenced(host: Host, way: Way, sample: _Sample, index: int) -> tuple[int, int, int] | None:
    """(first token, token behind, next run) of the item that begins at run `index`, where something marks its ends."""
    _, start, stop = sample.runs[index]
    if way.whole_runs:
        return start, stop, index + 1
    if way.fence is None:
        return None
    before, behind = way.fence(host.config)
    if start == 0 or sample.ids[start - 1] != before:
        return None
    if behind is None:
        return start, stop, index + 1
    ends = np.flatnonzero(sample.ids[stop:] == behind)
    if not len(ends):
        return None
    end = stop + int(ends[0])
    if (sample.ids[start:end] == before).any():
        return None
    inside = sum(1 for _, first, _ in sample.runs[index:] if first < end)
    if way.fence_inside:
        return start - 1, end + 1, index + inside
    return (start, end, index + 1) if end == stop else None


def _take(pieces: deque[Piece]) -> Piece:
    while pieces:
        piece = pieces.popleft()
        if piece.tokens:
            return piece
    raise UnknownItems


def _take_exactly(pieces: deque[Piece], tokens: int) -> None:
    while tokens > 0:
        tokens -= _take(pieces).tokens
    if tokens:
        raise UnknownItems


# -- tokens per piece, family by family -----------------------------------------------------------------------------


def _way(host: Host, modality: Modality) -> Way:
    fixed = (getattr(host.config, "tokens_per_item", None) or {}).get(modality.name.lower())
    if fixed:
        return Way(lambda host, inputs, tokens: _alike(tokens, fixed), from_features=False)
    return _family(host).get(modality, Way(_only_one(modality), from_features=False))


def _family(host: Host) -> Mapping[Modality, Way]:
    name = host.config.model_type
    if name == "llava" and host.config.vision_config.model_type == "pixtral":
        name = "llava, pixtral"
    return _FAMILIES.get(name, {})


def _stand_together(host: Host) -> bool:
    """Whether a host of the table shows each medium as one run of placeholders."""
    ways = _family(host).values()
    return bool(ways) and not any(way.lines or way.spread for way in ways)


def _pieces(host: Host, way: Way, inputs: Mapping[str, Any], modality: Modality, tokens: int) -> list[Piece]:
    made = _made(inputs, modality)
    if made is None or not way.from_features:
        return way.count(host, inputs, tokens)
    return [Piece(feature.shape[:-1].numel(), way.parts) for feature in made]


def _made(inputs: Mapping[str, Any], modality: Modality) -> Sequence[Tensor] | None:
    """The features of each medium (tokens, D), where they were made beforehand."""
    output = (inputs.get(FEATURES) or {}).get(modality.name.lower())
    if output is None:
        return None
    features = output.pooler_output
    if len(features) == 1 and getattr(output, "last_hidden_state", None) is None:
        raise UnknownItems  # a prompt read in chunks: transformers hands over all tokens of a chunk as one
    return features


def _given(inputs: Mapping[str, Any], *names: str) -> Any:
    value = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if value is None:
        raise UnknownItems
    return value


def _alike(tokens: int, each: int) -> list[Piece]:
    if tokens % each:
        raise UnknownItems
    return [Piece(each)] * (tokens // each)


def _pieces_of(counts: Tensor) -> list[Piece]:
    return [Piece(tokens) for tokens in counts.tolist()]


def _equal(*names: str, parts: bool = False) -> Count:
    """All N media, the first dimension of what `names` bring, take equally many tokens.

    A host whose prompts hold another number of placeholders refuses them itself.
    """

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        n = len(_given(inputs, *names))
        if not n or tokens % n:
            raise UnknownItems
        return [Piece(tokens // n, parts)] * n

    return count


def _only_one(modality: Modality) -> Count:
    """Of a host that the table does not know: nothing is told, unless there is but one medium."""

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        made = _made(inputs, modality)
        if len(_given(inputs, *_keywords(modality)) if made is None else made) != 1:
            raise UnknownItems
        return [Piece(tokens)]

    return count


_PICTURES = ("pixel_values", "pixel_values_images")


def _patches(merge: Callable[[Any], int]) -> Count:
    """Images of any size in whole patches: height times width over the side of what becomes one token."""

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        pixels = _given(inputs, "pixel_values")
        sizes = inputs.get("image_sizes")
        side = host.config.vision_config.patch_size * merge(host.config)
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        elif isinstance(sizes, Tensor):
            sizes = sizes.tolist()
        return [Piece((int(height) // side) * (int(width) // side)) for height, width in sizes]

    return count


def _tiled(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """LLaVA-NeXT and its kin: the host's own packing, done on tensors that hold nothing."""
    patches = (host.config.vision_config.image_size // host.config.vision_config.patch_size) ** 2
    sizes, tiles = _tiles(host, inputs)
    nothing = [torch.empty(count, patches, 1, device="meta") for count in tiles]
    return [Piece(len(image)) for image in _packed(host, inputs, nothing, sizes)]


def packed_tiles(host: Host, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> Sequence[Tensor]:
    """What stands in the place of each image of a host that cuts them into tiles, by its own packing.

    Args:
        host: one of the table's whose images come in tiles.
        inputs: of a forward, or what an image processor gave.
        features: of each image (tiles, patches, 1), those that only fill up a batch included.

    Returns:
        (tokens, 1) for each image; 0 for tokens that close a line.

    Raises:
        HostError: its class token stays among the patches.
    """
    try:
        sizes, tiles = _tiles(host, inputs)
    except UnknownItems:
        raise HostError(
            f"image sizes are lacking, or the class token stays among the patches of {type(host.backbone).__name__}",
            remedy='set vision_feature_select_strategy="default"',
        ) from None
    return _packed(host, inputs, [each[:count] for each, count in zip(features, tiles, strict=True)], sizes)


def _tiles(host: Host, inputs: Mapping[str, Any]) -> tuple[list[list[int]], list[int]]:
    """The sizes of images, and into how many tiles each is cut."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, vision = host.config, host.config.vision_config
    sizes = _given(inputs, "image_sizes")
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, size)) for size in sizes]
    if _selected(host, inputs) != "default" and vision.model_type.startswith("clip"):
        raise UnknownItems  # the class token stays among the patches
    alone = inputs.get("batch_num_images")
    cut = [True] * len(sizes) if alone is None else [int(n) == 1 for n in alone for _ in range(int(n))]
    return sizes, [
        image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size) if whole else 1
        for size, whole in zip(sizes, cut, strict=True)
    ]


def _selected(host: Host, inputs: Mapping[str, Any]) -> str:
    return inputs.get("vision_feature_select_strategy") or host.config.vision_feature_select_strategy


def _packed(host: Host, inputs: Mapping[str, Any], features: list[Tensor], sizes: list[list[int]]) -> Sequence[Tensor]:
    how: dict[str, Any] = {"image_newline": features[0].new_zeros(1)}
    if host.config.model_type == "llava_onevision":
        how["vision_aspect_ratio"] = host.config.vision_aspect_ratio
    else:
        how["vision_feature_select_strategy"] = _selected(host, inputs)
    packed, _ = host.backbone.pack_image_features(features, sizes, **how)
    return packed


def _grid(names: str, merge: Callable[[Host, Mapping[str, Any]], Any]) -> Count:
    """Qwen-VL and its kin: frames times height times width in patches, of which `merge` squared become one token."""

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        return _pieces_of(_given(inputs, names).prod(dim=-1) // merge(host, inputs) ** 2)

    return count


def _merge_size(host: Host, inputs: Mapping[str, Any]) -> Any:
    return host.config.vision_config.spatial_merge_size


def _merge_sizes(host: Host, inputs: Mapping[str, Any]) -> Any:
    return _given(inputs, "image_merge_sizes")


def _rows_and_columns(name: str, merge: Callable[[Host, Mapping[str, Any]], Any]) -> Shape:
    """The same by lines: all frames of a film below one another."""

    def shape(host: Host, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        frames, rows, columns = _given(inputs, name).unbind(dim=-1)
        side = merge(host, inputs)
        return [(row, column) for row, column in torch.stack([frames * rows // side, columns // side], dim=-1).tolist()]

    return shape


def _compressed_films(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """VideoLLaMA 3 leaves out tokens of frames that changed little."""
    made = _made(inputs, Modality.VIDEO)
    if made is None:
        counts = _given(inputs, "video_grid_thw").prod(dim=-1) // _given(inputs, "video_merge_sizes") ** 2
        sizes = counts.tolist()
    else:
        sizes = [len(feature) for feature in made]
    kept = inputs.get("video_compression_mask")
    if kept is None:
        return [Piece(size) for size in sizes]
    return _pieces_of(torch.stack([video.sum() for video in kept.split(sizes)]))


def _films(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """Video-LLaVA: features come frame by frame; raw videos are counted, of features a video's length is known."""
    if _made(inputs, Modality.VIDEO) is None:
        return _equal("pixel_values_videos")(host, inputs, tokens)
    return _alike(tokens, host.config.video_seq_length)


def _whisper_windows(mask: str, *, windows: bool) -> Count:
    """Audio through a Whisper-like tower; where these are `windows`, a full one may be continued by the next."""

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        frames = _given(inputs, mask).sum(dim=-1).to(torch.int64)
        _, lengths = host.backbone.audio_tower._get_feat_extract_output_lengths(frames)
        full = 2 * host.config.audio_config.max_source_positions if windows else None
        pairs = torch.stack([lengths, frames], dim=-1).tolist()
        return [Piece(length, full is not None and frame >= full) for length, frame in pairs]

    return count


def _glm_windows(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """GLM-ASR's two convolutions (kernel 3, strides 1 and 2), then four frames to a token."""
    frames = _given(inputs, "input_features_mask").sum(dim=-1).to(torch.int64)
    lengths = ((frames - 1) // 2 + 1 - 4) // 4 + 1
    full = 2 * host.config.audio_config.max_position_embeddings
    return [Piece(length, frame >= full) for length, frame in torch.stack([lengths, frames], dim=-1).tolist()]


def _chunked_sounds(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """Qwen3-ASR: each chunk of frames passes three convolutions of stride 2 by itself."""
    mask = _given(inputs, "input_features_mask")
    frames = mask.unflatten(-1, (-1, 2 * host.config.audio_config.n_window)).sum(dim=-1).to(torch.int64)
    for _ in range(3):
        frames = torch.where(frames > 0, (frames - 1) // 2 + 1, 0)
    return _pieces_of(frames.sum(dim=-1))


def _rejoined_windows(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    """MOSS: the lengths of the raw audio say how many windows each was cut into."""
    merge = host.config.audio_merge_size
    convolved = (_given(inputs, "input_features_mask").sum(dim=-1).to(torch.int64) - 1) // 2 + 1
    windows = ((convolved + merge - 1) // merge).tolist()
    samples = _given(inputs, "padding_mask").sum(dim=-1).tolist()
    size, counts = host.config.audio_chunk_size, []
    for length in samples:
        n = max(1, -(-int(length) // size))
        counts.append(Piece(sum(windows[:n])))
        windows = windows[n:]
    if windows:
        raise UnknownItems
    return counts


def _valid_frames(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
    return _pieces_of(_given(inputs, "input_features_mask").sum(dim=-1).to(torch.int64))


def _waves(length: Callable[[Host, Tensor], Tensor]) -> Count:
    """Raw waves (N, ..., samples); without a mask all are of one length."""

    def count(host: Host, inputs: Mapping[str, Any], tokens: int) -> list[Piece]:
        mask = inputs.get("padding_mask")
        if mask is None:
            return _equal("input_values")(host, inputs, tokens)
        return _pieces_of(length(host, mask.sum(dim=-1).to(torch.int64)).flatten())

    return count


def _subsampled(host: Host, samples: Tensor) -> Tensor:
    return host.backbone.audio_tower._get_subsampling_output_length(samples)


def _hops(host: Host, samples: Tensor) -> Tensor:
    hop = host.config.acoustic_tokenizer_encoder_config.hop_length
    return (samples + hop - 1) // hop


def _img_tokens(config: Any) -> tuple[int, int]:
    """<img> and </img> stand right before the placeholder in the vocabularies of InternVL, Qianfan-OCR and GOT-OCR."""
    return config.image_token_id - 2, config.image_token_id - 1


def _begin_audio(config: Any) -> tuple[int, None]:
    """[BEGIN_AUDIO] stands right behind [AUDIO] in Voxtral's vocabulary."""
    return config.audio_token_id + 1, None


def _indicators(config: Any) -> tuple[int, int]:
    return config.visual_indicator_token_ids[0], config.visual_indicator_token_ids[-1]


_ONE_SIZE = {Modality.IMAGE: Way(_equal(*_PICTURES))}
_TILES = {Modality.IMAGE: Way(_equal("pixel_values", parts=True), parts=True, fence=_img_tokens)}
_MERGED = {Modality.IMAGE: Way(_patches(lambda config: config.spatial_merge_size), lines=True)}
_GRID = {
    modality: Way(_grid(name, _merge_size), shape=_rows_and_columns(name, _merge_size))
    for modality, name in ((Modality.IMAGE, "image_grid_thw"), (Modality.VIDEO, "video_grid_thw"))
}

# host config.model_type -> modality -> how its media take their tokens (seen in transformers 5.23.0 and 5.24.0)
_FAMILIES: Mapping[str, Mapping[Modality, Way]] = {
    "llava": _ONE_SIZE,
    "llava, pixtral": {Modality.IMAGE: Way(_patches(lambda config: 1), lines=True)},
    "vipllava": _ONE_SIZE,
    "paligemma": _ONE_SIZE,
    "gemma3": _ONE_SIZE,
    "janus": _ONE_SIZE,
    "deepseek_vl": _ONE_SIZE,
    "deepseek_vl_hybrid": _ONE_SIZE,
    "video_llava": {**_ONE_SIZE, Modality.VIDEO: Way(_films, from_features=False)},
    "llava_next": {Modality.IMAGE: Way(_tiled)},
    "llava_next_video": {Modality.IMAGE: Way(_tiled), Modality.VIDEO: Way(_equal("pixel_values_videos"))},
    "llava_onevision": {Modality.IMAGE: Way(_tiled), Modality.VIDEO: Way(_equal("pixel_values_videos"))},
    "mistral3": _MERGED,
    "lighton_ocr": _MERGED,
    "qwen2_vl": _GRID,
    "qwen2_5_vl": _GRID,
    "qwen3_vl": {Modality.IMAGE: _GRID[Modality.IMAGE]},
    "video_llama_3": {
        Modality.IMAGE: Way(
            _grid("image_grid_thw", _merge_sizes), shape=_rows_and_columns("image_grid_thw", _merge_sizes)
        ),
        Modality.VIDEO: Way(_compressed_films, from_features=False, spread=True),
    },
    "internvl": _TILES,
    "qianfan_ocr": _TILES,
    "got_ocr2": _TILES,
    "ovis2": {
        Modality.IMAGE: Way(_equal("pixel_values", parts=True), parts=True, fence=_indicators, fence_inside=True),
    },
    "qwen2_audio": {Modality.AUDIO: Way(_whisper_windows("feature_attention_mask", windows=False))},
    "audioflamingo3": {Modality.AUDIO: Way(_whisper_windows("input_features_mask", windows=True))},
    "musicflamingo": {Modality.AUDIO: Way(_whisper_windows("input_features_mask", windows=True), whole_runs=True)},
    "voxtral": {Modality.AUDIO: Way(_equal("input_features", parts=True), fence=_begin_audio)},
    "glmasr": {Modality.AUDIO: Way(_glm_windows)},
    "qwen3_asr": {Modality.AUDIO: Way(_chunked_sounds)},
    "moss_transcribe_diarize": {Modality.AUDIO: Way(_rejoined_windows, spread=True)},
    "fun_asr_nano": {Modality.AUDIO: Way(_valid_frames)},
    "omniasr": {Modality.AUDIO: Way(_waves(_subsampled))},
    "vibevoice_asr": {Modality.AUDIO: Way(_waves(_hops))},
}
