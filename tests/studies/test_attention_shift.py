"""The attention-shift study end to end on a few steps, its resume, and its verdict on populations of known truth."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alula
from alula.cli.app import run as run_command_line
from alula.data import Collator
from alula.errors import UsageError
from alula.evaluation import evaluate
from alula.probes import AttentionShift
from alula.reports import render
from alula_fledgling.tasks import native_tasks
from studies.__main__ import commands
from studies.attention_shift import ShiftPlan, ShiftRecord, attention_shift, figures, report, verdict
from studies.attention_shift.measure import PRIMARY
from studies.attention_shift.record import Measurement, RunRecord, associations
from studies.passes import held_out, look
from studies.population import measurement


@pytest.fixture
def finished(population: tuple[ShiftPlan, ShiftRecord]) -> tuple[ShiftPlan, ShiftRecord]:
    return population


def test_every_run_is_measured_at_every_milestone(finished: tuple[ShiftPlan, ShiftRecord]) -> None:
    plan, record = finished
    assert [(run.text, run.rate) for run in record.runs] == [(0.0, 3e-2), (0.3, 3e-2), (0.5, 3e-2)]
    assert all(tuple(run.models) == plan.milestones for run in record.runs)
    assert record.whole.models == 6
    assert record.whole.pearson.permutations == 6
    assert ShiftRecord.load(plan.output / "outcome.json") == record


def test_text_share_and_rate_reach_the_training(finished: tuple[ShiftPlan, ShiftRecord]) -> None:
    plan, _ = finished
    bare, mixed = plan.recipe_of(plan.runs[0]).stages[0], plan.recipe_of(plan.runs[2]).stages[0]
    assert bare.data.text_replay is None
    assert mixed.data.text_replay.ratio == 0.5
    assert mixed.learning_rates == {"llm": 3e-2, "projector": 3e-2}
    assert mixed.steps == plan.milestones[-1]
    assert mixed.data.sources == bare.data.sources


def test_the_last_measurement_is_of_the_model_that_was_saved(finished: tuple[ShiftPlan, ShiftRecord]) -> None:
    """Measuring inside the training must see what a fresh load of its output sees."""
    plan, record = finished
    last = record.runs[-1].models[plan.milestones[-1]]
    model, processor = alula.load_model(plan.own.run_directory(0, plan.runs[-1].name) / "final")
    probe = AttentionShift()
    with probe.on(model):
        look(model, Collator(processor), held_out("dialogue", plan.samples, plan.task_seed, ["TV"]))
    result = probe.result()
    assert last.shift[PRIMARY] == pytest.approx(result.shift["main"].value, abs=1e-5)
    assert last.curves["after"] == pytest.approx([point.value for point in result.curves["main"]["after"]], abs=1e-5)
    answers = evaluate(model, processor, native_tasks(["text_bare"], n=plan.items), batch_size=64)
    assert last.accuracy["text_bare"] == answers.tasks["text_bare"].accuracy


def test_measuring_does_not_change_the_training(finished: tuple[ShiftPlan, ShiftRecord], tmp_path: Path) -> None:
    from alula.training import train

    plan, _ = finished
    recipe = plan.recipe_of(plan.runs[1]).model_copy(update={"output_dir": str(tmp_path / "plain")})
    train(recipe, quiet=True)

    def losses(folder: Path) -> list[float]:
        return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]

    assert losses(tmp_path / "plain") == losses(plan.own.run_directory(0, plan.runs[1].name))


def test_a_second_call_measures_nothing_again(finished: tuple[ShiftPlan, ShiftRecord]) -> None:
    plan, record = finished
    files = sorted(plan.output.rglob("step-*.json"))
    before = [path.stat().st_mtime_ns for path in files]
    again = attention_shift(plan, command="again", workers=0, quiet=True)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (again.runs, again.associations) == (record.runs, record.associations)
    assert measurement(plan.measurements(plan.runs[0]), plan.milestones[0]) in files
    with pytest.raises(UsageError, match="other settings"):
        attention_shift(replace(plan, items=3), command="")


def test_the_report_holds_the_verdict_and_needs_nothing_else(finished: tuple[ShiftPlan, ShiftRecord]) -> None:
    _, record = finished
    page = render(report(record))
    assert "http://" not in page.replace("http://www.w3.org", "")
    for sentence in verdict(record):
        assert sentence.replace("'", "&#39;").replace("<", "&lt;") in page
    assert {"shift-text-bare", "curves-base"} <= set(figures(record))


def test_the_command_line(finished: tuple[ShiftPlan, ShiftRecord], monkeypatch: Any, capsys: Any) -> None:
    plan, record = finished
    arguments = ["--output", plan.output, "--texts", "0,0.3,0.5", "--rates", "3e-2", "--items", 2, "--samples", 3]
    arguments += ["--steps", 0.009, "--workers", 0, "--json"]
    monkeypatch.setattr(sys, "argv", ["studies", "attention-shift", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command_line(commands)
    assert stop.value.code in (0, None)
    shown = ShiftRecord.model_validate_json(capsys.readouterr().out)
    assert shown.associations == record.associations
    assert (plan.output / "figures" / "shift-text-bare.svg").read_text().startswith("<svg xmlns=")


def made_up(slope: float, seed: int = 0) -> list[RunRecord]:
    """Twelve made-up trainings whose text accuracy falls (or rises) with their shift."""
    rng = np.random.default_rng(seed)
    runs = []
    for text in (0.0, 0.1, 0.2, 0.5):
        for rate in (1e-3, 3e-3, 1e-2):
            own = rng.normal()
            models = {}
            for step in (40, 80, 160, 240):
                shift = 1 + 0.2 * (own + 0.3 * rng.normal())
                accuracy = float(np.clip(0.6 + slope * (0.2 * own) + 0.05 * rng.normal(), 0, 1))
                scores = {"text_bare": accuracy, "text_after_image": accuracy, "visual": 0.5}
                models[step] = Measurement(accuracy=scores, shift={PRIMARY: shift}, curves={})
            runs.append(RunRecord(seed=0, text=text, rate=rate, models=models))
    return runs


@pytest.mark.parametrize(
    ("slope", "words"), [(-1.0, "holds here"), (1.0, "turned around here"), (0.0, "is not shown here")]
)
def test_the_verdict_follows_the_figures(finished: tuple[ShiftPlan, ShiftRecord], slope: float, words: str) -> None:
    _, record = finished
    found, skipped = associations(made_up(slope))
    assert not skipped
    said = verdict(record.model_copy(update={"runs": made_up(slope), "associations": found}))
    assert words in said[0]
    assert "48 models of 12 trainings" in said[0]


def test_runs_without_a_defined_shift_are_left_out_and_named() -> None:
    runs = made_up(-1.0)
    runs[3].models[80].shift[PRIMARY] = None
    found, skipped = associations(runs)
    assert skipped == ["text 0.1, rate 0.001, seed 0"]
    assert found[PRIMARY]["text_bare"][0].runs == 11


def test_too_few_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="three"):
        ShiftPlan(output=tmp_path, texts=(0.0,), rates=(1e-3, 1e-2))
    with pytest.raises(UsageError, match="no quickstart to reuse"):
        ShiftPlan(output=tmp_path, reuse=tmp_path)
