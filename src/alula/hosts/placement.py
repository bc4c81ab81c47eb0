"""Floating-point types and devices by name, as users write them."""

from __future__ import annotations

import torch

from alula.errors import UsageError


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type by its torch name; None stays None.

    Raises:
        UsageError: no such type, or not a floating-point one.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        remedy = "float32, bfloat16 or float16"
        raise UsageError(f"{dtype!r} is not a floating-point type", where="dtype", remedy=remedy)
    return found


def device_named(device: str | None) -> torch.device:
    """A device by name; None picks a GPU where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{device!r} cannot be used ({reason})", where="device", remedy="name a device that is there, such as cpu"
        ) from error
    return chosen
