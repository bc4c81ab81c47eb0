"""Skipping, against the same sums put to 0 by hooks, with absent keys barred by masks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alula
from alula.anatomy import Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.policies import Prune, Skip, Withdraw
from alula.probes import AttentionShift
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, prompt_tokens, run, wake
from tests.policies.oracle import masked, silenced
from tests.policies.test_withdraw import HOSTS, LAYERS, LAYOUTS, WAYS, close, withdrawn

CASES = {
    "mlp": Skip(part="mlp", layers=(1, 3)),
    "attention": Skip(part="attention", layers=(1, 3)),
    "attention, own keys": Skip(part="attention", layers=(1, 2), keys="own"),
    "block": Skip(part="block", layers=(0, 2)),
    "block, own keys": Skip(part="block", layers=(0, 2), keys="own"),
    "mlp, all": Skip(part="mlp", layers=(2,), tokens="all"),
    "attention, all": Skip(part="attention", layers=(2,), tokens="all"),
    "block, all": Skip(part="block", layers=(1,), tokens="all"),
    "mlp, half": Skip(part="mlp", share=0.5),
}
WHOLE = ("block", "block, all")


def skips(policy: Skip, ids: Tensor) -> Tensor:
    chosen = (ids == zoo.IMAGE) if policy.tokens == "image" else (ids != zoo.PAD)
    if policy.share < 1:
        assert policy.share == 0.5
        chosen = chosen & (chosen.cumsum(dim=1) % 2 == 0)
    return chosen


def oracle(model: Any, policy: Skip) -> ExitStack:
    stack, layers = ExitStack(), policy.layers or tuple(range(LAYERS))
    if policy.keys == "absent" and policy.part != "mlp":
        bars = masked(model, lambda layer, ids: ~skips(policy, ids) if layer in layers else ids > -1, puts_back=False)
        stack.enter_context(bars)
    stack.enter_context(silenced(model, policy.part, layers, lambda ids: skips(policy, ids)))
    return stack


def pairs() -> list[tuple[str, str]]:
    names = list(CASES)
    every = [(host, names[(i * 4 + j) % len(names)]) for i, host in enumerate(HOSTS) for j in range(5)]
    return [(host, case) for host, case in every if host != "opt" or case in WHOLE]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("host", "case"), pairs())
def test_prefill_equals_the_oracle(host: str, case: str, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    with oracle(model, CASES[case]):
        expected = run(model, host, inputs, use_cache=False)
    with CASES[case].on(model):
        ours = run(model, host, inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])
    assert (ours - run(model, host, inputs))[valid].abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3"])
def test_generation_equals_the_oracle(host: str, case: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 4}
    with oracle(model, CASES[case]):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with CASES[case].on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_under_eager_attention_it_is_the_same(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    with CASES[case].on(model):
        expected = run(model, "llava-llama", inputs)
    zoo.set_attention(model, "eager")
    with CASES[case].on(model):
        ours = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_oracles_also_through_checkpointed_layers(case: str) -> None:
    inputs = zoo.batch("llava-llama", *LAYOUTS)
    valid, gradients = inputs["attention_mask"].bool(), []
    for how in ("oracle", "policy", "checkpointed"):
        model = zoo.build("llava-llama", layers=LAYERS)
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with oracle(model, CASES[case]) if how == "oracle" else CASES[case].on(model):
            model(**inputs, use_cache=False).logits[valid].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for found in gradients[1:]:
        for name, expected in gradients[0].items():
            ours = found.get(name, torch.zeros_like(expected))
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["mlp", "attention", "attention, own keys", "block", "block, own keys"])
def test_grafts_and_policies_go_together(case: str, attention: str) -> None:
    """Wings adds to all tokens that a layer has, as the oracle's does, so the two agree on those of text."""
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    zoo.set_attention(model, attention)
    with Withdraw(layer=3).on(model):
        wake(alula.attach(model, CONFIGS["mass"]))
        with CASES[case].on(model):
            within = run(model, "llava-llama", inputs)
        with AttentionShift().on(model), CASES[case].on(model):
            measured = run(model, "llava-llama", inputs)
    with CASES[case].on(model), Withdraw(layer=3).on(model):
        around = run(model, "llava-llama", inputs)
    assert torch.equal(within, around)
    assert torch.equal(measured, within)


