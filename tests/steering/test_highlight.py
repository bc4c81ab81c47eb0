"""Prompt Highlighter against the published code's numbers and against two branches written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import alula
from alula.errors import HostError
from alula.seam import find, generation_extras
from alula.steering import HIGHLIGHTED, Shift
from tests import zoo
from tests.steering import oracle

GOLDEN = Path(__file__).parents[1] / "golden"
ROTATING = tuple(name for name in zoo.TEXT if name not in ("opt", "gpt2"))
STRENGTH, GUIDANCE = math.log(5), 1.5


def recorded() -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    facts, numbers = json.loads((GOLDEN / "highlight.json").read_text()), load_file(GOLDEN / "highlight.safetensors")
    model: Any = LlamaForCausalLM(LlamaConfig(**facts["config"])).eval()
    weights = {key.removeprefix("model_state/"): value for key, value in numbers.items() if "model_state/" in key}
    model.load_state_dict({key: value for key, value in weights.items() if not key.endswith("inv_freq")})
    model.generation_config.pad_token_id = 0
    return model, facts, numbers


def marked(inputs: dict[str, Tensor], *spans: tuple[int, int]) -> Tensor:
    """Marks of one stretch of tokens per sample."""
    marks = torch.zeros(inputs["input_ids"].shape)
    for sample, (start, stop) in enumerate(spans):
        marks[sample, start:stop] = 1
    return marks


def given(inputs: dict[str, Tensor], marks: Tensor) -> dict[str, Tensor]:
    return {**inputs, HIGHLIGHTED: marks}


@torch.no_grad()
def test_the_published_numbers() -> None:
    model, facts, numbers = recorded()
    inputs = {"input_ids": numbers["input_ids"]}
    marks = numbers["highlight"][None]
    options: dict[str, Any] = {"strength": math.log(facts["beta"]), "guidance": facts["gamma"]}
    with alula.highlight(model, by=Shift(embedding=facts["alpha"]), **options):
        first = model(**given(inputs, marks)).logits[0, -1]
        with generation_extras(model, given(inputs, marks)) as extras:
            tokens = model.generate(**extras, max_new_tokens=6, do_sample=False)
    torch.testing.assert_close(first, numbers["first_scores"], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens[0, -6:], numbers["greedy_tokens"])


@pytest.mark.parametrize(
    "name", [*(n for n in zoo.TEXT if n not in ("opt", "gpt2")), *zoo.HOSTS, "gemma3_vl", "qwen3_vl"]
)
def test_both_branches_equal_the_oracle(name: str) -> None:
    """With left padding, grouped queries, windows and softcaps; a different highlight in each sample."""
    layouts = ("9", "5") if name in zoo.TEXT else ("3I4", "2I1")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    if name == "gemma2":
        zoo.set_attention(model, "eager")
    marks, valid = marked(inputs, (1, 5), (5, 7)), inputs["attention_mask"].bool()
    expected = oracle.scores(model, inputs, marks, strength=STRENGTH, guidance=GUIDANCE)
    with torch.no_grad(), alula.highlight(model, strength=STRENGTH, guidance=GUIDANCE):
        found = model(**given(inputs, marks)).logits
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_learned_positions_are_not_scaled(name: str) -> None:
    model, inputs = zoo.build(name), zoo.batch(name, "9")
    marks = marked(inputs, (1, 5))
    with pytest.raises(HostError, match="positions are part of the embeddings"), alula.highlight(model):
        pass
    with torch.no_grad(), alula.highlight(model, by=Shift(embedding=1)):
        found = model(**given(inputs, marks)).logits
    one, other = oracle.branches(model, inputs, marks, strength=math.log(2), embedding=1)
    torch.testing.assert_close(found, 1.3 * one - 0.3 * other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("strength", [STRENGTH, -STRENGTH, 0.0])
def test_strengths(strength: float) -> None:
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks, valid = marked(inputs, (1, 5), (5, 7)), inputs["attention_mask"].bool()
    marks[1, 7] = 0.5
    expected = oracle.scores(model, inputs, marks, strength=strength, guidance=GUIDANCE)
    with torch.no_grad(), alula.highlight(model, strength=strength, guidance=GUIDANCE):
        found = model(**given(inputs, marks)).logits
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_no_second_run_under_guidance_of_1() -> None:
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks, valid, runs = marked(inputs, (1, 5), (5, 7)), inputs["attention_mask"].bool(), []
    expected = oracle.run(model, inputs, STRENGTH * marks)
    handle = model.model.register_forward_pre_hook(lambda *_: runs.append(1))
    with alula.highlight(model, strength=STRENGTH, guidance=1):
        found = model(**given(inputs, marks)).logits
    handle.remove()
    assert len(runs) == 1
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-4, rtol=1e-3)


def hooks_of(model: Any) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@torch.no_grad()
def test_nothing_highlighted_is_the_host_itself() -> None:
    """Bit for bit, whatever the guidance; and so is the host behind the block, hooks and all."""
    model, inputs = zoo.build("llava-qwen3"), zoo.batch("llava-qwen3", "3I4", "5")
    plain, hooks = model(**inputs).logits, hooks_of(model)
    with alula.highlight(model, guidance=2):
        assert torch.equal(model(**given(inputs, torch.zeros(inputs["input_ids"].shape))).logits, plain)
        assert torch.equal(model(**inputs).logits, plain)
        assert not torch.equal(model(**given(inputs, marked(inputs, (3, 5)))).logits, plain)
    with pytest.raises(KeyboardInterrupt), alula.highlight(model):
        raise KeyboardInterrupt
    assert torch.equal(model(**inputs).logits, plain)
    assert find(model) is None
    assert hooks_of(model) == hooks
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@torch.no_grad()
def test_all_highlighted_is_no_highlight() -> None:
    """Softmax knows no shift: at a prompt it changes nothing but the second run's embeddings."""
    model, inputs = zoo.build("llama"), zoo.batch("llama", "9")
    with alula.highlight(model, strength=3.0, guidance=2, by=Shift(embedding=1)):
        found = model(**given(inputs, torch.ones(1, 9))).logits
    torch.testing.assert_close(found, torch.log_softmax(model(**inputs).logits, dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "llava-llama", "qwen2_5_vl"])
