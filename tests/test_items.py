"""Which tokens belong to which medium: hosts of every family against what their own towers make of each medium."""

from __future__ import annotations

from functools import cache as once
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from alula import WingsConfig, attach
from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.items import FEATURES
from alula.media import MEDIA
from alula.seam import NAME, install
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.tokens import UNKNOWN, Modality, TokenMap
from tests import zoo
from tests.media_hosts import AUDIO, BREAK, END, FRAMES, HOSTS, IMAGE, VIDEO, Host, frame_mask, noise

PLACEHOLDER = {Modality.IMAGE: IMAGE, Modality.VIDEO: VIDEO, Modality.AUDIO: AUDIO}
LINES = {  # of patches per image, where [IMG_BREAK] and [IMG_END] stand between and behind them
    "llava_pixtral": ([2, 3, 1], [3, 2, 4]),
    "mistral3": ([2, 3, 1], [3, 2, 4]),
}
PARTS = ("internvl", "ovis2", "voxtral")  # the host is not told which tiles or windows make one medium


@once
def host(name: str) -> Host:
    if name == "omniasr" and name not in CONFIG_MAPPING:
        pytest.skip("OmniASR is newer than this transformers")
    return HOSTS[name]()


def medium(name: str, n: int, made: Host) -> list[int]:
    """Tokens of the n-th medium as its family's processor writes them."""
    token = PLACEHOLDER[made.kind]
    if name not in LINES:
        return [token] * made.tokens[n]
    height, width = (sizes[n] for sizes in LINES[name])
    tokens = [*([token] * width), BREAK] * height
    tokens[-1] = END
    # an image of one line shows no structure: its end is told by the token's place in Mistral's vocabulary
    return tokens if height > 1 else [*tokens[:-1], IMAGE + 3]


def prompts(name: str, made: Host, between: list[int], side: str) -> tuple[dict[str, Any], list[list[int]]]:
    """Two padded prompts, of media 0 and 1 and of medium 2, and the item of every token."""
    tokens, items = [], []
    for own in ([0, 1], [2]):
        row, mine = [3, 4], [-1, -1]
        for place, n in enumerate(own):
            row += between if place else []
            mine += [-1] * len(between) if place else []
            row += medium(name, n, made)
            mine += [place] * len(medium(name, n, made))
        tokens.append([*row, 5])
        items.append([*mine, -1])
    width = max(map(len, tokens))
    gaps = [width - len(row) for row in tokens]
    before = [gap if side == "left" else 0 for gap in gaps]
    ids, mask, padded = [], [], []
    for row, item, gap, first in zip(tokens, items, gaps, before, strict=True):
        ids.append([zoo.PAD] * first + row + [zoo.PAD] * (gap - first))
        mask.append([0] * first + [1] * len(row) + [0] * (gap - first))
        padded.append([-1] * first + item + [-1] * (gap - first))
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **made.inputs}
    if name.startswith("qwen"):
        spots = batch["input_ids"] == PLACEHOLDER[made.kind]
        batch["mm_token_type_ids"] = torch.where(spots, int(made.kind), 0)
    return batch, padded


class Listener:
    """Keeps the tokens of every forward while it is on a host."""

    def __init__(self, model: Any) -> None:
        self.seam = install(model, "listener")
        self.tokens: list[TokenMap] = []
        layer = self.seam.anatomy.layers[-1]
        self._hook = layer.register_forward_pre_hook(
            lambda m, a, kw: self.tokens.append(kw[NAME].tokens), with_kwargs=True
        )

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.seam.release("listener")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in HOSTS if name not in PARTS])
def test_adjacent_media_of_mixed_sizes_in_a_padded_batch(name: str, side: str) -> None:
    made = host(name)
    between = [6] if name.startswith("qwen2_5_vl") else []  # this host itself takes adjacent images for one
    batch, items = prompts(name, made, between, side)
    with Listener(made.model) as heard, torch.no_grad():
        made.model(**batch)
        if made.kind is not Modality.AUDIO and side == "left":  # `generate` runs the tower before the forward
            made.model.generate(**batch, max_new_tokens=1, pad_token_id=zoo.PAD)
    for tokens in heard.tokens:
        assert tokens.item.tolist() == items
        assert torch.equal(tokens.modality == made.kind, tokens.item >= 0)
        assert torch.equal(tokens.valid, batch["attention_mask"].bool())


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_nothing_groups_are_never_melted_nor_split(name: str) -> None:
    made = host(name)
    apart, items = prompts(name, made, [6], "left")
    together, _ = prompts(name, made, [], "left")
    with Listener(made.model) as heard, torch.no_grad():
        made.model(**apart)
        made.model(**together)
    assert heard.tokens[0].item.tolist() == items
    ids = together["input_ids"]
    assert heard.tokens[1].item[0].tolist() == torch.where(ids[0] == PLACEHOLDER[made.kind], UNKNOWN, -1).tolist()
    assert heard.tokens[1].item[1].max() == 0, "another sample of the batch is as it would be by itself"


