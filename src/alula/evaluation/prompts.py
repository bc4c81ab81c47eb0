"""From messages to model inputs, and the hash that says two models were asked the same thing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from alula.errors import EvaluationError, UsageError
from alula.evaluation.items import Message, images_of
from alula.evaluation.results import Part, Turn

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
    def length(self) -> int:
        """Rows of the prompt, image rows included."""
        return int(self.inputs["input_ids"].shape[1])


def takes_images(processor: Any) -> bool:
    """Whether ``processor`` is more than a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer inside ``processor`` (or ``processor`` itself)."""
    return getattr(processor, "tokenizer", processor)


def load_image(image: Any) -> Image.Image:
    """Return ``image`` as an RGB PIL image, loading it first if it is lazy."""
    loaded = image if isinstance(image, Image.Image) else image.load()
    return loaded if loaded.mode == "RGB" else loaded.convert("RGB")


def fingerprint_image(image: Image.Image) -> str:
    """Return the sha256 (hex) of the image's size and RGB bytes."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def loaded(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return ``messages`` with every image decoded to RGB."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": load_image(part["image"])} if part["type"] == "image" else dict(part)
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def encode(processor: Any, messages: Sequence[Message], *, where: str = "prompt") -> Prompt:
    """Render ``messages`` (decoded images, ends with a user turn) through the chat template, generation prompt added.

    Args:
        processor: a multimodal processor, or a tokenizer for prompts without images.
        where: named in errors.

    Raises:
        UsageError: the processor has no chat template, or images meet a plain tokenizer.
        EvaluationError: the template produced no tokens.
    """
    images = list(images_of(messages))
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
    if not takes_images(processor):
        # most text templates concatenate the content as a string
        messages = [{"role": m["role"], "content": "".join(p["text"] for p in m["content"])} for m in messages]
    inputs = processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    if inputs["input_ids"].numel() == 0:
        raise EvaluationError("the chat template rendered no tokens", where=where)
    digest = hashlib.sha256(json.dumps(inputs["input_ids"][0].tolist(), separators=(",", ":")).encode())
    for image in images:
        digest.update(fingerprint_image(image).encode())
    return Prompt(inputs=dict(inputs), hash=digest.hexdigest())


def turns(messages: Sequence[Message]) -> list[Turn]:
    """Return decoded ``messages`` as they are kept in result files: texts, and images as small inline PNGs."""
    return [
        Turn(
            role=message["role"],
            content=[
                Part(image=thumbnail(part["image"])) if part["type"] == "image" else Part(text=part["text"])
                for part in message["content"]
            ],
        )
        for message in messages
    ]


def thumbnail(image: Image.Image, side: int = THUMBNAIL_PX) -> str:
    """Return ``image`` as a PNG data URI of at most ``side`` x ``side`` pixels; smaller images keep their size."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
