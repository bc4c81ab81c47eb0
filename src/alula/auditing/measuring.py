"""One streaming pass of a model over the chosen conversations, with probes on, that goes on where it was killed."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.files import atomic_directory, read_json, write_json
from alula.inputs import placed
from alula.probes import Probe, watch

P = TypeVar("P", bound=Probe)

_MARK = "pass.json"
CHECKPOINT_SECONDS = 30.0
"""least time between two savings of what was measured"""


def measure(
    model: nn.Module,
    batches: Iterable[tuple[int, Mapping[str, Any] | None]],
    probes: Mapping[str, P],
    folder: Path,
    *,
    total: int,
    identity: Mapping[str, Any],
    around: Callable[[int], AbstractContextManager[Any]],
    done: Callable[[int], None],
    every: float = CHECKPOINT_SECONDS,
) -> dict[str, P]:
    """Run the model over all batches and return the probes with what they saw.

    Args:
        batches: numbered from 0; those that an earlier call finished are not run again, only held against what that
            call was given, and None is passed over.
        probes: fresh ones, by name.
        folder: what was measured is kept here, in one complete directory per checkpoint.
        total: how many batches there are.
        identity: JSON values that must agree with those of an earlier call.
        around: a context for batch n, such as a control.
        done: called with a number of batches that are done.

    Raises:
        UsageError: the folder holds the measurements of something else, or earlier batches are no longer the same:
            data, pictures, template or processor have changed.
    """
    begun, earlier, measured = _restored(folder, probes, identity)
    seen = hashlib.sha256()
    done(begun)
    parameter = next(model.parameters())
    options = _lean(model)
    saved = time.monotonic()
    for number, batch in batches:
        _note(seen, batch)
        if number + 1 == begun and seen.hexdigest() != earlier:
            raise _other("other conversations, pictures, chat template or processor", folder)
        if number < begun:
            continue
        if batch is not None:
            inputs = placed(batch, parameter)
            with around(number), watch(model, list(measured.values())), torch.no_grad():
                model(**inputs, **options)
        last = number + 1 == total
        if last or time.monotonic() - saved >= every:
            _save(folder, measured, {"batches": number + 1, "inputs": seen.hexdigest(), "identity": dict(identity)})
            saved = time.monotonic()
        done(1)
    return measured


def _lean(model: nn.Module) -> dict[str, Any]:
    """Options that spare the host what nobody reads: a cache, and logits of any token but the last."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(Anatomy.of(model).host.forward).parameters:
        options["logits_to_keep"] = 1
    return options


def _note(seen: Any, batch: Mapping[str, Any] | None) -> None:
    """Add to a digest what the model is given."""
    for key in sorted(batch or {}):
        value = (batch or {})[key]
        if torch.is_tensor(value):
            seen.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            seen.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            seen.update(f"{key} {value!r}".encode())
    seen.update(b"\n")


def _save(folder: Path, probes: Mapping[str, Probe], mark: Mapping[str, Any]) -> None:
    """Write a whole checkpoint under its own name, then remove the ones before it: one is always complete."""
    with atomic_directory(folder / f"{mark['batches']:08d}") as partial:
        for name, probe in probes.items():
            probe.save(partial / f"{name}.safetensors")
        write_json(partial / _MARK, dict(mark))
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{_MARK}"))


_CHANGED = {
    "weights": "other weights",
    "samples": "other data",
    "device": "another device",
    "backend": "another attention implementation",
    "dtype": "another precision",
    "versions": "other versions of torch, transformers, peft or alula",
}


def _restored(folder: Path, probes: Mapping[str, P], identity: Mapping[str, Any]) -> tuple[int, str, dict[str, P]]:
    """How many batches were measured before, the digest of what they held, and the probes that measured them."""
    found = _checkpoints(folder)
    if not found:
        return 0, "", dict(probes)
    for path in folder.glob("[0-9]*"):  # a kill may have come before the older ones were removed
        if path != found[-1]:
            shutil.rmtree(path, ignore_errors=True)
    mark = read_json(found[-1] / _MARK)
    before, now = mark["identity"], json.loads(json.dumps(dict(identity)))
    differing = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if differing or "inputs" not in mark:
        told = [_CHANGED.get(key, key) for key in differing] or ["an earlier version of alula"]
        raise _other(" and ".join(told), folder)
    measured = {name: type(probe).load(found[-1] / f"{name}.safetensors") for name, probe in probes.items()}
    return mark["batches"], mark["inputs"], measured


def _other(what: str, folder: Path) -> UsageError:
    return UsageError(
        f"holds the measurements of {what}", where=str(folder), remedy="name another --output, or remove it"
    )
