"""The early-warning study: read off a real, tiny population, and its judgements on populations of known truth."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from alula.cli.app import run as run_command_line
from alula.errors import UsageError
from alula.reports import render
from alula.stats import Resampling
from alula.training.layout import RunDirectory
from alula.training.metrics import read_rows
from studies.__main__ import commands
from studies.attention_shift import ShiftPlan, ShiftRecord
from studies.early_warning import WarningPlan, WarningRecord, early_warning, figures, report, table, verdict
from studies.early_warning.record import LOOKS, MAIN, PROBES, SIGNALS, Watched, judge_all, judge_signal, lead

HOW = Resampling(resamples=300)


@pytest.fixture(scope="module")
def finished(
    population: tuple[ShiftPlan, ShiftRecord], tmp_path_factory: pytest.TempPathFactory
) -> tuple[WarningPlan, WarningRecord]:
    plan = WarningPlan(tmp_path_factory.mktemp("warning") / "study", population[0])
    return plan, early_warning(plan, command="python -m studies early-warning", workers=0, quiet=True)


def test_signals_are_what_the_trainings_wrote_down(finished: tuple[WarningPlan, WarningRecord]) -> None:
    plan, record = finished
    assert WarningRecord.load(plan.output / "outcome.json") == record
    for planned, run in zip(plan.population.runs, record.runs, strict=True):
        recipe = plan.population.recipe_of(planned)
        directory = RunDirectory(Path(recipe.output_dir))
        rows = [row for row in read_rows(directory.metrics) if "retention" in row]
        start = json.loads(directory.stage(0, recipe.stages[0]).retention.read_text())
        assert run.steps == [row["step"] for row in rows] == list(range(1, plan.population.milestones[-1] + 1))
        assert run.lost == [1 - row["retention"]["value"] for row in rows]
        moved = [abs(row["probes"]["alignment"] - start["probes"]["alignment"]) for row in rows]
        assert run.signals["alignment"] == pytest.approx(moved)
        assert run.signals["text_loss"][0] == rows[0]["retention"]["loss"] - rows[0]["retention"]["loss_before"]
        assert run.signals["rate"] == [math.log10(3e-2)] * len(rows)
        assert 0 < run.retention_seconds < run.seconds
    assert set(record.judged) == set(SIGNALS)


def test_the_committed_record_is_read() -> None:
    """It holds the seconds under an earlier version's name."""
    record = WarningRecord.load(Path(__file__).parents[2] / "benchmarks/results/early-warning.json")
    assert all(0 < run.retention_seconds < run.seconds for run in record.runs)


