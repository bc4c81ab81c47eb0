"""The study of browsing: what its arms share, how models are asked, and what its figures are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import alula
from alula.grafts import BrowseConfig
from alula.reports import render
from alula_fledgling.weights import digest
from studies.browse import BrowsePlan, BrowseRecord, markdown, report, table, verdict
from studies.browse.measure import asked, captioned, moved, read_off
from studies.browse.plan import ARMS, TOLD
from studies.browse.record import Asked
from studies.plan import StudyPlan
from tests.grafts.common import wake


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BrowsePlan:
    lent = tmp_path_factory.mktemp("lent")
    (lent / "plan.json").write_text(json.dumps({"fledgling": digest(), "steps": 1.0, "methods": ["full"]}))
    place = StudyPlan(lent).own.run_directory(0, "full") / "final"
    place.parent.mkdir(parents=True)
    alula.save_host(alula.build_host("fledgling", "fledgling"), place)
    return BrowsePlan(tmp_path_factory.mktemp("browse") / "study", reuse=lent, items=4, tuning_steps=10)


def test_arms_are_trained_alike_but_for_the_condition(plan: BrowsePlan) -> None:
    recipes = {arm: plan.tuning(0, arm) for arm in ARMS}
    plain, browse = (recipes[arm].stages[-1] for arm in ("plain", "browse"))
    assert (plain.method, browse.method) == ("full", "browse")
    assert browse.learning_rates == {**plain.learning_rates, "browse.condition": 1e-3}
    same = ("data", "batch_size", "steps", "schedule", "weight_decay", "clip")
    assert [getattr(plain, name) for name in same] == [getattr(browse, name) for name in same]
    assert browse.settings.drop == ()
    staged = recipes["staged"].stages
    assert [stage.settings.drop for stage in staged] == [(), ("last", "blank")]
    assert sum(stage.steps or 0 for stage in staged) == plain.steps == 10
    assert {recipes[arm].seed for arm in ARMS} == {0}


def test_a_model_is_asked_with_its_own_condition_none_and_anothers(plan: BrowsePlan, tmp_path: Path) -> None:
    base = plan.model(0)
    bare = asked(plan, str(base))
    assert [*bare["right"]["pictures"]] == ["own"]
    model, _ = alula.load_model(str(base))
    graft = wake(alula.attach(model, BrowseConfig()))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.mul_(0.01)
    alula.save_adapter(model, tmp_path / "adapter", base=base)
    found = asked(plan, str(tmp_path / "adapter"))
    assert [*found["right"]["pictures"]] == [*TOLD]
    assert found["families"] == bare["families"]
    assert 0 < moved(plan, str(tmp_path / "adapter")) < 10
    # told nothing, it is the host
    assert {task: told["none"] for task, told in found["right"].items()} == {
        task: told["own"] for task, told in bare["right"].items()
    }


def test_controls_of_what_is_read_and_told(plan: BrowsePlan, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (200,), generator=rng)
    noise = torch.randn(200, 8, generator=rng, dtype=torch.float64)
    said = torch.nn.functional.one_hot(kinds).double() @ torch.randn(4, 8, generator=rng, dtype=torch.float64)
    assert read_off(5 * said + noise, kinds) > 0.9
    assert read_off(noise, kinds) < 0.5
    base = plan.model(0)
    model, _ = alula.load_model(str(base))
    wake(alula.attach(model, BrowseConfig()))
    alula.save_adapter(model, tmp_path / "adapter", base=base)
    costs = captioned(plan, str(tmp_path / "adapter"))
    assert [*costs] == [*TOLD]
    assert {len(each) for each in costs.values()} == {4}
    assert costs["own"] != costs["none"] != costs["others"] != costs["own"]


def test_hosts_with_queries_are_made_and_taught_before(plan: BrowsePlan) -> None:
    made = BrowsePlan(plan.output, queries=4, tuning_steps=10)
    align, taught = made.hosting(0).stages
    assert (align.method, taught.method, align.steps) == ("projector", "full", 200)
    assert made.hosting(0).host.connector_options == {
        "num_queries": 4,
        "width": 96,
        "layers": 2,
        "heads": 4,
        "feedforward": 192,
    }
    assert {str(made.tuning(0, arm).host.path) for arm in ARMS} == {str(made.model(0))}
    (job,) = made.training_jobs()
    assert made.after_training(0) == (job.title,)
    assert "queries" not in plan.facts


def of(right: float, *, told: bool) -> Asked:
    """Twenty questions of a family, so many of them answered right, and fewer where another condition is told."""
    names = [f"{family}-{place}" for family in ("change", "which") for place in range(20)]
    families = {name: f"pictures: {name.partition('-')[0]}" for name in names} | {"one": "visual: colour"}
    marks: dict[str, Any] = {}
    for way in TOLD if told else TOLD[:1]:
        share = right if way == "own" else right / 2
        marks[way] = {name: int(name.partition("-")[2]) < 20 * share for name in names}
    one = {way: {"one": True} for way in marks}
    return Asked(families=families, right={"pictures": marks, "visual": one}, moved=0.02 if told else None)


def test_figures_are_question_by_question(tmp_path: Path) -> None:
    seeds = {
        seed: {"plain": of(0.4, told=False), "browse": of(0.6, told=True), "staged": of(0.4, told=True)}
        for seed in range(3)
    }
    record = BrowseRecord(
        command="python -m studies browse",
        created="now",
        environment={"torch": "2"},
        seconds=60.0,
        settings={"training": 60, "items": 40},
        seeds=seeds,
    )
    assert record.share("browse", "own", "pictures").value == pytest.approx(0.6)
    assert record.gain("browse", "own", "pictures: which").value == pytest.approx(0.2)
    assert record.gain("staged", "own", "pictures").value == 0
    fell = record.gain("browse", "others", "pictures", over=("browse", "own"))
    assert fell.value == pytest.approx(-0.3)
    record.save(tmp_path / "outcome.json")
    assert BrowseRecord.load(tmp_path / "outcome.json") == record
    first, second, _ = verdict(record)
    assert "browsing answers more (+20.0 points" in first.replace("\N{NO-BREAK SPACE}", " ")
    assert "in two stages shows no difference" in first
    assert "-30.0 points" in second.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
    assert "2.0 % and 2.0 % of their size" in second.replace("\N{NO-BREAK SPACE}", " ")
    assert table(record).row_count == 4
    assert markdown(record).count("\n**") == 2
    assert "Does reading everything once help to look?" in render(report(record))
