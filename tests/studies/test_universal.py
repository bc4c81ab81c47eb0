"""The study of the universal encoder: how its arms differ, how models are measured, what its figures come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import alula
from alula.reports import render
from studies.universal import UniversalPlan, UniversalRecord, markdown, report, table, verdict
from studies.universal.measure import caption_losses, told
from studies.universal.plan import ARMS, CAPTIONS, IMAGE, JOINT
from studies.universal.report import CLAIMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> UniversalPlan:
    return UniversalPlan(tmp_path_factory.mktemp("study") / "out", images=6, training=9, items=4)


def test_arms_differ_in_what_they_say_alone(plan: UniversalPlan) -> None:
    first = plan.first(0)
    assert [stage.settings.media for stage in first.stages] == [("image",)]
    joint = plan.recipe_of(0, JOINT, JOINT)
    assert joint.host.path == str(plan.model(0, IMAGE))
    for name, arm in ARMS.items():
        for training, media in arm.models(name).items():
            (stage,) = plan.recipe_of(0, name, training).stages
            (same,) = joint.stages
            assert stage.settings.media == media
            assert stage.steps == 9 * len(media) // 3
            assert ("tower" in stage.learning_rates) == (name == "tuned")
            assert {*stage.learning_rates} - {"tower"} == {"connector.shared", *(f"connector.{m}" for m in media)}
            assert stage.settings.experts == (None if name == "one" else 5 if name == "five" else 3)
            assert (stage.batch_size, stage.schedule) == (same.batch_size, same.schedule)
    assert [*ARMS["separate"].models("separate")] == [f"separate-{medium}" for medium in CAPTIONS]


def test_senses_come_in_two_stages_with_earlier_media_replayed(tmp_path: Path) -> None:
    plan = UniversalPlan(tmp_path / "out", images=6, training=36, items=4, senses=True)
    second, third = plan.recipe_of(0, JOINT, JOINT).stages
    assert second.settings.media == ("image", "points")
    assert third.settings.media == ("image", "points", "depth", "normals", "motion", "response")
    assert (second.steps, third.steps) == (12, 24)
    assert (second.settings.experts, third.settings.experts) == (3, None)
    weights = {source.weight for source in third.data.sources}
    assert len(third.data.sources) == 6
    assert weights == {1.0}
    alone = {
        media[0]: plan.recipe_of(0, "separate", name).stages
        for name, media in ARMS["separate"].models("separate", plan.captions).items()
    }
    assert {medium: stage.steps for medium, (stage,) in alone.items()} == {
        **dict.fromkeys(("image", "points"), 12 // 2 + 24 // 6),
        **dict.fromkeys(("depth", "normals", "motion", "response"), 24 // 6),
    }
    assert plan.first(0).host.modalities == ("image", "points", "depth", "normals", "motion", "response")
    assert "senses" not in UniversalPlan(tmp_path / "out").facts


def test_losses_are_per_caption() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 3, 4, -100, -100], [-100, -100, -100, 1, 2]])
    expected = []
    for row in range(2):
        at = [place for place in range(5) if labels[row, place] != -100]
        expected.append(sum(-logits[row, p - 1].log_softmax(-1)[labels[row, p]] for p in at) / len(at))
    torch.testing.assert_close(caption_losses(logits, labels), torch.stack(expected))


def test_a_model_is_measured_by_its_own_item_and_by_anothers(plan: UniversalPlan, tmp_path: Path) -> None:
    host = alula.build_host(
        "fledgling", "fledgling", encoder="universal", modalities=["image", "audio"], feature_extractor="fledgling",
        connector_options={"experts": 1, "depth": 1, "heads": 4, "modality_tokens": 4, "feedforward": 16},
        modality_options={"audio": {"stride": 16}},
    )  # fmt: skip
    with torch.no_grad():  # of images the connector hands over nothing but its bias and its tags
        host.model.model.multi_modal_projector.of("image").exit.weight.zero_()
    directory = str(alula.save_host(host, tmp_path / "host"))
    blind, hearing = (told(plan, directory, medium) for medium in ("image", "audio"))
    assert blind["own"] == pytest.approx(blind["others"], abs=1e-5)
    assert hearing["own"] != pytest.approx(hearing["others"], abs=1e-5)
    assert len(hearing["own"]) == plan.items


def test_figures_are_caption_by_caption(tmp_path: Path) -> None:
    level = {arm: 1.0 + 0.1 * place for place, arm in enumerate(ARMS)}
    seeds = {
        seed: {
            arm: {
                medium: {"own": [level[arm] + 0.01 * n for n in range(8)], "others": [2.0 + 0.01 * n for n in range(8)]}
                for medium in CAPTIONS
            }
            for arm in ARMS
        }
        for seed in range(3)
    }
    record = UniversalRecord(
        command="python -m studies universal", created="now", environment={"torch": "2"}, seconds=60.0,
        settings={"images": 6, "training": 9, "items": 8}, seeds=seeds,
    )  # fmt: skip
    assert record.change("separate", JOINT, "video").value == pytest.approx(0.1)
    assert record.change("random", JOINT).low > 0
    assert record.seen(JOINT, "audio").value == pytest.approx(1.0)
    record.save(tmp_path / "outcome.json")
    assert UniversalRecord.load(tmp_path / "outcome.json") == record
    said = verdict(record)
    assert len(said) == 1 + len(CLAIMS)
    assert "pictures 1.000 (1.000 to 1.000)" in said[0]
    assert "with one model per medium, captions of all media lose +0.100 (+0.100 to +0.100) (worse)" in said[1]
    assert "had -0.100 (-0.100 to -0.100) (worse)" in said[1]
    assert table(record).row_count == len(ARMS)
    assert markdown(record).count("**") == 6
    assert "what of OneLLM holds here?" in render(report(record))


@pytest.mark.parametrize("name", ["universal", "universal-senses"])
def test_the_page_has_the_tables_of_the_records_it_names(name: str) -> None:
    page = (ROOT / "docs" / "methods" / "onellm.md").read_text()
    assert f"benchmarks/results/{name}.json)" in page
    record = UniversalRecord.load(ROOT / "benchmarks" / "results" / f"{name}.json")
    rows = [line for line in markdown(record).splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert not [row for row in rows if row not in page]
