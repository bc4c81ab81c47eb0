"""What tests of compiled layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from alula.seam.dialect import cache_keyword
from tests import zoo
from tests.grafts.common import token_map

CACHE = cache_keyword()
EACH = 2 if torch.__version__.startswith("2.7.") else 1
"""graphs of the two layers: torch 2.7 makes one for each; from which release on they share one was not looked for"""


def graphs() -> int:
    """How many were made since the test began; a break would have been an error."""
    return counters["stats"]["unique_graphs"]


def logits_of_steps(model: Any, layout: str, count: int) -> list[torch.Tensor]:
    """Logits of a prompt and of steps behind it."""
    inputs, cache = zoo.batch("llama", layout), DynamicCache()
    with torch.no_grad():
        logits = [model(**inputs, token_map=token_map(inputs), **{CACHE: cache}).logits]
        for token in range(count):
            logits.append(model(input_ids=torch.tensor([[token]]), **{CACHE: cache}).logits)
    return logits


def check_gradients(model: Any, twin: Any) -> None:
    """Those of a model whose layers are compiled are those of its twin, prompt by prompt."""
    for layout in ("3I20", "9I31"):
        inputs = zoo.batch("llama", layout)
        found = []
        for each in (model, twin):
            each.train().zero_grad()
            each(**inputs, token_map=token_map(inputs), labels=inputs["input_ids"]).loss.backward()
            found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-3)
