"""Keys and value factors of the learners, for many queries: made of their tokens, kept in the cache, found there again.

What is kept of a token is in two forms (`WingsConfig.cache`): the factors of its key and value, or its key, raised and
rotated, and the factors of its value.

Shapes: B batch, S new tokens, P cached tokens, K key tokens of one learner, d stream width, H heads, D their width, r
rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alula.grafts.wings.keys import Plan, PlanAngles, prepared
from alula.grafts.wings.rope import rotate
from alula.seam import ForwardContext

if TYPE_CHECKING:
    from alula.grafts.wings.layer import WingsLayer


def keys_and_factors(
    layer: WingsLayer, forward: ForwardContext, plan: Plan, angles: PlanAngles | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, H, K, D) keys, ready to be asked, and (B, K, r) value factors of every learner.

    Without gradients they, or what they are made of, are kept where there is a cache.
    """
    if plan.order is None and not torch.is_grad_enabled():
        return _recalled(layer, forward, plan, angles)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    keys: dict[str, Tensor] = {}
    for name, each in plan.keys.items():
        learner: Any = layer.get_submodule(name)
        factors[name] = learner.factors(each.tokens).chunk(2, dim=-1)
        keys[name] = learner.expand_keys(each.tokens, factors[name][0], None if angles is None else angles.keys[name])
    if forward.keeps and not torch.is_grad_enabled():
        whole = layer.config.cache == "keys"
        kept = {name: keys[name].transpose(1, 2) if whole else factors[name][0][:, :, None] for name in keys}
        values = {name: factors[name][1][:, :, None] for name in keys}
        forward.keep(layer.graft_name, layer.index, plan.as_tokens(kept), plan.as_tokens(values))
    return {name: (keys[name], factors[name][1]) for name in keys}


def _recalled(
    layer: WingsLayer, forward: ForwardContext, plan: Plan, angles: PlanAngles | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Behind a cache: new tokens are added to what it holds, and each learner takes its own out of all."""
    place = layer.graft_name, layer.index
    learners: dict[str, Any] = {name: layer.get_submodule(name) for name in layer.config.learners}
    # tokens the graft kept nothing of, e.g. because it was silent, are made anew
    new_only = forward.is_kept(*place)
    assert forward.inputs is not None, "the first decoder layer has not been entered"
    tokens = prepared(forward.inputs if new_only else forward.all_inputs(), layer.config)
    made = _by_owner(forward, [learner.factors(tokens) for learner in learners.values()])
    key_factors, value_factors = made.chunk(2, dim=-1)
    known = {}
    if layer.config.cache == "factors":
        of_keys, of_values = forward.keep(*place, key_factors[:, None], value_factors[:, None])
        for name, each in plan.keys.items():
            turned = None if angles is None else angles.keys[name]
            keys = learners[name].expand_keys(each.tokens, plan.pick(name, of_keys[:, 0]), turned)
            known[name] = keys, plan.pick(name, of_values[:, 0])
        return known
    raised = tokens + _by_owner(forward, [learner.k.apply_up(key_factors) for learner in learners.values()])
    new = next(iter(learners.values())).heads(raised)
    if angles is not None:
        new = rotate(new, angles.last(tokens.shape[1]))
    of_keys, of_values = forward.keep(*place, new, value_factors[:, None])
    for name in plan.keys:
        keys = plan.pick(name, of_keys.transpose(1, 2)).transpose(1, 2)
        known[name] = keys, plan.pick(name, of_values[:, 0])
    return known


def _by_owner(forward: ForwardContext, each: list[Tensor]) -> Tensor:
    """(B, tokens, C) of the last tokens, each from the learner whose key it is."""
    if len(each) == 1:
        return each[0]
    visual, textual = each
    name = ("wings perceptual", visual.shape[1])
    if name not in forward.memo:  # the same in all layers
        forward.memo[name] = forward.all_tokens.last(visual.shape[1]).is_perceptual[..., None]
    return torch.where(forward.memo[name], visual, textual)
