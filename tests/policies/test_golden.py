"""Numbers computed by the authors' published code (tests/golden), on a tiny LLaMA with random weights."""

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
from alula.policies import Prune, Skip, Withdraw
from alula.seam import find
from alula.seam.dialect import cache_keyword, cache_of_output

GOLDEN = Path(__file__).parents[1] / "golden"


def recorded(name: str) -> tuple[Any, dict[str, Any], dict[str, Tensor], TokenMap]:
    """The model, the facts and the numbers of a recording, and which of its tokens are an image."""
    facts, numbers = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    model: Any = LlamaForCausalLM(LlamaConfig(**facts["config"])).eval()
    weights = {key.removeprefix("model_state/"): value for key, value in numbers.items() if "model_state/" in key}
    model.load_state_dict(weights)
    modalities = torch.zeros(numbers["inputs_embeds"].shape[:2], dtype=torch.int64)
    start, stop = facts["layout"]["image"]
    modalities[:, start:stop] = 1
    return model, facts, numbers, TokenMap.from_modalities(modalities)


@torch.no_grad()
def test_withdrawal() -> None:
    model, facts, numbers, tokens = recorded("withdraw")
    embeds, left = numbers["inputs_embeds"], numbers["logits_rows"]
    cos, sin = model.model.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    hidden = embeds
    for index, layer in enumerate(model.model.layers):  # as it is published: what leaves is cut off
        if index == facts["layer"]:
            hidden, cos, sin = hidden[:, left], cos[:, left], sin[:, left]
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
    with Withdraw(layer=facts["layer"]).on(model):
        output = model(inputs_embeds=embeds, token_map=tokens)
    assert torch.equal(output.logits[:, left], model.lm_head(model.model.norm(hidden)))
    torch.testing.assert_close(output.logits[:, left], numbers["prefill_logits"], atol=1e-5, rtol=1e-5)
    cache: Any = cache_of_output(output)
    assert [layer.keys.shape[-2] for layer in cache.layers[:8]] == [620] * 5 + [44] * 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_withdrawal_while_generating(*, use_cache: bool) -> None:
    model, facts, numbers, tokens = recorded("withdraw")
    seam_options = {"max_new_tokens": facts["new_tokens"], "do_sample": False, "use_cache": use_cache}
    with Withdraw(layer=facts["layer"]).on(model):
        seam = find(model)
        assert seam is not None
        with seam.given_tokens(tokens):
            said = model.generate(inputs_embeds=numbers["inputs_embeds"], **seam_options)
    assert torch.equal(said, numbers["greedy_tokens"])


@torch.no_grad()
def test_pruning_by_the_last_tokens_attention() -> None:
    model, facts, numbers, tokens = recorded("prune")
    embeds = numbers["inputs_embeds"]
    with Prune(stages=[(facts["layer"], facts["keep_ratio"])]).on(model):
        output = model(inputs_embeds=embeds, token_map=tokens)
        cache: Any = cache_of_output(output)
        seam = find(model)
        assert seam is not None
        with seam.given_tokens(tokens):
            said = model.generate(inputs_embeds=embeds, max_new_tokens=facts["new_tokens"], do_sample=False)
    held = cache.layers[facts["layer"]].slots.places[0]
    assert torch.equal(held[tokens.is_perceptual[0, held]], numbers["kept_columns"])
    torch.testing.assert_close(output.logits[:, held], numbers["prefill_logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(said, numbers["greedy_tokens"])
    assert [layer.keys.shape[-2] for layer in cache.layers[:8]] == [620] * 3 + [332] * 5


SKIPPED = json.loads((GOLDEN / "skip.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("case", SKIPPED["cases"])
def test_skipping(case: str) -> None:
    """The modes in which all tokens skip in all forwards; what the published code copies into caches nobody reads."""
    numbers, settings = load_file(GOLDEN / "skip.safetensors"), SKIPPED["cases"][case]
    model: Any = LlamaForCausalLM(LlamaConfig(**SKIPPED["config"])).eval()
    weights = {key.removeprefix("weights/"): value.float() for key, value in numbers.items() if "weights/" in key}
    model.load_state_dict(weights)
    inside = range(settings["start_layer"] + 1, settings["end_layer"])  # both ends are left out
    layers = tuple(layer for layer in inside if layer % settings["skip_interval"] == 0)
    assert layers == tuple((numbers[f"{case}/ffn_rows"][0] == 0).nonzero()[:, 0].tolist())
    embeds, mask = numbers["embeds"], numbers["mask"]
    batch, length = mask.shape
    tokens = TokenMap.from_modalities(torch.zeros_like(mask), mask)
    places = torch.arange(length + numbers["next_ids"].shape[1]).expand(batch, -1)
    part: Any = "mlp" if "ffn" in case else "block"
    with Skip(part=part, layers=layers, tokens="all").on(model):
        given = {"attention_mask": mask, "position_ids": places[:, :length], "token_map": tokens}
        output = model(inputs_embeds=embeds, **given, use_cache=True)
        torch.testing.assert_close(
            output.logits[mask.bool()], numbers[f"{case}/prefill_logits"][mask.bool()], atol=1e-5, rtol=1e-5
        )
        for step, ids in enumerate(numbers["next_ids"].T):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = {"attention_mask": mask, "position_ids": places[:, length + step, None]}
            output = model(input_ids=ids[:, None], **given, **{cache_keyword(): cache_of_output(output)})
            expected = numbers[f"{case}/decode_logits"][:, step]
            torch.testing.assert_close(output.logits[:, 0], expected, atol=1e-5, rtol=1e-5)
