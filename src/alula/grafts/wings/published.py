"""The arithmetic of the released Wings code, for released weights and for nothing else (`compat="published"`).

The released code computes something other than the paper's equations. Weights trained with it need it, so it is
reproduced here, apart from the method proper. What differs:

- The mixed learners join the stream twice: a coefficient of 2 on either routed weight. Text without an image is
  answered with the textual learner at weight 1, un-routed; there is no visual learner then.
- The router sums attention over heads, adds a bias and applies SiLU before its softmax.
- Every query sees every image key, also queries before the image.
- The k-th textual key is open to the k-th query and all later ones, whatever position the key came from. In a sample
  with an image, whose system prompt and image tokens are no textual keys, queries thereby see text tokens *behind*
  them.
- In training, a batch is one computation: textual key lists are filled up to the longest with copies of their last
  key, and as many of the last queries are blinded, attending to all keys alike; padding tokens are keys of value 0,
  judged by the wrong column of the padding mask; samples without an image hear the visual learner on a blank image at
  weight 1 (2 where the whole batch is text of at least an image's length).

In evaluation every sample is computed as the released code computes it alone, so results do not depend on the batch.
Because earlier tokens see later ones, generation with an image cannot use a cache; it is refused with that reason.

Shapes: B batch, S tokens, K key tokens of one learner, d stream width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import AlulaError, HostError, UsageError
from alula.grafts.wings.layer import WingsLayer
from alula.grafts.wings.lorra import LoRRA
from alula.grafts.wings.order import first_tokens, pick_tokens
from alula.grafts.wings.rope import Angles, rotate
from alula.grafts.wings.router import AttentionRouter, Router
from alula.seam import ForwardContext
from alula.tokens import UNKNOWN, TokenMap

_PLAN = "wings published plan"


class PublishedRouter(AttentionRouter):
    """Softmax over SiLU of a weight per absolute key position, summed with the attention of all heads, plus a bias."""

    def forward(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        return torch.softmax(F.silu(sums.float().sum(dim=2) + self.bias.float()), dim=-1)


@dataclass(frozen=True)
class _Keys:
    """Keys of one learner: (B, K, d) tokens, the (B, K) columns whose angles they carry, (B, 1, S, K) additive mask."""

    tokens: Tensor
    columns: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What one forward does, the same in all layers.

    Attributes:
        visual, textual: keys; None where that learner is silent throughout the batch.
        factor: (B, 1, 2) on the routed weights.
        routed: (B, 1, 1) bool; elsewhere the textual learner has weight 1. None when no sample is routed.
    """

    visual: _Keys | None
    textual: _Keys | None
    factor: Tensor
    routed: Tensor | None


class PublishedLayer(WingsLayer):
    """Learners and router of one layer, in the released arithmetic."""

    def _build_router(self, heads: int, place: dict[str, Any]) -> Router:
        return PublishedRouter(self.config.router_tokens, **place)

    def key_values(self, forward: ForwardContext, layer: int) -> Tensor | None:
        plan = self._plan(forward) if self._speaks(forward) else None
        return None if plan is None or plan.routed is None else super().key_values(forward, layer)

    def _prepare(self, forward: ForwardContext) -> None:
        self._plan(forward)

    def _mix(self, forward: ForwardContext, query: Tensor) -> Tensor | None:
        plan = self._plan(forward)
        weights = plan.factor
        if plan.routed is not None and self.router is not None:
            routed = self._router_weights(forward) * plan.factor
            weights = torch.where(plan.routed, routed, plan.factor)
        tables = forward.all_rope(self.layer_type)
        mixed = None
        for i, (learner, keys) in enumerate((("visual", plan.visual), ("textual", plan.textual))):
            if keys is not None:
                voice = _attend(self.get_submodule(learner), query, keys, tables)
                voice = voice * weights[..., i : i + 1].to(voice.dtype)
                mixed = voice if mixed is None else mixed + voice
        return mixed

    def _plan(self, forward: ForwardContext) -> _Plan:
        key = (_PLAN, self.graft_name)
        if key not in forward.memo:
            _check(forward.all_tokens, forward, self.training)
            make = self._plan_batch if self.training else self._plan_samples
            forward.memo[key] = make(forward)
        return forward.memo[key]

    # -- evaluation: every sample as if alone -----------------------------------------------------------------------

    def _plan_samples(self, forward: ForwardContext) -> _Plan:
        every, new = forward.all_tokens, forward.tokens
        inputs = forward.all_inputs()
        sees = torch.tensor(forward.seeing, device=inputs.device)[:, None, None]
        visual = textual = None
        if forward.has_perceptual:
            index, real = first_tokens(every.is_perceptual)
            visual = _Keys(pick_tokens(inputs, index), index, _additive(real[:, None, :], inputs.dtype))
        if "textual" in self.config.learners:
            chosen = every.is_text & ~(sees[:, 0] & (every.position < self.config.system_tokens))
            index, real = first_tokens(chosen)
            count = torch.arange(index.shape[1], device=index.device)
            legal = real[:, None, :] & (count <= new.position[:, :, None])
            textual = _Keys(pick_tokens(inputs, index), index, _additive(legal, inputs.dtype))
        double = 2.0 if len(self.config.learners) == 2 else 1.0
        visual_factor = torch.where(sees, double, 0.0)
        textual_factor = torch.where(sees, double, 1.0)
        routed = sees if double == 2.0 and forward.has_perceptual else None
        return _Plan(visual, textual, torch.cat([visual_factor, textual_factor], dim=-1), routed)

    # -- training: the batch as one computation ---------------------------------------------------------------------

    def _plan_batch(self, forward: ForwardContext) -> _Plan:
        tokens, inputs = forward.tokens, forward.all_inputs()
        length = tokens.shape[1]
        sees = torch.tensor(forward.seeing, device=inputs.device)
        inputs = inputs * tokens.valid[..., None].to(inputs.dtype)
        column = torch.arange(length, device=inputs.device)
        two = len(self.config.learners) == 2

        index, real = first_tokens(tokens.is_perceptual)
        visual = _Keys(pick_tokens(inputs, index), index, None)
        shortened = False
        if two and not all(forward.seeing):
            blank = _blank_image(self._anatomy(forward), inputs)
            shortened = length < blank.shape[1]
            blank = blank[:, :length]
            size = blank.shape[1]
            if not forward.has_perceptual:
                index, keys = column[None, :size], blank
            else:
                index = torch.where(sees[:, None], index, column[:size])
                keys = torch.where(sees[:, None, None], visual.tokens, blank)
            shape = (tokens.shape[0], size)
            visual = _Keys(keys.expand(*shape, -1), index.expand(*shape), None)

        textual = None
        if two:
            chosen = ~(sees[:, None] & (tokens.is_perceptual | (column < self.config.system_tokens)))
            index, real = first_tokens(chosen)
            counts = chosen.sum(dim=1, keepdim=True)
            last = (counts - 1).clamp(min=0)
            index = torch.where(real, index, index.gather(1, last))
            keys_at = torch.arange(index.shape[1], device=index.device)
            # column k of the batch's own causal and padding mask stands for key k, wherever key k came from
            legal = (keys_at <= column[:, None])[None] & tokens.valid[:, None, : index.shape[1]]
            blinded = column[None, :] >= length - (index.shape[1] - counts)
            textual = _Keys(pick_tokens(inputs, index), index, _additive(legal & ~blinded[..., None], inputs.dtype))

        mixed_batch = forward.has_perceptual and not all(forward.seeing)
        single = shortened | (mixed_batch & ~sees) if two else torch.ones_like(sees)
        visual_factor = torch.where(single, 1.0, 2.0)
        if not two:
            visual_factor = visual_factor * sees
        factor = torch.stack([visual_factor, torch.full_like(visual_factor, 2.0)], dim=-1)[:, None]
        routed = torch.ones_like(sees)[:, None, None] if two else None
        return _Plan(visual, textual, factor, routed)

    def _anatomy(self, forward: ForwardContext) -> Anatomy:
        return forward.seam.anatomy


