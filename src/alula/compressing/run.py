"""The compression itself: the model as it was is asked, then amounts are tried, each noted as soon as it is known."""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from alula.anatomy import Anatomy
from alula.book import Book
from alula.compress import (
    Removal,
    WeightMask,
    WeightPruning,
    check_removal,
    encode,
    prune,
    remove,
)
from alula.compress.targets import matrices
from alula.compressing.plan import Amount, Plan
from alula.compressing.record import SKILLS, Compressed, Trial
from alula.compressing.samples import Chosen, choose
from alula.compressing.search import largest
from alula.data import Collator
from alula.errors import DataError, EvaluationError, HostError, UsageError
from alula.evaluation import (
    Comparison,
    Decoding,
    PairedRun,
    RunResult,
    compare,
    defaults_for,
    evaluate,
    prompts,
)
from alula.evaluation.conditions import conditions, decisive, fingerprint
from alula.evaluation.pairing import compare_scores
from alula.files import telling
from alula.hosts import save_host
from alula.inputs import Intake
from alula.jobs import add_session, claim, refuse_others
from alula.policies import active_policies
from alula.probes import token_sets
from alula.reports.wording import listing, percent
from alula.seam import needs_roles
from alula.training.environment import readable_environment

Loader = Callable[[str], tuple[Any, Any]]
"""a model's name -> (model, processor)"""

MODEL, MASK, PAIRED = "model", "mask.safetensors", "paired.json"
"""what is written of the amount that is chosen: the model, what weights it kept, all comparisons item by item"""


