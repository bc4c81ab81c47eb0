"""Importing the released layout: every tensor finds its place, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

import alula
from alula import TokenMap, WingsConfig
from alula.anatomy import Anatomy
from alula.cli import import_
from alula.errors import AdapterError, AlulaError, UsageError
from alula.grafts.wings.released import TRAINED_TOKENS, Release
from alula.importing import import_wings
from tests.hosts import tiny

LAYERS, BLOCKS, RANK, WIDTH, VISION, SIDE = 2, 3, 4, 32, 24, 32
SYSTEM_TOKENS = 4


def llm(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tiny.tokenizer()),
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=4,
    )
    return Qwen2ForCausalLM(config).eval()


def tower(seed: int) -> Any:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=VISION,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def released(*, stage: int = 2, columns: int = 4096) -> dict[str, Tensor]:
    """A small checkpoint in the released layout, every number its own."""
    generator = torch.Generator().manual_seed(11)
    tensors = dict(llm(7).state_dict())
    for name, value in tower(8).state_dict().items():
        name = name.removeprefix("vision_model.")
        if not name.startswith((f"encoder.layers.{BLOCKS - 1}.", "head.")):
            tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = value

    def random(*shape: int, std: float = 0.25) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    for i in range(LAYERS):
        for pool in ("attn_pool", "attn_t_pool"):
            for projection in "qkvo":
                name = f"model.layers.{i}.{pool}.{projection}_proj"
                tensors[f"{name}.0.weight"] = random(RANK, WIDTH)
                unused = stage == 1 and pool == "attn_t_pool"
                tensors[f"{name}.1.weight"] = random(WIDTH, RANK, std=0.0 if unused else 0.25)
        if stage == 2:
            tensors[f"model.layers.{i}.reweight_module.linear.weight"] = random(2, columns, std=1.0)
            tensors[f"model.layers.{i}.reweight_module.linear.bias"] = random(2, std=1.0)
    for place, width in ((0, VISION), (2, WIDTH)):
        tensors[f"model.mm_projector.{place}.weight"] = random(WIDTH, width)
        tensors[f"model.mm_projector.{place}.bias"] = random(WIDTH)
    return {name: value.contiguous() for name, value in tensors.items()}


def write(directory: Path, tensors: dict[str, Tensor], shards: int = 3) -> Path:
    """The tensors as the release has them: numbered shards and an index, or a single file."""
    directory.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file)
        index |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    return directory


def take(checkpoint: Path, out: Path) -> Any:
    # the LLM and tower it is assembled from have other weights: all that counts must come from the checkpoint
    return import_wings(checkpoint, llm(1), tower(2), out, system_tokens=SYSTEM_TOKENS, tokenizer=tiny.tokenizer())


def by_hand(tensors: dict[str, Tensor], picture: Image.Image, ids: Tensor, image_token: int, stage: int) -> Tensor:
    """Logits from the released tensors without the importer: squared picture, 2 blocks, projector, decoder, graft."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    resized = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = torch.tensor(list(resized.tobytes()), dtype=torch.float32).view(SIDE, SIDE, 3).permute(2, 0, 1)
    pixels = ((values / 255 - 0.5) / 0.5)[None]

    eyes = tower(8)
    with torch.no_grad():
        features = eyes(pixels, output_hidden_states=True).hidden_states[BLOCKS - 1]
    for place in (0, 2):
        weight, bias = (tensors[f"model.mm_projector.{place}.{part}"] for part in ("weight", "bias"))
        features = torch.nn.functional.linear(features, weight, bias)
        features = torch.nn.functional.gelu(features) if place == 0 else features

    model = llm(7)
    settings = WingsConfig(compat="published", rank=RANK, learners=("visual",), layers=(0, 1))
    if stage == 2:
        settings = WingsConfig(compat="published", rank=RANK, system_tokens=SYSTEM_TOKENS, router_tokens=64)
    graft = alula.attach(model, settings)
    with torch.no_grad():
        for key, value in graft.state_dict().items():
            _, layer, part, *rest = key.split(".")
            if part == "router":
                value.copy_(tensors[f"model.layers.{layer}.reweight_module.linear.{rest[0]}"][..., :64])
            else:
                pool = "attn_pool" if part == "visual" else "attn_t_pool"
                factor = ("down", "up").index(rest[1])
                value.copy_(tensors[f"model.layers.{layer}.{pool}.{rest[0]}_proj.{factor}.weight"])
        is_image = ids == image_token
        tokens = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        tokens = tokens.masked_scatter(is_image[..., None], features)
        return model(inputs_embeds=tokens, token_map=TokenMap.from_modalities(is_image.long())).logits


