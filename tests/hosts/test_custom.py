"""Vision towers of one's own: any module that makes tokens of pixels, saved and loaded by the Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    ViTImageProcessorPil,
)

import alula
from alula import plugins
from alula.errors import HostError, UsageError
from alula.hosts import CustomTower, Host, build_host, load_host, save_host, trust_tower
from alula.hosts.custom import CustomTowerConfig
from alula.hosts.multimodal import AlulaForConditionalGeneration
from alula.steering import Box, Prompt
from tests.hosts import custom_towers, tiny

ROOT = Path(__file__).parents[2]


def processor(size: int = 32) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )


def net(kind: type[nn.Module] = custom_towers.Net, seed: int = 0, **arguments: int) -> nn.Module:
    torch.manual_seed(seed)
    return custom_towers.settled(kind(**arguments))


def built(tower: nn.Module, **options) -> Host:
    return build_host(tiny.decoder("llama"), tower, tokenizer=tiny.tokenizer(), image_processor=processor(), **options)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


def inputs(host: Host, pictures: int = 1):
    images = [picture(number) for number in range(pictures)]
    text = "USER: <image> what do you see? ASSISTANT:"
    return host.processor(text=[text] * pictures, images=[[image] for image in images], return_tensors="pt")


@pytest.fixture(scope="module")
def mapped() -> Host:
    return built(net())


def test_a_feature_map_becomes_tokens_line_by_line_in_a_stock_llava(mapped: Host) -> None:
    assert type(mapped.model) is LlavaForConditionalGeneration
    given = inputs(mapped, 2)
    seen = mapped.model.model.vision_tower(given["pixel_values"]).last_hidden_state
    features = net()(given["pixel_values"])
    for row in range(4):
        for column in range(4):
            assert torch.equal(seen[:, 4 * row + column], features[:, :, row, column])
    assert (given["input_ids"] == mapped.model.config.image_token_id).sum().item() == 2 * 16
    both = mapped.model(**given).logits
    alone = mapped.model(**inputs(mapped)).logits
    torch.testing.assert_close(both[:1], alone)
    changed = given["pixel_values"].clone()
    changed[1] += 1
    moved = mapped.model(**{**given, "pixel_values": changed}).logits
    assert torch.equal(moved[0], both[0])
    assert not torch.equal(moved[1], both[1])


@pytest.mark.parametrize("kind", [custom_towers.Net, custom_towers.Pooled, custom_towers.Computing])
def test_saved_and_loaded_by_the_auto_classes_bit_for_bit(kind: type[nn.Module], tmp_path: Path) -> None:
    host = built(net(kind))
    assert type(host.model) is (
        AlulaForConditionalGeneration if kind is custom_towers.Pooled else LlavaForConditionalGeneration
    )
    save_host(host, tmp_path / "host")
    assert not list((tmp_path / "host").rglob("*.bin")) + list((tmp_path / "host").rglob("*.pt"))
    said = json.loads((tmp_path / "host" / "config.json").read_text())["vision_config"]
    assert said["source"] == f"tests.hosts.custom_towers:{kind.__name__}"
    expected = host.model(**inputs(host)).logits
    for loaded in (
        load_host(tmp_path / "host"),
        alula.load_model(tmp_path / "host"),
        Host(
            AutoModelForImageTextToText.from_pretrained(tmp_path / "host"),
            AutoProcessor.from_pretrained(tmp_path / "host"),
        ),
    ):
        assert torch.equal(loaded.model.eval()(**inputs(loaded)).logits, expected)


def test_rows_that_are_no_grid_take_alulas_own_class(tmp_path: Path) -> None:
    host = built(net(custom_towers.Pooled))
    given = inputs(host)
    assert (given["input_ids"] == host.model.config.image_token_id).sum().item() == 6
    out = host.model.generate(**given, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == given["input_ids"].shape[1] + 3
    with pytest.raises(HostError, match="no square grid"):
        built(net(custom_towers.Pooled), video=True)


def test_regions_are_known_where_the_tokens_are_a_grid(mapped: Host) -> None:
    """A painted corner of the picture changes the tokens found for it most; other tokens stand nowhere."""
    image = picture()
    said = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    given = mapped.processor(images=[[image]], text=["<image> what?"], return_tensors="pt")
    corner = Prompt(mapped.model, mapped.processor, given, said).marks(regions=[Box(20, 0, 40, 20)])[0]
    holds = given["input_ids"][0] == mapped.model.config.image_token_id
    found = corner[holds].view(4, 4)
    assert torch.equal(found > 0, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool())
    image.paste((255, 0, 0), (20, 0, 40, 20))
    painted = mapped.processor(images=[[image]], text=["<image> what?"], return_tensors="pt")
    tower = mapped.model.model.vision_tower
    before, after = (tower(each["pixel_values"]).last_hidden_state for each in (given, painted))
    moved = (after - before).norm(dim=-1).view(4, 4)
    assert moved[:2, 2:].min() > moved[:, :2].max()
    pooled = built(net(custom_towers.Pooled))
    given = pooled.processor(images=[[image]], text=["<image> what?"], return_tensors="pt")
    with pytest.raises(UsageError, match="do not make the 6 image tokens"):
        Prompt(pooled.model, pooled.processor, given, said).marks(regions=[Box(0, 0, 20, 20)])


def test_a_tower_of_its_own_directory_with_arguments_and_its_processor(tmp_path: Path) -> None:
    module = net(width=8, groups=2)
    tower = CustomTower.of(module, processor(), arguments={"width": 8, "groups": 2})
    tower.save_pretrained(tmp_path / "tower")
    processor().save_pretrained(tmp_path / "tower")
    host = build_host(tiny.decoder("llama"), str(tmp_path / "tower"), tokenizer=tiny.tokenizer())
    given = inputs(host)
    expected = module(given["pixel_values"]).flatten(2).transpose(1, 2)
    assert torch.equal(host.model.model.vision_tower(given["pixel_values"]).last_hidden_state, expected)
    again = AutoModel.from_pretrained(tmp_path / "tower")
    assert isinstance(again.config, CustomTowerConfig)
    assert again.config.arguments == {"width": 8, "groups": 2}


def test_in_half_precision_it_takes_what_its_processor_gives() -> None:
    """Towers of transformers cast pixels, and so does it."""
    half = built(net(), dtype="bfloat16")
    given = inputs(half)
    assert given["pixel_values"].dtype == torch.float32
    expected = net()(given["pixel_values"]).flatten(2).transpose(1, 2)
    found = half.model.model.vision_tower(given["pixel_values"]).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    assert half.model.generate(**given, max_new_tokens=2, do_sample=False).shape[1] == given["input_ids"].shape[1] + 2


def test_in_half_precision_its_constructor_computes_as_ever(tmp_path: Path) -> None:
    CustomTower.of(net(custom_towers.Computing), processor()).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_module_and_preprocessing_stay_as_they_are() -> None:
    larger = processor(48)
    tower = CustomTower.of(net(), processor())
    host = build_host(tiny.decoder("llama"), tower, tokenizer=tiny.tokenizer(), image_processor=larger)
    assert host.processor.image_processor.size["height"] == 32
    assert larger.size["height"] == 48
    module = net().train()
    module.norm.eval()
    built(module)
    assert [each.training for each in (module, module.stem, module.norm)] == [True, True, False]
    with pytest.raises(HostError):
        CustomTower.of(wrong := custom_towers.Text().train(), processor())
    assert wrong.training


def test_an_adapter_trained_on_it_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    """No adapter holds averages of batch norms, so those are not to move while it is trained."""
    host = built(net(custom_towers.Projecting))
    save_host(host, tmp_path / "host")
    model = get_peft_model(load_host(tmp_path / "host").model, LoraConfig(r=2, target_modules=r".*vision_tower.*last"))
    given = inputs(host, 2)
    before = model.eval()(**given).logits
    model.train()
    for _ in range(2):
        model(**given, labels=given["input_ids"]).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    trained = model.eval()(**given).logits
    assert not torch.allclose(trained, before, atol=1e-3)
    model.peft_config["default"].base_model_name_or_path = "../host"
    model.save_pretrained(tmp_path / "lora")
    loaded = alula.load_model(tmp_path / "lora").model(**given).logits
    torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=1e-4)


def test_what_is_built_is_a_copy() -> None:
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    host = built(module)
    with torch.no_grad():
        for parameter in host.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_towers_averages_stand_still_in_training(mapped: Host) -> None:
    tower = mapped.model.model.vision_tower
    before = tower.module.norm.running_mean.clone()
    mapped.model.train()
    tower.requires_grad_(False)
    mapped.model.train()
    mapped.model(**inputs(mapped))
    assert torch.equal(tower.module.norm.running_mean, before)
    tower.requires_grad_(True)
    mapped.model.train()
    assert tower.module.training
    assert tower.module.stem.training
    mapped.model(**inputs(mapped)).logits.sum().backward()
    assert torch.equal(tower.module.norm.running_mean, before)
    assert tower.module.norm.weight.grad.abs().sum() > 0
    mapped.model.zero_grad()
    mapped.model.eval()


def test_what_cannot_be_made_again_is_refused_before_it_is_built() -> None:
    class Local(custom_towers.Net):
        pass

    with pytest.raises(HostError, match="cannot be imported from"):
        built(net(Local))
    with pytest.raises(HostError, match=r"is another module: .* and it makes 12"):
        built(net(width=8))  # made of nothing, it is 12 wide
    with pytest.raises(HostError, match="cannot be made of"):
        CustomTower.of(net(), processor(), arguments={"depth": 3})
    with pytest.raises(HostError, match="no plain JSON"):
        CustomTower.of(net(), processor(), arguments={"width": object()})
    forgetful = net(custom_towers.Forgetful)
    forgetful.scale = 2.0
    with pytest.raises(HostError, match="that state_dict has not"):
        built(forgetful)
    with pytest.raises(HostError, match="is no tensor"):
        built(net(custom_towers.Stating))
    with pytest.raises(HostError, match=r"it gives \(2, 12\), not tokens"):
        built(net(custom_towers.Summing))
    with pytest.raises(HostError, match="does not run on pixels"):
        built(custom_towers.Text())
    with pytest.raises(HostError, match="image_processor="):
        build_host(tiny.decoder("llama"), net(), tokenizer=tiny.tokenizer())
    with pytest.raises(HostError, match="not a square of one size"):
        build_host(
            tiny.decoder("llama"),
            net(),
            tokenizer=tiny.tokenizer(),
            image_processor=ViTImageProcessorPil(size={"height": 32, "width": 48}),
        )


_FRESH = """
import sys, torch
import alula.hosts
from alula.errors import HostError, UsageError
from transformers import AutoModelForImageTextToText, AutoProcessor
try:
    alula.hosts.load_host(sys.argv[1])
