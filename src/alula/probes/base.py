"""The contract of a probe: watch forwards, add up, merge, answer."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from alula.errors import DataError, UsageError
from alula.files import atomic_file, regular
from alula.probes import token_sets
from alula.probes.accumulate import Reservoir, Tally
from alula.seam import ForwardContext, Owner, Seam, find, install, marked
from alula.settings import check_fields
from alula.stats import DEFAULT, Resampling, Result

logger = logging.getLogger(__name__)
_serial = itertools.count()
_DONE = object()


@dataclasses.dataclass(eq=False, kw_only=True)
class Probe(Owner, abc.ABC):
    """A read-only, streaming measurement.

        probe = AttentionShift()
        with probe.on(model):
            for batch in batches:
                model(**batch)
        print(probe.result().shift["main"])

    The fields of a probe are its settings; what it has seen is kept beside them in constant memory: sums, and a
    uniform sample of at most `keep` samples for what sums cannot give (intervals, neighbours, projections). The host
    computes what it would compute without the probe, bit for bit, and is left as it was found.

    One forward that starts without a cache is one measurement of each of its samples. Forwards that continue a cache
    (decoding steps, later chunks of a prompt) are not measured; their number is reported. A cache that was filled while
    nothing of alula was on the model is taken for a prefix, as prefix tuning makes one.

    Attributes:
        keep: samples kept.
        seed: decides which.
    """

    name: ClassVar[str]
    earlier: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """values of settings in files of earlier versions, and today's"""

    keep: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep < 2:
            raise UsageError(f"keep must be at least 2 samples, not {self.keep}")
        self.tally = Tally()
        self.kept: dict[str, Reservoir] = {}

    # -- for subclasses -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def watch(self, seam: Seam, stack: ExitStack) -> None:
        """Start listening to the host; put on `stack` whatever stops it again."""

    @abc.abstractmethod
    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        """Add a finished forward, given the notes taken during it."""

    @abc.abstractmethod
    def result(self, how: Resampling = DEFAULT) -> Result:
        """What was measured so far. The probe can go on afterwards.

        Raises:
            UsageError: nothing was measured yet.
        """

    def notes(self, forward: ForwardContext) -> dict[Any, Any] | None:
        """Where to put what is seen during this forward; None when it is not to be measured (any more)."""
        if forward.past is not None or self not in forward.marks:
            return None
        notes = forward.memo.setdefault(self, {})
        return None if _DONE in notes else notes

    def reservoir(self, name: str) -> Reservoir:
        """The bounded sample called `name`."""
        return self.kept.setdefault(name, Reservoir(self.capacity(name), self.seed))

    @property
    def needs_roles(self) -> bool:
        """Whether it asks whose turn a token belongs to: then inputs have to say it (`token_roles`)."""
        return any(token_sets.by_role(name) for name in self.token_sets())

    def token_sets(self) -> tuple[str, ...]:
        """Names of the sets of tokens (`probes.token_sets`) it looks at."""
        return ()

    def capacity(self, name: str) -> int:
        """How many samples the bounded sample called `name` keeps."""
        return self.keep

    # -- measuring ------------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Self]:
        """Measure the forwards of `model` that this thread (or asyncio task) begins inside the block.

        Args:
            model: a host, with or without grafts and PEFT adapters.

        Raises:
            UsageError: this probe is on this model already. HostError: a class of host alula does not know.
        """
        seam = find(model)
        if seam is not None and any(owner is self for owner in seam.owners.values()):
            raise UsageError(f"this {type(self).__name__} is on this model already")
        name = f"probe-{next(_serial)}"
        seam = install(model, name, self)
        with ExitStack() as stack:
            stack.callback(seam.release, name)
            self.watch(seam, stack)
            stack.callback(seam.at_end(self._after_forward, mark=self).remove)
            stack.enter_context(marked(self))
            yield self

    @torch.no_grad()
    def _after_forward(self, forward: ForwardContext) -> None:
        notes = self.notes(forward)
        if notes is None:
            self.tally.add("continued_forwards", 1)
        else:
            self.update(forward, notes)
            notes.clear()
            notes[_DONE] = True  # layers that gradient checkpointing runs again have been measured

    @property
    def continued_forwards(self) -> int:
        """Forwards that continued a cache and were not measured."""
        return self.tally.count("continued_forwards")

    # -- putting measurements together ----------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """The options of this probe, as JSON values."""
        return json.loads(json.dumps(self._options()))

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def merge(self, other: Self) -> Self:
        """Add what another probe of the same settings has seen, and return self.

        Raises:
            UsageError: another kind of probe, other settings, or measurements of a model of another shape.
        """
        if type(other) is not type(self) or other.settings != self.settings:
            raise UsageError(
                f"{type(self).__name__}({self.settings}) cannot take in {type(other).__name__}({other.settings})",
                remedy="merge probes of one class with the same settings",
            )
        mine = {name: value.shape for name, value in self.tally.sums.items()}
        for name, value in other.tally.sums.items():
            if name in mine and mine[name] != value.shape:
                raise UsageError(
                    f"{name} has shape {tuple(value.shape)} here and {tuple(mine[name])} there",
                    remedy="merge only probes of the same model",
                )
        self.tally.merge(other.tally)
        for name, reservoir in other.kept.items():
            self.reservoir(name).merge(reservoir)
        return self

    def gather(self) -> Self:
        """Merge the measurements of all processes of the default torch.distributed group; each gets the whole.

        Every process must call it, once, when it has measured its part: a second call would count the whole once per
        process. Without a process group there is nothing to do. Returns self.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            states = _exchange(safetensors.torch.save(self.state_dict()))
            self.load_state_dict({})
            for state in states:
                other = type(self)(**self._options())
                other.load_state_dict(safetensors.torch.load(state))
                self.merge(other)
        return self

    # -- keeping measurements -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that was measured, as named tensors."""
        state = {f"tally.{name}": value for name, value in self.tally.state_dict().items()}
        for kept, reservoir in self.kept.items():
            state |= {f"kept.{kept}.{name}": value for name, value in reservoir.state_dict().items()}
        return {name: value.contiguous() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what was measured by a `state_dict`."""
        self.tally, self.kept = Tally(), {}
        self.tally.load_state_dict(_below("tally", state))
        for name in sorted({key.split(".")[1] for key in state if key.startswith("kept.")}):
            self.reservoir(name).load_state_dict(_below(f"kept.{name}", state))

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write settings and measurements to one safetensors file, atomically; `load` reads it back."""
        target = Path(file)
        facts = {"probe": self.name, "settings": json.dumps(self.settings)}
        with atomic_file(target) as partial:
            safetensors.torch.save_file(self.state_dict(), partial, facts)
        return target

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """Read a probe written by `save`.

        Raises:
            DataError: not such a file, or one of another kind of probe.
        """
        try:
            with safetensors.safe_open(regular(file), framework="pt") as opened:
                facts = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"not a readable probe file: {error}", where=str(file)) from error
        if facts.get("probe") != cls.name:
            raise DataError(f"it holds {facts.get('probe', 'no probe')}, not {cls.name}", where=str(file))
        given: dict[str, Any] = json.loads(facts["settings"])
        for key, names in cls.earlier.items():
            if given.get(key) in names:
                logger.warning("%s: read %s=%s as %s, its name today", file, key, given[key], names[given[key]])
                given[key] = names[given[key]]
        options: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        probe = cls(**options)
        probe.load_state_dict(state)
        return probe


@contextmanager
def watch(model: nn.Module, probes: Sequence[Probe]) -> Iterator[None]:
    """Have several probes on `model` at once: one pass over the data serves them all."""
    with ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.on(model))
        yield


def name_in(file: str | os.PathLike[str]) -> str:
    """Name of the probe that wrote ``file``.

    Raises:
        DataError: no file of a probe.
    """
    try:
        with safetensors.safe_open(regular(file), framework="pt") as opened:
            name = (opened.metadata() or {}).get("probe")
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"not a readable probe file: {error}", where=str(file)) from error
    if name is None:
        raise DataError("it holds no probe", where=str(file))
    return name


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): value for k, value in state.items() if k.startswith(f"{prefix}.")}


def _exchange(content: bytes) -> list[bytes]:
    """Every process's bytes, in order of rank."""
    group = torch.distributed
    device = torch.device("cuda", torch.cuda.current_device()) if group.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    size = torch.tensor([len(mine)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(group.get_world_size())]
    group.all_gather(sizes, size)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    all_padded = [torch.zeros_like(padded) for _ in sizes]
    group.all_gather(all_padded, padded)
    return [
        bytes(content[: int(size)].cpu().numpy().tobytes()) for content, size in zip(all_padded, sizes, strict=True)
    ]
