"""What experts launch: operators per linear and per forward, no copies, and nothing the host has to wait for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import alula
from alula.grafts import ExpertsConfig
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import token_map

CACHE = cache_keyword()
LINEARS = 7  # in a layer
# what launches nothing: other views of the same memory
VIEWS = {"t", "view", "_unsafe_view", "transpose", "slice", "unsqueeze", "detach", "expand", "select", "alias"}
READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__int__, Tensor.__float__}


class Launched(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what has the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


def forwards(model: Any, *layouts: str, is_ours: bool = True) -> list[tuple[Counter[str], int]]:
    """What reading a prompt and then a step of decoding launch, and how often each has the host wait."""
    inputs, found = zoo.batch("llama", *layouts), []
    given: dict[str, Any] = {**inputs, "token_map": token_map(inputs)} if is_ours else inputs
    mask = inputs["attention_mask"]
    for _ in range(2):
        with torch.no_grad(), Launched() as launched, Reads() as reads:
            cache = cache_of_output(model(**given, use_cache=True))
        found.append((launched.counts, reads.count))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        given = {"input_ids": torch.ones(len(mask), 1, dtype=torch.int64), "attention_mask": mask, CACHE: cache}
    return found


def grafted(tokens: str, layers: tuple[int, ...] | None = None, **options: Any) -> Any:
    model = zoo.build("llama")
    alula.attach(model, ExpertsConfig(tokens=tokens, rank=4, layers=layers, **options))  # type: ignore[arg-type]
    return model


def lora(layers: list[int] | None = None, rank: int = 4) -> Any:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=names, layers_to_transform=layers)
    return peft.get_peft_model(zoo.build("llama"), config)


def more(one: Counter[str], other: Counter[str]) -> dict[str, int]:
    """How many more operators of each name there are in the first."""
    return {name: one[name] - other[name] for name in {*one, *other} if one[name] != other[name]}


def test_a_linear_launches_no_more_than_a_lora_does() -> None:
    """By the operators that experts in a second layer add to those of the first."""
    masked, bare = ({"mm": 2 * LINEARS, **each, "add": LINEARS} for each in ({"mul": LINEARS}, {}))
    expected = {"image": [masked, {}], "seen": [masked, bare], "both": [masked, bare]}

    def added(both: Any, first: Any, **options: Any) -> list[dict[str, int]]:
        pairs = zip(*(forwards(model, "3I2", "I5", **options) for model in (both, first)), strict=True)
        return [more(a, b) for (a, _), (b, _) in pairs]

    # LoRA scales what experts mask, at the linear's whole width
    assert added(lora(), lora([0]), is_ours=False) == [masked, masked]
    for tokens, launched in expected.items():
        assert added(grafted(tokens), grafted(tokens, (0,))) == launched


@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
def test_a_step_of_text_waits_for_nothing(tokens: str) -> None:
    """Behind an image in every sample, in some, and in none."""
    _, (_, host_reads) = forwards(zoo.build("llama"), "3I2", "I5", is_ours=False)
    for layouts in (("3I2", "I5"), ("3I2", "5"), ("6", "5")):
        model = grafted(tokens)
        (prompt, prompt_reads), (step, step_reads) = forwards(model, *layouts)
        with alula.grafts_of(model)["experts"].disabled():
            (bare_prompt, bare_prompt_reads), (bare_step, bare_step_reads) = forwards(model, *layouts)
        assert prompt_reads == bare_prompt_reads
        assert step_reads == bare_step_reads == host_reads
        if layouts == ("6", "5"):
            assert (prompt, step) == (bare_prompt, bare_step)
        if tokens == "image":
            assert step == bare_step


@pytest.mark.parametrize("tokens", ["image", "seen", "both"])
def test_a_training_step_launches_and_keeps_what_it_does_with_a_lora(tokens: str) -> None:
    """And a gate, which is made once."""
    inputs = zoo.batch("llama", "3I2", "I5")

    def cost(model: Any, **further: Any) -> tuple[Counter[str], int]:
        kept: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        model.train()
        with Launched() as launched, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            model(**inputs, **further, use_cache=False).logits.sum().backward()
        weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
        return launched.counts, sum(size for place, size in kept.items() if place not in weights)

    model = grafted(tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("alula" in name)
    launched, kept = cost(model, token_map=token_map(inputs))
    rank = 8 if tokens == "both" else 4
    with_lora, kept_with_lora = cost(lora(rank=rank))
    gate = more(launched, with_lora)
    assert not {"mm", "mul", "add"} & gate.keys()
    assert sum(gate.values()) <= 13
    mask_width = rank if tokens == "both" else 1
    assert kept - kept_with_lora == 4 * mask_width * inputs["input_ids"].numel()
