"""Where a run keeps what: the one place that knows the file names.

```
<output_dir>/
  recipe.yaml        the recipe with every default filled in
  data.json          sizes and digests of the files that hold the records, as they were when the run began
  environment.json   versions, machine, git commit, command: one entry per session (start or resume)
  metrics.jsonl      one row per logged step of every stage
  tensorboard/       one folder per stage (only with `report_to: tensorboard`)
  distillation/      answers of the run's start to text questions, by what made them (only with `distill`)
  host/              the assembled starting host (only when the recipe joins an LLM and a tower)
  stages/01-align/
    parameters.json  what was trained, tensor by tensor, with learning rates
    quarantine.jsonl records that were skipped (only with on_bad: skip, and only if there were any)
    retention.json   what was measured at the stage's start (only with `retention`)
    checkpoints/     for resuming only; gone once the stage is done
    within-budget.safetensors   likewise (only with `retention: {action: rewind}`)
    model/           the stage's output: a host or adapter directory, there only when complete
    host/            the tuned host under an adapter, where the stage trained both
    stage.json       written last: the stage is done, or was stopped by the retention budget (which it then says)
  latest -> stages/01-align/model   the newest finished stage's output
  final  -> stages/02-wings/model   the run's output, there only when all stages are done or the run was stopped
  .earlier/          all of this of an earlier run, until the one that started over has something to go on from
```
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula.files import atomic_file, contents, read_json, regular, restore_directories, telling, write_json
from alula.training.checkpoint import newest
from alula.training.recipe import Recipe, Stage, slug

_LOCK, _EARLIER, _DROPPED = ".lock", ".earlier", ".dropped"
_held: set[str] = set()
"""runs this process holds"""


@dataclass(frozen=True)
class StageDirectory:
    """Paths of one stage."""

    root: Path

    @property
    def parameters(self) -> Path:
        return self.root / "parameters.json"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def retention(self) -> Path:
        return self.root / "retention.json"

    @property
    def earlier_retention(self) -> Path:
        """What earlier versions wrote in place of `retention`."""
        return self.root / "watch.json"

    @property
    def within_budget(self) -> Path:
        return self.root / "within-budget.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def host(self) -> Path:
        return self.root / "host"

    @property
    def record(self) -> Path:
        return self.root / "stage.json"

    def done(self) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        if not (self.record.is_file() and self.model.is_dir()):
            return None
        return read_json(self.record)

    def finish(self, record: dict[str, Any]) -> None:
        """Declare the stage done and drop what was only needed to resume it."""
        write_json(self.record, record)
        self.drop_resume_files()

    def drop_resume_files(self) -> None:
        """Drop what is only needed to resume the stage."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.within_budget.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def host(self) -> Path:
        return self.root / "host"

    @property
    def distillation(self) -> Path:
        return self.root / "distillation"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def latest(self) -> Path:
        return self.root / "latest"

    def tensorboard(self, stage: Stage) -> Path:
        return self.root / "tensorboard" / stage.name

    def stage(self, index: int, stage: Stage) -> StageDirectory:
        return StageDirectory(self.root / "stages" / slug(index, stage))

    def stages(self, recipe: Recipe) -> list[StageDirectory]:
        return [self.stage(index, stage) for index, stage in enumerate(recipe.stages)]

    def holds_a_run(self) -> bool:
        return self.recipe.is_file()

    def to_go_on_from(self) -> RunDirectory:
        """Where the run is that the next session finds here: aside, if one that started over was killed too soon."""
        earlier = RunDirectory(self.root / _EARLIER)
        return earlier if earlier.holds_a_run() and not self.has_begun() else self

    def has_begun(self) -> bool:
        """Whether there is something learned to go on from: a checkpoint, or a finished stage."""
        roots = [self.root]
        if not RunDirectory(self.root / _EARLIER).holds_a_run():  # a kill came while its parts were moved
            roots.append(self.root / _EARLIER)
        stages = [StageDirectory(path) for root in roots for path in (root / "stages").glob("*")]
        return any(stage.done() is not None or newest(stage.checkpoints) is not None for stage in stages)

    def check_ownership(self) -> None:
        """Raise a UsageError if there is something here that is not a run's."""
        if not self.root.exists() or self.holds_a_run():
            return
        if any(path.name not in (_LOCK, _EARLIER, _DROPPED) for path in contents(self.root)):
            raise UsageError(
                "the output directory is not empty and holds no run",
                where=str(self.root),
                remedy="name another output_dir, or empty this one yourself",
            )

    def clean_partials(self) -> None:
        """Remove what a killed session left half-written, or had no time to remove when a stage was done."""
        restore_directories(self.root, below=True)
        for stage in map(StageDirectory, (self.root / "stages").glob("*")):
            if stage.done() is not None:
                stage.drop_resume_files()

    def clear(self) -> None:
        """Remove the run that is here, and nothing else."""
        for path in self._entries():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Keep the run that is here out of the way of one that starts over, until `let_go` or `settle`."""
        with telling(self.root):
            (self.root / _EARLIER).mkdir(exist_ok=True)
            for path in self._entries():
                if os.path.lexists(path):
                    path.rename(self.root / _EARLIER / path.name)

    def let_go(self) -> None:
        """Remove the run that was set aside, if one was."""
        if (self.root / _EARLIER).is_dir():
            with telling(self.root):
                self._remove_dropped()
                (self.root / _EARLIER).rename(self.root / _DROPPED)  # at once, or a kill would leave half a run
                self._remove_dropped()

    def settle(self) -> bool:
        """Decide about a run that was set aside: it goes if there is something learned here since, or it comes back.

        Returns:
            whether it came back.
        """
        self._remove_dropped()
        earlier = self.root / _EARLIER
        if not earlier.is_dir():
            return False
        # it moves its recipe last, and first when it comes back: without one, a kill came between
        if (earlier / self.recipe.name).is_file():
            if self.has_begun():
                self.let_go()
                return False
            self.clear()
        with telling(self.root):
            for path in sorted(earlier.iterdir(), key=lambda path: path.name != self.recipe.name):
                path.rename(self.root / path.name)
            earlier.rmdir()
        return True

    def _remove_dropped(self) -> None:
        shutil.rmtree(self.root / _DROPPED, ignore_errors=True)

    def _entries(self) -> tuple[Path, ...]:
        """All that a run may have here. The recipe is last: while it is there, a clean-up that was killed is still a
        run and can be repeated."""
        files = (self.final, self.latest, self.environment, self.metrics, self.data)
        return (*files, self.root / "stages", self.root / "tensorboard", self.distillation, self.host, self.recipe)

    def link(self, path: Path, target: Path) -> None:
        """Make ``path`` a relative symbolic link to ``target``, atomically."""
        with atomic_file(path) as partial:
            partial.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock ends with the process, however it ends.

        Raises:
            UsageError: another process, or another training of this one, is at work here.
            FilesError: the directory cannot be made or written to.
        """
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks of this kind, go without
            yield
            return
        busy = UsageError(
            "another process is training here",
            where=str(self.root),
            remedy="wait for it to end, or name another output_dir",
        )
        key = os.path.realpath(self.root)
        # The lock does not keep a process from itself, and ends when the process closes the file, however often it is
        # opened: one that is held is not to be opened again.
        if key in _held:
            raise busy
        _held.add(key)
        try:
            with telling(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                stream = open(regular(self.root / _LOCK), "w", encoding="ascii")  # noqa: SIM115
            with stream:
                try:
                    # not flock: locks of that kind live on in data workers, which notice late that their parent is gone
                    fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise busy from None
                yield
        finally:
            _held.discard(key)
