"""From messages to model inputs, and the hash that says two models were asked the same thing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from alula.chat_template import TemplateSettings
from alula.data import FilmRef, SoundRef
from alula.errors import EvaluationError, HostError, UsageError
from alula.evaluation.items import Message, images_of, media_of
from alula.evaluation.results import Part, Turn
from alula.hosts.host import tokenizer_of
from alula.literals import Literals

THUMBNAIL_PX = 96


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Args:
        inputs: tensors for the model with a leading batch axis of one; ``input_ids`` (1, S) int64.
        hash: sha256 (hex) over the token ids and the images' fingerprints.
    """

    inputs: Mapping[str, torch.Tensor]
    hash: str

    @property
    def ids(self) -> list[int]:
        """The token ids, image rows included."""
        ids: list[int] = self.inputs["input_ids"][0].tolist()
        return ids

    @property
    def length(self) -> int:
        """Rows of the prompt, image rows included."""
        return int(self.inputs["input_ids"].shape[1])


def takes_images(processor: Any) -> bool:
    """Whether ``processor`` is more than a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def takes(processor: Any) -> set[str]:
    """Return which media ``processor`` prepares: of ``image``, ``video`` and ``audio``."""
    found = {"image"} if takes_images(processor) else set()
    if getattr(processor, "video_token", None):
        found.add("video")
    if getattr(processor, "audio_token", None) and getattr(processor, "feature_extractor", None) is not None:
        found.add("audio")
    return found


def load_image(image: Any) -> Image.Image:
    """Return ``image`` as an RGB PIL image, loading it first if it is lazy."""
    loaded = image if isinstance(image, Image.Image) else image.load()
    return loaded if loaded.mode == "RGB" else loaded.convert("RGB")


def fingerprint_image(image: Image.Image) -> str:
    """Return the sha256 (hex) of the image's size and RGB bytes."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def loaded(messages: Sequence[Message], processor: Any = None) -> list[dict[str, Any]]:
    """Return ``messages`` with every image decoded to RGB, and films and sounds to the arrays ``processor`` wants."""

    def decoded(part: Mapping[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind == "image":
            return {"type": "image", "image": load_image(part["image"])}
        if kind == "video":
            frames = {"frames": processor.num_frames} if hasattr(processor, "num_frames") else {}
            return {"type": "video", "video": FilmRef.from_object(part["video"]).load(**frames)}
        if kind == "audio":
            rate = processor.feature_extractor.sampling_rate
            return {"type": "audio", "audio": SoundRef.from_object(part["audio"]).load(rate)}
        return dict(part)

    return [{"role": message["role"], "content": [*map(decoded, message["content"])]} for message in messages]


def encode(
    processor: Any, messages: Sequence[Message], *, where: str = "prompt", template: TemplateSettings | None = None
) -> Prompt:
    """Render ``messages`` (decoded media, ends with a user turn) through the chat template, generation prompt added.

    Args:
        processor: a multimodal processor, or a tokenizer for prompts without images.
        where: named in errors.
        template: what the chat template is told beside the messages.

    Raises:
        UsageError: the processor has no chat template, or one that does not read a setting of ``template``, or images
            meet a plain tokenizer.
        EvaluationError: the template produced no tokens, or the processor refuses the prompt.
    """
    images = list(images_of(messages))
    _refuse_half_characters(messages, where)
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(
            f"{type(processor).__name__} has no chat template, so the questions cannot be put to this model",
            where=where,
            remedy="evaluate an instruction-tuned model, or set processor.chat_template",
        )
    if images and not takes_images(processor):
        raise UsageError(
            f"the prompt shows {len(images)} image(s), but {type(processor).__name__} is a plain tokenizer",
            where=where,
            remedy="choose text tasks for a text LLM, or build an image host with alula.hosts.build_host",
        )
    reader, messages = _literal(processor, [*messages], where)
    if not takes_images(processor):
        # most text templates concatenate the content as a string
        messages = [{"role": m["role"], "content": "".join(p["text"] for p in m["content"])} for m in messages]
    told = (template or TemplateSettings()).keywords(processor)
    try:
        inputs = dict(
            reader.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **told,
            )
        )
    except ValueError as error:  # PaliGemma's processor, for one, takes no prompt without an image
        raise EvaluationError(f"the {type(processor).__name__} refuses the prompt: {error}", where=where) from error
    inputs.pop("labels", None)  # what a processor says is to be learnt (PaliGemma's does) is no part of a prompt
    if inputs["input_ids"].numel() == 0:
        raise EvaluationError("the chat template rendered no tokens", where=where)
    ids = inputs["input_ids"][0].tolist()
    bos = tokenizer_of(processor).bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise EvaluationError(
            "the prompt starts with BOS twice: its chat template writes it, and so does the tokenizer",
            where=where,
            remedy="leave it out of the template, or set add_bos_token of the tokenizer to False",
        )
    digest = hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode())
    for kind, value in media_of(messages) if takes_images(processor) else ():
        if kind == "image":
            digest.update(fingerprint_image(value).encode())
        else:
            digest.update(f"{kind} {value.shape} {value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
    return Prompt(inputs=inputs, hash=digest.hexdigest())


def _literal(processor: Any, messages: list[Message], where: str) -> tuple[Any, list[Any]]:
    """The processor and the messages for it, signs of the processor in their texts being text."""
    literals = Literals(processor)
    try:
        hidden = literals.hidden(messages)
    except HostError as error:
        raise EvaluationError(error.message, where=where, remedy=error.remedy) from error
    return processor if hidden is messages else literals.reader, hidden


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
    """Return decoded ``messages`` as they are kept in result files: texts, images and films as small inline PNGs (the
    frames of a film side by side), and of a sound its length."""

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
        return Part(text=part["text"])

    return [Turn(role=message["role"], content=[*map(kept, message["content"])]) for message in messages]


def thumbnail(image: Image.Image, side: int = THUMBNAIL_PX) -> str:
    """Return ``image`` as a PNG data URI of at most ``side`` x ``side`` pixels; smaller images keep their size."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