except HostError as error:
    print(error)
assert "tests.hosts.custom_towers" not in sys.modules
import tests.hosts.custom_towers
try:
    alula.hosts.load_host(sys.argv[1])
except HostError as error:
    print("imported:", str(error).splitlines()[0])
alula.hosts.trust_tower(tests.hosts.custom_towers.Net)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(type(model.model.vision_tower.module).__module__)
"""


@pytest.mark.slow
def test_loading_imports_no_module_that_only_a_directory_names(mapped: Host, tmp_path: Path) -> None:
    save_host(mapped, tmp_path / "host")
    run = subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path / "host")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    refused, found = run.stdout.strip().splitlines()[0], run.stdout.strip().splitlines()[-1]
    assert "loading makes none that only a directory names" in refused
    assert "trust_tower(Net)" in run.stdout
    (again,) = (line for line in run.stdout.splitlines() if line.startswith("imported:"))
    assert "only a directory names" in again
    assert "alula.towers" in run.stdout
    assert found == "tests.hosts.custom_towers"


def test_a_package_may_vouch_for_its_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib.metadata import EntryPoint

    (tmp_path / "vouched_for.py").write_text("from tests.hosts.custom_towers import Net\n\nclass Own(Net):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = CustomTowerConfig(source="vouched_for:Own", image_size=32, tokens=16, hidden_size=12, is_grid=True)
    with pytest.raises(HostError, match="only a directory names"):
        CustomTower(config)
    entry = EntryPoint(name="own", value="vouched_for:Own", group="alula.towers")
    monkeypatch.setattr(plugins, "_entries", lambda group: (entry,) if group == "alula.towers" else ())
    assert type(CustomTower(config).module).__name__ == "Own"
    sys.modules.pop("vouched_for")


@pytest.mark.parametrize(
    "source",
    [
        *("torch.nn.functional:relu", "json:JSONDecoder", "torch.nn:Nothing", "", "alula.__main__:main", 5),
        *("torch.nn:Linear", "alula.codes.vq:VQCodes"),  # imported, and of alula's; nobody has vouched for either
    ],
)
def test_what_a_config_names_has_to_be_a_module_of_pytorch(source: str) -> None:
    with pytest.raises(HostError):
        CustomTower(CustomTowerConfig(source=source, image_size=32, tokens=16, hidden_size=12))


def test_who_vouches_for_a_class_may_have_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Being imported is no consent: the directory would choose the arguments of any module in this process."""
    config = CustomTowerConfig(
        source="tests.hosts.custom_towers:Square", image_size=32, tokens=16, hidden_size=12, is_grid=True
    )
    with pytest.raises(HostError, match="only a directory names"):
        CustomTower(config)
    assert trust_tower(custom_towers.Square) is custom_towers.Square
    assert type(CustomTower(config).module) is custom_towers.Square
    with pytest.raises(HostError, match="is no class"):
        trust_tower(lambda: None)


