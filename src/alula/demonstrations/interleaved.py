"""Batches of interleaved documents: all pictures with their words but the last become demonstrations.

A document is a conversation that asks about one picture after the other. Each such question with its answer is read
alone, and its picture stands nowhere in the prompt; the last answer of all is what is learnt from, whose question may
show a picture or none. Other turns are left out.

Tensors: B samples, L tokens after padding, T word tokens of all demonstrations of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from transformers import BatchFeature

from alula.data import Collator
from alula.data.errors import BadSampleError, RecordError
from alula.data.samples import Sample, message_text, worded
from alula.demonstrations.encoding import Alone
from alula.demonstrations.words import spliced, word_tokens
from alula.draws import Draw
from alula.errors import UsageError

DEMONSTRATIONS, FUSED_FROM, FUSED_TO = "demonstrations", "fused_from", "fused_to"
"""keys of a batch: inputs of its demonstrations alone; (T,) places of their word tokens among these, and (T,) among the
(B, L) of the batch, both flattened"""
_SHOWN, _PLACES = "demonstrations", "demonstrated words"


class InterleavedCollator(Collator):
    """A `Collator` of documents, whose batches hold `DEMONSTRATIONS` beside prompts without their pictures.

    Args:
        shots: fewest and most demonstrations of a sample; of a document with more those right before the last picture
            are taken, as many as are drawn from its position.
        others: as `Collator`.
    """

    def __init__(self, *others: Any, shots: tuple[int, int], **options: Any) -> None:
        super().__init__(*others, **options)
        self.shots = shots

    def _decoded(self, sample: Sample) -> Any:
        entry = super()._decoded(sample)
        last = len(entry.sample.messages) - 2
        turns = [at for at in _pairs(entry.sample.messages) if at < last]
        if not turns or entry.sample.messages[-1]["role"] != "assistant":
            raise RecordError(
                "it holds no demonstration: an interleaved document asks about one picture after the other and ends "
                "with an answer",
                place=entry.sample.place,
                remedy="give conversations of several questions with a picture each: docs/usage/demonstrations.md",
            )
        least, most = self.shots
        known = sample.id if sample.position is None else sample.position
        count = min(Draw("demonstrations", known).between(least, most), len(turns))
        chosen = turns[-count:]
        pictures = sum(part["type"] != "text" for part in entry.messages[last]["content"])  # and other media

        def bare(messages: Sequence[Any]) -> list[Any]:
            """The system prompt, the chosen turns without pictures, and the last pair."""
            system = [message for message in messages[:1] if message["role"] == "system"]
            told = [
                turn
                for at in chosen
                for turn in (
                    {**messages[at], "content": worded(messages[at]["content"])},
                    {**messages[at + 1], "train": False},
                )
            ]
            return [*system, *told, *messages[last : last + 2]]

        shown = [entry.messages[at : at + 2] for at in chosen]
        return replace(
            entry,
            sample=replace(
                entry.sample, messages=bare(entry.sample.messages), meta={**entry.sample.meta, _SHOWN: shown}
            ),
            messages=[{key: message[key] for key in ("role", "content")} for message in bare(entry.messages)],
            refs=entry.refs[len(entry.refs) - pictures :],
        )

    def _fault(self, rows: dict[str, Any], number: int, entry: Any) -> BadSampleError | None:
        fault = super()._fault(rows, number, entry)
        if fault is not None:
            return fault
        first = int(entry.messages[0]["role"] == "system")
        turns = range(first, first + 2 * len(entry.sample.meta[_SHOWN]))
        kinds = rows["mm_token_type_ids"][number]
        ids = rows["input_ids"][number]
        media = frozenset(token for token, kind in zip(ids, kinds, strict=True) if kind)
        try:
            found = word_tokens(self.intake, ids, entry.messages, turns, media)
        except UsageError as error:
            return RecordError(error.message, place=entry.sample.place, remedy=error.remedy)
        rows.setdefault(_PLACES, {})[number] = found
        return None

    def _padded(self, rows: dict[str, Any], entries: list[Any]) -> BatchFeature:
        places = rows.pop(_PLACES)
        shown = [chat for entry in entries for chat in entry.sample.meta[_SHOWN]]
        alone = Alone.of(self.intake, shown, literal=any(entry.literal for entry in entries))
        own = [tokens for row in range(len(shown)) for tokens in alone.ids(row)]
        per_token = [key for key, value in rows.items() if isinstance(value, list)]
        is_fused: list[list[bool]] = []
        for number in range(len(entries)):
            words, own = own[: len(places[number])], own[len(places[number]) :]
            ids = rows["input_ids"][number]
            made = spliced(ids, places[number], words)
            behind = range(places[number][-1][1], len(ids))
            for key in per_token:
                rows[key][number] = [rows[key][number][at] for at in (*made.source, *behind)]
            rows["input_ids"][number] = [*made.ids, *(ids[at] for at in behind)]
            is_fused.append(made.is_fused)
        batch = super()._padded(rows, entries)
        count, length = batch["input_ids"].shape
        left = self.padding_side == "left"
        to = [
            number * length + at + (length - len(rows["input_ids"][number]) if left else 0)
            for number in range(count)
            for at, fused in enumerate(is_fused[number])
            if fused
        ]
        batch[DEMONSTRATIONS] = dict(alone.inputs)
        batch[FUSED_FROM], batch[FUSED_TO] = alone.places(), torch.tensor(to)
        return batch


def _pairs(messages: Sequence[Any]) -> list[int]:
    """Where a question about one picture, with words, is answered."""
    found = []
    for at, (asked, answered) in enumerate(pairwise(messages)):
        media = [part["type"] for part in asked["content"] if part["type"] != "text"]
        has_words = message_text(asked).strip() and message_text(answered).strip()
        speakers = (asked["role"], answered["role"])
        if (
            speakers == ("user", "assistant")
            and media == ["image"]
            and has_words
            and asked["content"][-1]["type"] == "text"
        ):
            found.append(at)
    return found
