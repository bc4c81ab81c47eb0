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
from alula.evaluation.results import ItemResult
from alula.loading import load_model
from alula.reports import render
from studies.policies.measure import packed, unpacked
from studies.subnetwork import SubnetworkPlan, SubnetworkRecord, figures, markdown, report, subnetwork, table, verdict
from studies.subnetwork.kinds import MeasuringKinds, guessed
from studies.subnetwork.measure import PADDED, Measuring, padded
from studies.subnetwork.plan import CALIBRATIONS, HEALINGS, KINDS, RULES
from studies.subnetwork.record import Answers, KindAnswers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubnetworkPlan, SubnetworkRecord]:
    output = tmp_path_factory.mktemp("subnetwork") / "study"
    plan = SubnetworkPlan(output, sparsities=(0.5,), healed=0.5, samples=2, items=3, steps=0.002)
    return plan, subnetwork(plan, command="python -m studies subnetwork", workers=0, quiet=True)


def test_everything_is_measured_once(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    plan, record = finished
    assert SubnetworkRecord.load(plan.output / "outcome.json") == record
    model = record.seeds[0]
    assert set(model.pruned) == {f"{name}-50" for name in CALIBRATIONS}
    assert set(model.shared) == set(RULES)
    assert set(model.beside) == set(model.merged) == set(model.trained) == set(HEALINGS)
    assert model.none is not None
    answers = (model.none, *model.pruned.values(), *model.beside.values(), *model.trained.values())
    assert {len(unpacked(each.text)) for each in answers} == {plan.items}
    subnet = model.shared["intersection"].sparsity
    assert model.shared["union"].sparsity < 0.5 < subnet
    assert model.shared["pooled"].sparsity == model.shared["magnitude"].sparsity == subnet
    marker = plan.measured(0) / "pruned" / "both-50.json"
    before = marker.stat().st_mtime_ns
    more = subnetwork(replace(plan, parts=("masks",), sparsities=(0.5, 0.6)), command="again", workers=0, quiet=True)
    assert marker.stat().st_mtime_ns == before
    assert "random-60" in more.seeds[0].pruned
    with pytest.raises(UsageError, match="other settings"):
        subnetwork(replace(plan, items=2), command="")


def test_a_model_is_left_as_it_was(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    plan, record = finished
    measuring = Measuring.of(plan, 0)
    before = {name: value.clone() for name, value in measuring.model.state_dict().items()}
    for _, job in measuring.jobs()[2:5]:
        job()
    assert all(torch.equal(value, before[name]) for name, value in measuring.model.state_dict().items())
    none = record.seeds[0].none
    assert none is not None
    assert measuring.untouched() == none.model_dump(include={"text", "visual"})


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
    assert len(verdict(record)) == 9
    assert table(record).row_count == 2
    assert "The same training of the model that was not pruned" in verdict(record)[5]
    assert report(record).lead == verdict(record)
    assert "One subnetwork?" in render(report(record))
    assert "alpha-SubNet" in markdown(record)
    assert set(figures(record)) == {"kept-text", "kept-visual", "kept-kinds"}


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
            "trained": dict.fromkeys(model.trained, answers(1, 0.9)),
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


def test_healing_is_told_from_training_alone(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    _, record = finished
    said = verdict(invented(record, text=0.5, visual=0.5))[5].replace("\N{NO-BREAK SPACE}", " ")
    assert "100 % of text and 90 % of pictures (the healed model less this one: +0.0 points" in said
    assert "+10.0 points" in said


def test_four_kinds_are_measured(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    plan, record = finished
    kinds = record.kinds[0]
    assert set(kinds.own) == set(kinds.others) == set(kinds.guessed) == set(KINDS)
    assert set(kinds.shared) == {f"{rule}-50" for rule in RULES}
    assert len(kinds.pairs) == 6
    assert {len(unpacked(getattr(kinds.none, kind))) for kind in KINDS} == {plan.items}
    subnet = kinds.shared["intersection-50"].sparsity
    assert kinds.shared["union-50"].sparsity < 0.5 < subnet
    assert kinds.shared["pooled-50"].sparsity == kinds.shared["magnitude-50"].sparsity == subnet
    assert all(pair.chance < pair.applied <= 1 for pair in kinds.pairs.values())


def test_masks_of_four_kinds_by_hand(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    """What the study records of masks, counted bit by bit from masks made anew."""
    plan, record = finished
    measuring = MeasuringKinds.of(plan, 0)
    masks = [*measuring.tasks(0.5).values()]
    kept = total = 0
    for name in masks[0].shapes:
        every = torch.stack([mask.unpack(name) for mask in masks]).all(dim=0)
        kept, total = kept + int(every.sum()), total + every.numel()
    assert record.kinds[0].shared["intersection-50"].sparsity == pytest.approx(1 - kept / total)
    sounds, films = measuring.mask("audio"), measuring.mask("video")
    ious = []
    for name in sounds.shapes:
        one, other = sounds.unpack(name), films.unpack(name)
        ious.append(float((one & other).sum() / (one | other).sum()))
    assert record.kinds[0].pairs["video, audio"].applied == pytest.approx(sum(ious) / len(ious))


def test_which_of_four_kinds_dies_first(finished: tuple[SubnetworkPlan, SubnetworkRecord]) -> None:
    _, record = finished
    whole = packed([True] * 100)
    fell = packed([index < 40 for index in range(100)])
    kinds = record.kinds[0]
    under = KindAnswers(sparsity=0.6, image=whole, video=fell, audio=whole, text=whole)
    made = kinds.model_copy(
        update={
            "none": KindAnswers(image=whole, video=whole, audio=whole, text=whole),
            "guessed": dict.fromkeys(KINDS, 0.2),
            "own": dict.fromkeys(kinds.own, under),
            "shared": dict.fromkeys(kinds.shared, under),
        }
    )
    model = record.seeds[0].model_copy(update={"kinds": made})
    found = record.model_copy(update={"seeds": dict.fromkeys(range(3), model)})
    said = verdict(found)[8].replace("\N{NO-BREAK SPACE}", " ")
    assert "at 60.0 % films (40 % kept, pictures 100 %: +60.0 points" in said
    assert "at 60.0 % 100 % of pictures, 25 % of films" in said
    assert said.endswith("half of it is lost of films at 60.0 %.")
    assert "no difference shown of any kind" in verdict(found)[7]


def test_guessing() -> None:
    """Three of four and one of two right, of who always says the commonest answer of a family."""
    golds = {"colour": ["red", "red", "red", "blue"], "count": ["1", "2"]}
    items = [
        ItemResult(id=f"{family}-{place}", family=family, prompt_hash="", gold=gold, answer="", score=0.0)
        for family, each in golds.items()
        for place, gold in enumerate(each)
    ]
    assert guessed(items) == pytest.approx(4 / 6)


def test_parts(finished: tuple[SubnetworkPlan, SubnetworkRecord], tmp_path: Path) -> None:
    """A part alone has its own pages, and takes what was measured before."""
    plan, record = finished
    alone = subnetwork(replace(plan, parts=("kinds",)), command="kinds", workers=0, quiet=True)
    assert alone.seeds[0].kinds == record.seeds[0].kinds
    assert alone.seeds[0].none is None
    assert len(verdict(alone)) == 3
    assert "alpha-SubNet" in markdown(alone)
    assert "Healing" not in render(report(alone))
    with pytest.raises(UsageError, match="no part 'sounds'"):
        replace(plan, parts=("sounds",))
    lent = tmp_path / "plan.json"
    lent.write_text(json.dumps({"methods": [], **plan.shared_facts}))
    with pytest.raises(UsageError, match="nothing is taken from it"):
        replace(plan, parts=("kinds",), reuse=tmp_path)


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        SubnetworkPlan(tmp_path, sparsities=(0.5, 1.0))
    other = tmp_path / "plan.json"
    other.write_text(json.dumps({"methods": [], "fledgling": "other"}))
    with pytest.raises(UsageError, match="that quickstart has fledgling"):
        SubnetworkPlan(tmp_path / "out", reuse=tmp_path)
