"""Adapter directories: they load exactly, into the base they belong to, or not at all."""

from __future__ import annotations

import json
import math
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
from alula.errors import AdapterError, FilesError, UsageError
from alula.grafts.storage import _FACTS, _SINCE, CONFIG_FILE, WEIGHTS_FILE, fingerprint
from alula.hosts import save_host
from tests import zoo
from tests.grafts.common import CONFIGS, covering, grafted, run, wake
from tests.hosts import tiny

PROJECTOR = "model.multi_modal_projector"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, _ = grafted("llava-llama", "attention")
    return alula.save_adapter(model, tmp_path / "adapter", modules=[PROJECTOR])


@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS), each=2))
def test_round_trip_is_exact(host: str, config: str, tmp_path: Path) -> None:
    model, graft = grafted(host, config)
    inputs = zoo.batch(host, "3I2", "5")
    alula.save_adapter(model, tmp_path / "adapter")
    fresh = zoo.build(host)
    again = alula.load_adapter(fresh, tmp_path / "adapter")
    assert again.config == graft.config
    assert torch.equal(run(fresh, host, inputs), run(model, host, inputs))


def test_settings_can_be_given_while_loading(tmp_path: Path) -> None:
    model, graft = grafted("llava-llama", "mass")
    inputs = zoo.batch("llava-llama", "3I2", "5")
    alula.save_adapter(model, tmp_path / "adapter")
    fresh = zoo.build("llava-llama")
    with pytest.raises(UsageError, match="cache"):
        alula.load_adapter(fresh, tmp_path / "adapter", cache="everything")
    with pytest.raises(UsageError, match="'rank' is not a setting that can be changed"):
        alula.load_adapter(fresh, tmp_path / "adapter", rank=2)
    with pytest.raises(UsageError, match=r"wings\.dropout: a number is wanted here"):
        alula.load_adapter(fresh, tmp_path / "adapter", dropout="much")
    assert alula.grafts_of(fresh) == {}
    again = alula.load_adapter(fresh, tmp_path / "adapter", cache="keys")
    assert again.config == graft.config.model_copy(update={"cache": "keys"})
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))


def test_files_are_plain(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    facts = json.loads((saved / CONFIG_FILE).read_text())
    assert facts["alula_type"] == "wings"
    assert facts["config"]["router"] == "attention"
    names = load_file(saved / WEIGHTS_FILE).keys()
    assert "graft.layers.0.visual.q.down" in names
    assert f"host.{PROJECTOR}.linear_1.weight" in names
    assert "attention" in (saved / "README.md").read_text()


def test_two_grafts_are_saved_apart(tmp_path: Path) -> None:
    model = zoo.build("llava-llama")
    for seed, name in enumerate(("one", "two")):
        wake(alula.attach(model, CONFIGS["mass"], name), seed)
    with pytest.raises(UsageError, match="one, two"):
        alula.save_adapter(model, tmp_path / "which")
    for name in ("one", "two"):
        alula.save_adapter(model, tmp_path / name, name)
    fresh = zoo.build("llava-llama")
    alula.load_adapter(fresh, tmp_path / "one")
    alula.load_adapter(fresh, tmp_path / "two", name="zwei")
    assert set(alula.grafts_of(fresh)) == {"one", "zwei"}
    inputs = zoo.batch("llava-llama", "3I2")
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))


def test_saving_over_an_adapter_replaces_it_whole(saved: Path) -> None:
    model, _ = grafted("llava-llama", "visual")
    (saved / "stale.txt").write_text("left over")
    alula.save_adapter(model, saved)
    assert not (saved / "stale.txt").exists()
    assert alula.load_adapter(zoo.build("llava-llama"), saved).config.learners == ("visual",)


