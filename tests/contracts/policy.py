"""What every policy promises, whatever it does. A policy that is registered and has no case here fails.

Cases are settings: a policy with several ways to go about it brings several.
"""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import alula
from alula import WingsConfig
from alula.errors import UsageError
from alula.policies import Budget, ParallelAttention, Policy, Prune, Skip, Withdraw, policy_of, policy_types, register
from alula.seam import Owner, find
from tests import zoo
from tests.contracts.toy_policy import Dim
from tests.grafts.common import prompt_tokens, run, true_positions, wake, with_ids

CASES: dict[str, Policy] = {
    "toy": Dim(),
    "toy, one layer": Dim(strength=5.0, layers=(1,)),
    "withdraw": Withdraw(layer=1),
    "prune": Prune(stages=((1, 0.5),)),
    "prune at random": Prune.model_validate({"stages": ((0, 0.75), (1, 0.25)), "criterion": "random"}),
    "budget": Budget(image_tokens=2),
    "skip": Skip(part="block", layers=(1,)),
    "parallel attention": ParallelAttention(),
    "prune by diversity": Prune.model_validate({"stages": ((0, 0.5),), "criterion": "max_min_diversity"}),
    "prune by a process": Prune.model_validate({"stages": ((0, 0.5),), "criterion": "conditional_dpp"}),
    "prune duplicates": Prune.model_validate({"stages": ((1, 0.5),), "criterion": "duplicates"}),
    "prune by the instruction": Prune.model_validate({"stages": ((1, 0.5),), "criterion": "instruction_attention"}),
    "prune to a knee": Prune.model_validate({"stages": ((1, "knee"),), "per": "image"}),
    "prune and merge": Prune.model_validate({"stages": ((0, 0.5),), "criterion": "grid", "merge": "nearest"}),
    "prune by the layer itself": Prune.model_validate(
        {"stages": ((0, 0.5),), "criterion": {"name": "last_query_attention", "of_layer": "itself"}}
    ),
}
READ_AHEAD = {"prune"} | {
    f"prune {by}" for by in ("by a process", "duplicates", "to a knee", "by the instruction", "by the layer itself")
}
"""cases that choose among tokens by text behind them: what a token sees depends on what comes behind it"""
HOSTS = ("olmo2", "qwen3_moe", "gpt_neox", "gpt2", "qwen3", "gemma3", "llava-llama", "llava-mistral", "qwen2_5_vl")
PAIRS = [(host, case) for i, host in enumerate(HOSTS) for j, case in enumerate(CASES) if (i + j) % 2 == 0]

every_case = pytest.mark.parametrize("case", CASES)
every_pair = pytest.mark.parametrize(("host", "case"), PAIRS)


def hooks_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules()]


def under(case: str, model: Any, host: str, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    with CASES[case].on(model):
        return run(model, host, inputs, **options)


def test_every_registered_policy_has_a_case() -> None:
    assert {policy.policy_type for policy in CASES.values()} == set(policy_types())


def test_two_policies_of_one_type_are_refused() -> None:
    register(Dim)  # the same once more is no other one

    class Other(Dim):
        pass

    with pytest.raises(UsageError, match="'toy_dim' already"):
        register(Other)


@every_pair
def test_it_counts_behind_images_and_text_alone_keeps_its_bits(host: str, case: str) -> None:
    model = zoo.build(host)
    images, text = zoo.batch(host, "3I2", "I3I"), zoo.batch(host, "6", "9")
    before = [run(model, host, inputs) for inputs in (images, text)]
    after = [under(case, model, host, inputs) for inputs in (images, text)]
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert torch.equal(after[1], before[1])


@every_pair
def test_behind_its_block_the_host_is_what_it_was(host: str, case: str) -> None:
    model, inputs = zoo.build(host), zoo.batch(host, "3I2", "5")
    before, hooks = run(model, host, inputs), hooks_of(model)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    under(case, model, host, inputs)
    with pytest.raises(KeyboardInterrupt), CASES[case].on(model):
        raise KeyboardInterrupt
    assert find(model) is None
    assert hooks_of(model) == hooks
    assert model.config.get_text_config(decoder=True)._attn_implementation == implementation
    assert torch.equal(run(model, host, inputs), before)


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[1] not in READ_AHEAD])
def test_no_token_depends_on_later_ones(host: str, case: str) -> None:
    model, inputs = zoo.build(host), zoo.batch(host, "3I6")
    length = inputs["input_ids"].shape[1]
    whole = under(case, model, host, inputs)
    ids = inputs["input_ids"].clone()
    ids[:, length - 3 :] = (ids[:, length - 3 :] + 7) % 50
    other = under(case, model, host, with_ids(inputs, ids))
    torch.testing.assert_close(other[:, : length - 3], whole[:, : length - 3], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[0] != "qwen2_5_vl"])
