"""What a forward's end and its labels should not be when image tokens are taken out of later layers."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.seam import ForwardContext

logger = logging.getLogger(__name__)
_IGNORED = -100


def check_endings(ctx: ForwardContext, leaving: Tensor) -> None:
    """Look at where the new tokens of a forward end, and where its labels stand, before some of them leave.

    Warns once per process of a prompt that ends in a token that leaves: what is said next is predicted from it. Reads
    the device once.

    Args:
        leaving: (B, S) bool of the tokens that later layers will not have.

    Raises:
        UsageError: without a cache, all tokens of a prompt would leave (behind one, text may follow: a piece of a
            prompt may be all image); or a label is to be predicted from a token that leaves.
    """
    tokens = ctx.tokens
    found = [leaving & (tokens.position == tokens.position.amax(dim=1, keepdim=True))]
    if ctx.labels is not None:
        labeled = torch.nn.functional.pad(ctx.labels.to(tokens.device)[:, 1:] != _IGNORED, (0, 1))
        found.append(leaving & labeled)
    if not ctx.is_caching:
        found.append(leaving.any(dim=1, keepdim=True) & ~(tokens.valid & ~leaving).any(dim=1, keepdim=True))
    read = [each.any(dim=1) for each in found]
    ends, *others = (torch.stack(read) if len(read) > 1 else read[0][None]).tolist()
    if not ctx.is_caching and any(alone := others.pop()):
        raise UsageError(
            f"prompt {alone.index(True)} has images and no text: all its tokens would be taken out",
            remedy="put text behind the image",
        )
    if others and any(asked := others.pop()):
        raise UsageError(
            f"sample {asked.index(True)} has a label right behind a token of an image: it would be predicted from that "
            "token, which is taken out of later layers",
            remedy=f"set these labels to {_IGNORED}, or put text between the image and what is learned",
        )
    if any(ends):
        tell_ending()


@functools.cache
def tell_ending() -> None:
    """Warn, once per process, of a prompt that ends in an image."""
    logger.warning(
        "a prompt ends in an image under a policy that takes image tokens out of later layers: its next word is "
        "predicted from a state that these layers have not seen. Put text behind the image (pieces of a prompt may end "
        "so)."
    )
