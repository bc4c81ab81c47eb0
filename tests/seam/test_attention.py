"""alula's attention function is the stock path on every supported architecture, and its sums of attention are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import zoo

from alula import Anatomy
from alula.seam import ATTENTION, Forward, install, use_attention
from alula.seam.dialect import cache_keyword, cache_of_output

CACHE = cache_keyword()

LAYOUTS = {True: ("3I4", "6", "I2I1"), False: ("9", "5", "12")}


def layouts(name: str) -> tuple[str, ...]:
    return LAYOUTS[name in zoo.HOSTS]


def decoder_attention(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.ALL)
def test_logits_equal_stock(name: str, side: str) -> None:
    model = zoo.build(name)
    batch = zoo.batch(name, *layouts(name), side=side)
    valid = batch["attention_mask"].bool()
    stock = decoder_attention(model)
    with torch.no_grad():
        before = model(**batch).logits
        with use_attention(model):
            assert decoder_attention(model) == ATTENTION
            during = model(**batch).logits
        after = model(**batch).logits
    assert decoder_attention(model) == stock
    torch.testing.assert_close(during[valid], before[valid], atol=1e-5, rtol=0)
    assert torch.equal(after[valid], before[valid])


@pytest.mark.parametrize("name", zoo.ALL)
def test_generation_with_cache_equals_stock(name: str) -> None:
    model = zoo.build(name)
    batch = zoo.batch(name, *layouts(name))
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**batch, **options)
    with use_attention(model):
        during = model.generate(**batch, **options)
    assert torch.equal(before.sequences, during.sequences)
    for ours, stock in zip(during.logits, before.logits, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", zoo.ALL)
def test_gradients_equal_stock(name: str, checkpointing: bool) -> None:
    batch = zoo.batch(name, *layouts(name), side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(ours: bool) -> list[torch.Tensor]:
        model = zoo.build(name).train()
        if ours:
            model.set_attn_implementation({"text_config": ATTENTION} if name in zoo.HOSTS else ATTENTION)
            if checkpointing:
                model.gradient_checkpointing_enable()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for ours, stock in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_set_back_by_hand_restores_exactly() -> None:
    model = zoo.build("qwen3")
    batch = zoo.batch("qwen3", "9", "5")
    before = model(**batch).logits
    model.set_attn_implementation(ATTENTION)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch).logits, before)


class Sums:
    """Asks for sums of attention over given keys and keeps what it receives."""

    def __init__(self, columns: torch.Tensor) -> None:
        self.columns, self.sums = columns, {}

    def key_columns(self, forward: Forward, layer: int) -> torch.Tensor:
        return self.columns[:, : forward.all_rows.shape[1]]

    def receive(self, forward: Forward, layer: int, sums: torch.Tensor) -> None:
        self.sums[layer] = sums


@pytest.mark.parametrize("name", [n for n in zoo.ALL if n != "opt"])
def test_sums_of_attention_equal_the_matrix(name: str) -> None:
    """Against eager attention's own matrices, with left padding, grouped queries, windows and softcaps."""
    model = zoo.build(name)
    batch = zoo.batch(name, *layouts(name))
    columns = torch.randn(3, batch["input_ids"].shape[1], 5)
    text = {"text_config": "eager"} if name in zoo.HOSTS else "eager"
    model.set_attn_implementation(text)
    with torch.no_grad():
        eager = model(**batch, output_attentions=True)
        model.set_attn_implementation(text)
        seam, asker = install(model, "test", None), Sums(columns)
        for layer in range(2):
            seam.ask(layer, asker)
        logits = model(**batch).logits
        for layer in range(2):
            seam.stop_asking(layer, asker)
        seam.release("test")
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], eager.logits[valid], atol=2e-5, rtol=0)
    for layer in range(2):
        expected = torch.einsum("bhqk,bkc->bqhc", eager.attentions[layer].double(), columns.double())
        torch.testing.assert_close(asker.sums[layer][valid].double(), expected[valid], atol=1e-5, rtol=0)


def test_sums_of_attention_on_opt() -> None:
    """OPT pre-scales its queries; its eager path is checked through the softmax by hand."""
    model = zoo.build("opt")
    batch = zoo.batch("opt", "9")
    ones = Sums(torch.ones(1, 9, 1))
    seam = install(model, "test", None)
    seam.ask(0, ones)
    with torch.no_grad():
        model(**batch)
    torch.testing.assert_close(ones.sums[0], torch.ones(1, 9, 4, 1))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gemma2"])
def test_sums_while_decoding_equal_the_whole(name: str) -> None:
    """Step by step with a cache (a sliding one forgets keys) as in one pass."""
    model = zoo.build(name)
    ids = zoo.batch(name, "14")["input_ids"]
    columns = torch.randn(1, 14, 3)
    with torch.no_grad():
        seam, asker = install(model, "test", None), Sums(columns)
        seam.ask(1, asker)
        model(ids)
        whole, cache, steps = asker.sums[1], None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14)):
            cache = cache_of_output(model(ids[:, start:stop], **{CACHE: cache}, use_cache=True))
            steps.append(asker.sums[1])
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)


def test_softcap_without_mask_is_causal() -> None:
    """The chunked softcap path against a plain computation, longer than one chunk."""
    from alula.seam.attention import attention_forward

    module = torch.nn.Module()
    q, k, v = (torch.randn(1, h, 700, 8, dtype=torch.float64) for h in (4, 2, 2))
    out, _ = attention_forward(module, q, k, v, None, scaling=0.3, softcap=2.0)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    logits = 2.0 * torch.tanh(q @ k.mT * 0.3 / 2.0)
    logits = logits.masked_fill(~torch.ones(700, 700, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(out, (F.softmax(logits, -1) @ v).transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_towers_keep_their_attention() -> None:
    model = zoo.build("llava-llama")
    with use_attention(model):
        assert model.config.vision_config._attn_implementation != ATTENTION
        assert Anatomy.of(model).config._attn_implementation == ATTENTION
