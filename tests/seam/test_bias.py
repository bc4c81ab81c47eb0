"""Biases per key: the decoder's attention with them equals one written out, in every form in which it can run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import alula
from alula import WingsConfig
from alula.errors import HostError, UsageError
from alula.seam import Bias, LayerView, Seam, find, install, marked
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.seam.test_attention import LACKING, Sums, layouts
from tests.seam.test_view import FIRST, LAYERS, Withdraw, blinded, deep
from tests.seam.test_view import batch as image_batch

CACHE = cache_keyword()
NEITHER = {*LACKING, ("opt", "flex_attention"), ("gpt2", "flex_attention")}
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


class Given(Bias):
    """Gives what stands in a (B, H, S, K) table of all tokens that will ever be there; H and S may be 1."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def key_bias(self, view: LayerView) -> Tensor:
        keys, new = view.ctx.all_tokens.shape[1], view.ctx.tokens.shape[1]
        rows = self.table[..., keys - new : keys, :] if self.table.shape[2] > 1 else self.table
        return rows[..., :keys]


class Nothing(Bias):
    def key_bias(self, view: LayerView) -> None:
        return None


@contextmanager
def biased(model: Any, *biases: Bias, mark: Any = None) -> Iterator[Seam]:
    """`model` with biases in all layers."""
    seam = install(model, "bias")
    handles = [seam.request_bias(layer, each, mark=mark) for layer in range(seam.anatomy.num_layers) for each in biases]
    try:
        yield seam
    finally:
        for handle in handles:
            handle.remove()
        seam.release("bias")


def table(model: Any, batch: dict[str, Tensor], shape: str = "BHSK", more: int = 0, seed: int = 1) -> Tensor:
    """A random bias, of size 1 in the dimensions that `shape` leaves out."""
    count, length = batch["input_ids"].shape
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    sizes = {"B": count, "H": heads, "S": length + more, "K": length + more}
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn([sizes[d] if d in shape else 1 for d in "BHSK"], generator=generator)


ADDED: dict[str, Tensor] = {}


def naive(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **options: Any
) -> Any:
    """Attention as the textbook has it, in float64; every query and key of the whole prompt, with `ADDED` on top."""
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + ADDED["bias"].double()
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~allowed, -1e9)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register("naive", naive)
AttentionMaskInterface.register("naive", sdpa_mask)


