"""Experts beside weights that are not numbers of the precision a host computes in: packed integers, and float8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import BitLinear, pack_weights

import alula
from alula.errors import UsageError
from alula.grafts import ExpertsConfig
from tests import zoo
from tests.grafts.common import run, wake


def ternary(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama whose decoder has BitNet's linears: four weights of -1, 0 or 1 in each uint8."""
    model = zoo.build("llama").to(dtype)
    generator = torch.Generator().manual_seed(0)
    for path, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = BitLinear(linear.in_features, linear.out_features, bias=False, dtype=dtype)
            packed.weight = pack_weights(torch.randint(-1, 2, linear.weight.shape, generator=generator))
            packed.weight_scale.fill_(4.0)
            model.model.layers.set_submodule(path, packed)
    return model


class Beside(nn.Module):
    """A linear, and for some tokens the product with an update."""

    def __init__(self, linear: nn.Module, update: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.linear, self.update, self.mask = linear, update, mask

    def forward(self, given: Tensor) -> Tensor:
        return self.linear(given) + torch.where(self.mask[..., None], given @ self.update.T, 0)


@pytest.mark.parametrize("rank", [3, None])
def test_packed_integers(rank: int | None) -> None:
    model, images, text = ternary(), zoo.batch("llama", "3I2", "5"), zoo.batch("llama", "6")
    with zoo.uncompiled():
        plain = [run(model, "llama", inputs) for inputs in (images, text)]
        graft: Any = alula.attach(model, ExpertsConfig(rank=rank))
        assert model.model.layers[0].mlp.down_proj.weight.shape == (8, 48)  # of a linear from 48 to 32
        assert {parameter.dtype for parameter in graft.parameters()} == {torch.float32}
        assert len(graft.layers[0].experts) == 7
        assert torch.equal(run(model, "llama", images), plain[0])  # fresh
        wake(graft)
        ours = run(model, "llama", images)
        assert torch.equal(run(model, "llama", text), plain[1])
        assert torch.equal(ours[1], plain[0][1])
        updates = {
            (index, key.replace("__", ".")): (expert.full if rank is None else expert.up @ expert.down).detach()
            for index, layer in graft.layers.items()
            for key, expert in layer.experts.items()
        }
        alula.detach(model)
        for (index, path), update in updates.items():
            layer = model.model.layers[index]
            layer.set_submodule(path, Beside(layer.get_submodule(path), update, images["input_ids"] == zoo.IMAGE))
        torch.testing.assert_close(run(model, "llama", images), ours, atol=1e-4, rtol=1e-4)


def test_packed_integers_are_trained_beside_saved_and_loaded(tmp_path: Path) -> None:
    model, images = ternary(torch.bfloat16), zoo.batch("llama", "3I2", "5")
    kinds = alula.TokenMap.from_modalities((images["input_ids"] == zoo.IMAGE).long(), images["attention_mask"])
    with zoo.uncompiled():
        graft = wake(alula.attach(model, ExpertsConfig(tokens="both", rank=3)))
        model.train()(**images, token_map=kinds).logits.square().sum().backward()
        assert all(p.dtype == torch.bfloat16 and bool(p.grad.any()) for p in graft.parameters() if p.grad is not None)
        assert all(p.grad is not None for p in graft.parameters())
        alula.save_adapter(model.eval(), tmp_path / "adapter")
        again = ternary(torch.bfloat16)
        alula.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(run(again, "llama", images), run(model, "llama", images))


def test_a_layer_that_says_no_precision_is_refused() -> None:
    model = zoo.build("llama").to(torch.float8_e4m3fn)
    with pytest.raises(UsageError, match="q_proj is quantized, and nothing in its layer says") as caught:
        alula.attach(model, ExpertsConfig())
    assert "norms in bfloat16" in str(caught.value.remedy)
    assert alula.grafts_of(model) == {}


def test_float8_takes_the_precision_of_the_norms() -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.to(torch.float8_e4m3fn)
    graft = alula.attach(model, ExpertsConfig(rank=2))
    assert {parameter.dtype for parameter in graft.parameters()} == {torch.bfloat16}
