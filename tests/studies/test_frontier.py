"""The frontier: arms that can be compared, divergence from the base, and an aim that is judged as it was set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alula.data import Collator
from alula.evaluation.results import Labels
from alula.files import write_json
from alula.hosts.stops import stop_ids
from alula.loading import load_model
from alula.reports import render
from alula.training.starts import begin
from studies.frontier import ARMS, DISTILLED, FRONTIER, FrontierOutcome, FrontierPlan, cost, frontier
from studies.frontier.aim import judge, relative_time
from studies.frontier.divergence import divergences
from studies.frontier.report import aims, figures, markdown, report, table, verdict
from studies.passes import held_out

ROOT = Path(__file__).parents[2]
TRAINED = ("full", "lora-mlp", "wings-best", "experts-mlp")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrontierPlan, FrontierOutcome]:
    plan = FrontierPlan(tmp_path_factory.mktemp("frontier") / "study", items=8, steps=0.006, arms=TRAINED, rounds=0)
    return plan, frontier(plan, command="python -m studies frontier", workers=0, quiet=True)


def test_the_record_holds_every_arm(finished: tuple[FrontierPlan, FrontierOutcome]) -> None:
    plan, outcome = finished
    assert tuple(outcome.methods) == TRAINED
    assert FrontierOutcome.load(plan.output / "outcome.json") == outcome
    assert set(outcome.divergence) == set(TRAINED)
    assert all(found[0] > 0 for found in outcome.divergence.values())
    assert set(outcome.later) == {*TRAINED, "base"}
    assert all(0 <= share[0] <= 1 for share in outcome.later.values())
    assert table(outcome).row_count == len(TRAINED)
    assert {"frontier", "experts-text-after-image", "wings-dialogue-text"} <= set(figures(outcome))
    page = render(report(outcome))
    assert "The aim" in page
    assert "Text turns answered right" in page
    rows = [line for line in markdown(outcome).splitlines() if line.startswith("| experts (seen) on the MLP |")]
    assert [row.count("|") for row in rows] == [11, 6, 10]
    assert any("on the MLP against LoRA on the MLP" in sentence for sentence in verdict(outcome))


def test_arms_whose_parameters_are_called_equal_train_as_many(finished: tuple[FrontierPlan, FrontierOutcome]) -> None:
    plan, outcome = finished

    def size(name: str) -> int:
        """Of an arm as it is put on the host, trained or not."""
        stage = plan.recipe_of(0, next(arm for arm in ARMS if arm.name == name)).stages[-1]
        tuned = begin(stage, base=str(plan.aligned(0)), previous=None)
        return sum(parameter.numel() for named in tuned.parts.values() for _, parameter in named)

    trained = {name: method.seeds[0].trainable_parameters for name, method in outcome.methods.items()}
    assert size("experts-both") == size("lora") == size("experts-seen")
    assert trained["experts-mlp"] == trained["lora-mlp"]


def test_experts_are_scaled_as_lora_is(tmp_path: Path) -> None:
    plan = FrontierPlan(tmp_path)
    stages = {arm.name: plan.recipe_of(0, arm).stages for arm in plan.chosen}
    assert stages["lora"][0].settings.alpha is None  # twice the rank, in recipes
    assert {stages[name][0].settings.scale for name in ("experts-seen", "experts-image", "experts-both")} == {2}
    rates = {rate for found in stages.values() for rate in found[-1].learning_rates.values()}
    assert rates == {2e-3, 2e-4}
    samples = {name: sum((stage.steps or 0) * stage.batch_size for stage in found) for name, found in stages.items()}
    assert {samples[name] for name in samples if name != "wings-best"} == {9600}
    assert samples["wings-best"] == 2 * 9600


def test_the_experts_of_the_quickstart_are_an_arm(tmp_path: Path) -> None:
    plan = FrontierPlan(tmp_path, arms=("experts-turn-wide",))
    assert plan.own.recipe(0, "experts").stages == plan.recipe_of(0, plan.chosen[0]).stages


def test_distilled_arms_differ_in_one_key(tmp_path: Path) -> None:
    plan = FrontierPlan(tmp_path)
    arms = {arm.name: arm for arm in plan.chosen}
    distilled = [arm for arm in plan.chosen if arm.group == "distill"]
    assert {arm.name for arm in distilled} == {arm.name for arm in DISTILLED}
    for arm in distilled:
        before, after = (plan.recipe_of(0, each).stages for each in (arms[arm.name.removesuffix("-distill")], arm))
        held = after[-1].distill
        assert held is not None
        # one base says the same for all of them
        assert held.cache == str(tmp_path / "distillation")
        assert {key: getattr(held, key) for key in ("share", "weight")} == {"share": 0.25, "weight": 1}
        assert [each.model_copy(update={"distill": None}) for each in after] == list(before)


def test_questions_are_about_arms_there_are() -> None:
    names = FRONTIER.names
    assert len(names) == len(set(names)) == len(ARMS)
    assert {name for question in FRONTIER.questions for name in (question.arm, question.against)} <= set(names)
    of_interest = {arm.name for arm in ARMS if arm.group in ("experts", "distill")}
    assert of_interest <= {question.arm for question in FRONTIER.questions}


def _by_hand(base: Any, tuned: Any, processor: Any, samples: Sequence[Any]) -> list[float]:
    """KL sample by sample, token by token."""
    collator = Collator(processor, stops=stop_ids(base, processor.tokenizer))
    found = []
    for sample in samples:
        batch = dict(collator([sample]))
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            before, after = (model(**batch).logits[0] for model in (base, tuned))
        values = []
        for place in range(1, len(labels)):
            if labels[place] != -100:
                p, q = (torch.softmax(logits[place - 1].double(), 0) for logits in (before, after))
                values.append(sum(float(p[v] * torch.log(p[v] / q[v])) for v in range(len(p))))
        found.append(sum(values) / len(values))
    return found


def test_divergence_is_that_of_a_loop_over_tokens(finished: tuple[FrontierPlan, FrontierOutcome]) -> None:
    plan, outcome = finished
    base, processor = load_model(plan.aligned(0))
    tuned = load_model(plan.trained(0, "experts-mlp")).model
    samples = held_out("visual", 3, 0)
    found = divergences(base, tuned, processor, samples)
    assert found == pytest.approx(_by_hand(base, tuned, processor, samples), rel=1e-4)
    assert divergences(base, base, processor, samples) == [0, 0, 0]
    more = divergences(base, tuned, processor, held_out("visual", plan.items, 0))
    assert outcome.divergence["experts-mlp"][0] == pytest.approx(sum(more) / plan.items, rel=1e-6)


def _answering(outcome: FrontierOutcome, arm: str, task: str, tuned: list[float]) -> FrontierOutcome:
    """The record with other answers of an arm to a task that the base answers right throughout."""
    found = outcome.model_copy(deep=True)
    result = found.methods[arm].seeds[0].tasks[task]
    labels = {"family": Labels.of(["any"] * len(tuned))}
    columns = {"base": [1.0] * len(tuned), "tuned": tuned, "cluster": list(range(len(tuned))), "labels": labels}
    found.methods[arm].seeds[0].tasks[task] = result.model_copy(
        update={"columns": result.columns.model_copy(update=columns)}
    )
    return found


@pytest.mark.parametrize(
    ("wrong", "asked", "met", "surely"),
    [(0, 400, True, True), (0, 200, True, False), (2, 200, True, False), (4, 200, False, False)],
    ids=["all", "all of too few", "99 %", "98 %"],
)
def test_the_aim_behind_an_image(
    finished: tuple[FrontierPlan, FrontierOutcome], wrong: int, asked: int, met: bool, surely: bool
) -> None:
    """Of 200 of which none was lost, up to 1.8 % may be."""
    answers = [0.0] * wrong + [1.0] * (asked - wrong)
    outcome = _answering(finished[1], "experts-mlp", "text_after_image", answers)
    judged = next(each for each in judge(outcome) if each.arm == "experts-mlp")
    assert (judged.meets["behind"], judged.surely["behind"]) == (met, surely)


@pytest.mark.parametrize(("wrong", "met"), [(40, True), (42, True), (43, False)])
def test_the_aim_of_sight_is_full_tuning_less_a_point(
    finished: tuple[FrontierPlan, FrontierOutcome], wrong: int, met: bool
) -> None:
    outcome = _answering(finished[1], "full", "visual", [0.0] * 40 + [1.0] * 160)
    outcome = _answering(outcome, "experts-mlp", "visual", [0.0] * wrong + [1.0] * (200 - wrong))
    outcome = outcome.model_copy(update={"methods": {name: outcome.methods[name] for name in ("full", "experts-mlp")}})
    judged = next(each for each in judge(outcome) if each.arm == "experts-mlp")
    assert judged.meets["sight"] is met
    assert judged.sight is not None
    assert judged.sight.value == pytest.approx((40 - wrong) / 200)


def test_an_arm_meets_the_aim_only_in_everything(finished: tuple[FrontierPlan, FrontierOutcome]) -> None:
    outcome = finished[1].model_copy(update={"costs": {"experts-mlp": [1.0, 1.1], "lora-mlp": [1.2, 1.1]}})
    outcome = _answering(outcome, "full", "text_after_image", [0.0, 1.0])
    judged = {each.arm: each for each in judge(outcome)}
    assert judged["experts-mlp"].changed == 0
    assert judged["experts-mlp"].meets["time"]
    assert not judged["lora-mlp"].meets["time"]
    assert judged["wings-best"].meets["time"] is None
    assert not judged["full"].meets["behind"]
    last = aims(outcome)[-1]
    assert last.startswith("All four by their estimates: ")
    whole = [name for name, each in judged.items() if all(each.meets.values())]
    assert all(outcome.methods[name].label in last for name in whole)
    assert not any(outcome.methods[name].label in last for name in ("lora-mlp", "wings-best"))


def test_arms_join_later_and_time_is_measured_beside_full_tuning(
    finished: tuple[FrontierPlan, FrontierOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "STEPS", 3)
    plan, outcome = finished
    assert outcome.costs == {}
    write_json(plan.costs_path("lora-mlp"), {"ratios": [1.5]})  # of an earlier call
    arms = ("full", "lora-mlp", "projector")
    more = frontier(replace(plan, arms=arms, rounds=1), command="again", workers=0, quiet=True)
    assert set(more.methods) == set(arms)
    assert more.methods["lora-mlp"] == outcome.methods["lora-mlp"]
    assert more.costs["lora-mlp"] == [1.5]
    assert len(more.costs["projector"]) == 1
    assert more.costs["projector"][0] > 0
    assert {each.arm: each.meets["time"] for each in judge(more)}["lora-mlp"] is False
    assert "| 1.50x |" in markdown(more)


@pytest.mark.parametrize(("name", "least"), [("frontier", 40), ("frontier-further", 40), ("frontier-deeper", 20)])
def test_a_page_has_the_tables_of_the_record_it_names(name: str, least: int) -> None:
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    assert f"benchmarks/results/{name}.json)" in page
    outcome = FrontierOutcome.load(ROOT / "benchmarks" / "results" / f"{name}.json")
    rows = [line for line in markdown(outcome).splitlines() if line.startswith("|")]
    assert len(rows) > least
    assert not [row for row in rows if row not in page]
    assert render(report(outcome))


def test_the_page_has_the_times_of_the_record_it_names() -> None:
    page = (ROOT / "docs" / "results" / "frontier.md").read_text()
    timed = re.search(r"benchmarks/results/(frontier-seed-\d+\.json)\)", page)
    assert timed is not None
    costs = FrontierOutcome.load(ROOT / "benchmarks" / "results" / timed[1])
    times = [(costs.methods[arm].label, relative_time(costs, arm)) for arm in costs.costs]
    assert [time for label, time in times if f"| {label} | {time:.2f}x |" not in page] == []
