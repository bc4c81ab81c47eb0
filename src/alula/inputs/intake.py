"""What a processor (or tokenizer) makes of conversations.

Conversations are lists of ``{"role": ..., "content": [parts]}`` with decoded media; signs of the processor in their
texts are text (`alula.literals`). S tokens, image placeholders expanded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from alula.chat_template import TemplateSettings
from alula.errors import HostError
from alula.inputs.pictures import Pictures
from alula.inputs.roles import Messages, token_roles
from alula.inputs.sizing import Sizes
from alula.literals import Literals
from alula.media import MEDIA
from alula.tokens import TOKEN_ROLES


@dataclass(frozen=True)
class Rendered:
    """A rendered prompt.

    Args:
        inputs: tensors for the model with a leading batch axis of one; ``input_ids`` (1, S) int64.
        hash: sha256 (hex) over the token ids and the content of the media.
        roles: (S,) values of `alula.tokens.Role`; None where they were not asked for.
    """

    inputs: Mapping[str, torch.Tensor]
    hash: str
    roles: tuple[int, ...] | None = None

    @property
    def ids(self) -> list[int]:
        """The token ids, those of media included."""
        ids: list[int] = self.inputs["input_ids"][0].tolist()
        return ids

    @property
    def length(self) -> int:
        """Tokens of the prompt, those of media included."""
        return int(self.inputs["input_ids"].shape[1])


class Intake:
    """The way from messages to a model's inputs, for one processor.

    Args:
        processor: a multimodal processor, or a plain tokenizer.
        template: variables for the chat template beside the messages.
        live: for a conversation of today, see `TemplateSettings.keywords`.
        chat_template: rendered with instead of the processor's own.
        said_by: roles whose words hold no special tokens: what is written like one is text.
        text_only: take no media and give no inputs but ids and mask, for a text model that is asked in the words of a
            host which shares its vocabulary.

    Raises:
        UsageError: the template does not read a setting.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        template: TemplateSettings | None = None,
        *,
        live: bool = False,
        chat_template: str | None = None,
        said_by: Collection[str] = (),
        text_only: bool = False,
    ) -> None:
        self.processor: Any = processor
        self.is_multimodal = isinstance(processor, ProcessorMixin)
        self.tokenizer: Any = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.is_text_only = text_only
        self.keywords = (template or TemplateSettings()).keywords(processor, live=live)
        if chat_template is not None:
            self.keywords["chat_template"] = chat_template
        self._said_by = said_by
        self._literals = Literals(processor, said_by=said_by)

    @classmethod
    def of(cls, processor: Any, template: TemplateSettings | None = None) -> Intake:
        """The intake of ``processor``; of an intake itself, or one alike that is told ``template``."""
        if not isinstance(processor, Intake):
            return cls(processor, template)
        return processor if template is None else processor.told(template)

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(getattr(self.processor, "image_processor", None))

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes(getattr(self.processor, "image_processor", None))

    @property
    def sizes_are_obeyed(self) -> bool:
        """Whether images of fewer pixels have fewer tokens."""
        return self.is_multimodal and self._sizes.are_obeyed

    def shrunk(self, messages: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
        """Messages whose images are to have at most this share of the pixels that they would have, where
        `sizes_are_obeyed`."""
        return self._sizes.shrunk(messages, share)

    def told(self, template: TemplateSettings) -> Intake:
        """An intake alike whose chat template is told ``template``."""
        return Intake(self.processor, template, said_by=self._said_by, text_only=self.is_text_only)

    @property
    def chat_template(self) -> Any:
        """The processor's own."""
        return getattr(self.processor, "chat_template", None)

    @property
    def takes(self) -> frozenset[str]:
        """Names of the media it prepares (`alula.media`)."""
        if self.is_text_only:
            return frozenset()
        return frozenset(name for name in MEDIA if self._prepares(name))

    def _prepares(self, name: str) -> bool:
        if name == "image":  # processors of images do not always name a placeholder
            return getattr(self.processor, "image_processor", None) is not None
        has_token = bool(getattr(self.processor, MEDIA[name].token, None))
        return has_token and (name != "audio" or self.sampling_rate is not None)

    @property
    def num_frames(self) -> int | None:
        """Frames of a video, where the processor says how many it takes."""
        return getattr(self.processor, "num_frames", None)

    @property
    def sampling_rate(self) -> int | None:
        """Samples per second of the audio it takes."""
        return getattr(getattr(self.processor, "feature_extractor", None), "sampling_rate", None)

    @property
    def motion_rate(self) -> int | None:
        """Samples per second of the motion it takes."""
        return getattr(self.processor, "motion_rate", None)

    def loading(self, medium: str) -> dict[str, Any]:
        """Arguments with which a reference to a medium is loaded for this processor."""
        if medium == "video" and self.num_frames is not None:
            return {"frames": self.num_frames}
        rates = {"audio": self.sampling_rate, "motion": self.motion_rate}
        return {"rate": rates[medium]} if rates.get(medium) is not None else {}

    def hidden(self, messages: list[Any]) -> list[Any]:
        """The conversation with the processor's signs in its texts hidden; itself where it holds none.

        Raises:
            HostError: the tokenizer cannot read them as text, see `Literals.hidden`.
        """
        return self._literals.hidden(messages)

    def tensors(self, messages: list[Any], *, roles: bool = False) -> tuple[dict[str, Any], list[int] | None]:
        """One prompt that ends with the generation prompt: inputs with a batch axis of one, and the tokens' roles.

        Raises:
            HostError: as `hidden`. UsageError: roles are asked for and cannot be told (`token_roles`). What templates
                and processors raise passes through.
        """
        hidden = self.hidden(messages)
        reader, told = self._reader(hidden is not messages), [hidden]
        options: dict[str, Any] = {}
        sized = None if self.is_text_only else self._sizes.applied([hidden])
        if sized is not None:
            told, options = sized, {"processor_kwargs": {"images_kwargs": {"do_resize": False}}}
        inputs = dict(
            reader.apply_chat_template(
                self._content(told[0]),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **options,
                **self.keywords,
            )
        )
        if sized is not None:
            self._sizes.check(inputs, sized)
        inputs.pop("labels", None)  # what a processor says is to be learnt (PaliGemma's does) is no part of a prompt
        if self.is_text_only:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found = self._roles(reader, inputs["input_ids"][0].tolist(), hidden, prompt=True) if roles else None
        return inputs, found

    def render(self, messages: list[Any], *, roles: bool = False) -> Rendered:
        """`tensors` with the hash of what is asked."""
        inputs, found = self.tensors(messages, roles=roles)
        digest = hashlib.sha256(json.dumps(inputs["input_ids"][0].tolist(), separators=(",", ":")).encode())
        for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
            digest.update(content_bytes(part))
        return Rendered(inputs, digest.hexdigest(), None if found is None else tuple(found))

    def encode(
        self,
        chats: Sequence[list[Any]],
        *,
        prompt: bool,
        literal: bool,
        assistant_mask: bool = False,
        roles: bool = False,
    ) -> dict[str, Any]:
        """Many conversations at once, unpadded: lists per token, media tensors of all conversations together.

        Args:
            chats: conversations as `hidden` gives them.
            prompt: end with the generation prompt; else ``mm_token_type_ids`` are made whatever the processor does.
            literal: signs are hidden in some of them.
            assistant_mask: add ``assistant_masks``, 1 for tokens that the template marks as the assistant's.
            roles: add `TOKEN_ROLES`, values of `alula.tokens.Role`.
        """
        options: dict[str, Any] = {
            "tokenize": True,
            "return_dict": True,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": assistant_mask,
        }
        if self.is_multimodal:
            extra = {} if prompt else {"return_mm_token_type_ids": True}
            options["processor_kwargs"] = {"padding": False, "images_kwargs": {"return_tensors": "pt"}, **extra}
        reader, told = self._reader(literal), chats
        sized = self._sizes.applied(chats) if self.is_multimodal else None
        short = self._pictures.resized(chats) if self.is_multimodal and sized is None else None
        if sized is not None:
            told = sized
            options["processor_kwargs"]["images_kwargs"]["do_resize"] = False
        if short is not None:
            told, as_they_are = short
            options["processor_kwargs"]["images_kwargs"] |= as_they_are
        encoded: Any = reader.apply_chat_template([self._content(chat) for chat in told], **options, **self.keywords)
        rows = dict(encoded)
        if sized is not None:
            self._sizes.check(rows, sized)
        if short is not None:
            rows["pixel_values"] = self._pictures.finished(rows["pixel_values"])
        if self.is_multimodal and not prompt and "mm_token_type_ids" not in rows:
            # some processors make them only for batches with images (Idefics3), or under another name (Gemma-3)
            images = set(self.processor.image_token_ids)
            rows["mm_token_type_ids"] = [[int(token in images) for token in row] for row in rows["input_ids"]]
        if roles:
            pairs = zip(rows["input_ids"], chats, strict=True)
            rows[TOKEN_ROLES] = [self._roles(reader, ids, chat, prompt=prompt) for ids, chat in pairs]
        return rows

    def user_turn(self) -> tuple[str, str]:
        """What the chat template writes before and behind the words of a first user turn.

        Raises:
            HostError: it writes a text otherwise than it is, or more than once.
        """
        words = "Words of a user."
        text = self._text(self.processor, [{"role": "user", "content": [{"type": "text", "text": words}]}], False)
        before, *behind = text.split(words)
        if len(behind) != 1:
            raise HostError(
                f"the chat template writes a user's words {len(behind)} times",
                where=f"{type(self.processor).__name__}.chat_template",
            )
        return before, behind[0]

    def text(self, messages: Messages, prompt: bool) -> str:
        """What the chat template writes, before the processor puts tokens of media in.

        Args:
            messages: content in lists of parts.
            prompt: end with the generation prompt.
        """
        return self._text(self.processor, messages, prompt)

    def _reader(self, literal: bool) -> Any:
        return self._literals.reader if literal else self.processor

    def _content(self, messages: Messages) -> list[Any]:
        """Templates of text models want plain strings and would print a list as Python writes it."""
        if self.is_multimodal:
            return list(messages)
        return [{**m, "content": "".join(p["text"] for p in m["content"] if p["type"] == "text")} for m in messages]

    def _text(self, reader: Any, messages: Messages, prompt: bool) -> str:
        text: str = reader.apply_chat_template(
            self._content(messages), add_generation_prompt=prompt, tokenize=False, **self.keywords
        )
        return text

    def _roles(self, reader: Any, ids: list[int], messages: Messages, *, prompt: bool) -> list[int]:
        tokenizer = getattr(reader, "tokenizer", reader)
        return token_roles(ids, messages, partial(self._text, reader), tokenizer, prompt=prompt)


def fingerprint_image(image: Image.Image) -> str:
    """Return the sha256 (hex) of all of an image that a conversion reads: its size, its pixels (RGB unless it says
    otherwise), and where they need them, palette and transparent color."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    if image.mode != "RGB":
        digest.update(f" {image.mode} ".encode())
    digest.update(image.tobytes())
    if image.palette is not None or "transparency" in image.info:
        digest.update(image.convert("RGBA").tobytes())
    return digest.hexdigest()


def content_bytes(part: Mapping[str, Any]) -> bytes:
    """What tells a part of a conversation that brings a medium from others; a picture beside a map is part of it."""
    medium: str = part["type"]
    value = part[medium]
    if medium == "image":
        return fingerprint_image(value).encode()
    beside = part.get("image")
    told = f"{medium} {value.shape} {value.dtype}".encode() + np.ascontiguousarray(value).tobytes()
    return told if beside is None else told + fingerprint_image(beside).encode()