@torch.no_grad()
def test_a_batch_equals_single_calls(name: str, side: str) -> None:
    layouts = ("9", "5", "7") if name in zoo.TEXT else ("3I4", "2I1", "4I2")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts, side=side)
    valid, spans = inputs["attention_mask"].bool(), [(0, 3), (1, 4), (2, 2)]
    rows = [torch.zeros(int(each.sum())) for each in valid]
    for row, (start, stop) in zip(rows, spans, strict=True):
        row[start:stop] = 1
    marks = torch.zeros(inputs["input_ids"].shape)
    marks[valid] = torch.cat(rows)
    with alula.highlight(model, strength=STRENGTH, guidance=GUIDANCE):
        together = model(**given(inputs, marks)).logits
        for sample, row in enumerate(rows):
            alone = alone_of(name, inputs, sample)
            found = model(**given(alone, row[None])).logits[0]
            expected = found if row.any() else torch.log_softmax(found, dim=-1)
            torch.testing.assert_close(together[sample][valid[sample]], expected, atol=2e-5, rtol=1e-4)


def alone_of(name: str, inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample of a batch, each of which has at most one image, without its padding."""
    valid = inputs["attention_mask"][sample].bool()
    alone = {}
    for key, value in inputs.items():
        if key == "image_grid_thw":
            alone[key] = value[sample : sample + 1]
        elif key == "pixel_values":
            each = len(value) // len(inputs["input_ids"])
            alone[key] = value[sample * each : (sample + 1) * each]
        else:
            alone[key] = value[sample][valid][None]
    return alone
