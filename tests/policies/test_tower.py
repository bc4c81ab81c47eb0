"""Criteria of the vision tower, against towers run by hand in double precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from alula.errors import HostError, UsageError
from alula.policies import Prune
from alula.seam.dialect import cache_of_output
from tests import zoo
from tests.elsewhere import DEVICE, elsewhere
from tests.grafts.common import run
from tests.policies.oracle import Left, masked
from tests.policies.test_criteria import images, knee
from tests.policies.test_withdraw import LAYERS, WAYS, close

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = ("3III2", "5", "I4I2")
HOSTS = ("llava-llama", "llava-mistral", "llava-qwen3", "llava-gemma3", "gemma3_vl")
CRITERIA = ("tower_attention", "tower_similarity")


@torch.no_grad()
def scored(model: Any, inputs: dict[str, Tensor], criterion: str) -> Tensor:
    """(images, tokens) of the tower run by hand, in double precision."""
    tower = copy.deepcopy(model.model.vision_tower).double()
    tower.set_attn_implementation("eager")
    output = tower(inputs["pixel_values"].double(), output_hidden_states=True, output_attentions=True)
    has_class = model.config.model_type == "llava"
    feature = -2 if has_class else -1
    states = output.hidden_states[feature]
    if criterion == "tower_attention":
        weights = output.attentions[feature].mean(dim=1)
        scores = weights[:, 0, 1:] if has_class else weights.mean(dim=1)
    else:
        patches = states[:, 1:] if has_class else states
        like = states[:, 0] if has_class else states.mean(dim=1)
        scores = torch.stack([torch.cosine_similarity(p, c[None], dim=-1) for p, c in zip(patches, like, strict=True)])
    if has_class:
        return scores
    tokens = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]  # of four by four patches
    return torch.stack([scores[:, square].mean(dim=1) for square in tokens], dim=1)


def left_by(model: Any, host: str, inputs: dict[str, Tensor], criterion: str, at: int) -> Left:
    """Half of the tokens of every prompt."""
    scores, ids = iter(scored(model, inputs, criterion)), inputs["input_ids"]
    stays = ids != zoo.IMAGE
    for sample in range(len(ids)):
        places = [place for image in images(model, host, ids[sample]) for place in image]
        of_tokens = torch.cat([next(scores) for _ in images(model, host, ids[sample])] or [torch.zeros(0)])
        best = of_tokens.argsort(descending=True, stable=True)[: len(places) // 2].tolist()
        stays[sample, [places[i] for i in best]] = True

    def left(layer: int, now: Tensor) -> Tensor:
        found = torch.ones_like(now, dtype=torch.bool)
        if layer >= at:
            found[:, : stays.shape[1]] = stays.repeat_interleave(len(now) // len(stays), dim=0)
        return found

    return left


def policy(criterion: str, layer: int = 0, **settings: Any) -> Prune:
    return Prune.model_validate({"stages": ((layer, 0.5),), "criterion": criterion, **settings})


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("host", HOSTS)
def test_prefill_equals_the_masked_oracle(host: str, criterion: str, layer: int) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    left = left_by(model, host, inputs, criterion, layer)
    with masked(model, left):
        expected = run(model, host, inputs, use_cache=False)
    with policy(criterion, layer).on(model):
        ours = run(model, host, inputs)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_the_masked_oracle(way: str, *, use_cache: bool) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 4}
    with masked(model, left_by(model, "llava-llama", inputs, "tower_attention", 0)):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with policy("tower_attention").on(model):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options, use_cache=use_cache)
    assert torch.equal(ours, expected)


def published() -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A host with the CLIP tower of VisionZip's recording, its shape and its numbers."""
    shape = json.loads((GOLDEN / "visionzip.json").read_text())["geometry"]["clip"]
    numbers = load_file(GOLDEN / "visionzip.safetensors")
    vision = CLIPVisionConfig(
        hidden_size=shape["width"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        image_size=shape["image"],
        patch_size=shape["patch"],
        hidden_act=shape["activation"],
    )
    text = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=7, image_seq_length=36)
    model: Any = LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    weights = {key.removeprefix("clip/w."): value.float() for key, value in numbers.items() if "clip/w." in key}
    own = tower.state_dict()
    named = {key if key in own else key.removeprefix("vision_model."): value for key, value in weights.items()}
    missing, unexpected = tower.load_state_dict(named, strict=False)
    assert not unexpected
    assert all("position_ids" in key for key in missing)
    return model, shape, numbers


