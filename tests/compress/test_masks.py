"""Masks as sets against Python's sets, and files of them that are read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from alula.compress import WeightMask
from alula.errors import DataError, UsageError

SHAPES = {"layers.0.a": (5, 11), "layers.1.a": (4, 16)}


def drawn(seed: int, share: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < share for name, shape in SHAPES.items()}


def as_set(kept: dict[str, Tensor]) -> set[tuple[str, int, int]]:
    return {(name, i, j) for name, mask in kept.items() for i, j in mask.nonzero().tolist()}


def members(mask: WeightMask) -> set[tuple[str, int, int]]:
    return as_set({name: mask.unpack(name) for name in mask.shapes})


def test_algebra_is_that_of_sets() -> None:
    kept = [drawn(seed, share) for seed, share in enumerate((0.3, 0.5, 0.8))]
    a, b, c = map(as_set, kept)
    x, y, z = map(WeightMask.of, kept)
    every = as_set({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    for mask, expected in (
        (x & y, a & b), (x | y, a | b), (x ^ y, a ^ b), (x - y, a - b), (~x, every - a),
        (WeightMask.kept_by([x, y, z], 3), a & b & c), (WeightMask.kept_by([x, y, z], 1), a | b | c),
        (WeightMask.kept_by([x, y, z], 2), (a & b) | (a & c) | (b & c)),
    ):  # fmt: skip
        assert members(mask) == expected
        assert mask.density == pytest.approx(len(expected) / len(every))
        assert mask.sparsity == pytest.approx(1 - len(expected) / len(every))
        assert sum(mask.count(name) for name in SHAPES) == len(expected)
    with pytest.raises(UsageError, match="4 cannot be asked"):
        WeightMask.kept_by([x, y, z], 4)
    with pytest.raises(UsageError, match="of different matrices"):
        WeightMask.kept_by([x, WeightMask.of({"layers.0.a": kept[0]["layers.0.a"]})], 1)


def test_overlap_by_chance_is_what_random_masks_reach() -> None:
    shapes = {"layers.0.a": (200, 100)}
    found = [
        (WeightMask.random(shapes, 0.5, seed=seed).iou(WeightMask.random(shapes, 0.3, seed=100 + seed)))["layers.0.a"]
        for seed in range(20)
    ]
    a, b = WeightMask.random(shapes, 0.5), WeightMask.random(shapes, 0.3)
    assert a.iou_by_chance(b)["layers.0.a"] == pytest.approx(np.mean(found), abs=0.003)
    assert a.iou_by_chance(a)["layers.0.a"] == pytest.approx((1 - 0.5) / (1 + 0.5))
    assert np.isnan((a - a).iou_by_chance(a - a)["layers.0.a"])


def test_what_made_a_mask_comes_back(tmp_path: Path) -> None:
    a = WeightMask.of(drawn(0, 0.5), {"model": "m", "settings": {"sparsity": 0.5}})
    b = WeightMask.of(drawn(1, 0.5), {"model": "m"})
    both = WeightMask.load((a & b).save(tmp_path / "both.safetensors"))
    assert members(both) == members(a) & members(b)
    assert both.made["model"] == "m"
    assert both.made["of"][0]["settings"] == {"sparsity": 0.5}
    assert "model" not in (a | WeightMask.of(drawn(1, 0.5), {"model": "n"})).made


@pytest.mark.parametrize("broken", ["text", "names", "dtype", "shape", "tail", "made", "cut"])
def test_files_are_read_strictly(broken: str, tmp_path: Path) -> None:
    file, bits = tmp_path / "mask.safetensors", dict(WeightMask.of(drawn(0, 0.5)).bits)
    facts: dict[str, Any] = {"shapes": json.dumps(SHAPES), "made": "{}"}
    match broken:
        case "names":
            bits["layers.2.a"] = bits.pop("layers.1.a")
        case "dtype":
            bits["layers.0.a"] = bits["layers.0.a"].astype(np.int32)
        case "shape":
            bits["layers.0.a"] = bits["layers.0.a"][:4].copy()
        case "tail":  # 11 columns leave five bits of the second byte that mean nothing
            bits["layers.0.a"] = bits["layers.0.a"] | np.uint8(1)
        case "made":
            facts["made"] = "[]"
    safetensors.numpy.save_file(bits, file, facts)
    if broken == "text":
        file.write_text("no mask")
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError):
        WeightMask.load(file)
