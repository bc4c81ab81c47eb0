"""Attention that can be asked for sums is the decoder's own on every supported architecture, and the sums are exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alula import WingsConfig, attach
from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.seam import ATTENTION, LayerView, install
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo

CACHE = cache_keyword()

LAYOUTS = {True: ("3I4", "6", "I2I1"), False: ("9", "5", "12")}


def layouts(name: str) -> tuple[str, ...]:
    return LAYOUTS[name in zoo.HOSTS]


class Silent:
    """May ask for sums of attention, and never does."""

    separate_pass = False

    def key_values(self, view: LayerView) -> None:
        return None

    def on_sums(self, view: LayerView, sums: torch.Tensor) -> None:
        raise AssertionError("nothing was asked")


@contextmanager
def asked(model: Any) -> Iterator[None]:
    """Have the decoder's attention be one that can be asked for sums."""
    seam = install(model, f"test {id(model)}")
    handles = [seam.request_sums(layer, Silent()) for layer in range(seam.anatomy.num_layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        seam.release(f"test {id(model)}")


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
        with asked(model):
            assert decoder_attention(model) == {"sdpa": ATTENTION, "eager": "eager"}[stock]
            during = model(**batch).logits
        after = model(**batch).logits
    assert decoder_attention(model) == stock
    assert torch.equal(during[valid], before[valid])
    assert torch.equal(after[valid], before[valid])


@pytest.mark.parametrize("name", zoo.ALL)
def test_generation_with_cache_equals_stock(name: str) -> None:
    model = zoo.build(name)
    batch = zoo.batch(name, *layouts(name))
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**batch, **options)
    with asked(model):
        during = model.generate(**batch, **options)
    assert torch.equal(before.sequences, during.sequences)
    assert all(torch.equal(ours, stock) for ours, stock in zip(during.logits, before.logits, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", zoo.ALL)
def test_gradients_equal_stock(name: str, checkpointing: bool) -> None:
    batch = zoo.batch(name, *layouts(name), side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(ours: bool) -> list[torch.Tensor]:
        model = zoo.build(name).train()
        if ours and checkpointing:
            model.gradient_checkpointing_enable()
        with asked(model) if ours else nullcontext():
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

    def __init__(self, columns: torch.Tensor, *, separate_pass: bool = False) -> None:
        self.columns, self.sums, self.separate_pass = columns, {}, separate_pass

    def key_values(self, view: LayerView) -> torch.Tensor:
        return self.columns[:, : view.ctx.all_tokens.shape[1]]

    def on_sums(self, view: LayerView, sums: torch.Tensor) -> None:
        self.sums[view.layer] = sums


LACKING = {("gemma2", "sdpa"), ("qwen2_5_vl", "flex_attention")}  # what transformers does not have


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for name in zoo.ALL
        for implementation in ("sdpa", "eager", "flex_attention")
        if name != "opt" and (name, implementation) not in LACKING
    ],
)
def test_sums_of_attention_equal_the_matrix(name: str, implementation: str) -> None:
    """Against eager attention's own matrices, with left padding, grouped queries, windows and softcaps."""
    model = zoo.build(name)
    batch = zoo.batch(name, *layouts(name))
    columns = torch.randn(3, batch["input_ids"].shape[1], 21)  # more than a head is wide
    zoo.set_attention(model, "eager")
    with torch.no_grad(), zoo.uncompiled():
        eager = model(**batch, output_attentions=True)
        zoo.set_attention(model, implementation)
        own = model(**batch).logits
        seam, asker, aside = install(model, "test"), Sums(columns), Sums(columns, separate_pass=True)
        handles = [seam.request_sums(layer, each) for layer in range(2) for each in (asker, aside)]
        logits = model(**batch).logits
        for handle in handles:
            handle.remove()
        seam.release("test")
    assert decoder_attention(model) == implementation
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], eager.logits[valid], atol=2e-5, rtol=0)
    assert implementation == "sdpa" or torch.equal(logits[valid], own[valid])
    for layer in range(2):
        expected = torch.einsum("bhqk,bkc->bqhc", eager.attentions[layer].double(), columns.double())
        for sums in (asker.sums[layer], aside.sums[layer]):
            torch.testing.assert_close(sums[valid].double(), expected[valid], atol=1e-5, rtol=0)


