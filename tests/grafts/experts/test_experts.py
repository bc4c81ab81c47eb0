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
from alula.policies import Prune, Skip, Withdraw
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import run, wake
from tests.policies.oracle import masked

CACHE = cache_keyword()


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


class ByToken(nn.Module):
    """A linear with other weights for some tokens, one token at a time.

    Args:
        updates: the experts of the linear, (o, i) each.
        which: (B, S) the expert each token has; -1: none.
    """

    def __init__(self, linear: nn.Linear, updates: list[Tensor], which: Tensor) -> None:
        super().__init__()
        self.linear, self.updates, self.which = linear, updates, which

    def forward(self, given: Tensor) -> Tensor:
        rows = []
        for sample, experts in zip(given, self.which, strict=True):
            for token, expert in zip(sample, experts.tolist(), strict=True):
                weight = self.linear.weight if expert < 0 else self.linear.weight + self.updates[expert]
                value = weight @ token
                rows.append(value if self.linear.bias is None else value + self.linear.bias)
        return torch.stack(rows).view(*given.shape[:-1], -1)


def which(inputs: dict[str, Tensor], tokens: str) -> Tensor:
    """(B, S) the expert of each token."""
    image = inputs["input_ids"] == zoo.IMAGE
    text = (image.cumsum(dim=1) > 0) & ~image
    at_image, at_text = {"image": (0, -1), "seen": (0, 0), "both": (0, 1)}[tokens]
    return torch.where(image, at_image, torch.where(text, at_text, -1))


def updates_of(graft: Any) -> dict[str, list[Tensor]]:
    """By path of a linear what its experts add to its weights."""
    found: dict[str, list[Tensor]] = {}
    for index, layer in graft.layers.items():
        for name, expert in layer.experts.items():
            count = 2 if graft.config.tokens == "both" else 1
            if graft.config.rank is None:
                each = expert.full.chunk(count, dim=1)
            else:
                factors = zip(expert.up.chunk(count, dim=1), expert.down.chunk(count), strict=True)
                each = [graft.config.scale * up @ down for up, down in factors]
            found[f"model.language_model.layers.{index}.{name.replace('__', '.')}"] = list(each)
    return found


