"""A mixture is a pure function of seed and position, fair to its weights, and the same on any number of processes."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

from alula.data import Mixture, PositionBatches, Quarantine, RecordError, open_mixture, open_source
from alula.data.errors import Place
from alula.draws import shuffled_index, shuffled_runs
from alula.errors import DataError, RecipeError, UsageError
from tests.data.conftest import ListSource, chat


def numbered(name: str, size: int, endless: bool = False) -> ListSource:
    samples = [chat("q", "a", name=f"{name}{n}") for n in range(size)]
    return ListSource(samples, name, None if endless else size)


def ids(mixture: Mixture, positions) -> list[str]:
    return [mixture[position].id for position in positions]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 17, 256, 1000])
def test_shuffles_are_permutations(size: int) -> None:
    orders = [[shuffled_index(index, size, 5, epoch) for index in range(size)] for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != list(range(size))


def test_shuffles_are_even() -> None:
    # every index lands everywhere about equally often: chi-square over 12 cells, far below any doubt
    counts = Counter(shuffled_index(3, 12, key) for key in range(6000))
    assert sum((counts[cell] - 500) ** 2 / 500 for cell in range(12)) < 40


@pytest.mark.parametrize(("size", "length"), [(12, 4), (13, 4), (100, 7), (5, 5), (9, 8), (17, 1)])
def test_runs_stand_together_and_are_shuffled(size: int, length: int) -> None:
    orders = [[shuffled_runs(index, size, length, 5, epoch) for index in range(size)] for epoch in range(6)]
    for order in orders:
        assert sorted(order) == list(range(size))
        # groups of that length, counted from the first sample on, stay whole: the rest behind them is a group too
        groups = [list(group) for _, group in itertools.groupby(order, lambda index: index // length)]
        assert all(group == sorted(group) for group in groups)
        assert len(groups) == -(-size // length)
    assert len({tuple(order) for order in orders}) > 1 or size == length
    assert length > 1 or orders[0] == [shuffled_index(index, size, 5, 0) for index in range(size)]


def test_a_source_is_drawn_in_runs_where_it_is_told(tmp_path: Path) -> None:
    lines = [{"id": f"{n}", "messages": chat("q", "a").messages} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [{"jsonl": "a.jsonl", "runs": 8, "name": "in runs"}, {"jsonl": "a.jsonl", "name": "one by one"}]
    mixture = open_mixture({"sources": sources, "text_replay": {"ratio": 0.5, "sources": sources}}, base=tmp_path)
    drawn: dict[int, list[int]] = {number: [] for number in range(4)}
    for position in range(4 * 40):
        number, index = mixture.draw(position)
        drawn[number].append(index)

    def together(order: list[int]) -> int:
        return sum(after == (before + 1) % 40 for before, after in itertools.pairwise(order))

    assert [together(drawn[number]) >= 40 * 7 / 8 - 8 for number in range(4)] == [True, False, True, False]
    for spec, where in (
        ({"sources": [{"jsonl": "a.jsonl"}, {"jsonl": "a.jsonl", "runs": 41}]}, "here.sources.1"),
        (
            {"sources": [{"jsonl": "a.jsonl"}], "text_replay": {"ratio": 0.5, "sources": [sources[0] | {"runs": 41}]}},
            "here.text_replay.sources.0",
        ),
    ):
        with pytest.raises(UsageError, match="runs of 41 samples in a source of 40") as refused:
            open_mixture(spec, base=tmp_path, key="here")
        assert refused.value.where == where
    with pytest.raises(UsageError, match="runs of 6 samples in a source of 5"):
        Mixture([numbered("a", 5)], runs=[6])
    with pytest.raises(RecipeError, match="runs"):
        open_mixture({"sources": [{"microworld": "text", "runs": 2}]}, base=tmp_path)
    with pytest.raises(UsageError, match="without end"):
        Mixture([numbered("a", 5, endless=True)], runs=[2])
    with pytest.raises(UsageError, match="one length of runs per source"):
        Mixture([numbered("a", 5)], runs=[2, 3])


def test_position_is_a_pure_function_of_the_seed() -> None:
    def build(seed: int) -> Mixture:
        return Mixture([numbered("a", 37), numbered("b", 11), numbered("c", 5, endless=True)], [5, 2, 1], seed=seed)

    positions = [*range(300), 9_999, 1_000_003, 10**9]
    in_order = ids(build(7), positions)
    backwards = ids(build(7), reversed(positions))
    assert in_order == backwards[::-1]
    assert ids(pickle.loads(pickle.dumps(build(7))), positions) == in_order
    assert ids(build(8), positions) != in_order


def test_every_epoch_visits_every_sample_once_in_a_new_order() -> None:
    mixture = Mixture([numbered("a", 7), numbered("b", 300)], [1, 2], seed=1)
    drawn = ids(mixture, range(256 * 6))
    for name, size in (("a", 7), ("b", 300)):
        own = [sample for sample in drawn if sample[0] == name]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == sorted(f"{name}{n}" for n in range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9 > 2


@pytest.mark.parametrize("weights", [[1, 1], [0.75, 0.25], [3, 2, 1, 0.01], [1e-4, 1], [1 / 3] * 3])
def test_shares_follow_the_weights_and_nothing_is_dealt_twice(weights: list[float]) -> None:
    mixture = Mixture([numbered(str(n), 10, endless=True) for n in range(len(weights))], weights, seed=3)
    dealt = [mixture.draw(position) for position in range(256 * 8)]
    assert len(set(dealt)) == len(dealt)
    for blocks in range(1, 9):
        counts = Counter(source for source, _ in dealt[: 256 * blocks])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - 256 * blocks * weight / sum(weights)) <= len(weights) / 2
            # an endless source is read from the start without a gap
            assert {k for s, k in dealt[: 256 * blocks] if s == source} == set(range(counts[source]))


def test_text_replay_is_a_fraction_of_everything() -> None:
    visual, text = open_source({"microworld": "visual"}), open_source({"microworld": "text"})
    mixture = Mixture.with_text_replay([visual], [text], 0.3, seed=2)
    for start in (0, 512, 10_240):
        share = sum(not mixture[n].images for n in range(start, start + 512)) / 512
        assert abs(share - 0.3) < 0.01
    assert len(Mixture.with_text_replay([visual], [], 0.0).sources) == 1
    with pytest.raises(UsageError, match=r"must be in \[0, 1\)"):
        Mixture.with_text_replay([visual], [text], 1.0)
    liar = Mixture.with_text_replay([text], [visual], 0.9)
    with pytest.raises(RecordError, match="replay sample holds an image"):
        [liar[n] for n in range(8)]


@pytest.mark.parametrize("micro", [None, 1, 2, 5])
def test_global_batches_do_not_depend_on_the_number_of_ranks(micro: int | None) -> None:
    def positions(world: int, start: int) -> list[list[int]]:
        ranks = [PositionBatches(5, 12, start=start, rank=r, world=world, micro_batch=micro) for r in range(world)]
        assert all(len(list(rank)) == len(rank) for rank in ranks)
        per_step = len(ranks[0]) // (5 - start)
        steps = []
        for step in range(5 - start):
            parts = [batch for rank in ranks for batch in list(rank)[step * per_step : (step + 1) * per_step]]
            assert all(micro is None or len(batch) <= micro for batch in parts)
            steps.append(sorted(position for batch in parts for position in batch))
        return steps

    one = positions(1, 0)
    assert one == [list(range(step * 12, step * 12 + 12)) for step in range(5)]
    for world in (2, 3, 4, 6, 12):
        assert positions(world, 0) == one
        assert positions(world, 3) == one[3:]  # resumed


def test_windows_are_finite_stretches() -> None:
    mixture = Mixture([numbered("a", 7)], seed=1)
    window = mixture.window(10, start=5)
    assert [sample.id for sample in window] == ids(mixture, range(5, 15))
    assert [window[n].position for n in range(len(window))] == list(range(5, 15))


def test_impossible_requests() -> None:
    for sources, weights in (([], None), ([numbered("a", 3)], [1, 2]), ([numbered("a", 3)], [0]),
                             ([numbered("a", 3)], [float("nan")]), ([ListSource([], "e")], None)):  # fmt: skip
        with pytest.raises(UsageError):
            Mixture(sources, weights)
    with pytest.raises(UsageError, match="does not divide among 5 processes"):
        PositionBatches(5, 12, world=5)
    with pytest.raises(UsageError):
        PositionBatches(5, 12, rank=2, world=2)
    with pytest.raises(IndexError):
        Mixture([numbered("a", 3)])[-1]


def test_bad_records_fail_at_once_or_are_replaced(tmp_path) -> None:
    bad = RecordError("broken", place=Place("f", 4, "x"))
    samples = [chat("q", "a", name=f"g{n}") for n in range(6)]
    source = ListSource([*samples[:3], bad, *samples[3:]])
    with pytest.raises(RecordError, match="f:4: broken"):
        ids(Mixture([source], seed=0), range(7))
    quarantine = Quarantine(tmp_path / "q" / "bad.jsonl")
    mixture = Mixture([source], seed=0, quarantine=quarantine)
    first = ids(mixture, range(21))
    assert len(first) == 21
    assert quarantine.entries() == [{"file": "f", "line": 4, "id": "x", "kind": "record", "reason": "broken"}]
    assert quarantine.counts() == {"record": 1}
    again = Mixture([source], seed=0, quarantine=Quarantine(tmp_path / "q" / "bad.jsonl"))
    assert ids(again, range(10, 21)) == first[10:]  # resumed: the same replacements
    assert quarantine.counts() == {"record": 1}  # noted again by the second process, counted once
    with open(quarantine.path, "a") as stream:
        stream.write('{"file": "cut sho')
    assert quarantine.counts() == {"record": 1}
    all_bad = Mixture([ListSource([bad])], quarantine=quarantine)
    with pytest.raises(DataError, match="100 replacements"):
        all_bad[0]


def test_mixtures_from_recipes(tmp_path) -> None:
    spec = {
        "sources": [{"microworld": "visual", "weight": 3}, {"microworld": "caption", "limit": 50, "weight": 1}],
        "text_replay": {"ratio": 0.5, "sources": [{"microworld": "text"}]},
        "seed": 4,
    }
    mixture = open_mixture(spec)
    assert mixture.shares == [0.375, 0.125, 0.5]
    for bad, where in (
        ({"sources": []}, "data.sources"),
        ({"source": []}, "data.source"),
        ({**spec, "text_replay": {"ratio": 1.5, "sources": [{"microworld": "text"}]}}, "data.text_replay.ratio"),
        ({"sources": [{"jsonl": "a"}, {"llava": "b", "split": "x"}]}, "data.sources.1.split"),
        ({"sources": [{"microworld": "text"}], "replay": 1}, "data.replay"),
    ):
        with pytest.raises(RecipeError) as caught:
            open_mixture(bad)
        assert caught.value.where == where
