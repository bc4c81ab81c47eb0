"""Caches under adapters and policies grow where they lie, and what was read out of one is never changed by that."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import alula
from alula.policies import Withdraw
from alula.seam import LayerView, Owner, Phase, Point, install
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.seam.joining import forked
from tests import zoo

CACHE = cache_keyword()
LAYERS = 3
PROMPT = 40


@pytest.fixture(params=["adapter", "policy"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A decoder with Wings, or with the upper two layers left by images."""
    host = zoo.build("llama", layers=LAYERS)
    if request.param == "adapter":
        graft = alula.attach(host, alula.WingsConfig(rank=4))
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter.normal_(std=0.1)
        yield host
    else:
        with Withdraw(layer=1).on(host):
            yield host


@torch.no_grad()
def prompted(model: Any, length: int = PROMPT, **given: Any) -> Any:
    modalities = torch.zeros(1, length, dtype=torch.int64)
    modalities[:, 2:10] = 1
    ids = torch.arange(length)[None] % 50 + 3
    told = alula.TokenMap.from_modalities(modalities)
    return cache_of_output(model(input_ids=ids, token_map=told, use_cache=True, **given))


@torch.no_grad()
def step(model: Any, cache: Any, token: int, *, is_image: bool = False) -> Tensor:
    told = alula.TokenMap.from_modalities(torch.full((1, 1), int(is_image)))
    return model(input_ids=torch.tensor([[token]]), token_map=told, **{CACHE: cache}).logits


