"""Running the quickstart: jobs on all cores, resumable, then one record, one table and one report."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alula.errors import UsageError
from alula.evaluation import RunResult, native_tasks
from alula.files import write_json
from alula.quickstart import jobs
from alula.quickstart.plan import ALIGN, BASE, METHODS, Plan
from alula.reports.outcome import BaseOutcome, MethodOutcome, Outcome, SeedOutcome, read_curve
from alula.training.environment import describe_environment

_POLL = 0.5  # seconds between looks at the workers' files


@dataclass(frozen=True)
class _Job:
    """One piece of work: what to call, what it is called, and how much there is to do."""

    title: str
    seed: int
    name: str
    call: jobs.Job
    arguments: tuple[object, ...]


def quickstart(plan: Plan, *, command: str, workers: int | None = None, quiet: bool = False) -> Outcome:
    """Align the fledgling host, tune it by every method, ask base and tuned models the same questions.

    Work that an earlier call of the same plan finished is not done again; a run that was killed goes on where it was.

    Args:
        plan: what to compare and where to write.
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core (one on a GPU).
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds a run of another plan, or an unknown method.
    """
    unknown = [name for name in plan.methods if name not in {method.name for method in METHODS}]
    if unknown:
        raise UsageError(f"there is no method {unknown[0]!r}", remedy=f"use {', '.join(m.name for m in METHODS)}")
    _claim(plan)
    started = time.perf_counter()
    cores = os.cpu_count() or 1
    workers = workers or (1 if torch.cuda.is_available() else cores)
    with _pool(workers, max(1, cores // workers)) as pool, _Bars(plan, quiet=quiet) as bars:
        # connectors first: everything else of a seed starts from its own
        aligns = [_Job(f"align, seed {seed}", seed, ALIGN, jobs.align, (plan, seed)) for seed in plan.seeds]
        others = [
            job
            for seed in plan.seeds
            for job in (
                _Job(f"base, seed {seed}", seed, BASE, jobs.answer_base, (plan, seed)),
                *(_Job(f"{name}, seed {seed}", seed, name, jobs.tune, (plan, seed, name)) for name in plan.methods),
            )
        ]
        bars.announce([*aligns, *others])
        _run(pool, aligns, bars)
        _run(pool, others, bars)
    outcome = gather(plan, command=command, seconds=_total_seconds(plan, time.perf_counter() - started))
    outcome.save(plan.output / "outcome.json")
    return outcome


def gather(plan: Plan, *, command: str, seconds: float) -> Outcome:
    """Put the finished answers of a plan together into one record."""
    bases = {seed: RunResult.load(jobs.answers_path(plan, seed, BASE)) for seed in plan.seeds}
    methods = {}
    for method in METHODS:
        if method.name not in plan.methods:
            continue
        outcomes = {}
        for seed in plan.seeds:
            trainable, spent = jobs.training_facts(plan, seed, method.name)
            outcomes[seed] = SeedOutcome.of(
                bases[seed],
                RunResult.load(jobs.answers_path(plan, seed, method.name)),
                metrics=plan.run_directory(seed, method.name) / "metrics.jsonl",
                trainable_parameters=trainable,
                seconds=spent,
            )
        methods[method.name] = MethodOutcome(
            label=method.label,
            description=method.description,
            learning_rates=plan.recipe(plan.seeds[0], method.name).stages[-1].learning_rates,
            seeds=outcomes,
        )
    return Outcome(
        title="Which words did the eyes cost?",
        command=command,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=_environment(plan),
        seconds=seconds,
        base=BaseOutcome(
            label="base",
            description="the fledgling LLM and tower joined by a trained connector; the LLM as it was raised",
        ),
        shared_curves={seed: read_curve(plan.run_directory(seed, ALIGN) / "metrics.jsonl") for seed in plan.seeds},
        methods=methods,
    )


def _run(pool: ProcessPoolExecutor, work: Sequence[_Job], bars: _Bars) -> None:
    """Run jobs side by side; the first that fails stops the rest."""
    pending: dict[Future[None], _Job] = {pool.submit(job.call, *job.arguments): job for job in work}
    try:
        while pending:
            done, _ = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
            bars.look()
            for future in done:
                job = pending.pop(future)
                future.result()
                bars.finish(job)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextlib.contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    # spawned, not forked: torch's thread pools do not survive a fork
    context = multiprocessing.get_context("spawn")
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a worker imports torch
    try:
        with ProcessPoolExecutor(workers, context, jobs.prepare_worker, (threads,)) as pool:
            yield pool
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = previous


class _Bars:
    """One bar over all jobs, read off the files the workers write."""

    def __init__(self, plan: Plan, *, quiet: bool) -> None:
        self.plan = plan
        self.jobs: list[_Job] = []
        self.finished: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.questions = sum(len(task.items()) for task in native_tasks(n=plan.items, seed=plan.task_seed))
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet,
        )
        self.bar: TaskID | None = None

    def __enter__(self) -> _Bars:
        self.progress.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.__exit__(None, None, None)

    def announce(self, work: Sequence[_Job]) -> None:
        self.jobs = list(work)
        for job in work:
            self.sizes[job.title] = jobs.size_of(self.plan, job.seed, job.name, self.questions)
        self.bar = self.progress.add_task("quickstart", total=sum(self.sizes.values()))

    def look(self) -> None:
        """Move the bar to what the files say."""
        done = sum(
            self.sizes[job.title]
            if job.title in self.finished
            else min(self.sizes[job.title], jobs.progress_of(self.plan, job.seed, job.name))
            for job in self.jobs
        )
        if self.bar is not None:
            self.progress.update(self.bar, completed=done)

    def finish(self, job: _Job) -> None:
        self.finished.add(job.title)
        self.console.print(f"done: {job.title}", highlight=False)
        self.look()


def _claim(plan: Plan) -> None:
    """Make the output directory this plan's, or refuse one that belongs to another."""
    mark = plan.output / "plan.json"
    facts = {
        "methods": list(plan.methods),
        "items": plan.items,
        "task_seed": plan.task_seed,
        "steps": plan.steps,
    }
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if found != facts:
            raise UsageError(
                f"it holds a quickstart with other settings: {found}",
                where=str(plan.output),
                remedy="name another --output, or remove it",
            )
        return
    if plan.output.exists() and any(plan.output.iterdir()):
        raise UsageError("is not empty and holds no quickstart", where=str(plan.output), remedy="name another --output")
    write_json(mark, facts)


def _total_seconds(plan: Plan, session: float) -> float:
    """Wall clock over all sessions that worked on this plan."""
    path = plan.output / "sessions.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    write_json(path, [*earlier, round(session, 1)])
    return sum(earlier) + session


def _environment(plan: Plan) -> dict[str, str]:
    facts = describe_environment(processes=1, seeds={"tasks": plan.task_seed})
    machine, git = facts["machine"], facts["git"]
    return {
        **{name: str(version) for name, version in facts["versions"].items()},
        "commit": "not a checkout" if git is None else f"{git['commit']}{' with changes' if git['changed'] else ''}",
        "machine": f"{machine['platform']}, {machine['cores']} cores",
        "accelerators": ", ".join(machine["accelerators"]) or "none",
        "training seeds": ", ".join(map(str, plan.seeds)),
        "question seed": str(plan.task_seed),
    }