def test_padding_and_neighbors_change_nothing(host: str, case: str) -> None:
    model, layouts = zoo.build(host), ("3I2", "I7I1")
    both = zoo.batch(host, *layouts, side="left")
    together = under(case, model, host, both | {"position_ids": true_positions(both)})
    image = 0
    for sample, layout in enumerate(layouts):
        ids = both["input_ids"][sample : sample + 1][:, both["attention_mask"][sample].bool()]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in both:
            alone["pixel_values"] = both["pixel_values"][image : image + layout.count("I")]
        image += layout.count("I")
        expected = under(case, model, host, alone)[0]
        torch.testing.assert_close(together[sample, -len(expected) :], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[1] not in READ_AHEAD])
def test_generating_with_a_cache_equals_without(host: str, case: str) -> None:
    model = zoo.build(host)
    inputs = zoo.batch(host, "3I2", "5", "I4")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with CASES[case].on(model), prompt_tokens(model, host, inputs):
        cached = model.generate(**inputs, **options, output_logits=True)
        plain = model.generate(**inputs, **options, output_logits=True, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


@every_case
def test_it_goes_with_grafts_in_whatever_order_they_came(case: str) -> None:
    inputs, config = zoo.batch("llava-llama", "3I2", "5", "I4"), WingsConfig(rank=4, router="mass")
    model = zoo.build("llava-llama")
    wake(alula.attach(model, config))
    after = under(case, model, "llava-llama", inputs)
    alone = run(model, "llava-llama", inputs)
    other = zoo.build("llava-llama")
    with CASES[case].on(other):
        wake(alula.attach(other, config))
        before = run(other, "llava-llama", inputs)
    assert torch.equal(before, after)
    assert (after - alone).abs().max() > 1e-3
    assert torch.equal(run(other, "llava-llama", inputs), alone)


@every_case
def test_twice_it_is_refused_and_equal_ones_go_together(case: str) -> None:
    model, policy = zoo.build("llava-llama"), CASES[case]
    inputs = zoo.batch("llava-llama", "3I2")
    with policy.on(model):
        once = run(model, "llava-llama", inputs)
        with pytest.raises(UsageError, match="on this model already"), policy.on(model):
            pass
        assert torch.equal(run(model, "llava-llama", inputs), once)
        with policy.model_copy().on(model):
            run(model, "llava-llama", inputs)
        assert torch.equal(run(model, "llava-llama", inputs), once)


@every_case
def test_another_thread_does_not_feel_it(case: str) -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2", "I4")
    bare, alone = run(model, "llava-llama", inputs), under(case, model, "llava-llama", inputs)

    def ask(turn: int) -> torch.Tensor:
        if turn % 2:
            return run(model, "llava-llama", inputs)
        return under(case, model, "llava-llama", inputs)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, range(24)))  # so many that blocks begin and end inside forwards of the other
    for turn, answer in enumerate(answers):
        torch.testing.assert_close(answer, bare if turn % 2 else alone, atol=1e-5, rtol=1e-5)


@every_case
def test_a_copy_made_under_it_is_another_host(case: str) -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2")
    bare = run(model, "llava-llama", inputs)
    with CASES[case].on(model):
        twin = copy.deepcopy(model)
        torch.testing.assert_close(run(twin, "llava-llama", inputs), bare, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(run(twin, "llava-llama", inputs), bare, atol=2e-5, rtol=1e-5)
    assert torch.equal(run(model, "llava-llama", inputs), bare)


@every_case
def test_half_precision_stays_half(case: str) -> None:
    model = zoo.build("llava-llama").to(torch.bfloat16)
    inputs = zoo.batch("llava-llama", "3I2")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    logits = under(case, model, "llava-llama", inputs)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@every_case
def test_gradients_flow_also_through_checkpointed_layers(case: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with CASES[case].on(model):
            model(**inputs).logits.square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert bool(gradients[0].abs().sum())


@every_case
def test_settings_are_saved_and_read_and_refused(case: str) -> None:
    policy = CASES[case]
    saved = json.loads(json.dumps(policy.to_dict()))
    assert policy_of(saved) == policy
    assert not saved.keys() & {name for name in vars(Owner) if not name.startswith("_")}
    with pytest.raises(UsageError, match="unknown key"):
        policy_of({**saved, "strenght": 1})
    with pytest.raises(UsageError, match="there is no policy of type 'none'"):
        policy_of({**saved, "policy_type": "none"})
    with pytest.raises(ValidationError):
        policy.strength = 1  # type: ignore[attr-defined]
