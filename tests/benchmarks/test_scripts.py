"""Every script of benchmarks/ runs from end to end on little, in whole and in half precision and away from the CPU."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.elsewhere import elsewhere

FOLDER = Path(__file__).parents[2] / "benchmarks"
COUNTS = "launches.py"  # nothing in it is timed; see test_launches
PROCESS = "kvpress_process.py"  # the half of `incumbents.py` that runs in another environment
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
DATA = "data.py"  # no device computes in it; the builds beside each other are processes of their own
SERVING = "serving.py"  # its servers are processes of their own, each a minute of a CPU; see tests/serving
REAL = ("speech.py", "training.py")  # of released weights; see test_real
SCRIPTS = [name for name in SCRIPTS if name not in (COUNTS, PROCESS, DATA, SERVING, *REAL)]
# what takes long in a script, done once: sizes are shrunk to nearly the same in all of its parts
PARTS = {
    ("wings.py", "float32"): ["--only", "fledgling"],
    ("wings.py", "bfloat16"): ["--only", "7b", "--no-memory"],
    ("compiled.py", "bfloat16"): ["--only", "7b/decode-static"],
    ("experts.py", "float32"): ["--only", "fledgling", "--peaks", "1"],
    ("experts.py", "bfloat16"): ["--only", "7b", "--no-memory"],
    ("experts.py", "elsewhere"): ["--only", "0.5b/decode", "--only", "0.5b/train"],
    ("mks2.py", "float32"): ["--only", "fledgling", "--no-memory"],
    ("mks2.py", "bfloat16"): ["--only", "7b", "--no-memory"],
    ("mks2.py", "elsewhere"): ["--only", "0.5b/decode", "--only", "0.5b/train"],
    ("policies.py", "bfloat16"): ["--only", "prompt", "--only", "steps"],
    ("policies.py", "elsewhere"): ["--only", "prompt", "--only", "steps"],
    ("compress.py", "bfloat16"): ["--only", "clock"],
    ("compress.py", "elsewhere"): ["--only", "clock"],
    ("probes.py", "bfloat16"): ["--only", "decoder"],
    ("probes.py", "elsewhere"): ["--only", "decoder"],
    ("highlight.py", "float32"): ["--only", "operators", "--only", "memory"],
    ("highlight.py", "elsewhere"): ["--only", "steps"],
    **{("universal.py", where): ["--sizes", "fledgling"] for where in ("float32", "bfloat16", "elsewhere")},
    ("wings.py", "elsewhere"): ["--only", "0.5b/prefill-256", "--only", "0.5b/decode", "--only", "0.5b/train"],
}


def _run(script: str, output: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [script, "--shrink", "--rounds", "1", "--output", str(output), *arguments])
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    return json.loads(output.read_text())


def _numbers(record: Any) -> list[float]:
    """Every number in a record."""
    if isinstance(record, (dict, list)):
        values = record.values() if isinstance(record, dict) else record
        return [number for value in values for number in _numbers(value)]
    return [record] if isinstance(record, (int, float)) else []


# tracing takes long, in any precision
@pytest.mark.parametrize(
    ("script", "dtype"),
    [
        (name, dtype)
        for name in SCRIPTS
        for dtype in ("float32", "bfloat16")
        if (name, dtype) != ("compiled.py", "float32")
    ],
)
def test_a_script_runs(script: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = PARTS.get((script, dtype), [])
    record = _run(script, tmp_path / "record.json", monkeypatch, "--dtype", dtype, *parts)
    assert all(number == number for number in _numbers(record))
    assert f'"{dtype}"' in json.dumps(record)
    for difference in record.get("agreement of naive and fused logits", {}).values():
        assert difference < {"float32": 1e-5, "bfloat16": 0.05}[dtype]


# torch compiles nothing for a device that it does not know
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "compiled.py"])
def test_a_script_runs_away_from_the_cpu(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = PARTS.get((script, "elsewhere"), [])
    with elsewhere() as device:
        memory = (
            ["--no-memory"] if script in ("experts.py", "mks2.py", "wings.py") else []
        )  # which an accelerator's own counters tell
        record = _run(script, tmp_path / "record.json", monkeypatch, "--device", device, *memory, *parts)
    assert f'"{device}"' in json.dumps(record)


def test_builds_are_put_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _run(DATA, tmp_path / "record.json", monkeypatch, "--rival", str(FOLDER.parent))
    assert all(number > 0 for number in _numbers(record["rounds"]))


def test_builds_are_put_beside_each_other_for_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _run("probes.py", tmp_path / "record.json", monkeypatch, "--rival", str(FOLDER.parent))
    found = record["build over rival"]
    assert found.keys() == {"fledgling", "decoder"}
    assert all("all five" in probes and all(each["low"] > 0 for each in probes.values()) for probes in found.values())


def test_builds_are_put_beside_each_other_for_wings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = ["--only", "fledgling/prefill-256"]
    record = _run("wings.py", tmp_path / "record.json", monkeypatch, "--rival", str(FOLDER.parent), *part)
    found = record["build over rival"]["fledgling/prefill-256"]
    assert found.keys() == {"lora", "mass", "attention"}
    assert all(each["low"] > 0 for each in found.values())


@pytest.mark.parametrize(("script", "option"), [("wings.py", "--again"), ("probes.py", "--dtype=bfloat16")])
def test_an_option_without_effect_beside_a_build_is_refused(
    script: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _run(script, tmp_path / "record.json", monkeypatch, "--rival", str(FOLDER.parent), option)
    assert stop.value.code == 2
    assert f"{option.partition('=')[0]} is without effect beside --rival" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_every_other_file_is_part_of_a_script() -> None:
    used = {
        name
        for script in (*SCRIPTS, COUNTS, DATA, SERVING)
        for name in re.findall(r"^(?:import|from) (\w+)", (FOLDER / script).read_text(), re.M)
    }
    assert {
        path.stem for path in FOLDER.glob("*.py") if path.name not in (*SCRIPTS, COUNTS, DATA, SERVING, *REAL)
    } <= used


def test_every_result_is_listed_with_its_command() -> None:
    rows = re.findall(r"^\| `results/(\S+)` \| (.*?) \|", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(path.name for path in (FOLDER / "results").iterdir())
    assert all("`" in command for _, command in rows)
