"""Which precision `auto` stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alula.training import precision, train
from alula.training.precision import multiplies_bfloat16
from tests.training.conftest import MakeRecipe, rows


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_fp16\nbugs\t: bf16\n", False),
        ("", False),
    ],
)
def test_processors_say_whether_they_multiply_bfloat16(
    text: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert not multiplies_bfloat16(torch.device("cpu"))  # a system without the file
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bfloat16(torch.device("cpu")) is has


def test_auto_is_what_the_device_multiplies(recipe: MakeRecipe) -> None:
    name = "bf16" if multiplies_bfloat16(torch.device("cpu")) else "fp32"
    first = recipe(run={"precision": "auto", "device": "cpu"})
    second = recipe(run={"precision": name, "device": "cpu", "output_dir": first.output_dir + "2"})
    one, two = (train(made, quiet=True) for made in (first, second))
    assert [row["loss"] for row in rows(one.directory)] == [row["loss"] for row in rows(two.directory)]
