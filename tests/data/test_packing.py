"""Batches without padding: every token once, where it belongs, and what samples begin with once for all."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from alula.data.collate import IGNORED
from alula.data.packing import LAYOUT, narrowed, packed

SAMPLES = [
    ([5, 6, 7, 9, 9, 20, 21], 5),
    ([5, 6, 7, 9, 9, 30, 31, 32, 33], 6),
    ([5, 6, 7, 8, 40], 4),
]
"""ids, and from where they are learnt; 9 stands for an image, and 5 6 7 begin all"""


def batch(side: str) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in SAMPLES) + 1
    made = {key: [] for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")}
    for ids, start in SAMPLES:
        rows = {
            "input_ids": (ids, 0),
            "attention_mask": ([1] * len(ids), 0),
            "labels": ([IGNORED] * start + ids[start:], IGNORED),
            "mm_token_type_ids": ([int(token == 9) for token in ids], 0),
        }
        for key, (row, fill) in rows.items():
            gap = [fill] * (length - len(ids))
            made[key].append([*gap, *row] if side == "left" else [*row, *gap])
    return {key: torch.tensor(value) for key, value in made.items()} | {"pixel_values": torch.ones(2, 3)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_sample_is_found_in_the_row(side: str) -> None:
    given = batch(side)
    row = packed(given)
    layout = row[LAYOUT]
    assert row["input_ids"].tolist() == [[5, 6, 7, 9, 9, 20, 21, 9, 9, 30, 31, 32, 33, 8, 40]]
    for number, (ids, _) in enumerate(SAMPLES):
        at = layout["members"][number, : len(ids)]
        assert row["input_ids"][0, at].tolist() == ids
        assert row["position_ids"][0, at].tolist() == list(range(len(ids)))
    # each token of the row is read where its sample has it
    flat = layout["members"].flatten()
    assert flat[layout["places"]].tolist() == list(range(row["input_ids"].shape[1]))
    assert row["pixel_values"] is given["pixel_values"]
    assert torch.equal(row["attention_mask"], given["attention_mask"])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pack", [False, True])
def test_logits_are_asked_for_where_labels_are(side: str, pack: bool) -> None:
    """What is learnt, as pairs of a token and the next, is the same as in the padded batch."""
    given = batch(side)
    row = packed(given) if pack else given
    asked = narrowed(row)
    keep = asked["logits_to_keep"]
    assert len(keep) == asked["labels"].shape[1] < row["labels"].shape[1]
    found = sorted(
        (int(row["input_ids"][number, keep[at]]), int(label))
        for number, labels in enumerate(asked["labels"])
        for at, label in enumerate(labels[1:])
        if label != IGNORED
    )
    assert found == sorted(pair for ids, start in SAMPLES for pair in zip(ids[start - 1 :], ids[start:], strict=False))


def test_what_is_learnt_from_or_is_no_text_is_shared_by_none() -> None:
    alike = {key: value[:1].repeat(2, *[1] * (value.ndim - 1)) for key, value in batch("right").items()}
    row = packed(alike)
    assert row["input_ids"].shape[1] == 2 * 7 - 3  # the tokens before the image: nobody knows whether it is the same
    learnt = {**alike, "labels": alike["input_ids"].clone(), "mm_token_type_ids": torch.zeros_like(alike["input_ids"])}
    both = packed(learnt)
    assert both["input_ids"].shape[1] == 14
    assert both["labels"][0, [0, 7]].tolist() == [IGNORED, IGNORED]  # nothing of the same sample comes before these
    assert packed({key: value[:1] for key, value in alike.items()})["input_ids"].shape[1] == 7


def talk(draw: random.Random, system: int, picture: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, kinds and labels of a sample, and its pictures, of four tokens 9 each; few words and pictures, so that many
    begin alike, in the midst of words and of pictures alike."""
    ids, kinds, labels, pictures = [1] * system, [0] * system, [IGNORED] * system, []
    for _ in range(draw.randint(1, 2)):
        for _ in range(draw.randint(0, 2)):
            pictures.append(draw.randint(0, 1))
            ids, kinds = ids + picture, kinds + [int(token == 9) for token in picture]
            labels = labels + [IGNORED] * len(picture)
        words = [draw.randint(2, 3) for _ in range(draw.randint(0, 2))]
        answer = [draw.randint(4, 5) for _ in range(draw.randint(1, 2))]
        ids, kinds = [*ids, *words, *answer], kinds + [0] * (len(words) + len(answer))
        labels = [*labels, *[IGNORED] * len(words), *answer]
    return ids, kinds, labels, pictures


