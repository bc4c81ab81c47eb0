"""A prompt that somebody points into: which of its tokens are meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.codes import CodesProcessor
from alula.errors import UsageError
from alula.inputs import Intake
from alula.media import MEDIA
from alula.steering.patches import edges_of_sound, shares_of_film, shares_of_images
from alula.steering.regions import Box, Frames, Mask, Polygon, Seconds, Whole
from alula.steering.spans import Decoded, Span, parts_of, written
from alula.tokens import UNKNOWN, Modality

Messages = Sequence[Mapping[str, Any]]
_REGIONS = ", ".join(kind.__name__ for kind in (Box, Polygon, Mask, Frames, Seconds, Whole))


class Prompt:
    """The inputs of a model, and what they were made of.

    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, ...)
    prompt = Prompt(model, processor, inputs, messages)
    prompt.marks(spans=["the left one"])  # (B, S)
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        inputs: Mapping[str, Any],
        messages: Any = None,
        **images_kwargs: Any,
    ) -> None:
        """
        Args:
            model: the host.
            processor: its processor or tokenizer, or an `Intake`, which knows the variables of its chat template.
            inputs: what it made: ``input_ids`` (B, S), ``attention_mask`` (B, S) where there is padding.
            messages: what it was made of: one conversation, or one for each sample; with decoded media. Only parts of
                messages and regions ask for it.
            images_kwargs: that images were prepared with beside the processor's own, e.g. ``do_pan_and_scan=True``.

        Raises:
            UsageError: there are no ids, or conversations for another number of samples.
        """
        self.anatomy = Anatomy.of(model)
        self.intake, self._images_kwargs = Intake.of(processor), images_kwargs
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise UsageError(
                "a prompt needs input_ids of (samples, tokens)",
                remedy='let the processor return them: return_tensors="pt"',
            )
        self.inputs, self.ids = inputs, ids.cpu()
        mask = inputs.get("attention_mask")
        self.valid = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        self.messages = None if messages is None else self._conversations(messages)

    def _conversations(self, messages: Any) -> list[Messages]:
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        chats = [messages] if is_one else list(messages)
        if len(chats) != len(self.ids):
            raise UsageError(f"messages are of {len(chats)} conversations, the inputs of {len(self.ids)}")
        return [[_in_parts(message) for message in chat] for chat in chats]

    def marks(self, *, spans: Any = (), regions: Any = ()) -> Tensor:
        """(B, S) float32 weights of the tokens: 0 for what is not highlighted, of what overlaps the one named last.

        Args:
            spans: texts or `Span`s; of a batch, a list of them for each sample, or one that all samples have.
            regions: of images, films and sounds, likewise.

        Raises:
            UsageError: one is not found, or none is given.
        """
        marks = torch.zeros(self.ids.shape)
        pairs = zip(self._by_sample("spans", spans), self._by_sample("regions", regions), strict=True)
        for sample, (texts, places) in enumerate(pairs):
            rows = self.valid[sample].nonzero()[:, 0]
            for span in texts:
                own = Span(span) if isinstance(span, str) else span
                if not isinstance(own, Span):
                    raise UsageError(f"a span is a text or a Span, not a {type(span).__name__}")
                marks[sample, rows[self._tokens(sample, own)]] = own.weight
            for region in places:
                shares = self._shares(sample, region)
                least = min(region.share, float(shares.max()))
                if not least:
                    raise UsageError(
                        f"no token holds a part of {region}", remedy="the processor may have cropped it away"
                    )
                marks[sample, rows[shares >= least]] = region.weight
        if not marks.any():
            raise UsageError(
                "nothing is highlighted: there are neither spans nor regions", remedy="give spans=, regions= or both"
            )
        return marks

    def _by_sample(self, name: str, given: Any) -> list[list[Any]]:
        """What is given for each sample."""
        count = len(self.ids)
        if isinstance(given, str) or not isinstance(given, Sequence):
            return [[given]] * count
        if given and all(not isinstance(each, str) and isinstance(each, Sequence) for each in given):
            if len(given) != count:
                raise UsageError(f"{name} are of {len(given)} samples, the inputs of {count}")
            return [list(each) for each in given]
        if given and count > 1:
            raise UsageError(
                f"whose are these {name}? The inputs are of {count} samples",
                remedy=f"give a list for each sample ({name}=[[...], ...]), or one alone, which all have",
            )
        return [list(given)] * count

    # -- media --------------------------------------------------------------------------------------------------------

    def _shares(self, sample: int, region: Any) -> Tensor:
        """(tokens,) what share of each of a sample's own tokens a region covers."""
        if isinstance(self.intake.processor, CodesProcessor):
            raise UsageError(
                "this model reads images and sounds as codes, words like others to it, and which are a region's is not"
                " known",
                remedy="highlight words (spans=), or ask the host without its codes",
            )
        match region:
            case Whole(medium=medium, index=index):
                each = self._items(sample, medium)
                if index is not None or not each:
                    return _one_of(each, medium, index or 0, "inputs").float()
                return torch.stack(each).any(dim=0).float()
            case Box() | Polygon() | Mask():
                return self._shares_of_image(sample, region)
            case Frames():
                film = _one_of(self._media(sample, "video"), "video", region.film)
                tokens = _one_of(self._items(sample, "video"), "video", region.film, "inputs")
                frames = np.stack([np.asarray(frame) for frame in film])
                painted = region.paint(*frames.shape[:3])
                before = sum(len(self._media(other, "video")) for other in range(sample))
                grids = self.inputs.get("video_grid_thw")
                grid = None if grids is None else grids[before + region.film].tolist()
                shares = shares_of_film(self.anatomy, self.intake.processor, painted, int(tokens.sum()), grid)
            case Seconds():
                sound = _one_of(self._media(sample, "audio"), "audio", region.sound)
                tokens = _one_of(self._items(sample, "audio"), "audio", region.sound, "inputs")
                seconds = np.asarray(sound).size / (self.intake.sampling_rate or 1)
                edges = edges_of_sound(self.anatomy, seconds, int(tokens.sum()))
                shares = torch.from_numpy(region.shares(edges))
            case _:
                raise UsageError(f"a {type(region).__name__} is no region", remedy=f"give one of {_REGIONS}")
        found = torch.zeros(len(tokens))
        found[tokens] = shares
        return found

    def _shares_of_image(self, sample: int, region: Box | Polygon | Mask) -> Tensor:
        images = self._media(sample, "image")
        _one_of(images, "image", region.image)
        sizes = [_height_and_width(image) for image in images]
        painted = [
            region.paint(*size) if index == region.image else np.zeros(size, np.float32)
            for index, size in enumerate(sizes)
        ]
        tokens = self.ids[sample][self.valid[sample]] == self.placeholders["image"]
        processor = getattr(self.intake.processor, "image_processor", None)
        found = torch.zeros(len(tokens))
        found[tokens] = shares_of_images(self.anatomy, processor, painted, int(tokens.sum()), **self._images_kwargs)
        return found

    def _media(self, sample: int, medium: str) -> list[Any]:
        """The media of a kind in a sample's messages, in order."""
        if self.messages is None:
            raise UsageError(
                "a region is one of an image, film or sound, and what the prompt was made of is not known",
                remedy="give Prompt the messages, with decoded media in them",
            )
        parts = [part for message in self.messages[sample] for part in message["content"] if part["type"] == medium]
        found = [part.get(medium) for part in parts]
        if any(each is None or isinstance(each, str | bytes) for each in found):
            raise UsageError(f"a message names {MEDIA[medium].a} and does not hold it", remedy="decode it first")
        return found

    def _items(self, sample: int, medium: str) -> list[Tensor]:
        """(tokens,) bool of a sample's own tokens for each of its media of a kind: those that hold a part of it."""
        if medium not in self.placeholders:
            return []
        valid, kind = self.valid[sample], int(Modality.of(medium))
        items, modalities = self.items[1][sample][valid], self.items[0][sample][valid]
        is_kind = modalities == kind
        if (items[is_kind] == UNKNOWN).any():
            raise UsageError(f"where one of the {MEDIA[medium].plural} ends and the next begins cannot be told")
        holds = is_kind & (self.ids[sample][valid] == self.placeholders[medium])
        return [holds & (items == item) for item in items[is_kind].unique()]

    @cached_property
    def items(self) -> tuple[Tensor, Tensor]:
        """(B, S) modality and item of every token."""
        modalities = torch.zeros_like(self.ids)
        for modality, token in self.anatomy.placeholders.items():
            modalities[self.ids == token] = int(modality)
        modalities[~self.valid] = int(Modality.PADDING)
        found, items = self.anatomy.items(self.inputs, modalities.numpy(), self.ids.to(torch.int64).numpy())
        return torch.from_numpy(found), torch.from_numpy(items)

    # -- text ---------------------------------------------------------------------------------------------------------

    @cached_property
    def decoded(self) -> list[Decoded]:
        """The text of each sample's tokens."""
        media = frozenset(self.placeholders.values()) | frozenset(getattr(self.intake.processor, "image_token_ids", ()))
        return [
            Decoded.of(self.intake.tokenizer, ids[valid].tolist(), media)
            for ids, valid in zip(self.ids, self.valid, strict=True)
        ]

    @property
    def placeholders(self) -> dict[str, int]:
        """The id that stands for a token of each medium, of those the host takes."""
        known = {modality.name.lower(): token for modality, token in self.anatomy.placeholders.items()}
        return {name: known[name] for name in MEDIA if name in known}

    def _tokens(self, sample: int, span: Span) -> list[int]:
        """The tokens of a span among a sample's own."""
        decoded = self.decoded[sample]
        places = self._places(sample, span)
        if span.text is None:
            found = [self._within(place, span, sample) for place in places]
        else:
            found = [each for start, stop in places for each in decoded.find(span.text, start, stop)]
            if not found:  # as the tokenizer writes it: in small letters, say
                written = self._written(span.text)
                found = [each for start, stop in places for each in decoded.find(written, start, stop)]
        if span.index is not None:
            if not -len(found) <= span.index < len(found):
                raise self._not_found(
                    sample, span, f"stands there {len(found)} times, and index {span.index} is none of them"
                )
            found = [found[span.index]]
        tokens = sorted({token for start, stop in found for token in decoded.tokens(start, stop)})
        if not tokens:
            raise self._not_found(sample, span, "is not there")
        return tokens

    def _places(self, sample: int, span: Span) -> list[tuple[int, int]]:
        """Where a span may be."""
        decoded = self.decoded[sample]
        if span.message is None:
            return [(0, len(decoded.text))]
        if self.messages is None:
            raise UsageError(
                "a message is named, and what the prompt was made of is not known", remedy="give Prompt the messages"
            )
        messages = self.messages[sample]
        if not -len(messages) <= span.message < len(messages):
            raise UsageError(
                f"there is no message {span.message}: there are {len(messages)}",
                remedy="count from 0, or from the last by -1",
            )
        message = span.message % len(messages)
        content = messages[message]["content"]
        texts = [index for index, part in enumerate(content) if part["type"] == "text" and part["text"].strip()]
        if span.part is not None:
            if span.part not in texts:
                raise UsageError(
                    f"part {span.part} of message {message} is no text with words", remedy=f"its texts: {texts}"
                )
            texts = [span.part]
        if not texts:
            raise UsageError(
                f"message {message} has no words", remedy="name a message with text, or an image by Whole or a region"
            )
        signs = [sign for name in MEDIA if (sign := getattr(self.intake.processor, MEDIA[name].token, None))]
        found = [(message, part) for part in texts]
        return parts_of(decoded, messages, found, self.intake.text, signs, self._written)

    def _within(self, place: tuple[int, int], span: Span, sample: int) -> tuple[int, int]:
        """The characters of a place that a span without a text names."""
        length = place[1] - place[0]
        words = self.decoded[sample].text[slice(*place)]
        if span.message is not None and (span.start, span.stop) != (None, None) and self._written(words) != words:
            raise UsageError(
                f"characters cannot be counted: {type(self.intake.tokenizer).__name__} does not give texts back",
                remedy="name the text itself",
            )
        start, stop, _ = slice(span.start, span.stop).indices(length)
        if start >= stop or (span.start or 0) > length or (span.stop or 0) > length:
            raise self._not_found(sample, span, f"is not in {length} characters")
        return place[0] + start, place[0] + stop

    def _written(self, text: str) -> str:
        return written(self.intake.tokenizer, text)

    def _not_found(self, sample: int, span: Span, why: str) -> UsageError:
        what = f"{span.text!r}" if span.text is not None else f"what {span} names"
        text = self.decoded[sample].text
        while "\ufffc\ufffc" in text:
            text = text.replace("\ufffc\ufffc", "\ufffc")
        shown = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
        return UsageError(
            f"{what} {why}",
            where=f"the prompt of sample {sample}" if len(self.ids) > 1 else "the prompt",
            remedy=f"name words as they stand in it: {shown!r}",
        )


def _one_of(media: list[Any], medium: str, index: int, where: str = "messages") -> Any:
    """The one with an index of those that the messages hold, or the inputs show.

    Raises:
        UsageError: there is none.
    """
    if not 0 <= index < len(media):
        empty = f"give Prompt the messages that hold it, or name it as Whole({medium!r})"
        remedy = "count from 0" if media else empty if where == "messages" else "name words by spans"
        raise UsageError(f"there is no {medium} {index}: the sample has {len(media)}", remedy=remedy)
    return media[index]


def _height_and_width(image: Any) -> tuple[int, int]:
    """Of a picture, or of an array (H, W) or (H, W, C)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else np.asarray(image).shape[:2]


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose content is a list of parts."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
