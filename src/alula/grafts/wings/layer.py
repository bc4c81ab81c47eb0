"""Wings in one decoder layer: learners, router, and the hooks that let them speak.

Shapes: B batch, S new tokens, P cached tokens, K key tokens of one learner, d stream width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.errors import AlulaError
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.few import Step, Whose, expand_keys, hear, new_factors, plan_step
from alula.grafts.wings.kept import keys_and_factors
from alula.grafts.wings.keys import Plan, PlanAngles, plan_keys, prepared
from alula.grafts.wings.lorra import LoRRA
from alula.grafts.wings.mass import report_mass, wants_mass
from alula.grafts.wings.rope import Angles, learner_head_dim
from alula.grafts.wings.router import AttentionRouter, ConstantRouter, MassRouter, Router
from alula.seam import NAME, ForwardContext, Seam, dialect

# In sandwich-norm layers the attention's hook hands its forward to the same graft's hook on the norm right behind it,
# by the identity of the graft's module in that layer. An error between the two must not keep anything alive.
_between: ContextVar[Mapping[int, ref[ForwardContext]]] = ContextVar(
    "alula_wings_between", default=MappingProxyType({})
)
_COLUMNS = "wings mass columns"


class WingsLayer(nn.Module):
    """Learners and router of one decoder layer."""

    def __init__(self, seam: Seam, name: str, config: WingsConfig, index: int) -> None:
        super().__init__()
        anatomy = seam.anatomy
        reference = anatomy.layers[index].get_parameter(next(iter(dict(anatomy.layers[index].named_parameters()))))
        # half-precision hosts train their adapters in float32, as PEFT does
        place: dict[str, Any] = {"device": reference.device, "dtype": torch.float32}
        self.index, self.graft_name, self.config = index, name, config
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
            self.router = self._build_router(anatomy.num_heads, place)

    def _build_router(self, heads: int, place: dict[str, Any]) -> Router:
        match self.config.router:
            case "attention":
                return AttentionRouter(self.config.router_tokens, **place)
            case "mass":
                return MassRouter(heads, **place)
            case "constant":
                return ConstantRouter(**place)

    # -- sums of attention for the router (seam.SumsReader) ---------------------------------------------------------

    def key_values(self, forward: ForwardContext, layer: int) -> Tensor | None:
        if self.router is None or not self._speaks(forward):
            return None
        if not isinstance(self.router, MassRouter):
            return self.router.columns(forward.all_tokens)
        if _COLUMNS not in forward.memo:  # the same in all layers
            forward.memo[_COLUMNS] = self.router.columns(forward.all_tokens)
        return forward.memo[_COLUMNS]

    def receive(self, forward: ForwardContext, layer: int, sums: Tensor) -> None:
        forward.layer(layer)[self, "sums"] = sums

    # -- hooks ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # bookkeeping with data-dependent sizes: nothing in it to fuse
    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer: keep the stream, gather keys (outside any checkpoint, so that it happens once)."""
        forward = kwargs.get(NAME)
        if not isinstance(forward, ForwardContext):
            raise AlulaError(
                f"a decoder layer with the graft {self.graft_name!r} was run without its host",
                remedy="call the whole model; its forward tells the graft which tokens are images",
            )
        if self._speaks(forward):
            state = forward.layer(self.index)
            state[self, "stream"] = dialect.hidden_of(args, kwargs, where=type(layer).__name__)
            state[self, "differentiable"] = torch.is_grad_enabled()
            self._prepare(forward)

    def after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """In pre-norm layers: add the learners to what attention adds to the stream."""
        return (self._add(kwargs[NAME], output[0]), *output[1:])

    def between(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]
    ) -> None:
        """In sandwich-norm layers: remember the forward until the norm behind attention has run."""
        waiting = {key: forward for key, forward in _between.get().items() if forward() is not None}
        _between.set({**waiting, id(self): ref(kwargs[NAME])})

    def after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """In sandwich-norm layers: add the learners to what the norm behind attention adds to the stream."""
        waiting = dict(_between.get())
        handed = waiting.pop(id(self), None)
        _between.set(waiting)
        forward = handed() if handed is not None else None
        if forward is None:
            raise AlulaError(
                f"the norm behind attention of layer {self.index}, with the graft {self.graft_name!r}, was run alone",
                remedy="call the whole model; its forward tells the graft which tokens are images",
            )
        return self._add(forward, output)

    # -- the method -----------------------------------------------------------------------------------------------

    def _speaks(self, forward: ForwardContext) -> bool:
        """Whether any token of this batch can hear a learner."""
        if forward.is_disabled(self.graft_name):
            return False
        return forward.has_perceptual or (self.config.gate == "paper" and "textual" in self.config.learners)

    def _prepare(self, forward: ForwardContext) -> None:
        """Whatever layers share: done in front of the first of them that speaks."""
        if self._step(forward) is None:
            self._plan_keys(forward)

    def _add(self, forward: ForwardContext, branch: Tensor) -> Tensor:
        """`branch` (B, S, d), about to join the stream, plus the routed learners."""
        if not self._speaks(forward):
            return self._without_learners(branch)
        state = forward.layer(self.index)
        stream = state[self, "stream"]
        if state[self, "differentiable"] and not torch.is_grad_enabled():
            raise AlulaError(
                "reentrant gradient checkpointing would lose the gradients that flow through the learners' keys",
                remedy='gradient_checkpointing_kwargs={"use_reentrant": False}, which is the default of transformers',
            )
        query = stream + branch if self.config.query == "post_attention" else stream
        mixed = self._mix(forward, prepared(query, self.config))
        if not state[self, "differentiable"]:
            del state[self, "stream"]
        return self._without_learners(branch) if mixed is None else branch + mixed

    def _without_learners(self, branch: Tensor) -> Tensor:
        return branch + self._silence(self) if self._must_take_part() else branch

    def _mix(self, forward: ForwardContext, query: Tensor) -> Tensor | None:
        """(B, S, d) sum of the learners' voices, each times its weight; None when nobody has keys."""
        step = self._step(forward)
        mixed = self._mix_many(forward, query) if step is None else self._mix_few(forward, query, step)
        return mixed if mixed is None or self.config.gain == 1.0 else mixed * self.config.gain

    def _mix_many(self, forward: ForwardContext, query: Tensor) -> Tensor | None:
        """Each learner by itself, asked in an order that puts its keys next to one another."""
        plan = self._plan_keys(forward)
        if not plan.keys:
            return None
        share = self._shares(forward, plan)
        asked = plan.arrange(query)
        tables = self.angles(forward, plan)
        known = keys_and_factors(self, forward, plan, tables)
        heard, seconds = [], []
        for name, keys in plan.keys.items():
            learner: Any = self.get_submodule(name)
            angles = None if tables is None else tables.queries
            heard.append(learner.listen(asked, keys.tokens, *known[name], keys.counts, keys.blocks, angles))
            seconds.append(learner.o.up)
        report_mass(self, forward, plan, asked, {name: keys for name, (keys, _) in known.items()}, share)
        # what a token hears is weighed while it is narrow, and raised for all learners at once
        low = plan.restore(torch.stack(heard, dim=-2))  # (B, S, L, r)
        if share is not None:
            low = low * share[..., None].to(low.dtype)
        low = low.masked_fill(~plan.speaks[..., None], 0.0)
        mixed = F.linear(low.flatten(-2), torch.cat(seconds, dim=1).to(low.dtype))
        if self._must_take_part():  # e.g. the visual one, where the paper's gate lets the textual one speak
            for name in set(self.config.learners) - plan.keys.keys():
                mixed = mixed + self._silence(self.get_submodule(name)).to(mixed.dtype)
        return mixed

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def _mix_few(self, forward: ForwardContext, query: Tensor, step: Step) -> Tensor:
        """All learners at once, for few queries (see `few`)."""
        learners: Any = [self.get_submodule(name) for name in self.config.learners]
        place, dims = (self.graft_name, self.index), (self.host_head_dim, self.head_dim)

        def angles(whose: Whose) -> Angles | None:
            return step.angles(forward, self.layer_type, dims, whose) if self.config.rope else None

        kept = forward.is_kept(*place)
        tokens, runs = (step.tokens[:, -query.shape[1] :], step.new_runs) if kept else (step.tokens, step.runs)
        assert runs is not None
        key_factors, value_factors = new_factors(learners, tokens, runs)[:, None].chunk(2, dim=-1)
        if self.config.cache == "keys":
            new = expand_keys(learners, tokens, key_factors[:, 0], runs, angles("new" if kept else "all"))
            keys, value_factors = forward.keep(*place, new, value_factors)
        else:
            key_factors, value_factors = forward.keep(*place, key_factors, value_factors)
            assert step.runs is not None
            keys = expand_keys(learners, step.tokens, key_factors[:, 0], step.runs, angles("all"), step.scratch)
        share = None if self.router is None else self._router_weights(forward)
        return hear(learners, query, keys, value_factors[:, 0], step, angles("asked"), share)

    def _step(self, forward: ForwardContext) -> Step | None:
        """The shared part of a forward of few tokens, or None when learners have to be asked one by one."""
        if forward.tokens.shape[1] >= self.head_dim or torch.is_grad_enabled() or wants_mass(self, forward):
            return None
        if self.training and self.config.dropout:
            return None
        name = ("wings step", *self._shared)
        if name not in forward.memo:
            forward.memo[name] = plan_step(forward, self.config, self.head_dim)
        step = forward.memo[name]
        # tokens that were not kept have to be raised anew, which is done run by run
        return step if step is None or step.runs or forward.is_kept(self.graft_name, self.index) else None

    def angles(self, forward: ForwardContext, plan: Plan) -> PlanAngles | None:
        """RoPE angles of queries and keys, or None."""
        if not self.config.rope:
            return None
        dtype = next(iter(plan.keys.values())).tokens.dtype
        return plan.angles(forward, self.layer_type, self.host_head_dim, self.head_dim, dtype)

    def _shares(self, forward: ForwardContext, plan: Plan) -> Tensor | None:
        """(B, S, learners with keys) or (learners with keys,) weights of the router; None for a single learner."""
        if self.router is None:
            return None
        weights = self._router_weights(forward)
        if len(plan.keys) < len(self.config.learners):
            weights = weights[..., [self.config.learners.index(name) for name in plan.keys]]
        return weights

    def _router_weights(self, forward: ForwardContext) -> Tensor:
        """(B, S, 2) or (2,)."""
        assert self.router is not None
        sums = forward.layer(self.index).get((self, "sums"))
        if sums is None and not isinstance(self.router, ConstantRouter):
            raise AlulaError(
                f"the graft {self.graft_name!r} routes by attention, but the decoder's attention implementation was "
                f"changed to {forward.seam.anatomy.config._attn_implementation!r} while it is attached",
                remedy='set it to "eager", or detach the graft before changing it',
            )
        return self.router(sums)

    def _plan_keys(self, forward: ForwardContext) -> Plan:
        """Order and keys, found once per forward and shared by all layers."""
        name = ("wings keys", *self._shared)
        if name not in forward.memo:
            forward.memo[name] = plan_keys(forward, self.config)
        return forward.memo[name]

    @property
    def _shared(self) -> tuple[Any, ...]:
        """The settings on which depends what layers share."""
        config = self.config
        return config.gate, config.system_keys, config.normalize, config.learners, config.cache

    def _must_take_part(self) -> bool:
        """Whether silent parameters must: sharded training deadlocks when ranks disagree on gradients."""
        return self.training and torch.is_grad_enabled() and torch.distributed.is_initialized()

    @staticmethod
    def _silence(module: nn.Module) -> Tensor:
        """A zero in which every trainable parameter of ``module`` has a part."""
        return torch.stack([p.sum() * 0.0 for p in module.parameters() if p.requires_grad] or [torch.zeros(())]).sum()
