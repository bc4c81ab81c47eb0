"""Pairing two runs: the counts, the refusals, the flips; and combining seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alula.errors import EvaluationError, UsageError
from alula.evaluation import Conditions, Decoding, ItemResult, PairedRun, RunResult, TaskResult, across_seeds, compare
from alula.evaluation.pairing import compare_scores
from alula.stats import Resampling, Sums, bootstrap, difference, resample

CONDITIONS = Conditions(
    decoding=Decoding(), batch_size=8, dtype="float32", device="cpu", backend={"model": "sdpa"}, versions={"torch": "2"}
)


def made_run(scores: list[int], name: str = "m", tag: str = "", clusters: int = 0, **changes: Any) -> RunResult:
    items = [
        ItemResult(
            id=f"i{k}",
            family=f"f{k % 3}",
            prompt_hash=f"h{k}{tag}",
            token_ids=str(k),
            gold="g",
            answer="g" if score else f"wrong by {name}",
            score=score,
            cluster=f"c{k // clusters}" if clusters else "",
        )
        for k, score in enumerate(scores)
    ]
    task = TaskResult(name="t", title="T", max_new_tokens=8, settings={}, items=items)
    conditions = CONDITIONS.model_copy(update=changes)
    return RunResult(model=name, fingerprint="x", conditions=conditions, tasks={"t": task}, seconds=1.0)


RNG = np.random.default_rng(2)
BASE = (RNG.random(90) < 0.9).astype(int).tolist()
TUNED = np.where(RNG.random(90) < 0.3, RNG.random(90) < 0.5, BASE).astype(int).tolist()


def test_counts_and_values_against_a_loop() -> None:
    result = compare(made_run(BASE, "base"), made_run(TUNED, "tuned")).tasks["t"]
    lost = [k for k in range(90) if BASE[k] and not TUNED[k]]
    gained = [k for k in range(90) if TUNED[k] and not BASE[k]]
    assert (result.overall.lost, result.overall.gained) == (len(lost), len(gained))
    assert result.overall.base.value == pytest.approx(sum(BASE) / 90)
    assert result.overall.tuned.value == pytest.approx(sum(TUNED) / 90)
    assert result.overall.difference.value == pytest.approx((sum(TUNED) - sum(BASE)) / 90)
    assert result.overall.retention.value == pytest.approx(sum(TUNED) / sum(BASE))
    assert result.overall.difference.low < result.overall.difference.value < result.overall.difference.high
    assert {flip.id for flip in result.lost} <= {f"i{k}" for k in lost}
    assert result.gained[0].tuned_answer == "g"
    assert result.identical_answers == sum(a == b == 1 for a, b in zip(BASE, TUNED, strict=True))
    for index in range(3):
        part = result.families[f"f{index}"]
        assert part.n == 30
        assert part.lost == sum(k % 3 == index for k in lost)
        assert part.p_value <= part.p_holm <= 1


def test_a_model_against_itself_changes_nothing() -> None:
    result = compare(made_run(BASE), made_run(BASE)).tasks["t"].overall
    assert (result.lost, result.gained, result.p_value) == (0, 0, 1.0)
    assert result.retention.value == 1
    assert result.exact == ("low", "high")


def exactly(none_of: int, confidence: float = 0.95) -> float:
    """scipy's exact interval of none of so many."""
    return stats.binomtest(0, none_of).proportion_ci(confidence, method="exact").high


def test_where_nothing_moved_the_bound_is_the_exact_one() -> None:
    result = compare(made_run(BASE), made_run(BASE)).tasks["t"].overall
    right = sum(BASE)
    assert result.retention.low == pytest.approx(1 - exactly(right))
    assert result.retention.high == pytest.approx(1 + exactly(90) * 90 / right)
    assert (result.difference.low, result.difference.high) == pytest.approx((-exactly(90), exactly(90)))
    wide = compare(made_run(BASE), made_run(BASE), how=Resampling(confidence=0.99)).tasks["t"].overall
    assert wide.retention.low == pytest.approx(1 - exactly(right, 0.99))


def test_items_of_one_cluster_bound_as_one() -> None:
    """90 items in 30 dialogues of three are 30 units; clusters of 1 and of 5 count by Kish's effective number."""
    alike = compare(made_run([1] * 90, clusters=3), made_run([1] * 90, clusters=3)).tasks["t"].overall
    assert alike.retention.low == pytest.approx(1 - exactly(30))
    base = np.ones(36)
    cluster = np.array([0] * 5 + [*range(1, 32)])
    found = compare_scores(base, base, cluster)
    effective = 36**2 / (5**2 + 31)
    assert found.difference.low == pytest.approx(-(1 - 0.025 ** (1 / effective)))


