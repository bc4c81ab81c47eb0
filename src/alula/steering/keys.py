"""Keys of highlighted tokens edited along learned directions, before they are rotated and attended to.

After SEKA (spectral editing key amplification): directions are those in which a token's key changes when what stands
around it makes the token matter, and no second run or bias is needed. Written from the idea, not from its code.

Shapes: B batch, M tokens in a layer, L layers, G key heads, D head width, n tokens looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.seam import LayerView, OutputOf, Phase, install, marked
from alula.steering.block import Highlight
from alula.steering.shift import finite

Marked = tuple[Mapping[str, Tensor], Tensor]
"""inputs of a model, and (B, S) marks of the tokens that are looked at"""

STRENGTH = 1.0


@dataclass(frozen=True, eq=False)
class KeyDirections:
    """``k + strength * weight * k P`` in the place of a highlighted token's key. Its ``strength`` is the gain; there is
    no ``guidance``. Keys stay in the cache as they were edited: later turns cannot take it back.

    Attributes:
        projections: (L, G, D, D) P, of each layer and key head.
    """

    projections: Tensor

    def place(self, block: Highlight, strength: float | None, guidance: float | None) -> None:
        if guidance is not None:
            raise UsageError("guidance has no effect: there is no second run", remedy="leave it out")
        gain = STRENGTH if strength is None else finite("strength", strength)
        if not gain:
            raise UsageError("strength=0 does nothing", remedy="give another")
        anatomy, path = block.anatomy, _path(block.anatomy)
        expected = (anatomy.num_layers, anatomy.num_kv_heads, anatomy.head_dim, anatomy.head_dim)
        if tuple(self.projections.shape) != expected:
            raise UsageError(
                f"projections of {tuple(self.projections.shape)} are not for this host, whose are {expected}",
                remedy="learn them on it: KeyDirections.learned(model, ...)",
            )

        def edit(view: LayerView, keys: Tensor, given: Tensor) -> Tensor | None:
            weights = block.of_new(view.ctx)
            if weights is None:
                return None
            projection = view.ctx.once(_on, self.projections, keys.device, keys.dtype)[view.layer]
            heads = keys.unflatten(-1, projection.shape[:2])
            moved = torch.einsum("bmgd,gde->bmge", heads, projection).flatten(-2)
            return keys + (gain * view.pick(weights))[..., None].to(keys) * moved

        for layer in range(anatomy.num_layers):
            block.seam.on(OutputOf(path), layer, edit, phase=Phase.EDIT, owner=block.name, mark=block.first)

    @classmethod
    @torch.no_grad()
    def learned(
        cls, model: nn.Module, samples: Iterable[tuple[Marked, Marked, Marked]], *, share: float = 0.9
    ) -> KeyDirections:
        """Learn directions from the same tokens in three prompts.

        Args:
            model: the host.
            samples: of each the tokens alone, beside a question that is about them, and beside one that is not; as many
                marked tokens in all three.
            share: of the spectrum: P holds the directions of the relevant prompt that make up so much of it, and those
                of the irrelevant one that make up the rest.

        Raises:
            UsageError: there are none, or other numbers of tokens in one. HostError: no module makes keys alone.
        """
        if not 0 < share <= 1:
            raise UsageError(f"a share of {share} is not in 0 to 1")
        anatomy = Anatomy.of(model)
        path, heads = _path(anatomy), (anatomy.num_kv_heads, anatomy.head_dim)
        products: dict[str, Tensor | float] = {"relevant": 0.0, "irrelevant": 0.0}
        count = 0
        for three in samples:
            alone, relevant, irrelevant = (_keys(model, path, heads, each) for each in three)
            if not alone.shape == relevant.shape == irrelevant.shape:
                lengths = [each.shape[1] for each in (alone, relevant, irrelevant)]
                raise UsageError(f"{lengths} tokens are marked in three prompts of the same tokens")
            for name, keys in (("relevant", relevant), ("irrelevant", irrelevant)):
                products[name] = products[name] + torch.einsum("lngd,lnge->lgde", alone, keys)
            count += alone.shape[1]
        if not count:
            raise UsageError("there are no samples to learn from")
        onto = _directions(torch.as_tensor(products["relevant"]) / count, share, first=True)
        off = _directions(torch.as_tensor(products["irrelevant"]) / count, share, first=False)
        return cls((onto + off) / 2)


def _directions(product: Tensor, share: float, *, first: bool) -> Tensor:
    """(L, G, D, D) onto the first directions that make up a share of a spectrum, or onto those behind them."""
    left, values, _ = torch.linalg.svd(product)
    reached = values.cumsum(dim=-1) / values.sum(dim=-1, keepdim=True)
    is_first = torch.nn.functional.pad(reached[..., :-1] < share, (1, 0), value=True)
    kept = left * (is_first if first else ~is_first)[..., None, :]
    return kept @ kept.transpose(-1, -2)


def _keys(model: nn.Module, path: str, heads: tuple[int, int], sample: Marked) -> Tensor:
    """(L, n, G, D) float32 keys of the marked tokens."""
    inputs, marks = sample
    found: list[Tensor] = []
    mark = object()

    def read(view: LayerView, keys: Tensor, given: Tensor) -> None:
        found.append(keys.unflatten(-1, heads)[marks.to(keys.device) > 0].float())

    seam = install(model, "key-directions")
    try:
        for layer in range(seam.anatomy.num_layers):
            seam.on(OutputOf(path), layer, read, phase=Phase.READ, owner="key-directions", mark=mark)
        with marked(mark):
            model(**inputs)
    finally:
        seam.forget(mark)
        seam.release("key-directions")
    return torch.stack(found)


def _path(anatomy: Anatomy) -> str:
    """Of the module that makes keys, below a layer."""
    path = f"{anatomy.family.attention}.k_proj"
    for layer in anatomy.layers:
        try:
            layer.get_submodule(path)
        except AttributeError:
            raise HostError(
                f"{type(layer).__name__} has no {path}: no module of it makes keys alone",
                remedy="use Shift, which needs none",
            ) from None
    return path


def _on(projections: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return projections.to(device=device, dtype=dtype)