def prompt(processor: Any, picture: Image.Image | None) -> Any:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "what do you see?"}]
    if picture is not None:
        parts.insert(0, {"type": "image", "image": picture})
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be brief."}]},
        {"role": "user", "content": parts},
    ]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


PICTURE = Image.effect_noise((40, 24), 90).convert("RGB")


@pytest.mark.parametrize(("stage", "shards"), [(2, 3), (2, 1), (1, 2)])
def test_an_imported_model_answers_as_the_released_tensors_do(tmp_path: Path, stage: int, shards: int) -> None:
    tensors = released(stage=stage)
    made = take(write(tmp_path / "released", tensors, shards), tmp_path / "out")
    assert made.config.learners == (("visual",) if stage == 1 else ("visual", "textual"))
    model, processor = alula.load_model(made.adapter)
    inputs = prompt(processor, PICTURE)
    vocabulary = tensors["lm_head.weight"].shape[0]
    with torch.no_grad():
        ours = model(**inputs).logits[..., :vocabulary]
    theirs = by_hand(tensors, PICTURE, inputs["input_ids"], model.config.image_token_id, stage)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)  # the cache is off by default
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_the_host_is_stock_and_the_text_is_the_released_decoder(tmp_path: Path) -> None:
    made = take(write(tmp_path / "released", released()), tmp_path / "out")
    host, processor = alula.load_model(made.host)
    assert alula.grafts_of(host) == {}
    inputs = prompt(processor, None)
    reference = llm(7)
    with torch.no_grad():
        ours = host(**inputs).logits[..., : reference.config.vocab_size]
        assert torch.equal(ours, reference(inputs["input_ids"]).logits)


def test_inputs_beyond_the_trained_router_positions_are_refused(tmp_path: Path) -> None:
    made = take(write(tmp_path / "released", released(columns=40)), tmp_path / "short")
    assert made.config.router_tokens == 40
    model, processor = alula.load_model(made.adapter)
    inputs = prompt(processor, PICTURE)
    assert inputs["input_ids"].shape[1] > 40
    with pytest.raises(UsageError, match="has weights for 40 positions"), torch.no_grad():
        model(**inputs)
    wide = take(write(tmp_path / "wide", released(columns=4096)), tmp_path / "long")
    assert wide.config.router_tokens == TRAINED_TOKENS == 2048