def test_gradients_of_sums_in_eager_equal_those_in_sdpa() -> None:
    batch = zoo.batch("qwen3", "9", "5")
    columns = torch.randn(2, 9, 3)

    def gradients(name: str) -> list[torch.Tensor]:
        model = zoo.build("qwen3")
        zoo.set_attention(model, name)
        seam, asker, aside = install(model, "test"), Sums(columns), Sums(columns, separate_pass=True)
        seam.request_sums(1, asker)
        seam.request_sums(1, aside)
        model(**batch)
        assert not aside.sums[1].requires_grad
        asker.sums[1][batch["attention_mask"].bool()].square().sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    for ours, stock in zip(gradients("eager"), gradients("sdpa"), strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_weights_that_were_dropped_out_are_not_taken_for_all() -> None:
    """Eager attention hands out what dropout left of its weights, which is not what a probe asks for."""
    model = zoo.build("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.config.attention_dropout = 0.5
    zoo.set_attention(model, "eager")
    seam, ones = install(model, "test"), Sums(torch.ones(1, 9, 1), separate_pass=True)
    seam.request_sums(0, ones)
    with pytest.raises(HostError, match="dropped out"):
        model(**zoo.batch("llama", "9"))
    model.eval()(**zoo.batch("llama", "9"))
    torch.testing.assert_close(ones.sums[0], torch.ones(1, 9, 4, 1))


def test_an_implementation_that_cannot_be_asked_is_refused() -> None:
    AttentionInterface.register("of_somebody", sdpa_attention_forward)
    model = zoo.build("llama")
    zoo.set_attention(model, "of_somebody")
    seam = install(model, "test")
    with pytest.raises(HostError, match="'of_somebody'") as told:
        seam.request_sums(0, Sums(torch.ones(1, 9, 1)))
    assert 'set_attn_implementation("sdpa")' in str(told.value)
    seam.release("test")
    assert decoder_attention(model) == "of_somebody"


def test_attention_may_be_set_to_eager_while_asked() -> None:
    """As transformers' own advice has it, for `output_attentions`."""
    model = zoo.build("llama")
    seam, ones = install(model, "test"), Sums(torch.ones(1, 9, 1))
    handle = seam.request_sums(0, ones)
    zoo.set_attention(model, "eager")
    with torch.no_grad():
        out = model(**zoo.batch("llama", "9"), output_attentions=True)
    assert len(out.attentions) == 2
    torch.testing.assert_close(ones.sums[0], torch.ones(1, 9, 4, 1))
    handle.remove()
    assert decoder_attention(model) == "eager"


def test_sums_of_attention_on_opt() -> None:
    """OPT pre-scales its queries; its eager path is checked through the softmax by hand."""
    model = zoo.build("opt")
    batch = zoo.batch("opt", "9")
    ones = Sums(torch.ones(1, 9, 1))
    seam = install(model, "test")
    seam.request_sums(0, ones)
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
        seam, asker = install(model, "test"), Sums(columns)
        seam.request_sums(1, asker)
        model(ids)
        whole, cache, steps = asker.sums[1], None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14)):
            cache = cache_of_output(model(ids[:, start:stop], **{CACHE: cache}, use_cache=True))
            steps.append(asker.sums[1])
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)


def test_two_models_of_one_config_are_both_asked() -> None:
    """Their attention is exchanged for both at once."""
    first = zoo.build("llama")
    second = type(first)(first.config).eval()
    stock, batch = decoder_attention(first), zoo.batch("llama", "9", "5")
    with torch.no_grad(), asked(first):
        expected = second(**batch).logits
        with asked(second):
            assert torch.equal(second(**batch).logits, expected)
        assert decoder_attention(first) == ATTENTION
    assert decoder_attention(second) == stock


def test_towers_keep_their_attention() -> None:
    model = zoo.build("llava-llama")
    with asked(model):
        assert model.config.vision_config._attn_implementation != ATTENTION
        assert Anatomy.of(model).config._attn_implementation == ATTENTION


@pytest.mark.parametrize("layouts", [("3I4", "I2I1"), ("3I4", "6")], ids=["all with images", "one without"])
@pytest.mark.parametrize("router", ["mass", "attention"])
@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen3"])
def test_what_attention_is_given_is_not_dropped_where_sums_are_asked(
    name: str, router: str, layouts: tuple[str, ...]
) -> None:
    """A bias per sample, key and query, which stock SDPA knows as `position_bias`; also while decoding."""
    batch = zoo.batch(name, *layouts)
    model = zoo.build(name)
    heads = model.config.text_config.num_attention_heads

    def run(scale: float) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        outputs, mask = [model(**batch, use_cache=True)], batch["attention_mask"]
        for queries in (1, 1, 3, 12):  # the towers would be given the bias as well: it begins behind the prompt
            ids = torch.randint(0, 50, (len(layouts), queries), generator=generator)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            bias = torch.randn(len(layouts), heads, queries, mask.shape[1], generator=generator)
            given = {CACHE: cache_of_output(outputs[-1]), "attention_mask": mask}
            outputs.append(model(input_ids=ids, position_bias=scale * bias, **given))
        return [output.logits[:, -1] for output in outputs]

    with torch.no_grad():
        stock, without = run(3.0), run(0.0)
        attach(model, WingsConfig(rank=4, router=router))
        found = run(3.0)
    assert all(not torch.allclose(*pair, atol=1e-2) for pair in zip(stock[1:], without[1:], strict=True))
    for ours, expected in zip(found, stock, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
