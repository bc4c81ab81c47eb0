"""Prompts that begin with shots: their words stand there as text, and fused tokens go in the place of their embeddings.

Shapes: P tokens up to the last shot's end, d width of the stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alula.chat_template import TemplateSettings
from alula.demonstrations.demonstration import turns
from alula.demonstrations.encoding import Shot
from alula.demonstrations.words import spliced, word_tokens
from alula.errors import UsageError
from alula.grafts.aim import FUSED, FUSED_AT
from alula.inputs import Intake, Rendered


@dataclass(frozen=True, eq=False)
class _Opening:
    """What all prompts under one system prompt begin with.

    Attributes:
        written: tokens that the template writes up to the last shot's words.
        source: for each token of the opening, the one of ``written`` whose mask and kind it has.
        ids: the opening's tokens.
        fused: (1, P, d).
        at: (1, P) bool.
    """

    written: list[int]
    source: list[int]
    ids: list[int]
    fused: Tensor
    at: Tensor


class FewShot(Intake):
    """An intake whose prompts begin, behind the system prompt, with shots.

        shots = encode(model, processor, demonstrations)
        inputs, _ = FewShot(processor, shots).tensors(messages)
        with alula.seam.generation_extras(model, inputs) as given:
            model.generate(**given, max_new_tokens=20)

    Everything that takes an `Intake` takes it. What the template writes around the words is ordinary text; a picture of
    a shot is nowhere in the prompt. Without shots it is an intake as any other.

    Args:
        processor: the host's.
        shots: in the order in which they are shown.
        template: variables for the chat template beside the messages.
        live: for a conversation of today, see `TemplateSettings.keywords`.
        chat_template: rendered with instead of the processor's own.
        said_by: see `Intake`.
    """

    def __init__(
        self,
        processor: Any,
        shots: Sequence[Shot],
        template: TemplateSettings | None = None,
        *,
        live: bool = False,
        chat_template: str | None = None,
        said_by: Collection[str] = (),
    ) -> None:
        super().__init__(processor, template, live=live, chat_template=chat_template, said_by=said_by)
        self.shots = tuple(shots)
        self._openings: dict[str, _Opening] = {}
        digest = hashlib.sha256()
        for shot in self.shots:
            digest.update(f"{shot.fused.dtype} {tuple(shot.fused.shape)}".encode())
            digest.update(shot.fused.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.digest = digest.hexdigest()
        """of all fused tokens in order"""

    def told(self, template: TemplateSettings) -> FewShot:
        return FewShot(self.processor, self.shots, template)

    def tensors(self, messages: list[Any], *, roles: bool = False) -> tuple[dict[str, Any], list[int] | None]:
        """As `Intake.tensors`, with `FUSED` (1, P, d) and `FUSED_AT` (1, P) bool among the inputs.

        Raises:
            UsageError: the template does not write the words of the shots as they are.
        """
        if not self.shots:
            return super().tensors(messages, roles=roles)
        system = [message for message in messages[:1] if message["role"] == "system"]
        shown = [turn for shot in self.shots for turn in turns(shot.question, shot.answer)]
        key = "".join(part.get("text", "") for message in system for part in message["content"])
        whole = [*system, *shown, *messages[len(system) :]]
        inputs, found = super().tensors(whole, roles=roles)
        ids = inputs["input_ids"][0].tolist()
        known = self._openings.get(key)
        if known is None or ids[: len(known.written)] != known.written:  # some write earlier turns by what follows
            self._openings[key] = self._opening(ids, whole, len(system))
        opening = self._openings[key]
        behind = range(len(opening.written), len(ids))
        source = torch.tensor([*opening.source, *behind])
        spliced = {
            name: value[:, source] if _is_per_token(value, len(ids)) else value for name, value in inputs.items()
        }
        spliced["input_ids"] = torch.tensor([[*opening.ids, *ids[len(opening.written) :]]])
        spliced |= {FUSED: opening.fused, FUSED_AT: opening.at}
        return spliced, [found[place] for place in source.tolist()] if roles and found is not None else None

    def render(self, messages: list[Any], *, roles: bool = False) -> Rendered:
        """As `Intake.render`; the hash is of the fused tokens, too."""
        rendered = super().render(messages, roles=roles)
        if not self.shots:
            return rendered
        return replace(rendered, hash=hashlib.sha256(f"{rendered.hash} {self.digest}".encode()).hexdigest())

    def encode(self, chats: Sequence[list[Any]], **options: Any) -> dict[str, Any]:
        """Refused: batches of whole conversations are for training, whose demonstrations are the recipe's to show."""
        if self.shots:
            raise UsageError("shots are shown in prompts", remedy="render them one by one, or take an Intake")
        return super().encode(chats, **options)

    def _opening(self, ids: list[int], messages: list[Any], first: int) -> _Opening:
        """Find the words of the shots, whose turns begin with the ``first`` message."""
        own = [tokens for shot in self.shots for tokens in (shot.question_ids, shot.answer_ids)]
        media = frozenset(getattr(self.processor, "image_token_ids", ()) or ())
        spoken = range(first, first + len(own))
        places = word_tokens(self, ids, self.hidden(messages), spoken, media)
        made = spliced(ids, places, own)
        mask = torch.tensor([made.is_fused])
        rows = torch.cat([shot.fused for shot in self.shots])
        fused = rows.new_zeros(1, len(made.ids), rows.shape[1])
        fused[mask.to(rows.device)] = rows
        return _Opening(ids[: places[-1][1]], made.source, made.ids, fused, mask)


def _is_per_token(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape == (1, tokens)


def few_shot(processor: Any, shots: Sequence[Shot], template: TemplateSettings | None, **options: Any) -> Intake:
    """A `FewShot`, or where there are no shots a plain intake."""
    return FewShot(processor, shots, template, **options) if shots else Intake(processor, template, **options)


def fused_inputs(prompts: Sequence[Rendered], width: int) -> Mapping[str, Tensor]:
    """The further inputs of a left-padded batch of prompts; none where no prompt has shots.

    Args:
        width: tokens of the batch.
    """
    told = [(width - prompt.length, prompt.inputs.get(FUSED), prompt.inputs.get(FUSED_AT)) for prompt in prompts]
    there = next((fused for _, fused, _ in told if fused is not None), None)
    if there is None:
        return {}
    length = max(left + at.shape[1] for left, _, at in told if at is not None)
    fused = there.new_zeros(len(prompts), length, there.shape[-1])
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (left, rows, at) in enumerate(told):
        if rows is not None and at is not None:
            fused[row, left : left + at.shape[1]] = rows[0]
            mask[row, left : left + at.shape[1]] = at[0]
    return {FUSED: fused, FUSED_AT: mask}
