"""Contrast between captions and images of a batch: InfoNCE, over all processes.

Shapes: R captions of this process, T of all, r width of the space.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from alula.grafts.mks2.retrieval import CaptionPairs


def info_nce(pairs: CaptionPairs, *, bidirectional: bool) -> Tensor:
    """(), float32: the sum over captions of -log softmax of their cosines with the images of all, at their own.

    Negatives are gathered over processes. Every process computes the loss of all captions, whose gradients reach its
    own captions and images only: added up over processes they are those of one big batch. Its value is this process's
    share of the whole. Of captions of one image each is compared with its own and those of other images.

    Args:
        pairs: of a forward; samples that are no captions count for nothing.
        bidirectional: the mean of this and of the same from images to captions.
    """
    (captions, images, item, scale), world = pairs, 1
    if distributed.is_available() and distributed.is_initialized():
        world = distributed.get_world_size()
    if world > 1:
        captions, images, item = _gathered(captions, images, item, world)
        scale = scale.detach() + (scale - scale.detach()) / world  # its gradient is whole on every process
    is_caption = item >= 0
    own = torch.eye(len(item), dtype=torch.bool, device=item.device)
    compared = (is_caption[None, :] & is_caption[:, None] & (item[None, :] != item[:, None])) | own
    logits = (scale * captions @ images.T).masked_fill(~compared, -torch.inf)
    losses = -F.log_softmax(logits, dim=1).diagonal()
    if bidirectional:
        losses = (losses - F.log_softmax(logits, dim=0).diagonal()) / 2
    whole = (losses * is_caption).sum()
    return whole if world == 1 else whole.detach() / world + (whole - whole.detach())


def _gathered(captions: Tensor, images: Tensor, item: Tensor, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, r), (T, r) and (T,) of all processes, in their order; those of this one with gradients."""
    rank = distributed.get_rank()
    counts = [torch.zeros(1, dtype=torch.int64, device=item.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(item)], device=item.device))
    sizes = [int(count) for count in counts]
    most = max(sizes)
    item = torch.where(item < 0, item, item * world + rank)  # numbers of images are each process's own
    mine = torch.cat([captions, images, item[:, None].to(captions.dtype)], dim=1)
    padded = F.pad(mine.detach(), (0, 0, 0, most - len(mine)))
    found = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(found, padded)
    blocks = [block[:size] for block, size in zip(found, sizes, strict=True)]
    blocks[rank] = mine
    every = torch.cat(blocks)
    width = captions.shape[1]
    return every[:, :width], every[:, width : 2 * width], every[:, -1].detach().round().to(torch.int64)
