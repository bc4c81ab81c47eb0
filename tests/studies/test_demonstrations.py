"""The study of demonstrations end to end in a few steps, and what its figures are made of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import alula
from alula.errors import UsageError
from alula.reports import render
from alula_fledgling.weights import digest
from studies.demonstrations import (
    WAYS,
    DemonstrationsPlan,
    DemonstrationsRecord,
    demonstrations,
    figures,
    markdown,
    report,
    table,
    verdict,
)
from studies.demonstrations.measure import asked_episodes, peak_bytes
from studies.plan import StudyPlan

FEW = (0, 4, 64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemonstrationsPlan, DemonstrationsRecord]:
    lent = tmp_path_factory.mktemp("lent")
    (lent / "plan.json").write_text(json.dumps({"fledgling": digest(), "steps": 1.0, "methods": ["full"]}))
    place = StudyPlan(lent).own.run_directory(0, "full") / "final"
    place.parent.mkdir(parents=True)
    alula.save_host(alula.build_host("fledgling", "fledgling"), place)
    output = tmp_path_factory.mktemp("demonstrations") / "study"
    plan = DemonstrationsPlan(output, reuse=lent, shots=FEW, items=2, taught=1, mapped=1)
    return plan, demonstrations(plan, command="python -m studies demonstrations", workers=0, quiet=True)


def test_every_way_is_asked_behind_every_number_of_shots(
    finished: tuple[DemonstrationsPlan, DemonstrationsRecord],
) -> None:
    plan, record = finished
    assert DemonstrationsRecord.load(plan.output / "outcome.json") == record
    ways = record.seeds[0]["ways"]
    assert list(ways) == list(WAYS)
    for way in WAYS:
        assert list(ways[way]) == [str(shots) for shots in FEW]
        assert record.fits(way, 4)
        assert len(ways[way]["4"]["right"]) == 2
    assert not record.fits("full", 64), "only without pictures do more shots fit"
    assert not record.fits("pruned", 64)
    assert record.mean("aim", 64, "tokens") == record.mean("text", 64, "tokens")
    assert record.fits("aim", 64)
    assert ways["full"]["4"]["tokens"] == ways["text"]["4"]["tokens"] + 4 * 25
    assert all(ways[way]["0"]["right"] == ways["full"]["0"]["right"] for way in WAYS), "without shots all ways are one"
    assert record.ratio("aim", 4, "peak") < 1
    before = plan.measured_file(0).stat().st_mtime_ns
    demonstrations(plan, command="again", workers=0, quiet=True)
    assert plan.measured_file(0).stat().st_mtime_ns == before
    with pytest.raises(UsageError):
        demonstrations(replace(plan, items=3), command="", workers=0, quiet=True)


def test_its_pages(finished: tuple[DemonstrationsPlan, DemonstrationsRecord]) -> None:
    _, record = finished
    page = render(report(record))
    assert "What is left of a demonstration without its picture?" in page
    assert "does not fit" in page
    assert len(record.shown) == 2  # as many as were asked, of three
    assert page.count("<img src=") == 2 * 3
    assert all(set(each.answers) == set(WAYS) and each.gold for each in record.shown)
    assert table(record).row_count == len(FEW)
    assert len(markdown(record).split("\n\n")) == 5
    assert all(svg.startswith("<svg") for svg in figures(record).values())
    assert len(verdict(record)) == 4


def test_the_verdict_says_what_the_figures_say(finished: tuple[DemonstrationsPlan, DemonstrationsRecord]) -> None:
    _, record = finished
    seed = json.loads(json.dumps(record.seeds[0]))
    for shots in ("4", "64"):
        for way, right in (("full", [1.0, 1.0]), ("aim", [1.0, 0.0]), ("text", [0.0, 0.0]), ("pruned", [1.0, 1.0])):
            if "right" in seed["ways"][way][shots]:
                seed["ways"][way][shots]["right"] = right
    for way in WAYS:
        seed["ways"][way]["0"]["right"] = [0.0, 0.0]
    told = verdict(record.model_copy(update={"seeds": {0: seed, 1: seed}}))
    assert told[0] == "Demonstrations help: 0 % without, 100 % behind 4 in full."
    assert "AIM against words alone at 4 shots: +50 points" in told[1]
    assert "against full demonstrations: -50 points" in told[1]
    assert told[3].startswith("64 shots do not fit in full; with AIM they do, and 50 % are right")


def test_episodes_are_held_out_and_the_first_shots_of_more() -> None:
    one, again = (next(asked_episodes(1, 5, 9)) for _ in range(2))
    assert [each.answer for each in one.shown] == [each.answer for each in again.shown]
    assert len(one.shown) == 9
    assert one.question.startswith("What colour is the")
    assert {each.question for each in one.shown} == {"Remember the picture."}


def test_the_peak_is_of_what_stood_at_once() -> None:
    def run() -> None:
        first = torch.ones(1000)
        del first
        second, third = torch.ones(1000), torch.ones(500)
        del second, third

    assert peak_bytes(run) == 6000
