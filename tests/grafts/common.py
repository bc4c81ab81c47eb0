"""What the tests of this room share: configurations, awakened grafts, and one way to call every host of the zoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import alula
from alula import TokenMap, WingsConfig
from alula.grafts import Graft
from alula.seam import find
from tests import zoo

CONFIGS: dict[str, WingsConfig] = {
    "mass": WingsConfig(rank=4, router="mass"),
    "attention": WingsConfig(rank=3, router="attention", router_tokens=96),
    "constant": WingsConfig(rank=4, router="constant", query="block_input"),
    "paper": WingsConfig(rank=4, router="attention", router_tokens=96, gate="paper", query="block_input", gain=2.0),
    "no rope": WingsConfig(rank=4, router="mass", rope=False, gate="paper"),
    "normalized": WingsConfig(rank=4, router="mass", normalize=True),
    "keys kept": WingsConfig(rank=4, router="mass", cache="keys"),
    "outputs kept": WingsConfig(rank=2, router="mass", cache="keys"),
    "visual keys kept": WingsConfig(rank=4, learners=("visual",), normalize=True, cache="keys"),
    "visual": WingsConfig(rank=4, learners=("visual",)),
    "textual": WingsConfig(rank=4, learners=("textual",), gate="paper"),
    "gated textual": WingsConfig(rank=2, learners=("textual",)),
    "last layer": WingsConfig(rank=4, router="mass", layers=(-1,)),
}

ASKS_ATTENTION = {"mass", "attention", "paper", "no rope", "normalized", "last layer", "keys kept", "outputs kept"}
"""Configurations whose router widens the attention pass: equal to the host up to rounding, not to the bit."""

EXACT = {name for name, config in CONFIGS.items() if config.gate == "exact"}


def covering(models: tuple[str, ...], configs: list[str], each: int = 3) -> list[tuple[str, str]]:
    """Every model with `each` configurations, chosen so that every configuration meets models of every kind."""
    stride = max(1, len(configs) // each)
    return [(m, configs[(i + j * stride) % len(configs)]) for i, m in enumerate(models) for j in range(each)]


def wake(graft: Graft, seed: int = 1) -> Graft:
    """Give a fresh graft weights that make every part of it count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in graft.named_parameters():
            std = 1.0 if "router" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return graft


def grafted(
    model_name: str, config: str | WingsConfig = "mass", *, seed: int = 0, name: str = "wings"
) -> tuple[Any, Graft]:
    """A zoo model with a graft whose every part counts."""
    model = zoo.build(model_name, seed)
    settings = CONFIGS[config] if isinstance(config, str) else config
    return model, wake(alula.attach(model, settings, name))


def token_map(inputs: dict[str, Tensor]) -> TokenMap:
    """The map of zoo inputs: placeholders are image tokens, also in text decoders that know no images."""
    return TokenMap.from_modalities((inputs["input_ids"] == zoo.IMAGE).long(), inputs.get("attention_mask"))


def run(model: Any, model_name: str, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Logits (B, S, V) of the host's own vocabulary. A text decoder with a seam is told which tokens are images."""
    if model_name in zoo.TEXT and find(model) is not None and "token_map" not in options:
        options["token_map"] = token_map(inputs)
    with torch.no_grad():
        return model(**inputs, **options).logits[..., : model.get_input_embeddings().weight.shape[0]]


@contextmanager
def prompt_tokens(model: Any, model_name: str, inputs: dict[str, Tensor]) -> Iterator[None]:
    """Inside, `generate` on a text decoder with a seam takes the prompt's placeholders for image tokens."""
    seam = find(model)
    if model_name in zoo.TEXT and seam is not None:
        with seam.given_tokens(token_map(inputs)):
            yield
    else:
        yield


def true_positions(inputs: dict[str, Tensor]) -> Tensor:
    """(B, S) position ids that do not count padding, as `generate` makes them."""
    mask = inputs["attention_mask"]
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def with_ids(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The same inputs with other token ids."""
    return {**inputs, "input_ids": ids}
