"""Wings written down as its equations stand: every attention matrix materialised, nothing cached.

The baseline of `wings.py`. It shares no code with alula. It computes what `alula.WingsConfig(router="mass")` or
`router="attention"` computes under the exact gate, for batches whose samples all have the same layout of tokens.

Shapes: B batch, S tokens, K key tokens of one learner, H heads, D their width, d stream width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NaiveWings(nn.Module):
    """A decoder with Wings learners in every layer.

    Args:
        model: a causal language model of a pre-norm family whose d is a multiple of D; set to eager attention here.
        weights: tensors named ``layers.{i}.{visual,textual}.{q,k,v,o}.{down,up}`` and
            ``layers.{i}.router.{weight,bias}``, float32 whatever the model is in, as alula has them.
        router: "mass" or "attention".
    """

    def __init__(self, model: Any, weights: dict[str, Tensor], router: str) -> None:
        super().__init__()
        model.set_attn_implementation("eager")
        self.model, self.router = model, router
        self.head_dim = model.config.head_dim
        self.weights = nn.ParameterDict({name.replace(".", "/"): tensor.clone() for name, tensor in weights.items()})
        self.kinds = torch.empty(0)
        self.inputs = torch.empty(0)
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self._entering(index), with_kwargs=True)
            layer.self_attn.register_forward_hook(self._attended(index))

    def forward(self, kinds: Tensor, **inputs: Any) -> Any:
        """The model's output; `kinds` (S,) is 1 at image tokens and 0 at text tokens."""
        self.kinds = kinds
        return self.model(**inputs, use_cache=False)

    def _entering(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stream = args[0] if args else kwargs["hidden_states"]
            self.cos, self.sin = kwargs["position_embeddings"]
            if index == 0:
                self.inputs = self.stream

        return hook

    def _attended(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            branch, attention = output
            weights = self._route(index, attention).to(branch.dtype)
            query = self.stream + branch
            for i, learner in enumerate(("visual", "textual")):
                output = self._attend(f"layers/{index}/{learner}", query, self.kinds == 1 - i)
                branch = branch + weights[..., i : i + 1] * output
            return branch, attention

        return hook

    def _route(self, index: int, attention: Tensor) -> Tensor:
        """(B, S, 2) float32 weights from the (B, H, S, S) attention of the main branch."""
        weight, bias = self.weights[f"layers/{index}/router/weight"], self.weights[f"layers/{index}/router/bias"]
        if self.router == "mass":
            logits = attention[..., self.kinds == 1].sum(dim=-1, dtype=weight.dtype).transpose(1, 2) @ weight.T
        else:
            logits = attention.mean(dim=1, dtype=weight.dtype) @ weight[:, : attention.shape[-1]].T
        return torch.softmax(logits + bias, dim=-1)

    def _attend(self, name: str, query: Tensor, chosen: Tensor) -> Tensor:
        """(B, S, d) the output of a learner for every query, over the chosen tokens at or before it."""

        def low(part: str, x: Tensor) -> Tensor:
            first, second = (self.weights[f"{name}/{part}/{factor}"].to(x.dtype) for factor in ("down", "up"))
            return x @ first.T @ second.T

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        x = self.inputs[:, chosen]
        q, k, v = heads(query + low("q", query)), heads(x + low("k", x)), heads(x + low("v", x))
        q, k = _rope(q, self.cos, self.sin), _rope(k, self.cos[:, chosen], self.sin[:, chosen])
        column = torch.arange(len(chosen), device=chosen.device)
        seen = (self.kinds == 1).cumsum(dim=0) > 0
        legal = (column[chosen] <= column[:, None]) & seen[:, None]
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).masked_fill(~legal, -torch.inf)
        weights = torch.softmax(scores.float(), dim=-1).nan_to_num(0.0).to(v.dtype)
        return low("o", (weights @ v).transpose(1, 2).flatten(2))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
