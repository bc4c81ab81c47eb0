"""What a probe remembers: sums, maxima, and a bounded uniform sample. All of it merges, none of it grows with the
data.

What is added stays on the device it was computed on: nobody waits for that device until what was added is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.stats import Array

_WAITING_BYTES, _WAITING_ENTRIES = 1 << 26, 1 << 10  # of a reservoir, that may stay on their device


class Tally:
    """Named sums and named maxima in float64. A name that was never used reads as absent, and merges as zero.

    Numbers of Python are added on the host and tensors where they are; `sums` and `peaks` bring all to the CPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._added: dict[str, Tensor] = {}  # to the sums, all in one operator once a name comes again
        self._peaks: dict[str, Any] = {}
        self._stacks: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        self._is_read = False

    @property
    def sums(self) -> dict[str, Tensor]:
        """All sums, float64 on the CPU; not to be changed."""
        self._read()
        return self._sums

    @property
    def peaks(self) -> dict[str, Tensor]:
        """All maxima, float64 on the CPU; not to be changed."""
        self._read()
        return self._peaks

    def _read(self) -> None:
        """Bring everything to the CPU, where it was not since the last addition."""
        if self._is_read:
            return
        self._add_up()
        stacks, self._stacks = self._stacks, {}
        for places, values in stacks.items():
            for names, value in zip(places, values.cpu(), strict=True):
                self._sums |= {name: value + self._sums[name].cpu() if name in self._sums else value for name in names}
        for named in (self._sums, self._peaks):
            for name, value in named.items():
                # files do not allow names to share memory
                named[name] = torch.as_tensor(value, dtype=torch.float64, device="cpu").clone()
        self._is_read = True

    def add(self, name: str, value: Tensor | Array | float) -> None:
        """Add `value` (any shape, the same at every call) to the sum called `name`."""
        value, self._is_read = _wide(value), False
        if not isinstance(value, Tensor):
            self._sums[name] = self._sums.get(name, 0.0) + value
            return
        if name in self._added:
            self._add_up()
        self._added[name] = value

    def _add_up(self) -> None:
        """Add what was added since, in few operators."""
        added, self._added = self._added, {}
        known = [name for name in added if name in self._sums]
        held = [_beside(added[name], self._sums[name]) for name in known]
        self._sums |= added
        if known:
            self._sums |= zip(known, torch._foreach_add(held, [added[name] for name in known]), strict=True)

    def add_each(self, names: Sequence[tuple[str, ...]], values: Tensor) -> None:
        """Add each of (n, ...) `values` to the sums of all names at its place."""
        places, value, self._is_read = tuple(names), _wide(values), False
        self._stacks[places] = _beside(value, self._stacks[places]) + value if places in self._stacks else value

    def raise_peak(self, name: str, value: Tensor | Array | float) -> None:
        """Keep the elementwise maximum of the values given under `name`."""
        raised, self._is_read = _wide(value), False
        if name in self._peaks:
            held = self._peaks[name]
            raised = torch.maximum(_beside(raised, held), raised) if isinstance(raised, Tensor) else max(held, raised)
        self._peaks[name] = raised

    def count(self, name: str) -> int:
        """The sum called `name` as a whole number; 0 where nothing was added."""
        if name in self._added:
            self._add_up()
        return int(self._sums.get(name, 0))

    def merge(self, other: Tally) -> None:
        for name, value in other.sums.items():
            self.add(name, value)
        for name, value in other.peaks.items():
            self.raise_peak(name, value)

    def state_dict(self) -> dict[str, Tensor]:
        named = {f"sums.{name}": value for name, value in self.sums.items()}
        return named | {f"peaks.{name}": value for name, value in self.peaks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._added, self._stacks, self._is_read = {}, {}, False
        self._sums = {name.removeprefix("sums."): value for name, value in state.items() if name.startswith("sums.")}
        self._peaks = {name.removeprefix("peaks."): value for name, value in state.items() if name.startswith("peaks.")}


def _wide(value: Tensor | Array | float) -> Any:
    """A number of Python, or a float64 tensor where it is."""
    return float(value) if isinstance(value, int | float) else torch.as_tensor(value).detach().to(torch.float64)


def _beside(value: Tensor, held: Tensor | float) -> Tensor:
    """What is held, on the device of a value."""
    return torch.as_tensor(held, dtype=torch.float64, device=value.device)


class Reservoir:
    """A uniform sample of bounded size of everything offered, the same whichever way the data was split and merged.

    Every entry draws its priority from a hash of its own content and the seed, and the lowest priorities stay (a
    bottom-k sketch). So no state but the entries themselves is needed, two halves merge exactly into the sample of the
    whole, and entries come out in an order that does not depend on the order they came in.

    What is offered stays on its device until somebody reads, or until more than 1,024 entries or 64 MiB stay there:
    then all of it draws.

    Args:
        capacity: most entries kept. While no more were offered, the sample *is* the data.
        seed: of the priorities.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise UsageError(f"a reservoir must hold at least one sample, not {capacity}")
        self.capacity, self.seed = capacity, seed
        self._entries: dict[str, Tensor] = {}
        self._priority = torch.empty(0, dtype=torch.int64)
        self._waiting: list[tuple[dict[str, Tensor], Tensor]] = []
        self._bytes = self._count = 0  # of what waits

    @property
    def entries(self) -> dict[str, Tensor]:
        """The sample, (K, ...) by name on the CPU."""
        self._draw_all()
        return self._entries

    def __len__(self) -> int:
        self._draw_all()
        return len(self._priority)

    def offer(self, entries: Mapping[str, Tensor], present: Tensor | None = None) -> None:
        """Offer n entries.

        Args:
            entries: named tensors (n, ...), the same names and trailing shapes at every call, kept in the dtype given.
                They may be held for a while: give no views of what is larger, and write into none.
            present: (n,) bool, which of them there are; None: all.

        Raises:
            UsageError: names or shapes differ from those of earlier entries.
        """
        arrived = {name: value.detach() for name, value in entries.items()}
        before = self._waiting[0][0] if self._waiting else self._entries
        if before:
            _check_alike(before, arrived)
        if present is None:
            first = next(iter(arrived.values()))
            present = torch.ones(len(first), dtype=torch.bool, device=first.device)
        self._waiting.append((arrived, present))
        self._bytes += sum(value.nbytes for value in arrived.values())
        self._count += len(present)
        if self._bytes > _WAITING_BYTES or self._count > _WAITING_ENTRIES:
            self._draw_all()

    def merge(self, other: Reservoir) -> None:
        """Take in the entries of another reservoir of the same capacity and seed."""
        self._draw_all()
        if len(other):
            self._absorb(other._entries, other._priority)

    def _draw_all(self) -> None:
        """Have what was offered draw its priorities."""
        if not self._waiting:
            return
        waiting, self._waiting, self._bytes, self._count = self._waiting, [], 0, 0
        present = torch.cat([there for _, there in waiting]).cpu()
        arrived = {name: torch.cat([entries[name] for entries, _ in waiting]).cpu() for name in waiting[0][0]}
        if not bool(present.all()):
            arrived = {name: value[present] for name, value in arrived.items()}
        priorities = [self._draw(parts) for parts in zip(*(arrived[name] for name in sorted(arrived)), strict=True)]
        if priorities:
            self._absorb(arrived, torch.tensor(priorities, dtype=torch.int64))

    def _draw(self, parts: tuple[Tensor, ...]) -> int:
        digest = hashlib.blake2b(self.seed.to_bytes(8, "big", signed=True), digest_size=8)
        for part in parts:
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return int.from_bytes(digest.digest(), "big") >> 1  # 63 bits: int64 stays positive

    def _absorb(self, entries: Mapping[str, Tensor], priority: Tensor) -> None:
        if len(self._priority) == self.capacity:
            # nothing is copied for entries that would not stay; once many were seen, that is nearly all
            staying = (priority < self._priority[-1]).nonzero()[:, 0]
            if not len(staying):
                return
            entries, priority = {name: value[staying] for name, value in entries.items()}, priority[staying]
        if len(self._priority):
            _check_alike(self._entries, entries)
            entries = {name: torch.cat([self._entries[name], value]) for name, value in entries.items()}
            priority = torch.cat([self._priority, priority])
        order = torch.sort(priority, stable=True).indices[: self.capacity]
        self._entries = {name: value[order] for name, value in entries.items()}
        self._priority = priority[order]

    def state_dict(self) -> dict[str, Tensor]:
        named = {f"entries.{name}": value for name, value in self.entries.items()}
        return {"priority": self._priority, **named}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._priority, self._waiting, self._bytes, self._count = state["priority"], [], 0, 0
        self._entries = {n.removeprefix("entries."): value for n, value in state.items() if n.startswith("entries.")}


def _check_alike(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise a UsageError where entries do not have the names and trailing shapes that others have."""
    one, other = ({name: tuple(value.shape[1:]) for name, value in entries.items()} for entries in (mine, theirs))
    if one != other:
        raise UsageError(
            f"samples of different shapes cannot be put together: {one} and {other}",
            remedy="use one probe per model size, and merge only probes of the same model",
        )
