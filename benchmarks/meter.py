"""What a forward asks of a device, counted exactly: kernels launched, copies from the host, waits for the device.

Counts come from the operators that run, whatever device they run on, so a CPU tells what a GPU would be asked. Each
operator that computes is one launch, also those that some devices split up; views and blank memory are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# beside what torch itself calls views
_FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "detach_",
    "alias",
    "lift_fresh",
    "lift",
    "sym_size",
    "is_same_size",
}
_FREE |= {"promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
_COPIES = {"lift_fresh"}  # numbers of Python become a tensor
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
# what reads numbers: torch shows no operator where they are on the CPU
_READS = {Tensor.tolist, Tensor.cpu}


@dataclass
class Counts:
    """Launches by name, copies from host to device, and waits of the host for the device."""

    launches: Counter[str]
    copies: int = 0
    waits: int = 0

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    with Meter() as meter:
        model(**batch)
    meter.counts.total
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts(Counter())
        self._reads = _Reads(self.counts)

    def __enter__(self) -> Self:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        counts = self.counts
        counts.copies += name in _COPIES
        # picking by a mask has to know how many places are true
        picks = args[1] if name in _INDEXES else ()
        counts.waits += name in _WAITS or any(p is not None and p.dtype in (torch.bool, torch.uint8) for p in picks)
        if name not in _FREE and not function.is_view and name != "_local_scalar_dense":
            counts.launches[name] += 1
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.waits += function in _READS
        return function(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Bytes of tensors at the peak of a run, above those that stood before it: what torch's allocator gave out and took
    back, so that it is the same in every run. What kernels of other libraries take beside it is not seen on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    told: Any = profiler.profiler
    events = [event for event in told.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
