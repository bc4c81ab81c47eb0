"""AIM on a host: the map from states to fused tokens, and fused tokens in the place of embeddings.

Forwards take two further inputs, for the L tokens from the first one on: `FUSED` (B, L, d) and `FUSED_AT` (B, L) bool.
Where the latter is set, the first decoder layer is given the fused token and not the embedding of the id that stands
there. Ids stay those of the words, so that positions, modalities and whatever else goes by ids are of text.

Shapes: B batch, S new tokens of a forward, L tokens that are known to be fused or not, d width of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.grafts.aim.config import AimConfig
from alula.grafts.base import Graft
from alula.grafts.embeddings import embedding_length
from alula.grafts.linears import trained_like
from alula.seam import LayerView, Phase, Point

FUSED, FUSED_AT = "fused", "fused_at"


class FusingMap(nn.Module):
    """One linear of the stream's width, the identity at the start, and a layer norm behind it.

    F = LayerNorm(W h + b). The paper has "a trainable projection"; its form is that of the authors' SelfCP.
    """

    def __init__(self, name: str, config: AimConfig, length: float, like: Tensor, width: int) -> None:
        """
        Args:
            name: of the graft.
            length: root mean square of what the first layer is given for a token.
            like: a tensor whose dtype and device the weights take.
        """
        super().__init__()
        self.graft_name = name
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.linear = nn.Linear(width, width, **kind)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.norm = nn.LayerNorm(width, **kind) if config.norm else None
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, length)

    def forward(self, states: Tensor) -> Tensor:
        """(..., d) fused tokens of (..., d) states, in the weights' dtype."""
        mapped: Tensor = self.linear(states.to(self.linear.weight.dtype))
        return mapped if self.norm is None else self.norm(mapped)

    def put(self, view: LayerView, hidden: Tensor) -> Tensor | None:
        """At the first layer's input: fused tokens in the place of embeddings, where a forward is given some."""
        ctx = view.ctx
        fused, at = ctx.given.get(FUSED), ctx.given.get(FUSED_AT)
        if (fused is None and at is None) or ctx.is_disabled(self.graft_name):
            return None
        if fused is None or at is None or fused.dim() != 3 or fused.shape[:2] != at.shape:
            shapes = [None if each is None else tuple(each.shape) for each in (fused, at)]
            raise UsageError(
                f"fused tokens are told by {FUSED} (samples, tokens, width) and {FUSED_AT} (samples, tokens), and here "
                f"is {shapes[0]} and {shapes[1]}",
                remedy="take both from alula.demonstrations.FewShot",
            )
        new = ctx.tokens.shape[1]
        behind = ctx.all_tokens.shape[1] - new
        if behind >= fused.shape[1]:
            return None
        if fused.shape[2] != hidden.shape[2]:
            raise UsageError(
                f"fused tokens are {fused.shape[2]} wide, the host's stream {hidden.shape[2]}",
                remedy="encode the demonstrations with this host",
            )
        fused, at = fused[:, behind : behind + new], at[:, behind : behind + new]
        missing = new - fused.shape[1]  # tokens behind the prompt, such as drafted ones
        if missing:
            fused = nn.functional.pad(fused, (0, 0, 0, missing))
            at = nn.functional.pad(at, (0, missing))
        at = view.pick(at.to(hidden.device).bool())
        return torch.where(at[..., None], view.pick(fused.to(hidden)), hidden)


class AimGraft(Graft):
    """AIM attached to a host; see `AimConfig`. Without fused tokens it does nothing.

    `alula.demonstrations` encodes demonstrations with it and puts them into prompts.
    """

    config: AimConfig
    further_inputs = (FUSED, FUSED_AT)

    def grow(self, indices: list[int]) -> None:
        anatomy = self.seam.anatomy
        check_positions(anatomy)
        super().grow(anatomy.layer_indices([self.config.layer]))

    def build_layer(self, index: int) -> nn.Module:
        anatomy, layer = self.seam.anatomy, self.seam.anatomy.layers[index]
        like = trained_like(layer, layer, where=f"aim: decoder layer {index}")
        return FusingMap(self.name, self.config, embedding_length(anatomy), like, anatomy.hidden_size)

    def place(self, index: int, module: Any) -> None:
        # an edit: whatever else reads the first layer's input finds fused tokens there
        self.hold(self.seam.on(Point.BLOCK_INPUT, 0, module.put, phase=Phase.EDIT, owner=self.name))

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {"aim": list(self.parameters())}

    @property
    def map(self) -> FusingMap:
        """From states of the host to fused tokens."""
        module: Any = next(iter(self.layers.values()))
        return module

    def states(self, inputs: Mapping[str, Any]) -> Tensor:
        """(B, S, d) states that are mapped, of a forward through the host without a cache. Without gradients, which
        stop here: the host is frozen, and the map stands behind it.

        Args:
            inputs: of the module below the head: ``input_ids``, ``attention_mask``, media.
        """
        anatomy = self.seam.anatomy
        index = next(iter(self.layers))
        is_last = index == anatomy.num_layers - 1
        with torch.no_grad():
            output = anatomy.backbone(**inputs, use_cache=False, output_hidden_states=not is_last, return_dict=True)
        return output.last_hidden_state if is_last else output.hidden_states[index + 1]


def check_positions(anatomy: Anatomy) -> None:
    """Refuse a decoder in whose embeddings fused tokens would have no positions.

    Raises:
        HostError: positions are added before its first layer.
    """
    if not anatomy.rotates:
        raise HostError(
            f"{type(anatomy.decoder).__name__} adds positions to embeddings before its first layer, where fused tokens "
            "have none",
            remedy="take a host with rotary positions",
        )
