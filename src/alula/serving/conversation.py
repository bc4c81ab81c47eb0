"""A conversation with a model: history, images, videos, audio, streamed answers. No terminal in here."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TextStreamer, set_seed

from alula.anatomy import unwrap
from alula.chat_template import TemplateSettings
from alula.codes import CodesProcessor
from alula.demonstrations import Shot
from alula.demonstrations.few_shot import few_shot
from alula.errors import HostError, UsageError
from alula.grafts import grafts_of
from alula.grafts.teal import GENERATES, TealGraft
from alula.hosts import thoughts
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding, generation_config
from alula.hosts.prompted import refuse_lost_prompt
from alula.hosts.templates import default_template
from alula.inputs import placed
from alula.media import MEDIA
from alula.seam import find, generation_extras, needs_roles


@dataclass(frozen=True)
class Reply:
    """One answer: its text, its length in tokens, the seconds it took, whether the user cut it short, whether it
    ended inside the thought before the answer proper, and the images (PIL) and sounds (waveforms) in it, each with the
    name of its codes."""

    text: str
    tokens: int
    seconds: float
    interrupted: bool
    unfinished: bool = False
    items: tuple[tuple[str, Any], ...] = ()


class Conversation:
    """Turns with a model, remembered; what was attached goes before the text of the next question.

    Args:
        model: anything with ``generate``: a text model, a host, either with grafts or PEFT adapters.
        processor: its processor, or its tokenizer for a text model.
        decoding: how answers are drawn; greedily by default. What it does not name is as the checkpoint sets it.
        max_new_tokens: most tokens of an answer.
        template: variables for the chat template beside the messages, such as ``enable_thinking``.
        shots: encoded demonstrations that stand before the first turn (`alula.demonstrations`).

    Raises:
        UsageError: the template does not read a setting, or there is no room for an answer.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        decoding: Decoding | None = None,
        *,
        max_new_tokens: int = 256,
        template: TemplateSettings | None = None,
        shots: Sequence[Shot] = (),
    ) -> None:
        decoding = decoding or Decoding()
        if max_new_tokens < 1:
            raise UsageError(f"{max_new_tokens} leaves no room for an answer", where="max_new_tokens")
        refuse_lost_prompt(model)
        self.model, self.processor = model, processor
        self.tokenizer: Any = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.writer = processor if isinstance(processor, CodesProcessor) else None
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[tuple[str, Any]] = []
        self.system: str | None = None
        self._generation = generation_config(model, processor, decoding, max_new_tokens, model_defaults=True)
        default: str | None = None
        if getattr(processor, "chat_template", None) is None:
            default, stop = default_template(self.tokenizer)
            self._generation.eos_token_id = [*self._stops, self.tokenizer.get_vocab()[stop]]
        self.intake = few_shot(processor, shots, template, live=True, chat_template=default, said_by=("user",))
        set_seed(decoding.seed)

    def attach_clip(self, kind: str, clip: np.ndarray) -> None:
        """Put a medium other than an image before the text of the next question.

        Args:
            kind: ``video`` (frames, uint8 (F, H, W, 3)), ``audio`` (samples of ``sampling_rate``, float (N,)), or
                another name of `alula.media` (what its reference in `alula.data` loads).

        Raises:
            HostError: the model takes none.
        """
        self.require(kind)
        self.waiting.append((kind, clip))

    def require(self, kind: str) -> None:
        """Raise a HostError unless the model takes media of that kind (``video``, ``audio`` ...)."""
        if kind not in self.intake.takes:
            raise HostError(
                f"{type(self.model).__name__} takes no {MEDIA[kind].plural}",
                remedy="chat with a host that does (alula.build_host with video=True, audio= or modalities=)",
            )

    def attach(self, image: Image.Image) -> None:
        """Put an image before the text of the next question; several may wait.

        Raises:
            HostError: the model takes no images.
        """
        if "image" not in self.intake.takes:
            raise HostError(
                f"{type(self.model).__name__} takes no images",
                remedy="chat with an image host (alula.build_host makes one of this model)",
            )
        self.waiting.append(("image", image))

    def detach(self) -> None:
        """Forget what waits for the next question."""
        self.waiting = []

    def reset(self) -> None:
        """Forget the turns and the waiting images; the system prompt stays."""
        self.messages, self.waiting = [], []

    def instruct(self, system: str | None) -> None:
        """Set (or with None, drop) the system prompt and start over.

        Raises:
            HostError: the text is not encodable, or holds the image token where the tokenizer cannot take it as text;
                everything stays as it was.
        """
        self._refuse_unsayable(system or "")
        self.system = system or None
        self.reset()

    def written_by(self, kind: str) -> str:
        """Name of the codes that the model writes images ("image") or sounds ("audio") in.

        Raises:
            HostError: it writes none.
        """
        name = None if self.writer is None else self.writer.written_by(kind)
        if name is None or self._plan([name]) is None:
            raise HostError(
                f"{type(self.model).__name__} writes no {MEDIA[kind].plural}",
                remedy="chat with an adapter of method teal that has codes of them",
            )
        return name

    def _plan(self, names: Sequence[str]) -> torch.Tensor | None:
        """(1, n) numbers of ranges of codes; None: the model has no codes of its own."""
        graft = next((each for each in grafts_of(self.model).values() if isinstance(each, TealGraft)), None)
        if graft is None:
            return None
        return torch.tensor([[graft.vocabulary.names.index(name) for name in names]])

    def ask(self, text: str, on_text: Callable[[str], None], *, items: Sequence[str] = ()) -> Reply:
        """Ask a question with the waiting images and stream the answer.

        A KeyboardInterrupt during the answer ends it there; what was said stays in the history, without the thought
        before it unless that never ended. It ends where the context does. After an error the conversation is as it was
        before the question.

        Args:
            text: the question.
            on_text: called with each piece of the answer as soon as it is final.
            items: names of codes (`written_by`): the answer begins with an item of each, in order.

        Raises:
            HostError: the template or the processor refuses the turns, the text is not encodable or holds the image
                token where the tokenizer cannot take it as text, or the conversation no longer fits into the model's
                context.
        """
        self._refuse_unsayable(text)
        media = [{"type": kind, kind: value} for kind, value in self.waiting]
        question = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
        inputs, roles = self._inputs([*self.messages, question])
        generation = copy.copy(self._generation)
        needed = 0
        if items:
            assert self.writer is not None
            plan = self._plan(items)
            assert plan is not None
            inputs[GENERATES] = plan
            needed = sum(self.writer.vocabulary[name].length for name in items) + 1
        room = self._room(inputs["input_ids"].shape[1])
        if needed > room:
            raise HostError(f"{needed} tokens are to be written and there is room for {room}", remedy="start over")
        generation.max_new_tokens = min(max(generation.max_new_tokens, needed), room)

        stream = _Stream(self.tokenizer, on_text)
        start, interrupted = time.perf_counter(), False
        try:
            with (
                torch.inference_mode(),
                self._given_roles(roles),
                generation_extras(self.model, inputs) as given,
            ):
                self.model.generate(**given, generation_config=generation, streamer=stream)
        except KeyboardInterrupt:
            interrupted = True
            stream.end()
        said = self._said(stream, inputs["input_ids"])
        kept = said.answer if said.finished and said.thought else stream.text
        made: tuple[tuple[str, Any], ...] = ()
        if self.writer is not None and items:
            made = tuple(self.writer.items(stream.ids))
            ids = [token for token in stream.ids if token not in set(self._stops)]
            kept = self.tokenizer.decode(ids)  # codes are text to the tokenizer: the next turns see them
        self.messages += [question, {"role": "assistant", "content": [{"type": "text", "text": kept}]}]
        self.waiting = []
        return Reply(stream.text, len(stream.ids), time.perf_counter() - start, interrupted, not said.finished, made)

    def _said(self, stream: _Stream, prompt: torch.Tensor) -> thoughts.Said:
        stops = set(self._stops)
        opened = thoughts.opened(self.tokenizer, prompt[0].tolist())
        return thoughts.said(self.tokenizer, [token for token in stream.ids if token not in stops], opened=opened)

    @property
    def _stops(self) -> list[int]:
        return self._generation.eos_token_id or []

    def _refuse_unsayable(self, text: str) -> None:
        self.intake.hidden([{"role": "user", "content": [{"type": "text", "text": text}]}])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise HostError(
                f"the text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, which is no character"
            ) from None

    def _inputs(self, turns: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int] | None]:
        opening = (
            [] if self.system is None else [{"role": "system", "content": [{"type": "text", "text": self.system}]}]
        )
        messages = [*opening, *turns]
        try:
            inputs, roles = self.intake.tensors(messages, roles=needs_roles(self.model))
        except (HostError, UsageError):
            raise
        except jinja2.TemplateError as error:
            raise HostError(
                f"the chat template refuses the conversation: {error}", remedy="drop the system prompt, or start over"
            ) from error
        except Exception as error:  # processors raise what they like of images that they cannot take
            raise HostError(f"the processor refuses the conversation: {error}", remedy="start over") from error
        # some tokenizers of text models make token types that `generate` refuses; Gemma-3 sees its images by them
        known = inspect.signature(type(unwrap(self.model)).forward).parameters
        unused = {"token_type_ids"} - known.keys()
        used = {key: value for key, value in inputs.items() if key not in unused}
        return placed(used, next(self.model.parameters())), roles

    def _given_roles(self, roles: list[int] | None) -> AbstractContextManager[None]:
        seam = find(self.model)
        return nullcontext() if seam is None or roles is None else seam.given_roles(torch.tensor([roles]))

    def _room(self, prompt: int) -> int:
        """Tokens that an answer may take."""
        limit = context_length(self.model)
        if limit is None:
            return int(self._generation.max_new_tokens)
        if prompt + 1 > limit:
            raise HostError(f"the conversation is {prompt} tokens long, the model takes {limit}", remedy="start over")
        return limit - prompt


class _Stream(TextStreamer):
    """Hands each final piece of text on, and keeps the whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.text = on_text, ""
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text += text
            self.on_text(text)
