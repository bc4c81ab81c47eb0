"""The models of an engine: bases, and adapters that share a base's weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alula.anatomy import Anatomy, unwrap
from alula.demonstrations import Shot, shots_in
from alula.errors import HostError, UsageError
from alula.files import recovered
from alula.grafts import AimConfig, grafts_of
from alula.grafts.storage import CONFIG_FILE, read_facts
from alula.hosts import names
from alula.hosts.context import context_length
from alula.inputs import Intake
from alula.loading import Loaded, base_of, load_model, put_adapter, sharing, written_by
from alula.policies import policies_of
from alula.serving.engine.errors import UnknownModel
from alula.serving.engine.resident import Kind, Resident, Served
from alula.serving.engine.trial import check_settings, why_alone

_WITH_SHOTS = "demonstrations stand before every conversation, whose fused tokens `generate` is given"


class Residents:
    """The loaded models by name. Any thread may ask."""

    def __init__(self) -> None:
        self._by_name: dict[str, Resident] = {}
        self._changed = threading.Condition()
        self._loading = threading.Lock()  # one at a time: it takes memory

    def load(
        self,
        name: str,
        path: str,
        *,
        dtype: torch.dtype | str | None,
        device: torch.device | str | None,
        bank: str | None = None,
        shots: int | None = None,
    ) -> Resident:
        """Load a base, or an adapter of one that is loaded. See `Engine.load`."""
        if not name or not isinstance(name, str):
            raise UsageError(f"{name!r} cannot name a model")
        with self._loading:
            if name in self._by_name:
                raise UsageError(f"{name!r} is loaded already", remedy="unload it first, or give another name")
            directory = recovered(names.resolve(str(path), "llm"))
            if shots is not None and bank is None:
                raise UsageError("demonstrations are taken from a bank", where="shots", remedy="name its directory")
            if (directory / CONFIG_FILE).is_file():
                made = self._loaded_adapter(name, directory, dtype, device, bank, shots)
            elif bank is not None:
                raise UsageError("demonstrations are read by an adapter of method aim", where=str(path))
            else:
                model, processor = load_model(path, dtype=dtype, device=device)
                made = _resident(name, str(path), Loaded(model, processor), None)
            with self._changed:
                self._by_name[name] = made
        return made

    def _loaded_adapter(
        self, name: str, path: Path, dtype: Any, device: Any, bank: str | None, shots: int | None
    ) -> Resident:
        base = self._base(name, path, dtype, device)
        model = sharing(base.model, without=written_by(path, base.model))
        loaded = put_adapter(Loaded(model, base.processor), path)
        loaded.model.to(base.device)
        shown = [] if bank is None else shots_in(bank, *loaded, shots)
        made = _resident(name, str(path), loaded, base, shown)
        if made.processor is base.processor:
            made.preparing = base.preparing
        return made

    def _base(self, name: str, path: Path, dtype: Any, device: Any) -> Resident:
        """The base of an adapter: the one its name begins with, else the one it was trained on, loaded where it is
        not."""
        before, plus, _ = name.partition("+")
        if plus and before in self._by_name:
            found = self._by_name[before]
            if found.base is not None:
                raise UsageError(f"{before!r} is an adapter itself", remedy="name the base before the +")
            return found
        wanted = base_of(path)
        for each in self._by_name.values():
            if each.base is None and _same(each.served.path, wanted):
                return each
        own = before if plus else Path(wanted).name or wanted
        if own in self._by_name:
            raise UsageError(
                f"the adapter's base, {wanted}, is not loaded, and {own!r} is another model", remedy="load it first"
            )
        model, processor = load_model(wanted, dtype=dtype, device=device)
        base = _resident(own, wanted, Loaded(model, processor), None)
        with self._changed:
            self._by_name[own] = base
        return base

    def entered(self, name: str) -> Resident:
        """The model of that name, one request more on its way through it.

        Raises:
            UnknownModel: none is loaded under it.
        """
        with self._changed:
            found = self._by_name.get(name)
            if found is None:
                raise UnknownModel(
                    f"no model {name!r} is loaded",
                    where="model",
                    remedy=f"loaded: {', '.join(self._by_name)}" if self._by_name else "load one",
                )
            found.requests += 1
            return found

    def left(self, resident: Resident) -> None:
        """One request less."""
        with self._changed:
            resident.requests -= 1
            self._changed.notify_all()

    def unload(self, name: str) -> Resident:
        """Take a model out, once its requests are answered; new ones are refused at once.

        Raises:
            UnknownModel: none is loaded under that name. UsageError: adapters of it are.
        """
        with self._loading, self._changed:  # an adapter may be on its way to stand on it
            if name not in self._by_name:
                raise UnknownModel(f"no model {name!r} is loaded", where="model")
            found = self._by_name[name]
            over = [each.served.name for each in self._by_name.values() if each.base is found]
            if over:
                raise UsageError(f"{', '.join(over)} stand on it", where=name, remedy="unload them first")
            del self._by_name[name]
        with self._changed:
            self._changed.wait_for(lambda: found.requests == 0)
        return found

    @property
    def served(self) -> list[Served]:
        """What is loaded, in order."""
        with self._changed:
            return [each.served for each in self._by_name.values()]


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    left, right = Path(one), Path(other)
    return left.is_dir() and right.is_dir() and left.resolve() == right.resolve()


def _resident(name: str, path: str, loaded: Loaded, base: Resident | None, shots: Sequence[Shot] = ()) -> Resident:
    model, processor = loaded
    intake = Intake(processor)
    check_settings(model)
    kind, adapter = _kind(Path(path), base is not None, intake.takes)
    served = Served(
        name=name,
        path=path,
        base=None if base is None else base.served.name,
        kind=kind,
        adapter=adapter,
        takes=intake.takes,
        exact_gate=base is not None and kind == "alula" and leaves_text(model, base.model, written_of(Path(path))),
        context=context_length(model),
        loading={name: intake.loading(name) for name in intake.takes},
        created=int(time.time()),
        batched=True,
        shots=len(shots),
    )
    made = Resident(served, model, processor, base, shots)
    reason = _WITH_SHOTS if shots else why_alone(made)
    made.served = replace(served, batched=reason is None, why_alone=reason)
    return made


def _kind(path: Path, is_adapter: bool, takes: Collection[str]) -> tuple[Kind, str | None]:
    if not is_adapter:
        return ("host" if takes else "text"), None
    facts = read_facts(path)
    if "peft_type" in facts:
        return "peft", str(facts["peft_type"]).lower()
    return "alula", str(facts["alula_type"])


def reads_demonstrations(path: str) -> bool:
    """Whether what lies in a directory is an adapter that a bank's demonstrations can be shown to."""
    facts = read_facts(Path(path)) if (Path(path) / CONFIG_FILE).is_file() else {}
    return facts.get("alula_type") == AimConfig.graft_type


def written_of(path: Path) -> list[str]:
    """Paths of the host's modules that an adapter of alula's brings."""
    return list(read_facts(path).get("modules", ()))


def leaves_text(model: nn.Module, base: nn.Module, modules: Collection[str]) -> bool:
    """Whether text alone is computed by `model`, which stands on `base`, as by `base`: to the bit.

    Args:
        modules: of the host that came with what is on it.
    """
    grafts = grafts_of(model).values()
    ours, theirs = ({name: each.policy for name, each in policies_of(one).items()} for one in (model, base))
    if not grafts or not all(graft.leaves_text for graft in grafts) or ours != theirs:
        return False
    anatomy = Anatomy.of(unwrap(model))
    try:
        towers = [each for each in (anatomy.tower, anatomy.audio_tower, anatomy.projector) if each is not None]
    except HostError:
        towers = []
    of_media = {id(module) for tower in towers for module in tower.modules()}
    return all(id(unwrap(model).get_submodule(path)) in of_media for path in modules)
