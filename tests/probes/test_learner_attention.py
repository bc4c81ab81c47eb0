"""Attention shift with the learners of a Wings graft, against their attention matrices written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import alula
from alula import WingsConfig
from alula.probes import AttentionShift
from tests import zoo
from tests.probes.models import deep, double, singles

LAYOUTS = ("3I4I2", "2I5", "4I6")


def winged(**options: Any) -> Any:
    """A float64 LLaVA host with awake learners."""
    model = deep(layers=4, sliding=False).double()
    graft = alula.attach(model, WingsConfig(rank=4, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.25)
    return model


def measure(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    probe = AttentionShift(**options)
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe.result()


def written_out(model: Any, sample: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Per layer, the routed attention (S, S) of either learner, mean over heads."""
    layers = model.model.language_model.layers
    inputs: dict[int, Any] = {}
    branches: dict[int, Any] = {}
    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: inputs.__setitem__(i, a[0][0].numpy())))
        handles.append(
            layer.self_attn.o_proj.register_forward_hook(lambda m, a, o, i=i: branches.__setitem__(i, o[0].numpy()))
        )
    with torch.no_grad():
        model(**sample)
    for handle in handles:
        handle.remove()
    ids = sample["input_ids"][0].tolist()
    image = np.array([token == zoo.IMAGE for token in ids])
    found = []
    for i, layer in enumerate(layers):
        part = layer.alula["wings"]
        weights = torch.softmax(part.router.bias.detach(), dim=-1).double().numpy()
        x, tokens = inputs[0], range(len(ids))
        query = inputs[i] + branches[i]
        routed = {}
        for name, weight, of_learner in (("visual", weights[0], image), ("textual", weights[1], ~image)):
            lorra = getattr(part, name)
            a_q, b_q, a_k, b_k = (
                t.detach().double().numpy() for t in (lorra.q.down, lorra.q.up, lorra.k.down, lorra.k.up)
            )
            q, k = query + query @ a_q.T @ b_q.T, x + x @ a_k.T @ b_k.T
            mass = np.zeros((len(ids), len(ids)))
            for row in tokens:
                keys = [j for j in tokens if of_learner[j] and j <= row]
                if not keys or not image[: row + 1].any():  # the exact gate
                    continue
                for h in range(q.shape[1] // 16):
                    part_of = slice(16 * h, 16 * h + 16)
                    logits = k[keys, part_of] @ q[row, part_of] / 4
                    soft = np.exp(logits - logits.max())
                    mass[row, keys] += soft / soft.sum() / (q.shape[1] // 16)
            routed[name] = weight * mass
        found.append(routed)
    return found


@pytest.mark.parametrize("portion", [1.0, 0.3])
def test_total_adds_routed_learners(portion: float) -> None:
    model, inputs = winged(router="constant", rope=False), double(zoo.batch("llava-qwen3", *LAYOUTS))
    main = [measure(model, sample).curves["main"] for sample in singles(inputs)]
    result = measure(model, inputs, portion=portion)
    expected = []
    for sample, own in zip(singles(inputs), main, strict=True):
        ids = sample["input_ids"][0].tolist()
        places = [i for i, token in enumerate(ids) if token == zoo.IMAGE]
        segment = np.array(
            [
                "image" if i in places else "before" if i < places[0] else "after" if i > places[-1] else "between"
                for i in range(len(ids))
            ]
        )
        layers = []
        for layer, routed in enumerate(written_out(model, sample)):
            mass = {
                name: curve[layer].value
                + portion * sum(m[:, segment == name].sum() for m in routed.values()) / len(ids)
                for name, curve in own.items()
            }
            layers.append({name: value / sum(mass.values()) for name, value in mass.items()})
        expected.append(layers)
    for name, curve in result.curves["total"].items():
        values = [np.mean([layers[i][name] for layers in expected]) for i in range(4)]
        np.testing.assert_allclose([e.value for e in curve], values, atol=1e-6)
    shifts = [
        1 - np.corrcoef([layer["before"] for layer in layers], [layer["after"] for layer in layers])[0, 1]
        for layers in expected
    ]
    assert result.shift["total"].value == pytest.approx(np.mean(shifts), abs=1e-4)


@pytest.mark.parametrize("router", ["mass", "attention", "constant"])
def test_measuring_learners_changes_no_bit(router: str) -> None:
    model, inputs = winged(router=router, router_tokens=64), double(zoo.batch("llava-qwen3", *LAYOUTS, "5"))
    with torch.no_grad():
        before = model(**inputs).logits
        with AttentionShift().on(model):
            during = model(**inputs).logits
    assert torch.equal(before, during)


def test_no_portion_is_the_main_branch() -> None:
    model, inputs = winged(), double(zoo.batch("llava-qwen3", *LAYOUTS))
    curves = measure(model, inputs, portion=0.0).curves
    for name, curve in curves["main"].items():
        np.testing.assert_allclose([e.value for e in curves["total"][name]], [e.value for e in curve], atol=1e-9)
    full = measure(model, inputs, learners="full").curves["total"]
    np.testing.assert_allclose(sum(np.array([e.value for e in curve]) for curve in full.values()), 1)
    assert full["image"][0].value != curves["main"]["image"][0].value


def test_silent_learners_add_nothing() -> None:
    model, inputs = winged(), double(zoo.batch("llava-qwen3", *LAYOUTS))
    graft = alula.grafts_of(model)["wings"]
    with graft.disabled():
        assert set(measure(model, inputs).curves) == {"main"}