def test_the_command_takes_a_population_that_is_there(
    finished: tuple[WarningPlan, WarningRecord], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    plan, record = finished
    arguments = ["--population", plan.population.output, "--output", tmp_path / "again", "--workers", 0, "--json"]
    monkeypatch.setattr(sys, "argv", ["studies", "early-warning", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command_line(commands)
    assert not stop.value.code
    shown = WarningRecord.model_validate_json(capsys.readouterr().out)
    assert (shown.runs, shown.judged, shown.leads) == (record.runs, record.judged, record.leads)
    assert (tmp_path / "again" / "figures" / "text.svg").is_file()
    with pytest.raises(UsageError, match="no population of watched trainings"):
        WarningPlan.over(tmp_path / "x", tmp_path / "again", seeds=(0,))


def made_up(strength: float, runs: int = 12, seed: int = 0) -> list[Watched]:
    """Made-up trainings: half of them lose their text from look 4 on; probes rise with what will be lost."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(runs):
        fails = number % 2 == 0
        loss = rng.uniform(0.2, 0.6) if fails else rng.uniform(0.0, 0.05)
        lost = [0.0, 0.0, 0.02, *np.linspace(0.2 if fails else 0.0, loss, 5)]
        signals: dict[str, list[float | None]] = {
            name: list(strength * loss * np.arange(1, 9) / 8 + rng.normal(size=8) * 0.01) for name in PROBES
        }
        signals |= {"text_lost": list(lost), "text_loss": [value * 2 for value in lost]}
        signals["rate"] = [math.log10((1e-3, 1e-2)[number % 4 // 2])] * 8
        made.append(
            Watched(
                rate=(1e-3, 1e-2)[number % 4 // 2], text=number / 100, seed=0, base=0.9, final=0.9 * (1 - loss),
                steps=list(range(10, 90, 10)), lost=lost, signals=signals, seconds=10, retention_seconds=2,
            )
        )  # fmt: skip
    return made


def recorded(runs: list[Watched], budget: float = 0.9) -> WarningRecord:
    judged, areas, leads = judge_all(runs, budget, HOW)
    about: dict[str, Any] = {"command": "c", "created": "now", "environment": {}, "settings": {}, "budget": budget}
    return WarningRecord(**about, runs=runs, judged=judged, areas=areas, leads=leads)


def test_a_probe_that_knows_is_found_and_one_that_does_not_is_not() -> None:
    knows, guesses = recorded(made_up(1.0)), recorded(made_up(0.0))
    assert "The probe warns" in verdict(knows)[0]
    assert "It is not shown here" in verdict(guesses)[0]
    assert knows.main is not None
    assert knows.main.ranking.auc.value > 0.95
    assert "6 of 12 trainings ended below 90" in " ".join(verdict(knows))
    assert "above text itself" in " ".join(verdict(knows))  # text has lost nothing yet at that look


def test_judgements_against_scipy_and_scikit_learn() -> None:
    runs = made_up(0.05)
    signal, look = MAIN
    found = judge_signal(runs, signal, look, 0.9, HOW)
    x = [run.signals[signal][look - 1] for run in runs]
    ends = [1 - run.final / run.base for run in runs]
    assert found.correlation.pearson.value == pytest.approx(stats.pearsonr(x, ends).statistic)
    assert found.correlation.spearman.value == pytest.approx(stats.spearmanr(x, ends).statistic)
    assert found.ranking.auc.value == pytest.approx(roc_auc_score([end > 0.1 for end in ends], x))
    text = [run.signals["text_lost"][look - 1] for run in runs]
    gain = found.ranking.auc.value - roc_auc_score([end > 0.1 for end in ends], text)
    assert found.beyond_text.value == pytest.approx(gain)
    assert found.step == 20
    assert [one.look for one in recorded(runs).judged[signal]] == list(LOOKS)


def test_leads_against_a_loop() -> None:
    runs = made_up(0.3, seed=3)
    for signal in ("alignment", "text_loss"):
        early, by, steps, false = [], [], [], []
        for run in runs:
            held = [other for other in runs if other is not run and other.final / other.base >= 0.9]
            threshold = max(value for other in held for value in other.signals[signal])
            alarms = [step for step, value in zip(run.steps, run.signals[signal], strict=True) if value > threshold]
            breaks = [step for step, lost in zip(run.steps, run.lost, strict=True) if 1 - lost < 0.9]
            if run.final / run.base >= 0.9:
                false.append(bool(alarms))
            elif breaks:
                early.append(bool(alarms) and alarms[0] < breaks[0])
                by.append(bool(alarms) and alarms[0] <= breaks[0])
                if by[-1]:
                    steps.append(breaks[0] - alarms[0])
        found = lead(runs, signal, 0.9)
        assert (found.failed, found.held) == (len(early), len(false)) == (6, 6)
        assert found.early.value == pytest.approx(np.mean(early))
        assert found.warned.value == pytest.approx(np.mean(by))
        assert found.false.value == pytest.approx(np.mean(false))
        assert (found.steps.value if steps else None) == (pytest.approx(np.mean(steps)) if steps else found.steps)


def test_a_probe_that_is_not_defined_somewhere_costs_its_run_only() -> None:
    runs = made_up(1.0)
    runs[3].signals["alignment"][1] = None
    found = judge_signal(runs, "alignment", 2, 0.9, HOW)
    assert (found.runs, judge_signal(runs, "alignment", 1, 0.9, HOW).runs) == (11, 12)
    assert render(report(recorded(runs)))


@pytest.mark.parametrize("budget", [0.9, 0.01])
def test_the_report_holds_the_verdict_and_needs_nothing_else(budget: float) -> None:
    record = recorded(made_up(1.0), budget)
    page = render(report(record))
    assert "http://" not in page.replace("http://www.w3.org", "")
    for sentence in verdict(record):
        assert sentence.replace("'", "&#39;").replace("<", "&lt;") in page
    assert {"early-late", "text"} <= set(figures(record))
    assert table(record).row_count == len(SIGNALS)
    if budget == 0.01:
        assert "nothing to tell apart" in " ".join(verdict(record))
