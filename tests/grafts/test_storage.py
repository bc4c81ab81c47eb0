"""Adapter directories: they load exactly, into the base they belong to, or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import alula
from alula.errors import AdapterError, UsageError
from alula.grafts.storage import CONFIG_FILE, WEIGHTS_FILE, fingerprint
from alula.hosts import save_host
from tests import zoo
from tests.grafts.common import CONFIGS, covering, grafted, run, wake
from tests.hosts import tiny

PROJECTOR = "model.multi_modal_projector"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, _ = grafted("llava-llama", "attention")
    return alula.save(model, tmp_path / "adapter", modules=[PROJECTOR])


@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS), each=2))
def test_round_trip_is_exact(host: str, config: str, tmp_path: Path) -> None:
    model, graft = grafted(host, config)
    inputs = zoo.batch(host, "3I2", "5")
    alula.save(model, tmp_path / "adapter")
    fresh = zoo.build(host)
    again = alula.load(fresh, tmp_path / "adapter")
    assert again.config == graft.config
    assert torch.equal(run(fresh, host, inputs), run(model, host, inputs))


def test_settings_can_be_given_while_loading(tmp_path: Path) -> None:
    model, graft = grafted("llava-llama", "mass")
    inputs = zoo.batch("llava-llama", "3I2", "5")
    alula.save(model, tmp_path / "adapter")
    fresh = zoo.build("llava-llama")
    with pytest.raises(UsageError, match="cache"):
        alula.load(fresh, tmp_path / "adapter", cache="everything")
    with pytest.raises(UsageError, match="'rank' is not a setting that can be changed"):
        alula.load(fresh, tmp_path / "adapter", rank=2)
    with pytest.raises(UsageError, match="dropout must lie"):
        alula.load(fresh, tmp_path / "adapter", dropout="much")
    assert alula.grafts_of(fresh) == {}
    again = alula.load(fresh, tmp_path / "adapter", cache="keys")
    assert again.config == dataclasses.replace(graft.config, cache="keys")
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))


def test_files_are_plain(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    facts = json.loads((saved / CONFIG_FILE).read_text())
    assert facts["alula_type"] == "wings"
    assert facts["config"]["router"] == "attention"
    names = load_file(saved / WEIGHTS_FILE).keys()
    assert "graft.layers.0.visual.q.a" in names
    assert f"host.{PROJECTOR}.linear_1.weight" in names
    assert "attention" in (saved / "README.md").read_text()


def test_two_grafts_are_saved_apart(tmp_path: Path) -> None:
    model = zoo.build("llava-llama")
    for seed, name in enumerate(("one", "two")):
        wake(alula.attach(model, CONFIGS["mass"], name), seed)
    with pytest.raises(UsageError, match="one, two"):
        alula.save(model, tmp_path / "which")
    for name in ("one", "two"):
        alula.save(model, tmp_path / name, name)
    fresh = zoo.build("llava-llama")
    alula.load(fresh, tmp_path / "one")
    alula.load(fresh, tmp_path / "two", name="zwei")
    assert set(alula.grafts_of(fresh)) == {"one", "zwei"}
    inputs = zoo.batch("llava-llama", "3I2")
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))


def test_saving_over_an_adapter_replaces_it_whole(saved: Path) -> None:
    model, _ = grafted("llava-llama", "visual")
    (saved / "stale.txt").write_text("left over")
    alula.save(model, saved)
    assert not (saved / "stale.txt").exists()
    assert alula.load(zoo.build("llava-llama"), saved).config.learners == ("visual",)


def test_trained_host_modules_travel_along(tmp_path: Path) -> None:
    model, _ = grafted("llava-llama", "mass")
    with torch.no_grad():
        model.get_submodule(PROJECTOR).linear_1.weight.add_(0.5)
    alula.save(model, tmp_path / "adapter", modules=[PROJECTOR])
    fresh = zoo.build("llava-llama")
    alula.load(fresh, tmp_path / "adapter")
    inputs = zoo.batch("llava-llama", "3I2")
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))
    with pytest.raises(UsageError, match=r"no module 'model\.projector'"):
        alula.save(model, tmp_path / "other", modules=["model.projector"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_adapter_loads_into_half_a_host(saved: Path, dtype: torch.dtype) -> None:
    """The fingerprint looks through bfloat16; other roundings are told to say so."""
    host = zoo.build("llava-llama").to(dtype)
    if dtype == torch.bfloat16:
        graft = alula.load(host, saved)
        assert {p.dtype for p in graft.parameters()} == {torch.float32}
    else:
        assert len(list(alula.load(host, saved, check_base=False).parameters())) > 0


def test_fingerprint_is_of_the_decoder_alone() -> None:
    model = zoo.build("llava-llama")
    bare = fingerprint(model)
    graft = wake(alula.attach(model, CONFIGS["mass"]))
    assert fingerprint(model) == bare
    graft.detach()
    with torch.no_grad():
        model.get_submodule(PROJECTOR).linear_1.weight.add_(0.5)
    assert fingerprint(model) == bare
    assert fingerprint(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))) == bare
    assert fingerprint(zoo.build("llava-llama", seed=1)) != bare


# -- strictness ---------------------------------------------------------------------------------------------------


def _edit_config(path: Path, **changes: Any) -> None:
    facts = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({**facts, **changes}))


def _edit_weights(path: Path, change: Any) -> None:
    weights: dict[str, Tensor] = dict(load_file(path / WEIGHTS_FILE))
    change(weights)
    save_file(weights, path / WEIGHTS_FILE)


KEY, MODULE_KEY = "graft.layers.0.visual.q.a", f"host.{PROJECTOR}.linear_1.weight"

DAMAGE = {
    "a graft weight missing": (lambda p: _edit_weights(p, lambda w: w.pop(KEY)), "missing"),
    "a host weight missing": (lambda p: _edit_weights(p, lambda w: w.pop(MODULE_KEY)), "missing"),
    "a weight too many": (
        lambda p: _edit_weights(p, lambda w: w.update({"graft.layers.9.visual.q.a": torch.ones(2)})),
        "not used",
    ),
    "a foreign prefix": (
        lambda p: _edit_weights(p, lambda w: w.update({"elsewhere.weight": torch.ones(2)})),
        "not used",
    ),
    "a wrong shape": (lambda p: _edit_weights(p, lambda w: w.update({KEY: w[KEY][:2].contiguous()})), "has shape"),
    "a wrong shape in the host": (
        lambda p: _edit_weights(p, lambda w: w.update({MODULE_KEY: torch.ones(3, 3)})),
        "has shape",
    ),
    "cut off": (lambda p: (p / WEIGHTS_FILE).write_bytes((p / WEIGHTS_FILE).read_bytes()[:-100]), "damaged"),
    "cut off in its header": (
        lambda p: (p / WEIGHTS_FILE).write_bytes((p / WEIGHTS_FILE).read_bytes()[:20]),
        "damaged",
    ),
    "no weights file": (lambda p: (p / WEIGHTS_FILE).unlink(), "missing"),
    "no config file": (lambda p: (p / CONFIG_FILE).unlink(), "no adapter_config"),
    "bad JSON": (lambda p: (p / CONFIG_FILE).write_text('{"alula_type": '), "not readable as JSON"),
    "not an object": (lambda p: (p / CONFIG_FILE).write_text("[1, 2]"), "not a JSON object"),
    "another library's": (lambda p: _edit_config(p, alula_type=None, peft_type="LORA"), "not an alula adapter"),
    "an unknown setting": (lambda p: _edit_config(p, config={"rnak": 3}), "rnak"),
    "a refused setting": (lambda p: _edit_config(p, config={"router": "soft"}), "router"),
    "another rank": (
        lambda p: _edit_config(p, config={"rank": 5, "router": "attention", "router_rows": 96}),
        "has shape",
    ),
    "a module the host lacks": (lambda p: _edit_config(p, modules=["model.eyes"]), "model.eyes"),
    "another base": (lambda p: _edit_config(p, base_fingerprint="0" * 64), "other weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_does_not_fit_is_refused_and_the_model_left_alone(saved: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(saved)
    model = zoo.build("llava-llama")
    inputs = zoo.batch("llava-llama", "3I2")
    logits = run(model, "llava-llama", inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message) as caught:
        alula.load(model, saved)
    assert caught.value.where, "the error does not say where"
    assert caught.value.remedy, "the error does not say what to do"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert alula.grafts_of(model) == {}
    assert torch.equal(run(model, "llava-llama", inputs), logits)


def test_another_size_of_host_is_refused(saved: Path) -> None:
    model = zoo.build("llava-qwen3")
    with pytest.raises(AdapterError, match="other weights"):
        alula.load(model, saved)
    with pytest.raises(AdapterError, match="and this is a Qwen3ForCausalLM"):
        alula.load(zoo.build("qwen3"), saved, check_base=False)


# -- whole directories --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "host"
    host = alula.build_host(tiny.decoder("qwen3"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    host.model.save_pretrained(path)
    host.processor.save_pretrained(path)
    return path


def _say(model: Any, processor: Any, image: bool) -> Tensor:
    content = [{"type": "image", "image": Image.new("RGB", (40, 40), (200, 30, 30))}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what do you see?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return model(**inputs).logits


def test_load_model_round_trip_with_a_trained_projector(host_directory: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(host_directory)
    wake(alula.attach(model, CONFIGS["mass"]))
    with torch.no_grad():
        for parameter in model.get_submodule(PROJECTOR).parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    alula.save(model, tmp_path / "adapter", modules=[PROJECTOR])
    expected = {image: _say(model, processor, image) for image in (True, False)}
    again, processor = alula.load_model(tmp_path / "adapter")
    assert not again.training
    assert set(alula.grafts_of(again)) == {"wings"}
    for image, logits in expected.items():
        assert torch.equal(_say(again, processor, image), logits)


def test_host_and_adapter_move_together(host_directory: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(host_directory, here / "host")
    model, processor = alula.load_model(here / "host")
    wake(alula.attach(model, CONFIGS["attention"]))
    alula.save(model, here / "adapter")
    expected = _say(model, processor, True)
    shutil.move(here, tmp_path / "there")
    again, processor = alula.load_model(tmp_path / "there" / "adapter")
    assert torch.equal(_say(again, processor, True), expected)


def test_an_adapter_that_names_no_base_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="which model it belongs to"):
        alula.load_model(saved)


def test_a_host_that_was_built_and_not_saved_has_no_name_to_quote(tmp_path: Path) -> None:
    host = alula.build_host("fledgling", "fledgling")
    alula.attach(host.model, alula.WingsConfig(rank=2))
    alula.save(host.model, tmp_path / "nameless")
    with pytest.raises(AdapterError, match="does not say which model"):
        alula.load_model(tmp_path / "nameless")
    save_host((host.model, host.processor), tmp_path / "host")
    alula.save(host.model, tmp_path / "named", base=tmp_path / "host", modules=["model.multi_modal_projector"])
    loaded = alula.load_model(tmp_path / "named")
    assert type(loaded.model) is type(host.model)
    alula.save(host.model, tmp_path / "wrong", base="fledgling", modules=["model.multi_modal_projector"])
    with pytest.raises(AdapterError, match="of a LlavaForConditionalGeneration, and this is a Qwen3ForCausalLM"):
        alula.load_model(tmp_path / "wrong")
    with pytest.raises(UsageError, match=r"did you mean 'model\.multi_modal_projector'"):
        alula.save(host.model, tmp_path / "typo", modules=["model.multi_modal_projecter"])