def test_a_side_on_which_nothing_moved_widens_alone() -> None:
    """Items gained and none lost: the bootstrap bounds gains, the exact bound losses, and they add in squares."""
    tuned = [1] * 90
    result = compare(made_run(BASE), made_run(tuned)).tasks["t"].overall
    assert result.exact == ("low",)
    scores = np.array(BASE, dtype=float), np.ones(90), np.arange(90)
    sums = Sums.of(*scores)
    plain = bootstrap(sums, resample(sums), difference)
    assert result.difference.high == plain.high
    assert result.difference.low == pytest.approx(plain.value - np.hypot(plain.value - plain.low, exactly(90)))
    back = compare(made_run(tuned), made_run(BASE)).tasks["t"].overall
    assert back.exact == ("high",)
    assert back.retention.high <= 1
    assert compare(made_run(BASE), made_run(TUNED)).tasks["t"].overall.exact == ()


def test_part_marks_that_fell_are_seen() -> None:
    base, cluster = np.full(20, 0.5), np.arange(20)
    tuned = base.copy()
    tuned[3] = 0.4
    found = compare_scores(base, tuned, cluster)
    assert (found.lost, found.exact) == (0, ("high",))


def test_rare_losses_are_covered() -> None:
    """Where one of fifty questions is lost on average, the bootstrap alone misses the truth in a third of all runs."""
    rng, share, n = np.random.default_rng(5), 0.02, 50
    base, how = np.ones(n), Resampling(resamples=200)
    covered = alone = 0
    for _ in range(300):
        tuned = (rng.random(n) >= share).astype(float)
        found = compare_scores(base, tuned, np.arange(n), how).difference
        sums = Sums.of(base, tuned)
        plain = bootstrap(sums, resample(sums, how), difference)
        covered += found.low <= -share <= found.high
        alone += plain.low <= -share <= plain.high
    assert covered / 300 >= 0.95
    assert alone / 300 < 0.8


def test_seeds_that_lost_nothing_have_the_exact_bound_too() -> None:
    one = compare(made_run(BASE), made_run(BASE)).tasks["t"]
    same = across_seeds([one, one, one]).overall
    assert same.exact == ("low", "high")
    assert same.retention is not None
    assert same.retention.mean.low == pytest.approx(1 - exactly(sum(BASE)))
    assert same.difference.mean.high == pytest.approx(exactly(90))
    other = compare(made_run(BASE, tag="'"), made_run(BASE, tag="'")).tasks["t"]
    apart = across_seeds([one, other]).overall
    assert apart.difference.mean.high == pytest.approx(exactly(180))
    worse = compare(made_run(BASE), made_run([0, *BASE[1:]])).tasks["t"]
    assert BASE[0] == 1
    assert across_seeds([one, worse]).overall.exact == ("high",)


def test_swapping_the_models_mirrors_the_result() -> None:
    there = compare(made_run(BASE), made_run(TUNED)).tasks["t"].overall
    back = compare(made_run(TUNED), made_run(BASE)).tasks["t"].overall
    assert there.difference.value == -back.difference.value
    assert there.difference.low == pytest.approx(-back.difference.high, abs=0.02)
    assert (there.lost, there.gained, there.p_value) == (back.gained, back.lost, back.p_value)


def test_a_base_that_knows_nothing_has_no_retention() -> None:
    result = compare(made_run([0] * 9), made_run([1] * 9)).tasks["t"].overall
    assert result.retention is None
    assert result.difference.value == 1


def test_flips_are_spread_over_families_and_counted_in_full() -> None:
    result = compare(made_run([1] * 90), made_run([0] * 90), kept_flips=7).tasks["t"]
    assert result.overall.lost == 90
    assert sorted(flip.family for flip in result.lost) == ["f0", "f0", "f0", "f1", "f1", "f2", "f2"]


def test_columns_recompute_the_result() -> None:
    result = compare(made_run(BASE, clusters=3), made_run(TUNED, clusters=3)).tasks["t"]
    assert np.mean(result.columns.base) == result.overall.base.value
    assert max(result.columns.cluster) == 29
    assert [result.columns.labels["family"].values[k] for k in result.columns.labels["family"].index[:3]] == [
        "f0",
        "f1",
        "f2",
    ]


