"""`gpu.sh` asks scripts that are there for parts that they have, and ends in time. Python is a stand-in here."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def _called(folder: Path, stand_in: str = "", **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the script says, and what it called Python with."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exit\necho "$*" >> {calls}\n{stand_in}\n')
    python.chmod(0o755)
    given = {**os.environ, "PYTHON": str(python), "DEVICE": "cpu", "MORE": "--shrink", **settings}
    command = ["bash", str(FOLDER / "gpu.sh"), "out"]  # from where it is called
    ended = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)
    return ended, calls.read_text().splitlines() if calls.exists() else []


def test_it_asks_for_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, calls = _called(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".log"}
    monkeypatch.syspath_prepend(FOLDER)
    parts = set()
    for call in calls:
        script, *arguments = call.split()
        assert (FOLDER.parent / script).is_file()
        assert arguments[-3:] == ["--device", "cpu", "--shrink"]
        if "--only" in arguments:
            monkeypatch.setattr(sys, "argv", [script, *arguments, "--list"])
            runpy.run_path(str(FOLDER.parent / script), run_name="__main__")
            part = arguments[arguments.index("--only") + 1]
            assert capsys.readouterr().out.split()[0] == part
            parts.add((Path(script).stem, part))
    assert {("wings", "7b/generate"), ("wings", "7b/decode"), ("compiled", "7b/decode-static")} <= parts
    assert {"probes", "policies"} <= {Path(call.split()[0]).stem for call in calls}


def test_it_ends_in_time_and_says_what_is_left(tmp_path: Path) -> None:
    ended, calls = _called(tmp_path, "exec sleep 60", LIMIT="1")
    assert ended.returncode == 1
    assert len(calls) == 1
    told = ended.stdout.splitlines()
    assert told[0].startswith("wings-prefill-1024 failed or ran out of time: ")
    assert "highlight: no time left for it: call again, what is there is gone on with" in told
