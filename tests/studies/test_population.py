"""Measuring a model on its way: what it is when loaded again, once per milestone, also after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alula
from alula.hosts import build_host, save_host
from alula.training import Recipe, parse_recipe
from studies.population import measured, read_measurement, train_measured
from tests.hosts import tiny

MakeRecipe = Callable[..., Recipe]
PROMPT = {"input_ids": torch.tensor([[7, 8, 9, 10]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build_host(tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    return save_host(made, tmp_path_factory.mktemp("hosts") / "tiny")


@pytest.fixture
def recipe(host: Path, tmp_path: Path) -> MakeRecipe:
    def make(precision: str = "fp32", name: str = "run") -> Recipe:
        stage = {
            "name": "only", "method": "full", "train": {"llm": 1e-2}, "data": {"sources": [{"microworld": "text"}]},
            "steps": 4, "batch_size": 2, "save_every": 1,
        }  # fmt: skip
        raw = {"name": "test", "device": "cpu", "host": {"path": str(host)}, "stages": [stage]}
        return parse_recipe({**raw, "output_dir": str(tmp_path / name), "precision": precision})

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measured_model_is_the_one_that_loads_again(recipe: MakeRecipe, tmp_path: Path, precision: str) -> None:
    def measure(model: Any) -> dict[str, Any]:
        assert not model.training
        return {"logits": model(**PROMPT).logits.flatten().tolist()}

    final = train_measured(recipe(precision), (2, 4), tmp_path / "measured", measure)
    model = alula.load_model(final).model
    with torch.no_grad():
        logits = model(**PROMPT).logits.flatten()
    assert torch.equal(torch.tensor(read_measurement(tmp_path / "measured", 4)["logits"]), logits)
    assert read_measurement(tmp_path / "measured", 2) != read_measurement(tmp_path / "measured", 4)


def test_a_killed_run_measures_what_is_missing(recipe: MakeRecipe, tmp_path: Path) -> None:
    asked: list[int] = []

    def sum_of(model: Any) -> dict[str, Any]:
        return {"sum": sum(float(weight.detach().sum()) for weight in model.parameters())}

    def dies_at_the_third(model: Any) -> dict[str, Any]:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sum_of(model)

    with pytest.raises(KeyboardInterrupt):
        train_measured(recipe(), (1, 2, 3, 4), tmp_path / "killed", dies_at_the_third)
    assert measured(tmp_path / "killed", (1, 2, 3, 4)) == 2
    train_measured(recipe(), (1, 2, 3, 4), tmp_path / "killed", sum_of)
    train_measured(recipe(name="whole"), (1, 2, 3, 4), tmp_path / "whole", sum_of)
    for step in (1, 2, 3, 4):
        assert read_measurement(tmp_path / "killed", step) == read_measurement(tmp_path / "whole", step)
