"""Training what codes need: VQ autoencoders, and painters of pictures from centroids. Seeded; one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alula.codes.drawing import Painter, pixels_of
from alula.codes.kmeans import KMeansCodes
from alula.codes.vq import VQCodes
from alula.errors import CodesError

Told = Callable[[int, float], None]
"""called after every step with its number and its loss of reconstruction"""


def train_vq(
    codes: VQCodes,
    items: Sequence[Any],
    *,
    steps: int,
    batch_size: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
    told: Told | None = None,
) -> VQCodes:
    """Train a VQ autoencoder in place: mean squared error behind the bottleneck, and the bottleneck's own losses.

    Args:
        codes: a fresh one, or one to go on with.
        items: PIL images or waveforms.
        steps, batch_size, rate: AdamW's, the rate falling to nothing along a cosine.
        seed: of the batches and of what is revived.

    Raises:
        CodesError: no items.
    """
    given = _all(items, codes.given)
    generator = torch.Generator().manual_seed(seed)
    codes.train().requires_grad_(True)
    codes.book.weight.requires_grad_(codes.config.codebook == "loss")
    codes.book.start(codes.vectors(given[: max(batch_size, 64)]), generator)
    optimizer = torch.optim.AdamW([each for each in codes.parameters() if each.requires_grad], lr=rate)
    for step in range(steps):
        batch = given[torch.randint(len(given), (batch_size,), generator=generator)]
        vectors = codes.vectors(batch)
        quantized = codes.book(vectors)
        loss = F.mse_loss(codes.decoder(quantized.vectors), batch)
        _step(optimizer, loss + quantized.loss, rate, step, steps)
        codes.book.learn(vectors, quantized.codes, generator)
        if told is not None:
            told(step, float(loss.detach()))
    codes.eval().requires_grad_(False)
    return codes


def train_painter(
    codes: KMeansCodes,
    items: Sequence[Any],
    *,
    steps: int,
    side: int,
    batch_size: int = 32,
    rate: float = 2e-3,
    hidden: int = 96,
    seed: int = 0,
    told: Told | None = None,
) -> KMeansCodes:
    """Give k-means codes of pictures a painter, trained to draw each picture from its centroids.

    Args:
        side: pixels of a drawn picture by side, a multiple of the encoder's patches by side.

    Raises:
        CodesError: no items, codes of sounds, or patches that are no square that fits.
    """
    grid = math.isqrt(codes.tokens_per_item)
    if codes.kind != "image" or grid * grid != codes.tokens_per_item or side % grid:
        raise CodesError(
            f"{codes.tokens_per_item} codes of {codes.kind} are no square of patches of a picture of {side} pixels",
            where="painter",
            remedy="take codes of pictures, and a side that is a multiple of their patches by side",
        )
    pixels = _all(items, lambda some: pixels_of(list(some), side))
    told_codes = torch.cat([torch.stack(codes.encode(items[at : at + 64])) for at in range(0, len(items), 64)])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        painter = Painter(codes.width, grid, side // grid, hidden)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(painter.parameters(), lr=rate)
    book = codes.codebook()
    for step in range(steps):
        some = torch.randint(len(pixels), (batch_size,), generator=generator)
        loss = F.mse_loss(painter(book[told_codes[some]]), pixels[some])
        _step(optimizer, loss, rate, step, steps)
        if told is not None:
            told(step, float(loss.detach()))
    codes.painter = painter.eval().requires_grad_(False)
    return codes


def _all(items: Sequence[Any], given: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    if not len(items):
        raise CodesError("there is nothing to learn from", where="items", remedy="give some items")
    return torch.cat([given(items[at : at + 256]) for at in range(0, len(items), 256)])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
