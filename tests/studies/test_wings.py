"""The Wings ablation: arms that differ in what they say they differ, paired contrasts, reuse of a quickstart."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alula.cli.app import run as run_command_line
from alula.errors import UsageError
from alula.evaluation import RunResult, across_seeds, compare
from alula.files import write_json
from alula.reports import Outcome, render
from alula_fledgling.quickstart import jobs
from alula_fledgling.weights import digest
from studies.__main__ import commands
from studies.arms import contrasts as contrasting
from studies.arms import figures, markdown, report, run, table, verdict
from studies.arms.contrasts import contrasts
from studies.wings import ARMS, QUESTIONS, WINGS, WingsPlan

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"items": 4, "steps": 0.004, "arms": ("full", "wings", "wings-visual")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[WingsPlan, Outcome]:
    plan = WingsPlan(output=tmp_path_factory.mktemp("wings") / "study", **SMALL)
    return plan, run(plan, command="python -m studies wings", workers=0, quiet=True)


@pytest.fixture
def quickstart(finished: tuple[WingsPlan, Outcome], tmp_path: Path) -> Path:
    """A directory as a quickstart leaves it: the layout is the same, and so are recipes and questions."""
    shutil.copytree(finished[0].output, tmp_path / "quickstart", symlinks=True)
    facts = {"fledgling": digest(), "methods": ["full", "wings"], "items": 4, "task_seed": 0, "steps": 0.004}
    write_json(tmp_path / "quickstart" / "plan.json", facts)
    return tmp_path / "quickstart"


def test_the_record_holds_every_arm(finished: tuple[WingsPlan, Outcome]) -> None:
    plan, outcome = finished
    assert tuple(outcome.methods) == SMALL["arms"]
    assert Outcome.load(plan.output / "outcome.json") == outcome
    kept = outcome.methods["wings-visual"].seeds[0].tasks["text_bare"]
    assert kept.overall.lost == kept.overall.gained == 0  # exact gate
    page = render(report(WINGS, outcome))
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert table(WINGS, outcome).row_count == 3
    assert "ways-text-bare" in figures(WINGS, outcome)
    assert len(verdict(WINGS, outcome)) == 2


def _changed(left: Any, right: Any, path: str = "") -> set[str]:
    """Key paths at which two nested JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return {found for key in keys for found in _changed(left.get(key), right.get(key), f"{path}.{key}".strip("."))}
    return set() if left == right else {path}


def test_each_arm_departs_from_its_reference_in_what_it_is_about(tmp_path: Path) -> None:
    plan = WingsPlan(output=tmp_path / "run")
    stages = {arm.name: plan.recipe_of(0, arm).stages[0].model_dump(mode="json") for arm in ARMS}
    learners = {"train.wings.visual", "train.wings.textual", "train.wings.router"}
    expected = {
        ("full-10x", "full"): {"train.llm", "train.projector"},
        ("full-replay", "full"): {"data.text_replay"},
        ("lora", "full"): {"method", "lora", "train.llm", "train.lora"},
        ("prefix", "full"): {"method", "train.llm", "train.prefix"},
        ("prefix-10x", "prefix"): {"train.prefix"},
        ("projector", "full"): {"method", "train.llm"},
        ("wings-visual", "wings"): {"wings.learners", "train.wings.textual", "train.wings.router"},
        ("wings-textual", "wings"): {"wings.learners", "train.wings.visual", "train.wings.router"},
        ("wings-constant", "wings"): {"wings.router"},
        ("wings-attention", "wings"): {"wings.router"},
        ("wings-paper-gate", "wings"): {"wings.gate"},
        ("wings-plain", "wings"): {"wings.normalize"},
        ("wings-llm", "wings"): {"train.llm"},
        ("wings-rank-8", "wings"): {"wings.rank"},
        ("wings-rank-32", "wings"): {"wings.rank"},
        ("wings-rank-128", "wings"): {"wings.rank"},
        ("wings-llm-equal", "wings"): {"train.llm"},
        ("wings-rate-third", "wings"): learners,
        ("wings-rate-3x", "wings"): learners,
        ("wings-long", "wings"): {"steps"},
    }
    found = {pair: _changed(stages[pair[0]], stages[pair[1]]) for pair in expected}
    assert found == expected
    assert {name for pair in expected for name in pair} == set(stages)


