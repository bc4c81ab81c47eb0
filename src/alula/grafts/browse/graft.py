"""Browse and concentrate (Wang et al., 2024, "Browse and Concentrate", arXiv 2402.12195) for decoder hosts.

The decoder reads all images and words once and what it holds at the end of the prompt, the condition C, is told to the
connector, which then encodes every image again:

    browse:       e = [text ; connector(Z_i)],       C = decoder(e) at the prompt's last token      (without gradients)
    concentrate:  e' = [text ; connector(Z_i, W_c C)],    answer = decoder(e')

with Z_i the tower's features of image i, which are computed once. W_c C is added to the queries where the connector has
queries, as published, and else to its hidden layer before the activation (a choice: published connectors all have
queries; behind the activation it would move every token by one and the same vector). W_c starts at zero (a choice), so
that a fresh graft is the host.

C is the state behind the decoder's last norm, at the last token of the prompt: the published encoder's state at </s>
has no other counterpart in a decoder. Browsing reads the decoder as it is, with what else is attached to it.

Shapes: B samples, S new tokens, D the decoder's width; N images, T tokens of an image, w the width of what is added.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.browse.config import BrowseConfig
from alula.grafts.browse.reading import at_ends, prompt_ends
from alula.grafts.linears import trained_like
from alula.seam import ForwardContext, LayerView, Phase, Point, Read, Seam, Seen
from alula.seam.connectors import conditioned, conditioned_connector, shift_width
from alula.tokens import CONDITIONS, PROMPT_ENDS, Modality


class Condition(nn.Module):
    """W_c, which starts as nothing: (N, D) conditions -> (N, w).

    Args:
        width: D.
        out: w.
        bias: it has one.
        like: a tensor whose dtype and device its weights take.
    """

    def __init__(self, width: int, out: int, bias: bool, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.weight = nn.Parameter(torch.zeros(out, width, **place))
        self.bias = nn.Parameter(torch.zeros(out, **place)) if bias else None

    def forward(self, conditions: Tensor) -> Tensor:
        return nn.functional.linear(conditions.to(self.weight.dtype), self.weight, self.bias)


class BrowseGraft(Graft):
    """Browse-and-concentrate attached to a host.

    Forwards that bring images browse first, unless they are told ``conditions``, (B, D): conditions that were computed
    before (`read_conditions`), a row of zeros for "none". ``prompt_ends``, (B,) int64, says where prompts end among the
    new tokens; without it that is before the first token with a label, or at the last token that is no padding.
    """

    config: BrowseConfig
    further_inputs = (CONDITIONS, PROMPT_ENDS)

    @property
    def leaves_text(self) -> bool:
        return True

    def __init__(self, seam: Seam, name: str, config: BrowseConfig) -> None:
        super().__init__(seam, name, config)
        conditioned_connector(seam.anatomy)  # refuses before anything is put on the host

    def grow(self, indices: list[int]) -> None:
        anatomy = self.seam.anatomy
        connector: Any = conditioned_connector(anatomy)
        like = trained_like(connector, connector, where="browse: the connector")
        self.grow_whole(Condition(anatomy.hidden_size, shift_width(connector), self.config.bias, like))
        self.hold(self.seam.request_embeddings(self))
        self.hold(self.seam.on(Point.BLOCK_INPUT, 0, self._taking_part, phase=Phase.EDIT, owner=self.name))

    def build_layer(self, index: int) -> nn.Module:
        raise NotImplementedError("it has no part in single layers")

    def place(self, index: int, module: Any) -> None:
        raise NotImplementedError("it has no part in single layers")

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {"browse.condition": list(self.parameters())}

    def _taking_part(self, view: LayerView, hidden: Tensor) -> Tensor | None:
        """A batch without images gives the map a gradient of zero, where other processes' batches give it one."""
        is_silent = not view.ctx.new_media and self.seam.anatomy.decoder.training and torch.is_grad_enabled()
        if not is_silent or not torch.distributed.is_initialized():
            return None
        zero = torch.stack([parameter.reshape(-1)[0] for parameter in self.parameters()]).sum() * 0.0
        return hidden + zero.to(hidden.dtype)

    def rewritten(self, ctx: ForwardContext, embeds: Tensor, seen: Seen | None, read: Read) -> Tensor | None:
        """The decoder's inputs with every image encoded again; see `alula.seam.Rewriter`."""
        if ctx.is_disabled(self.name):
            return None
        is_image = ctx.tokens.modality == int(Modality.IMAGE)
        if seen is None:
            if not bool(is_image.any()):  # waits for the device, where other media came before any image
                return None
            raise UsageError(
                "images came that the connector was not seen to encode, and cannot be encoded again",
                where=self.name,
                remedy="pass pixel_values; where PEFT replaced the connector (modules_to_save), train the "
                "connector itself",
            )
        found = _images(is_image, embeds, seen)
        if found is None:
            return None
        features, of_image = found
        conditions = self._conditions(ctx, embeds, seen, read)
        shift = cast(nn.Module, self.whole)(conditions)[of_image].to(features.dtype)
        tokens = conditioned(conditioned_connector(self.seam.anatomy), features, shift)
        return embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))

    def _conditions(self, ctx: ForwardContext, embeds: Tensor, seen: Seen, read: Read) -> Tensor:
        """(B, D) those that were given, or were read for the prompt that this forward goes on with, or are read now."""
        given = ctx.given.get(CONDITIONS)
        if given is not None:
            width = self.seam.anatomy.hidden_size
            if given.shape[1:] != (width,):
                raise UsageError(
                    f"conditions of the shape {tuple(given.shape)}, where the decoder is {width} wide",
                    where=self.name,
                    remedy="compute them by a browser of the same decoder (alula browse)",
                )
            return given.to(embeds.device)
        is_kept = not seen.is_new and not ctx.is_caching and ctx.labels is None and PROMPT_ENDS not in ctx.given
        before = seen.memo.get(self.owner_id) if is_kept else None
        if before is not None:
            prompt, conditions, last = before
            length = prompt.shape[1]
            # generation goes on by one token; what is longer by more is another prompt about the same images
            goes_on = embeds.shape[1] in (last, last + 1) and torch.equal(embeds[:, :length], prompt)
            if goes_on:
                seen.memo[self.owner_id] = prompt, conditions, embeds.shape[1]
                return conditions
        if seen.is_piece:
            raise UsageError(
                "the prompt comes in pieces, and has to be read to its end before its images are encoded",
                where=self.name,
                remedy=f"generate without prefill_chunk_size, or pass {CONDITIONS} (alula.grafts.read_conditions)",
            )
        conditions = at_ends(read(), self._ends(ctx, embeds))
        if is_kept:
            # generation without a cache comes again with more tokens
            seen.memo[self.owner_id] = embeds, conditions, embeds.shape[1]
        return conditions

    def _ends(self, ctx: ForwardContext, embeds: Tensor) -> Tensor:
        """(B,) of the new tokens, the last of each prompt."""
        given = ctx.given.get(PROMPT_ENDS)
        if given is not None:
            return given.to(embeds.device)
        if ctx.labels is None and self.seam.anatomy.decoder.training and torch.is_grad_enabled():
            raise UsageError(
                "nothing says where prompts end, and answers would be read before they are learnt",
                where=self.name,
                remedy=f"pass {PROMPT_ENDS}, (B,) the index of each prompt's last token; or labels, or {CONDITIONS}",
            )
        labels = None if ctx.labels is None else ctx.labels.to(embeds.device)
        return prompt_ends(ctx.tokens.valid, labels)


