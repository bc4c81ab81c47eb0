"""The projection module and the tokenizers against numbers of OneLLM's published code (tests/golden/onellm*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from alula.hosts.universal import ProjectionShape, UniversalConfig, UniversalModel
from alula.hosts.universal.shapes import plain, shape_of

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = {"rgbd": "depth", "imu": "motion", "fmri": "response"}  # published name -> ours


def numbers(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())["geometry"]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return facts, {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def built(facts: dict[str, Any], sizes: dict[str, dict[str, int]], depth: int) -> UniversalModel:
    """A model of the geometry of a recording, weights yet to be filled."""
    clip = facts.get("clip") or {"image": 8, "patch": 8, "layers": 1, "heads": 4, "mlp": 4}
    vision = CLIPVisionConfig(
        hidden_size=facts["width"], intermediate_size=facts["width"] * clip["mlp"], num_hidden_layers=clip["layers"],
        num_attention_heads=clip["heads"], image_size=clip["image"], patch_size=clip["patch"], hidden_act="quick_gelu",
    )  # fmt: skip
    shape = ProjectionShape(
        facts["experts"], depth, 16, facts["modality_tokens"], facts.get("ffn") or facts["expert_ffn"]
    )
    config = UniversalConfig(
        text_config=LlamaConfig(
            hidden_size=facts.get("llm_width") or facts["llm"]["width"], num_hidden_layers=1, vocab_size=8,
            num_attention_heads=2, intermediate_size=8,
        ),
        vision_config=vision,
        media=list(sizes),
        sizes={name: plain(shape_of(name, values)) for name, values in sizes.items()},
        projection=plain(shape),
    )  # fmt: skip
    return UniversalModel(config).eval()


@torch.no_grad()
def fill(model: UniversalModel, weights: dict[str, Tensor]) -> None:
    """Published weights of experts, routers, projections, tokens, tags and tokenizers, by their published names."""
    connectors: Any = model.multi_modal_projector
    for k, expert in enumerate(connectors.experts):
        for b, block in enumerate(expert):
            of = {
                name.removeprefix(f"resample_layers.{k}.{b}."): value
                for name, value in weights.items()
                if f"resample_layers.{k}.{b}." in name
            }
            block.qkv.weight.copy_(torch.cat([of[f"attention.{n}.weight"] for n in ("wq", "wk", "wv")]))
            block.out.weight.copy_(of["attention.wo.weight"])
            block.gate_up.weight.copy_(torch.cat([of["feed_forward.w1.weight"], of["feed_forward.w3.weight"]]))
            block.down.weight.copy_(of["feed_forward.w2.weight"])
            block.attention_norm.weight.copy_(of["attention_norm.weight"])
            block.mlp_norm.weight.copy_(of["ffn_norm.weight"])
    for theirs in ("image", "video", "audio", *NAMES):
        ours = NAMES.get(theirs, theirs)
        if f"resample_tokens.{theirs}" not in weights or ours not in connectors:
            continue
        own = connectors.of(ours)
        own.tokens.copy_(weights[f"resample_tokens.{theirs}"][0])
        for module, name in (
            (own.entry, "clip_proj1.{}.0"), (own.entry_norm, "clip_proj1.{}.1"), (own.exit, "clip_proj2.{}.0"),
            (own.exit_norm, "clip_proj2.{}.1"), (own.router.up, "routers.{}.fc1"),
            (own.router.logits, "routers.{}.fc2"),
        ):  # fmt: skip
            module.weight.copy_(weights[name.format(theirs) + ".weight"])
            module.bias.copy_(weights[name.format(theirs) + ".bias"])
        if f"start_tag.{theirs}" in weights:
            own.start.copy_(weights[f"start_tag.{theirs}"][0, 0])
            own.end.copy_(weights[f"end_tag.{theirs}"][0, 0])
        if own.tokenizer is not None and f"conv1.{theirs}.weight" in weights:
            own.tokenizer.project.load_state_dict(
                {n: weights[f"conv1.{theirs}.{n}"] for n in ("weight", "bias") if f"conv1.{theirs}.{n}" in weights}
            )
            own.tokenizer.positions.copy_(weights[f"positional_embedding.{theirs}"])


@torch.no_grad()
def fill_tower(tower: Any, weights: dict[str, Tensor], layers: int) -> None:
    """open_clip's names of a vision transformer."""
    of = {name.removeprefix("clip.visual."): value for name, value in weights.items() if "clip.visual." in name}
    tower.embeddings.class_embedding.copy_(of["class_embedding"])
    tower.embeddings.patch_embedding.weight.copy_(of["conv1.weight"])
    tower.embeddings.position_embedding.weight.copy_(of["positional_embedding"])
    for module, name in ((tower.pre_layrnorm, "ln_pre"), (tower.post_layernorm, "ln_post")):
        module.load_state_dict({n: of[f"{name}.{n}"] for n in ("weight", "bias")})
    for index in range(layers):
        block, at = tower.encoder.layers[index], f"transformer.resblocks.{index}"
        for part, kind in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            split = zip(("q_proj", "k_proj", "v_proj"), of[f"{at}.attn.{part}"].chunk(3), strict=True)
            for name, value in split:
                getattr(getattr(block.self_attn, name), kind).copy_(value)
        for module, name in (
            (block.self_attn.out_proj, "attn.out_proj"), (block.layer_norm1, "ln_1"), (block.layer_norm2, "ln_2"),
            (block.mlp.fc1, "mlp.c_fc"), (block.mlp.fc2, "mlp.c_proj"),
        ):  # fmt: skip
            module.load_state_dict({n: of[f"{at}.{name}.{n}"] for n in ("weight", "bias")})


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_projection_module() -> None:
    facts, found = numbers("onellm")
    sizes = {"image": {}, "audio": {}, "motion": {}, "response": {"voxels": 4}}
    model = built(facts, sizes, facts["depth"])
    fill(model, {name.removeprefix("upm/w."): value for name, value in found.items() if "upm/w." in name})
    connectors = model.multi_modal_projector
    given = {}
    for theirs in facts["cases"]:
        ours, at = NAMES.get(theirs, theirs), f"upm_{theirs}"
        given[ours] = found[f"{at}/in.features"]
        own: Any = connectors.of(ours)
        entered = own.entered(given[ours])
        read = [expert(entered, facts["modality_tokens"]) for expert in connectors.experts]
        close(torch.stack(read), found[f"{at}/out.experts"])
        close(own.router(entered[:, : facts["modality_tokens"]]), found[f"{at}/out.routing"])
        close(own.mixed(read, entered), found[f"{at}/out.mixed"])
    tokens = connectors(given)  # all media in one call
    for theirs in facts["cases"]:
        close(tokens[NAMES.get(theirs, theirs)][:, 1:-1], found[f"upm_{theirs}/out.tokens"])


