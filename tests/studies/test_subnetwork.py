"""The study of subnetworks end to end on a few questions, and what it works out of made-up answers of known truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alula.anatomy import Anatomy
from alula.compress import WeightPruning, find_mask
from alula.errors import UsageError
from alula.loading import load_model
from alula.reports import render
from studies.policies.measure import packed, unpacked
from studies.subnetwork import SubnetworkPlan, SubnetworkRecord, figures, markdown, report, subnetwork, table, verdict
from studies.subnetwork.measure import PADDED, Measuring, padded
from studies.subnetwork.plan import CALIBRATIONS, HEALINGS, RULES
from studies.subnetwork.record import Answers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubnetworkPlan, SubnetworkRecord]:
    output = tmp_path_factory.mktemp("subnetwork") / "study"
    plan = SubnetworkPlan(output, sparsities=(0.5,), healed=0.5, samples=2, items=4, steps=0.004)
    return plan, subnetwork(plan, command="python -m studies subnetwork", workers=0, quiet=True)


def test_everything_is_measured_once(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    plan, record = finished
    assert SubnetworkRecord.load(plan.output / "outcome.json") == record
    model = record.seeds[0]
    assert set(model.pruned) == {f"{name}-50" for name in CALIBRATIONS}
    assert set(model.shared) == set(RULES)
    assert set(model.beside) == set(model.merged) == set(HEALINGS)
    assert {len(unpacked(each.text)) for each in (model.none, *model.pruned.values(), *model.beside.values())} == {4}
    subnet = model.shared["intersection"].sparsity
    assert model.shared["union"].sparsity < 0.5 < subnet
    assert model.shared["pooled"].sparsity == model.shared["magnitude"].sparsity == subnet
    marker = plan.measured(0) / "pruned" / "both-50.json"
    before = marker.stat().st_mtime_ns
    more = subnetwork(replace(plan, sparsities=(0.5, 0.6)), command="again", workers=0, quiet=True)
    assert marker.stat().st_mtime_ns == before
    assert "random-60" in more.seeds[0].pruned
    with pytest.raises(UsageError, match="other settings"):
        subnetwork(replace(plan, items=2), command="")


def test_a_model_is_left_as_it_was(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    plan, record = finished
    measuring = Measuring(plan, 0)
    before = {name: value.clone() for name, value in measuring.model.state_dict().items()}
    for _, job in measuring.jobs()[2:5]:
        job()
    assert all(torch.equal(value, before[name]) for name, value in measuring.model.state_dict().items())
    assert measuring.untouched() == record.seeds[0].none.model_dump(include={"text", "visual"})


def test_the_padding_defect_is_as_published(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    """Rows of zeros up to 128 that every token sees, and that count: by hand for one prompt, in the first layer."""
    plan, _ = finished
    model, _ = load_model(plan.model(0))
    ids = torch.tensor([[0, 0, 7, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "mm_token_type_ids": torch.zeros_like(ids)}
    (made,) = padded(model, [batch])
    rows = model.get_input_embeddings()(ids[0, 2:])
    assert torch.equal(made["inputs_embeds"][0, :3], rows)
    assert made["inputs_embeds"].shape[1] == PADDED
    assert not made["inputs_embeds"][0, 3:].any()
    assert made["attention_mask"].all()
    mask = find_mask(model, WeightPruning(sparsity=0.5, layers=(0,), targets=("q_proj",)), [made])
    layer = Anatomy.of(model).layers[0]
    squares = layer.input_layernorm(made["inputs_embeds"]).square().sum(dim=(0, 1))
    scores = layer.self_attn.q_proj.weight.abs() * squares.sqrt()
    half = scores.shape[1] // 2
    kept = scores >= scores.sort(dim=1).values[:, half : half + 1]
    assert (mask.unpack("layers.0.self_attn.q_proj") == kept).float().mean() > 0.999


def test_pages(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    _, record = finished
    assert len(verdict(record)) == 6
    assert table(record).row_count == 2
    assert report(record).lead == verdict(record)
    assert "One subnetwork?" in render(report(record))
    assert "alpha-SubNet" in markdown(record)
    assert set(figures(record)) == {"kept-text", "kept-visual"}


def invented(record: SubnetworkRecord, text: float, visual: float) -> SubnetworkRecord:
    """Three models that answer 100 questions right, and under the mask such shares of them."""

    def answers(text: float, visual: float) -> Answers:
        marks = [packed([index < 100 * share for index in range(100)]) for share in (text, visual)]
        return Answers(sparsity=0.5, text=marks[0], visual=marks[1])

    model = record.seeds[0]
    made = model.model_copy(
        update={
            "none": answers(1, 1),
            "pruned": dict.fromkeys(model.pruned, answers(text, visual)),
            "shared": dict.fromkeys(model.shared, answers(text, visual)),
            "beside": dict.fromkeys(model.beside, answers(1, 1)),
            "merged": dict.fromkeys(model.merged, answers(text, visual)),
        }
    )
    return record.model_copy(update={"seeds": dict.fromkeys(range(3), made)})


def test_what_dies_first(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    _, record = finished
    found = invented(record, text=0.4, visual=0.9)
    first = found.first("pruned", "both-50")
    assert first is not None
    assert first.value == pytest.approx(0.5)
    assert first.low > 0.3
    said = verdict(found)[2].replace("\N{NO-BREAK SPACE}", " ")
    assert "Half is lost of text at 50 % and pictures not up to 50 %" in said
    assert "+50.0 points" in said
    same = verdict(invented(record, text=0.7, visual=0.7))[2]
    assert "At no sparsity" in same
    assert found.kept("pruned", "both-50", "visual") == pytest.approx(0.9)
    assert found.lost("pruned", "both-50", "text").value == pytest.approx(-0.6)


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        SubnetworkPlan(tmp_path, sparsities=(0.5, 1.0))
    other = tmp_path / "plan.json"
    other.write_text(json.dumps({"methods": [], "fledgling": "other"}))
    with pytest.raises(UsageError, match="that quickstart has fledgling"):
        SubnetworkPlan(tmp_path / "out", reuse=tmp_path)