def test_weights_that_are_one_stay_one(tmp_path: Path) -> None:
    """Loading gives every name a parameter, and training would take what was one apart."""
    host = built(net(custom_towers.Tied))
    save_host(host, tmp_path / "host")
    for model in (host.model, load_host(tmp_path / "host").model, alula.load_model(tmp_path / "host").model):
        module = model.model.vision_tower.module
        assert module.back.weight is module.there.weight
    expected = host.model(**inputs(host)).logits
    assert torch.equal(model(**inputs(host)).logits, expected)
    assert sum("back.weight" in name for name, _ in model.named_parameters()) == 0
    CustomTower.of(net(custom_towers.Tied), processor()).save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower").module
    assert again.back.weight is again.there.weight


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tokens", 9, "no square grid"),
        ("tokens", -16, "tokens is -16"),
        ("tokens", "16", "tokens is '16'"),
        ("image_size", 0, "image_size is 0"),
        ("image_size", 64, "tokens is 16, and it makes 64"),
        ("is_grid", "yes", "is_grid is 'yes'"),
        ("is_grid", False, "is_grid is False, and it makes True"),
        ("hidden_size", 24, "hidden_size is 24, and it makes 12"),
        ("arguments", [3], "no mapping"),
    ],
)
def test_a_damaged_configuration_is_told(mapped: Host, tmp_path: Path, name: str, value: object, said: str) -> None:
    tower = mapped.model.model.vision_tower
    tower.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(HostError, match=said):
        AutoModel.from_pretrained(tmp_path)


def test_what_shapes_do_not_tell_is_told_by_the_first_picture() -> None:
    tower = CustomTower.of(net(custom_towers.Computing), processor())  # it keeps tensors of its own
    tower.config.tokens = 4
    with pytest.raises(HostError, match="it makes 16 tokens 12 wide, and its configuration says 4 of 12"):
        tower(torch.zeros(1, 3, 32, 32))
