"""Benchmarks of released weights, in little: on a tiny host and data made here."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
from PIL import Image

from alula.hosts import build_host, save_host
from tests.hosts import tiny

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "training.py"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little pictures with long and short captions, where `alula real prepare` would put some."""
    root = tmp_path_factory.mktemp("real")
    for name in ("stamps", "emoji", "easy-vqa"):
        folder = root / "data" / name
        folder.mkdir(parents=True)
        with (folder / "train.jsonl").open("w") as lines:
            for number in range(4):
                Image.new("RGB", (32, 32), (60 * number, 90, len(name))).save(folder / f"{number}.png")
                asked = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What is this?"}]
                said = " ".join(["a", "small", "red", "circle"][: number + 1])
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
                lines.write(json.dumps({"messages": messages}) + "\n")
    save_host(build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()), root / "host")
    return root


@pytest.mark.parametrize("task", ["align", "instruct"])
def test_transformers_trainer_and_the_recipe_learn_the_same(
    task: str, training: dict[str, Any], real: Path, tmp_path: Path
) -> None:
    runs = {}
    for name in ("trainer", "all"):
        options = argparse.Namespace(
            contend=name, task=task, real=real, host=str(real / "host"), output=str(tmp_path / name), batch=4, steps=4,
            precision="fp32",
        )  # fmt: skip
        runs[name] = training["contend"](options)
        assert len(runs[name]["losses"]) == len(runs[name]["wall"]) == 4
    told = training["told"](runs, "all", options)
    assert told["loss_off"] < 1e-4
    assert told["times_trainer"] > 0 < told["memory_over_trainer"]
    assert told["times_trainer_counted"] > 1  # padding and answers' logits alone


def test_errors_of_words_are_counted() -> None:
    speech = runpy.run_path(str(FOLDER / "speech.py"))
    said, meant = ["press one now", "", "Thank you!"], ["Press two.", "goodbye", "thank you"]
    drawn = np.random.default_rng(0)
    for _ in range(200):
        one, two = (list(drawn.integers(0, 4, drawn.integers(0, 9))) for _ in range(2))
        assert speech["edit_distance"](one, two) == nltk.edit_distance(one, two)
    found = speech["error"](said, meant)
    assert found["word_error_rate"] == pytest.approx((2 + 1 + 0) / 5)  # one for two, one too many; one left out
    assert found["low"] <= found["word_error_rate"] <= found["high"]
    assert found["exact"] == pytest.approx(1 / 3)
    assert speech["bag"](said, meant) == pytest.approx(3 / 5)
