"""The Wings graft: learners and router of each layer, and the hooks that let them speak.

Keys and values of both learners are the decoder's input rows (perceptual rows for the visual learner, text rows for the
textual one), shared by all layers. Which key a query may see is decided by true position, kind and validity.

Shapes: B batch, S new rows, P cached rows, K key rows of one learner, d stream width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.errors import AlulaError
from alula.grafts.base import Graft
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.lorra import Angles, LoRRA, learner_head_dim, narrow_angles
from alula.grafts.wings.mass import report_mass
from alula.grafts.wings.router import AttentionRouter, ConstantRouter, MassRouter, Router
from alula.rows import Role, RowMap
from alula.seam import ATTENTION, NAME, Forward, Seam

# in sandwich-norm layers the attention's hook hands its forward to the same graft's hook on the norm right behind it
_between: ContextVar[Mapping[nn.Module, Forward]] = ContextVar("alula_wings_between", default=MappingProxyType({}))


@dataclass(frozen=True)
class Keys:
    """The key rows of one learner, gathered from all rows of the batch.

    Attributes:
        index: (B, K) places among the P + S rows; samples with fewer keys repeat place 0, never legal.
        legal: (B, S, K) bool: the query may see the key.
        rows: (B, K, d) input rows.
    """

    index: Tensor
    legal: Tensor
    rows: Tensor

    def pick(self, table: Tensor) -> Tensor:
        """(B, P + S, C) -> (B, K, C)."""
        return table.gather(1, self.index[..., None].expand(-1, -1, table.shape[-1]))


class WingsLayer(nn.Module):
    """Learners and router of one decoder layer."""

    def __init__(self, seam: Seam, graft: WingsGraft, index: int) -> None:
        super().__init__()
        config, anatomy = graft.config, seam.anatomy
        reference = anatomy.layers[index].get_parameter(next(iter(dict(anatomy.layers[index].named_parameters()))))
        # half-precision hosts train their adapters in float32, as PEFT does
        place: dict[str, Any] = {"device": reference.device, "dtype": torch.float32}
        self.index, self.graft_name, self.config = index, graft.name, config
        self.layer_type = anatomy.layer_type(index)
        self.host_head_dim = anatomy.head_dim
        self.head_dim = learner_head_dim(anatomy.hidden_size, anatomy.head_dim)
        for name in config.learners:
            learner = LoRRA(
                anatomy.hidden_size, self.head_dim, config.rank, std=config.init_std, dropout=config.dropout, **place
            )
            self.add_module(name, learner)
        self.router: Router | None = None
        if len(config.learners) == 2:
            self.router = {
                "attention": lambda: AttentionRouter(config.router_rows, **place),
                "mass": lambda: MassRouter(anatomy.num_heads, **place),
                "constant": lambda: ConstantRouter(**place),
            }[config.router]()

    # -- sums of attention for the router (seam.KeyColumns) ---------------------------------------------------------

    def key_columns(self, forward: Forward, layer: int) -> Tensor | None:
        if self.router is None or not self._speaks(forward):
            return None
        return self.router.columns(forward.all_rows)

    def receive(self, forward: Forward, layer: int, sums: Tensor) -> None:
        forward.layer(layer)[self, "sums"] = sums

    # -- hooks ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # bookkeeping with data-dependent sizes: nothing in it to fuse
    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer: keep the stream, gather keys (outside any checkpoint, so that it happens once)."""
        forward = kwargs.get(NAME)
        if not isinstance(forward, Forward):
            raise AlulaError(
                f"a decoder layer with the graft {self.graft_name!r} was run without its host",
                remedy="call the whole model; its forward tells the graft which rows are images",
            )
        if self._speaks(forward):
            state = forward.layer(self.index)
            state[self, "stream"] = args[0] if args else kwargs["hidden_states"]
            state[self, "differentiable"] = torch.is_grad_enabled()
            for learner in self.config.learners:
                self._keys(forward, learner)

    def after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """In pre-norm layers: add the learners to what attention adds to the stream."""
        return (self._add(kwargs[NAME], output[0]), *output[1:])

    def between(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> None:
        """In sandwich-norm layers: remember the forward until the norm behind attention has run."""
        _between.set({**_between.get(), self: kwargs[NAME]})

    def after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """In sandwich-norm layers: add the learners to what the norm behind attention adds to the stream."""
        waiting = dict(_between.get())
        forward = waiting.pop(self)
        _between.set(waiting)
        return self._add(forward, output)

    # -- the method -----------------------------------------------------------------------------------------------

    def _speaks(self, forward: Forward) -> bool:
        """Whether any row of this batch can hear a learner."""
        if not forward.seam.holders[self.graft_name].enabled:
            return False
        return forward.has_perceptual or (self.config.gate == "paper" and "textual" in self.config.learners)

    def _add(self, forward: Forward, branch: Tensor) -> Tensor:
        """`branch` (B, S, d), about to join the stream, plus the routed learners."""
        if not self._speaks(forward):
            return self._touch(branch)
        state = forward.layer(self.index)
        stream = state[self, "stream"]
        if state[self, "differentiable"] and not torch.is_grad_enabled():
            raise AlulaError(
                "reentrant gradient checkpointing would lose the gradients that flow through the learners' keys",
                remedy='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the default of transformers',
            )
        query = stream + branch if self.config.query == "post_attention" else stream
        weights = self._route(forward)
        mixed = torch.zeros_like(branch)
        for learner in self.config.learners:
            keys = self._keys(forward, learner)
            if keys is not None:
                voice = self._voice(forward, learner, query, keys)
                mixed = mixed + (voice if weights is None else voice * weights[learner].to(voice.dtype))
                report_mass(self, forward, learner, query, keys, None if weights is None else weights[learner])
        if self.config.gain != 1.0:
            mixed = mixed * self.config.gain
        if not state[self, "differentiable"]:
            del state[self, "stream"]
        return branch + mixed

    def _voice(self, forward: Forward, learner: str, query: Tensor, keys: Keys) -> Tensor:
        """(B, S, d) output of one learner."""
        module: Any = self.get_submodule(learner)
        angles = self._angles(forward, keys) if self.config.rope else None
        if angles is None:
            return module(query, keys.rows, keys.legal)
        return module(query, keys.rows, keys.legal, query_angles=angles[0], key_angles=angles[1])

    def _angles(self, forward: Forward, keys: Keys) -> tuple[Angles, Angles] | None:
        tables = forward.all_rope(self.layer_type)
        if tables is None:
            return None
        cos, sin = narrow_angles(tables, self.host_head_dim, self.head_dim)
        new = forward.rows.shape[1]
        return (cos[:, -new:], sin[:, -new:]), (keys.pick(cos), keys.pick(sin))

    def _route(self, forward: Forward) -> dict[str, Tensor] | None:
        """(B, S, 1) or scalar weight per learner; None for a single learner."""
        if self.router is None:
            return None
        sums = forward.layer(self.index).get((self, "sums"))
        if sums is None and not isinstance(self.router, ConstantRouter):
            raise AlulaError(
                f"the graft {self.graft_name!r} routes by attention, but the decoder's attention implementation was "
                f"changed to {forward.seam.anatomy.config._attn_implementation!r} while it is attached",
                remedy=f"set it to {ATTENTION!r}, or detach the graft first",
            )
        weights = self.router(sums)
        return {"visual": weights[..., 0:1], "textual": weights[..., 1:2]}

    def _keys(self, forward: Forward, learner: str) -> Keys | None:
        """The learner's keys, gathered once per forward and shared by all layers; None if the batch has none."""
        name = ("wings keys", learner, self.config.gate, self.config.system_keys)
        if name not in forward.memo:
            forward.memo[name] = gather_keys(forward, learner, self.config)
        return forward.memo[name]

    def _touch(self, branch: Tensor) -> Tensor:
        """Let silent parameters take part in backward: sharded training deadlocks when ranks disagree on gradients."""
        if not (self.training and torch.is_grad_enabled() and torch.distributed.is_initialized()):
            return branch
        return branch + sum(p.sum() * 0.0 for p in self.parameters() if p.requires_grad)


class WingsGraft(Graft):
    """Wings attached to a host; see `WingsConfig`."""

    config: WingsConfig

    def __init__(self, seam: Seam, name: str, config: WingsConfig) -> None:
        super().__init__(seam, name, config)
        seam.keep_inputs(name)

    def build_layer(self, index: int) -> WingsLayer:
        return WingsLayer(self.seam, self, index)

    def hook_layer(self, index: int, module: WingsLayer) -> list[RemovableHandle]:
        anatomy = self.seam.anatomy
        attention, out = anatomy.attention(index), anatomy.attention_out(index)
        handles = [anatomy.layers[index].register_forward_pre_hook(module.enter, with_kwargs=True)]
        if out is attention:
            handles.append(attention.register_forward_hook(module.after_attention, with_kwargs=True))
        else:
            handles.append(attention.register_forward_hook(module.between, with_kwargs=True))
            handles.append(out.register_forward_hook(module.after_norm))
        if module.router is not None and not isinstance(module.router, ConstantRouter):
            self.seam.ask(index, module, gated=self.config.gate == "exact")
        return handles

    def unhook(self) -> None:
        for index, module in self.layers.items():
            if module in self.seam.askers(index):
                self.seam.stop_asking(index, module)  # type: ignore[arg-type]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        parts = [*self.config.learners, "router"]
        groups = {
            f"{self.config.graft_type}.{part}": [
                parameter
                for module in self.layers.values()
                for name, parameter in module.named_parameters()
                if name.split(".")[0] == part
            ]
            for part in parts
        }
        return {part: parameters for part, parameters in groups.items() if parameters}


def gather_keys(forward: Forward, learner: str, config: WingsConfig) -> Keys | None:
    """Which of all rows are keys of `learner`, and which query may see which.

    A key is legal for a query when it stands at or before it (by true position, in the same sample) and neither is
    padding. Under the exact gate the textual learner is silent at rows that have seen nothing perceptual.
    """
    every, new = forward.all_rows, forward.rows
    chosen = every.is_perceptual if learner == "visual" else every.is_text
    if learner == "textual" and not config.system_keys:
        chosen = chosen & (every.role != Role.SYSTEM)
    most = int(chosen.sum(dim=1).max())
    if most == 0:
        return None
    # chosen rows first, in their order; the tail of samples with fewer keys is masked
    index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :most]
    real = chosen.gather(1, index)
    position = torch.where(real, every.position.gather(1, index), torch.iinfo(torch.int64).max)
    legal = (position[:, None, :] <= new.position[:, :, None]) & new.valid[:, :, None]
    if learner == "textual" and config.gate == "exact":
        legal = legal & seen_of_new(every, new)[:, :, None]
    inputs = forward.all_inputs()
    keys = Keys(index=index.masked_fill(~real, 0), legal=legal, rows=inputs)
    return Keys(index=keys.index, legal=legal, rows=keys.pick(inputs))


def seen_of_new(every: RowMap, new: RowMap) -> Tensor:
    """(B, S) bool: a perceptual row stands at or before this new row."""
    return every.has_seen[:, -new.shape[1] :]
