"""`load_model` gives back exactly what was saved, whatever kind of directory, and says what is wrong with others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import alula
from alula.errors import AdapterError, HostError
from alula.hosts import save_host
from tests.hosts import tiny

PICTURE = {"type": "image", "image": Image.new("RGB", (32, 32), "red")}
MESSAGES = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "what?"}]}]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading") / "host"
    tower = tiny.TOWERS["siglip"][0]
    save_host(alula.build_host(tiny.decoder("qwen3"), tower, tokenizer=tiny.tokenizer()), path)
    return path


def logits(loaded: Any) -> torch.Tensor:
    inputs = loaded.processor.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return loaded.model(**inputs).logits


def scramble(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)


@pytest.fixture
def wings(host: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A saved Wings adapter with a trained projector, and what the model said."""
    loaded = alula.load_model(host)
    graft = alula.attach(loaded.model, alula.WingsConfig(rank=4))
    scramble(graft.parameters())
    scramble(loaded.model.model.multi_modal_projector.parameters())
    alula.save_adapter(loaded.model, tmp_path / "wings", modules=["model.multi_modal_projector"], base=host)
    return tmp_path / "wings", logits(loaded)


@pytest.fixture
def lora(host: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A saved PEFT adapter of the decoder and the projector's linear layers, and what the model said."""
    loaded = alula.load_model(host)
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["linear_1", "linear_2"])
    model = get_peft_model(loaded.model, config)
    scramble(p for p in model.parameters() if p.requires_grad)
    model.peft_config["default"].base_model_name_or_path = str(host)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", logits(loaded._replace(model=model))


def test_a_host(host: Path) -> None:
    loaded = alula.load_model(host)
    assert not loaded.model.training
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"


def test_a_text_llm(tmp_path: Path) -> None:
    llm = tiny.decoder("qwen3")
    llm.save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    loaded = alula.load_model(tmp_path / "llm")
    ids = loaded.processor("two words", return_tensors="pt").input_ids
    assert torch.equal(loaded.model(ids).logits, llm(ids).logits)
    assert alula.load_model(tmp_path / "llm", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_wings_adapter(wings: tuple[Path, torch.Tensor]) -> None:
    directory, expected = wings
    assert torch.equal(logits(alula.load_model(directory)), expected)


def test_a_peft_adapter(lora: tuple[Path, torch.Tensor]) -> None:
    directory, expected = lora
    assert torch.equal(logits(alula.load_model(directory)), expected)


def test_adapter_and_base_move_together(host: Path, wings: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, expected = wings
    shutil.copytree(host.parent, tmp_path / "moved" / host.parent.name)
    moved = tmp_path / "moved" / directory.name
    shutil.copytree(directory, moved)
    facts = json.loads((moved / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = f"../{host.parent.name}/host"
    (moved / "adapter_config.json").write_text(json.dumps(facts))
    assert torch.equal(logits(alula.load_model(moved)), expected)


def test_what_a_kill_between_the_renames_of_a_save_hid_is_found(
    host: Path, wings: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """As it lies after a kill inside `alula.save_adapter` and `save_host`: the earlier content has stepped aside."""
    shutil.copytree(host, tmp_path / "host")
    facts = json.loads((wings[0] / "adapter_config.json").read_text())
    (wings[0] / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": "../host"}))

    def hide(path: Path) -> None:
        (path.parent / f".{path.name}-kx8kx8kx.old").mkdir()
        (path.parent / f".{path.name}-kx8kx8kx.partial").mkdir()
        path.rename(path.parent / f".{path.name}-kx8kx8kx.old" / path.name)

    hide(wings[0])
    hide(tmp_path / "host")
    assert torch.equal(logits(alula.load_model(wings[0])), wings[1])
    hide(tmp_path / "host")
    loaded = alula.hosts.load_host(tmp_path / "host")
    hide(wings[0])
    alula.load_adapter(loaded.model, wings[0])
    assert torch.equal(logits(loaded), wings[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host", "wings"]


def test_a_wings_adapter_that_no_longer_fits_its_base(
    host: Path, wings: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    other = alula.load_model(host)
    scramble([other.model.model.language_model.layers[0].mlp.up_proj.weight])
    save_host(alula.hosts.load_host(host)._replace(model=other.model), tmp_path / "tuned")
    facts = json.loads((wings[0] / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = "../tuned"
    (wings[0] / "adapter_config.json").write_text(json.dumps(facts))
    with pytest.raises(AdapterError, match="trained on other weights"):
        alula.load_model(wings[0])


def test_float16_rounds_a_bases_weights_to_others(wings: tuple[Path, torch.Tensor]) -> None:
    assert alula.load_model(wings[0], dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="float16 left") as caught:
        alula.load_model(wings[0], dtype=torch.float16)
    assert "bfloat16" in str(caught.value.remedy)


@pytest.mark.parametrize("verdict", ["missing", "not used"])
def test_peft_adapters_are_strict_too(lora: tuple[Path, torch.Tensor], verdict: str) -> None:
    path = lora[0] / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if "lora_A" in key)
    if verdict == "missing":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    save_file(weights, path)
    with pytest.raises(AdapterError, match=f"1 weights are {verdict}"):
        alula.load_model(lora[0])


def test_an_adapter_that_was_copied_alone_says_what_it_needs(wings: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    facts = json.loads((wings[0] / "adapter_config.json").read_text())
    (wings[0] / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": "../../gone"}))
    with pytest.raises(
        AdapterError, match=r"wings/adapter_config\.json: the base it names, '\.\./\.\./gone'.*\n.*alula\.load"
    ):
        alula.load_model(wings[0])


def test_what_cannot_be_loaded_says_why(tmp_path: Path, wings: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(HostError, match="no such directory"):
        alula.load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match="has no config"):
        alula.load_model(tmp_path / "empty")
    config = wings[0] / "adapter_config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "base_model_name_or_path": ""}))
    with pytest.raises(AdapterError, match="does not say which model"):
        alula.load_model(wings[0])
    config.write_text("{")
    with pytest.raises(AdapterError, match="not readable as JSON"):
        alula.load_model(wings[0])


def test_a_name_that_only_the_hub_could_know_is_told_at_once_when_it_is_away() -> None:
    away = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    program = "import alula; alula.load_model('nobody/nothing')"
    done = subprocess.run([sys.executable, "-c", program], env=away, capture_output=True, text=True)
    assert "HostError: model nobody/nothing: no such directory, and the hub cannot be reached" in done.stderr
    assert "Retry" not in done.stderr


def test_an_activated_lora_is_refused(host: Path, tmp_path: Path) -> None:
    """It would be put on, and do nothing: only PEFT's class for language models tells it where it begins."""
    model = alula.load_model(host).model
    config = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", alora_invocation_tokens=[5, 6])
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = str(host)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="activated LoRA"):
        alula.load_model(tmp_path)
