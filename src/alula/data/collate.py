"""From samples to what a model's ``forward`` (or ``generate``) takes.

Tensors: B samples, L tokens after padding, with image placeholders already expanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from alula import media
from alula.answers import REFUSE, ended
from alula.chat_template import TemplateSettings, template_of
from alula.data.errors import (
    BadSampleError,
    EmptyBatchError,
    Place,
    PlaceholderError,
    RecordError,
    TooLongError,
    UnsupervisedError,
)
from alula.data.quarantine import Quarantine
from alula.data.samples import MEDIA, Sample, decoded, lazy
from alula.data.soft_labels import SoftLabels, joined
from alula.errors import HostError, UsageError
from alula.inputs import Intake
from alula.tokens import DESCRIBES, TOKEN_ROLES, Role

IGNORED = -100
"""Label of a token that is not learnt from."""


class Replacer(Protocol):
    """Gives another sample for a position (``Mixture``)."""

    def replacement(self, position: int, attempt: int = 1) -> Sample: ...


class Beside(Protocol):
    """What stands beside a batch, and what of its samples is in it."""

    def shown(self, sample: Sample) -> Sample:
        """The sample as it is put into the batch."""

    def beside(self, samples: Sequence[Sample], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Further entries of a batch.

        Args:
            samples: its samples as they were before `shown`.
            batch: the batch without them.
        """


