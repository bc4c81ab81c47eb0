"""Connectors: what lies between a vision tower and the decoder, by name.

A host is a stock ``LlavaForConditionalGeneration``, so a connector must be something that class can express. Its
projector is ``linear_2(act(linear_1(x)))`` with ``x`` the tower's tokens (tokens, vision width x feature layers), and
``act`` any activation transformers knows by name. That covers

- ``mlp2x_<activation>``: the two-layer perceptron of LLaVA-1.5 (``mlp2x_gelu``), with any activation;
- ``linear``: with the identity for ``act`` the two matrices multiply to one linear map. It is held in two factors,
  because that is the module the class builds; the second starts as the identity, so a fresh ``linear`` connector *is*
  the single matrix of LLaVA-1, and it remains a linear map under any training.

Deeper perceptrons (``mlp3x_gelu``), resamplers and Q-Formers have no stock class around a free choice of decoder.
``queries`` has a host class of alula's own, see :mod:`alula.hosts.multimodal`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from alula.errors import UsageError

# activations with parameters of their own are left out: the stock projector initialises and saves linear layers only
ACTIVATIONS = tuple(sorted(set(ACT2CLS) - {"linear", "prelu", "xielu"}))


@dataclass(frozen=True)
class Connector:
    """How to express a connector in the stock configuration, and how to start it.

    Args:
        name: the name it was asked for by.
        config: keyword arguments for ``LlavaConfig``.
        identity_second: the second linear layer starts as the identity map.
    """

    name: str
    config: dict[str, Any]
    identity_second: bool = False

    @torch.no_grad()
    def initialise(self, projector: LlavaMultiModalProjector, seed: int) -> None:
        """Fill a projector in place, in float32, from ``seed`` alone.

        Weights and biases are uniform in ``+-1/sqrt(fan_in)``: PyTorch's own linear layer, which is what the LLaVA
        papers trained from (transformers' default of N(0, 0.02) ignores the width).
        """
        generator = torch.Generator().manual_seed(seed)
        for layer in (projector.linear_1, projector.linear_2):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                parameter.copy_(values)
        if self.identity_second:
            nn.init.eye_(projector.linear_2.weight)
            nn.init.zeros_(projector.linear_2.bias)


def _linear(name: str) -> Connector | None:
    config = {"projector_hidden_act": "linear", "multimodal_projector_bias": True}
    return Connector(name, config, identity_second=True) if name == "linear" else None


def _mlp(name: str) -> Connector | None:
    match = re.fullmatch(r"mlp(\d+)x_(\w+)", name)
    if match is None:
        return None
    depth, activation = int(match[1]), match[2]
    if depth != 2:
        raise UsageError(
            f"{name!r} has {depth} linear layers; the projector of a stock LLaVA model has two",
            where="connector",
            remedy=f"use 'mlp2x_{activation}' or 'linear'",
        )
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"{name!r} names an unknown activation {activation!r}",
            where="connector",
            remedy=f"one of: {', '.join(ACTIVATIONS)}",
        )
    return Connector(name, {"projector_hidden_act": activation, "multimodal_projector_bias": True})


# what to show a reader -> its parser, which answers None for names that are not its own
CONNECTORS: dict[str, Callable[[str], Connector | None]] = {"linear": _linear, "mlp2x_<activation>": _mlp}


def find_connector(name: str) -> Connector:
    """The connector called ``name``.

    Raises:
        UsageError: unknown name or activation, or a depth that the stock class cannot hold; names the legal values.
    """
    for parse in CONNECTORS.values():
        found = parse(name)
        if found is not None:
            return found
    raise UsageError(
        f"unknown connector {name!r}",
        where="connector",
        remedy=f"one of: {', '.join(CONNECTORS)} (e.g. mlp2x_gelu), queries",
    )