FENCES = {"internvl": ([IMAGE - 2], [], [IMAGE - 1]), "ovis2": ([51], [53], [55]), "voxtral": ([AUDIO + 1], [], [])}


@pytest.mark.parametrize("name", PARTS)
def test_the_fences_of_published_processors_group_parts(name: str) -> None:
    made = host(name)
    before, between, behind = FENCES[name]
    part = medium(name, 0, made)
    ids = torch.tensor([[3, *before, *part, *between, *part, *behind, *before, *part, *behind, 4]])
    with Listener(made.model) as heard, torch.no_grad():
        made.model(input_ids=ids, **made.inputs)
    tokens = heard.tokens[0]
    first, second = len([*before, *part, *between, *part, *behind]), len([*before, *part, *behind])
    if name == "ovis2":  # its fences are made of the visual vocabulary
        assert tokens.item.tolist() == [[-1] + [0] * first + [1] * second + [-1]]
    else:
        assert tokens.is_perceptual.equal(ids == PLACEHOLDER[made.kind])
        told = tokens.item[0][tokens.is_perceptual[0]]
        assert told.tolist() == [0] * 2 * len(part) + [1] * len(part)


def test_windows_of_a_long_sound_are_not_taken_for_sounds() -> None:
    made = host("audioflamingo3")
    frames = frame_mask(32, [32, *FRAMES[1:]])  # the first window is full: the second may go on with it
    rows = [8, *made.tokens[1:]]
    ids = torch.tensor([[3, *[AUDIO] * rows[0], *[AUDIO] * rows[1], 4, *[AUDIO] * rows[2]]])
    with Listener(made.model) as heard, torch.no_grad():
        made.model(input_ids=ids, input_features=noise(3, 6, 32), input_features_mask=frames)
    assert heard.tokens[0].item[0].unique().tolist() == [UNKNOWN, -1]


def test_words_between_the_windows_of_a_sound_stay_text() -> None:
    made = host("moss_transcribe_diarize")
    first, second, third = made.tokens
    ids = torch.tensor([[3, *[AUDIO] * 5, 7, *[AUDIO] * (first - 5), *[AUDIO] * second, 8, *[AUDIO] * third]])
    with Listener(made.model) as heard, torch.no_grad():
        made.model(input_ids=ids, **made.inputs)
    items = [-1, *[0] * 5, -1, *[0] * (first - 5), *[1] * second, -1, *[2] * third]
    assert heard.tokens[0].item.tolist() == [items]
    assert heard.tokens[0].modality[0, 6] == Modality.TEXT


def test_types_that_mark_line_breaks_say_the_same() -> None:
    made = host("llava_pixtral")
    batch, items = prompts("llava_pixtral", made, [], "right")
    types = (torch.tensor(items) >= 0).long()  # as PixtralProcessor gives them when asked
    kinds, told = Anatomy.of(made.model).items(batch, types.numpy(), batch["input_ids"].numpy())
    assert told.tolist() == items
    assert kinds.tolist() == types.tolist()