class Collator:
    """Samples -> one batch, by the processor's own chat template.

    A training batch (``train=True``) holds

    - ``input_ids``, ``attention_mask`` (B, L) int64;
    - ``labels`` (B, L) int64: the token itself where the template marks the assistant speaking, up to the stop token
      that ends the answer, ``IGNORED`` elsewhere (padding, image tokens and answers marked ``"train": False`` always).
      A template that marks no answers, or marks them without it, is adapted (``alula.answers.ended``); where it writes
      none at all, one is put behind each answer;
    - what `alula.data.soft_labels.joined` makes of answers with soft labels, whose ``labels`` are ``IGNORED``; absent
      without any;
    - ``mm_token_type_ids`` (B, L) int64, with a processor: 0 text, 1 image, 2 video, 3 audio ... (`alula.media`);
    - ``pixel_values`` and whatever else the image processor makes, absent when no sample holds an image; the same of
      videos and audio clips.

    With ``labels=False`` it is the same batch without ``labels``, for measuring: any chat template will do.

    A prompt batch (``train=False``) has no labels, ends with the template's generation prompt, and holds
    ``mm_token_type_ids`` only when the processor makes them by itself (``generate`` refuses them for other models).

    Placeholders and other signs of the processor in the text of a sample are text (`alula.literals`).

    Media are decoded here, that is in the DataLoader's worker. Nothing is ever truncated.

    Args:
        processor: a multimodal processor, or a plain tokenizer (text-only samples).
        max_length: most tokens of a sample, image tokens included; None: no limit.
        context: tokens that the model was made for, which bound samples as well; None: no bound.
        padding_side: default right for training, left for prompts.
        train: training batches, or prompts for generation.
        labels: whether training batches say what is learnt from.
        roles: add ``token_roles`` (B, L) int64, whose turn each token belongs to (`alula.tokens.Role`), for grafts and
            probes that tell the system prompt from the user's words; the template has to write turn by turn.
        descriptions: put the answer of each sample with one image and one answer into the batch once more, in a row of
            its own behind the others: the answer's tokens, up to the one that ends it, behind the token that begins a
            text where the tokenizer has one, with nothing to learn. ``describes`` (B,) int64 says for these rows which
            image it is, in the order of the batch's, and -1 for the others.
        stops: ids of the tokens that end the model's generation; default: the tokenizer's end token.
        pad_to_multiple_of: round L up (tensor cores like 8 or 64).
        fingerprints: add ``image_fingerprints``, the images' ``ImageRef.fingerprint()`` in the order of
            ``pixel_values``; to be taken out before the model is called.
        template: variables for the chat template beside the messages.
        beside: says what of each sample is put into the batch, and adds to it.
        quarantine: where unusable samples go instead of raising; they are replaced through ``replacer``, or, without
            one, left out of the batch.
        replacer: the mixture the samples come from.

    Raises:
        UsageError: no chat template; one that cannot be made to mark answers with a stop token that ends them (labels);
            one that does not read a setting; a slow tokenizer; no padding token; a processor that makes labels of its
            own.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        context: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        train: bool = True,
        labels: bool = True,
        roles: bool = False,
        descriptions: bool = False,
        stops: Sequence[int] | None = None,
        pad_to_multiple_of: int | None = None,
        fingerprints: bool = False,
        template: TemplateSettings | None = None,
        beside: Beside | None = None,
        quarantine: Quarantine | None = None,
        replacer: Replacer | None = None,
    ) -> None:
        self.processor = processor
        tokenizer: Any = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.max_length, self.context = max_length, context
        self.padding_side = padding_side or ("right" if train else "left")
        self.train, self.labels, self.roles = train, train and labels, roles
        self.descriptions = descriptions
        if descriptions and not self.labels:
            raise UsageError("descriptions are told by labels: they are of training batches", where="descriptions")
        self.pad_to_multiple_of = pad_to_multiple_of
        self.fingerprints = fingerprints
        self.beside, self.quarantine, self.replacer = beside, quarantine, replacer
        self._refuse_own_labels()
        self.pad_token_id = self._pad_token_id()
        checked = self._checked_template()
        self.intake = Intake(processor, template)
        if self.labels:
            told = self.intake.keywords
            told["chat_template"] = self._ended(told.pop("chat_template", checked), stops or [])
            if REFUSE in told["chat_template"]:  # processors take what a template does not read for their own
                told[REFUSE] = True

    def __call__(self, samples: Sequence[Sample]) -> BatchFeature:
        """Make the batch.

        Raises:
            BadSampleError: a sample is unusable and there is no quarantine; names its file and line.
            EmptyBatchError: every sample of the batch is unusable and none can be replaced.
            UsageError: roles are asked for, and the template does not write turn by turn.
        """
        entries = [entry for sample in samples if (entry := self._opened(sample)) is not None]
        while entries:
            rows, faults = self._encoded(entries)
            if not faults:
                return self._padded(rows, entries)
            # rare: others take the place of the bad ones, and the batch goes through the processor again
            entries = [
                kept
                for number, entry in enumerate(entries)
                if (kept := self._instead(entry, faults[number]) if number in faults else entry) is not None
            ]
        raise EmptyBatchError("no sample of the batch is usable", remedy="look at the data with `alula data check`")

    def _opened(self, sample: Sample) -> _Entry | None:
        try:
            return self._decoded(sample)
        except BadSampleError as error:
            return self._instead(_Entry(sample, [], []), error)

    def _instead(self, entry: _Entry, error: BadSampleError) -> _Entry | None:
        """What takes the place of an unusable sample: another one, decoded; None to leave a gap. Or raises."""
        sample, attempt = entry.sample, entry.attempt
        while True:
            if self.quarantine is None:
                raise error
            self.quarantine.add(error)
            if self.replacer is None or sample.position is None:
                return None
            attempt += 1
            sample = self.replacer.replacement(sample.position, attempt)
            try:
                return replace(self._decoded(sample), attempt=attempt)
            except BadSampleError as next_error:
                error = next_error

    def _decoded(self, sample: Sample) -> _Entry:
        place, whole = sample.place or Place(sample.source or "sample", record=sample.id), sample
        if self.beside is not None:
            sample = self.beside.shown(sample)
        if not self.train and sample.messages[-1]["role"] != "user":
            raise RecordError("a prompt must end with a user turn", place=place)
        refs: list[Any] = []
        messages: list[dict[str, Any]] = []
        for message in sample.messages:
            content: list[dict[str, Any]] = []
            for part in message["content"]:
                kind = part["type"]
                if kind in MEDIA:
                    self._refuse_untaken(kind, place)
                    try:
                        part = lazy(part)
                        refs.append(part[kind])
                        part = decoded(part, self.intake.loading)
                    except BadSampleError as error:
                        raise error.at(place) from error
                content.append(part)
            messages.append({"role": message["role"], "content": content})
        try:
            told = self.intake.hidden(messages)
        except HostError as error:
            raise PlaceholderError(error.message, place=place, remedy=error.remedy) from error
        return _Entry(replace(sample, place=place), told, refs, literal=told is not messages, whole=whole)

    def _refuse_untaken(self, kind: str, place: Place) -> None:
        noun = media.MEDIA[kind].a
        if not self.intake.is_multimodal:
            raise RecordError(f"it holds {noun}, but the model reads text only", place=place)
        if kind not in self.intake.takes:
            raise RecordError(f"it holds {noun}, which the model does not take", place=place)

    def _encoded(self, entries: list[_Entry]) -> tuple[dict[str, Any], dict[int, BadSampleError]]:
        """Render and tokenize once; the result unpadded, and what is wrong with which entry."""
        try:
            rows = self._processed(entries)
        except UsageError:  # roles that the template does not tell: no fault of a sample
            raise
        except Exception as error:  # processors and templates raise what they like: find out whose fault it is
            faults: dict[int, BadSampleError] = {}
            for number, entry in enumerate(entries):
                try:
                    self._processed([entry])
                except Exception as own:
                    faults[number] = RecordError(f"the processor refuses it: {own}", place=entry.sample.place)
                    faults[number].__cause__ = own
            if not faults:
                raise error
            return {}, faults
        found = ((number, self._fault(rows, number, entry)) for number, entry in enumerate(entries))
        return rows, {number: fault for number, fault in found if fault is not None}

    def _processed(self, entries: list[_Entry]) -> dict[str, Any]:
        return self.intake.encode(
            [entry.messages for entry in entries],
            prompt=not self.train,
            literal=any(entry.literal for entry in entries),
            assistant_mask=self.labels,
            roles=self.roles,
        )

    def _fault(self, rows: dict[str, Any], number: int, entry: _Entry) -> BadSampleError | None:
        place, length = entry.sample.place, len(rows["input_ids"][number])
        for limit, named, way in (
            (self.max_length, "max_length", "raise max_length, or shorten"),
            (self.context, "the model's context of", "shorten"),
        ):
            if limit is not None and length > limit:
                noun = "image(s)" if all(isinstance(ref, MEDIA["image"]) for ref in entry.refs) else "media"
                images = f", {len(entry.refs)} {noun} included" if entry.refs else ""
                return TooLongError(
                    f"{length} tokens{images}, more than {named} {limit}",
                    place=place,
                    remedy=f"{way} or split the conversation; placeholders are never cut",
                )
        if self.labels and (fault := self._silence(rows, number, entry.sample)) is not None:
            return fault
        # a token is learnt from as the successor of another, so the first one cannot be
        if self.labels and not any(islice(self._supervised(rows, number), 1, None)):
            return UnsupervisedError("no token to learn from: no assistant turn that the template marks", place=place)
        return None

    @staticmethod
    def _silence(rows: dict[str, Any], number: int, sample: Sample) -> BadSampleError | None:
        """Take the answers whose tokens are not to be learnt out of the sample's mask, and note soft labels."""
        turns = [turn for turn in sample.messages if turn["role"] == "assistant"]
        learnt = [bool(turn.get("train", True)) and "soft" not in turn for turn in turns]
        if all(learnt):
            return None
        mask, ids = rows["assistant_masks"][number], rows["input_ids"][number]
        starts = [at for at, spoken in enumerate(mask) if spoken and not (at and mask[at - 1])]
        if len(starts) != len(learnt):
            return RecordError(
                f"some of {len(learnt)} answers are not to be learnt, but the template marks {len(starts)} stretches",
                place=sample.place,
                remedy="take a template that marks each answer once, or split the conversation",
            )
        soft: list[tuple[int, SoftLabels]] = rows.setdefault("soft", {}).setdefault(number, [])
        for turn, start in zip(turns, starts, strict=True):
            if "soft" in turn:
                length = next((at for at, spoken in enumerate(mask[start:]) if not spoken), len(mask) - start)
                if ids[start : start + length] != turn["soft"].ids.tolist():
                    return RecordError(
                        "an answer with soft labels has other tokens in this conversation than it was labelled with",
                        place=sample.place,
                        remedy="the template writes an answer otherwise at its place here: put it last",
                    )
                soft.append((start, turn["soft"]))
        ends = [*starts[1:], len(mask)]
        rows["assistant_masks"][number] = [
            spoken
            for kept, start, end in zip([True, *learnt], [0, *starts], [*starts[:1], *ends], strict=True)
            for spoken in (mask[start:end] if kept else [0] * (end - start))
        ]
        return None

    def _supervised(self, rows: dict[str, Any], number: int) -> Iterator[bool]:
        mask = rows["assistant_masks"][number]
        kinds = rows["mm_token_type_ids"][number] if "mm_token_type_ids" in rows else [0] * len(mask)
        return (spoken and not kind for spoken, kind in zip(mask, kinds, strict=True))

    def _padded(self, rows: dict[str, Any], entries: list[_Entry]) -> BatchFeature:
        ids, soft = rows["input_ids"], rows.pop("soft", {})
        if self.labels:
            rows["labels"] = [
                [
                    token if spoken else IGNORED
                    for token, spoken in zip(ids[number], self._supervised(rows, number), strict=True)
                ]
                for number in range(len(ids))
            ]
            del rows["assistant_masks"]
        describes = self._describe(rows, entries) if self.descriptions else None
        length = max(map(len, ids))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, TOKEN_ROLES: int(Role.UNKNOWN)}
        batch = {
            key: self._stacked(value, length, fills.get(key, 0)) if _per_token(value, ids) else value
            for key, value in rows.items()
        }
        batch |= joined(
            [
                (number * length + (0 if self.padding_side == "right" else length - len(ids[number])) + start, labels)
                for number, held in soft.items()
                for start, labels in held
            ]
        )
        if describes is not None:
            batch[DESCRIBES] = torch.tensor(describes)
        if self.fingerprints:
            images = [ref for entry in entries for ref in entry.refs if isinstance(ref, MEDIA["image"])]
            batch["image_fingerprints"] = [ref.fingerprint() for ref in images]
        if self.beside is not None:
            batch |= self.beside.beside([entry.whole or entry.sample for entry in entries], batch)
        return BatchFeature(batch)

    def _describe(self, rows: dict[str, Any], entries: list[_Entry]) -> list[int]:
        """Add the rows of descriptions; which image each row is of, -1: none."""
        ids, labels, image = rows["input_ids"], rows["labels"], 0
        describes, begin = [-1] * len(ids), self.tokenizer.bos_token_id
        per_token = [key for key, value in rows.items() if _per_token(value, ids)]
        for number, entry in enumerate(entries):
            images = sum(isinstance(ref, MEDIA["image"]) for ref in entry.refs)
            answers = sum(message["role"] == "assistant" for message in entry.sample.messages)
            added = description(ids[number], labels[number], begin)
            if images == len(entry.refs) == answers == 1 and added:
                fills = {"input_ids": added, "attention_mask": [1] * len(added), "labels": [IGNORED] * len(added)}
                role = int(Role.ASSISTANT)
                for key in per_token:
                    rows[key].append(fills.get(key, [role if key == TOKEN_ROLES else 0] * len(added)))
                describes.append(image)
            image += images
        return describes

    def _stacked(self, values: list[list[int]], length: int, fill: int) -> torch.Tensor:
        padded = torch.full((len(values), length), fill, dtype=torch.int64)
        for row, value in zip(padded, values, strict=True):
            at = slice(0, len(value)) if self.padding_side == "right" else slice(length - len(value), length)
            row[at] = torch.from_numpy(np.array(value, dtype=np.int64))
        return padded

    def _pad_token_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UsageError("the tokenizer has neither a padding nor an end token", remedy="set tokenizer.pad_token")

    def _refuse_own_labels(self) -> None:
        """PaliGemma and its like: prompt and answer are told apart by token types, in which all of a prompt sees all.

        Their processors add to the rendered text, so that no assistant mask fits it, and label what they call a suffix:
        nothing of a dialogue, for which the loss is not a number.
        """
        processor = self.processor
        if isinstance(processor, ProcessorMixin) and "labels" in processor.model_input_names:
            name = type(processor).__name__
            raise UsageError(
                f"{name} makes labels by itself, from a prefix and a suffix, and cannot put dialogues into batches",
                where=name,
                remedy="evaluate this model as it is (alula eval, alula chat), or take a host made for dialogues",
            )

    def _checked_template(self) -> str:
        template = template_of(self.processor)
        if not template:
            raise UsageError(
                f"the {type(self.processor).__name__} has no chat template",
                remedy="set processor.chat_template; build_host gives its hosts one",
            )
        if self.labels and not self.tokenizer.is_fast:
            raise UsageError("training labels need a fast tokenizer (one backed by `tokenizers`)")
        return template

    def _ended(self, template: str, stops: Sequence[int]) -> str:
        names = [self.tokenizer.eos_token, *self.tokenizer.convert_ids_to_tokens(list(stops))]
        return ended(
            template,
            {**self.tokenizer.special_tokens_map, **self.intake.keywords},
            [name for name in dict.fromkeys(names) if name],
            [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special],
            lists=self.intake.is_multimodal,
            where=f"{type(self.processor).__name__}.chat_template",
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample on its way into a batch: messages with decoded media, and the replacements tried for it so far.

    ``literal``: its text holds words that are signs of the processor elsewhere, hidden for `Literals.reader`.
    ``whole``: the sample before `Beside.shown`.
    """

    sample: Sample
    messages: list[dict[str, Any]]
    refs: list[Any]
    attempt: int = 0
    literal: bool = False
    whole: Sample | None = None


def description(ids: Sequence[int], labels: Sequence[int], begin: int | None) -> list[int]:
    """The token ids of a sample's answer alone, up to the one that ends it.

    Args:
        ids, labels: of the sample.
        begin: the token that begins a text, which the answer gets where the sample has it.
    """
    spoken = [token for token in labels if token != IGNORED]
    return [begin, *spoken] if spoken and begin is not None and ids[0] == begin else spoken


def _per_token(value: Any, ids: list[list[int]]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(ids)
        and all(isinstance(row, list) and len(row) == len(own) for row, own in zip(value, ids, strict=True))
    )
