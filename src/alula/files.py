"""Writing so that nothing half-written is ever found under its final name, and errors that say what a disk refused.

Content grows in a directory beside its place, ``.NAME-XXXXXXXX.partial``, and is renamed when it is complete. Where a
directory is replaced, the earlier one waits in ``.NAME-XXXXXXXX.old`` until the new one has its name. A process holds a
lock on such a directory while it works in it and loses the lock however it ends, so that what a kill leaves behind can
be told from what another process is writing (`restore_directory`, `restore_directories`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from alula.errors import AlulaError, FilesError, PathError

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]
_Kind = TypeVar("_Kind", bound=AlulaError)

_LEFTOVER = re.compile(r"\.(?P<name>.+)-[a-z0-9_]{8}\.(?:partial|old)")
_LONGEST = 200  # bytes of a name that leave room for what a leftover's name adds, in the 255 that file systems allow
_OS_ERROR = re.compile(r"os error (\d+)")  # how the Rust libraries below us tell errors of the system

# and how torch.save tells that the disk took less than it was given
_TORCH_SAVE = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")

_ROOM = "make room there or name another place, then give the same command again"
_TOLD: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space is left on the device", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("the file grew larger than the file system or its limit allows", _ROOM),
    errno.EROFS: ("the file system is read-only", "name another place"),
    errno.EACCES: ("permission denied", "name another place, or ask for the right to use this one"),
    errno.EPERM: ("the operation is not permitted there", "name another place"),
    errno.EIO: ("the device failed (input/output error)", "check the disk, or name another place"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n`), or ask for fewer workers"),
    errno.ENFILE: ("too many files are open on this machine", "close some programs, or ask for fewer workers"),
    errno.ENOENT: ("no such file or directory", "check the path"),
}
_WRONG_PATH: dict[int, tuple[str, str]] = {
    errno.ENOTDIR: ("a file stands where a directory is meant", "name another place"),
    errno.EEXIST: ("a file stands where a directory is meant", "name another place"),
    errno.EISDIR: ("a directory stands where a file is meant", "name another place"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "name a shorter path"),
    errno.ELOOP: ("the symbolic links there lead in a circle", "name another place"),
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# -- errors -----------------------------------------------------------------------------------------------------------


def files_error(error: BaseException, path: PathLike | None = None) -> FilesError | None:
    """The error in words: what happened, where, and the remedy; None for one that is not the file system's.

    Args:
        error: an OSError, or what safetensors and `torch.save` raise in its place.
        path: where it happened, unless the error knows better.
    """
    if isinstance(error, SafetensorError) and (found := _OS_ERROR.search(str(error))):
        code = int(found[1])
        error = OSError(code, os.strerror(code))
    if isinstance(error, RuntimeError) and _TORCH_SAVE.search(str(error)):
        where = None if path is None else os.fspath(path)
        return FilesError("a file could not be written whole, as on a full disk", where=where, remedy=_ROOM)
    if not isinstance(error, OSError) or error.errno is None:  # libraries raise bare ones for reasons of their own
        return None
    where = None if path is None else os.fspath(path)
    if isinstance(error.filename, str | bytes) and not (where and _inside_leftover(os.fsdecode(error.filename))):
        where = os.fsdecode(error.filename)
    code = error.errno
    if code == errno.ENOENT and error.filename is None and _working_directory() is None:
        return FilesError("the working directory was removed", remedy="change to one that is there (`cd`)")
    kind = PathError if code in _WRONG_PATH else FilesError
    plain = error.strerror or os.strerror(code)
    message, remedy = {**_TOLD, **_WRONG_PATH}.get(code, (plain[0].lower() + plain[1:], None))
    return kind(message, where=where, remedy=remedy)


def unreadable(error: Exception, path: PathLike, kind: type[_Kind], *, remedy: str | None = None) -> _Kind:
    """What is said of a file that could not be opened, read or decoded for that reason.

    Args:
        kind: of error.
        remedy: by default, where nothing is at ``path``, to check it.
    """
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if remedy is None and isinstance(error, FileNotFoundError):
        remedy = check_path(path)
    return kind(f"cannot be read: {said}", where=os.fspath(path), remedy=remedy)


def absolute(path: PathLike) -> Path:
    """``path`` from the root; links are not followed, and nothing needs to be there.

    Raises:
        FilesError: it starts from the working directory, which was removed; or nothing can be there, as the name is too
            long or links lead in a circle.
    """
    with telling(path), _nameable(path):
        found = Path(os.path.abspath(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(found)
    return found


@contextlib.contextmanager
def _nameable(path: PathLike) -> Iterator[None]:
    """Inside, a null character or half a surrogate pair in ``path`` is told: Python refuses it by a ValueError."""
    try:
        yield
    except ValueError:
        raise PathError("no file can have such a name", where=repr(os.fspath(path)), remedy="correct it") from None


def check_path(path: PathLike) -> str:
    """The remedy for a path where nothing is: where it started from, unless it was plainly meant from the root."""
    here = _working_directory()
    if os.path.isabs(path) and (here is None or not Path(path).is_relative_to(here)):
        return "check the path"
    return f"check the path: relative ones start from the working directory, {here or 'which was removed'}"


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def telling(path: PathLike) -> Iterator[None]:
    """Inside, what the file system refuses is raised as a FilesError about ``path``."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = files_error(error, path)
        if told is None:
            raise
        raise told from error