def _check(tokens: TokenMap, forward: ForwardContext, training: bool) -> None:
    """Refuse what the released code does not compute, or computes by accident.

    Raises:
        AlulaError: a cache with an image, several images, an image in front, left padding in training.
    """
    if forward.has_perceptual:
        if forward.past_tokens is not None:
            raise AlulaError(
                "released Wings weights cannot continue a cache once there is an image: in the released arithmetic "
                "earlier tokens hear later ones, so every token changes what was cached",
                remedy="generate(..., use_cache=False), which recomputes as the released code does",
            )
        if int(tokens.item.min()) == UNKNOWN:
            raise UsageError(
                "released Wings weights take one image per sample, and how many stand here cannot be told",
                remedy="say it: pass token_map=TokenMap.from_input_ids(..., tokens_per_item=[...]) to the forward",
            )
        if int(tokens.item.max()) > 0:
            raise UsageError(
                "released Wings weights take one image per sample",
                remedy='train a graft without compat="published" for several images',
            )
        if bool((tokens.is_perceptual & (tokens.position == 0)).any()):
            raise UsageError(
                "the released Wings code takes an image at the very start for no image at all",
                remedy="put text, such as a system prompt, before the image",
            )
    if training:
        column = torch.arange(tokens.shape[1], device=tokens.device)
        if forward.past_tokens is not None or bool((tokens.valid & (tokens.position != column)).any()):
            raise UsageError(
                "the released Wings training needs padding on the right and no cache", remedy='padding_side="right"'
            )


def _additive(legal: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, K) mask of 0 and the dtype's lowest: a query with no legal key then attends to all keys alike."""
    return torch.where(legal, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _attend(learner: Any, query: Tensor, keys: _Keys, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """(B, S, d) output of a learner."""
    module: LoRRA = learner
    q, k, v = query + module.q(query), keys.tokens + module.k(keys.tokens), keys.tokens + module.v(keys.tokens)
    q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (q, k, v))
    if tables is not None:
        new = query.shape[1]
        q = rotate(q, Angles.of(tables[0][:, -new:], tables[1][:, -new:], q.dtype))
        k = rotate(k, Angles.of(pick_tokens(tables[0], keys.columns), pick_tokens(tables[1], keys.columns), k.dtype))
    dropout = module.dropout if module.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys.mask, dropout_p=dropout, scale=module.head_dim**-0.5)
    return module.o(out.transpose(1, 2).flatten(2))


def _blank_image(anatomy: Anatomy, like: Tensor) -> Tensor:
    """(1, tokens, d) features of an all-zero image, which the released training hands to samples without one."""
    host = anatomy.host
    if anatomy.tower is None or not hasattr(host, "get_image_features"):
        raise HostError(
            "the released Wings training computes text samples with a blank image, and this host has no tower",
            remedy="train on a LLaVA host, or use the graft in eval mode",
        )
    size = host.config.vision_config.image_size
    pixels = torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype)
    features = host.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return torch.stack(list(features)).to(like)