def padded(samples: list[Any], side: str) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, *_ in samples) + 1
    made: dict[str, list[list[int]]] = {}
    for ids, kinds, labels, _ in samples:
        gap = length - len(ids)
        rows = (ids, 0), ([1] * len(ids), 0), (labels, IGNORED), (kinds, 0)
        names = "input_ids", "attention_mask", "labels", "mm_token_type_ids"
        for name, (row, fill) in zip(names, rows, strict=True):
            made.setdefault(name, []).append([*[fill] * gap, *row] if side == "left" else [*row, *[fill] * gap])
    batch = {name: torch.tensor(rows) for name, rows in made.items()}
    pictures = [number for *_, shown in samples for number in shown]
    if pictures:
        batch["pixel_values"] = torch.stack([torch.full((1, 2, 2), float(number)) for number in pictures])
    return batch


@pytest.mark.parametrize("seed", range(60))
def test_samples_share_what_they_begin_with_pictures_too(seed: int) -> None:
    draw = random.Random(seed)
    picture = [[9, 9, 9, 9], [9, 9, 8, 9, 9]][seed % 2]  # in one stretch, or row by row
    samples = [talk(draw, draw.choice([0, 2]), picture) for _ in range(draw.randint(1, 7))]
    batch = padded(samples, draw.choice(["left", "right"]))
    row, apart = packed(batch), packed(batch, share_pictures=False)
    told = packed({**batch, "image_sizes": torch.tensor([[2, 2]])})
    for each in (row, apart, told):
        assert_holds(each, samples)
    assert row["input_ids"].shape[1] <= apart["input_ids"].shape[1] <= sum(len(own) for own, *_ in samples)
    # further tensors may say how many tokens each picture has
    for each in (apart, told):
        assert each.get("pixel_values") is batch.get("pixel_values")
    assert torch.equal(told["input_ids"], apart["input_ids"])


def assert_holds(row: dict[str, Any], samples: list[Any]) -> None:
    """All samples are found in the row, with their pictures, and each learns what it learns by itself."""
    ids, kinds, labels = (row[name][0].tolist() for name in ("input_ids", "mm_token_type_ids", "labels"))
    # which picture stands at a token, and which of its four tokens it is: those of the row stand whole and in order
    marks = [at for at, kind in enumerate(kinds) if kind]
    shown = [int(picture.mean()) for picture in row.get("pixel_values", [])]
    assert len(marks) == 4 * len(shown)
    stands = {at: (shown[number // 4], number % 4) for number, at in enumerate(marks)}
    foretold: list[tuple[tuple[Any, ...], int]] = []
    for number, (own, own_kinds, own_labels, pictures) in enumerate(samples):
        at = row[LAYOUT]["members"][number, : len(own)].tolist()
        assert [ids[place] for place in at] == own
        assert [kinds[place] for place in at] == own_kinds
        assert row["position_ids"][0, at].tolist() == list(range(len(own)))
        assert [stands[place] for place in at if kinds[place]] == [(each, k) for each in pictures for k in range(4)]
        # all that a token of the row hears of is what it hears of in its sample
        assert at == sorted(at)
        foretold += [(tuple(at[:end]), label) for end, label in enumerate(own_labels) if end and label != IGNORED]
    # what is learnt is learnt once, from the row's own predecessor, which has the sample's tokens before it
    found = [(at - 1, label) for at, label in enumerate(labels) if label != IGNORED]
    assert sorted(found) == sorted((before[-1], label) for before, label in foretold)
    flat = row[LAYOUT]["members"].flatten()
    assert flat[row[LAYOUT]["places"]].tolist() == list(range(len(ids)))


def test_a_picture_about_which_samples_ask_different_things_stands_once() -> None:
    def asks(picture: int, word: int) -> tuple[list[int], list[int], list[int], list[int]]:
        ids = [1, 9, 9, 9, 9, 2, word, 3, 40 + word]
        return ids, [0, 1, 1, 1, 1, 0, 0, 0, 0], [*[IGNORED] * 8, ids[-1]], [picture]

    batch = padded([asks(0, 5), asks(1, 5), asks(0, 6), asks(0, 7), asks(1, 5)], "right")
    row = packed(batch)
    # the questions about the second picture are the same: each answer stands behind what is learnt from in none
    assert row["input_ids"][0].tolist() == [
        1, *[9] * 4, 2, 5, 3, 45, *[9] * 4, 2, 5, 3, 45, 6, 3, 46, 7, 3, 47, 3, 45
    ]  # fmt: skip
    assert row["pixel_values"].mean(dim=(1, 2, 3)).tolist() == [0.0, 1.0]
    # further tensors may say how many tokens each picture has
    told = packed({**batch, "image_sizes": torch.tensor([[2, 2]] * 5)})
    assert told["input_ids"].shape[1] == 5 * 9 - 4
    assert told["pixel_values"] is batch["pixel_values"]
