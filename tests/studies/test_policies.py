"""The policy study end to end on a few questions, and its verdicts on made-up answers of known truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alula.errors import UsageError
from alula.evaluation import evaluate
from alula.loading import load_model
from alula.policies import policy_of
from alula.reports import render
from alula_fledgling.tasks import visual
from studies.policies import PARTS, PoliciesPlan, PoliciesRecord, figures, markdown, policies, report, table, verdict
from studies.policies.claims import hard
from studies.policies.measure import Measuring, packed, unpacked
from studies.policies.plan import TALKED
from studies.policies.questions import KINDS, SHORT, longest
from studies.policies.record import Answers, First, SeedRecord, Stays, Talks, Text, among, apart, mean
from studies.policies.rows import LAYERS, SHARES, TOKENS, WAYS, changes_text, kept, share_name, skip_rows

ROOT = Path(__file__).parents[2]
WAYS_ASKED = ("pooling", "random", "last-query")


@pytest.fixture(scope="module", autouse=True)
def fledgling_in_use() -> None:
    """Its policies stand at four of six layers."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PoliciesPlan, PoliciesRecord]:
    parts = tuple(part for part in PARTS if part not in ("skips", "layers"))
    output = tmp_path_factory.mktemp("policies") / "study"
    plan = PoliciesPlan(output, parts=parts, ways=WAYS_ASKED, shares=(0.22,), items=1, pairs=2, steps=0.004)
    return plan, policies(plan, command="python -m studies policies", workers=0, quiet=True)


def test_every_part_is_measured_once(finished: tuple[PoliciesPlan, PoliciesRecord]) -> None:
    plan, record = finished
    assert PoliciesRecord.load(plan.output / "outcome.json") == record
    model = record.seeds[0]
    assert set(model.single) == {row.name for row in plan.rows}
    assert set(model.turns) == set(model.pictures) == {"none", "withdraw-3", *(row.name for row in plan.talked)}
    assert {len(unpacked(each.same)) for each in model.single.values()} == {len(record.kinds)}
    assert all(sum(model.stays[share_name(way, 0.22)].stays) == 8 * kept(0.22) for way in WAYS_ASKED)
    # what is there is read, and another criterion joins
    marker = plan.measured(0) / "single" / "pooling-22.json"
    before = marker.stat().st_mtime_ns
    more = policies(replace(plan, ways=("grid", "pooling")), command="again", workers=0, quiet=True)
    assert marker.stat().st_mtime_ns == before
    assert "grid-22" in more.seeds[0].single
    with pytest.raises(UsageError, match="other settings"):
        policies(replace(plan, items=2), command="")


def test_text_alone_keeps_its_bits(finished: tuple[PoliciesPlan, PoliciesRecord]) -> None:
    plan, record = finished
    found = record.seeds[0].text
    assert found is not None
    assert found.policies == len(plan.rows)
    assert found.changed == found.turned == []
    assert found.beside < 1e-3


@pytest.mark.parametrize("row", ["pooling-22", "withdraw-3", None])
def test_answers_are_those_of_an_evaluation(finished: tuple[PoliciesPlan, PoliciesRecord], row: str | None) -> None:
    plan, record = finished
    model, processor = load_model(plan.model(0))
    if row is not None:
        policy_of(next(each.settings for each in plan.rows if each.name == row)).attach(model)
    asked = evaluate(model, processor, [visual(n=8)], batch_size=64).tasks["visual"].items
    here = Measuring(plan, 0)
    with torch.no_grad():
        answers = here.answers(next((each for each in plan.rows if each.name == row), None), here.asked)
    # a model of one step goes on for ever, and short answers are cut sooner
    for item, answer, kind in zip(asked, answers, record.kinds, strict=True):
        assert item.family == kind
        assert item.answer.startswith(answer)


def test_a_conversation_without_a_policy_is_its_prompt(finished: tuple[PoliciesPlan, PoliciesRecord]) -> None:
    here = Measuring(finished[0], 0)
    talks, alone = here.talks
    with torch.no_grad():
        assert here.chats(None, talks) == here.answers(None, talks)
    assert [talk.gold for talk in talks] == [each.gold for each in alone]
    assert all(talk.first is not None and talk.first.length < talk.prompt.length for talk in talks)


