"""Jobs in processes of their own: order, failures, and the directory that belongs to one plan."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alula.errors import AlulaError, DataError, PathError, UsageError
from alula.jobs import Job, add_session, claim, lines, run_jobs


def note(path: Path, name: str) -> None:
    """A job: add a line saying who ran, unless the job has run before."""
    mark = path.with_name(f"{name}.done")
    if not mark.exists():
        with path.open("a") as stream:
            stream.write(f"{name} {os.getpid()}\n")
        mark.touch()


def fail(path: Path, name: str) -> None:
    raise DataError(f"{name} has no data", where=str(path), remedy="bring some")


def die() -> None:
    """A job whose process is killed, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def names(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()]


def test_jobs_run_elsewhere_in_their_order_and_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    jobs = [
        Job("first", note, (path, "first")),
        Job("other", note, (path, "other"), after=("first",)),
        Job("last", note, (path, "last"), after=("other", "first")),
    ]
    run_jobs(jobs, label="test", workers=2, quiet=True)
    assert names(path) == ["first", "other", "last"]
    assert str(os.getpid()) not in path.read_text()
    run_jobs(jobs, label="test", workers=0, quiet=True)
    assert names(path) == ["first", "other", "last"]


def test_without_workers_jobs_run_here(tmp_path: Path) -> None:
    path = tmp_path / "log"
    run_jobs([Job("one", note, (path, "one"))], label="test", workers=0, quiet=True)
    assert path.read_text() == f"one {os.getpid()}\n"


def test_a_failure_arrives_whole_and_stops_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    jobs = [Job("bad", fail, (path, "bad")), Job("next", note, (path, "next"), after=("bad",))]
    with pytest.raises(DataError, match="bad has no data") as caught:
        run_jobs(jobs, label="test", workers=1, quiet=True)
    assert caught.value.remedy == "bring some"
    assert not path.exists()


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(AlulaError, match=r"(?s)worker process of quickstart died.*--workers"):
        run_jobs([Job("one", die, ()), Job("two", note, (tmp_path / "log", "two"))], label="quickstart", workers=1,
                 quiet=True)  # fmt: skip


def test_impossible_orders_are_refused(tmp_path: Path) -> None:
    one = Job("one", note, (tmp_path / "log", "one"), after=("two",))
    with pytest.raises(UsageError, match="after the jobs it depends on: two"):
        run_jobs([one, Job("two", note, ())], label="test", quiet=True)
    with pytest.raises(UsageError, match="must be listed once"):
        run_jobs([Job("a", note, ()), Job("a", note, ())], label="test", quiet=True)


def test_a_directory_belongs_to_one_plan(tmp_path: Path) -> None:
    claim(tmp_path / "run", {"steps": 1.0, "names": ("a",)}, "study")
    claim(tmp_path / "run", {"steps": 1.0, "names": ("a",)}, "study")
    with pytest.raises(UsageError, match=r"a study with other settings: steps was 1\.0, now 2\.0\n"):
        claim(tmp_path / "run", {"steps": 2.0, "names": ("a",)}, "study")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError, match="holds no study"):
        claim(tmp_path / "mine", {}, "study")
    with pytest.raises(UsageError, match="is a file"):
        claim(tmp_path / "mine" / "letter.txt", {}, "study")


def test_a_kill_before_the_plan_has_its_name_changes_nothing(
    tmp_path: Path, killed_while_writing: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    killed_while_writing(run / "plan.json")
    killed_while_writing(run / "seed-0" / "base-answers.json")
    with pytest.raises(UsageError, match="holds no study"):
        claim(run, {}, "study")
    shutil.rmtree(run / "seed-0")
    claim(run, {"steps": 1}, "study")
    assert [path.name for path in run.rglob("*")] == ["plan.json"]
    killed_while_writing(run / "seed-0" / "base-answers.json")
    claim(run, {"steps": 1}, "study")
    assert sorted(path.name for path in run.rglob("*")) == ["plan.json", "seed-0"]
    (run / "plan.json").write_text('{"ste')
    with pytest.raises(AlulaError, match="damaged"):
        claim(run, {"steps": 1}, "study")
    with pytest.raises(PathError, match="too long"):
        claim(tmp_path / ("x" * 300), {}, "study")


def test_sessions_add_up_and_lines_are_counted(tmp_path: Path) -> None:
    assert add_session(tmp_path, 2.0) == 2.0
    assert add_session(tmp_path, 3.0) == 5.0
    (tmp_path / "rows").write_text("a\nb\n")
    assert (lines(tmp_path / "rows"), lines(tmp_path / "none")) == (2, 0)


PARENT = """
import os, sys, time
from pathlib import Path
from alula.jobs import Job, run_jobs

def work(path, seconds):
    path.write_text(str(os.getpid()))
    time.sleep(seconds)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = [Job(name, work, (folder / name, seconds)) for name, seconds in (("busy", 60), ("brief", 0))]
    run_jobs(jobs, label="test", workers=2, quiet=True)
"""


def alive(process: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has asked about is dead too."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes by /proc")
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    """One that works and one that waits for work."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    marks = [tmp_path / "busy", tmp_path / "brief"]
    with subprocess.Popen([sys.executable, "parent.py", str(tmp_path)], cwd=tmp_path, env=environment) as parent:
        try:
            wait_until(lambda: all(mark.exists() and mark.read_text() for mark in marks), 60)
            workers = {int(mark.read_text()) for mark in marks}
            assert len(workers) == 2
            assert all(map(alive, workers))
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)), 10)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
