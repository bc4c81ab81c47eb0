"""The measurement itself: counts, answers, times, each noted as soon as it is there."""

from __future__ import annotations

import datetime
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from alula.anatomy import Anatomy
from alula.book import Book
from alula.errors import AlulaError, DataError, HostError, UsageError
from alula.evaluation import Decoding, defaults_for, generation, prompts, token_ids
from alula.evaluation.conditions import conditions, decisive, fingerprint
from alula.evaluation.pairing import compare_scores
from alula.evaluation.results import Labels
from alula.hosts.context import context_length
from alula.inputs import Intake, Rendered
from alula.jobs import add_session, claim, refuse_others
from alula.policies import active_policies, put_policies
from alula.progress import Bar, bar
from alula.seam import evaluating, needs_roles
from alula.speed.grid import Candidate, default_grid, pooled
from alula.speed.plan import Plan
from alula.speed.record import Host, Part, Row, Speed, Spread
from alula.speed.samples import Chosen, Question, choose
from alula.speed.stopwatch import Clock, Counted, counted, timed, unending
from alula.stats import wilson
from alula.training.environment import readable_environment

Loader = Callable[[str], tuple[Any, Any]]
"""a model's name -> (model, processor)"""

PLAIN = Candidate("no policy")
_ITSELF = Candidate("no policy, again")


@dataclass(frozen=True)
class _Asked:
    """A question that fits into the model's context."""

    question: Question
    tokens: int
    image_tokens: int
    hash: str


