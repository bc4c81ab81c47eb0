"""How likely a model holds the reference answers of what it was asked.

A model that answers in its own words is right nowhere by exact match, and what it lost cannot be told from that. How
likely it holds the reference can be told of every model (its validation loss on it), so that two are compared.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alula.anatomy import HostParts
from alula.chat_template import TemplateSettings
from alula.data import BadSampleError, Collator, Sample
from alula.data.collate import IGNORED
from alula.data.packing import narrowed
from alula.data.samples import text_part
from alula.errors import EvaluationError
from alula.evaluation import generation, prompts, token_ids
from alula.evaluation.items import Task, TaskItem, media_of
from alula.evaluation.journal import Journal
from alula.evaluation.ratios import figures
from alula.evaluation.results import ItemResult, Ratio, TaskResult
from alula.grafts.browse.reading import prompt_ends
from alula.hosts.context import context_length
from alula.hosts.stops import stop_ids
from alula.inputs import Intake, Rendered, placed
from alula.policies import active_policies
from alula.seam import needs_roles, scoring_inputs, text_logits
from alula.tokens import TOKEN_ROLES

_NATS, _TOKENS = "reference_nats", "reference_tokens"
REFERENCES = Ratio(
    name=_NATS,
    title="nats per token of the reference",
    over={_NATS: 1.0},
    under={_TOKENS: 1.0},
    better="lower",
    unit="nats",
    topic="How likely the references are",
)
"""mean cross-entropy of the references' tokens: less is better, and e to its power is the perplexity"""


def last_answers(labels: Tensor, stop: int | None) -> Tensor:
    """Keep of labels (B, S) the last stretch that is supervised in each row, up to its stop token; -100 elsewhere."""
    kept = torch.full_like(labels, IGNORED)
    for row, (given, out) in enumerate(zip(labels, kept, strict=True)):
        places = (given != IGNORED).nonzero().flatten()
        assert len(places), f"row {row} has no answer"  # the collator refuses samples without one
        breaks = (places.diff() > 1).nonzero().flatten()
        places = places[int(breaks[-1]) + 1 :] if len(breaks) else places
        ends = (given[places] == stop).nonzero().flatten() if stop is not None else []
        if len(ends):  # some templates have the assistant say a line break after its end
            places = places[: int(ends[0]) + 1]
        out[places] = given[places]
    return kept


