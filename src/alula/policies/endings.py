"""What a forward's end and its labels should not be when image tokens are taken out of later layers."""

from __future__ import annotations

import functools
import logging

import numpy as np
from numpy.typing import NDArray

from alula.errors import UsageError
from alula.seam import ForwardContext

logger = logging.getLogger(__name__)
_IGNORED = -100


def check_endings(ctx: ForwardContext, leaving: NDArray[np.bool_]) -> None:
    """Look at where the new tokens of a forward end, and where its labels stand, before some of them leave.

    Warns once per process of a prompt that ends in a token that leaves: what is said next is predicted from it. Reads
    the device where there are labels.

    Args:
        leaving: (B, S) of the tokens that later layers will not have, none of them padding.

    Raises:
        UsageError: without a cache, all tokens of a prompt would leave (behind one, text may follow: a piece of a
            prompt may be all image); or a label is to be predicted from a token that leaves.
    """
    valid = ctx.known_new.valid
    if not ctx.is_caching:
        alone = leaving.any(axis=1) & ~(valid & ~leaving).any(axis=1)
        if alone.any():
            raise UsageError(
                f"prompt {alone.argmax()} has images and no text: all its tokens would be taken out",
                remedy="put text behind the image",
            )
    if ctx.labels is not None:
        asked = (leaving[:, :-1] & (ctx.labels[:, 1:] != _IGNORED).cpu().numpy()).any(axis=1)
        if asked.any():
            raise UsageError(
                f"sample {asked.argmax()} has a label right behind a token of an image: it would be predicted from "
                "that token, which is taken out of later layers",
                remedy=f"set these labels to {_IGNORED}, or put text between the image and what is learned",
            )
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(axis=1)
    if leaving[np.arange(len(last)), last].any():
        tell_ending()


@functools.cache
def tell_ending() -> None:
    """Warn, once per process, of a prompt that ends in an image."""
    logger.warning(
        "a prompt ends in an image under a policy that takes image tokens out of later layers: its next word is "
        "predicted from a state that these layers have not seen. Put text behind the image (pieces of a prompt may end "
        "so)."
    )