def measure(plan: Plan, load: Loader, *, command: str = "", progress: bool = False) -> Speed:
    """Measure every policy beside the model without any, as the plan says.

    What is finished is kept under ``plan.output``; a call that was stopped, killed included, goes on from there when it
    is made again.

    Args:
        load: loads a model by name. Policies it was saved with are measured as one of the others.
        command: noted in the record.
        progress: draw a bar with the time left on stderr.

    Raises:
        HostError: the model takes no images, or is of a class that alula does not know. DataError: no usable question
            shows an image. UsageError: the output holds something else, or the budget asks for right answers where none
            are known.
    """
    began = time.perf_counter()
    refuse_others(plan.output, plan.facts(), "speed measurement")
    own = plan.candidates()
    model, processor = load(plan.model)
    taken = prompts.takes(processor)
    if not taken:
        raise HostError(
            f"{type(model).__name__} takes no images, and policies are about image tokens",
            where=plan.model,
            remedy="name an image host, or build one with alula.build_host",
        )
    plan.told.keywords(processor)  # refuses what the template does not read
    anatomy = Anatomy.of(model)
    saved = Candidate("as the model was saved", tuple(active_policies(model)))
    put_policies(model, {})
    chosen = choose(plan, defaults_for(processor), taken, Intake.of(processor, plan.told))
    if any(name != "agreement" for name in plan.budget) and not any(each.item.gold for each in chosen.questions):
        raise UsageError(
            "right answers are asked for, and none are known",
            where="--budget",
            remedy="--data with an assistant turn behind each question, or --budget agreement:0.98",
        )
    with evaluating(model):
        run = _Run(plan, model, processor, anatomy, chosen)
        obeyed = run.intake.sizes_are_obeyed
        grid = default_grid(anatomy.num_layers, run.image_tokens, sizes_are_obeyed=obeyed) if own is None else own
        rows, host, itself = run.measured([*grid, *([saved] if saved.policies else [])], progress)
        state = conditions(model, Decoding(), plan.batch_size, plan.told.recorded(processor))
    return Speed(
        model=plan.model,
        model_class=type(anatomy.host).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=anatomy.num_layers,
        source=chosen.source,
        invented=chosen.invented,
        n=len(run.asked),
        answered=sum(bool(each.question.item.gold) for each in run.asked),
        without_image=chosen.without_image,
        unusable=chosen.unusable,
        too_long=len(chosen.questions) - len(run.asked),
        prompt_tokens=run.prompt_tokens,
        image_tokens=run.image_tokens,
        is_accelerated=run.device.type != "cpu",
        clock=run.clock.name,
        host=host,
        itself=itself,
        rows=rows,
        settings=plan.facts(),
        conditions=state,
        environment=readable_environment(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seconds=add_session(plan.output, time.perf_counter() - began),
    )


class _Run:
    """One model, its questions, and what is known of them so far."""

    def __init__(self, plan: Plan, model: Any, processor: Any, anatomy: Anatomy, chosen: Chosen) -> None:
        self.plan, self.model, self.processor = plan, model, processor
        self.intake = Intake.of(processor, plan.told)
        self.device = next(model.parameters()).device
        self.clock = Clock.of(self.device)
        self.asked = self._fitting(chosen, anatomy)
        self.image_tokens = int(statistics.median(each.image_tokens for each in self.asked))
        self.prompt_tokens = int(statistics.median(each.tokens for each in self.asked))
        self.batches = generation.batches([each.tokens for each in self.asked], plan.batch_size)
        self.limit = max(each.question.max_new_tokens for each in self.asked)
        self.config = generation.neutral_config(model, processor, Decoding(), self.limit)
        digest = hashlib.sha256()
        for each in self.asked:
            digest.update(f"{each.question.item.id}\n{each.hash}\n".encode())
        identity = {
            "fingerprint": fingerprint(model),
            "questions": digest.hexdigest(),
            "clock": self.clock.name,
            **decisive(conditions(model, Decoding(), plan.batch_size)),
        }
        claim(plan.output, plan.facts(), "speed measurement")  # nothing was written so far, whatever failed
        self.book = Book(plan.output / "measured.jsonl", identity)
        self.warm: set[str] = set()

    def _fitting(self, chosen: Chosen, anatomy: Anatomy) -> list[_Asked]:
        context = context_length(self.model)
        placeholders = set(anatomy.placeholders.values())
        found, shortest = [], 0
        for question in chosen.questions:
            rendered = self._rendered(question)
            shortest = min(shortest or rendered.length, rendered.length)
            # as many more tokens as an answer and what is timed behind a prompt may take
            room = max(question.max_new_tokens, self.plan.steps)
            if context is not None and rendered.length + room > context:
                continue
            images = sum(token in placeholders for token in rendered.ids)
            found.append(_Asked(question, rendered.length, images, rendered.hash))
        if not found:
            raise DataError(
                f"no question leaves room for an answer in the model's context of {context} tokens; the shortest takes "
                f"{shortest}",
                where=chosen.source,
                remedy="ask shorter questions, show fewer or smaller pictures, or lower --max-new-tokens and --steps",
            )
        return found

    def _rendered(self, question: Question, pixels: float = 1.0) -> Rendered:
        messages = prompts.loaded(question.item.messages, self.intake)
        if pixels < 1:
            messages = self.intake.shrunk(messages, pixels)
        where = f"question {question.item.id!r}"
        return prompts.encode(self.intake, messages, where=where, roles=needs_roles(self.model))

    def _batch(self, number: int, pixels: float = 1.0) -> list[Rendered]:
        return [self._rendered(self.asked[index].question, pixels) for index in self.batches[number]]

    def measured(self, grid: Sequence[Candidate], progress: bool) -> tuple[list[Row], Host, Spread]:
        """All rows of the grid, the model without a policy, and that beside itself."""
        total = (1 + len(grid)) * (1 + len(self.batches) + self.plan.rounds)
        with bar(total, progress) as advancing:
            for candidate in (PLAIN, *grid):
                advancing.advance(f"count: {candidate.name}", 0)
                self._count(candidate)
                advancing.advance(f"count: {candidate.name}", 1)
            references = self._references(grid)
            # answers of a reference that several share are made once
            among = {each.key: each for each in (PLAIN, *grid, *references.values())}
            for number in range(len(self.batches)):
                self._answer(number, list(among.values()), advancing)
                advancing.advance("answers", 1 + len(grid))
            batches: dict[float, list[list[Rendered]]] = {}
            for turn in range(self.plan.rounds):
                for candidate in (_ITSELF, *grid):
                    label = f"time, round {turn + 1} of {self.plan.rounds}: {candidate.name}"
                    advancing.advance(label, 0)
                    if self._missing(candidate, f"times/{candidate.key}/{turn}"):
                        for pixels in {1.0, candidate.pixels} - batches.keys():
                            batches[pixels] = [self._batch(number, pixels) for number in self._timed_batches()]
                        self._time(candidate, turn, batches)
                    advancing.advance(label, 1)
        return (
            [self._row(each, references.get(each.key)) for each in grid],
            self._host(),
            self._times(_ITSELF)["answer"],
        )

    # -- pieces of work -----------------------------------------------------------------------------------------------

    def _missing(self, candidate: Candidate, key: str) -> bool:
        return key not in self.book and f"refused/{candidate.key}" not in self.book

    def _note(self, candidate: Candidate, key: str, work: Callable[[], Any]) -> None:
        """Do a piece of work and note what comes of it; or that the host refuses the candidate."""
        try:
            found = work()
        except AlulaError as error:
            if candidate.is_plain:
                raise
            reason = f"{error.where}: {error.message}" if error.where else error.message
            self.book.note(f"refused/{candidate.key}", reason)
            return
        self.book.note(key, found)

    def _count(self, candidate: Candidate) -> None:
        key = f"counted/{candidate.key}"
        if not self._missing(candidate, key):
            return
        prompt = self._rendered(self._typical.question, candidate.pixels)

        def work() -> dict[str, Any]:
            with candidate.on(self.model):
                return asdict(counted(self.model, prompt, self.config))

        self._note(candidate, key, work)

    @property
    def _typical(self) -> _Asked:
        """The question of median length."""
        return sorted(self.asked, key=lambda each: each.tokens)[len(self.asked) // 2]

    def _answer(self, number: int, candidates: Sequence[Candidate], advancing: Bar) -> None:
        """The answers to one batch: it is made once in each size, and put to the model under each candidate."""
        batches: dict[float, list[Rendered]] = {}
        for candidate in candidates:
            key = f"answers/{candidate.key}/{number}"
            if not self._missing(candidate, key):
                continue
            advancing.advance(f"answers, batch {number + 1} of {len(self.batches)}: {candidate.name}", 0)
            if candidate.pixels not in batches:
                batches[candidate.pixels] = self._batch(number, candidate.pixels)
            self._note(candidate, key, partial(self._said, candidate, batches[candidate.pixels]))

    def _said(self, candidate: Candidate, batch: Sequence[Rendered]) -> list[dict[str, Any]]:
        with candidate.on(self.model):
            answers = generation.answer(self.model, self.processor, batch, self.config, 0)
        return [
            {
                "ids": token_ids.write([answer.ids]),
                "tokens": len(answer.ids) + (not answer.truncated),
                "text": None if answer.unfinished else answer.text,
                "truncated": answer.truncated,
            }
            for answer in answers
        ]

    def _timed_batches(self) -> list[int]:
        """Evenly spaced over the batches, which are in order of length."""
        many, wanted = len(self.batches), min(self.plan.timed, len(self.batches))
        return [(2 * index + 1) * many // (2 * wanted) for index in range(wanted)]

    def _time(self, candidate: Candidate, turn: int, batches: Mapping[float, Sequence[Sequence[Rendered]]]) -> None:
        """One plain pass and one under the candidate, over the same batches, each with its pictures; who comes first
        changes by round."""
        config = unending(self.config, self.plan.steps)

        def passed(one: Candidate) -> list[list[float]]:
            with one.on(self.model):
                return [list(timed(self.model, batch, config, self.clock)) for batch in batches[one.pixels]]

        def work() -> dict[str, list[list[float]]]:
            if candidate.key not in self.warm:
                passed(candidate)
                self.warm.add(candidate.key)
            if turn % 2:
                plain, own = passed(PLAIN), passed(candidate)
            else:
                own, plain = passed(candidate), passed(PLAIN)
            return {"plain": plain, "own": own}

        self._note(candidate, f"times/{candidate.key}/{turn}", work)

    # -- what comes of them -------------------------------------------------------------------------------------------

    def _counted(self, candidate: Candidate) -> Counted:
        return Counted(**self.book[f"counted/{candidate.key}"])

    def _kept(self, candidate: Candidate) -> float | None:
        """The share of the keys of image tokens that the cache holds behind a prompt, mean over layers."""
        own, plain = self._counted(candidate).keys, self._counted(PLAIN).keys
        text = self._typical.tokens - self._typical.image_tokens
        shares = [(held - text) / (all_ - text) for held, all_ in zip(own, plain, strict=True) if all_ > text]
        return min(1.0, max(0.0, sum(shares) / len(shares))) if shares else None

    def _references(self, grid: Sequence[Candidate]) -> dict[str, Candidate]:
        """What tells easy questions from hard ones, by the key of the candidate it is for: pooling to the share of
        image tokens that this one keeps."""
        if not any(each.question.item.gold for each in self.asked):
            return {}
        found = {}
        for candidate in grid:
            if f"refused/{candidate.key}" in self.book:
                continue
            kept = round(self._kept(candidate) or 0.0, 2)
            if kept:
                found[candidate.key] = pooled(kept) if kept < 1 else PLAIN
        return found

    def _answers(self, candidate: Candidate) -> list[dict[str, Any]] | None:
        """One per question, in their order; None where the host refused."""
        if f"refused/{candidate.key}" in self.book:
            return None
        found: dict[int, dict[str, Any]] = {}
        for number, batch in enumerate(self.batches):
            found |= zip(batch, self.book[f"answers/{candidate.key}/{number}"], strict=True)
        return [found[index] for index in range(len(self.asked))]

    def _scores(self, answers: Sequence[Mapping[str, Any]]) -> list[float]:
        return [
            0.0 if answer["text"] is None else each.question.score(answer["text"])
            for each, answer in zip(self.asked, answers, strict=True)
        ]

    def _times(self, candidate: Candidate) -> dict[str, Spread]:
        """Ratios to the model without a policy, of each round."""
        ratios: dict[str, list[float]] = {"prefill": [], "step": [], "answer": []}
        for turn in range(self.plan.rounds):
            pair = self.book[f"times/{candidate.key}/{turn}"]
            own, plain = (self._seconds(pair[name]) for name in ("own", "plain"))
            for name, values in ratios.items():
                values.append(own[name] / plain[name])
        return {name: Spread.of(values) for name, values in ratios.items()}

    def _seconds(self, batches: Sequence[Sequence[float]]) -> dict[str, float]:
        """Mean seconds of a batch: until the first token, of each further one, of whole answers."""
        prefill, step = (sum(batch[i] for batch in batches) / len(batches) for i in (0, 1))
        return {"prefill": prefill, "step": step, "answer": prefill + (self._length - 1) * step}

    @property
    def _length(self) -> float:
        """Mean length of the answers of the model without a policy, in tokens."""
        answers = self._answers(PLAIN)
        assert answers is not None
        return max(1.0, statistics.fmean(answer["tokens"] for answer in answers))

    def _host(self) -> Host:
        pairs = [self.book[f"times/{_ITSELF.key}/{turn}"] for turn in range(self.plan.rounds)]
        seconds = [self._seconds(pair[name]) for pair in pairs for name in ("own", "plain")]
        prefill, step, answer = (
            statistics.median(each[name] for each in seconds) for name in ("prefill", "step", "answer")
        )
        plain, answers = self._counted(PLAIN), self._answers(PLAIN)
        assert answers is not None
        scores = [
            score for each, score in zip(self.asked, self._scores(answers), strict=True) if each.question.item.gold
        ]
        return Host(
            prefill_seconds=prefill,
            step_seconds=step,
            answer_tokens=self._length,
            decode_share=(answer - prefill) / answer,
            operations=plain.operations,
            tower_share=plain.in_towers / plain.operations,
            cache_bytes=plain.cache_bytes,
            accuracy=wilson(sum(scores), len(scores)) if scores else None,
        )

    def _row(self, candidate: Candidate, reference: Candidate | None) -> Row:
        refused = self.book.get(f"refused/{candidate.key}")
        if refused is not None:
            return Row(name=candidate.name, policies=candidate.settings(), pixels=candidate.pixels, refused=refused)
        own, plain, times = self._counted(candidate), self._counted(PLAIN), self._times(candidate)
        return Row(
            name=candidate.name,
            policies=candidate.settings(),
            pixels=candidate.pixels,
            operations=own.operations / plain.operations,
            step_operations=own.in_step / plain.in_step,
            cache_bytes=own.cache_bytes,
            cache=own.cache_bytes / plain.cache_bytes,
            kept=self._kept(candidate),
            parts=self._parts(candidate, reference),
            prefill=times["prefill"],
            step=times["step"],
            answer=times["answer"],
        )

    def _parts(self, candidate: Candidate, reference: Candidate | None) -> dict[str, Part]:
        before, after = self._answers(PLAIN), self._answers(candidate)
        assert before is not None
        assert after is not None
        chosen = {"all": list(range(len(self.asked)))}
        easier = None if reference is None else self._answers(reference)
        if easier is not None:
            known = [index for index in chosen["all"] if self.asked[index].question.item.gold]
            right = self._scores(easier)
            chosen["easy"] = [index for index in known if right[index] >= 1]
            chosen["hard"] = [index for index in known if right[index] < 1]
        for kind in ("localization", "reading"):
            chosen[kind] = [index for index in chosen["all"] if self.asked[index].question.kind == kind]
        return {name: self._part(before, after, places) for name, places in chosen.items() if places}

    def _part(self, before: Sequence[Any], after: Sequence[Any], places: Sequence[int]) -> Part:
        same = sum(
            before[i]["ids"] == after[i]["ids"] and before[i]["truncated"] == after[i]["truncated"] for i in places
        )
        known = [i for i in places if self.asked[i].question.item.gold]
        right = None
        if known:
            first, second = (np.array(self._scores(answers))[known] for answers in (before, after))
            items = [self.asked[i].question.item for i in known]
            cluster = np.array(Labels.of([item.cluster or item.id for item in items]).index)
            right = compare_scores(first, second, cluster)
        return Part(n=len(places), agreement=wilson(same, len(places)), right=right)
