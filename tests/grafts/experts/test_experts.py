"""Experts against a loop over tokens and against PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

import alula
from alula.errors import UsageError
from alula.grafts import ExpertsConfig
from alula.grafts.experts import export_lora
from tests import zoo
from tests.grafts.common import run, wake


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


class ByToken(nn.Module):
    """A linear with other weights for some tokens, one token at a time."""

    def __init__(self, linear: nn.Linear, update: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.linear, self.update, self.mask = linear, update, mask

    def forward(self, given: Tensor) -> Tensor:
        rows = []
        for sample, chosen in zip(given, self.mask, strict=True):
            for token, own in zip(sample, chosen.tolist(), strict=True):
                weight = self.linear.weight + self.update if own else self.linear.weight
                value = weight @ token
                rows.append(value if self.linear.bias is None else value + self.linear.bias)
        return torch.stack(rows).view(*given.shape[:-1], -1)


def chosen(inputs: dict[str, Tensor], tokens: str) -> Tensor:
    image = inputs["input_ids"] == zoo.IMAGE
    return image if tokens == "image" else image.cumsum(dim=1) > 0


@pytest.mark.parametrize("tokens", ["image", "seen"])
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("targets", [("attention", "mlp"), ("mlp",), ("q_proj", "down_proj")])
def test_each_token_goes_through_its_own_weights(tokens: str, rank: int | None, targets: tuple[str, ...]) -> None:
    model = zoo.build("llava-llama").double()
    inputs = zoo.batch("llava-llama", "3I2", "5", "I1I2")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    alpha = None if rank is None else 6.0
    config = ExpertsConfig(tokens=tokens, rank=rank, alpha=alpha, targets=targets)  # type: ignore[arg-type]
    graft: Any = wake(alula.attach(model, config))
    ours = run(model, "llava-llama", inputs)
    updates = {}
    for index, layer in graft.layers.items():
        for name, expert in layer.experts.items():
            path = f"model.language_model.layers.{index}.{name.replace('__', '.')}"
            updates[path] = expert.full if rank is None else config.scale * expert.up @ expert.down
    alula.detach(model)
    assert not torch.allclose(run(model, "llava-llama", inputs), ours)
    for path, update in updates.items():
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, ByToken(linear, update.detach(), chosen(inputs, tokens)))
    torch.testing.assert_close(run(model, "llava-llama", inputs), ours, atol=1e-9, rtol=1e-9)


def test_seen_experts_behind_an_image_are_a_lora() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "I5", "I2I1")
    graft: Any = wake(alula.attach(model, ExpertsConfig(tokens="seen", rank=4, alpha=8, targets=("q_proj", "up_proj"))))
    ours = run(model, "llava-llama", inputs)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|up_proj)")
    theirs = peft.get_peft_model(zoo.build("llava-llama"), lora).eval()
    with torch.no_grad():
        for index, layer in graft.layers.items():
            for name, expert in layer.experts.items():
                path = f"model.language_model.layers.{index}.{name.replace('__', '.')}"
                module: Any = theirs.get_base_model().get_submodule(path)
                module.lora_A["default"].weight.copy_(expert.down)
                module.lora_B["default"].weight.copy_(expert.up)
        expected = theirs(**inputs).logits
    valid = inputs["attention_mask"].bool()  # padding has seen nothing
    torch.testing.assert_close(ours[valid], expected[valid], atol=2e-5, rtol=1e-4)


def test_experts_stand_behind_an_adapter_of_pefts() -> None:
    inputs = zoo.batch("llava-llama", "3I2", "6")
    wrapped = peft.get_peft_model(zoo.build("llava-llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = run(wrapped, "llava-llama", inputs)
    graft: Any = wake(alula.attach(wrapped, ExpertsConfig(rank=4)))
    assert "self_attn__q_proj" in graft.layers[0].experts
    after = run(wrapped, "llava-llama", inputs)
    assert (after[0] - before[0]).abs().max() > 1e-2
    assert torch.equal(after[1], before[1])
    alula.detach(wrapped)
    assert torch.equal(run(wrapped, "llava-llama", inputs), before)


def test_seen_experts_are_exported_as_a_lora_that_peft_loads(tmp_path: Path) -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "I5")
    wake(alula.attach(model, ExpertsConfig(tokens="seen", rank=4, alpha=6)))
    ours = run(model, "llava-llama", inputs)
    export_lora(model, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(zoo.build("llava-llama"), tmp_path / "lora").eval()
    torch.testing.assert_close(run(loaded, "llava-llama", inputs), ours, atol=2e-5, rtol=1e-4)
    alula.detach(model)
    wake(alula.attach(model, ExpertsConfig(rank=4)))
    with pytest.raises(UsageError, match="act from the first image on"):
        export_lora(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_wrong_settings_are_told() -> None:
    with pytest.raises(UsageError, match=r"experts\.alpha: it scales low-rank factors"):
        ExpertsConfig(rank=None, alpha=4)
    with pytest.raises(UsageError, match=r"experts\.targets: it is empty"):
        ExpertsConfig(targets=())


@pytest.mark.parametrize("targets", [("wings_proj",), ("down_proj", "wings_proj")])
def test_a_target_that_no_layer_has_is_refused(targets: tuple[str, ...]) -> None:
    model = zoo.build("llava-llama")
    with pytest.raises(UsageError, match=r"experts\.targets: wings_proj names no linear module") as caught:
        alula.attach(model, ExpertsConfig(targets=targets))
    assert "attention, down_proj, gate_proj" in str(caught.value.remedy)
    assert alula.grafts_of(model) == {}
    assert not any("alula" in name for name, _ in model.named_modules())


def test_a_target_may_stand_in_some_layers_only() -> None:
    config = zoo.build("qwen3_moe").config
    config.mlp_only_layers = [0]  # a dense layer in front, as DeepSeek has it
    model = Qwen3MoeForCausalLM(config)
    graft: Any = alula.attach(model, ExpertsConfig(rank=2, targets=("q_proj", "mlp")))
    found = {index: set(layer.experts) for index, layer in graft.layers.items()}
    dense = {"self_attn__q_proj", "mlp__gate_proj", "mlp__up_proj", "mlp__down_proj"}
    assert found == {0: dense, 1: {"self_attn__q_proj"}}
    alula.detach(model)
    graft = alula.attach(model, ExpertsConfig(rank=2, targets=("mlp",)))
    assert list(graft.layers) == [0]  # nothing is put where there is nothing to do
    alula.detach(model)
    with pytest.raises(UsageError, match="mlp names no linear module in any of the 1 layers"):
        alula.attach(model, ExpertsConfig(rank=2, layers=(1,)))