# -- reading ----------------------------------------------------------------------------------------------------------


def irregular(path: PathLike) -> str | None:
    """What stands at ``path`` in place of a file, such as "a named pipe", which opening would wait for; else None.

    Raises:
        OSError, ValueError: as `os.stat`, unless nothing is there.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def regular(path: PathLike) -> Path:
    """``path``, which can be opened without waiting for somebody at its other end (or is not there).

    Raises:
        FilesError: a directory, named pipe, socket or device stands there.
    """
    with telling(path), _nameable(path):
        found = irregular(path)
    if found is not None:
        raise PathError(f"is {found}, not a file", where=os.fspath(path), remedy="put a regular file there")
    return Path(path)


def regular_files(directory: PathLike) -> Path:
    """``directory``, in which everything but its folders can be opened without waiting.

    Raises:
        FilesError: it holds a named pipe, socket or device, or cannot be listed.
    """
    with telling(directory):
        for path in sorted(Path(directory).iterdir()):
            if not path.is_dir():
                regular(path)
    return Path(directory)


def read_json(path: PathLike) -> Any:
    """The JSON value that `write_json` wrote to ``path``.

    Raises:
        FilesError: it cannot be read, is not a regular file, or was damaged.
    """
    try:
        with telling(path):
            return json.loads(regular(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise FilesError(f"is damaged, no JSON ({error})", where=os.fspath(path), remedy="remove it") from None


# -- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(target: PathLike) -> Iterator[Path]:
    """Yield a temporary directory beside ``target``; on success it takes that name, on error it vanishes.

    An existing ``target`` is replaced only once the new content is complete. A process killed inside never leaves a
    half-written one under that name; killed between the two renames, it leaves none: see `restore_directory`,
    which is called here first.

    Where ``target`` is a symbolic link, what it leads to is replaced.

    Raises:
        FilesError: the file system refused something, also inside the block. PathError: a file stands there, or
            ``target`` is the directory this process works in, or around it.
    """
    target = Path(target)
    with telling(target):
        if target.is_symlink():
            target = Path(os.path.realpath(target))
        if target.exists() and not target.is_dir():
            raise PathError("a file stands where a directory is meant", where=str(target), remedy="name another place")
        if target.exists() and _works_in(target):
            raise PathError(
                "is where this command runs, or around it, and would be replaced as a whole",
                where=str(target),
                remedy="name a new directory inside it, or run the command from elsewhere",
            )
        restore_directory(target)
        with _workplace(target, "partial") as partial:
            yield partial
            partial.chmod(0o777 & ~_umask())
            for path in partial.rglob("*"):  # some writers (safetensors) make files that only their owner can read
                if path.is_file() and not path.is_symlink():
                    path.chmod(0o666 & ~_umask())
            if not os.path.lexists(target):
                partial.rename(target)
                return
            with _workplace(target, "old") as old:  # leaving it, the earlier content goes back or goes
                target.rename(old / target.name)
                partial.rename(target)


@contextlib.contextmanager
def atomic_file(target: PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to (or to make a symbolic link at); on success it is ``target``, on error gone.

    Raises:
        FilesError: the file system refused something, also inside the block. PathError: a directory stands there.
    """
    target = Path(target)
    restore_directory(target)
    with telling(target), _workplace(target, "partial") as folder:
        partial = folder / target.name
        yield partial
        if not partial.is_symlink():
            partial.chmod(0o666 & ~_umask())
        partial.replace(target)