def by_token(model: Any, updates: dict[str, list[Tensor]], which: Tensor) -> None:
    """Put the loop over tokens in the place of every linear that has experts."""
    for path, each in updates.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ByToken(model.get_submodule(path), each, which))


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("targets", [("attention", "mlp"), ("mlp",), ("q_proj", "down_proj")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_token_goes_through_its_own_weights(
    tokens: str, rank: int | None, targets: tuple[str, ...], side: str
) -> None:
    model = zoo.build("llava-llama").double()
    inputs = in_double(zoo.batch("llava-llama", "3I2", "5", "I1I2", side=side))
    alpha = None if rank is None else 6.0
    graft = wake(alula.attach(model, ExpertsConfig(tokens=tokens, rank=rank, alpha=alpha, targets=targets)))  # type: ignore[arg-type]
    ours = run(model, "llava-llama", inputs)
    updates = updates_of(graft)
    alula.detach(model)
    plain, valid = run(model, "llava-llama", inputs), inputs["attention_mask"].bool()
    assert not torch.allclose(plain, ours)
    before = valid & ~(inputs["input_ids"] == zoo.IMAGE).cumsum(dim=1).bool()
    assert before.sum() == 8  # three words before an image, and the five of the prompt without one
    assert torch.equal(ours[before], plain[before])
    by_token(model, updates, which(inputs, tokens))
    torch.testing.assert_close(run(model, "llava-llama", inputs)[valid], ours[valid], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
@pytest.mark.parametrize("rank", [3, None])
def test_later_turns_go_through_their_own_weights(tokens: str, rank: int | None) -> None:
    """Forwards of text alone and of images, by one token and by several, behind a cache: as one forward over all."""
    model = zoo.build("llava-llama").double()
    ids = torch.tensor([zoo.prompt("3I2I4"), zoo.prompt("9I4", seed=5)])  # the second sees its image in the third turn
    whole = in_double({"input_ids": ids, "attention_mask": torch.ones_like(ids), **zoo.pixels("llava-llama", 3)})
    graft = wake(alula.attach(model, ExpertsConfig(tokens=tokens, rank=rank)))  # type: ignore[arg-type]
    cache, logits = None, []
    images = {0: [0], 9: [1, 2]}  # by where a turn begins, the images in it, of both samples
    for begin, end in ((0, 7), (7, 8), (8, 9), (9, 13), (13, 14), (14, 17)):
        given: dict[str, Any] = {"input_ids": ids[:, begin:end], "attention_mask": whole["attention_mask"][:, :end]}
        if begin in images:
            given["pixel_values"] = whole["pixel_values"][images[begin]]
        with torch.no_grad():
            output = model(**given, **({} if cache is None else {CACHE: cache}), use_cache=True)
        cache = cache_of_output(output)
        logits.append(output.logits)
    ours, updates = torch.cat(logits, dim=1), updates_of(graft)
    alula.detach(model)
    by_token(model, updates, which(whole, tokens))
    torch.testing.assert_close(ours, run(model, "llava-llama", whole), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
def test_gradients_are_those_of_the_loop_also_under_checkpointing(tokens: str, rank: int | None) -> None:
    inputs = in_double(zoo.batch("llava-llama", "3I2", "5", "I1I2"))

    def gradients(computed_by: str) -> dict[str, Tensor | None]:
        model = zoo.build("llava-llama").double().train()
        graft = wake(alula.attach(model, ExpertsConfig(tokens=tokens, rank=rank)))  # type: ignore[arg-type]
        if computed_by == "checkpointing":
            model.gradient_checkpointing_enable()
        if computed_by == "loop":
            alula.detach(model)
            by_token(model, updates_of(graft), which(inputs, tokens))
        model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().sum().backward()
        return {name: parameter.grad for name, parameter in graft.named_parameters()}

    found, expected = gradients("graft"), gradients("loop")
    assert all(value is not None and bool(value.any()) for value in expected.values())
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(gradients("checkpointing"), expected, atol=1e-8, rtol=1e-8)


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


@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
def test_experts_stand_behind_an_adapter_of_pefts(tokens: str) -> None:
    inputs = zoo.batch("llava-llama", "3I2", "6")
    wrapped = peft.get_peft_model(zoo.build("llava-llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = run(wrapped, "llava-llama", inputs)
    graft: Any = wake(alula.attach(wrapped, ExpertsConfig(tokens=tokens, rank=4)))  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("tokens", "rank"), [("image", 4), ("both", 4), ("both", None), ("seen", None)])
def test_experts_that_are_no_lora_are_not_exported(tokens: str, rank: int | None, tmp_path: Path) -> None:
    model = zoo.build("llava-llama")
    alula.attach(model, ExpertsConfig(tokens=tokens, rank=rank))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("targets", [("attention", "mlp"), ("q_proj", "down_proj")])
@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
def test_under_a_policy_experts_act_on_the_tokens_that_are_left(tokens: str, targets: tuple[str, ...]) -> None:
    """Against barring tokens by masks, with every token computed and then not looked at."""
    model, inputs = zoo.build("llava-llama", layers=4), zoo.batch("llava-llama", "3I2", "5", "I4I2")
    wake(alula.attach(model, ExpertsConfig(tokens=tokens, rank=3, targets=targets)))  # type: ignore[arg-type]
    with masked(model, lambda layer, ids: (ids != zoo.IMAGE) | (layer < 2)):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    with Withdraw(layer=2).on(model):
        ours = run(model, "llava-llama", inputs)
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    valid = inputs["attention_mask"].bool()
    text = valid & (inputs["input_ids"] != zoo.IMAGE)
    torch.testing.assert_close(ours[text], expected[text], atol=1e-4, rtol=1e-4)
    with masked(model, lambda layer, ids: (ids != zoo.IMAGE) | (layer < 2)):
        assert torch.equal(said, model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("part", ["mlp", "attention", "block"])
def test_experts_and_policies_come_in_any_order(part: str) -> None:
    inputs = zoo.batch("llava-llama", "3I2", "5", "I4I2")
    found = []
    for before in (True, False):
        model = zoo.build("llava-llama", layers=4)
        policy = Skip(part=part, layers=(1, 2))  # type: ignore[arg-type]
        if before:
            wake(alula.attach(model, ExpertsConfig(tokens="both", rank=3)))
        with policy.on(model), Prune(stages=((3, 0.5),)).on(model):
            if not before:
                wake(alula.attach(model, ExpertsConfig(tokens="both", rank=3)))
            found.append(run(model, "llava-llama", inputs))
    assert torch.equal(*found)
    plain = run(zoo.build("llava-llama", layers=4), "llava-llama", inputs)
    words = inputs["attention_mask"][1].bool()
    # of text alone; pruned, its neighbors leave a narrower batch, in which some processors round otherwise
    torch.testing.assert_close(found[0][1, words], plain[1, words], atol=1e-5, rtol=1e-5)
