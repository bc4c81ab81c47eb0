"""Decoder layers compiled with Wings: one graph a kind of forward, whatever the length, and what it computes is what is
computed without."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import alula
from alula import WingsConfig
from alula.errors import HostError, UsageError
from alula.policies import Withdraw
from alula.probes import AttentionShift
from tests import zoo
from tests.grafts.common import grafted, prompt_tokens, run, token_map
from tests.grafts.compiled import CACHE, EACH, check_gradients, graphs, logits_of_steps

pytestmark = pytest.mark.usefixtures("no_graphs")


def pair(host: str, config: str | WingsConfig = "mass", **options: Any) -> tuple[Any, Any]:
    """A grafted model, and a copy whose layers are compiled."""
    model, _ = grafted(host, config)
    twin = copy.deepcopy(model)
    alula.compile_layers(twin, **{"backend": "eager", **options})
    return model, twin


@pytest.mark.parametrize("config", ["mass", "keys kept", "outputs kept"])
def test_a_graph_for_prompts_and_one_for_steps(config: str) -> None:
    """Of all layers and lengths; cached is uncached."""
    model, twin = pair("llama", config)
    for layout in ("3I20", "9I31"):
        for ours, theirs in zip(logits_of_steps(twin, layout, 3), logits_of_steps(model, layout, 3), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert graphs() == 2 * EACH
    text = zoo.batch("llama", "30")  # a third, of the host alone: its bits are those of eager attention in one kernel
    alula.detach(model)
    assert torch.equal(run(twin, "llama", text), run(model, "llama", text))
    assert graphs() == 3 * EACH


def test_batches_of_any_size_share_graphs() -> None:
    """One for padded prompts of several samples and one for their steps, however many samples there are; two more where
    some of them have no image."""
    model, twin = pair("llama")
    batches: dict[tuple[str, ...], int] = {
        ("3I20", "9I14", "4I12"): 2,
        ("7I20", "9I18", "4I12", "5I19", "9I1"): 2,
        ("3I9", "I2"): 2,
        ("7I20", "9", "4I12"): 4,
        ("3I9", "9I18", "2", "4I3"): 4,
    }
    for layouts, count in batches.items():
        inputs, found = zoo.batch("llama", *layouts), []
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        for each in (twin, model):
            cache = DynamicCache()
            with torch.no_grad():
                prompt = each(**inputs, token_map=token_map(inputs), **{CACHE: cache}).logits
                more = {"input_ids": torch.full((len(layouts), 1), 7), "attention_mask": mask}
                found.append((prompt[inputs["attention_mask"].bool()], each(**more, **{CACHE: cache}).logits))
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
        assert graphs() == count * EACH


@pytest.mark.parametrize(("layouts", "router"), [(["1I2"], "attention"), (["1I2", "I1"], "mass")])
def test_a_short_prompt_is_causal(layouts: list[str], router: str) -> None:
    """Fewer tokens than a head is wide go the way of steps, whose attention may be written out; a prompt has no mask
    where nothing is padded."""
    model, twin = pair("llama", WingsConfig(rank=4, router=router, router_tokens=64))
    inputs = zoo.batch("llama", *layouts)
    torch.testing.assert_close(run(twin, "llama", inputs), run(model, "llama", inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", ["mass", "keys kept", "outputs kept"])
def test_steps_of_a_fixed_size(config: str) -> None:
    """Nothing in a step's graph grows with the cache, so CUDA graphs may record it: sizes are constants in this one."""
    model, twin = pair("llama", config, dynamic=False)
    inputs = zoo.batch("llama", "3I9")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prompt_tokens(twin, "llama", inputs):
        ours = twin.generate(**inputs, **options, cache_implementation="static")
    with prompt_tokens(model, "llama", inputs):
        theirs = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert graphs() == 1 * EACH


def test_gradients() -> None:
    model, twin = pair("llama", WingsConfig(rank=4, router="attention", router_tokens=64))
    check_gradients(model, twin)
    assert graphs() == 1 * EACH


def test_what_is_not_compiled_runs_as_it_is_written(caplog: pytest.LogCaptureFixture) -> None:
    model, twin = pair("llama")
    inputs = zoo.batch("llama", "3I20")
    with AttentionShift().on(twin), caplog.at_level(logging.WARNING, "alula"):
        watched = run(twin, "llama", inputs)
    torch.testing.assert_close(watched, run(model, "llama", inputs), atol=2e-5, rtol=1e-4)
    assert [record.message for record in caplog.records] == [
        "decoder layer 0, and others like it, runs uncompiled: its attention is read or biased"
    ]
    assert graphs() == 0


def test_hooks_of_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    """Whenever they came and wherever they stand: torch guards none."""
    model, twin = pair("llama")
    inputs, seen = zoo.batch("llama", "3I20"), []
    run(twin, "llama", inputs)
    with caplog.at_level(logging.WARNING, "alula"):
        looking = twin.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
        run(twin, "llama", inputs)
    assert seen == [1]
    (told,) = [record.message for record in caplog.records if record.name.startswith("alula")]
    assert told.endswith("runs uncompiled: a hook that is not the seam's stands at one of its modules")
    looking.remove()
    for each in (model, twin):
        each.model.layers[0].mlp.register_forward_hook(lambda mlp, given, output: 2 * output)
    torch.testing.assert_close(run(twin, "llama", inputs), run(model, "llama", inputs), atol=2e-5, rtol=1e-4)
    assert graphs() == 1 * EACH


def test_taken_off_the_host_is_what_it_was() -> None:
    _, twin = pair("llama")
    inputs = zoo.batch("llama", "30")
    with pytest.raises(UsageError, match="compiled already"):
        alula.compile_layers(twin)
    alula.detach(twin)
    assert not any("forward" in vars(layer) for layer in twin.model.layers)
    assert torch.equal(run(twin, "llama", inputs), run(zoo.build("llama"), "llama", inputs))
    model, _ = grafted("llama")
    alula.compile_layers(model, backend="eager").remove()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_handle_takes_away_its_own_alone() -> None:
    model, _ = grafted("llama")
    earlier = alula.compile_layers(model, backend="eager")
    earlier.remove()
    handle = alula.compile_layers(model, backend="eager")
    earlier.remove()
    assert all("forward" in vars(layer) for layer in model.model.layers)
    alula.detach(model)
    handle.remove()
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


def test_a_policy_that_stays_longer_leaves_nothing() -> None:
    model, _ = grafted("llama")
    handle = alula.compile_layers(model, backend="eager")
    policy = Withdraw(layer=1).attach(model)
    handle.remove()
    policy.detach()
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    alula.compile_layers(model, backend="eager")


def test_hosts_that_cannot_be_compiled_are_refused() -> None:
    with pytest.raises(UsageError, match="no graft"):
        alula.compile_layers(zoo.build("llama"))
    with pytest.raises(UsageError, match="leave fullgraph out"):
        alula.compile_layers(grafted("llama")[0], fullgraph=False)
    model, _ = grafted("gemma3")
    with pytest.raises(HostError, match="a norm between its attention and the stream"):
        alula.compile_layers(model)