def score_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per row whether every labelled token is the most likely one (B,), the summed loss, and their number.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where nothing is asked.
    """
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    asked = shifted != IGNORED
    scores, wanted = logits[asked].float(), shifted[asked]
    hit = torch.ones_like(asked)
    hit[asked] = scores.argmax(dim=-1) == wanted
    return hit.all(dim=1), F.cross_entropy(scores, wanted, reduction="sum"), asked.sum()


class References:
    """Weighs the references of answered items.

    A reference is weighed as training would see it: as the answer that the chat template writes behind the prompt (with
    a history as the item has it, whoever's answers were shown), all its tokens but the one that ends it. Where a policy
    has a part in it, token by token as it would be said: policies may go by the end of a prompt, or by steps.

    Args:
        model: as for `alula.evaluation.evaluate`, in eval mode.
        processor: its processor or tokenizer, or the intake it is asked with.
        template: variables for the chat template beside the messages.

    Raises:
        UsageError: a chat template that cannot be made to mark answers, see `alula.data.Collator`.
    """

    def __init__(self, model: Any, processor: Any, template: TemplateSettings | None = None) -> None:
        self.intake = Intake.of(processor, template)
        self.model, self.stops = model, stop_ids(model, self.intake.tokenizer)
        self.collate = Collator(
            self.intake.processor,
            context=context_length(model),
            roles=needs_roles(model),
            stops=self.stops,
            template=template,
        )
        # prompts may be the same though answers are written otherwise
        written = json.dumps([self.collate.intake.keywords, self.stops], sort_keys=True, default=str)
        self.digest = hashlib.sha256(written.encode()).hexdigest()[:16]

    def weigh(
        self,
        task: Task,
        result: TaskResult,
        *,
        batch_size: int,
        book: Journal | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> TaskResult:
        """Return ``result`` with the figure `REFERENCES`.

        References that cannot be weighed (empty, too long for the context, or of no token) are named in ``unweighed``
        and take no part.

        Args:
            task: whose items the result is of.
            batch_size: conversations per forward, similar lengths together, padded on the right.
            book: keeps what is weighed, for a later call.
            advance: told how many are done.

        Raises:
            EvaluationError: a likelihood is not a number.
        """
        items, results = {item.id: item for item in task.items()}, list(result.items)
        # of an empty one templates may write nothing, and the last answer of the conversation is one of its history
        left_out = [f"{each.id!r} (an empty reference)" for each in results if not each.gold.strip()]
        advance(len(left_out) + len(result.too_long))
        told = [place for place, each in enumerate(results) if each.gold.strip()]
        lengths = [sum(map(len, token_ids.read(results[place].token_ids))) + len(results[place].gold) for place in told]
        for numbers in generation.batches(lengths, batch_size):
            batch = [told[number] for number in numbers]
            found = {place: self._kept(task, results[place], book) for place in batch}
            # a batch is weighed as a whole, so that padding, and with it rounding, is that of an unbroken run
            anew = not all(found.values())
            if anew:
                samples = {place: _told(items[results[place].id]) for place in batch}
                found = self._weighed(samples, left_out)
            for place, counts in found.items():
                results[place] = results[place].model_copy(update={"counts": {**results[place].counts, **counts}})
            if anew and book is not None and len(found) == len(batch):
                book.add(self._key(task), [results[place] for place in batch])
            advance(len(batch))
        ratios = [*result.ratios, REFERENCES]
        return result.model_copy(
            update={"items": results, "ratios": ratios, "figures": figures(results, ratios), "unweighed": left_out}
        )

    def _key(self, task: Task) -> str:
        return f"{task.name}@references {self.digest}"

    def _kept(self, task: Task, item: ItemResult, book: Journal | None) -> dict[str, float]:
        """The counts of an earlier call, where the reference is still that one."""
        kept = None if book is None else book.finished(self._key(task), item.id, item.prompt_hash)
        if kept is None or kept.gold != item.gold:
            return {}
        return {name: kept.counts[name] for name in (_NATS, _TOKENS)}

    def _weighed(self, samples: dict[int, Sample], left_out: list[str]) -> dict[int, dict[str, float]]:
        """Counts by place; where one of the samples is bad, of the others, one by one."""
        said = self._are_said(samples)
        if said and len(samples) > 1:
            return self._one_by_one(samples, left_out)
        try:
            batch = self.collate(list(samples.values()))
        except BadSampleError as error:
            if len(samples) == 1:
                left_out += [f"{sample.id!r} ({error.message})" for sample in samples.values()]
                return {}
            return self._one_by_one(samples, left_out)
        found = {}
        (first, *_), whole = samples.values(), dict(batch)
        losses, counts = self._said(first, whole) if said else self._forward(whole)
        if not all(map(math.isfinite, losses)):
            raise EvaluationError(
                "the model's log-likelihood of a reference is not a finite number",
                where=type(self.model).__name__,
                remedy="look for weights that are no finite numbers, or load it with another dtype (float16 overflows)",
            )
        for place, nats, tokens in zip(samples, losses, counts, strict=True):
            if tokens:
                found[place] = {_NATS: nats, _TOKENS: float(tokens)}
            else:
                left_out.append(f"{samples[place].id!r} (no token of its own)")
        return found

    def _one_by_one(self, samples: dict[int, Sample], left_out: list[str]) -> dict[int, dict[str, float]]:
        parts = [self._weighed({place: sample}, left_out) for place, sample in samples.items()]
        return {place: counts for part in parts for place, counts in part.items()}

    def _are_said(self, samples: dict[int, Sample]) -> bool:
        """Whether a policy has a part in some of the samples."""
        shown = any(True for sample in samples.values() for _ in media_of(sample.messages))
        return any(shown or policy.concerns_text for policy in active_policies(self.model))

    @torch.no_grad()
    def _forward(self, batch: dict[str, Any]) -> tuple[list[float], list[int]]:
        """Per row the summed nats of its reference's tokens, without the one that ends it, and their number."""
        if self.intake.is_text_only:  # a text model that is asked in a host's words knows nothing of media
            batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        batch = placed(batch, next(self.model.parameters()))
        labels, ends = self._references(batch)
        del batch["labels"]
        if "logits_to_keep" in inspect.signature(HostParts.of(self.model).host.forward).parameters:
            batch = narrowed({**batch, "labels": labels})
            labels = batch.pop("labels")
        logits = self.model(**scoring_inputs(self.model, batch, ends), use_cache=False).logits[:, -labels.shape[1] :]
        logits = text_logits(self.model, logits)
        rows = [score_answers(row[None], wanted[None])[1:] for row, wanted in zip(logits, labels, strict=True)]
        losses, counts = (torch.stack(column).tolist() for column in zip(*rows, strict=True))
        return losses, counts

    def _said(self, sample: Sample, batch: dict[str, Any]) -> tuple[list[float], list[int]]:
        """`_forward` of one sample, whose reference is said token by token."""
        labels, ends = self._references(batch)
        said, end = labels[labels != IGNORED], int(ends) + 1
        if not len(said):
            return [0.0], [0]
        given = prompts.encode(self.intake, prompts.loaded(sample.messages[:-1], self.intake))
        # what stands before the reference, a thought that the template closes too; of media what generation is given
        whole = {key: batch[key] for key in given.inputs if key in batch}
        cut = {key: value[:, :end] for key, value in whole.items() if value.shape == batch["input_ids"].shape}
        roles = tuple(batch[TOKEN_ROLES][0, :end].tolist()) if TOKEN_ROLES in batch else None
        prompt = Rendered({**given.inputs, **cut}, given.hash, roles)
        said = said.to(next(self.model.parameters()).device)
        return [-generation.likelihood(self.model, self.intake.tokenizer, prompt, said)], [len(said)]

    def _references(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(B, S) labels of the references without what ends them, and (B,) the last token before each."""
        labels = last_answers(batch["labels"], None)
        for stop in self.stops:
            labels = last_answers(labels, stop)
        ends = prompt_ends(batch["attention_mask"].bool(), labels)
        return labels.masked_fill(torch.isin(labels, torch.tensor(self.stops, device=labels.device)), IGNORED), ends


def weighed_by_both(
    before: Sequence[ItemResult], after: Sequence[ItemResult]
) -> tuple[list[ItemResult], list[ItemResult]]:
    """Items of two models of which references count only where both weighed them, in the same number of tokens."""
    sides = [
        [_without(item) if part else item for item, part in zip(side, _parted(before, after), strict=True)]
        for side in (before, after)
    ]
    return sides[0], sides[1]


def weighed_by_one(before: Sequence[ItemResult], after: Sequence[ItemResult]) -> int:
    """How many items of two models `weighed_by_both` leaves out."""
    return sum(_parted(before, after))


def _parted(before: Sequence[ItemResult], after: Sequence[ItemResult]) -> list[bool]:
    return [one.counts.get(_TOKENS) != other.counts.get(_TOKENS) for one, other in zip(before, after, strict=True)]


def _without(item: ItemResult) -> ItemResult:
    return item.model_copy(update={"counts": {k: n for k, n in item.counts.items() if k not in (_NATS, _TOKENS)}})


def _told(item: TaskItem) -> Sample:
    """An item as a conversation that ends with its reference; nothing else in it is learnt."""
    answer = {"role": "assistant", "content": [text_part(item.gold)]}
    return Sample(item.id, [*(dict(message) for message in item.messages), answer])
