"""Model directories without their zeros: a bit per weight that says whether it is there, and the weights that are.

A coded directory holds what the model's directory holds, `MANIFEST` and coded files in place of its weights. No other
reader knows these names, so stock transformers refuses such a directory (it finds no weights) and never fills a model
with something else; alula's loaders read it, and `decode` writes an ordinary one again, to the bit.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.files import atomic_directory, check_replaceable, contents, read_json, recovered, telling, write_json

MANIFEST = "coded_weights.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = ("model*.safetensors", _INDEX, "pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""what a model is loaded from by others: none of it stands beside coded weights"""
_VERSION = 1
_FILE_BYTES = 1 << 30  # about how much is held and written at a time
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Coded:
    """What coding came to.

    Attributes:
        plain_bytes, coded_bytes: of the weights before and after.
    """

    plain_bytes: int
    coded_bytes: int

    @property
    def share(self) -> float:
        """Coded bytes of plain ones."""
        return self.coded_bytes / self.plain_bytes


def is_coded(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds coded weights."""
    return (Path(directory) / MANIFEST).is_file()


def encode(directory: str | os.PathLike[str], target: str | os.PathLike[str]) -> Coded:
    """Write a model directory without the zeros among its weights; complete or not at all.

    With half of the weights zero, a matrix in half precision takes 0.5625 of its bytes, in float32 0.53125. Tensors
    that would not become smaller are kept as they are. The model is not faster for it, nor smaller once it is loaded.

    Args:
        directory: that `save_pretrained` or `alula.save_host` wrote, of safetensors.
        target: made, or replaced as a whole; may be the directory itself.

    Raises:
        HostError: no safetensors there, or they cannot be read. UsageError: it is coded already, or nothing in it would
            become smaller; ``target`` holds something else than a model. FilesError: the file system refused.

    Other files of weights, which transformers passes over (shards that the index does not name, ``pytorch_model.bin``),
    are left out.
    """
    directory = recovered(directory)
    if is_coded(directory):
        raise UsageError("its weights are coded already", where=str(directory))
    files = _weight_files(directory)
    plain = coded = 0
    tensors: dict[str, Any] = {}
    check_replaceable(target)
    with atomic_directory(target) as partial:
        waiting: dict[str, Tensor] = {}
        number = 0
        for name, value in _plain_tensors(files):
            pieces = _coded(value)
            plain, coded = plain + value.nbytes, coded + sum(piece.nbytes for piece in pieces.values())
            if waiting and sum(each.nbytes for each in waiting.values()) + value.nbytes > _FILE_BYTES:
                number, waiting = _write(partial, number, waiting)
            tensors[name] = {"file": _file(number), "shape": list(value.shape), "dtype": _name(value.dtype)}
            waiting |= {f"{kind}/{name}": piece for kind, piece in pieces.items()}
        _write(partial, number, waiting)
        if coded >= plain:
            raise UsageError(
                f"no tensor becomes smaller without its zeros: {plain:,} bytes would take {coded:,}",
                where=str(directory),
                remedy="prune it first: 7 % of zeros are needed in half precision, 4 % in float32",
            )
        write_json(partial / MANIFEST, {"alula_coding": _VERSION, "tensors": tensors})
        _copy_others(directory, partial, set(_weights_of_others(directory)))
    return Coded(plain, coded)


def decode(directory: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a coded directory as an ordinary one, which every loader of safetensors reads; complete or not at all.

    Raises:
        HostError: it is not coded, or damaged. UsageError: ``target`` holds something else than a model.
        FilesError: the file system refused.
    """
    directory = recovered(directory)
    manifest = _manifest(directory)
    check_replaceable(target)
    with atomic_directory(target) as partial:
        places: dict[str, str] = {}
        files = sorted({entry["file"] for entry in manifest.values()})
        for number, file in enumerate(files):
            own = {name: entry for name, entry in manifest.items() if entry["file"] == file}
            written = _SINGLE if len(files) == 1 else f"model-{number + 1:05}-of-{len(files):05}.safetensors"
            with telling(partial):
                save_file(_read(directory, file, own), partial / written, {"format": "pt"})
            places |= dict.fromkeys(own, written)
        if len(files) > 1:
            total = sum(_bytes(entry) for entry in manifest.values())
            write_json(partial / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        _copy_others(directory, partial, {directory / MANIFEST, *(directory / file for file in files)})
    return Path(target)


def read_coded(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All weights of a coded directory by name, on the CPU.

    Raises:
        HostError: it is not coded, or damaged.
    """
    directory = Path(directory)
    manifest, found = _manifest(directory), dict[str, Tensor]()
    for file in sorted({entry["file"] for entry in manifest.values()}):
        found |= _read(directory, file, {name: entry for name, entry in manifest.items() if entry["file"] == file})
    return found


# -- one tensor -------------------------------------------------------------------------------------------------------


def _coded(value: Tensor) -> dict[str, Tensor]:
    """What is written of a tensor: "kept" bits and "values", or "plain"."""
    flat = value.contiguous().flatten()
    integers = _AS_INTEGERS.get(value.element_size())
    if integers is None or not value.dtype.is_floating_point:
        return {"plain": value}
    there = flat.view(integers) != 0  # by their bits: -0.0 is no zero
    values = flat[there]
    bits = torch.from_numpy(np.packbits(there.numpy()))
    return {"kept": bits, "values": values} if bits.nbytes + values.nbytes < value.nbytes else {"plain": value}


def _decoded(kept: Tensor, values: Tensor, shape: tuple[int, ...], *, where: str) -> Tensor:
    count = math.prod(shape)
    if kept.dtype != torch.uint8 or kept.shape != (-(-count // 8),) or values.dim() != 1:
        raise _damaged(where)
    bits = np.unpackbits(kept.numpy())
    there = torch.from_numpy(bits[:count].astype(bool))
    if bits[count:].any() or int(there.sum()) != len(values):
        raise _damaged(where)
    found = torch.zeros(count, dtype=values.dtype)
    found[there] = values
    return found.view(shape)


# -- files ------------------------------------------------------------------------------------------------------------


def _weight_files(directory: Path) -> list[Path]:
    """Those that transformers would read."""
    single, index = directory / _SINGLE, directory / _INDEX
    found = [single] if single.is_file() else []
    if not found and index.is_file():
        told = read_json(index)
        named = told.get("weight_map") if isinstance(told, dict) else None
        found = [directory / str(name) for name in sorted(set(named.values()))] if isinstance(named, dict) else []
    if not found or not (directory / "config.json").is_file():
        raise HostError(
            "holds no config.json with model.safetensors, so there is nothing to code",
            where=str(directory),
            remedy="give a directory that save_pretrained or alula.save_host wrote",
        )
    if lacking := [file for file in found if not file.is_file()]:
        raise HostError("a shard that the index names is missing", where=str(lacking[0]), remedy="copy it again")
    return found


def _weights_of_others(directory: Path) -> list[Path]:
    return sorted({file for pattern in _WEIGHTS for file in directory.glob(pattern)})


def _plain_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise HostError(f"the weights cannot be read ({error})", where=str(file)) from error


def _file(number: int) -> str:
    return f"coded-{number + 1:05}.safetensors"


def _write(directory: Path, number: int, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    with telling(directory):
        save_file(dict(tensors), directory / _file(number))
    return number + 1, {}


def _copy_others(directory: Path, target: Path, without: set[Path]) -> None:
    with telling(target):
        for path in contents(directory):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            elif path not in without:
                shutil.copyfile(path, target / path.name)


def _manifest(directory: Path) -> dict[str, Any]:
    """By name of a tensor its file, shape and dtype."""
    where = directory / MANIFEST
    if not where.is_file():
        raise HostError("its weights are not coded", where=str(directory), remedy="load it as it is")
    if others := _weights_of_others(directory):
        raise HostError(
            f"holds coded weights and {others[0].name}: which of them are meant cannot be told",
            where=str(directory),
            remedy=f"remove {MANIFEST} with its coded-*.safetensors, or the others",
        )
    content = read_json(where)
    if not isinstance(content, dict) or content.get("alula_coding") != _VERSION:
        raise HostError(
            f"its coding is not version {_VERSION}, the one this alula knows",
            where=str(where),
            remedy="decode it with the version of alula that wrote it",
        )
    tensors = content.get("tensors")
    if not isinstance(tensors, dict) or not all(_is_entry(entry) for entry in tensors.values()):
        raise _damaged(str(where))
    return tensors


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"file", "shape", "dtype"}:
        return False
    file, shape, dtype = entry["file"], entry["shape"], entry["dtype"]
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    named = isinstance(file, str) and file == os.path.basename(file)
    return whole and named and isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)


def _read(directory: Path, file: str, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one coded file."""
    found, used = {}, set()
    where = directory / file
    if not where.is_file():
        raise HostError(f"{file} is missing, which its {MANIFEST} names", where=str(directory), remedy="copy it again")
    try:
        with safe_open(where, framework="pt") as opened:
            names = set(opened.keys())
            for name, entry in entries.items():
                shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
                plain, pieces = f"plain/{name}", (f"kept/{name}", f"values/{name}")
                if plain in names:
                    used.add(plain)
                    found[name] = opened.get_tensor(plain)
                elif names.issuperset(pieces):
                    used.update(pieces)
                    kept, values = (opened.get_tensor(piece) for piece in pieces)
                    found[name] = _decoded(kept, values, shape, where=f"{where}: {name}")
                else:
                    raise _damaged(f"{where}: {name}")
                if found[name].shape != shape or found[name].dtype != dtype:
                    raise _damaged(f"{where}: {name}")
    except SafetensorError as error:
        raise HostError(f"the weights cannot be read ({error})", where=str(where)) from error
    if names != used:
        raise _damaged(f"{where}: {sorted(names - used)[0]}")
    return found


def _damaged(where: str) -> HostError:
    return HostError("is not what its coding says", where=where, remedy="copy or write the model again")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(entry: Mapping[str, Any]) -> int:
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize
