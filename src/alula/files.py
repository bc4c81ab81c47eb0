"""Writing so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

_NEW, _PARTIAL, _OLD = ".new", ".partial", ".old"


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside ``target``; on success it takes that name, on error it vanishes.

    An existing ``target`` is replaced only once the new content is complete: it steps aside into a directory whose
    name starts with ``.`` and ends with ``.old``, the new content takes its name, and only then it is removed. A
    process killed inside leaves a directory that ends with ``.partial`` and never one under the final name; killed
    between the two renames, it leaves the earlier content in the ``.old`` one, from which `restore_directory` brings it
    back.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_directory(target)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=_NEW, dir=target.parent))
    with _held(fresh):
        partial = fresh.rename(fresh.with_suffix(_PARTIAL))  # once it is held, so that nobody takes it for abandoned
        try:
            yield partial
            partial.chmod(0o777 & ~_umask())
            for path in partial.rglob("*"):  # some writers (safetensors) make files that only their owner can read
                if path.is_file() and not path.is_symlink():
                    path.chmod(0o666 & ~_umask())
            if target.exists():
                old = partial.with_suffix(_OLD)
                old.mkdir()
                target.rename(old / target.name)
                try:
                    partial.rename(target)
                except BaseException:
                    (old / target.name).rename(target)
                    old.rmdir()
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def restore_directory(target: str | os.PathLike[str]) -> None:
    """Undo what a kill inside ``atomic_directory(target)`` left: earlier content returns, partial content goes.

    What a living process writes there is left alone.
    """
    target = Path(target)
    ours = re.compile(rf"\.{re.escape(target.name)}-[^.-]+({_PARTIAL}|{_OLD})")
    for path in sorted(target.parent.glob(".*")) if target.parent.is_dir() else ():
        if ours.fullmatch(path.name) and not _being_written(path):
            with contextlib.suppress(OSError):  # another process may be doing the same
                if path.suffix == _OLD and not target.exists():
                    (path / target.name).rename(target)
                shutil.rmtree(path)


def recovered(path: str | os.PathLike[str]) -> Path:
    """``path``, for a reader: where nothing has that name, what a killed writer hid is brought back first."""
    path = Path(path)
    if not path.exists():
        restore_directory(path.resolve())  # where a link points
    return path


def restore_directories(folder: Path) -> None:
    """Undo what kills inside `atomic_directory` left in ``folder``; for callers who know that nobody writes there."""
    for path in folder.glob(f".*{_OLD}"):
        for content in path.iterdir():
            if not (folder / content.name).exists():
                content.rename(folder / content.name)
        shutil.rmtree(path)
    for path in (*folder.glob(f".*{_PARTIAL}"), *folder.glob(f".*{_NEW}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold ``folder``, under whatever name, as being written; the hold ends with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _being_written(path: Path) -> bool:
    """Whether a process that lives, or may live, writes what `atomic_directory` will put in place of ``path``."""
    partial = path.with_suffix(_PARTIAL)
    if fcntl is None:
        return path == partial
    try:
        handle = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


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
