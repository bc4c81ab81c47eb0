"""Where and in which precision a fledgling is raised, unless the user says otherwise."""

from __future__ import annotations

import time

import torch

from alula.errors import UsageError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the GPU where there is one, or the CPU.

    Raises:
        UsageError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r} here: {str(error).splitlines()[0]}", remedy="use cpu or cuda") from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type matrix products are done in.

    ``"auto"`` is bfloat16 on GPUs, and on a processor where it multiplies at least twice as fast as float32, measured
    on the spot: processors with bfloat16 units gain about four times, others lose a lot.

    Raises:
        UsageError: an unknown name.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise UsageError(f"no precision {name!r}", remedy=f"use auto, {' or '.join(PRECISIONS)}")
    if device.type != "cpu":
        return torch.bfloat16
    gain = _seconds_per_product(torch.float32) / _seconds_per_product(torch.bfloat16)
    return torch.bfloat16 if gain >= 2 else torch.float32


def _seconds_per_product(dtype: torch.dtype) -> float:
    left, right = torch.randn(2048, 256).to(dtype), torch.randn(256, 512).to(dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return min(times)
