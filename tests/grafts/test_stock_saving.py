"""Grafts through `save_pretrained` and Trainer: what these write is loaded with its grafts, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import alula
from alula.errors import AdapterError, AlulaError, HostError
from alula.hosts import save_host
from alula.seam import DECLARED
from tests.grafts.common import CONFIGS, wake
from tests.hosts import tiny


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "host"
    return save_host(
        alula.build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()), path
    )


def inputs(model: Any) -> dict[str, Tensor]:
    """Two text tokens, an image, two text tokens."""
    generator = torch.Generator().manual_seed(0)
    image = model.config.image_token_id
    ids = torch.tensor([[7, 8, *[image] * 16, 9, 10]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def trainer(model: Any, processor: Any, folder: Path, **settings: Any) -> Trainer:
    tokens = [{name: value[0] for name, value in inputs(model).items()}] * 4
    for token in tokens:
        token["labels"] = token["input_ids"]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to="none", **settings
    )
    return Trainer(model=model, args=arguments, train_dataset=tokens, processing_class=processor)  # type: ignore[arg-type]


SAVED: dict[str, Callable[[Any, Any, Path], None]] = {
    "in one file": lambda model, processor, folder: model.save_pretrained(folder),
    "in shards": lambda model, processor, folder: model.save_pretrained(folder, max_shard_size="40KB"),
    "by Trainer": lambda model, processor, folder: trainer(model, processor, folder).save_model(),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_graft_comes_back(host: Path, tmp_path: Path, how: str) -> None:
    model, processor = alula.load_model(host)
    wake(alula.attach(model, CONFIGS["attention"], "one"), 1)
    wake(alula.attach(model, CONFIGS["last layer"], "two"), 2)
    SAVED[how](model, processor, tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (how == "in shards")
    again = alula.load_model(tmp_path / "saved").model
    assert {name: graft.config for name, graft in alula.grafts_of(again).items()} == {
        name: graft.config for name, graft in alula.grafts_of(model).items()
    }
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(HostError, match=r"the graft 'one', 'two', which would be left out\n.*alula\.load_model"):
        alula.hosts.load_host(tmp_path / "saved")
    # what stock classes make of it is the host
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    alula.detach(model, "one")
    alula.detach(model, "two")
    assert torch.equal(logits(stock.eval()), logits(model))


def test_a_decoder_brings_its_graft_back(tmp_path: Path) -> None:
    llm = tiny.decoder("qwen3")
    graft = wake(alula.attach(llm, CONFIGS["paper"]))
    llm.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    again = alula.grafts_of(alula.load_model(tmp_path).model)["wings"].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in graft.state_dict().items())
    with pytest.raises(HostError, match="the graft 'wings'"):
        alula.build_host(tmp_path, tiny.TOWERS["siglip"][0])


def test_the_config_speaks_of_grafts_only_while_they_are_there(host: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(host)
    before = model.config.to_dict()
    alula.attach(model, CONFIGS["mass"], "one")
    two = alula.attach(model, CONFIGS["mass"], "two")
    assert list(getattr(model.config, DECLARED)) == ["one", "two"]
    two.detach()
    assert list(getattr(model.config, DECLARED)) == ["one"]
    save_host((model, processor), tmp_path / "host")
    assert (tmp_path / "host" / "config.json").read_bytes() == (host / "config.json").read_bytes()
    alula.detach(model)
    assert model.config.to_dict() == before


def test_trainer_goes_on_from_its_checkpoint(host: Path, tmp_path: Path) -> None:
    def begun() -> tuple[Any, Any]:
        model, processor = alula.load_model(host)
        graft = wake(alula.attach(model, CONFIGS["mass"]))
        model.requires_grad_(False)
        for parameter in graft.parameters():
            parameter.requires_grad_(True)
        return model, trainer(model, processor, tmp_path, save_steps=1, save_strategy="steps", disable_tqdm=True)

    model, whole = begun()
    whole.train()
    expected = logits(model.eval())
    first = alula.load_model(tmp_path / "checkpoint-1").model
    assert not torch.equal(logits(first), expected)
    assert torch.equal(logits(alula.load_model(tmp_path / "checkpoint-2").model), expected)
    model, rest = begun()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(model.eval()), expected)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


KEY = "model.layers.0.alula.wings.visual.q.down"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no word of it": (lambda p: _edit_config(p, **{DECLARED: {}}), "graft 'wings', and config.json does not say with"),
    "no weights of it": (
        lambda p: _edit_weights(p, lambda w: [w.pop(name) for name in list(w) if ".alula." in name]),
        "'wings': .*its weights are not there",
    ),
    "a weight missing": (lambda p: _edit_weights(p, lambda w: w.pop(KEY)), "'wings': 1 weights are missing"),
    "NaN": (lambda p: _edit_weights(p, lambda w: w[KEY].fill_(torch.nan)), "layers.0.visual.q.down holds .* NaN"),
    "words of another": (lambda p: _edit_config(p, **{DECLARED: {"other": {}}}), "graft 'wings', and config.json"),
    "no words": (lambda p: _edit_config(p, **{DECLARED: {"wings": 3}}), "'wings': .* does not say what it is"),
    "wrong words": (
        lambda p: _edit_config(p, **{DECLARED: {"wings": {"alula_type": "wings", "config": {"rank": "4"}}}}),
        r"'wings': wings\.rank: a whole number is wanted here, got '4'",
    ),
    "a list": (lambda p: _edit_config(p, **{DECLARED: ["wings"]}), "graft 'wings', and config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    llm = tiny.decoder("llama")
    wake(alula.attach(llm, CONFIGS["mass"]))
    llm.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises((AdapterError, HostError), match=message) as caught:
        alula.load_model(tmp_path)
    assert caught.value.remedy


# -- weights without a place ------------------------------------------------------------------------------------------


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    llm = tiny.decoder("llama")
    llm.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj."
    save_file({**whole, f"{name}bias": torch.ones(32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HostError, match=rf"no place for 1 of the weights, the first '{name}bias'"):
        alula.load_model(tmp_path)
    # causal masks, which GPT-2's first checkpoints hold, are no weights
    save_file({**whole, "model.layers.0.attn.bias": torch.ones(4, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(alula.load_model(tmp_path).model(ids).logits, llm(ids).logits)


def _packed(weight: Tensor) -> dict[str, Tensor]:
    """A matrix as the sparse-bitmask format of compressed-tensors stores it."""
    kept = weight.abs() > weight.abs().median()
    counts = kept.sum(dim=1).cumsum(0)
    bits = (kept.reshape(len(kept), -1, 8) * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    return {
        "compressed": weight[kept],
        "bitmask": bits,
        "shape": torch.tensor(weight.shape),
        "row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts[:-1]]),
    }


@pytest.mark.parametrize("kind", ["decoder", "host"])
def test_a_sparse_checkpoint_is_refused(host: Path, tmp_path: Path, kind: str) -> None:
    """transformers has no place for packed weights, makes random ones and warns."""
    if kind == "decoder":
        tiny.decoder("llama").save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
    else:
        save_host(alula.hosts.load_host(host), tmp_path)
    weights: dict[str, Tensor] = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("gate_proj.weight"):
            stem = name.removesuffix("weight")
            weights |= {stem + part: packed for part, packed in _packed(value).items()}
        else:
            weights[name] = value
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loads = [alula.load_model] if kind == "decoder" else [alula.load_model, alula.hosts.load_host]
    for load in loads:
        with pytest.raises(AlulaError, match=r"lack 2 parameters, .*gate_proj\.bitmask.*\n.*decompress"):
            load(tmp_path)
