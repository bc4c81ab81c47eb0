"""Wanda, magnitude, the algebra of masks and alpha-SubNets against numbers that the published code of IMA computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alula import TokenMap
from alula.compress import WeightMask, WeightPruning, find_mask, prune

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "wanda.json").read_text())
NUMBERS = load_file(GOLDEN / "wanda.safetensors")
PLAIN = [key for key, given in FACTS["settings"].items() if not given["padded_rows"] and "variant" not in given]
TASKS = ["wanda_prompt_s0.5", *(f"wanda_prompt_task{i}_s0.5" for i in (1, 2, 3))]


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        rms_norm_eps=1e-6, rope_theta=10000.0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("model/w."): v for k, v in NUMBERS.items() if k.startswith("model/")})
    return model


def data(model: Any, setting: dict[str, Any], *, padding: int = 0) -> list[dict[str, Any]]:
    """The recorded calibration samples one by one, with as much padding in front of each."""
    perceptual, ids = (NUMBERS[f"{setting['calibration']}/in.{part}"] for part in ("perceptual", "ids"))
    text = model.get_input_embeddings()(ids).detach()
    parts = {"both": [perceptual, text], "prompt": [perceptual, text[:, :1]], "text": [text]}[setting["stream"]]
    embeds = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 0, padding, 0))
    modality = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    modality[:, padding : padding + sum(part.shape[1] for part in parts if part is perceptual)] = 1
    valid = torch.ones_like(modality)
    valid[:, :padding] = 0
    maps = [TokenMap.from_modalities(modality[i : i + 1], valid[i : i + 1]) for i in range(len(embeds))]
    masks = [{"attention_mask": valid[i : i + 1]} if padding else {} for i in range(len(embeds))]
    return [{"inputs_embeds": embeds[i : i + 1], "token_map": maps[i], **masks[i]} for i in range(len(embeds))]


def settings(setting: dict[str, Any]) -> WeightPruning:
    given: dict[str, Any] = {"pattern": "2:4"} if "n" in setting else {"sparsity": setting["sparsity"]}
    if "names" in setting:
        given |= {"targets": tuple(setting["names"]), "layers": (setting["start"],)}
    return WeightPruning(**given)


def recorded(key: str) -> WeightMask:
    """A published mask, whose set weights are pruned, as those that are kept."""
    prefix = f"{key}/out.mask."
    return WeightMask.of({f"layers.{k.removeprefix(prefix)}": ~v for k, v in NUMBERS.items() if k.startswith(prefix)})


def same(a: WeightMask, b: WeightMask) -> bool:
    return dict(a.shapes) == dict(b.shapes) and (a ^ b).density == 0


@pytest.mark.parametrize("key", PLAIN)
def test_wanda(model: Any, key: str) -> None:
    setting = FACTS["settings"][key]
    mask = find_mask(model, settings(setting), data(model, setting))
    assert same(mask, recorded(key))
    assert mask.sparsity == pytest.approx(FACTS["sparsity_reached"][key], abs=1e-4)


def test_padding_is_no_token(model: Any) -> None:
    """The published code counts padding, and lets tokens attend to it; here it changes nothing."""
    setting = FACTS["settings"]["wanda_both_s0.5"]
    padded = find_mask(model, settings(setting), data(model, setting, padding=12))
    assert same(padded, recorded("wanda_both_s0.5"))
    differing = (recorded("wanda_padded_both_s0.5") ^ recorded("wanda_both_s0.5")).density
    assert differing > 0.05  # so what is published is something else


@torch.no_grad()
def test_the_pruned_model(model: Any) -> None:
    setting = FACTS["settings"]["wanda_both_s0.5"]
    batches = data(model, setting)
    prune(model, settings(setting), batches)
    logits = torch.cat([model(inputs_embeds=batch["inputs_embeds"]).logits for batch in batches])
    expected: Tensor = NUMBERS["wanda_both_s0.5/out.logits"]
    torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=1e-4)


def test_magnitude(model: Any) -> None:
    mask = find_mask(model, WeightPruning(method="magnitude", sparsity=0.5, per="output"))
    assert same(mask, recorded("magnitude_rows_s0.5"))


def test_algebra(model: Any) -> None:
    tasks, text = [recorded(key) for key in TASKS], recorded("wanda_text_s0.5")
    subnet = tasks[0] & tasks[1] & tasks[2] & tasks[3]
    assert same(subnet, recorded("subnet_intersection"))
    assert subnet.sparsity == pytest.approx(FACTS["subnet_sparsity"]["intersection"], abs=1e-4)
    assert same(tasks[0] - tasks[1], recorded("subnet_complement"))
    assert same(tasks[0] & tasks[1], recorded("subnet_add"))
    assert same(tasks[0] & text, recorded("pair_intersection"))
    assert same(tasks[0] | text, recorded("pair_union"))
    assert same(tasks[0] - text, recorded("pair_ablate_all"))


def test_overlap_of_masks() -> None:
    masks = {key: recorded(f"wanda_{key}_s0.5") for key in ("prompt", "text", "both")}
    for a, b in (("prompt", "text"), ("prompt", "both"), ("text", "both")):
        found, expected = masks[a].iou(masks[b]), NUMBERS[f"iou/out.{a}_{b}"]
        for i, linear in enumerate(FACTS["geometry"]["linears"]):
            for layer in range(2):
                assert found[f"layers.{layer}.{linear}"] == pytest.approx(float(expected[i, layer]))
    pruned = (~masks["prompt"]).iou(~masks["text"])["layers.0.self_attn.q_proj"]
    assert pruned == pytest.approx(float(NUMBERS["iou/out.pruned_q_proj_0"]))
