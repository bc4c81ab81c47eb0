"""The main job end to end on a few steps and questions: real trainings, real answers, resumable, one record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import alula
from alula.errors import UsageError
from alula.evaluation import RunResult
from alula.reports import Outcome, experiment_report
from alula_fledgling.quickstart import METHODS, Plan, jobs, quickstart

NAMES = ("full", "lora", "wings", "experts")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shallow: None) -> tuple[Plan, Outcome]:
    plan = Plan(output=tmp_path_factory.mktemp("quickstart") / "run", methods=NAMES, items=3, steps=0.003)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)  # one thread: those of two wait for one another on cores that are busy
        return plan, quickstart(plan, command="alula quickstart", workers=1, quiet=True)


def test_the_record_holds_every_method_and_task(finished: tuple[Plan, Outcome]) -> None:
    plan, outcome = finished
    assert tuple(outcome.methods) == NAMES
    assert {"text_bare", "text_after_image", "visual", "visual_unseen", "dialogue"} <= set(outcome.tasks)
    assert Outcome.load(plan.output / "outcome.json") == outcome
    for name in NAMES:
        seed = outcome.methods[name].seeds[0]
        assert seed.trainable_parameters > 0
        assert seed.curve
    page = experiment_report(outcome)
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_all_methods_share_the_base_and_one_learning_rate(finished: tuple[Plan, Outcome]) -> None:
    plan, _ = finished
    rates = {name: set(plan.recipe(0, name).stages[-1].learning_rates.values()) for name in (*NAMES, "full-10x")}
    shared = rates["full"]
    assert len(shared) == 1
    assert rates["lora"] == rates["wings"] == rates["experts"] == shared
    assert rates["full-10x"] == {10 * next(iter(shared))}
    data = [plan.recipe(0, method.name).stages[-1].data for method in METHODS]
    steps = {(stage.steps, stage.batch_size) for m in METHODS for stage in plan.recipe(0, m.name).stages}
    assert all(one == data[0] for one in data)
    assert len(steps) == 1


@pytest.mark.parametrize("method", ["wings", "experts"])
def test_grafts_answer_bare_text_exactly_as_the_base(finished: tuple[Plan, Outcome], method: str) -> None:
    plan, _ = finished
    base, graft = (RunResult.load(jobs.answers_path(plan, 0, name)) for name in ("base", method))
    assert [i.answer for i in base.tasks["text_bare"].items] == [i.answer for i in graft.tasks["text_bare"].items]
    host, tuned = alula.load_model(plan.aligned(0)), alula.load_model(plan.run_directory(0, method) / "final")
    ids = host.processor.tokenizer("What is 7 plus 5?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(host.model(**ids).logits, tuned.model(**ids).logits)


def test_a_second_call_does_nothing_again(finished: tuple[Plan, Outcome]) -> None:
    plan, outcome = finished
    before = {path: path.stat().st_mtime_ns for path in plan.output.rglob("*-answers.json")}
    again = quickstart(plan, command="alula quickstart", workers=0, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in plan.output.rglob("*-answers.json")} == before
    assert again.methods == outcome.methods


def test_other_settings_need_another_directory(finished: tuple[Plan, Outcome], tmp_path: Path) -> None:
    plan, _ = finished
    with pytest.raises(UsageError, match="holds a quickstart with other settings"):
        quickstart(replace(plan, items=7), command="")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty and holds no quickstart"):
        quickstart(Plan(output=tmp_path), command="")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no method 'wing'") as caught:
        quickstart(Plan(output=tmp_path / "run", methods=("wing",)), command="")
    assert "wings" in str(caught.value.remedy)
    assert not (tmp_path / "run").exists()


def test_sessions_add_up(finished: tuple[Plan, Outcome]) -> None:
    plan, _ = finished
    assert len(json.loads((plan.output / "sessions.json").read_text())) >= 1
