"""Batches without padding: every token once, where it belongs, and what samples begin with once for all."""

from __future__ import annotations

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
    assert row["input_ids"].tolist() == [[5, 6, 7, 9, 9, 20, 21, 7, 9, 9, 30, 31, 32, 33, 7, 8, 40]]
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
    assert row["input_ids"].shape[1] == 2 * 7 - 2  # the two first tokens: the third stands before the image
    learnt = {**alike, "labels": alike["input_ids"].clone(), "mm_token_type_ids": torch.zeros_like(alike["input_ids"])}
    both = packed(learnt)
    assert both["input_ids"].shape[1] == 14
    assert both["labels"][0, [0, 7]].tolist() == [IGNORED, IGNORED]  # nothing of the same sample comes before these
    assert packed({key: value[:1] for key, value in alike.items()})["input_ids"].shape[1] == 7
