"""Writing so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside ``target``; on success it takes that name, on error it vanishes.

    An existing ``target`` is replaced only once the new content is complete. A process killed inside leaves a
    directory whose name starts with ``.`` and ends with ``.partial`` and never one under the final name; killed between
    the two renames, it leaves the earlier content in one that ends with ``.old`` (see `restore_directories`).
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for path in partial.rglob("*"):  # some writers (safetensors) make files that only their owner can read
            if path.is_file() and not path.is_symlink():
                path.chmod(0o666 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".old", dir=target.parent))
            target.rename(old / target.name)
            try:
                partial.rename(target)
            except BaseException:
                (old / target.name).rename(target)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore_directories(folder: Path) -> None:
    """Undo what a kill inside `atomic_directory` left in ``folder``: earlier content returns, partial content goes."""
    for path in folder.glob(".*.old"):
        for content in path.iterdir():
            if not (folder / content.name).exists():
                content.rename(folder / content.name)
        shutil.rmtree(path)
    for path in folder.glob(".*.partial"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` to write to; on success it takes that name, on error it vanishes."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}-{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` (UTF-8) to ``target`` atomically and return the path."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    return target


def write_json(target: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON to ``target`` atomically; NaN and infinities are refused."""
    return write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