def test_right_answers_fit_and_every_policy_can_be_had(finished: tuple[PoliciesPlan, PoliciesRecord]) -> None:
    plan = PoliciesPlan(finished[0].output, items=12)
    here = Measuring(replace(plan, steps=finished[0].steps), 0)
    model, processor = load_model(here.plan.model(0))
    assert longest(processor, [*here.asked, *here.talks[0]]) <= SHORT
    rows = plan.rows
    assert len({row.name for row in rows}) == len(rows) > 130
    for row in rows:
        with policy_of(row.settings).on(model):
            pass
    assert sum(changes_text(row.settings) for row in rows) == 8
    assert set(TALKED) <= set(SHARES)


def test_stages_have_as_many_tokens_over_all_layers_as_one() -> None:
    assert [kept(share) for share in SHARES] == [13, 8, 6, 3]
    for name in ("feather", "pyramid"):
        way = next(way for way in WAYS if way.name == name)
        for share in SHARES:
            stages = way.settings(share)["stages"]
            ends = [*(layer for layer, _ in stages[1:]), LAYERS]
            spent = sum((end - layer) * left for (layer, left), end in zip(stages, ends, strict=True))
            assert spent == pytest.approx((LAYERS - 1) * share, abs=0.002)


def test_estimates_carry_trainings_and_items() -> None:
    marks = [True, False, True, True]
    assert unpacked(packed(marks)) == marks
    values = np.array([[1.0, 0, 1, 0], [1, 1, 1, 0]])
    found = mean(values)
    assert found.value == pytest.approx(0.625)
    assert found.low < 0.5 < 0.75 < found.high
    unseen = 0.025 ** (1 / 5)  # of five items, each like the others
    assert (mean(np.ones((3, 5))).low, mean(np.ones((3, 5))).high) == (pytest.approx(unseen), 1)
    gap = apart(values[:, :2], values[:, 2:])
    assert gap.value == pytest.approx(0.75 - 0.5)
    chosen = among(values, np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]), (0.0, 1.0))
    assert chosen is not None
    assert chosen.value == pytest.approx(0.5)
    assert among(values, np.zeros((2, 4)), (0.0, 1.0)) is None


def made(right: Mapping[str, float], *, changed: bool = False, late: float = 0.5) -> PoliciesRecord:
    """Three made-up models: 80 % right without a policy; under one, this share of that, by the start of its name."""
    rng = np.random.default_rng(0)
    plan = PoliciesPlan(Path("nowhere"), items=40)
    seeds = {}
    for seed in range(3):
        none = rng.random(320) < 0.8

        def under(row: str, none: np.ndarray = none) -> Answers:
            share = next((share for start, share in right.items() if row.startswith(start)), 0.5)
            kept_right = none & (rng.random(320) < share)
            return Answers(right=packed(kept_right.tolist()), same=packed(kept_right.tolist()))

        def talk(share: float) -> Talks:
            early, then = (packed((rng.random(200) < each).tolist()) for each in (0.5, share))
            return Talks(alone=early, prompt=early, chat=then)

        talks = {"none": Talks(**dict.fromkeys(("alone", "prompt", "chat"), packed([True] * 200)))}
        bottom = [0] * 15 + [10] * 10
        seeds[seed] = SeedRecord(
            none=packed(none.tolist()),
            single={row.name: under(row.name) for row in plan.rows},
            turns={**talks, **{row.name: talk(late) for row in plan.talked}},
            pictures={name: packed([True, False]) for name in ("none", *(row.name for row in plan.talked))},
            stays={
                **{share_name(way.name, 0.22): Stays(prompts=10, stays=[4] * TOKENS) for way in WAYS},
                **{name: Stays(prompts=10, stays=bottom) for name in ("last-query-22", "knee", "knee-both")},
            },
            first=First(
                layers=(1, 2, 3, 4, 5), kinds=["colour"] * 2, nats=[[0.5] * 5] * 2, agreed=[[1] * 5, [0] * 5],
                lengths=[1, 4], chosen=None if seed else 5,
            ),
            text=Text(policies=9, logits=100, changed=["grid-50"] if changed else [], beside=1e-6, turned=[], host=0.0,
                      largest=20.0, meant=1, meant_changed=1),
        )  # fmt: skip
    return PoliciesRecord(
        command="", created="", environment={}, seconds=0, settings={"shares": list(SHARES)},
        kinds=[KINDS[index % 8] for index in range(320)], seeds=seeds,
    )  # fmt: skip


def said(record: PoliciesRecord, start: str) -> str:
    return next(sentence for sentence in verdict(record) if sentence.startswith(start))