def test_the_published_scores_of_a_clip_tower() -> None:
    """VisionZip's dominant tokens, through a whole host."""
    model, shape, numbers = published()
    ids = torch.tensor([[1, *[7] * 36, 2]] * 2)
    stages = ((0, shape["dominant"] / 36),)
    with policy("tower_attention", stages=stages, per="image").on(model), torch.no_grad():
        output = model(input_ids=ids, pixel_values=numbers["clip/in.pixels"], use_cache=True)
    cache: Any = cache_of_output(output)
    kept = numbers["clip/out.indices"][:, 1:].sort(dim=1).values  # the class token's is 0, as that of our text
    assert torch.equal(cache.layers[0].slots.places[:, 1:-1], kept)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_knee_of_a_towers_curve_is_each_images_own(criterion: str) -> None:
    model, _, _ = published()
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[7] * 36, 2]] * 5)
    with policy(criterion, stages=((0, "knee"),), per="image").on(model), torch.no_grad():
        cache: Any = cache_of_output(model(input_ids=ids, pixel_values=pixels, use_cache=True))
    slots, counts = cache.layers[0].slots, set()
    for sample, scores in enumerate(scored(model, {"pixel_values": pixels}, criterion)):
        places = slots.places[sample] if slots.real is None else slots.places[sample][slots.real[sample]]
        assert (places[1:-1] - 1).tolist() == knee(scores.tolist())
        counts.add(len(places))
    assert len(counts) > 1


def test_hosts_whose_towers_say_nothing_are_refused() -> None:
    with pytest.raises(HostError, match="has no vision tower"), policy("tower_similarity").on(zoo.build("llama")):
        pass
    model, inputs = zoo.build("qwen2_5_vl"), zoo.batch("qwen2_5_vl", "2I2")
    with policy("tower_similarity").on(model), pytest.raises(HostError, match="all images in one line"):
        run(model, "qwen2_5_vl", inputs)
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "2I2")
    embeds = torch.randn(1, 8, 32)
    with policy("tower_attention").on(model), pytest.raises(UsageError, match="was not seen to make"):
        model(input_ids=None, inputs_embeds=embeds, mm_token_type_ids=(inputs["input_ids"] == zoo.IMAGE).long())


def test_images_that_come_in_pieces_are_refused() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "2I2I3")
    with policy("tower_attention").on(model), pytest.raises(UsageError, match="cannot be told which"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)


def test_a_tower_keeps_no_hooks_and_copies_read_their_own() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", *LAYOUTS)
    before = run(model, "llava-llama", inputs)
    hooks = [len(part._forward_hooks) for part in model.model.vision_tower.modules()]
    attached = policy("tower_attention").attach(model)
    expected = run(model, "llava-llama", inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, "llava-llama", inputs), expected)
    attached.detach()
    assert [len(part._forward_hooks) for part in model.model.vision_tower.modules()] == hooks
    assert torch.equal(run(model, "llava-llama", inputs), before)
    assert torch.equal(run(twin, "llava-llama", inputs), expected)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_it_stays_on_the_models_device(criterion: str) -> None:
    inputs = zoo.batch("llava-llama", *LAYOUTS)

    def said(device: str) -> Tensor:
        model = zoo.build("llava-llama", layers=LAYERS).to(device)
        with policy(criterion, merge="contextual").on(model):
            return run(model, "llava-llama", {name: value.to(device) for name, value in inputs.items()})

    expected = said("cpu")
    with elsewhere():
        ours = said(DEVICE).to("cpu")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