def test_trained_host_modules_travel_along(tmp_path: Path) -> None:
    model, _ = grafted("llava-llama", "mass")
    with torch.no_grad():
        model.get_submodule(PROJECTOR).linear_1.weight.add_(0.5)
    alula.save_adapter(model, tmp_path / "adapter", modules=[PROJECTOR])
    fresh = zoo.build("llava-llama")
    alula.load_adapter(fresh, tmp_path / "adapter")
    inputs = zoo.batch("llava-llama", "3I2")
    assert torch.equal(run(fresh, "llava-llama", inputs), run(model, "llava-llama", inputs))
    with pytest.raises(UsageError, match=r"no module 'model\.projector'"):
        alula.save_adapter(model, tmp_path / "other", modules=["model.projector"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_adapter_loads_into_half_a_host(saved: Path, dtype: torch.dtype) -> None:
    """The fingerprint looks through bfloat16; other roundings have to say so."""
    host = zoo.build("llava-llama").to(dtype)
    if dtype == torch.bfloat16:
        graft = alula.load_adapter(host, saved)
        assert {p.dtype for p in graft.parameters()} == {torch.float32}
    else:
        assert len(list(alula.load_adapter(host, saved, check_base=False).parameters())) > 0


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


KEY, MODULE_KEY = "graft.layers.0.visual.q.down", f"host.{PROJECTOR}.linear_1.weight"

DAMAGE = {
    "a graft weight missing": (lambda p: _edit_weights(p, lambda w: w.pop(KEY)), "missing"),
    "a host weight missing": (lambda p: _edit_weights(p, lambda w: w.pop(MODULE_KEY)), "missing"),
    "a weight too many": (
        lambda p: _edit_weights(p, lambda w: w.update({"graft.layers.9.visual.q.down": torch.ones(2)})),
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
    "another library's": (lambda p: _edit_config(p, alula_type=None), "not an alula adapter\n.*wings"),
    "PEFT's": (lambda p: _edit_config(p, alula_type=None, peft_type="LORA"), "but PEFT's\n.*alula.load_model"),
    "no directory": (lambda p: p.rename(p.with_name("moved")), "no such directory"),
    "an unknown setting": (lambda p: _edit_config(p, config={"rnak": 3}), "rnak"),
    "a refused setting": (lambda p: _edit_config(p, config={"router": "soft"}), "router"),
    "another rank": (
        lambda p: _edit_config(p, config={"rank": 5, "router": "attention", "router_tokens": 96}),
        "has shape",
    ),
    "a module the host lacks": (lambda p: _edit_config(p, modules=["model.eyes"]), "model.eyes"),
    "another base": (lambda p: _edit_config(p, base_fingerprint="0" * 64), "other weights"),
    "NaN": (
        lambda p: _edit_weights(p, lambda w: w[KEY].view(-1)[3:5].fill_(torch.nan)),
        "q.down holds 2 values that are NaN",
    ),
    "an infinity in the host": (
        lambda p: _edit_weights(p, lambda w: w[MODULE_KEY].view(-1)[:1].fill_(-torch.inf)),
        "linear_1.weight holds 1 values that are NaN or infinite",
    ),
    "NaN for a setting": (lambda p: _edit_config(p, config={"gain": math.nan}), "NaN is no number"),
    "a resized base": (lambda p: _edit_config(p, base_vocabulary=99), "99 token embeddings, and this .* has 64"),
    "a name of its container's": (lambda p: _edit_config(p, name="values"), "'values' cannot name a graft"),
    "a layer the host lacks": (
        lambda p: _edit_config(p, config={"rank": 3, "router": "attention", "router_tokens": 96, "layers": [7]}),
        "layer 7 does not exist",
    ),
    "deep JSON": (lambda p: (p / CONFIG_FILE).write_text("[" * 100_000), "not readable as JSON"),
    "a directory for weights": (
        lambda p: ((p / WEIGHTS_FILE).unlink(), (p / WEIGHTS_FILE).mkdir()),
        "a directory, not a file",
    ),
}

TYPES = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]
DAMAGE |= {
    f"{key.split('.')[0]} weights of {dtype}": (
        lambda p, key=key, dtype=dtype: _edit_weights(p, lambda w: w.update({key: w[key].to(dtype)})),
        f"{key.split('.')[-1]} is of type {str(dtype).removeprefix('torch.')}",
    )
    for key in (KEY, MODULE_KEY)
    for dtype in (TYPES if key == KEY else TYPES[:1])
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_does_not_fit_is_refused_and_the_model_left_alone(saved: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(saved)
    model = zoo.build("llava-llama")
    inputs = zoo.batch("llava-llama", "3I2")
    logits = run(model, "llava-llama", inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((AdapterError, FilesError), match=message) as caught:
        alula.load_adapter(model, saved)
    assert caught.value.where, "the error does not say where"
    assert caught.value.remedy, "the error does not say what to do"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert alula.grafts_of(model) == {}
    assert torch.equal(run(model, "llava-llama", inputs), logits)


@pytest.mark.parametrize("field", ["alula_type", *_FACTS])
def test_facts_of_other_types_are_refused_by_name(saved: Path, field: str) -> None:
    facts = json.loads((saved / CONFIG_FILE).read_text())
    model = zoo.build("llava-llama")
    usual: Any = str if field == "alula_type" else _FACTS[field]
    for value in (None, True, 3, 0.5, "x", [], [3], {}, {"a": []}):
        if type(value) is usual and value not in ([3], {"a": []}):
            continue
        _edit_config(saved, **{field: value})
        with pytest.raises(AdapterError) as caught:
            alula.load_adapter(model, saved)
        assert field in str(caught.value) or "not an alula adapter" in str(caught.value) or field == "config"
        assert CONFIG_FILE in str(caught.value.where)
    assert alula.grafts_of(model) == {}
    del facts[field]
    (saved / CONFIG_FILE).write_text(json.dumps(facts))
    if field in _SINCE:  # what earlier versions did not write
        alula.load_adapter(model, saved)
    else:
        with pytest.raises(AdapterError, match=field):
            alula.load_adapter(model, saved)


@pytest.mark.parametrize("setting", [*alula.WingsConfig.model_fields])
def test_settings_of_other_types_are_refused_by_name(saved: Path, setting: str) -> None:
    whole = json.loads((saved / CONFIG_FILE).read_text())["config"]
    model = zoo.build("llava-llama")
    for value in (None, True, 3, -0.5, "x", [], [None], {}):
        _edit_config(saved, config={**whole, setting: value})
        try:
            alula.load_adapter(model, saved).detach()
        except AdapterError as error:
            # a setting that is right by itself may not fit the weights
            assert setting in str(error) or "weights are" in str(error) or "has shape" in str(error)  # noqa: PT017
        else:
            assert value == whole[setting] or (setting, value) in [
                ("layers", None),
                ("normalize", True),
                ("gain", 3),
                ("gain", -0.5),
                ("init_std", 3),
            ]
    assert alula.grafts_of(model) == {}


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("vision tower", "model.vision_tower.encoder.layers.0.mlp.fc1.bias"),
        ("projector", f"{PROJECTOR}.linear_2.bias"),
        ("language-model head", "lm_head.weight"),
    ],
)
def test_a_base_with_another_part_is_refused(tmp_path: Path, part: str, changed: str) -> None:
    model, _ = grafted("llava-llama", "mass")
    alula.save_adapter(model, tmp_path / "adapter")
    alula.save_adapter(model, tmp_path / "with its projector", modules=[PROJECTOR])
    other = zoo.build("llava-llama")
    with torch.no_grad():
        other.get_parameter(changed).add_(0.5)
    with pytest.raises(AdapterError, match=f"trained with another {part} than") as caught:
        alula.load_adapter(other, tmp_path / "adapter")
    assert "modules" in str(caught.value.remedy)
    alula.load_adapter(other, tmp_path / "adapter", check_base=False).detach()
    if part == "projector":
        alula.load_adapter(other, tmp_path / "with its projector")
    else:
        with pytest.raises(AdapterError, match=part):
            alula.load_adapter(other, tmp_path / "with its projector")


def test_parts_are_known_beside_peft_adapters(saved: Path) -> None:
    model = zoo.build("llava-llama")
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["lm_head"]))
    alula.load_adapter(peft_model, saved)


def test_another_size_of_host_is_refused(saved: Path) -> None:
    model = zoo.build("llava-qwen3")
    with pytest.raises(AdapterError, match="other weights"):
        alula.load_adapter(model, saved)
    with pytest.raises(AdapterError, match="and this is a Qwen3ForCausalLM"):
        alula.load_adapter(zoo.build("qwen3"), saved, check_base=False)


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
    alula.save_adapter(model, tmp_path / "adapter", modules=[PROJECTOR])
    expected = {image: _say(model, processor, image) for image in (True, False)}
    again, processor = alula.load_model(tmp_path / "adapter")
    assert not again.training
    assert set(alula.grafts_of(again)) == {"wings"}
    for image, logits in expected.items():
        assert torch.equal(_say(again, processor, image), logits)


def test_an_adapter_of_a_resized_host(host_directory: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(host_directory)
    tokens = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(tokens + 8)
    wake(alula.attach(model, CONFIGS["mass"]))
    modules = ["model.language_model.embed_tokens", "lm_head"]
    for name, trained in (("graft", ()), ("embeddings too", modules)):
        alula.save_adapter(model, tmp_path / name, base=host_directory, modules=trained)
        with pytest.raises(AdapterError, match=rf"{tokens + 8} token embeddings, and this .* has {tokens}") as caught:
            alula.load_model(tmp_path / name)
        assert "save_host" in str(caught.value.remedy)
        base = save_host((model, processor), tmp_path / "resized")
        alula.save_adapter(model, tmp_path / name, base=base, modules=trained)
        assert torch.equal(_say(*alula.load_model(tmp_path / name), True), _say(model, processor, True))
    # what the graft itself needs is the same on either
    fresh, _ = alula.load_model(host_directory)
    alula.load_adapter(fresh, tmp_path / "graft", check_base=False)
    with pytest.raises(AdapterError, match="has shape"):
        alula.load_adapter(alula.load_model(host_directory).model, tmp_path / "embeddings too", check_base=False)


def test_host_and_adapter_move_together(host_directory: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(host_directory, here / "host")
    model, processor = alula.load_model(here / "host")
    wake(alula.attach(model, CONFIGS["attention"]))
    alula.save_adapter(model, here / "adapter")
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
    alula.save_adapter(host.model, tmp_path / "nameless")
    with pytest.raises(AdapterError, match="does not say which model"):
        alula.load_model(tmp_path / "nameless")
    save_host((host.model, host.processor), tmp_path / "host")
    alula.save_adapter(host.model, tmp_path / "named", base=tmp_path / "host", modules=["model.multi_modal_projector"])
    loaded = alula.load_model(tmp_path / "named")
    assert type(loaded.model) is type(host.model)
    alula.save_adapter(host.model, tmp_path / "wrong", base="fledgling", modules=["model.multi_modal_projector"])
    with pytest.raises(AdapterError, match="of a LlavaForConditionalGeneration, and this is a Qwen3ForCausalLM"):
        alula.load_model(tmp_path / "wrong")
    with pytest.raises(UsageError, match=r"did you mean 'model\.multi_modal_projector'"):
        alula.save_adapter(host.model, tmp_path / "typo", modules=["model.multi_modal_projecter"])
