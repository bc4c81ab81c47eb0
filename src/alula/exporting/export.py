"""A model in one directory that needs nothing beside it, so that it can be copied, zipped and sent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from alula.errors import UsageError
from alula.files import atomic_directory, check_replaceable, read_json, recovered, telling, write_json
from alula.grafts.storage import CONFIG_FILE
from alula.hosts import names
from alula.hosts.directories import inspect_directory

HOST = "host"
BASE = "base_model_name_or_path"


def export_model(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """Copy a model directory; an adapter's host comes along and lies inside, as ``host``, where the adapter finds it.

    A host that is named by its hub id stays there. `alula.load_model(directory)` gives back what ``source`` does.

    Args:
        source: directory of a host, a text LLM, a PEFT adapter or an adapter of alula.
        directory: made; a model that is there is replaced as a whole.

    Raises:
        UsageError: ``source`` is no directory; ``directory`` lies inside it or its host, or around them, or holds other
            things than a model. HostError: ``source`` is no model.
    """
    path, target = directory_of(source), Path(directory)
    check_target(path, target)
    with telling(target), atomic_directory(target) as partial:
        copy_model(path, partial)
    return target


def directory_of(source: str | os.PathLike[str]) -> Path:
    """The directory of a model that is handed on, links followed.

    Raises:
        UsageError: it is none. HostError: it holds no model.
    """
    path = recovered(names.resolve(str(source), "llm"))
    if not path.is_dir():
        raise UsageError(
            "is no directory here", where=str(source), remedy="name a model or adapter directory, such as RUN/final"
        )
    path = path.resolve()
    if not (path / CONFIG_FILE).is_file():
        inspect_directory(path)
    return path


def check_target(path: Path, target: Path) -> None:
    """Refuse to write where something would be lost: over the model, or what is under it, or what is no model.

    Raises:
        UsageError: see `export_model`.
    """
    inside = target.resolve()
    kept: Path | None = path
    seen: list[Path] = []
    while kept is not None:
        if kept in seen:
            raise UsageError("the adapter names itself as its host", where=str(path), remedy=f"correct {BASE}")
        seen.append(kept)
        if inside == kept or inside.is_relative_to(kept) or kept.is_relative_to(inside):
            raise UsageError(f"lies inside {kept}, or around it", where=str(target), remedy="name another directory")
        kept = host_of(kept)
    check_replaceable(inside, folders=[HOST])


def host_of(path: Path) -> Path | None:
    """The local directory of an adapter's host; None for what is no adapter, or has its host on the hub.

    Raises:
        UsageError: the adapter names no host.
    """
    if not (path / CONFIG_FILE).is_file():
        return None
    base = read_json(path / CONFIG_FILE).get(BASE) or ""
    if not base:
        raise UsageError(
            "the adapter does not say which host it belongs to",
            where=str(path / CONFIG_FILE),
            remedy="save the host by save_host, and the adapter with base= its directory",
        )
    for found in (recovered(path / base), recovered(names.resolve(base, "llm"))):
        if found.is_dir():
            return found.resolve()
    if base.startswith((".", os.sep)):
        raise UsageError(f"its host {base} is not there", where=str(path), remedy=f"correct {BASE} in {CONFIG_FILE}")
    return None


def copy_model(path: Path, target: Path, *, hosts: bool = True) -> None:
    """Copy the files of a model into ``target``; an adapter's host too, as ``host``, unless ``hosts`` is off."""
    host = host_of(path)
    for file in sorted(path.iterdir()):
        if file.name.startswith(".") or (host is not None and file.resolve() == host):
            continue
        if file.is_dir():
            shutil.copytree(file, target / file.name, ignore_dangling_symlinks=True)
        elif file.is_file():
            shutil.copyfile(file, target / file.name)
    if host is not None and hosts:
        name = HOST
        while (target / name).exists():  # something of the adapter's own
            name += "_"
        (target / name).mkdir()
        copy_model(host, target / name)
        write_json(target / CONFIG_FILE, {**read_json(path / CONFIG_FILE), BASE: name})
