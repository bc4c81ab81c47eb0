"""The alignment study end to end on a few steps, and its answers on made-up populations of known truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import SiglipVisionModel

import alula
import alula_fledgling as fledgling
from alula.data import Collator
from alula.errors import UsageError
from alula.evaluation import evaluate
from alula.hosts import load_host
from alula.probes import Alignment
from alula.reports import render
from alula.stats import Resampling
from alula_fledgling.tasks import pope
from studies.alignment import AlignmentPlan, AlignmentRecord, alignment, figures, report, table, verdict
from studies.alignment.measure import BEFORE, OVERLAPS, SITES
from studies.alignment.record import HALLUCINATION, PREDICTORS, SKILLS, Measurement, RunRecord, answer
from studies.passes import held_out, look

HOW = Resampling(resamples=200)
KEPT = ("first-layer", "queries", "untrained-tower")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[AlignmentPlan, AlignmentRecord]:
    output = tmp_path_factory.mktemp("alignment") / "study"
    plan = AlignmentPlan(output=output, configurations=KEPT, samples=4, items=3, steps=0.007)
    return plan, alignment(plan, command="python -m studies alignment", workers=0, quiet=True)


def test_every_run_is_measured_before_and_at_every_milestone(
    finished: tuple[AlignmentPlan, AlignmentRecord],
) -> None:
    plan, record = finished
    assert {run.configuration for run in record.runs} == set(KEPT)
    for one in record.runs:
        assert tuple(one.models) == (BEFORE, *plan.milestones)
        assert len(one.trained) == len(plan.milestones)
    assert AlignmentRecord.load(plan.output / "outcome.json") == record
    again = alignment(plan, command="again", workers=0, quiet=True)
    assert (again.runs, again.answers) == (record.runs, record.answers)
    with pytest.raises(UsageError, match="other settings"):
        alignment(replace(plan, items=7), command="")


def test_what_is_measured_is_what_the_saved_model_gives(
    finished: tuple[AlignmentPlan, AlignmentRecord],
) -> None:
    plan, record = finished
    one = next(one for one in record.runs if one.configuration == "first-layer")
    model, processor = alula.load_model(plan.own.run_directory(0, "first-layer") / "final")
    probe = Alignment(sites=SITES, keep=4)
    with probe.on(model):
        look(model, Collator(processor), held_out("caption", 4, plan.task_seed))
    found = probe.result().pairs["image-text"]
    assert one.last.figures["score"] == pytest.approx(found.score.value, abs=1e-5)
    assert one.last.curves["aligned/mlp"] == pytest.approx([p.value for p in found.sites["mlp"].all_pairs], abs=1e-5)
    asked = evaluate(model, processor, [pope(n=plan.items, seed=plan.task_seed)], batch_size=64).tasks["pope"]
    assert one.last.figures["pope_accuracy"] == asked.figures["all"]["accuracy"].value


def test_the_towers_are_what_the_configurations_say(finished: tuple[AlignmentPlan, AlignmentRecord]) -> None:
    plan, _ = finished
    untrained = SiglipVisionModel.from_pretrained(plan.untrained_tower)
    trained = SiglipVisionModel.from_pretrained(fledgling.directory() / "vision")
    assert untrained.config.to_dict().items() >= {"hidden_size": trained.config.hidden_size}.items()
    name = "encoder.layers.0.mlp.fc1.weight"
    weights = [dict(tower.named_parameters()) for tower in (untrained, trained)]
    key = next(key for key in weights[0] if key.endswith(name))
    assert not (weights[0][key] == weights[1][key]).all()
    host = load_host(plan.own.run_directory(0, "untrained-tower") / "host").model
    inside = next(value for key, value in host.named_parameters() if key.endswith(name))
    assert (inside == weights[0][key]).all()
    assert load_host(plan.own.run_directory(0, "first-layer") / "host").model.config.vision_feature_layer == 1


def test_only_the_decoder_tuned_runs_train_the_decoder(tmp_path: Path) -> None:
    plan = AlignmentPlan(output=tmp_path)
    for one in plan.runs:
        stage = plan.recipe_of(one).stages[0]
        assert ("llm" in stage.learning_rates) == one.configuration.decoder
        assert stage.steps == plan.milestones[-1]
    assert len(plan.runs) == 7


def test_the_report_has_a_figure_per_question(finished: tuple[AlignmentPlan, AlignmentRecord]) -> None:
    _, record = finished
    assert {name[0] for name in figures(record)} == set("abcde")
    page = render(report(record))
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert table(record).row_count
    assert [said[:3] for said in verdict(record)] == ["(a)", "(b)", "(c)", "(d)", "(e)"]


def population(gap: float = 0.3, shared: float = 0.05, rise: float = 0.2, slope: float = 1.0) -> list[RunRecord]:
    """Twelve made-up trainings of four configurations."""
    rng = np.random.default_rng(0)
    runs = []
    for place in range(4):
        for seed in range(3):
            models = {}
            own = rng.normal()
            for step in (0, 50, 100, 300):
                score = 0.1 * own + 0.02 * rng.normal()
                figures: dict[str, float | None] = dict.fromkeys(PREDICTORS, score)
                for outcome in (*SKILLS, *HALLUCINATION):
                    sign = -1 if outcome.startswith("chair_") and outcome != "chair_recall" else 1
                    figures[outcome] = 0.5 + sign * slope * score + 0.01 * rng.normal()

                def jitter(value: float, count: int) -> list[float | None]:
                    return (value + 0.01 * rng.normal(size=count)).tolist()

                curves = {name: jitter(0.5 + gap, 4) for name in ("within_text", "within_image")}
                curves |= {"between": jitter(0.5, 4)}
                curves |= {name: jitter(0.5, 3) for name in OVERLAPS}
                curves["iou"] = jitter(0.5 + shared, 3)
                for site in SITES:
                    extra, count = (0.0, 4) if site == "stream" else (rise, 3)
                    curves |= {f"{what}/{site}": jitter(0.1 + extra, count) for what in ("aligned", "contrast")}
                models[step] = Measurement(figures=figures, curves=curves)
            runs.append(RunRecord(seed=seed, configuration=f"c{place}", label=f"c{place}", models=models))
    return runs


def said_of(runs: list[RunRecord]) -> list[str]:
    record = AlignmentRecord(
        command="", created="", environment={}, seconds=0, settings={}, runs=runs, answers=answer(runs, HOW)
    )
    return verdict(record)


def test_the_answers_follow_the_figures() -> None:
    yes = said_of(population())
    assert "differ, and stay so" in yes[0]
    assert "weights more than by chance" in yes[1]
    assert "more than large weights" in yes[1]
    assert "closer than in the block's input in after the first norm" in yes[2]
    assert "goes with performance as claimed" in yes[3]
    assert "goes with hallucination as claimed" in yes[4]
    no = said_of(population(gap=0, shared=-0.05, rise=-0.2, slope=-1.0))
    assert "differ is not shown" in no[0]
    assert "weights not more than by chance" in no[1]
    assert "further apart in after the first norm" in no[2]
    assert "the other way round" in no[3]
    assert "the other way round" in no[4]
    assert "is not shown" in said_of(population(slope=0.0))[3]


def test_answers_are_over_trainings_and_configurations() -> None:
    found = answer(population(), HOW)
    assert found.proxies["score"]["visual"][0].models == 12 * 3
    assert found.between["score"]["visual"].models == 4
    assert found.between["score"]["visual"].spearman.permutations == 24
    assert found.weights["chance"].n == 12
    assert found.weights["chance"].exact
    assert found.inside["mlp"].value == pytest.approx(0.2, abs=0.01)


def test_trainings_without_a_defined_figure_are_left_out_and_named() -> None:
    runs = population()
    runs[4].models[100].figures["chair_i"] = None
    found = answer(runs, HOW)
    assert found.left_out == {"chair_i": ["c1, seed 1"]}
    assert found.proxies["score"]["chair_i"][0].runs == 11
    assert found.proxies["score"]["visual"][0].runs == 12


def test_impossible_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no configuration 'clip'"):
        AlignmentPlan(output=tmp_path, configurations=("clip",))
    with pytest.raises(UsageError, match="three"):
        AlignmentPlan(output=tmp_path, configurations=("mlp",))