def compress(plan: Plan, load: Loader, *, command: str = "", progress: bool = False) -> Compressed:
    """Find the largest saving within the budget, and save the model.

    Each amount is put on the model anew, answers the same questions, and is compared item by item with the model as it
    was. What is finished is kept under ``plan.output``; a call that was stopped, killed included, goes on from there
    when it is made again. One model is in memory at a time.

    Args:
        load: loads a model by name, the same at every call.
        command: noted in the record.
        progress: draw bars with the time left on stderr.

    Returns:
        the record. Under ``plan.output`` lie `MODEL`, an ordinary directory, `MASK` where weights were set to zero,
        and `PAIRED`.

    Raises:
        EvaluationError: nothing that was tried is within the budget, or the model as it was answers nothing right; no
            model is left there then. UsageError: the output holds something else, or what the budget asks for is not
            among the questions. HostError, DataError: see `alula.compress.prune` and `remove`.
    """
    began = time.perf_counter()
    refuse_others(plan.output, plan.facts(), "compression")
    run = _Run(plan, load, progress)
    claim(plan.output, plan.facts(), "compression")
    run.begin()
    found = largest(len(run.amounts), run.within)
    if found is None:
        for name in (MODEL, MASK, PAIRED):
            _discard(plan.output / name)
        raise run.nothing()
    run.write(run.amounts[found])
    model = plan.output / MODEL
    return Compressed(
        **run.facts,
        model=plan.model,
        kind=plan.kind,
        budget=None if plan.budget is None else dict(plan.budget),
        chosen=run.amounts[found].name,
        possible=[amount.name for amount in run.amounts],
        trials=run.trials(),
        calibrated=run.chosen.calibrated,
        asked=run.chosen.asked,
        bytes_after=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        coded=not any(model.glob("model*.safetensors")),
        settings={**plan.facts(), "sparsity": plan.sparsity},
        environment=readable_environment(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seconds=add_session(plan.output, time.perf_counter() - began),
    )


@dataclass
class _Made:
    """A model after an amount, and what tells what was done."""

    model: Any
    processor: Any
    mask: WeightMask | None
    told: dict[str, Any]
    saved: float


class _Run:
    """A plan, its data, and what is known so far."""

    def __init__(self, plan: Plan, load: Loader, progress: bool) -> None:
        self.plan, self.load, self.progress = plan, load, progress
        self.talk = Console(stderr=True, quiet=not progress)
        model, processor = load(plan.model)
        if active_policies(model):
            raise UsageError(
                "the model was saved with policies, which hold for what is calibrated on as for what is asked",
                where=plan.model,
                remedy="save it without them: load_model(name, policies={}), then save_pretrained",
            )
        anatomy = Anatomy.of(model)
        amounts = plan.amounts(layers=anatomy.num_layers, key_heads=anatomy.num_kv_heads)
        self.amounts = _possible(model, amounts)
        plan.told.keywords(processor)  # refuses what the template does not read
        self.chosen = self._choose(model, processor)
        self.kinds = self.chosen.kinds()
        self._check_asked()
        state = conditions(model, Decoding(), plan.batch_size, plan.told.recorded(processor))
        questions = self.chosen.digest(Intake.of(processor, plan.told))
        self.identity = {"fingerprint": fingerprint(model), "questions": questions, **decisive(state)}
        self.facts: dict[str, Any] = {
            "model_class": type(anatomy.host).__name__,
            "parameters": sum(each.numel() for each in model.parameters()),
            "layers": anatomy.num_layers,
            "conditions": state,
            "bytes_before": sum(each.nbytes for each in model.parameters()),
        }
        self._first: tuple[Any, Any] | None = (model, processor)

    def _choose(self, model: Any, processor: Any) -> Chosen:
        roles = needs_roles(model) or token_sets.by_role(self.plan.tokens)
        collate = Collator(processor, labels=False, roles=roles, template=self.plan.told)
        return choose(self.plan, defaults_for(processor), prompts.takes(processor), collate)

    def _check_asked(self) -> None:
        there = {kind for kinds in self.kinds.values() for kind in kinds.values()}
        for name in self.plan.budget or ():
            if SKILLS[name] not in there:
                raise UsageError(
                    f"{name} is asked for, and no question is of {SKILLS[name]} skill ({self.chosen.asked})",
                    where="--budget",
                    remedy="give --data that holds such questions, or leave it out of the budget",
                )

    def begin(self) -> None:
        """Ask the model as it was."""
        self.book = Book(self.plan.output / "measured.jsonl", self.identity)
        file = self.plan.output / "base.json"
        if file.is_file():
            self.base = RunResult.load(file)
        else:
            assert self._first is not None
            self.base = self._answers(*self._first, "base", "the model as it was")
            self.base.save(file)
        self._first = None  # memory holds one model at a time
        for name in self.plan.budget or ():
            scores = [score for score, _ in self._scores(self.base, SKILLS[name])]
            if not sum(scores):
                raise EvaluationError(
                    f"of {len(scores)} questions of {SKILLS[name]} skill the model itself answers none right, so that "
                    f"there is no {name}",
                    where="--budget",
                    remedy="ask questions that it can answer",
                )

    # -- amounts ------------------------------------------------------------------------------------------------------

    def within(self, index: int) -> bool:
        """Whether an amount is within the budget; it is tried where it was not."""
        trial = self.trial(self.amounts[index])
        within = trial.margin(self.plan.budget or {}) >= 0
        if self.plan.budget is not None:
            told = listing([f"{name} {percent(trial.kept(name))}" for name in self.plan.budget])
            self.talk.print(f"{trial.name}: {told}: {'within' if within else 'not within'} the budget", highlight=False)
        return within

    def trial(self, amount: Amount) -> Trial:
        """What an amount comes to."""
        key = self._place(amount)
        if key not in self.book:
            started = time.perf_counter()
            made = self._make(amount)
            name = self._place(amount)
            tuned = self._answers(made.model, made.processor, name, amount.name)
            pairs = compare(self.base, tuned)
            pairs.save(self.plan.output / f"{name}.json")
            trial = Trial(
                name=amount.name,
                share=amount.share,
                saved=made.saved,
                parameters=sum(each.numel() for each in made.model.parameters()),
                fingerprint=tuned.fingerprint,
                text=self._compared(tuned, "text"),
                visual=self._compared(tuned, "visual"),
                made=made.told,
                seconds=time.perf_counter() - started,
            )
            self.book.note(key, trial.model_dump(mode="json"))
        return Trial(**self.book[key])

    def trials(self) -> list[Trial]:
        """All that were tried, the least first."""
        return [self.trial(amount) for amount in self.amounts if self._place(amount) in self.book]

    def nothing(self) -> EvaluationError:
        """That no amount is within the budget."""
        assert self.plan.budget is not None
        trials = self.trials()
        nearest = max(trials, key=lambda trial: trial.margin(self.plan.budget or {}))
        asked = listing([f"{name} of at least {percent(least)}" for name, least in self.plan.budget.items()])
        kept = listing([f"{name} {percent(nearest.kept(name))}" for name in self.plan.budget])
        return EvaluationError(
            f"nothing that was tried keeps {asked}; the nearest is {nearest.name!r}, with {kept}",
            where="--budget",
            remedy="ask to keep less, give a smaller --step or another --kind or --method, or prune and heal "
            "(recipes/heal.yaml). What was measured is kept: another budget on this --output takes a moment",
        )

    def write(self, amount: Amount) -> None:
        """Save the model of an amount, unless it is there already."""
        plan, trial = self.plan, self.trial(amount)
        state = {"place": self._place(amount), "coded": plan.coded}
        if self.book.get("written") != state or not (plan.output / MODEL).is_dir():
            made = self._make(amount)
            if fingerprint(made.model) != trial.fingerprint:
                raise DataError(
                    f"{amount.name}, made a second time, came out as another model than the one that was measured",
                    where=str(plan.output),
                    remedy="compute on a CPU, or in a higher precision (--dtype float32)",
                )
            save_host((made.model, made.processor), plan.output / MODEL, overwrite=True)
            if plan.coded:
                with suppress(UsageError):  # too few zeros for it
                    encode(plan.output / MODEL, plan.output / MODEL)
            if made.mask is not None:
                made.mask.save(plan.output / MASK)
            self.book.note("written", state)
        PairedRun.load(plan.output / f"{self._place(amount)}.json").save(plan.output / PAIRED)

    def _make(self, amount: Amount) -> _Made:
        """The model with an amount gone."""
        model, processor = self.load(self.plan.model)
        self.talk.print(f"{amount.name}: compressing", highlight=False)
        before = sum(each.numel() for each in model.parameters())
        if isinstance(amount.settings, Removal):
            removed = remove(model, amount.settings, self.chosen.batches)
            gone = removed.parameters_before - removed.parameters_after
            told = {key: value for key, value in removed.to_dict().items() if key != "channels"}
            return _Made(model, processor, None, told, gone / before)
        assert isinstance(amount.settings, WeightPruning)
        mask = prune(model, amount.settings, self.chosen.batches)
        total = sum(rows * columns for rows, columns in mask.shapes.values())
        return _Made(model, processor, mask, dict(mask.made), mask.sparsity * total / before)

    def _place(self, amount: Amount) -> str:
        return f"tried/{self.plan.kind}-{amount.share!r}"

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answers(self, model: Any, processor: Any, place: str, name: str) -> RunResult:
        journal = self.plan.output / f"{place}.jsonl"
        with telling(journal):
            journal.parent.mkdir(parents=True, exist_ok=True)
        return evaluate(
            model,
            processor,
            self.chosen.tasks,
            name=name,
            batch_size=self.plan.batch_size,
            template=self.plan.told,
            journal=journal,
            progress=self.progress,
        )

    def _scores(self, run: RunResult, skill: str) -> list[tuple[float, str]]:
        """Score and cluster of every question of a skill, over all tasks."""
        return [
            (item.score, f"{task.name}/{item.cluster or item.prompt_hash}")
            for task in run.tasks.values()
            for item in task.items
            if self.kinds[task.name][item.id] == skill
        ]

    def _compared(self, tuned: RunResult, skill: str) -> Comparison | None:
        before, after = self._scores(self.base, skill), self._scores(tuned, skill)
        if not before:
            return None
        units = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in before))}
        return compare_scores(
            np.array([score for score, _ in before]),
            np.array([score for score, _ in after]),
            np.array([units[name] for _, name in before]),
        )


def _possible(model: Any, amounts: Sequence[Amount]) -> list[Amount]:
    """Those amounts that the host takes: a class may refuse some numbers of heads, and some shares be less than one."""
    if not amounts:
        raise UsageError("not even one part is so small a share", where="--sparsity", remedy="ask for more")
    found: list[Amount] = []
    refused: UsageError | HostError | None = None
    for amount in amounts:
        if isinstance(amount.settings, WeightPruning):
            matrices(model, amount.settings.targets, amount.settings.layers)  # refuses what cannot be pruned
        else:
            try:
                check_removal(model, amount.settings)
            except (UsageError, HostError) as error:
                refused = error
                continue
        found.append(amount)
    if not found:
        assert refused is not None
        raise refused
    return found


def _discard(path: Path) -> None:
    """Take away what an earlier call with another budget left."""
    with telling(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
