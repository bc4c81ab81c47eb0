"""Choosing layers by one pass and a triangle, against whole forwards and whole answers under each policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.policies import Skip, Withdraw, layer_contributions, search_withdrawal
from alula.seam import find
from tests import zoo
from tests.grafts.common import CONFIGS, prompt_tokens, run, token_map, wake
from tests.policies.test_withdraw import LAYERS

HOSTS = (
    "llama",
    "opt",
    "gemma2",
    "llava-llama",
    "llava-mistral",
    "llava-gemma3",
    "qwen2_5_vl",
    "gemma3_vl",
    "qwen3_vl",
)
LAYOUTS = ("3I2", "I4I2")
WORDS = 5
SUPPRESSED = zoo.build("llama").generation_config.suppress_tokens


def prompts(host: str) -> list[dict[str, Any]]:
    made = [zoo.batch(host, layout, seed=seed) for seed, layout in enumerate(LAYOUTS)]
    return [each | {"token_map": token_map(each)} if host in zoo.TEXT else each for each in made]


def plain(prompt: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in prompt.items() if name != "token_map"}


def divergence(ours: Tensor, full: Tensor) -> float:
    """As published: what is withdrawn against the full model."""
    allowed = [word for word in range(zoo.VOCAB) if word not in SUPPRESSED]
    ours, full = ours[:, -1, allowed].double(), full[:, -1, allowed].double()
    logs, left = torch.log_softmax(full, dim=-1), torch.softmax(ours, dim=-1)
    return float(torch.nn.functional.kl_div(logs, left, reduction="batchmean"))


@pytest.mark.parametrize(
    ("host", "positions"), [*((host, "keep") for host in HOSTS), ("llava-gemma3", "dense"), ("qwen2_5_vl", "dense")]
)
def test_withdrawal_equals_a_whole_pass_and_a_whole_answer_for_each_layer(host: str, positions: Any) -> None:
    model, given = zoo.build(host, layers=LAYERS), prompts(host)
    found = search_withdrawal(model, given, positions=positions, max_new_tokens=WORDS)
    assert found.layers == (1, 2, 3)
    assert found.lengths == (WORDS, WORDS)
    assert find(model) is None
    for sample, prompt in enumerate(map(plain, given)):
        length = prompt["input_ids"].shape[1]
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": WORDS}
        full, answer = run(model, host, prompt), model.generate(**prompt, **options)[0, length:]
        for index, layer in enumerate(found.layers):
            with Withdraw(layer=layer, positions=positions).on(model), prompt_tokens(model, host, prompt):
                ours = run(model, host, prompt)
                said = model.generate(**prompt, **options)[0, length:]
            assert found.divergences[sample][index] == pytest.approx(divergence(ours, full), rel=1e-3, abs=1e-6)
            differs = (said != answer).nonzero()
            assert found.agreed[sample][index] == (int(differs[0]) if len(differs) else WORDS)


@contextmanager
def counted(model: Any) -> Iterator[dict[int, list[int]]]:
    """The tokens that each layer's MLP is given, call by call; -1: those of the tower's first layer."""
    calls: dict[int, list[int]] = {index: [] for index in range(-1, LAYERS)}
    anatomy = Anatomy.of(model)

    def count(index: int) -> Any:
        return lambda module, args: calls[index].append(args[0].shape[1])

    handles = [anatomy.mlp(index).register_forward_pre_hook(count(index)) for index in range(LAYERS)]
    assert anatomy.tower is not None
    tower = next(module for name, module in anatomy.tower.named_modules() if name.endswith("mlp"))
    handles.append(tower.register_forward_pre_hook(count(-1)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def test_it_costs_one_pass_and_a_triangle_of_text() -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    with counted(model) as calls:
        search_withdrawal(model, [zoo.batch("llava-llama", "3I2")], max_new_tokens=1)
    assert {layer: tokens for layer, tokens in calls.items() if layer >= 0} == {
        0: [9], 1: [9, 5], 2: [9, 5, 5], 3: [9, 5, 5, 5]
    }  # fmt: skip
    assert len(calls[-1]) == 1
    with counted(model) as calls:
        layer_contributions(model, [zoo.batch("llava-llama", "3I2")])
    assert [len(calls[layer]) for layer in range(LAYERS)] == [2, 3, 4, 5]
    assert len(calls[-1]) == 1


@pytest.mark.parametrize(("part", "keys"), [("block", "own"), ("block", "absent"), ("mlp", None), ("attention", "own")])
@pytest.mark.parametrize("host", ["llama", "llava-gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_contributions_equal_a_whole_pass_for_each_layer(host: str, part: Any, keys: Any) -> None:
    model, given = zoo.build(host, layers=LAYERS), prompts(host)
    found = layer_contributions(model, given, part=part, keys=keys)
    for sample, prompt in enumerate(map(plain, given)):
        full = run(model, host, prompt)
        for layer in range(LAYERS):
            with Skip(part=part, layers=(layer,), keys=keys or "absent").on(model):
                ours = run(model, host, prompt)
            assert found.scores[sample][layer] == pytest.approx(divergence(ours, full), rel=1e-3, abs=1e-6)
    means = found.mean()
    assert found.ranked() == sorted(means, key=lambda layer: means[layer])
    assert keys == "absent" or means[LAYERS - 1] < 1e-6  # nothing behind it looks at image tokens
    assert set(found.skip(2).layers or ()) == set(found.ranked()[:2])


def test_it_is_asked_of_a_model_as_it_is() -> None:
    """With a graft and a policy that is on it for good, and back in training mode."""
    model, prompt = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2")
    wake(alula.attach(model, CONFIGS["mass"]))
    attached = Skip(part="mlp", layers=(1,)).attach(model)
    model.train()
    found = search_withdrawal(model, [prompt], max_new_tokens=1)
    assert model.training
    model.eval()
    full = run(model, "llava-llama", prompt)
    for index, layer in enumerate(found.layers):
        with Withdraw(layer=layer).on(model):
            ours = run(model, "llava-llama", prompt)
        assert found.divergences[0][index] == pytest.approx(divergence(ours, full), rel=1e-3, abs=1e-6)
    attached.detach()


def test_the_first_layer_that_will_do_is_chosen() -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    found = search_withdrawal(model, prompts("llava-llama"), max_new_tokens=3)
    means, shares = found.divergence(), found.agreement()
    assert found.by_divergence(means[2]) == Withdraw(layer=min(layer for layer in means if means[layer] <= means[2]))
    assert found.by_agreement(0.0) == Withdraw(layer=1)
    assert set(shares.values()) <= {0.0, 0.5, 1.0}
    with pytest.raises(UsageError, match=r"none of the layers 1 to 3 will do"):
        found.by_divergence(-1.0)
    with pytest.raises(UsageError, match=r"none of the layers 1 to 3 will do"):
        found.by_agreement(1.1)
    with pytest.raises(UsageError, match="5 of 4 layers"):
        layer_contributions(model, prompts("llava-llama")).skip(5)


def refused() -> list[Any]:
    image, text = zoo.batch("llava-llama", "3I2"), zoo.batch("llava-llama", "5")
    two, padded = zoo.batch("llava-llama", "3I2", "3I2"), zoo.batch("llava-llama", "3I2")
    padded["attention_mask"][0, 0] = 0
    return [
        pytest.param([], {}, "there are no prompts", id="none"),
        pytest.param([text], {}, "has no image, video or sound", id="text"),
        pytest.param([image, two], {}, "prompt 1 is not one prompt", id="two"),
        pytest.param([padded], {}, "prompt 0 is padded", id="padded"),
        pytest.param([image], {"layers": (9,)}, "withdrawal at layer 9", id="layer"),
        pytest.param([image], {"layers": ()}, "nothing to find out", id="no layers"),
        pytest.param([image], {"max_new_tokens": 0}, "nothing to find out", id="no words"),
        pytest.param([image | {"position_ids": torch.arange(9)[None]}], {}, "first token alone", id="positions"),
    ]


@pytest.mark.parametrize(("given", "options", "told"), refused())
def test_what_cannot_be_asked_is_refused(given: Any, options: dict[str, Any], told: str) -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    with pytest.raises(UsageError, match=told):
        search_withdrawal(model, given, **options)
    assert find(model) is None