@pytest.mark.parametrize("theirs", ["image", "video", "rgbd", "audio", "imu", "fmri"])
@torch.no_grad()
def test_from_raw_values_to_decoder_tokens(theirs: str) -> None:
    facts, found = numbers("onellm_encode")
    bins, moments = facts["audio"]["input"]
    sizes: dict[str, dict[str, int]] = {
        "image": {}, "video": {"frames": facts["frames"]}, "audio": {"bins": bins, "moments": moments},
        "depth": {"with_image": 1}, "motion": {"samples": facts["imu"]["samples"]},
        "response": {"voxels": facts["fmri"]["voxels"]},
    }  # fmt: skip
    model = built(facts, sizes, facts["expert_depth"])
    weights = {name.removeprefix("model/w."): value for name, value in found.items() if "model/w." in name}
    fill(model, weights)
    fill_tower(model.vision_tower, weights, facts["clip"]["layers"])
    raw = found[f"encode_{theirs}/in.raw"]
    raw = {
        "audio": lambda: raw[:, 0].transpose(1, 2),
        "imu": lambda: raw.transpose(1, 2),
        "fmri": lambda: raw[:, 0],
    }.get(theirs, lambda: raw)()
    ours = NAMES.get(theirs, theirs)
    own: Any = model.multi_modal_projector.of(ours)
    if own.tokenizer is not None:
        close(own.tokenizer(raw, model.vision_tower.embeddings.class_embedding), found[f"encode_{theirs}/out.rows"])
    out = getattr(model, f"get_{ours}_features")(raw)
    close(out.last_hidden_state, found[f"encode_{theirs}/out.features"])
    tokens = torch.stack(list(out.pooler_output))
    close(tokens[:, 1:-1], found[f"encode_{theirs}/out.tokens"])
    close(tokens[:, 0], weights[f"start_tag.{theirs}"][:, 0].expand(len(tokens), -1))
    close(tokens[:, -1], weights[f"end_tag.{theirs}"][:, 0].expand(len(tokens), -1))
