"""The study of visual knowledge end to end on trainings of a step or two, and what its figures are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import alula
from alula.errors import EvaluationError, UsageError
from alula.inputs import Intake
from alula.reports import render
from alula.training.methods import METHODS
from alula_fledgling.microworld.named import NAMED_FAMILIES, SIGHT_FAMILIES, named_questions, named_world
from studies.visual_knowledge import (
    ARMS,
    KnowledgePlan,
    KnowledgeRecord,
    figures,
    markdown,
    report,
    table,
    verdict,
    visual_knowledge,
)
from studies.visual_knowledge.arms import BEFORE
from studies.visual_knowledge.measure import SPLITS, answered, router_weight
from studies.visual_knowledge.record import SEEN

TRAINED = ("mks2", "lora", "told")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[KnowledgePlan, KnowledgeRecord]:
    plan = KnowledgePlan(tmp_path_factory.mktemp("knowledge") / "study", arms=TRAINED, items=2, steps=0.003)
    return plan, visual_knowledge(plan, command="python -m studies visual-knowledge", workers=0, quiet=True)


def test_every_arm_is_trained_and_asked_once(finished: tuple[KnowledgePlan, KnowledgeRecord]) -> None:
    plan, record = finished
    assert {arm.name for arm in record.arms} == set(TRAINED)
    assert KnowledgeRecord.load(plan.output / "outcome.json") == record
    for name in (BEFORE, *TRAINED):
        found = record.seeds[0][name]
        assert set(found["answers"]["held"]) == set(NAMED_FAMILIES)
        for family, answers in found["answers"]["held"].items():
            assert [each.about for each in named_questions(0, "test", family)] == answers["about"]
        assert len(found["text"]) == 2
        assert ("store" in found["pictures"]) == (name in ("mks2", "told"))
        assert (found["weight"] is None) == (name in (BEFORE, "lora"))
    assert record.things == 6
    before = plan.measured(0, "mks2").stat().st_mtime_ns
    visual_knowledge(plan, command="again", workers=0, quiet=True)
    assert plan.measured(0, "mks2").stat().st_mtime_ns == before
    with pytest.raises(UsageError):
        visual_knowledge(replace(plan, items=3), command="", workers=0, quiet=True)
    with pytest.raises(UsageError, match="no arm 'more'"):
        replace(plan, arms=("more",))


def test_other_trainings_do_not_go_on_in_its_directory(
    finished: tuple[KnowledgePlan, KnowledgeRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that were trained longer are not set beside those that are there."""
    plan, _ = finished
    monkeypatch.setattr("studies.visual_knowledge.arms.STORING", 7)
    with pytest.raises(UsageError, match="with other settings: trained was"):
        visual_knowledge(plan, command="", workers=0, quiet=True)


def test_nothing_is_decided_where_the_positive_control_fails(
    finished: tuple[KnowledgePlan, KnowledgeRecord],
) -> None:
    """And only of the families that it answers, where it does."""
    _, record = finished
    assert "the positive control fails, and nothing is decided" in verdict(record)[0]
    told = record.model_copy(deep=True)
    answers = told.seeds[0]["told"]["answers"]["held"]
    for family in SIGHT_FAMILIES:
        answers[family]["right"] = [float(family != "two_hop")] * len(answers[family]["about"])
    said = verdict(told)[0]
    assert "can be passed, in colour, shape, company and which is larger; nothing is decided of two hops" in said


def test_its_pages(finished: tuple[KnowledgePlan, KnowledgeRecord]) -> None:
    _, record = finished
    assert "Does stored sight help words?" in render(report(record))
    assert table(record).row_count == 1 + len(TRAINED)
    tables = markdown(record).split("\n\n")
    assert len(tables[0].splitlines()) == 3 + 1 + len(TRAINED)
    assert len(tables[1].splitlines()) == 2 + 1 + len(TRAINED)
    assert len(tables[2].splitlines()) == 2 + 3  # of the comparisons, three are between these arms
    assert len(verdict(record)) == 1 + 3 + 2
    assert all(svg.startswith("<svg") for svg in figures(record).values())


