"""MKS2 on a host: what its parts do at the points of a layer, and in which mode.

The memory is given what the MLP is given, behind the host's own norm, and its output takes the place of the MLP's, or
joins it, before whatever the host does next (a norm in sandwich layers, the residual everywhere).

Shapes: B batch, S new tokens, M of them in the layer, d width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.linears import key, named_linears, path_of, trained_like, widths
from alula.grafts.mks2.config import MKS2Config, Mode
from alula.grafts.mks2.memory import LowRank, MemoryRouter, VisualMemory
from alula.seam import ForwardContext, LayerView, OutputOf, marked, marks

MODES: tuple[Mode, ...] = get_args(Mode)
_MEMORY, _INNER, _OUTER, _MLP = "memory", "memory_inner", "memory_outer", "mlp"


class MKS2Layer(nn.Module):
    """The parts of one decoder layer.

    Attributes:
        memory: the visual memory.
        lora: adapters by what they stand beside: "memory_inner" and "memory_outer" or "memory", and linears of the MLP
            by path or "mlp".
        router: None where tokens go by modality.
    """

    def __init__(
        self, name: str, config: MKS2Config, hidden_size: int, linears: dict[str, nn.Module], like: Tensor
    ) -> None:
        """
        Args:
            name: of the graft.
            linears: those of the MLP that get adapters, by path.
            like: a tensor whose dtype and device the weights take.
        """
        super().__init__()
        self.graft_name, self.config = name, config
        self._key = (MKS2Layer, name)  # what is kept of a forward for all layers goes by this key
        self.memory = VisualMemory(hidden_size, config, like)
        width, d = config.width(hidden_size), hidden_size
        mixes = config.route == "softmax"
        self.lora = nn.ModuleDict()
        if config.lora == "parallel":
            for beside in (_MEMORY, _MLP) if mixes else (_MEMORY,):
                self.lora[beside] = LowRank(d, d, config, like)
        else:
            self.lora[_INNER], self.lora[_OUTER] = LowRank(width, d, config, like), LowRank(d, width, config, like)
            for path, linear in linears.items():
                out_in = widths(linear)
                assert out_in is not None
                self.lora[key(path)] = LowRank(*out_in, config, like)
        self.router = MemoryRouter(hidden_size, config, like) if mixes else None

    def adapt(self, adapter: LowRank, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At the output of one of the MLP's linears: with its adapter's part, where memory and MLP are mixed."""
        return adapter(given, output) if self.mode(view.ctx) == "mix" else None

    def feed(self, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At the MLP's output: what the feed-forward half of the layer gives in this mode.

        Args:
            view: the layer.
            output: (B, M, d) of the MLP.
            given: (B, M, d) its input.
        """
        mode = self.mode(view.ctx)
        if mode == "text":
            return None
        if mode == "store":
            found = self.memory(given).to(output.dtype)
            return found if self.config.store == "instead" else output + found
        if self.router is None:
            # in training parts take part wherever they can: processes that share weights have to agree on gradients
            if not view.ctx.new_media and not self.training:
                return None
            return torch.where(view.pick(self._is_media(view.ctx)), self._recalled(given, output), output)
        found = self._recalled(given, output)
        if _MLP in self.lora:
            output = self.lora[_MLP](given, output)
        share = self.router(given)[..., :1]
        return torch.lerp(output, found, share.to(output.dtype))

    def mode(self, ctx: ForwardContext) -> Mode:
        """What the feed-forward half is in this forward."""
        if self._key not in ctx.memo:
            owner = ctx.requests.owner_id(self.graft_name)
            chosen = next((mode for mode in MODES if (owner, mode) in ctx.marks), self.config.mode)
            ctx.memo[self._key] = "text" if ctx.is_disabled(self.graft_name) else chosen
        return ctx.memo[self._key]

    def _recalled(self, given: Tensor, output: Tensor) -> Tensor:
        """(B, M, d) of the memory with its adapters, in the dtype of the MLP's output."""
        if self.config.lora == "parallel":
            found = self.lora[_MEMORY](given, self.memory(given))
        else:
            found = self.memory(given, self.lora[_INNER], self.lora[_OUTER])
        return found.to(output.dtype)

    def _is_media(self, ctx: ForwardContext) -> Tensor:
        """(B, S, 1) bool, made once per forward."""
        asked = (*self._key, "media")
        if asked not in ctx.memo:
            ctx.memo[asked] = ctx.tokens.is_perceptual[..., None]
        return ctx.memo[asked]


class MKS2Graft(Graft):
    """MKS2 attached to a host; see `MKS2Config`."""

    config: MKS2Config

    def build_layer(self, index: int) -> nn.Module:
        anatomy, layer = self.seam.anatomy, self.seam.anatomy.layers[index]
        mlp, linears = anatomy.mlp(index), {}
        if self.config.lora == "linears" and self.config.route == "softmax":
            linears = {path: each for path, (each, names) in named_linears(anatomy, index).items() if "mlp" in names}
            if not linears:
                raise UsageError(
                    f"mks2.lora: the MLP of decoder layer {index} holds no linear module",
                    remedy='lora="parallel" puts one adapter beside the MLP as a whole',
                )
        like = trained_like(mlp, layer, where=f"mks2: the MLP of decoder layer {index}")
        return MKS2Layer(self.name, self.config, anatomy.hidden_size, linears, like)

    def place(self, index: int, module: Any) -> None:
        layer, mlp = self.seam.anatomy.layers[index], self.seam.anatomy.mlp(index)
        path = next(name for name, each in layer.named_modules() if each is mlp)
        for name, adapter in module.lora.items():
            if name not in (_MEMORY, _INNER, _OUTER, _MLP):
                self.on(OutputOf(path_of(name)), index, partial(module.adapt, adapter))
        self.on(OutputOf(path), index, module.feed)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[2]  # layers.3.memory.inner
            groups.setdefault(f"{self.config.graft_type}.{part}", []).append(parameter)
        return groups

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Have the forwards that this thread (or asyncio task) begins inside the block run in another mode.

        Raises:
            UsageError: no such mode, or a block of another mode stands around it.
        """
        if mode not in MODES:
            raise UsageError(f"there is no mode {mode!r}", where="mks2.mode", remedy=", ".join(MODES))
        others = [each for each in MODES if each != mode and (self.owner_id, each) in marks()]
        if others:
            raise UsageError(f"mode {mode!r} is asked for inside a block of mode {others[0]!r}", where="mks2.mode")
        with marked((self.owner_id, mode)):
            yield
