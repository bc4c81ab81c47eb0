"""From messages to model inputs, and the hash that says two models were asked the same thing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from alula import media
from alula.chat_template import TemplateSettings
from alula.data import samples
from alula.errors import EvaluationError, HostError, UsageError
from alula.evaluation.items import Message, images_of
from alula.evaluation.results import Part, Turn
from alula.inputs import Intake, Rendered

THUMBNAIL_PX = 96


def takes_images(processor: Any) -> bool:
    """Whether ``processor`` is more than a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def takes(processor: Any) -> frozenset[str]:
    """Return which media ``processor`` prepares: of ``image``, ``video`` and ``audio``."""
    return Intake.of(processor).takes


def loaded(messages: Sequence[Message], intake: Intake) -> list[dict[str, Any]]:
    """Return ``messages`` with their media decoded as for training: images to upright RGB, others as ``intake`` wants.

    Raises:
        BadSampleError: a medium cannot be read.
    """

    def decoded(part: Mapping[str, Any]) -> dict[str, Any]:
        return samples.decoded(samples.lazy(part), intake.loading)

    return [{"role": message["role"], "content": [*map(decoded, message["content"])]} for message in messages]


def encode(
    processor: Any,
    messages: Sequence[Message],
    *,
    where: str = "prompt",
    template: TemplateSettings | None = None,
    roles: bool = False,
) -> Rendered:
    """Render ``messages`` (decoded media, ends with a user turn) through the chat template, generation prompt added.

    Args:
        processor: a multimodal processor, or a tokenizer for prompts without images; or the intake of one.
        where: named in errors.
        template: variables for the chat template beside the messages.
        roles: whether to tell whose turn each token belongs to.

    Raises:
        UsageError: the processor has no chat template, or one that does not read a setting of ``template``, or images
            meet a plain tokenizer.
        EvaluationError: the template produced no tokens, or the processor refuses the prompt.
    """
    images = list(images_of(messages))
    _refuse_half_characters(messages, where)
    name = type(processor.processor if isinstance(processor, Intake) else processor).__name__
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(
            f"{name} has no chat template, so the questions cannot be put to this model",
            where=where,
            remedy="evaluate an instruction-tuned model, or set processor.chat_template",
        )
    intake = Intake.of(processor, template)
    if images and not intake.takes:
        raise UsageError(
            f"the prompt shows {len(images)} image(s), but {name} is a plain tokenizer",
            where=where,
            remedy="choose text tasks for a text LLM, or build an image host with alula.hosts.build_host",
        )
    try:
        prompt = intake.render([*messages], roles=roles)
    except HostError as error:
        raise EvaluationError(error.message, where=where, remedy=error.remedy) from error
    except ValueError as error:  # PaliGemma's processor, for one, takes no prompt without an image
        raise EvaluationError(f"the {name} refuses the prompt: {error}", where=where) from error
    if not prompt.length:
        raise EvaluationError("the chat template rendered no tokens", where=where)
    bos = intake.tokenizer.bos_token_id
    if bos is not None and prompt.ids[:2] == [bos, bos]:
        raise EvaluationError(
            "the prompt starts with BOS twice: its chat template writes it, and so does the tokenizer",
            where=where,
            remedy="leave it out of the template, or set add_bos_token of the tokenizer to False",
        )
    return prompt


def _refuse_half_characters(messages: Sequence[Message], where: str) -> None:
    for message in messages:
        for part in message["content"]:
            try:
                part.get("text", "").encode()
            except UnicodeEncodeError as error:
                raise EvaluationError(
                    f"the text of a {message['role']} turn holds half of a surrogate pair, "
                    f"U+{ord(error.object[error.start]):04X}, which is no character",
                    where=where,
                    remedy="write the whole character, or leave the half out",
                ) from None


def turns(messages: Sequence[Message]) -> list[Turn]:
    """Return decoded ``messages`` as they are kept in result files: texts, images, maps and videos as small inline PNGs
    (the frames of a video side by side), and of other media how long they are."""

    def kept(part: Mapping[str, Any]) -> Part:
        match part["type"]:
            case "image":
                return Part(image=thumbnail(part["image"]))
            case "video":
                frames = part["video"]
                strip = Image.fromarray(np.concatenate(list(frames), axis=1))
                return Part(image=thumbnail(strip, THUMBNAIL_PX * len(frames)))
            case "audio":
                return Part(text=f"[a sound of {len(part['audio']):,} samples]")
            case "depth" | "normals" as kind:
                return Part(image=thumbnail(_as_picture(part[kind])))
            case "text":
                return Part(text=part["text"])
            case kind:
                size = " x ".join(f"{count:,}" for count in part[kind].shape)
                return Part(text=f"[{media.MEDIA[kind].a} of {size} values]")

    return [Turn(role=message["role"], content=[*map(kept, message["content"])]) for message in messages]


def _as_picture(shown: np.ndarray) -> Image.Image:
    """A map of depth (the farthest is white) or of surface normals as a picture."""
    values = shown / max(float(shown.max()), 1e-6) if shown.ndim == 2 else (shown + 1) / 2
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)).convert("RGB")


def thumbnail(image: Image.Image, side: int = THUMBNAIL_PX) -> str:
    """Return ``image`` as a PNG data URI of at most ``side`` x ``side`` pixels; smaller images keep their size."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
