"""A tiny host on disk, and recipes over it that run in a second or two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from alula.data import Collator
from alula.hosts import build_host, load_host, save_host
from alula.training import Recipe, parse_recipe
from alula.training.datasets import open_data
from tests.hosts import tiny

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def host_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-shaped decoder with a SigLIP-shaped tower, about 45 thousand random weights."""
    host = build_host(tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    return save_host(host, tmp_path_factory.mktemp("hosts") / "tiny")


@pytest.fixture
def plain(host_directory: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe as the mapping a YAML file holds: one stage, changed by keywords."""

    def make(**stage: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "name": "only",
            "method": "projector",
            "train": {"projector": 1e-2},
            "data": {"sources": [{"microworld": "visual"}]},
            "steps": 3,
            "batch_size": 4,
        }
        return {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "host": {"path": str(host_directory)},
            "stages": [{**defaults, **stage}],
        }

    return make


@pytest.fixture
def recipe(plain: Callable[..., dict[str, Any]]) -> MakeRecipe:
    """The same, validated; `stages=` replaces the list of stages, other upper keys go by `run=`."""

    def make(run: dict[str, Any] | None = None, stages: list[dict[str, Any]] | None = None, **stage: Any) -> Recipe:
        raw = plain(**stage)
        if stages is not None:
            first = raw["stages"][0]
            raw["stages"] = [{**first, **each} for each in stages]
        return parse_recipe({**raw, **(run or {})})

    return make


def rows(directory: Path, *, without: tuple[str, ...] = ("seconds",)) -> list[dict[str, Any]]:
    """The metrics of a run, less what differs between two runs of the same recipe."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def batch_of(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """The big batch of a step, made without the trainer."""
    stage = recipe.stages[0]
    mixture = open_data(stage.data, seed=recipe.seed)
    processor = load_host(recipe.host.path or "").processor
    first = step * stage.batch_size
    return dict(Collator(processor)([mixture[first + n] for n in range(stage.batch_size)]))


class LastModel(TrainerCallback):
    """What the trained model says to a batch, right before it is written to disk."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = {key: value for key, value in batch.items() if key != "labels"}
        self.logits: torch.Tensor | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"].eval()
        with torch.no_grad():
            self.logits = model(**self.batch).logits