def held(cache: Any) -> list[Tensor]:
    return [each for layer in cache.layers[:LAYERS] for each in (layer.keys, layer.values)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_copies_no_keys(model: Any) -> None:
    cache = prompted(model)
    step(model, cache, 7)
    places = [each.data_ptr() for each in held(cache)]
    for token in range(20):
        step(model, cache, 8 + token)
    assert [each.data_ptr() for each in held(cache)] == places


def test_what_is_computed_is_what_a_cache_that_copies_gives(model: Any) -> None:
    """Long enough to run out of room more than once."""
    cache, copying = prompted(model), prompted(model)
    for token in range(120):
        logits = step(model, cache, 3 + token % 50)
        for layer in copying.layers:  # no room: all is copied, as by torch.cat
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        assert torch.equal(logits, step(model, copying, 3 + token % 50))
    assert same(held(cache), held(copying))


def test_what_was_read_out_of_a_cache_stays_what_it_is(model: Any) -> None:
    """Also where it is cropped meanwhile and goes on otherwise, as assisted generation does."""
    cache = prompted(model)
    kept, were = [], []
    for token in (5, 6, 7, 8):
        step(model, cache, token)
        kept.append(held(cache))
        were.append([each.clone() for each in kept[-1]])
    cache.crop(-3)
    for token in (9, 10, 11, 12):
        step(model, cache, token)
    for now, then in zip(kept, were, strict=True):
        assert same(now, then)


def test_a_backward_needs_what_was_read_out_as_it_was(model: Any) -> None:
    """A loss over keys that is made between two steps: what the second adds behind them changes nothing of it."""
    cache = prompted(model)
    step(model, cache, 5)
    read = held(cache)
    scales = [torch.ones(each.shape[-1], requires_grad=True) for each in read]
    loss = torch.stack([(each * scale).sum() for each, scale in zip(read, scales, strict=True)]).sum()
    step(model, cache, 6)
    loss.backward()
    for each, scale in zip(read, scales, strict=True):
        torch.testing.assert_close(scale.grad, each.sum(dim=(0, 1, 2)))


@pytest.mark.parametrize("how", ["deep", "shallow", "forked"])
def test_two_that_go_on_from_one_cache_do_not_meet(model: Any, how: str) -> None:
    first = prompted(model)
    step(model, first, 5)
    if how == "deep":
        second = copy.deepcopy(first)
    elif how == "forked":
        second = forked(first, PROMPT + 1)
    else:  # the layers' tensors are shared
        second = copy.copy(first)
        second.layers = [copy.copy(layer) for layer in first.layers]
    alone = {}
    for token in (20, 30):
        cache = prompted(model)
        step(model, cache, 5)
        alone[token] = [step(model, cache, token + further, is_image=token == 30) for further in range(3)]
    together: dict[int, list[Tensor]] = {20: [], 30: []}
    for further in range(3):
        together[20].append(step(model, first, 20 + further))
        together[30].append(step(model, second, 30 + further, is_image=True))
    for token, logits in together.items():
        assert same(logits, alone[token])


def test_two_that_go_on_from_one_cache_at_the_same_time(model: Any) -> None:
    """One stands behind its last layer until the other does, and ends first."""
    first = prompted(model)
    for token in (5, 6):
        step(model, first, token)
    second = copy.copy(first)
    second.layers = [copy.copy(layer) for layer in first.layers]
    alone = {}
    for token in (20, 30):
        cache = prompted(model)
        alone[token] = [step(model, cache, each) for each in (5, 6, token, token + 1)][2:]
    there, go_on = threading.Event(), threading.Event()
    given: list[Tensor] = []
    slow = threading.Thread(target=lambda: given.append(step(model, first, 20)))

    def wait(*_: Any) -> None:
        if threading.current_thread() is slow:
            there.set()
            assert go_on.wait(30)
        else:
            go_on.set()
            slow.join()

    handle = model.model.norm.register_forward_pre_hook(wait)
    try:
        slow.start()
        assert there.wait(30)
        other = [step(model, second, 30)]
    finally:
        go_on.set()
        handle.remove()
    assert same([*given, step(model, first, 21)], alone[20])
    assert same([*other, step(model, second, 31)], alone[30])


def test_gradients_flow_through_earlier_steps(model: Any) -> None:
    cache = prompted(model)
    embeds = torch.randn(1, 1, model.config.hidden_size, requires_grad=True)
    given = [model(inputs_embeds=embeds, **{CACHE: cache}).logits for _ in range(3)]
    sum(each.sum() for each in given).backward()  # type: ignore[union-attr]
    assert embeds.grad is not None
    assert embeds.grad.isfinite().all()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("cuts", [(6,), (6, 7), (5, 6, 8)])
def test_gradients_flow_through_what_a_graft_stores_of_new_tokens(cuts: tuple[int, ...], together: bool) -> None:
    """All forwards but the last run without gradients. The cache gives what a list of all that was stored gives."""
    ids = torch.arange(9)[None] + 3

    def trained(is_cached: bool) -> tuple[Tensor, Tensor]:
        host, scale = zoo.build("llama", layers=LAYERS), torch.nn.Parameter(torch.tensor(1.5))
        seam, own = install(host, "mine", Owner()), [[] for _ in range(LAYERS)]  # type: ignore[var-annotated]

        def store(view: LayerView, new: Tensor) -> Tensor:
            if is_cached:
                layers = [*range(LAYERS)] if together else [view.layer]
                news = new.repeat(1, len(layers), 1, 1)
                keys, values = view.ctx.to_cache("mine", layers, news, 2 * news)
                return keys[:, :1] + values[:, -1:]
            own[view.layer].append(new)
            return 3 * torch.cat(own[view.layer], dim=2)

        def add(view: LayerView, branch: Tensor) -> Tensor:
            return branch + store(view, (branch * scale)[:, None]).mean(dim=2)

        for layer in (0,) if together else range(LAYERS):
            seam.on(Point.ATTENTION, layer, add, phase=Phase.EDIT, owner="mine")
        cache: Any = DynamicCache(config=host.config)
        with torch.no_grad():
            for start, stop in itertools.pairwise((0, *cuts)):
                host(input_ids=ids[:, start:stop], **{CACHE: cache})
        logits = host(input_ids=ids[:, cuts[-1] :], **{CACHE: cache}).logits
        logits[:, -1].square().sum().backward()
        assert scale.grad is not None
        return logits.detach(), scale.grad

    for ours, expected in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_layers_are_still_transformers_own_and_a_users_stay(model: Any) -> None:
    class Mine(DynamicLayer):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers[0] = Mine()
    cache = prompted(model, **{CACHE: cache})
    assert type(cache.layers[0]) is Mine
    assert all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    assert not cache.is_compileable