def test_verdicts_follow_the_answers() -> None:
    good = made({"duplicates": 0.9, "last-query": 1.0, "withdraw": 1.0, "skip-mlp-from": 1.0, "pooling-1": 0.7})
    assert "above it FastV (+" in said(good, "Down-sampling")
    assert "DART (+" in said(good, "Random is hard to beat (UniPruneBench): so it is here")
    assert "is not contradicted" in said(good, "Half of the image")
    assert "at half of the depth it is not contradicted" in said(good, "Upper layers")
    assert "with 1, 2, 3, 4 and 5 of 6 layers" in said(good, "Upper layers")
    assert "seed by seed, 5, none and none" in said(good, "Upper layers")
    assert "it holds." in said(good, "Image tokens may skip")
    assert "shown for nobody" in said(good, "Pruned conversations")
    assert "not a bit" in said(good, "Text alone")
    assert "so it does" in said(good, "Early attention")
    bad = made({"pooling": 0.9, "skip-mlp-from": 0.3}, changed=True, late=0.1)
    assert "no criterion is above it" in said(bad, "Down-sampling")
    assert "does not hold" in said(bad, "Half of the image")
    assert "it does not hold" in said(bad, "Upper layers")
    assert "it does not hold" in said(bad, "Image tokens may skip")
    assert "shown for" in said(bad, "Pruned conversations")
    assert "nobody" not in said(bad, "Pruned conversations")
    assert "changed by grid-50" in said(bad, "Text alone")


def test_what_is_hard_is_what_down_sampling_gets_wrong() -> None:
    record = made({})
    split = hard(record, 0.22)
    assert (split.easy + split.hard == record.none).all()
    assert (record.right("pooling-22") * split.hard == 0).all()


def test_who_is_told_from_chance_on_hard_questions_is_said_by_side() -> None:
    record = made({"duplicates": 0.9, "tower-similarity": 0.05})
    one = record.model_copy(update={"seeds": {0: record.seeds[0]}})
    words = said(record, "What down-sampling gets wrong")
    assert "seeds alone (3): above it" in words
    above, rest = words.split("; below it ")
    below, alike = rest.split("; not told from it ")
    assert "DART (+" in above
    assert below.startswith("the tower's similarity (-")
    assert "FastV" in alike
    # one training has no interval: nobody is told from chance
    assert "seeds alone (1): not told from it DivPrune" in said(one, "What down-sampling gets wrong")


@pytest.mark.parametrize("left_out", ["pooling", "random"])
def test_a_report_without_plain_ways_has_no_hard_questions(left_out: str) -> None:
    record, gone = made({}), {share_name(left_out, share) for share in SHARES}
    seeds = {
        seed: model.model_copy(update={"single": {row: each for row, each in model.single.items() if row not in gone}})
        for seed, model in record.seeds.items()
    }
    fewer = record.model_copy(update={"seeds": seeds})
    assert "DivPrune" in markdown(fewer)
    assert "hard: against random" not in markdown(fewer)
    assert verdict(fewer)
    render(report(fewer))


def test_the_report_shows_every_part() -> None:
    record = made({})
    page = render(report(record))
    for name in ("The frontier", "Withdrawal", "Skipping", "Conversations", "Text"):
        assert name in page
    assert set(figures(record)) == {"shares", "position", "withdrawal", "skips"}
    assert table(record).row_count == 1 + len(WAYS) + 2
    rows = [line for line in markdown(record).splitlines() if line.startswith("| ")]
    assert len([row for row in rows if "DivPrune" in row]) == 4 + 1 + 1
    assert len(skip_rows()) > 40


def test_impossible_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'speed'"):
        PoliciesPlan(tmp_path, parts=("speed",))
    with pytest.raises(UsageError, match="no criterion 'clip'"):
        PoliciesPlan(tmp_path, ways=("clip",))
    with pytest.raises(UsageError, match="between 0 and 1"):
        PoliciesPlan(tmp_path, shares=(1.0,))
    with pytest.raises(UsageError, match="between two of them"):  # what is kept of 0.33 would be taken for it
        PoliciesPlan(tmp_path, shares=(0.33, 0.334))


def test_the_page_has_the_tables_and_verdicts_of_its_record() -> None:
    page = (ROOT / "docs" / "results" / "policies.md").read_text()
    record = PoliciesRecord.load(ROOT / "benchmarks" / "results" / "policy-study.json")
    rows = [row for row in markdown(record).replace("\N{NO-BREAK SPACE}", " ").splitlines() if row.startswith("|")]
    assert len(rows) > 100
    assert not [row for row in rows if row not in page]
    words = " ".join(page.replace("*", "").split())
    assert not [said for said in verdict(record) if " ".join(said.split()) not in words]