def uncompiled(implementation: str) -> Any:
    return zoo.uncompiled() if implementation == "flex_attention" else nullcontext()


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(n, i) for n in (*zoo.TEXT, *zoo.HOSTS) for i in IMPLEMENTATIONS if (n, i) not in NEITHER],
)
def test_biased_attention_equals_the_textbook(name: str, implementation: str) -> None:
    """With left padding, grouped queries, windows and softcaps."""
    model, batch = zoo.build(name), zoo.batch(name, *layouts(name))
    valid = batch["attention_mask"].bool()
    zoo.set_attention(model, implementation)
    with torch.no_grad(), uncompiled(implementation):
        before = model(**batch).logits
        found = {}
        for shape in ("BHSK", "BK", "HK", "BSK"):
            with biased(model, Given(table(model, batch, shape))):
                found[shape] = model(**batch).logits
        after = model(**batch).logits
    assert find(model) is None
    assert torch.equal(before[valid], after[valid])
    zoo.set_attention(model, "naive")
    for shape, logits in found.items():
        ADDED["bias"] = table(model, batch, shape)
        with torch.no_grad():
            expected = model(**batch).logits
        assert float((expected - before)[valid].abs().max()) > 0.01
        torch.testing.assert_close(logits[valid], expected[valid], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, i) for name in ("llama", "mistral", "gemma3", "llava-qwen3") for i in ("sdpa", "eager")),
        ("gemma2", "eager"),
        ("llama", "flex_attention"),
        ("mistral", "flex_attention"),
    ],
)
def test_cached_equals_uncached(name: str, implementation: str) -> None:
    """A sliding cache forgets keys, a prompt may come in parts, several tokens at once; padding on the left."""
    model, batch = zoo.build(name), zoo.batch(name, *layouts(name))
    zoo.set_attention(model, implementation)
    ids = torch.randint(0, 50, (len(batch["input_ids"]), 6), generator=torch.Generator().manual_seed(0))
    whole = {**batch, "input_ids": torch.cat([batch["input_ids"], ids], dim=1)}
    whole["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids)], dim=1)
    bias = Given(table(model, whole))
    with torch.no_grad(), uncompiled(implementation), biased(model, bias):
        expected = model(**whole, use_cache=False).logits[:, -7:]
        output = model(**batch, use_cache=True)
        found, length = [output.logits[:, -1:]], batch["input_ids"].shape[1]
        for start, stop in ((0, 1), (1, 2), (2, 6)):
            mask = whole["attention_mask"][:, : length + stop]
            given = {CACHE: cache_of_output(output), "attention_mask": mask}
            output = model(input_ids=ids[:, start:stop], use_cache=True, **given)
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation(implementation: str, options: dict[str, Any]) -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama", "9", "5")
    zoo.set_attention(model, implementation)
    favored = torch.zeros(1, 1, 1, 32)
    favored[..., 4:7] = 3.0
    settings = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(**batch, **settings)
    with biased(model, Given(favored)):
        found = model.generate(**batch, **settings, **options)
        beams = {name: value for name, value in options.items() if name == "num_beams"}
        expected = model.generate(**batch, **settings, **beams, use_cache=False)
    assert torch.equal(found, expected)
    assert not torch.equal(found, stock)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_and_padding_change_nothing(implementation: str) -> None:
    model, batch = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    zoo.set_attention(model, implementation)
    own = [torch.randn(1, 4, n, n, generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
    both = torch.zeros(2, 4, 9, 9)
    both[0], both[1, :, 4:, 4:] = own[0][0], own[1][0]
    with torch.no_grad(), uncompiled(implementation):
        with biased(model, Given(both)):
            together = model(**batch).logits
        for sample, bias in enumerate(own):
            ids = batch["input_ids"][sample][batch["attention_mask"][sample].bool()][None]
            with biased(model, Given(bias)):
                alone = model(input_ids=ids).logits[0]
            torch.testing.assert_close(together[sample, -len(alone) :], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_add_up_and_what_the_host_is_given_is_kept(implementation: str) -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama", "9", "5")
    zoo.set_attention(model, implementation)
    one, two, three = (table(model, batch, shape, seed=n) for n, shape in enumerate(("BHSK", "BK", "HK")))
    own = implementation != "eager"  # which knows no position_bias
    given = {"position_bias": three.expand(2, -1, 9, -1)} if own else {}
    with torch.no_grad(), uncompiled(implementation):
        with biased(model, Given(one), Given(two)):
            apart = model(**batch, **given).logits
        with biased(model, Given(one + two + three if own else one + two)):
            together = model(**batch).logits
        if own:
            added = one + two + three
            torch.testing.assert_close(model(**batch, position_bias=added).logits, together, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"), [("qwen3", i) for i in IMPLEMENTATIONS] + [("mistral", "sdpa"), ("gemma2", "eager")]
)
def test_sums_are_those_of_biased_attention(name: str, implementation: str) -> None:
    model, batch = zoo.build(name), zoo.batch(name, "9", "5")
    valid, bias = batch["attention_mask"].bool(), Given(table(model, batch))
    columns = torch.randn(2, 9, 21, generator=torch.Generator().manual_seed(2))
    zoo.set_attention(model, "eager")
    with torch.no_grad(), biased(model, bias):
        weights = model(**batch, output_attentions=True).attentions
    zoo.set_attention(model, implementation)
    with torch.no_grad(), uncompiled(implementation), biased(model, bias) as seam:
        readers = [Sums(columns), Sums(columns, separate_pass=True)]
        handles = [seam.request_sums(layer, each) for layer in range(2) for each in readers]
        model(**batch)
        for handle in handles:
            handle.remove()
    for layer, here in enumerate(weights):
        expected = torch.einsum("bhqk,bkc->bqhc", here, columns)[valid]
        for reader in readers:
            torch.testing.assert_close(reader.sums[layer][valid], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layouts", [("3I4", "2I1"), ("3I4", "6")], ids=["all with images", "one without"])
@pytest.mark.parametrize("shape", ["BHSK", "HK"])
def test_beside_a_graft_that_reads_attention(shape: str, layouts: tuple[str, ...]) -> None:
    """A fresh one adds nothing; samples without an image keep the decoder's own kernel."""
    model, batch = zoo.build("llava-qwen3"), zoo.batch("llava-qwen3", *layouts)
    bias, valid = Given(table(model, batch, shape)), batch["attention_mask"].bool()
    with torch.no_grad():
        with biased(model, bias):
            expected = model(**batch).logits
        graft = alula.attach(model, WingsConfig(rank=4, router="mass"))
        with biased(model, bias):
            found = model(**batch).logits
        graft.detach()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-4)


def test_biases_are_matched_to_the_tokens_that_are_left() -> None:
    inputs, model, oracle = image_batch(), deep(), deep()
    ids = inputs["input_ids"]
    ids_after = torch.cat([ids, torch.tensor([[5, 7], [5, 7]])], dim=1)
    bias = Given(table(model, {"input_ids": ids_after}))
    Withdraw(model, ids)
    with torch.no_grad():
        with biased(blinded(oracle, ids_after), bias):
            whole = {**inputs, "input_ids": ids_after, "attention_mask": torch.ones_like(ids_after)}
            expected = oracle(**whole, use_cache=False).logits
        with biased(model, bias):
            output = model(**inputs, use_cache=True)
            found = [output.logits]
            for token in (5, 7):
                given = {CACHE: cache_of_output(output), "use_cache": True}
                output = model(input_ids=torch.full((2, 1), token), **given)
                found.append(output.logits)
    expected = expected[ids_after != zoo.IMAGE].view(2, -1, expected.shape[-1])
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert FIRST < LAYERS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_biases_alike_in_eager_and_sdpa(*, checkpointing: bool) -> None:
    def gradient(implementation: str) -> Tensor:
        model, batch = zoo.build("llama").train(), zoo.batch("llama", "9", "5")
        zoo.set_attention(model, implementation)
        if checkpointing:
            model.gradient_checkpointing_enable()
        values = table(model, batch).requires_grad_()
        with biased(model, Given(values)):
            model(**batch, use_cache=False).logits[batch["attention_mask"].bool()].square().sum().backward()
        assert values.grad is not None
        return values.grad

    torch.testing.assert_close(gradient("eager"), gradient("sdpa"), atol=1e-4, rtol=1e-3)


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nobody_who_biases_is_no_operation(implementation: str) -> None:
    """While prefilling and decoding: asked by nobody, by somebody for other forwards, or for nothing this time."""
    model, batch = zoo.build("llama"), zoo.batch("llama", "9", "5")
    zoo.set_attention(model, implementation)

    def run() -> tuple[list[Tensor], list[str]]:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
        with torch.no_grad(), Operations() as counted:
            prompt = model(**batch, use_cache=True)
            given = {CACHE: cache_of_output(prompt), "attention_mask": mask}
            step = model(input_ids=torch.ones(2, 1, dtype=torch.int64), **given)
        return [prompt.logits, step.logits], counted.names

    install(model, "other")
    logits, names = run()
    for by, mark in ((Nothing(), None), (Given(table(model, batch)), "others")):
        with biased(model, by, mark=mark):
            others, launched = run()
        assert launched == names
        assert all(torch.equal(*pair) for pair in zip(others, logits, strict=True))


def test_a_marked_bias_is_for_its_own_forwards() -> None:
    """Two threads go through one model, one of them biased."""
    model, batch = zoo.build("llama"), zoo.batch("llama", "9", "5")
    found: dict[str, list[Tensor]] = {"biased": [], "plain": []}
    with torch.no_grad():
        plain = model(**batch).logits
        with biased(model, Given(table(model, batch)), mark="mine"):
            with marked("mine"):
                expected = model(**batch).logits

            def run(name: str) -> None:
                with torch.no_grad(), marked("mine") if name == "biased" else nullcontext():
                    found[name] += [model(**batch).logits for _ in range(10)]

            threads = [threading.Thread(target=run, args=(name,)) for name in found]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(found["biased"]) == len(found["plain"]) == 10
    assert all(torch.equal(logits, expected) for logits in found["biased"])
    assert all(torch.equal(logits, plain) for logits in found["plain"])
    assert not torch.equal(plain, expected)


def test_a_copy_is_biased_by_itself() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama", "9")
    with torch.no_grad():
        plain = model(**batch).logits
        with biased(model, Given(table(model, batch))):
            expected, other = model(**batch).logits, copy.deepcopy(model)
        assert torch.equal(model(**batch).logits, plain)
        torch.testing.assert_close(other(**batch).logits, expected)


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 3, 9, 9), (3, 1, 1, 9), (2, 1, 8, 9), (2, 1, 1, 8), (1, 1, 1, 1)])
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    class Wrong(Bias):
        def key_bias(self, view: LayerView) -> Tensor:
            return torch.zeros(shape)

    model = zoo.build("llama")
    with biased(model, Wrong()), pytest.raises(UsageError, match="Wrong gave a bias of"):
        model(**zoo.batch("llama", "9", "5"))


def test_attention_that_cannot_be_biased_is_refused() -> None:
    AttentionInterface.register("of_somebody", sdpa_attention_forward)
    model, batch = zoo.build("llama"), zoo.batch("llama", "9")
    zoo.set_attention(model, "of_somebody")
    seam = install(model, "test")
    with pytest.raises(HostError, match="'of_somebody'"):
        seam.request_bias(0, Nothing())
    seam.release("test")
    zoo.set_attention(model, "sdpa")
    with biased(model, Given(table(model, batch))):
        zoo.set_attention(model, "sdpa")
        with pytest.raises(HostError, match="set after a bias was asked for"):
            model(**batch)


class Alike(Given):
    """Gives all layers the same tensor."""

    def key_bias(self, view: LayerView) -> Tensor:
        return view.ctx.once(lambda bias: bias, self.table)


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operators = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.operators += 1
        self.largest = max([self.largest, *(each.numel() for each in tree_leaves(found) if isinstance(each, Tensor))])
        return found


@torch.no_grad()
def test_a_bias_per_key_needs_no_square() -> None:
    """One bias for all heads and queries rides in columns of q and k: causality stays a flag. Nine views and copies a
    layer, and what makes the columns once."""
    operators = {}
    for layers in (2, 4):
        model = zoo.build("qwen3", layers=layers)
        ids = torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(0))
        bias = torch.randn(1, 1, 1, 200, generator=torch.Generator().manual_seed(1))
        with biased(model, Given(torch.zeros(1, 1, 200, 200))), Sizes() as squared:
            model(input_ids=ids)
        with biased(model, Alike(bias)), Sizes() as sizes:
            model(input_ids=ids)
        with biased(model, Nothing()), Sizes() as plain:
            model(input_ids=ids)
        assert squared.largest >= 200 * 200
        # where queries are grouped, torch 2.7 makes a square by itself
        assert sizes.largest < 200 * 200 or plain.largest >= 200 * 200
        operators[layers] = sizes.operators - plain.operators
    assert operators[4] - operators[2] <= 2 * 9


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_columns_hold_a_bias_exactly(dtype: torch.dtype) -> None:
    """As near to attention in float64 as a mask is; in half precision nearer, where a mask rounds the bias."""
    model = zoo.build("qwen3").to(dtype)
    ids = torch.randint(0, 50, (1, 60), generator=torch.Generator().manual_seed(0))
    bias = 6 * torch.randn(1, 1, 1, 60, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, given in {"columns": bias, "mask": bias.expand(1, 1, 60, 60)}.items():
        with biased(model, Given(given)):
            found[name] = model(input_ids=ids).logits.double()
    zoo.set_attention(model, "naive")
    ADDED["bias"] = bias
    expected = model(input_ids=ids).logits.double()
    errors = {name: float((logits - expected).pow(2).mean().sqrt()) for name, logits in found.items()}
    assert errors["columns"] < (1e-12 if dtype == torch.float64 else 0.8 * errors["mask"]), errors


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", ["infinite", "lowest", "out of range once divided"])
def test_columns_bar_keys(low: str, dtype: torch.dtype) -> None:
    """As a mask does: what cannot be divided by the scaling is no NaN."""
    model = zoo.build("qwen3").to(dtype)
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(1, 1, 1, 12)
    bias[..., 3:6] = {"infinite": -torch.inf, "lowest": lowest, "out of range once divided": lowest / 2}[low]
    found = []
    for given in (bias, bias.expand(1, 1, 12, 12)):
        with biased(model, Given(given)):
            found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*found)
