"""Conditions in a file: computed once by a frozen browser, found again by what was read.

A safetensors file of two tensors, ``keys`` (n, 32) uint8 and ``conditions`` (n, D), sorted by key; its metadata says
what made it. A key is a hash of a prompt's roles, words and pictures. Shapes: D the browser's width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alula.data.samples import Sample
from alula.errors import DataError
from alula.files import atomic_file, regular

FORMAT = "alula-conditions-1"
_KEYS, _VALUES = "keys", "conditions"


def key_of(messages: Sequence[Mapping[str, Any]]) -> bytes:
    """32 bytes that say what a prompt holds: roles, words, and the pixels of its pictures."""
    parts: list[Any] = []
    for message in messages:
        content = [
            part["text"] if part["type"] == "text" else [part["type"], part[part["type"]].fingerprint()]
            for part in message["content"]
        ]
        parts.append([message["role"], content])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()


class Conditions:
    """Conditions by what was read.

    Attributes:
        made: what made them, as it stands in the file.
        values: (n, D).
    """

    def __init__(self, keys: Tensor, values: Tensor, made: Mapping[str, str], where: str) -> None:
        self.made, self.values, self.where = dict(made), values, where
        self._index = {bytes(key.tolist()): number for number, key in enumerate(keys)}

    @classmethod
    def load(cls, file: str | os.PathLike[str], *, width: int | None = None) -> Conditions:
        """Read a file that `write_conditions` wrote.

        Args:
            width: of the decoder they are for; None: any.

        Raises:
            DataError: it is not there, damaged or something else, or of a browser of another width.
        """
        where = str(file)
        if not Path(file).is_file():
            raise DataError("there is no such file", where=where, remedy=f"alula browse MODEL DATA --output {where}")
        found, made = _read(Path(file))
        keys, values = found.get(_KEYS), found.get(_VALUES)
        is_whole = (
            made.get("format") == FORMAT
            and keys is not None
            and values is not None
            and keys.dtype == torch.uint8
            and values.dim() == 2
            and keys.shape == (len(values), 32)
            and bool(values.isfinite().all())
        )
        if not is_whole or keys is None or values is None:
            raise DataError("holds no conditions", where=where, remedy="write it again: alula browse")
        if width is not None and values.shape[1] != width:
            raise DataError(
                f"its conditions are {values.shape[1]} wide, and the decoder is {width}",
                where=where,
                remedy="browse with a model of the same decoder",
            )
        return cls(keys, values, made, where)

    def __len__(self) -> int:
        return len(self.values)

    def of(self, prompts: Sequence[Sample]) -> Tensor:
        """(B, D) those of prompts.

        Raises:
            DataError: one of them was not read, naming it.
        """
        found = []
        for prompt in prompts:
            number = self._index.get(key_of(prompt.messages))
            if number is None:
                raise DataError(
                    f"holds no condition of {prompt.place or prompt.id}",
                    where=self.where,
                    remedy="browse the data that is trained on, with the same seed and limit: alula browse",
                )
            found.append(number)
        return self.values[torch.tensor(found)].float()


def write_conditions(
    prompts: Iterable[Sample],
    read: Callable[[Sequence[Sample]], Tensor],
    file: str | os.PathLike[str],
    made: Mapping[str, str],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Path:
    """Read prompts and write their conditions, complete or not at all; what an interrupted call read is kept.

    Prompts with the same words and pictures are read once.

    Args:
        prompts: conversations without the answer.
        read: conditions (B, D) of some of them.
        file: made; one that is there is replaced.
        made: what makes them: batches that an interrupted call left are taken where they were made so.
        batch_size: prompts at a time.
        on_batch: told how many were dealt with so far.

    Raises:
        DataError: there is nothing to read.
    """
    target = Path(file)
    parts = target.with_name(target.name + ".parts")
    label = {"format": FORMAT, **made, "batch_size": str(batch_size)}
    if parts.is_dir() and _label_of(parts) != label:
        shutil.rmtree(parts)
    found: dict[bytes, Tensor] = {}
    done = 0
    for number, batch in enumerate(_batches(prompts, batch_size)):
        keys = [key_of(prompt.messages) for prompt in batch]
        kept = _kept(parts / f"{number:06d}.safetensors", label)
        if kept is None or not {*keys} <= {*kept} | {*found}:
            new = {key: prompt for key, prompt in zip(keys, batch, strict=True) if key not in found}
            kept = dict(zip(new, read([*new.values()]).cpu(), strict=True)) if new else {}
            if kept:
                _write(kept, parts / f"{number:06d}.safetensors", label)
        found |= kept
        done += len(batch)
        on_batch(done)
    if not found:
        raise DataError("there is nothing to read", where=str(file), remedy="name data with conversations")
    _write(found, target, {"format": FORMAT, **made})
    shutil.rmtree(parts, ignore_errors=True)
    return target


def _batches(prompts: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    left = iter(prompts)
    while batch := list(islice(left, size)):
        yield batch


def _write(found: Mapping[bytes, Tensor], target: Path, label: Mapping[str, str]) -> None:
    keys = sorted(found)
    tensors = {
        _KEYS: torch.tensor([list(key) for key in keys], dtype=torch.uint8),
        _VALUES: torch.stack([found[key] for key in keys]).contiguous(),
    }
    with atomic_file(target) as partial:
        save_file(tensors, partial, metadata=dict(label))


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; nothing of a file that is not whole."""
    try:
        with safe_open(regular(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}, {}


def _label_of(parts: Path) -> dict[str, str]:
    first = next(iter(sorted(parts.glob("*.safetensors"))), None)
    return {} if first is None else _read(first)[1]


def _kept(file: Path, label: Mapping[str, str]) -> dict[bytes, Tensor] | None:
    """Of a batch that an interrupted call read; None where there is none that was made alike."""
    if not file.is_file():
        return None
    found, made = _read(file)
    if made != label or _KEYS not in found:
        return None
    return {bytes(key.tolist()): value for key, value in zip(found[_KEYS], found[_VALUES], strict=True)}
