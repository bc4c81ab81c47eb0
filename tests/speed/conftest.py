"""A saved random host, questions for it, and one small measurement that several tests read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import alula
from alula.evaluation import data_task, evaluate
from alula.hosts import save_host
from alula.speed import Plan, Speed, measure
from alula_fledgling.microworld import export_llava, visual_items
from tests.hosts import tiny

GRID = """
alula_policies:
  withdrawn: {policy_type: withdraw, layer: 1}
  pooled: {policy_type: prune, stages: [[0, 0.5]], criterion: pooling}
  both:
    - {policy_type: prune, stages: [[1, 0.5]]}
    - {policy_type: skip, part: mlp, layers: [1]}
  outside: {policy_type: withdraw, layer: 7}
"""


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock LLaVA directory of two layers with 16 tokens to an image, random."""
    path = tmp_path_factory.mktemp("speed") / "llava"
    llm = tiny.decoder("llama", seed=1)
    save_host(alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer()), path)
    return path


@pytest.fixture(scope="session")
def data(llava: Path) -> Path:
    """Questions of the microworld, to every second of which what the model says is the right answer."""
    file = export_llava(visual_items(8, split="test", seed=0), llava.parent / "data")
    run = evaluate(*alula.load_model(llava), [data_task(file)], batch_size=3, max_new_tokens=3)
    records, (task,) = json.loads(file.read_text()), run.tasks.values()
    for record, item in zip(records[::2], task.items[::2], strict=True):
        record["conversations"][-1]["value"] = item.answer
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="session")
def grid(llava: Path) -> Path:
    path = llava.parent / "grid.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture(scope="session")
def small(llava: Path, data: Path, grid: Path) -> tuple[Plan, Speed]:
    """A measurement of `llava`."""
    plan = Plan(
        output=llava.parent / "out",
        model=str(llava),
        data=data,
        images=data.parent / "images",
        grid=grid,
        samples=8,
        rounds=2,
        timed=1,
        steps=2,
        batch_size=3,
        max_new_tokens=3,
    )
    return plan, measure(plan, alula.load_model)
