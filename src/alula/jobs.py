"""Pieces of work side by side: worker processes, one bar over all of them, and a directory that belongs to one plan.

Jobs leave their results in files and do nothing where those are there already, so a run that was killed goes on where
it was, and the bar is read off the files.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alula.allocator import keep_freed_memory
from alula.errors import AlulaError, UsageError
from alula.files import contents, read_json, restore_directories, telling, write_json
from alula.progress import Lines

_POLL = 1.0  # seconds between looks at the workers' files
_PLAN, _SESSIONS = "plan.json", "sessions.json"


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        title: what the bar calls it; unique within a run.
        call: a function at the top of a module, and its arguments: both go to another process.
        size: units of work in all.
        done: how many of them the files say are done; asked while the job runs.
        after: titles of jobs that must be finished first.
    """

    title: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    size: int = 1
    done: Callable[[], int] = lambda: 0
    after: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], *, label: str, workers: int | None = None, quiet: bool = False) -> None:
    """Run jobs in processes of their own, each as soon as those it comes after are done; the first failure stops all.

    Args:
        label: of the bar.
        workers: processes side by side; by default one per core (one on a GPU). 0: no other process, the jobs run one
            after the other in this one, with its own settings.
        quiet: draw no progress.

    Raises:
        UsageError: a job comes after one that is not there, or after itself.
        AlulaError: a worker died, as it does when the machine is out of memory.
    """
    _check_order(jobs)
    cores = os.cpu_count() or 1
    if workers is None:
        import torch  # here, since looking at data needs none of it

        workers = 1 if torch.cuda.is_available() else cores
    if workers == 0:
        with _Bar(jobs, label, quiet=quiet) as bar:
            for job in jobs:
                job.call(*job.arguments)
                bar.finish(job)
        return
    waiting, running, finished = list(jobs), dict[Future[None], Job](), set[str]()
    with _pool(workers, max(1, cores // workers)) as pool, _Bar(jobs, label, quiet=quiet) as bar:
        try:
            while waiting or running:
                ready = [job for job in waiting if finished.issuperset(job.after)]
                waiting = [job for job in waiting if job not in ready]
                running |= {pool.submit(job.call, *job.arguments): job for job in ready}
                ended, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
                bar.look([job for future, job in running.items() if future.running()])
                for future in ended:
                    job = running.pop(future)
                    future.result()
                    finished.add(job.title)
                    bar.finish(job)
        except BrokenProcessPool:
            raise AlulaError(
                f"a worker process of {label} died before its job was done",
                remedy="most often memory ran out: name fewer --workers; what is finished is kept, start it again",
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if unfinished := [each.title for future, each in running.items() if future.running()]:
                bar.say(f"stopping, once these have ended: {', '.join(unfinished)}")
            raise


def run_in(
    directory: Path,
    facts: Mapping[str, Any],
    what: str,
    jobs: Sequence[Job],
    *,
    label: str,
    workers: int | None = None,
    quiet: bool = False,
) -> float:
    """`claim` a directory and run jobs that leave their results there; returns the seconds of all sessions on it."""
    claim(directory, facts, what)
    started = time.perf_counter()
    run_jobs(jobs, label=label, workers=workers, quiet=quiet)
    return add_session(directory, time.perf_counter() - started)


def claim(directory: Path, facts: Mapping[str, Any], what: str) -> None:
    """Make ``directory`` that of the plan with these settings, which `refuse_others` lets pass, and tidy it up.

    What a killed call left half-written there goes, a plan that was not yet in place included.

    Args:
        facts: JSON values that decide what is computed.
        what: what kind of run it is, for messages: "quickstart".

    Raises:
        UsageError: it holds something else, or a run with other settings.
    """
    refuse_others(directory, facts, what)
    restore_directories(directory, below=True)
    if not (directory / _PLAN).is_file():
        write_json(directory / _PLAN, dict(facts))


def refuse_others(directory: Path, facts: Mapping[str, Any], what: str) -> None:
    """Raise a UsageError where ``directory`` holds something else than a run with these settings; see `claim`."""
    mark = directory / _PLAN
    with telling(directory):
        if mark.is_file():
            found = read_json(mark)
            now = json.loads(json.dumps(dict(facts)))
            if found != now:
                article = "an" if what[0] in "aeiou" else "a"
                pairs = ((key, found.get(key, "absent"), now.get(key, "absent")) for key in {**found, **now})
                told = "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in pairs if old != new)
                raise UsageError(
                    f"it holds {article} {what} with other settings: {told}",
                    where=str(directory),
                    remedy="name another --output, or remove it",
                )
        elif directory.exists():
            if not directory.is_dir():
                raise UsageError("is a file", where=str(directory), remedy="name a directory as --output")
            if contents(directory):
                raise UsageError(
                    f"is not empty and holds no {what}", where=str(directory), remedy="name another --output"
                )


def add_session(directory: Path, seconds: float) -> float:
    """Note how long a session on ``directory`` took; returns the seconds of all of them."""
    path = directory / _SESSIONS
    earlier = read_json(path) if path.is_file() else []
    write_json(path, [*earlier, round(seconds, 1)])
    return sum(earlier) + seconds


def lines(path: Path) -> int:
    """Lines of a file that grows as work is done; 0 where it is not there yet."""
    try:
        with path.open("rb") as stream:
            return sum(1 for _ in stream)
    except FileNotFoundError:
        return 0


def end_with_parent() -> None:
    """Let this worker process end when the one that started it ends, however that ends.

    A pool's workers hold the pipe they wait at open for each other, so that killing the parent alone leaves them there,
    with their memory and their locks. Content they were writing is treated as after any kill, see `alula.files`.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()  # a pipe that closes when the parent is gone
            os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def prepare_worker(threads: int) -> None:
    """Settings of a worker process: its share of the cores, memory that is not handed back between steps, its end."""
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    # PEFT still asks transformers by names that are to be renamed; nothing a user of ours can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    keep_freed_memory()


def _check_order(jobs: Sequence[Job]) -> None:
    known: set[str] = set()
    for job in jobs:
        missing = [title for title in job.after if title not in known]
        if missing or job.title in known:
            needed = f", after the jobs it depends on: {', '.join(job.after)}" if job.after else ""
            raise UsageError(f"job {job.title!r} must be listed once{needed}")
        known.add(job.title)


@contextlib.contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    # spawned, not forked: torch's thread pools do not survive a fork
    context = multiprocessing.get_context("spawn")
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a worker imports torch
    try:
        with ProcessPoolExecutor(workers, context, prepare_worker, (threads,)) as pool:
            yield pool
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = previous


class _Bar:
    """One bar over all jobs, read off the files the workers write."""

    def __init__(self, jobs: Sequence[Job], label: str, *, quiet: bool) -> None:
        self.done = {job.title: 0 for job in jobs}
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.lines = Lines(self.console, sum(job.size for job in jobs))
        self.task = self.progress.add_task(label, total=sum(job.size for job in jobs))

    def __enter__(self) -> _Bar:
        self.progress.__enter__()
        if not self.console.is_terminal:
            self.say(f"{self.progress.tasks[0].description}: {len(self.done)} jobs; each is told when it is done")
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.__exit__(None, None, None)

    def look(self, running: Iterable[Job]) -> None:
        """Move the bar to what the files of running jobs say; asking those of all would cost a good part of a core."""
        now = {job.title: min(job.size, job.done()) for job in running}
        self.done.update(now)
        done = sum(self.done.values())
        self.progress.update(self.task, completed=done)
        if not self.console.is_terminal:
            self.lines.tell(f"{self.progress.tasks[0].description} ({', '.join(now)})", done)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def finish(self, job: Job) -> None:
        self.say(f"done: {job.title}")
        self.done[job.title] = job.size
        self.progress.update(self.task, completed=sum(self.done.values()))
