"""What a probe remembers: sums, maxima, and a bounded uniform sample. All of it merges, none of it grows with the
data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.stats import Array


class Tally:
    """Named sums and named maxima, float64 on the CPU. A name that was never used reads as absent, and merges as
    zero."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | Array | float) -> None:
        """Add `value` (any shape, the same at every call) to the sum called `name`."""
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def raise_peak(self, name: str, value: Tensor | Array | float) -> None:
        """Keep the elementwise maximum of the values given under `name`."""
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value.clone()

    def count(self, name: str) -> int:
        """The sum called `name` as a whole number; 0 where nothing was added."""
        return int(self.sums[name]) if name in self.sums else 0

    def merge(self, other: Tally) -> None:
        for name, value in other.sums.items():
            self.add(name, value)
        for name, value in other.peaks.items():
            self.raise_peak(name, value)

    def state_dict(self) -> dict[str, Tensor]:
        named = {f"sums.{name}": value for name, value in self.sums.items()}
        return named | {f"peaks.{name}": value for name, value in self.peaks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums = {name.removeprefix("sums."): value for name, value in state.items() if name.startswith("sums.")}
        self.peaks = {name.removeprefix("peaks."): value for name, value in state.items() if name.startswith("peaks.")}


class Reservoir:
    """A uniform sample of bounded size of everything offered, the same whichever way the data was split and merged.

    Every entry draws its priority from a hash of its own content and the seed, and the lowest priorities stay (a
    bottom-k sketch). So no state but the entries themselves is needed, two halves merge exactly into the sample of the
    whole, and entries come out in an order that does not depend on the order they came in.

    Args:
        capacity: most entries kept. While no more were offered, the sample *is* the data.
        seed: of the priorities.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise UsageError(f"a reservoir must hold at least one sample, not {capacity}")
        self.capacity, self.seed = capacity, seed
        self.entries: dict[str, Tensor] = {}
        self._priority = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._priority)

    def offer(self, entries: Mapping[str, Tensor]) -> None:
        """Offer n entries.

        Args:
            entries: named tensors (n, ...), the same names and trailing shapes at every call. Stored on the CPU in the
                dtype given.

        Raises:
            UsageError: names or shapes differ from those of earlier entries.
        """
        arrived = {name: value.detach().to("cpu").contiguous() for name, value in entries.items()}
        priorities = [self._draw(parts) for parts in zip(*(arrived[name] for name in sorted(arrived)), strict=True)]
        self._absorb(arrived, torch.tensor(priorities, dtype=torch.int64))

    def merge(self, other: Reservoir) -> None:
        """Take in the entries of another reservoir of the same capacity and seed."""
        if len(other):
            self._absorb(other.entries, other._priority)

    def _draw(self, parts: tuple[Tensor, ...]) -> int:
        digest = hashlib.blake2b(self.seed.to_bytes(8, "big", signed=True), digest_size=8)
        for part in parts:
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return int.from_bytes(digest.digest(), "big") >> 1  # 63 bits: int64 stays positive

    def _absorb(self, entries: Mapping[str, Tensor], priority: Tensor) -> None:
        if len(self) == self.capacity:
            # nothing is copied for entries that would not stay; once many were seen, that is nearly all
            staying = (priority < self._priority[-1]).nonzero()[:, 0]
            if not len(staying):
                return
            entries, priority = {name: value[staying] for name, value in entries.items()}, priority[staying]
        if len(self):
            mine = {name: tuple(value.shape[1:]) for name, value in self.entries.items()}
            theirs = {name: tuple(value.shape[1:]) for name, value in entries.items()}
            if mine != theirs:
                raise UsageError(
                    f"samples of different shapes cannot be put together: {mine} and {theirs}",
                    remedy="use one probe per model size, and merge only probes of the same model",
                )
            entries = {name: torch.cat([self.entries[name], value]) for name, value in entries.items()}
            priority = torch.cat([self._priority, priority])
        order = torch.sort(priority, stable=True).indices[: self.capacity]
        self.entries = {name: value[order] for name, value in entries.items()}
        self._priority = priority[order]

    def state_dict(self) -> dict[str, Tensor]:
        return {"priority": self._priority, **{f"entries.{name}": value for name, value in self.entries.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._priority = state["priority"]
        self.entries = {n.removeprefix("entries."): value for n, value in state.items() if n.startswith("entries.")}
