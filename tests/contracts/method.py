"""What every way to tune promises: recipes name it, it trains what it says and leaves what loads to the same model."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from alula.codes import VQCodes, VQConfig
from alula.data import Collator, MixtureSpec, open_mixture, open_source
from alula.hosts import Host, build_host, load_host, save_host
from alula.training.losses import AuxiliaryLosses
from alula.training.methods import METHODS
from alula.training.methods.base import Method
from alula.training.metrics import read_rows
from tests.contracts.toy_method import METHOD as TOY
from tests.forked import Forked, ended
from tests.hosts import tiny

TOY_FILE = Path(__file__).with_name("toy_method.py")
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


@every_method
def test_it_says_what_it_is(method: Method) -> None:
    assert METHODS[method.name] is method
    assert type(method).__doc__
    settings = None if method.settings is None else method.settings()
    rates = method.rates(settings)
    assert rates, "a stage that names no rates trains something"
    assert set(rates) <= set(method.parts)
    assert any(part.startswith(method.defining) for part in rates)
    assert all(any(part.startswith(start) for part in method.parts) for start in method.defining)


@every_method
def test_what_it_expands_is_its_own(method: Method) -> None:
    expanded = method.expand({method.name: 1e-3}, None)
    assert all(rate == 1e-3 for rate in expanded.values())
    given = dict.fromkeys(method.parts, 1e-3)
    assert dict(method.expand(given, None)) == given


@pytest.fixture(scope="module")
def host_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = build_host(tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    return save_host(host, tmp_path_factory.mktemp("hosts") / "tiny")


def host_for(method: Method, plain: Path) -> Host:
    """A host that the method goes on: a plain one, but for the method that wants an encoder for all media."""
    if method.name != "universal":
        return load_host(plain)
    return build_host(
        tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer(), encoder="universal",
        connector_options={"experts": 1, "depth": 1, "heads": 2, "modality_tokens": 2, "feedforward": 8},
    )  # fmt: skip


def least_settings(method: Method, folder: Path) -> Any:
    """What a method needs to be told: nothing, but for codes."""
    if method.name != "teal":
        return None if method.settings is None else method.settings()
    codes = VQCodes(VQConfig(size=4, width=2, hidden=8, grid=1, patch=2), seed=0).save(folder / "codes")
    return method.settings(codes={"image": str(codes)})


@pytest.mark.parametrize("method", [*METHODS.values(), TOY], ids=[*METHODS, "toy"])
def test_its_losses_add_up_over_micro_batches(method: Method, host_directory: Path, tmp_path: Path) -> None:
    """Each is a sum over samples, so that any way to split an optimizer step comes to the same; but for those that
    compare samples with one another."""
    settings = least_settings(method, tmp_path)
    host = host_for(method, host_directory)
    tuned = method.put_on(host, settings, base="", previous=None, train_projector=True, seed=0)
    losses = method.losses(tuned, settings)
    samples = [open_source({"microworld": part})[index] for index in range(2) for part in ("visual", "text")]
    collate = Collator(host.processor, descriptions=method.describes(settings))
    step = AuxiliaryLosses(losses, len(samples))

    def added(part: list[Any]) -> Tensor | None:
        batch = dict(collate(part))
        with step.observed():
            outputs = tuned.model(**{name: value for name, value in batch.items() if name != "labels"})
        return step.added(outputs, batch)

    tuned.model.eval()
    with step.on(tuned.model), torch.no_grad():
        whole = added(samples)
        means = step.means(lambda value: value)
        assert list(means) == list(losses)
        shares = [added(part) for part in (samples[:1], samples[1:])]
        again = step.means(lambda value: value)
    if not losses:
        assert (whole, shares) == (None, [None, None])
        return
    assert all(math.isfinite(mean) for mean in means.values())
    assert float(whole) == pytest.approx(sum(losses[name].weight * mean for name, mean in means.items()), rel=1e-5)
    if not any(loss.in_batch for loss in losses.values()):
        assert sum(shares) == pytest.approx(float(whole), rel=1e-5)
        assert again == pytest.approx(means, rel=1e-5)


def _site(directory: Path, code: str) -> Path:
    """A folder that holds an installed package with a method, as pip leaves one."""
    facts = directory / "toy_tuning-1.0.dist-info"
    facts.mkdir(parents=True)
    (directory / "toy_tuning.py").write_text(code)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tuning\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[alula.methods]\ntoy = toy_tuning:METHOD\n")
    return directory


_BARE = "from alula.training.methods.base import HostMethod\nclass Bare(HostMethod):\n    "


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_of_that_name", "does not load: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("METHODS = 1", "does not load: AttributeError"),
        ("METHOD = {}['a']", "does not load: KeyError: 'a'"),
        (_BARE + "name = 'toy'\nMETHOD = Bare", "is no instance of alula.training.methods.Method"),
        (_BARE + "name = 'toy'\nMETHOD = Bare()", "does not say its parts"),
        (_BARE + "name, parts, defining = 'toys', {}, ()\nMETHOD = Bare()", "calls itself 'toys'"),
    ],
)
def test_a_package_whose_method_is_broken_is_named(tmp_path: Path, code: str, said: str) -> None:
    site = _site(tmp_path / "site", code + "\n")
    done = Forked.command("train", "recipe.yaml", site=site).done()
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    for part in ("the package toy-tuning 1.0", "toy_tuning:METHOD", said, "remedy mend or uninstall the package"):
        assert part in told, told
    assert "Traceback" not in told


def _recipe(host: Path, output: Path, **changed: Any) -> Path:
    """A recipe of the toy, in a file."""
    run = {key: changed.pop(key) for key in ("distributed",) if key in changed}
    stage = {
        "name": "one",
        "method": "toy",
        "toy": {"note": "hello", "weight": 0.25},
        "steps": 2,
        "batch_size": 8,
        "data": {"sources": [{"microworld": "visual"}, {"microworld": "text"}]},
        "clip": None,
    }
    written = {"name": "toy", "output_dir": str(output), "device": "cpu", "host": {"path": str(host)}, **run}
    path = output.with_suffix(".json")
    path.write_text(json.dumps({**written, "stages": [{**stage, **changed}]}))
    return path


def _trained(recipe: Path) -> None:
    """What a user's program does where the toy's package is installed."""
    from alula.loading import load_model
    from alula.training import load_recipe, train

    loaded: Any = load_recipe(recipe)
    assert loaded.stages[0].settings.note == "hello", loaded
    print(type(load_model(train(loaded).final).model).__name__)


def test_a_method_of_another_package_is_a_file_and_an_entry_point(tmp_path: Path, host_directory: Path) -> None:
    """Installed, it is legal in recipes with a section of its own, and trains; nothing of alula is changed."""
    site = _site(tmp_path / "site", TOY_FILE.read_text())
    recipe = _recipe(host_directory, tmp_path / "run", steps=1)
    (said,) = ended(Forked(partial(_trained, recipe), site=site))
    assert said.split()[-1] == "LlavaForConditionalGeneration"
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    mixture = MixtureSpec.model_validate({"sources": [{"microworld": "visual"}, {"microworld": "text"}], "seed": 0})
    stream = open_mixture(mixture)
    host = load_host(host_directory)
    batch = dict(Collator(host.processor)([stream[position] for position in range(8)]))
    images = batch["input_ids"] == host.model.config.image_token_id
    with torch.no_grad():
        logits = host.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    squares = [
        float(logits[sample, images[sample]].square().mean()) if images[sample].any() else 0.0 for sample in range(8)
    ]
    assert 0.0 in squares
    assert row["losses"] == pytest.approx({"calm": sum(squares) / 8}, rel=1e-4)
    tokens = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert row["loss"] == pytest.approx(float(tokens) + 0.25 * row["losses"]["calm"], rel=1e-5)


@pytest.mark.slow
def test_a_methods_losses_are_the_big_batchs_in_any_split(tmp_path: Path, host_directory: Path) -> None:
    """Micro-batches and processes, whichever way weights are shared between these."""
    site = _site(tmp_path / "site", TOY_FILE.read_text())
    worker = Path(__file__).parents[1] / "training" / "distributed_worker.py"
    whole, split = (_recipe(host_directory, tmp_path / str(size), micro_batch_size=size) for size in (8, 2))
    ended(Forked.script(worker, str(whole), str(split), site=site))
    shared = [_recipe(host_directory, tmp_path / how, micro_batch_size=2, distributed=how) for how in ("fsdp", "ddp")]
    port = 30400 + os.getpid() % 500
    ended(*(Forked.script(worker, *map(str, shared), site=site, ranks=(rank, 2, port)) for rank in range(2)))
    expected = read_rows(tmp_path / "8" / "metrics.jsonl")
    assert [row["step"] for row in expected] == [1, 2]
    for other in ("2", "fsdp", "ddp"):
        for left, right in zip(expected, read_rows(tmp_path / other / "metrics.jsonl"), strict=True):
            assert right["losses"] == pytest.approx(left["losses"], rel=1e-5), other
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-5), other
            # torch 2.7 clips sharded gradients by their norm, and says another afterwards (docs/usage/training.md)
            if other != "fsdp" or not torch.__version__.startswith("2.7."):
                assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4), other