def test_adapters_train_as_many_weights(finished: tuple[KnowledgePlan, KnowledgeRecord]) -> None:
    """Counted on fresh adapters of all arms; and a record of unequal ones is refused."""
    plan, record = finished
    counts = {}
    for arm in ARMS:
        if arm.is_adapter:
            host = alula.build_host("fledgling", "fledgling")
            stage = plan.recipe_of(0, arm).stages[0]
            tuned = METHODS[stage.method].put_on(
                host, stage.settings, base="", previous=None, train_projector=False, seed=0
            )
            if tuned.graft is None:
                counts[arm.name] = sum(p.numel() for name, p in tuned.model.named_parameters() if ".lora_" in name)
            else:
                groups = tuned.graft.parameters_by_part()
                parts = [group for part, group in groups.items() if part != "mks2.retrieval"]
                counts[arm.name] = sum(parameter.numel() for group in parts for parameter in group)
    assert max(counts.values()) <= 1.001 * min(counts.values())
    assert {name: record.trained(name) for name in TRAINED} == {name: counts[name] for name in TRAINED}
    fewer = record.model_copy(deep=True)
    fewer.seeds[0]["lora"]["trained"]["lora"] -= 10_000
    with pytest.raises(EvaluationError, match="different numbers of weights"):
        fewer.check()


def test_choices_are_scored_as_one_by_one() -> None:
    """In padded batches as a question alone does, in a loop."""
    host = alula.build_host("fledgling", "fledgling")
    tokenizer = Intake.of(host.processor).tokenizer
    for family in ("colour", "comparison"):
        asked = named_questions(0, "test", family)[:5]
        found = answered(host.model, Intake.of(host.processor), asked)
        for index, each in enumerate(asked):
            prompt = f"<|im_start|>user {each.question}<|im_end|><|im_start|>assistant"
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = host.model(input_ids=ids).logits[0, -1].double()
            odds = [float(logits[tokenizer(f" {choice}")["input_ids"][-1]].exp()) for choice in each.choices]
            gold = each.choices.index(each.answer)
            assert found["nats"][index] == pytest.approx(-np.log(odds[gold] / sum(odds)), rel=1e-4)
            assert found["right"][index] == float(odds[gold] == max(odds))


def test_gains_are_thing_by_thing() -> None:
    def measured(right: float) -> dict[str, Any]:
        answers = {
            kind: {
                family: {
                    "about": (about := [each.about for each in named_questions(0, split, family)]),
                    "right": [right] * len(about),
                    "nats": [0.0] * len(about),
                }
                for family in NAMED_FAMILIES
            }
            for kind, split in SPLITS.items()
        }
        return {
            "answers": answers,
            "pictures": {},
            "text": [1.0, right],
            "weight": None,
            "trained": {"mks2.retrieval": 5, "x": 7},
        }

    one, other = measured(1.0), measured(0.5)
    other["answers"]["held"]["colour"]["right"] = [0.0] * 12
    record = KnowledgeRecord(
        command="", created="", environment={}, seconds=0.0, settings={}, seeds={0: {BEFORE: other, "mks2": one}}
    )
    assert record.gain("mks2", BEFORE, "colour").value == 1.0
    gain = record.gain("mks2", BEFORE, SEEN)
    assert gain.value == pytest.approx((1.0 + 0.5 * (len(SIGHT_FAMILIES) - 1)) / len(SIGHT_FAMILIES))
    assert gain.n == len(named_world(0).of("test"))
    assert gain.p == pytest.approx(2 / 2**gain.n)
    assert record.text_gain("mks2", BEFORE).value == 0.25
    assert record.trained("mks2") == 7


def test_the_weight_that_is_reported_is_the_routers(finished: tuple[KnowledgePlan, KnowledgeRecord]) -> None:
    """A half at the neutral start that the study takes; next to nothing where the router starts with the text."""
    _, record = finished
    assert record.seeds[0]["mks2"]["weight"] == pytest.approx(0.5, rel=0.2)  # after a step or two
    host = alula.build_host("fledgling", "fledgling")
    alula.attach(host.model, alula.MKS2Config())
    assert router_weight(host.model, Intake.of(host.processor), 0) == pytest.approx(1 / (1 + np.exp(8)), rel=1e-3)
