"""The Wings graft: learners beside the attention of each chosen decoder layer, and what adds their output.

Shapes: B batch, S new tokens, d stream width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import AlulaError
from alula.grafts.base import Graft
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.decode import DecodeEngine
from alula.grafts.wings.learners import Engine, LayerLearners, zero_of
from alula.grafts.wings.prefill import PrefillEngine
from alula.grafts.wings.published import PublishedEngine
from alula.grafts.wings.stacked import Siblings
from alula.seam import ForwardContext, LayerView, Part, Point, Seam, Uncompiled

_Made = TypeVar("_Made")


class WingsLayer(LayerLearners):
    """The learners of one decoder layer, and what adds their output to the stream."""

    def __init__(self, seam: Seam, name: str, config: WingsConfig, index: int, siblings: Siblings) -> None:
        super().__init__(seam, name, config, index, siblings)
        # layers of these settings share an engine
        keys = config.system_keys, config.normalize, config.rope, config.cache
        self._shared = config.gate, config.learners, *keys

    # -- sums of attention for the router (seam.Sums) -------------------------------------------------------------

    separate_pass = False

    def key_values(self, view: LayerView) -> Tensor | None:
        engine = self.state(view.ctx).engine  # none was chosen where they are not active
        return None if engine is None else engine.key_values(self, view.ctx)

    def on_sums(self, view: LayerView, sums: Tensor) -> None:
        self.state(view.ctx).sums = view.spread(sums)

    # -- at points of the layer -----------------------------------------------------------------------------------

    def enter(self, view: LayerView, hidden: Tensor) -> None:
        """Before the layer: keep the stream, choose the engine (outside any checkpoint, so that it happens once)."""
        if self._is_active(view.ctx):
            state = self.state(view.ctx)
            state.stream = hidden
            state.is_differentiable = torch.is_grad_enabled()
            state.engine = self._engine(view.ctx)
            state.engine.prepare(self, view.ctx)

    def add(self, view: LayerView, branch: Tensor) -> Tensor:
        """Behind attention: `branch` (B, S, d), about to join the stream, plus the routed learners."""
        ctx = view.ctx
        state = self.state(ctx)
        if state.engine is None:
            assert not self._is_active(ctx), "the decoder layer has not been entered"
            return self._without_learners(branch)
        assert state.stream is not None
        if state.is_differentiable and not torch.is_grad_enabled():
            raise AlulaError(
                "reentrant gradient checkpointing would lose the gradients that flow through the learners' keys",
                remedy='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the default of transformers',
            )
        # where tokens were taken out of this layer, the learners go on seeing all of them
        is_whole = view.index is None
        query = view.spread(self.query(view.matched(state.stream), branch))
        output = state.engine.attend(self, ctx, query, branch if is_whole else None)
        if not state.is_differentiable:
            state.stream = None
        if output is None:
            return self._without_learners(branch)
        return output if is_whole else branch + view.pick(output)

    def part(self, view: LayerView) -> Part | None:
        """What stands behind attention once the layer is compiled; None: nothing.

        Raises:
            Uncompiled: this cannot be compiled.
        """
        if self.must_take_part:
            raise Uncompiled("learners are trained by several processes")
        if not self._is_active(view.ctx):
            return None
        state = self.state(view.ctx)
        assert state.engine is not None, "the decoder layer has not been entered"
        return state.engine.part(self, view.ctx)

    def forget(self, ctx: ForwardContext) -> None:
        """Let go of what was kept for `add`: the layer runs compiled."""
        self.state(ctx).stream = None

    # -- the method -----------------------------------------------------------------------------------------------

    def _is_active(self, ctx: ForwardContext) -> bool:
        """Whether any token of this batch can attend to a learner's keys."""
        if ctx.is_disabled(self.graft_name):
            return False
        return ctx.any_media or (self.config.gate == "paper" and "textual" in self.config.learners)

    def _engine(self, ctx: ForwardContext) -> Engine:
        """What computes the learners of this forward; layers of equal settings share one."""
        config = self.config
        if config.compat is not None:
            return _made_once(
                ctx,
                (PublishedEngine, self.graft_name),
                lambda: PublishedEngine.plan(ctx, config, training=self.training),
            )
        is_short = ctx.tokens.shape[1] < self.head_dim and not torch.is_grad_enabled()
        if is_short and not (self.training and config.dropout) and not ctx.subscribers(self.index):
            return _made_once(ctx, (DecodeEngine, *self._shared), lambda: DecodeEngine.plan(ctx, config, self.head_dim))
        return _made_once(ctx, (PrefillEngine, *self._shared), lambda: PrefillEngine.plan(ctx, config))

    def _without_learners(self, branch: Tensor) -> Tensor:
        return branch + zero_of(self) if self.must_take_part else branch


class WingsGraft(Graft):
    """Wings attached to a host; see `WingsConfig`."""

    config: WingsConfig

    def __init__(self, seam: Seam, name: str, config: WingsConfig) -> None:
        super().__init__(seam, name, config)
        self.siblings = Siblings()
        seam.keep_inputs(name)

    @property
    def needs_roles(self) -> bool:
        return not self.config.system_keys

    @property
    def leaves_text(self) -> bool:
        return self.config.gate == "exact"

    @classmethod
    def indices(cls, anatomy: Anatomy, config: WingsConfig) -> list[int]:
        """Of a hybrid decoder the layers that have attention."""
        if config.layers is None:
            return list(anatomy.attended)
        found = super().indices(anatomy, config)
        for index in found:
            anatomy.attention(index)  # refuses where there is none
        return found

    def build_layer(self, index: int) -> WingsLayer:
        return WingsLayer(self.seam, self.name, self.config, index, self.siblings)

    def place(self, index: int, module: WingsLayer) -> None:
        if module.wants_sums:
            # first, since a host whose attention cannot give sums is refused
            self.hold(self.seam.request_sums(index, module, gated=self.config.gate == "exact"))
        self.on(Point.BLOCK_INPUT, index, module.enter)
        self.on(Point.ATTENTION, index, module.add, module.part)

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
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


def _made_once(ctx: ForwardContext, key: Any, make: Callable[[], _Made]) -> _Made:
    """What `make` returns, made by the first layer of this forward that needs it."""
    if key not in ctx.memo:
        ctx.memo[key] = make()
    return ctx.memo[key]