def _images(is_image: Tensor, embeds: Tensor, seen: Seen) -> tuple[Tensor, Tensor] | None:
    """The features of a forward's images in order, and (N,) the sample that each belongs to; None where it brings other
    media and no images.

    Args:
        is_image: (B, S) bool.
        embeds: (B, S, D) the decoder's inputs.
        seen: what the connector did last.

    Raises:
        UsageError: it did so before this forward began (`generate`), and for other images.
    """
    images, length = seen.tokens.shape[:2]
    counts = is_image.sum(dim=1) // length
    samples = torch.arange(len(counts), device=counts.device)
    if seen.is_new:
        return seen.features, samples.repeat_interleave(counts, output_size=images)
    there = int(is_image.sum())  # waits for the device, once per prompt: are these the images, and how often?
    if not there:
        return None
    repeats = there // (images * length)
    if repeats and repeats * images * length == there and len(counts) % repeats == 0:
        of_image = samples.repeat_interleave(counts, output_size=images * repeats)
        sources = _sources(counts, of_image, repeats)
        if torch.equal(embeds[is_image], seen.tokens[sources].flatten(0, 1).to(embeds.dtype)):
            return seen.features[sources], of_image
    raise UsageError(
        "these images were encoded before others, whose features are the only ones known now",
        where="browse",
        remedy="pass pixel_values, or encode images right before the forward they are for; and prompts in one piece "
        "(no prefill_chunk_size)",
    )


def _sources(counts: Tensor, of_image: Tensor, repeats: int) -> Tensor:
    """(N,) which of the encoded images each one is, where beams of a prompt stand side by side, each with all of its
    images.

    Args:
        counts: (B,) images of each sample.
        of_image: (N,) the sample of each image.
        repeats: beams per prompt.
    """
    once = counts[::repeats]
    first, first_of_copy = once.cumsum(0) - once, counts.cumsum(0) - counts
    within = torch.arange(len(of_image), device=counts.device) - first_of_copy[of_image]
    return first[of_image // repeats] + within
