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
  judged by the wrong column of the padding mask; the visual learner attends to a blank image in samples without one,
  at weight 1 (2 where the whole batch is text of at least an image's length).

In evaluation every sample is computed as the released code computes it alone, so results do not depend on the batch.
Because earlier tokens see later ones, generation with an image cannot use a cache; it is refused with that reason.

Shapes: B batch, S tokens, K key tokens of one learner, d stream width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import AlulaError, HostError, UsageError
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.learners import Angles, Engine, LayerLearners, LoRRA, first_tokens, pick_tokens, rotate
from alula.seam import ForwardContext
from alula.tokens import UNKNOWN, TokenMap


@dataclass(frozen=True)
class PublishedKeys:
    """Keys of one learner: (B, K, d) tokens, the (B, K) columns whose angles they carry, (B, 1, S, K) additive mask."""

    tokens: Tensor
    columns: Tensor
    mask: Tensor | None


@dataclass(eq=False)
class PublishedEngine(Engine):
    """Learners in the released arithmetic; what one forward does, the same in all layers.

    Attributes:
        visual, textual: keys; None where that learner is inactive throughout the batch.
        factor: (B, 1, 2) on the routed weights.
        routed: (B, 1, 1) bool; elsewhere the textual learner has weight 1. None when no sample is routed.
    """

    visual: PublishedKeys | None
    textual: PublishedKeys | None
    factor: Tensor
    routed: Tensor | None

    @classmethod
    def plan(cls, ctx: ForwardContext, config: WingsConfig, *, training: bool) -> PublishedEngine:
        """The engine of a forward.

        Raises:
            AlulaError: the released code does not compute this, or computes it by accident.
        """
        _check(ctx.all_tokens, ctx, training)
        return _plan_batch(ctx, config) if training else _plan_samples(ctx, config)

    def prepare(self, learners: LayerLearners, ctx: ForwardContext) -> None:
        if self.routed is not None:
            super().prepare(learners, ctx)

    def key_values(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        return None if self.routed is None else super().key_values(learners, ctx)

    def attend(
        self, learners: LayerLearners, ctx: ForwardContext, query: Tensor, branch: Tensor | None = None
    ) -> Tensor | None:
        weights = self.factor
        if self.routed is not None and (routed := learners.router_weights(ctx)) is not None:
            weights = torch.where(self.routed, routed * self.factor, self.factor)
        tables = ctx.all_rope(learners.layer_type)
        total = branch
        for index, (name, keys) in enumerate((("visual", self.visual), ("textual", self.textual))):
            if keys is not None:
                output = _attend(learners.learner(name), query, keys, tables)
                output = output * weights[..., index : index + 1].to(output.dtype)
                total = output if total is None else total + output
        return total


def _plan_samples(ctx: ForwardContext, config: WingsConfig) -> PublishedEngine:
    """For evaluation: every sample as if alone."""
    every, new = ctx.all_tokens, ctx.tokens
    inputs = ctx.all_inputs()
    sees = torch.tensor(ctx.has_media, device=inputs.device)[:, None, None]
    visual = textual = None
    if ctx.any_media:
        index, real = first_tokens(every.is_perceptual)
        visual = PublishedKeys(pick_tokens(inputs, index), index, _additive(real[:, None, :], inputs.dtype))
    if "textual" in config.learners:
        chosen = every.is_text & ~(sees[:, 0] & (every.position < config.system_tokens))
        index, real = first_tokens(chosen)
        count = torch.arange(index.shape[1], device=index.device)
        legal = real[:, None, :] & (count <= new.position[:, :, None])
        textual = PublishedKeys(pick_tokens(inputs, index), index, _additive(legal, inputs.dtype))
    double = 2.0 if len(config.learners) == 2 else 1.0
    visual_factor = torch.where(sees, double, 0.0)
    textual_factor = torch.where(sees, double, 1.0)
    routed = sees if double == 2.0 and ctx.any_media else None
    return PublishedEngine(visual, textual, torch.cat([visual_factor, textual_factor], dim=-1), routed)


def _plan_batch(ctx: ForwardContext, config: WingsConfig) -> PublishedEngine:
    """For training: the batch as one computation."""
    tokens, inputs = ctx.tokens, ctx.all_inputs()
    length = tokens.shape[1]
    sees = torch.tensor(ctx.has_media, device=inputs.device)
    inputs = inputs * tokens.valid[..., None].to(inputs.dtype)
    column = torch.arange(length, device=inputs.device)
    two = len(config.learners) == 2

    index, real = first_tokens(tokens.is_perceptual)
    visual = PublishedKeys(pick_tokens(inputs, index), index, None)
    shortened = False
    if two and not all(ctx.has_media):
        blank = _blank_image(ctx.anatomy, inputs)
        shortened = length < blank.shape[1]
        blank = blank[:, :length]
        size = blank.shape[1]
        if not ctx.any_media:
            index, keys = column[None, :size], blank
        else:
            index = torch.where(sees[:, None], index, column[:size])
            keys = torch.where(sees[:, None, None], visual.tokens, blank)
        shape = (tokens.shape[0], size)
        visual = PublishedKeys(keys.expand(*shape, -1), index.expand(*shape), None)

    textual = None
    if two:
        chosen = ~(sees[:, None] & (tokens.is_perceptual | (column < config.system_tokens)))
        index, real = first_tokens(chosen)
        counts = chosen.sum(dim=1, keepdim=True)
        last = (counts - 1).clamp(min=0)
        index = torch.where(real, index, index.gather(1, last))
        keys_at = torch.arange(index.shape[1], device=index.device)
        # column k of the batch's own causal and padding mask stands for key k, wherever key k came from
        legal = (keys_at <= column[:, None])[None] & tokens.valid[:, None, : index.shape[1]]
        blinded = column[None, :] >= length - (index.shape[1] - counts)
        textual = PublishedKeys(pick_tokens(inputs, index), index, _additive(legal & ~blinded[..., None], inputs.dtype))

    mixed_batch = ctx.any_media and not all(ctx.has_media)
    single = shortened | (mixed_batch & ~sees) if two else torch.ones_like(sees)
    visual_factor = torch.where(single, 1.0, 2.0)
    if not two:
        visual_factor = visual_factor * sees
    factor = torch.stack([visual_factor, torch.full_like(visual_factor, 2.0)], dim=-1)[:, None]
    routed = torch.ones_like(sees)[:, None, None] if two else None
    return PublishedEngine(visual, textual, factor, routed)


def _check(tokens: TokenMap, ctx: ForwardContext, training: bool) -> None:
    """Refuse what the released code does not compute, or computes by accident.

    Raises:
        AlulaError: a cache with an image, several images, an image in front, left padding in training.
    """
    if ctx.any_media:
        if ctx.past_tokens is not None:
            raise AlulaError(
                "released Wings weights cannot continue a cache once there is an image: in the released arithmetic "
                "earlier tokens attend to later ones, so every token changes what was cached",
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
        if ctx.past_tokens is not None or bool((tokens.valid & (tokens.position != column)).any()):
            raise UsageError(
                "the released Wings training needs padding on the right and no cache", remedy='padding_side="right"'
            )


def _additive(legal: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, K) mask of 0 and the dtype's lowest: a query with no legal key then attends to all keys alike."""
    return torch.where(legal, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def _attend(learner: LoRRA, query: Tensor, keys: PublishedKeys, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """(B, S, d) output of a learner."""
    q = learner.heads(query + learner.q(query))
    k, v = (learner.heads(keys.tokens + part(keys.tokens)) for part in (learner.k, learner.v))
    if tables is not None:
        new = query.shape[1]
        q = rotate(q, Angles.of(tables[0][:, -new:], tables[1][:, -new:], q.dtype))
        k = rotate(k, Angles.of(pick_tokens(tables[0], keys.columns), pick_tokens(tables[1], keys.columns), k.dtype))
    dropout = learner.dropout if learner.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys.mask, dropout_p=dropout, scale=learner.head_dim**-0.5)
    return learner.o(out.transpose(1, 2).flatten(2))


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