def test_items_with_the_same_prompt_are_one_unit() -> None:
    base, tuned = made_run([1, 0, 1, 1]), made_run([1, 0, 0, 1])
    for run in (base, tuned):
        run.tasks["t"].items[3].prompt_hash = run.tasks["t"].items[0].prompt_hash
    assert compare(base, tuned).tasks["t"].columns.cluster == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made_run(BASE, tag="'"), "prompt hashes of item 'i0'"),
        (made_run(BASE[:-1]), "90 and 89 items"),
        (made_run(BASE, dtype="bfloat16"), "differ in dtype: float32 against bfloat16"),
        (made_run(BASE, decoding=Decoding(num_beams=4)), "differ in decoding"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(other: RunResult, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(made_run(BASE), other)


def test_the_first_differing_item_is_named() -> None:
    other = made_run(BASE)
    for k in (40, 17):
        other.tasks["t"].items[k].prompt_hash = "else"
    with pytest.raises(EvaluationError, match="'i17'"):
        compare(made_run(BASE), other)
    renamed = made_run(BASE)
    renamed.tasks["t"].items[3].id = "other"
    with pytest.raises(EvaluationError, match="'i3' against 'other'"):
        compare(made_run(BASE), renamed)
    rescored = made_run(BASE)
    rescored.tasks["t"].items[5].gold = "else"
    with pytest.raises(EvaluationError, match="item 'i5' was scored against"):
        compare(made_run(BASE), rescored)


def test_no_common_task() -> None:
    other = made_run(BASE)
    other.tasks = {"u": other.tasks["t"]}
    with pytest.raises(EvaluationError, match="no task in common"):
        compare(made_run(BASE), other)


def test_what_may_move_scores_is_noted() -> None:
    other = made_run(BASE, batch_size=1, backend={"model": "eager"}, versions={"torch": "3"})
    other.tasks["t"].items[0].truncated = True
    notes = compare(made_run(BASE), other).tasks["t"].notes
    assert [note.split(" differs")[0] for note in notes[:3]] == ["batch size", "backend", "torch"]
    assert "1 of 90 answers did not end within 8 tokens" in notes[3]
    # attention asked for sums computes what the stock one does, and a tower that only one model has is no difference
    grafted = made_run(BASE, backend={"model": "alula", "vision": "eager"})
    assert compare(made_run(BASE, backend={"model": "sdpa"}), grafted).tasks["t"].notes == []


def test_paired_file_round_trip(tmp_path: Path) -> None:
    result = compare(made_run(BASE), made_run(TUNED))
    assert PairedRun.load(result.save(tmp_path / "paired.json")) == result


def seeds(*tuned: list[int], tags: tuple[str, ...] = ("", "", "")) -> list[Any]:
    pairs = zip(tuned, tags, strict=False)
    return [compare(made_run(BASE, tag=tag), made_run(scores, tag=tag)).tasks["t"] for scores, tag in pairs]


def test_seeds_are_averaged() -> None:
    second, third = TUNED[::-1], BASE
    result = across_seeds(seeds(TUNED, second, third))
    values = [sum(s) / sum(BASE) for s in (TUNED, second, third)]
    assert result.same_items
    assert result.overall.retention.per_seed == pytest.approx(values)
    assert result.overall.retention.mean.value == pytest.approx(np.mean(values))
    assert result.overall.retention.deviation == pytest.approx(np.std(values, ddof=1))
    assert result.overall.lost[2] == 0
    assert list(result.groups) == ["f0", "f1", "f2"]
    assert result.groups["f1"].n == 30


def test_bounds_of_accuracies_stay_in_range() -> None:
    result = across_seeds(seeds([1] * 90, [1] * 89 + [0], [1] * 80 + [0] * 10))
    assert result.overall.tuned.mean.high == 1.0


def test_other_items_per_seed_leave_the_chance_to_the_spread() -> None:
    result = across_seeds(seeds(TUNED, TUNED[::-1], BASE, tags=("a", "b", "c")))
    assert not result.same_items
    values = result.overall.tuned.per_seed
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert result.overall.tuned.mean.low == pytest.approx(low)
    assert result.overall.tuned.mean.high == pytest.approx(min(1.0, high))


def test_one_seed_has_no_deviation() -> None:
    result = across_seeds(seeds(TUNED)).overall
    assert result.tuned.deviation is None
    assert result.tuned.mean.low < result.tuned.mean.value


def test_seeds_by_another_label() -> None:
    base, tuned = made_run(BASE), made_run(TUNED)
    for run in (base, tuned):
        for k, item in enumerate(run.tasks["t"].items):
            item.tags = {"kind": "text" if k < 60 else "visual", "same": "x"}
    result = compare(base, tuned).tasks["t"]
    assert list(result.columns.labels) == ["family", "kind"]  # a tag that never varies says nothing
    groups = across_seeds([result], by="kind").groups
    assert groups["text"].n == 60
    assert groups["visual"].tuned.mean.value == pytest.approx(np.mean(TUNED[60:]))
    both = across_seeds([result], by=("kind", "family")).groups
    assert both["text, f1"].n == 20
    assert sum(group.n for group in both.values()) == 90
    bare = across_seeds([result], by=())
    assert (bare.groups, bare.overall) == ({}, across_seeds([result]).overall)
    with pytest.raises(EvaluationError, match="no label 'same', only family, kind"):
        across_seeds([result], by="same")


def test_nothing_to_combine() -> None:
    with pytest.raises(EvaluationError, match="no results"):
        across_seeds([])


def test_what_is_no_run_is_refused() -> None:
    with pytest.raises(UsageError, match="a int is no run"):
        compare(1, 2)  # type: ignore[arg-type]
