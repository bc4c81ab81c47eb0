"""The study of highlights end to end on a few questions about an untrained model, and what its figures are made of."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import alula
from alula.errors import UsageError
from alula.reports import render
from alula_fledgling.weights import digest
from studies.highlight import HighlightPlan, HighlightRecord, highlight, markdown, report, table, verdict
from studies.highlight.measure import _described
from studies.highlight.plan import ARMS, SHOWN, Arm
from studies.highlight.questions import ambiguous, clear
from studies.plan import StudyPlan

ARMS_ASKED = ("shift-b2-c1.3", "distorted-c2", "keys-g1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[HighlightPlan, HighlightRecord]:
    lent = tmp_path_factory.mktemp("lent")
    facts = {"fledgling": digest(), "steps": 1.0, "methods": ["full"]}
    (lent / "plan.json").write_text(json.dumps(facts))
    place = StudyPlan(lent).own.run_directory(0, "full") / "final"
    place.parent.mkdir(parents=True)
    alula.save_host(alula.build_host("fledgling", "fledgling"), place)
    output = tmp_path_factory.mktemp("highlight") / "study"
    plan = HighlightPlan(output, reuse=lent, arms=ARMS_ASKED, items=1)
    return plan, highlight(plan, command="python -m studies highlight", workers=0, quiet=True)


def test_every_arm_is_asked_once(finished: tuple[HighlightPlan, HighlightRecord]) -> None:
    plan, record = finished
    assert [arm.name for arm in record.arms] == ["none", *ARMS_ASKED]
    assert set(record.seeds[0]["distorted-c2"]) == {"existence", "caption"}
    assert all(len(v) == 1 for arm in record.seeds[0].values() for task in arm.values() for v in task.values())
    assert HighlightRecord.load(plan.output / "outcome.json") == record
    before = plan.measured(0).stat().st_mtime_ns
    highlight(plan, command="again", workers=0, quiet=True)
    assert plan.measured(0).stat().st_mtime_ns == before
    with pytest.raises(UsageError):
        highlight(replace(plan, items=3), command="", workers=0, quiet=True)
    with pytest.raises(UsageError, match="no trained model of seed 1"):
        replace(plan, seeds=(1,))
    with pytest.raises(UsageError, match="no arm 'more'"):
        replace(plan, arms=("more",))


def test_its_pages(finished: tuple[HighlightPlan, HighlightRecord]) -> None:
    _, record = finished
    page = render(report(record))
    assert "Does the answer follow the highlight?" in page
    assert "beta 2, guidance 1.3" in page
    assert len(verdict(record)) == 1
    pointed, whole, *_ = markdown(record).split("\n\n")
    assert table(record).row_count == len(whole.splitlines()) - 2 == 4
    assert len(pointed.splitlines()) - 2 == 3  # noise on a picture points at no part of it
    # pictures beside answers, with a frame around what is highlighted
    assert [each.family for each in record.shown] == ["ambiguous", "misled", "existence"]
    assert all(set(each.answers) == {arm.name for arm in SHOWN} for each in record.shown)
    assert page.count("<img src=") == 3
    picture = record.shown[2].prompt[0].content[0].image
    assert picture is not None
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == shown.convert("RGB").getpixel((159, 159)) == (214, 39, 140)


def test_what_is_asked_and_how_it_is_judged() -> None:
    for question in ambiguous(20, 0):
        assert question.highlighted is not None
        assert len({thing.shape for thing in question.scene.things}) == 1
        assert {question.gold, question.other} == {thing.colour for thing in question.scene.things}
        assert question.gold == question.highlighted.colour
    for led, misled in zip(clear(20, 0, misled=False), clear(20, 0, misled=True), strict=True):
        assert (led.words, led.gold) == (misled.words, misled.gold)
        assert led.highlighted != misled.highlighted
    question = ambiguous(1, 0)[0]
    one, other = question.scene.things
    right = f"a {one.full_name} at the {one.position} and a {other.full_name} at the {other.position}"
    assert _described(question, right) == {"hallucinated": 0.0, "covered": 1.0, "well-formed": 1.0}
    half = f"a {one.full_name} at the {one.position} and a small grey dog"
    assert _described(question, half) == {"hallucinated": 0.0, "covered": 0.5, "well-formed": 0.0}


def test_gains_are_item_by_item() -> None:
    """Made-up answers of known truth, two seeds."""
    rng = np.random.default_rng(0)
    plain = [rng.integers(0, 2, 50).astype(float) for _ in range(2)]
    arm = Arm("shift", 2.0, 1.3)
    tables = [{a.name: {"ambiguous": {"right": list(x)}} for a, x in ((ARMS[0], p), (arm, np.ones(50)))} for p in plain]
    record = HighlightRecord(
        command="", created="", environment={}, seconds=0, settings={}, seeds=dict(enumerate(tables))
    )
    assert record.mean(arm, "ambiguous", "right").value == 1
    gain = record.gain(arm, "ambiguous", "right")
    assert gain.value == pytest.approx(1 - np.mean(plain))
    assert 0 < gain.low < gain.value < gain.high