def test_questions_are_about_arms_there_are() -> None:
    names = {arm.name for arm in ARMS}
    assert {name for question in QUESTIONS for name in (question.arm, question.against)} <= names
    assert {arm.name for arm in ARMS if arm.name.startswith("wings-")} <= {question.arm for question in QUESTIONS}


def test_contrasts_are_paired_by_item(finished: tuple[WingsPlan, Outcome]) -> None:
    plan, outcome = finished
    runs = {name: RunResult.load(jobs.answers_path(plan.own, 0, name)) for name in ("full", "wings")}
    for task in ("text_bare", "visual"):
        found = contrasting.compare(outcome.methods["full"], outcome.methods["wings"], task)
        expected = across_seeds([compare(runs["full"], runs["wings"]).tasks[task]]).overall
        assert found == expected
        scores = [np.mean([item.score for item in runs[name].tasks[task].items]) for name in ("full", "wings")]
        assert found.difference.mean.value == pytest.approx(scores[1] - scores[0])
    assert [c.question.arm for c in contrasts(WINGS, outcome)] == ["wings", "wings-visual"]


def test_markdown_tables_hold_every_arm_and_question(finished: tuple[WingsPlan, Outcome]) -> None:
    _, outcome = finished
    lines = markdown(WINGS, outcome).splitlines()
    assert {line.count("|") for line in lines if "%" in line} == {6}
    assert sum(line.startswith("| Wings (rank 64) |") for line in lines) == 1
    assert sum("instead of both" in line for line in lines) == 1


def test_the_committed_record_gives_the_tables_of_the_page() -> None:
    outcome = Outcome.load(ROOT / "benchmarks" / "results" / "wings.json")
    page = (ROOT / "docs" / "methods" / "wings.md").read_text()
    rows = [line for line in markdown(WINGS, outcome).splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert not [row for row in rows if row not in page and "kept" not in row]
    assert render(report(WINGS, outcome))


def test_a_quickstart_is_reused(finished: tuple[WingsPlan, Outcome], quickstart: Path, tmp_path: Path) -> None:
    plan, outcome = finished
    again = replace(plan, output=tmp_path / "study", reuse=quickstart, arms=("full", "wings"))
    found = run(again, command="again", workers=0, quiet=True)
    assert {name: found.methods[name] for name in ("full", "wings")} == {
        name: outcome.methods[name] for name in ("full", "wings")
    }
    assert not list((tmp_path / "study").glob("seed-*"))  # nothing was left to do
    assert again.recipe_of(0, next(arm for arm in ARMS if arm.name == "wings-visual")).host.path == str(
        quickstart / "seed-0" / "align" / "final"
    )


def test_a_quickstart_of_other_settings_is_refused(quickstart: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quickstart has items 4, this study 5"):
        WingsPlan(output=tmp_path / "study", reuse=quickstart, steps=0.004, items=5)
    with pytest.raises(UsageError, match="quickstart has steps"):
        WingsPlan(output=tmp_path / "study", reuse=quickstart, items=4)
    mark = quickstart / "plan.json"
    write_json(mark, {**json.loads(mark.read_text()), "fledgling": "of an earlier alula"})
    with pytest.raises(UsageError, match="fledgling of an earlier alula"):
        WingsPlan(output=tmp_path / "study", reuse=quickstart, items=4, steps=0.004)


def test_unknown_arms_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no arm 'wing'"):
        WingsPlan(output=tmp_path, arms=("wing",))


def test_an_output_that_cannot_be_is_wrong_usage(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["studies", "wings", "--output", str(tmp_path / "file" / "there")])
    with pytest.raises(SystemExit) as stop:
        run_command_line(commands)
    assert stop.value.code == 2
    assert "remedy" in capsys.readouterr().err
