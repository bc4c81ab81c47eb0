"""The study of truthfulness end to end on trainings of a step or two, the control it stands on, and its statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alula
from alula.errors import EvaluationError, UsageError
from alula.reports import render
from alula.stats import seed_interval
from alula_fledgling.weights import digest
from studies.plan import StudyPlan
from studies.truthfulness import ARMS, TruthPlan, TruthRecord, figures, markdown, report, table, truthfulness, verdict
from studies.truthfulness.record import AskedTask, pairs_of
from studies.truthfulness.streams import check_streams

ASKED = ("full-visual", "full-text")
BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart's directory whose connectors nobody trained."""
    place = tmp_path_factory.mktemp("lent")
    (place / "plan.json").write_text(json.dumps({"fledgling": digest(), "steps": 0.02, "methods": []}))
    aligned = StudyPlan(place).own.aligned(0)
    aligned.parent.mkdir(parents=True)
    alula.save_host(alula.build_host("fledgling", "fledgling"), aligned)
    return place


@pytest.fixture(scope="module")
def finished(lent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TruthPlan, TruthRecord]:
    output = tmp_path_factory.mktemp("truth") / "study"
    plan = TruthPlan(output, seeds=(0,), steps=0.02, reuse=lent, arms=ASKED, items=12)
    return plan, truthfulness(plan, command="python -m studies truthfulness", workers=0, quiet=True)


def test_every_arm_is_trained_and_asked_once(finished: tuple[TruthPlan, TruthRecord]) -> None:
    plan, record = finished
    assert TruthRecord.load(plan.output / "outcome.json") == record
    assert [arm.name for arm in record.arms] == [*ASKED]
    for seed in record.seeds.values():
        assert {*seed} == {"base", *ASKED}
    before = {path: path.stat().st_mtime_ns for path in plan.output.rglob("*-truthfulness.json")}
    assert len(before) == 1 + len(ASKED)
    again = truthfulness(plan, command="again", workers=0, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert again.seeds == record.seeds
    with pytest.raises(UsageError, match="items was 12"):
        truthfulness(replace(plan, items=13), command="", workers=0, quiet=True)
    with pytest.raises(UsageError, match="no arm 'more'"):
        replace(plan, arms=("more",))


def test_words_alone_are_the_same_words(lent: Path, tmp_path: Path) -> None:
    """Sample by sample and token by token; and what is not the same is refused."""
    plan = TruthPlan(tmp_path / "study", steps=0.2, reuse=None)
    host = StudyPlan(lent).own.aligned(0)
    pairs = list(pairs_of(ARMS))
    assert len(pairs) == 6
    for seeing, words in pairs:
        visual, text = plan.recipe_of(0, seeing), plan.recipe_of(0, words)
        assert visual.seed == text.seed
        assert "projector" in visual.stages[0].train
        assert {*text.stages[0].train} == {*visual.stages[0].train} - {"projector"}
        count = check_streams(visual, text, host, tokens=24)
        assert count == visual.stages[0].batch_size * (visual.stages[0].steps or 0)
    visual, text = (plan.recipe_of(0, BY_NAME[f"full-{name}"]) for name in ("visual", "text"))
    for other, told in (
        (plan.recipe_of(0, BY_NAME["full-caption-text"]), "different numbers of samples"),
        (plan.recipe_of(1, BY_NAME["full-text"]), "sample 0 is"),
        (visual, "has a picture too many"),
    ):
        if told == "sample 0 is":
            other = other.model_copy(update={"stages": (_reseeded(other.stages[0]),)})
        with pytest.raises(EvaluationError, match=told):
            check_streams(visual, other, host)


def _reseeded(stage: Any) -> Any:
    sources = tuple(source.model_copy(update={"seed": 5}) for source in stage.data.sources)
    return stage.model_copy(update={"data": stage.data.model_copy(update={"sources": sources})})


def test_its_pages(finished: tuple[TruthPlan, TruthRecord]) -> None:
    _, record = finished
    page = render(report(record))
    assert "Sight beyond text?" in page
    assert "full tuning, words alone" in page
    said = verdict(record)
    assert [sentence.split(":")[0][:12] for sentence in said[:2]] == ["Learning fro", "It makes it "]
    assert "of 4 differences" in said[2]
    assert {*figures(record)} == {"habit"}
    assert table(record).row_count == 1 + len(ASKED) + 4
    assert "| always yes |" in markdown(record)


def test_differences_are_paired_and_clusters_stay_together() -> None:
    """Made-up scores: the mean over seeds and questions, an interval by hand, and a sign test by clusters."""
    rng = np.random.default_rng(0)
    names = ("microworld_mc1", "microworld_mc2")
    clusters = [f"c{number // 3}" for number in range(30)]
    asked = AskedTask(title="t", clusters=clusters, premise=["a", "b"] * 15, constants={})
    rows = {
        seed: {
            arm: {name: {"score": list(rng.random(30) + lift)} for name in names}
            for arm, lift in (("base", 0.0), ("full-visual", 0.2))
        }
        for seed in (0, 1, 2)
    }
    record = TruthRecord(
        command="", created="", environment={}, seconds=0, settings={}, tasks=dict.fromkeys(names, asked), seeds=rows
    )
    differences = [
        np.array(rows[seed]["full-visual"][names[0]]["score"]) - rows[seed]["base"][names[0]]["score"] for seed in rows
    ]
    found = record.difference("full-visual", "base", names[:1], "score")
    averaged = np.mean(differences, axis=0)
    sums = np.array([averaged[start : start + 3].sum() for start in range(0, 30, 3)])
    error = np.sqrt(sum((s - averaged.mean() * 3) ** 2 for s in sums) * 10 / 9) / 30
    assert found == seed_interval([d.mean() for d in differences], error, 10)
    test = record.signs("full-visual", "base", names[:1], "score")
    assert test is not None
    assert (test.n, test.exact) == (10, True)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    assert test.p == pytest.approx((np.abs(sums @ signs) >= abs(sums.sum()) - 1e-9).mean())
    both = record.difference("full-visual", "base", names, "score")
    assert both is not None
    assert both.value == pytest.approx(
        np.mean([record.difference("full-visual", "base", (name,), "score").value for name in names])
    )
    part = record.of_premise("full-visual", "base", "a", names[0])
    assert part.value == pytest.approx(averaged[::2].mean())
    assert record.mean("base", names, "order") is None