def test_types_that_mark_fences_give_each_its_own() -> None:
    made = host("glmasr")
    ids = torch.tensor([[3, 6, *[AUDIO] * 2, 7, 6, *[AUDIO] * 1, 7, 4, 6, *[AUDIO] * 4, 7]])
    types = torch.where((ids == 3) | (ids == 4), 0, int(Modality.AUDIO))
    _, told = Anatomy.of(made.model).items(made.inputs, types.numpy(), ids.numpy())
    assert told.tolist() == [[-1, 0, 0, 0, 0, 1, 1, 1, -1, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("name", ["llava_pixtral", "llava_next", "qwen2_5_vl", "qwen2_audio", "glmasr"])
def test_counts_that_do_not_add_up_leave_items_unknown(name: str) -> None:
    made = host(name)
    batch, _ = prompts(name, made, [], "left")
    anatomy = Anatomy.of(made.model)
    for ids in (batch["input_ids"][:, :5], batch["input_ids"].repeat(1, 2)):
        kinds = torch.where(ids == PLACEHOLDER[made.kind], int(made.kind), 0)
        _, told = anatomy.items(made.inputs, kinds.numpy(), ids.numpy())
        assert told.tolist() == torch.where(kinds > 0, UNKNOWN, -1).tolist()


def test_a_family_that_nobody_knows_tells_nothing_but_a_single_medium() -> None:
    model = zoo.build("llava-llama")
    model.config.model_type = "stranger"
    one, two = zoo.batch("llava-llama", "3I4"), zoo.batch("llava-llama", "3I1I2")
    with Listener(model) as heard:
        model(**one)
        model(**two)
    assert heard.tokens[0].item.max() == 0
    assert heard.tokens[1].item.unique().tolist() == [UNKNOWN, -1]


def test_whoever_needs_items_refuses_unknown_ones() -> None:
    model = zoo.build("llava-llama")
    model.config.model_type = "stranger"
    attach(model, WingsConfig(compat="published", rank=4))
    model(**zoo.batch("llava-llama", "3I4"))
    with pytest.raises(UsageError, match="how many stand here cannot be told"):
        model(**zoo.batch("llava-llama", "3I1I2"))


def test_features_handed_over_in_chunks_leave_items_unknown() -> None:
    """`generate(prefill_chunk_size=...)` melts the features of a chunk into one."""
    model = zoo.build("llava-llama")
    batch = zoo.batch("llava-llama", "3II2")
    with Listener(model) as heard:
        model.generate(**batch, max_new_tokens=1, prefill_chunk_size=9)
    assert heard.tokens[0].item.max() < 0
    assert (heard.tokens[0].item == UNKNOWN).any()


def test_items_behind_unknown_ones_are_unknown() -> None:
    kinds = torch.tensor([[0, 1, 1], [0, 1, 1]])
    known = TokenMap.from_modalities(kinds)
    item = torch.tensor([[-1, UNKNOWN, UNKNOWN], [-1, 0, 0]])
    past = TokenMap(modality=kinds, item=item, position=known.position, role=known.role)
    assert past.append(known).item[:, 3:].tolist() == [[-1, UNKNOWN, UNKNOWN], [-1, 1, 1]]


# -- media on a kept cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["omniasr", "glmasr", "qwen3_asr"])
def test_a_second_sound_on_a_kept_cache_is_a_sound(name: str) -> None:
    made = host(name)
    turns = [torch.tensor([[3, *[AUDIO] * made.tokens[n], 4]]) for n in (0, 1)]
    own = [{key: value[n : n + 1] for key, value in made.inputs.items()} for n in (0, 1)]
    with Listener(made.model) as heard, torch.no_grad():
        past = cache_of_output(made.model(input_ids=turns[0], use_cache=True, **own[0]))
        made.model(input_ids=turns[1], use_cache=True, **{cache_keyword(): past}, **own[1])
    assert heard.tokens[1].modality.equal(torch.where(turns[1] == AUDIO, int(Modality.AUDIO), int(Modality.TEXT)))
    assert heard.tokens[1].item.unique().tolist() == [-1, 1]


def test_a_new_turn_of_placeholders_is_perceptual_whatever_keyword_brought_it() -> None:
    """Without a medium alula knows, several new tokens are read as a forward without a cache reads them."""
    model = zoo.build("llava-llama")
    first, second = zoo.batch("llava-llama", "2I3"), zoo.batch("llava-llama", "2I1")
    with Listener(model) as heard, torch.no_grad():
        past = cache_of_output(model(**first, use_cache=True))
        model(input_ids=second["input_ids"], use_cache=True, **{cache_keyword(): past})
        model(input_ids=torch.tensor([[IMAGE]]), use_cache=True, **{cache_keyword(): past})
    assert torch.equal(heard.tokens[1].is_perceptual, second["input_ids"] == IMAGE)
    assert heard.tokens[2].is_text.all(), "a single token is a generated token, whatever was sampled"


def test_every_medium_that_generate_drops_after_the_prompt_is_known() -> None:
    data = {name for name in MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL if "mask" not in name}
    data -= {name for name in data if any(part in name for part in ("sizes", "grid", "num_", "indices", "pooling"))}
    assert data <= {keyword for medium in MEDIA.values() for keyword in medium.inputs} | {FEATURES}
