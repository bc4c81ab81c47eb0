"""Two real processes under FSDP2, one with images and one with text only: no hang, and the numbers of one process."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alula import grafts
from alula.data import Collator, MixtureSpec, open_mixture
from alula.hosts import load_host
from alula.training import load_recipe
from alula.training.datasets import open_data
from alula.training.participation import lockstep
from alula.training.parts import find_parts, select
from alula.training.stage import blank_image
from alula_fledgling.microworld import export_jsonl, text_items, visual_items
from tests.forked import Forked, ended
from tests.training.conftest import rows

SECONDS = 240  # a hang is a failure; the run itself takes some 30 s on a free machine
BATCH, STEPS = 8, 3
SAMPLES = BATCH * (STEPS + 1)

STAGES: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "train": {"llm": 1e-3, "projector": 1e-2, "tower": 1e-3}},
    "frozen-tower": {"method": "full", "train": {"llm": 1e-3, "projector": 1e-2}, "feature_cache": {"memory_mb": 8}},
    "packed": {
        "method": "full",
        "train": {"llm": 1e-3, "projector": 1e-2},
        "packing": True,
        "logits": "supervised",
    },
    "lora": {"method": "lora", "train": {"lora": 1e-2, "projector": 1e-2}, "lora": {"rank": 4, "tower": True}},
    "wings": {"method": "wings", "train": {"wings": 1e-2, "projector": 1e-2}, "wings": {"rank": 4}},
    "paper-gate": {
        "method": "wings",
        "train": {"wings": 1e-2, "projector": 1e-2},
        "wings": {"rank": 4, "gate": "paper"},
    },
}

READING: dict[str, dict[str, Any]] = {
    "browse": {"method": "browse", "train": {"browse.condition": 1e-2, "projector": 1e-2}},
    "aim": {
        "method": "aim",
        "train": {"aim": 1e-2},
        "aim": {"shots": [1, 2]},
        "data": {"sources": [{"microworld": "episode"}]},
    },
}
"""methods that read before they answer"""


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that, in the order of seed 0, gives the first process batches with images and the second one text only."""
    folder = tmp_path_factory.mktemp("divided")
    every = [*visual_items(SAMPLES, split="train", seed=0), *text_items(SAMPLES, split="train", seed=0)]
    file = export_jsonl(every, folder / "all")
    lines = file.read_text().splitlines()
    pictures, texts = lines[:SAMPLES], lines[SAMPLES:]
    ordered = [""] * SAMPLES
    file.write_text("\n".join(pictures) + "\n")  # any file of the right length tells the order
    mixture = open_mixture(MixtureSpec.model_validate({"sources": [{"jsonl": str(file)}], "seed": 0}))
    for position in range(SAMPLES):
        with_image = position % 4 < 2  # micro-batches of two: even ones go to the first process
        ordered[mixture.draw(position)[1]] = (pictures if with_image else texts).pop()
    file.write_text("\n".join(ordered) + "\n")
    return file


