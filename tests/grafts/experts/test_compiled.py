"""Decoder layers compiled with experts: what they compute is what is computed without, in one graph a kind of
forward."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import alula
from alula import ExpertsConfig
from alula.probes import Geometry
from tests import zoo
from tests.grafts.common import grafted, run, wake
from tests.grafts.compiled import EACH, check_gradients, graphs, logits_of_steps

pytestmark = pytest.mark.usefixtures("no_graphs")
CONFIGS = {
    "image": ExpertsConfig(rank=2, targets=("attention", "mlp")),
    "seen": ExpertsConfig(rank=None, tokens="seen", targets=("attention", "mlp")),
    "both": ExpertsConfig(rank=2, tokens="both", targets=("mlp",)),
}


def pair(config: ExpertsConfig, host: Any = None) -> tuple[Any, Any]:
    """A model with experts that are awake, and a copy whose layers are compiled."""
    model = zoo.build("llama") if host is None else host
    wake(alula.attach(model, config))
    twin = copy.deepcopy(model)
    alula.compile_layers(twin, backend="eager")
    return model, twin


@pytest.mark.parametrize("tokens", CONFIGS)
def test_a_graph_for_prompts_and_one_for_steps(tokens: str) -> None:
    """Of all layers and lengths, and of every linear its own expert's numbers."""
    model, twin = pair(CONFIGS[tokens])
    for layout in ("3I20", "9I31"):
        for ours, theirs in zip(logits_of_steps(twin, layout, 3), logits_of_steps(model, layout, 3), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert graphs() == 2 * EACH
    text = zoo.batch("llama", "30")
    theirs = run(model, "llama", text)
    assert torch.equal(run(twin, "llama", text), theirs)
    alula.detach(model)
    assert torch.equal(theirs, run(model, "llama", text))


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_without_experts_lend_no_graph_to_those_that_have_some(layer: int) -> None:
    model, twin = pair(ExpertsConfig(rank=2, tokens="seen", targets=("mlp",), layers=(layer,)))
    for ours, theirs in zip(logits_of_steps(twin, "3I20", 3), logits_of_steps(model, "3I20", 3), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_gradients() -> None:
    model, twin = pair(CONFIGS["both"])
    check_gradients(model, twin)
    assert graphs() == 1 * EACH


def test_beside_wings_lora_and_a_probe_of_the_stream() -> None:
    """Each in its own place in the graph; what is read between layers is read outside of it."""
    host, _ = grafted("llama")
    alula.attach(host, CONFIGS["image"])
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for each in alula.grafts.grafts_of(host).values():
        wake(each)
    get_peft_model(host, lora)
    twin = copy.deepcopy(host)
    alula.compile_layers(twin, backend="eager")
    inputs, watched = zoo.batch("llama", "3I20"), []
    for each in (host, twin):
        probe = Geometry()
        with probe.on(each):
            watched.append(run(each, "llama", inputs))
    torch.testing.assert_close(*watched, atol=2e-5, rtol=1e-4)
    assert graphs() == EACH


def test_told_to_run_as_it_is_written_and_by_threads() -> None:
    """`torch.compiler.set_stance` has the region run in Python, where threads would meet in what is global."""
    model, twin = pair(CONFIGS["image"])
    inputs = [zoo.batch("llama", layout) for layout in ("3I20", "9I31")] * 4
    expected = [run(model, "llama", each) for each in inputs]
    with torch.compiler.set_stance("force_eager"), ThreadPoolExecutor(4) as pool:
        alone = [run(twin, "llama", each) for each in inputs]
        together = list(pool.map(lambda each: run(twin, "llama", each), inputs))
    for given in (alone, together):
        for ours, theirs in zip(given, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert graphs() == 0
