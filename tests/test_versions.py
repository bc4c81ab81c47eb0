"""The table of releases that alula was tested on: made by its command, and in step with bounds and constants."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from alula.seam.tested import TESTED

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
versions: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = versions
spec.loader.exec_module(versions)
RECORD: dict[str, Any] = json.loads(versions.RECORD.read_text())


def test_the_page_is_what_the_command_writes() -> None:
    assert versions.PAGE.read_text() == versions.page(RECORD)


def test_the_newest_releases_tested_are_those_beyond_which_alula_warns() -> None:
    assert {name: RECORD["newest"]["packages"][name] for name in TESTED} == TESTED
    assert not RECORD["newest"]["failures"]


@pytest.mark.parametrize("row", ["lowest", "lowest-torch"])
def test_the_oldest_releases_tested_are_the_bounds(row: str) -> None:
    names = [*versions.WATCHED, *(["torch"] if row == "lowest-torch" else [])]
    needed = versions.requirements()
    for name in names:
        assert Requirement(versions.lowest(needed[name])).specifier.contains(RECORD[row]["packages"][name])


def test_an_environment_is_asked_for_by_its_bounds() -> None:
    lowest, newest, oldest = versions.environments("torch==2.13.0")
    needed = versions.requirements()
    assert lowest.pins[0] == newest.pins[0] == "torch==2.13.0"
    assert newest.newest
    assert oldest.pins[1:] == lowest.pins[1:]
    for pin in oldest.pins:
        bound, asked = needed[Requirement(pin).name].specifier, Requirement(pin).specifier
        (version,) = (each.version for each in asked)
        assert bound.contains(version)
    with pytest.raises(SystemExit, match="no single lower bound"):
        versions.lowest(Requirement("torch<3"))


def test_what_cannot_be_installed_leaves_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PLACE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    row = versions.run(versions.Environment("nowhere", "none", ("torch==0.0.1",)), {}, again=False, processes=1)
    assert row["reason"]
    assert "| no build at hand |" in versions.page({"nowhere": row})


def test_counts_are_those_of_the_test_run(tmp_path: Path) -> None:
    (tmp_path / "test_outcomes.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "def test_unset(broken): pass\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import no_such_package\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}"]
    command += ["--continue-on-collection-errors", f"--junitxml={report}", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    found = versions.outcome(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1)
    assert found["failures"] == ["test_outcomes.py::test_unset", "test_outcomes.py::test_wrong", "test_unreadable"]
