"""Processes of their own, forked: what a fresh interpreter takes seconds to import is there."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Self

from accelerate.state import AcceleratorState, GradientState

_FORKING = multiprocessing.get_context("fork")
_ANEW = ("alula.plugins", "alula.training", "alula.cli")


class Forked:
    """A process that can be looked at, killed and waited for.

    Args:
        run: what it does.
        environment: variables that it has besides.
        site: a folder of installed packages of which it knows besides: it looks for methods of training, and imports
            them and the command line anew.
    """

    def __init__(
        self, run: Callable[[], object], environment: Mapping[str, str] | None = None, site: Path | None = None
    ) -> None:
        self._run, self._environment, self._site = run, environment or {}, site
        self._said: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.process: BaseProcess = _FORKING.Process(target=self._child)
        self.process.start()

    @classmethod
    def command(cls, *words: str | Path, site: Path | None = None) -> Self:
        """``alula WORDS``."""

        def run() -> None:
            sys.argv = ["alula", *map(str, words)]
            importlib.import_module("alula.cli.app").main()

        return cls(run, site=site)

    @classmethod
    def script(
        cls, path: Path, *words: str, site: Path | None = None, ranks: tuple[int, int, int] | None = None
    ) -> Self:
        """``python PATH WORDS``; with ``ranks`` as the process (number, of how many, at which port) of several."""

        def run() -> None:
            sys.argv = [str(path), *words]
            runpy.run_path(str(path), run_name="__main__")

        environment = {}
        if ranks is not None:
            rank, processes, port = map(str, ranks)
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return cls(run, environment, site)

    def _child(self) -> None:
        for number, file in enumerate(self._said, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
        os.environ.update(self._environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if self._site is not None:
            for name in [name for name in sys.modules if name.startswith(_ANEW)]:
                parent, _, own = name.rpartition(".")
                if hasattr(sys.modules.get(parent), own):
                    delattr(sys.modules[parent], own)
                del sys.modules[name]
            sys.path.insert(0, str(self._site))
        try:
            self._run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    @property
    def over(self) -> bool:
        return self.process.exitcode is not None

    def done(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises `subprocess.TimeoutExpired` where it does not come, and kills it."""
        self.process.join(seconds)
        if not self.over:
            ended = self.kill()
            raise subprocess.TimeoutExpired("a forked process", seconds, ended.stdout, ended.stderr)
        return self._outcome()

    def kill(self) -> subprocess.CompletedProcess[str]:
        """End it as ``kill -9`` does."""
        self.process.kill()
        self.process.join()
        return self._outcome()

    def _outcome(self) -> subprocess.CompletedProcess[str]:
        said = []
        for file in self._said:
            file.seek(0)
            said.append(file.read().decode())
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess([], self.process.exitcode, *said)


def ended(*processes: Forked, seconds: float = 240) -> list[str]:
    """What they said, once all are done well; where one is not, none is left."""
    try:
        ends = [process.done(seconds) for process in processes]
    finally:
        for process in processes:
            if not process.over:
                process.kill()
    assert [end.returncode for end in ends] == [0] * len(ends), "\n".join(end.stderr[-6000:] for end in ends)
    return [end.stdout for end in ends]