def _index(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / INDEX
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


TOWER = "model.vision_tower.vision_tower.vision_model.encoder.layers"
SECOND_SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
ROUTER = "model.layers.1.reweight_module.linear.bias"
WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a learner's factor missing": (
        lambda t: t.pop("model.layers.1.attn_t_pool.v_proj.1.weight"),
        "attn_t_pool.v_proj.1",
    ),
    "a router missing": (lambda t: t.pop(ROUTER), "reweight_module.linear.bias"),
    "a decoder weight missing": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "up_proj"),
    "a projector weight missing": (lambda t: t.pop("model.mm_projector.2.bias"), "mm_projector.2.bias"),
    "a tower block missing": (
        lambda t: t.pop(f"{TOWER}.1.mlp.fc1.weight"),
        "encoder.layers.1.mlp.fc1.weight",
    ),
    "a tower block too many": (
        lambda t: t.update(
            {"model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias": torch.ones(32)}
        ),
        "not used",
    ),
    "a tensor nobody knows": (lambda t: t.update({"model.extra": torch.ones(1)}), "not used.*model.extra"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(8)}),
        "norm.weight has shape",
    ),
    "another vocabulary": (lambda t: t.update({"lm_head.weight": torch.ones(9, WIDTH)}), "lm_head.weight has shape"),
    "another rank in one factor": (
        lambda t: t.update({"model.layers.1.attn_pool.q_proj.0.weight": torch.ones(5, WIDTH)}),
        "has shape",
    ),
    "no learners at all": (
        lambda t: [t.pop(name) for name in list(t) if "pool" in name],
        "no Wings learners",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_every_key_counts(tmp_path: Path, wrong: str) -> None:
    harm, message = WRONG_TENSORS[wrong]
    tensors = released()
    harm(tensors)
    with pytest.raises(AdapterError, match=message):
        take(write(tmp_path / "released", tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


WRONG_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard missing": (
        lambda p: (p / SECOND_SHARD).unlink(),
        "is missing",
    ),
    "a shard cut off": (
        lambda p: (p / SECOND_SHARD).write_bytes((p / SECOND_SHARD).read_bytes()[:-8]),
        "damaged",
    ),
    "an index naming a tensor no shard has": (
        lambda p: _index(p, lambda c: c["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"})),
        "'ghost'",
    ),
    "an index without one of the tensors": (lambda p: _index(p, lambda c: c["weight_map"].pop(ROUTER)), "is not where"),
    "an index that is no JSON": (
        lambda p: (p / INDEX).write_text("{"),
        "not a safetensors index",
    ),
    "an index without a map": (lambda p: _index(p, lambda c: c.pop("weight_map")), "not a safetensors index"),
    "nothing there": (lambda p: [file.unlink() for file in p.iterdir()], "neither"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, wrong: str) -> None:
    harm, message = WRONG_FILES[wrong]
    path = write(tmp_path / "released", released())
    harm(path)
    with pytest.raises(AdapterError, match=message) as caught:
        take(path, tmp_path / "out")
    assert caught.value.where
    assert caught.value.remedy


def full_size() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released 7B checkpoint, as its index of 134,197 bytes and 16.55 GB of shards imply."""
    d, ffn, v, vocabulary = 4096, 11008, 1152, 151936
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (d,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, d))
    for i in range(32):
        layer = f"model.layers.{i}"
        for name in "qkv":
            shapes |= {f"{layer}.self_attn.{name}_proj.weight": (d, d), f"{layer}.self_attn.{name}_proj.bias": (d,)}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, d)
        shapes |= dict.fromkeys((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"), (ffn, d))
        shapes[f"{layer}.mlp.down_proj.weight"] = (d, ffn)
        shapes |= dict.fromkeys((f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"), (d,))
        for pool in ("attn_pool", "attn_t_pool"):
            for name in "qkvo":
                shapes |= {
                    f"{layer}.{pool}.{name}_proj.0.weight": (64, d),
                    f"{layer}.{pool}.{name}_proj.1.weight": (d, 64),
                }
        linear = f"{layer}.reweight_module.linear"
        shapes |= {f"{linear}.weight": (2, 4096), f"{linear}.bias": (2,)}
    for place, width in ((0, v), (2, d)):
        shapes |= {f"model.mm_projector.{place}.weight": (d, width), f"model.mm_projector.{place}.bias": (d,)}
    eyes = TOWER.removesuffix(".encoder.layers")
    shapes |= {
        f"{eyes}.embeddings.patch_embedding.weight": (v, 3, 14, 14),
        f"{eyes}.embeddings.patch_embedding.bias": (v,),
        f"{eyes}.embeddings.position_embedding.weight": (729, v),
        f"{eyes}.post_layernorm.weight": (v,),
        f"{eyes}.post_layernorm.bias": (v,),
    }
    for j in range(26):
        parts = {f"self_attn.{name}_proj": (v, v) for name in ("q", "k", "v", "out")}
        parts |= {"mlp.fc1": (4304, v), "mlp.fc2": (v, 4304), "layer_norm1": (v,), "layer_norm2": (v,)}
        for name, shape in parts.items():
            shapes |= {f"{TOWER}.{j}.{name}.weight": shape, f"{TOWER}.{j}.{name}.bias": shape[:1]}
    return shapes


def test_the_released_7b_checkpoint_fits_tensor_by_tensor(tmp_path: Path) -> None:
    """Qwen1.5-7B and SigLIP so400m/14-384 at full size, without their weights."""
    shapes = full_size()
    assert len(shapes) == 1388
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_275_056_224
    release = Release(tmp_path, dict.fromkeys(shapes, tmp_path / "model.safetensors"), shapes)
    config = release.config(system_tokens=14)
    assert (config.rank, config.router_tokens, config.layers) == (64, TRAINED_TOKENS, tuple(range(32)))
    text = Qwen2Config(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=151936,
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    with torch.device("meta"):
        llava = LlavaConfig(vision_config=vision, text_config=text, image_token_id=151646, tie_word_embeddings=False)
        model = LlavaForConditionalGeneration(llava)
    graft = alula.attach(model, config)
    targets = release.match(Anatomy.of(model), graft, vocabulary=151936)
    assert targets.keys() == shapes.keys()
    with pytest.raises(AdapterError, match="has shape"):
        release.match(Anatomy.of(model), graft, vocabulary=151935)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        take(write(tmp_path / "released", released()), tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    app = typer.Typer()
    import_.register(app)
    path = write(tmp_path / "released", released())
    llm(1).save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    tower(2).save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}})
    )
    parts = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "tower")]
    result = CliRunner().invoke(
        app, ["import", "wings", str(path), str(tmp_path / "out"), *parts, "--system-tokens", "4", "--json"]
    )
    assert result.exit_code == 0, result.output
    result_facts = json.loads(result.stdout)
    assert result_facts["config"]["compat"] == "published"
    model, processor = alula.load_model(result_facts["adapter"])
    with torch.no_grad():
        assert torch.isfinite(model(**prompt(processor, PICTURE)).logits).all()
    again = CliRunner().invoke(app, ["import", "wings", str(path), str(tmp_path / "out"), *parts])
    assert isinstance(again.exception, AlulaError)
