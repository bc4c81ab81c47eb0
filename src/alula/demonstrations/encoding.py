"""From demonstrations to fused tokens: each is read alone, and what its words then hold goes through the map.

Shapes: B demonstrations, S tokens after padding, t word tokens of a demonstration, d width of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alula.demonstrations.demonstration import Demonstration
from alula.demonstrations.words import word_tokens
from alula.errors import UsageError
from alula.grafts import grafts_of
from alula.grafts.aim import AimGraft
from alula.inputs import Intake

Messages = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Shot:
    """A demonstration as prompts take it.

    Attributes:
        question, answer: its words.
        question_ids, answer_ids: their tokens beside the picture.
        fused: (t, d) one for each of these tokens, the question's first.
        key: what it is known by: of its picture, words, map, host and dtype.
    """

    question: str
    answer: str
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    fused: Tensor
    key: str = ""


@dataclass(frozen=True, eq=False)
class Alone:
    """Demonstrations, each rendered alone and right-padded.

    Attributes:
        inputs: of the module below the head; ``input_ids`` (B, S).
        words: for each, its question's and its answer's word tokens, as (first, behind the last).
    """

    inputs: Mapping[str, Any]
    words: Sequence[tuple[tuple[int, int], tuple[int, int]]]

    @classmethod
    def of(cls, intake: Intake, chats: Sequence[Messages], *, literal: bool) -> Alone:
        """Render demonstrations, each a conversation of two turns.

        Args:
            chats: content in lists of parts, the words last, as `Intake.hidden` gives them.
            literal: signs of the processor are hidden in some of them.

        Raises:
            UsageError: words of one are not found again among its tokens.
        """
        rows = intake.encode(chats, prompt=False, literal=literal)
        ids, kinds = rows["input_ids"], rows["mm_token_type_ids"]
        media = frozenset(
            token for row, kind in zip(ids, kinds, strict=True) for token, k in zip(row, kind, strict=True) if k
        )
        words = []
        for row, chat in zip(ids, chats, strict=True):
            question, answer = word_tokens(intake, row, chat, (0, 1), media)
            words.append((question, answer))
        return cls(_padded(rows, ids, _pad_id(intake.tokenizer)), words)

    @property
    def counts(self) -> list[int]:
        """t of each."""
        return [b - a + d - c for (a, b), (c, d) in self.words]

    def places(self) -> Tensor:
        """(sum of t,) int64 places of all word tokens in (B, S) flattened."""
        width = self.inputs["input_ids"].shape[1]
        return torch.tensor(
            [
                row * width + token
                for row, pair in enumerate(self.words)
                for first, behind in pair
                for token in range(first, behind)
            ]
        )

    def ids(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a demonstration's question and answer."""
        tokens = self.inputs["input_ids"][row].tolist()
        (a, b), (c, d) = self.words[row]
        return tuple(tokens[a:b]), tuple(tokens[c:d])


def aim_of(model: nn.Module, name: str | None = None) -> AimGraft:
    """The AIM graft of a model: the named one, or its only one.

    Raises:
        UsageError: there is none, or several and none is named.
    """
    there = {own: graft for own, graft in grafts_of(model).items() if isinstance(graft, AimGraft)}
    if name is None and len(there) == 1:
        return next(iter(there.values()))
    if name is not None and name in there:
        return there[name]
    if not there:
        raise UsageError(
            "the model has no map that demonstrations could be encoded through",
            remedy="load an adapter of `method: aim` (recipes/aim.yaml), or alula.attach(model, alula.AimConfig())",
        )
    raise UsageError(f"which map? The model has {', '.join(there)}", remedy="pass name=...")


def fuse(aim: AimGraft, inputs: Mapping[str, Any], places: Tensor) -> Tensor:
    """(sum of t, d) fused tokens of demonstrations; gradients reach the map alone.

    Args:
        inputs: of the demonstrations alone, on the host's device.
        places: of their word tokens, see `Alone.places`.
    """
    states = aim.states(inputs)
    fused: Tensor = aim.map(states.flatten(0, 1)[places.to(states.device)])
    return fused


@torch.no_grad()
def encode(
    model: nn.Module,
    processor: Any,
    demonstrations: Sequence[Demonstration],
    *,
    name: str | None = None,
    batch_size: int = 16,
) -> list[Shot]:
    """Encode demonstrations, each alone: one fused token for each token of its question and answer.

    Args:
        model: a host with an AIM graft, in evaluation mode.
        processor: its processor, or an `Intake`, which knows the variables of its chat template.
        name: of the graft, where there are several.
        batch_size: demonstrations of one forward; results do not depend on it.

    Returns:
        The shots in the order of the demonstrations, on the model's device and in its dtype.

    Raises:
        UsageError: no such graft, or words that the template does not write as they are. HostError: see
            `Intake.hidden`.
    """
    aim, intake = aim_of(model, name), Intake.of(processor)
    weight = next(model.parameters())
    shots: list[Shot] = []
    for start in range(0, len(demonstrations), batch_size):
        some = demonstrations[start : start + batch_size]
        chats = [demonstration.messages() for demonstration in some]
        hidden = [intake.hidden(chat) for chat in chats]
        literal = any(own is not chat for own, chat in zip(hidden, chats, strict=True))
        alone = Alone.of(intake, hidden, literal=literal)
        inputs = {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in alone.inputs.items()
        }
        fused = fuse(aim, inputs, alone.places()).to(weight.dtype).split(alone.counts)
        for row, (demonstration, tokens) in enumerate(zip(some, fused, strict=True)):
            shots.append(Shot(demonstration.question, demonstration.answer, *alone.ids(row), tokens.clone()))
    return shots


def _pad_id(tokenizer: Any) -> int:
    return next((int(each) for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _padded(rows: Mapping[str, Any], ids: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Lists per token as right-padded tensors; tensors of media as they are."""
    width = max(map(len, ids))
    made: dict[str, Any] = {}
    for key, value in rows.items():
        if isinstance(value, Tensor):
            made[key] = value
        else:
            fill = pad if key == "input_ids" else 0
            made[key] = torch.tensor([[*row, *[fill] * (width - len(row))] for row in value])
    return made