@pytest.mark.parametrize("case", ["mlp", "attention", "attention, own keys", "block", "block, own keys", "mlp, half"])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_a_token_does_what_all_policies_let_it(host: str, case: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    with oracle(model, CASES[case]), masked(model, withdrawn(2)):
        expected = run(model, host, inputs, use_cache=False)
        said = model.generate(**inputs, **options, use_cache=False)
    for one, other in ((CASES[case], Withdraw(layer=2)), (Withdraw(layer=2), CASES[case])):
        with one.on(model), other.on(model):
            close(run(model, host, inputs)[text], expected[text])
            assert torch.equal(model.generate(**inputs, **options), said)


@pytest.mark.parametrize(("case", "calls"), [("mlp, all", 0), ("mlp", 3 * 6), ("mlp, half", None)])
def test_what_is_skipped_is_not_computed(case: str, calls: int | None) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    seen: list[int] = []
    anatomy = Anatomy.of(model)

    def count(module: nn.Module, args: Any) -> None:
        seen.append(args[0].shape[:2].numel())

    layer = (CASES[case].layers or (0,))[0]
    anatomy.mlp(layer).down_proj.register_forward_pre_hook(count)
    with CASES[case].on(model):
        run(model, "llava-llama", inputs)
    longest = inputs["input_ids"].shape[1]
    assert sum(seen) == (calls if calls is not None else 3 * 10)
    assert longest == 14


@pytest.mark.parametrize(("case", "held"), [("attention", [14, 10, 14, 10]), ("block, own keys", [14] * 4)])
def test_a_cache_lacks_what_left_no_key(case: str, held: list[int]) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "8I2")
    with CASES[case].on(model), torch.no_grad():
        cache: Any = cache_of_output(model(**inputs, use_cache=True))
    assert [layer.keys.shape[-2] for layer in cache.layers[:LAYERS]] == held
    if 10 not in held:  # nothing is missing: it goes on without the policy
        model(input_ids=torch.tensor([[5]]), **{cache_keyword(): cache})


@pytest.mark.parametrize("case", ["attention, all", "block, all"])
def test_attention_that_nobody_has_cannot_be_read(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    layers = CASES[case].layers or ()
    told = f"has no token attend in decoder layer {layers[0]}"
    with CASES[case].on(model), AttentionShift().on(model), pytest.raises(SeamError, match=told):
        run(model, "llava-llama", inputs)
    with CASES[case].on(model), Prune(stages=[(layers[0] + 1, 0.5)]).on(model), pytest.raises(SeamError, match=told):
        run(model, "llava-llama", inputs)
    wake(alula.attach(model, CONFIGS["mass"]))
    with CASES[case].on(model):
        if case == "block, all":  # what the graft would add there goes with the layer
            run(model, "llava-llama", inputs)
            return
        with pytest.raises(SeamError, match=told):
            run(model, "llava-llama", inputs)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"part": "mlp", "keys": "own"}, "leave keys anyway"),
        ({"part": "block", "keys": "own", "tokens": "all"}, "nobody reads keys"),
        ({"part": "mlp", "share": 0.0}, "larger than 0"),
        ({"part": "mlp", "layers": ()}, "names none"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Skip(**settings)


def test_layers_and_parts_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        Skip(part="mlp", layers=(9,)).on(zoo.build("llava-llama")).__enter__()
    with pytest.raises(HostError, match="has no MLP module"):
        Skip(part="mlp").on(zoo.build("opt")).__enter__()
