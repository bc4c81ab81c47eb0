"""Where and in which precision a fledgling is raised, unless the user says otherwise."""

from __future__ import annotations

import torch

from alula.errors import UsageError
from alula.training.precision import multiplies_bfloat16

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

    ``"auto"`` is bfloat16 where the device has units for it, and float32 elsewhere.

    Raises:
        UsageError: an unknown name.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise UsageError(f"no precision {name!r}", remedy=f"use auto, {' or '.join(PRECISIONS)}")
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