def write_text(target: PathLike, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``target`` atomically and return the path.

    Raises:
        FilesError: the file system refused. PathError: a directory stands there.
    """
    with atomic_file(target) as partial, partial.open("wb") as stream:
        stream.write(_bytes(text))
        stream.flush()
        os.fsync(stream.fileno())
    return Path(target)


def write_json(target: PathLike, value: Any) -> Path:
    """Write ``value`` as indented JSON to ``target`` atomically; NaN and infinities are refused."""
    return write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_text(target: PathLike, text: str, *, sync: bool = False) -> None:
    """Append ``text`` (UTF-8) to ``target``, made where absent; several processes may append whole lines.

    Args:
        sync: return only when it is on the disk.

    Raises:
        FilesError: the file system refused, or something else than a file stands there.
    """
    regular(target)
    with telling(target):
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            left = _bytes(text)
            while left:  # one write, unless the disk took only a part: lines of different processes do not interleave
                left = left[os.write(handle, left) :]
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)


MODEL_FILES = ("config.json", "adapter_config.json")
"""what a model or an adapter is known by"""
_MODEL_FOLDERS = ("additional_chat_templates", "codes", ".cache")
"""what savers and downloads of models make beside their files"""


def check_replaceable(
    target: PathLike, *, what: str = "a model", files: Collection[str] = MODEL_FILES, folders: Collection[str] = ()
) -> None:
    """Refuse to write a model over what is none, or has something beside it.

    Args:
        what, files: what else than a model is written, and by which of its files it is known.
        folders: which may go with the model that is there; any other, such as a checkpoint or ``.git``, is somebody's.

    Raises:
        PathError: a directory of other things stands there, or holds a folder beside a model.
    """
    path = Path(target)
    if not path.is_dir():
        return
    held = contents(path)
    if held and not any((path / name).is_file() for name in files):
        raise PathError(
            f"holds other things than {what}, which would be lost", where=str(path), remedy="name a new directory"
        )
    others = [each.name for each in held if each.is_dir() and each.name not in (*_MODEL_FOLDERS, *folders)]
    if others:
        raise PathError(
            f"holds {others[0]}/ beside {what}, which would be lost",
            where=str(path),
            remedy=f"name a new directory, or move {others[0]}/ out of this one",
        )


# -- after a kill -----------------------------------------------------------------------------------------------------


def restore_directory(target: PathLike) -> None:
    """Undo what a kill left while ``target`` was written: earlier content returns to its name, partial content goes.

    Whoever writes ``target`` here next does it first.

    What another process is at work on stays, and so does what cannot be changed.
    """
    target = Path(target)
    for leftover, name in _leftovers(target.parent):
        if name == _short(target.name):
            _settle(leftover)


def recovered(path: PathLike) -> Path:
    """``path``, for a reader: where nothing has that name, what a killed writer hid is brought back first."""
    if not os.path.exists(path):
        restore_directory(os.path.realpath(path))  # where a link points
    return Path(path)


def restore_directories(folder: Path, *, below: bool = False) -> None:
    """`restore_directory` for all that was written in ``folder``, and with ``below`` in the folders below it."""
    for leftover, _ in _leftovers(folder):
        _settle(leftover)
    if below and folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                restore_directories(path, below=True)


def contents(folder: PathLike) -> list[Path]:
    """What is in ``folder``, leaving out what a kill left there or another process is writing."""
    with telling(folder):
        return sorted(path for path in Path(folder).iterdir() if _intended(path) is None)


def _intended(path: Path) -> str | None:
    """The name (shortened where it is very long) that a leftover was to get or had; None for anything else."""
    match = _LEFTOVER.fullmatch(path.name)
    return match["name"] if match is not None and path.is_dir() and not path.is_symlink() else None


def _leftovers(folder: Path) -> list[tuple[Path, str]]:
    try:
        with os.scandir(folder) as entries:
            hidden = sorted(entry.name for entry in entries if entry.name.startswith("."))
    except OSError:
        return []
    found = [(folder / name, _intended(folder / name)) for name in hidden]
    return [(path, name) for path, name in found if name is not None]


def _settle(leftover: Path) -> None:
    with contextlib.suppress(OSError):  # somebody is at work on it, it is gone by now, or it must stay as it is
        handle = _hold(leftover)
        try:
            _undo(leftover, removing=handle is not None)
        finally:
            if handle is not None:
                os.close(handle)


def _undo(leftover: Path, *, removing: bool) -> None:
    """Give back the earlier content in a leftover whose name is free; ``removing``, drop all the rest."""
    if leftover.suffix == ".old":
        for content in leftover.iterdir():
            if _short(content.name) != _intended(leftover):
                return  # not of our making
            if not os.path.lexists(leftover.parent / content.name):
                content.rename(leftover.parent / content.name)
    if removing:
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.rmdir()  # if it is empty


def _hold(path: Path) -> int | None:
    """Lock ``path`` as long as the descriptor that is returned is open; None where there are no locks.

    Raises:
        BlockingIOError: another process holds it. OSError: it is gone, or a symbolic link.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _workplace(target: Path, kind: str) -> Iterator[Path]:
    """A locked directory for the writing of ``target``, beside it; settled when the block ends, however it ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path, handle = _made(target, kind)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            _undo(path, removing=True)
        if handle is not None:
            os.close(handle)


def _made(target: Path, kind: str) -> tuple[Path, int | None]:
    while True:
        prefix = f".{_short(target.name)}-"
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=f".{kind}", dir=target.parent))
        try:
            handle = _hold(path)
        except (BlockingIOError, FileNotFoundError):  # taken for a leftover before it was locked
            continue
        if path.is_dir():
            return path, handle
        if handle is not None:
            os.close(handle)


def _works_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder.resolve())
    except OSError:  # somebody removed it
        return False


def _bytes(text: str) -> bytes:
    """UTF-8; half a surrogate pair, which has no bytes in it, as the escape that it is in JSON."""
    return text.encode(errors="backslashreplace")


def _short(name: str) -> str:
    return os.fsencode(name)[:_LONGEST].decode(errors="ignore")


def _inside_leftover(path: str) -> bool:
    return any(_LEFTOVER.fullmatch(part) for part in Path(path).parts)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
