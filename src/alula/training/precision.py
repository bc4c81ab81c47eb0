"""Whether matrix products in bfloat16 are worth it on a device."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has units that multiply bfloat16: GPUs do, and processors that say so (x86 and ARM, Linux).

    Such a processor gains up to four times over float32; one without loses a lot. It is read off the processor and not
    measured, so that all processes of a run, and its resumption, decide alike.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    try:
        facts = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", facts, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())