def written(plain: Callable[..., dict[str, Any]], divided: Path, folder: Path, stage: str, **run: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = plain(
        **{"data": {"sources": [{"jsonl": str(divided)}]}, **{**STAGES, **READING}[stage]},
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=2,
        save_every=1,
        schedule={"kind": "constant", "warmup": 0},
    )
    raw = copy.deepcopy({**raw, "output_dir": str(folder / stage), **run})
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def launch(recipes: list[Path], processes: int) -> None:
    """Run the worker, in processes as `torchrun` starts them; where one hangs or fails, none is left."""
    worker, words = Path(__file__).with_name("distributed_worker.py"), [*map(str, recipes)]
    port = 29400 + os.getpid() % 500
    each = [(rank, processes, port) for rank in range(processes)] if processes > 1 else [None]
    ended(*(Forked.script(worker, *words, ranks=ranks) for ranks in each), seconds=SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 30)
def test_two_processes_compute_what_one_does(
    plain: Callable[..., dict[str, Any]], divided: Path, tmp_path: Path
) -> None:
    one = [written(plain, divided, tmp_path / "one", name) for name in STAGES]
    two = [written(plain, divided, tmp_path / "two", name) for name in STAGES]
    two.append(written(plain, divided, tmp_path / "ddp", "wings", distributed="ddp"))
    retention = {"every": 2, "items": 10, "samples": 6, "batch_size": 4, "measure": "likelihood", "action": "rewind"}
    retention |= {"text": {"microworld": "text"}, "pictures": {"microworld": "visual"}}
    for folder, recipes in (("measured", two), ("measured-alone", one)):
        recipes.append(written(plain, divided, tmp_path / folder, "full", retention={**retention, "min": 0.01}))
    two.append(written(plain, divided, tmp_path / "resumed", "wings", name="interrupted"))
    modality = []
    mixture = open_data(load_recipe(one[0]).stages[0].data, seed=0)
    for position in range(BATCH):
        modality.append(bool(mixture[position].images))
    assert modality == [True, True, False, False] * (BATCH // 4)
    launch(one, 1)
    launch(two, 2)
    for name, folder in [*((name, "two") for name in STAGES), ("wings", "ddp"), ("wings", "resumed")]:
        alone, together = tmp_path / "one" / name, tmp_path / folder / name
        for left, right in zip(rows(alone), rows(together), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5), (name, folder)
            # torch 2.7 clips sharded gradients by their norm, and says another afterwards (docs/usage/training.md)
            if folder == "ddp" or not torch.__version__.startswith("2.7."):
                assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4), (name, folder)
            assert left["tokens"] == right["tokens"]
        for step in range(STEPS):
            here, there = (
                load_file(Path(f"{run}-gradients") / f"gradients-{step}.safetensors") for run in (alone, together)
            )
            assert here.keys() == there.keys()
            for key, gradient in here.items():
                torch.testing.assert_close(there[key], gradient, rtol=1e-3, atol=2e-6, msg=f"{name} {key}")
        here, there = (load_file(next((run / "final").glob("*model.safetensors"))) for run in (alone, together))
        assert here.keys() == there.keys()
        for key, value in here.items():
            if (
                "k_proj.bias" not in key
            ):  # softmax does not feel it: its gradient is rounding, which Adam makes steps of
                torch.testing.assert_close(there[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        sessions = json.loads((together / "environment.json").read_text())["sessions"]
        assert [session["processes"] for session in sessions] == [2] * (2 if folder == "resumed" else 1)
    # measuring runs the same collectives on every process, finds what one process finds, and leaves the training alone
    found = rows(tmp_path / "measured" / "full", without=("seconds", "retention_seconds"))
    expected = rows(tmp_path / "measured-alone" / "full", without=("seconds", "retention_seconds"))
    assert [row["step"] for row in found if "retention" in row] == [2, 3]
    for left, right, unmeasured in zip(expected, found, rows(tmp_path / "two" / "full"), strict=True):
        assert right["loss"] == unmeasured["loss"]
        for part in ("retention", "probes"):
            assert right.get(part, {}) == pytest.approx(left.get(part, {}), rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 30)
def test_two_processes_that_read_before_they_answer_compute_what_one_does(
    plain: Callable[..., dict[str, Any]], divided: Path, tmp_path: Path
) -> None:
    launch([written(plain, divided, tmp_path / "one", name) for name in READING], 1)
    two = [written(plain, divided, tmp_path / "two", name, distributed="ddp") for name in READING]
    # sharded weights would be gathered by some processes only: every process is told so, and none waits for another
    sharded = {"distributed": "fsdp", "name": "refused"}
    launch([*two, *(written(plain, divided, tmp_path / "sharded", name, **sharded) for name in READING)], 2)
    for name in READING:
        alone, together = tmp_path / "one" / name, tmp_path / "two" / name
        for left, right in zip(rows(alone), rows(together), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5), name
            assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4), name
        for step in range(STEPS):
            here, there = (
                load_file(Path(f"{run}-gradients") / f"gradients-{step}.safetensors") for run in (alone, together)
            )
            assert here.keys() == there.keys()
            for key, gradient in here.items():
                torch.testing.assert_close(there[key], gradient, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
        for rank in range(2):
            told = (tmp_path / "sharded" / f"{name}-{rank}.txt").read_text()
            assert "whose weights are sharded" in told
            assert "distributed: ddp" in told


@pytest.mark.parametrize("method", ["projector", "wings"])
def test_the_blank_image_leaves_text_alone_and_reaches_the_projector(host_directory: Path, method: str) -> None:
    """Bit for bit the same logits and language gradients; a gradient of zero where there was none."""
    host = load_host(host_directory)
    model, groups = host.model, None
    if method == "wings":
        groups = grafts.attach(model, grafts.WingsConfig(rank=4)).parameters_by_part()
    parts = find_parts(model, ["projector", "llm"], groups)
    select(model, parts)
    mixture = open_mixture(MixtureSpec.model_validate({"sources": [{"microworld": "text"}]}))
    batch = dict(Collator(host.processor)([mixture[n] for n in range(4)]))
    batch.pop("labels")
    model.train()
    outcomes = []
    for blank in (False, True):
        model.zero_grad(set_to_none=True)
        with lockstep(model, parts, blank_image(host.processor)) if blank else torch.enable_grad():
            logits = model(**batch).logits
        logits.logsumexp(-1).mean().backward()
        outcomes.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain_logits, plain_gradients), (logits, gradients) = outcomes
    assert torch.equal(plain_logits, logits)
    for name, gradient in gradients.items():
        if "projector" in name:
            assert plain_gradients[name] is None
            assert torch.equal(gradient, torch.zeros_like(gradient))
        else:
            assert torch.equal(gradient, plain_gradients[name]), name
    assert (not model.model._forward_hooks and not model.model._forward_pre_hooks) or method == "wings"
