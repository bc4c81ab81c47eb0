"""Content that is whole or not there, also after a kill; what the file system refuses, told; pipes, not waited for."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from alula.cli import app as cli
from alula.data import open_source
from alula.data.captions import read_captions
from alula.data.records import RecordFile
from alula.errors import AlulaError, DataError, EvaluationError, FilesError, PathError, RecipeError, UsageError
from alula.evaluation import TaskResult
from alula.files import (
    append_text,
    atomic_directory,
    atomic_file,
    contents,
    files_error,
    read_json,
    recovered,
    regular,
    restore_directories,
    restore_directory,
    telling,
    write_json,
    write_text,
)
from alula.reports import read_curve
from alula.training import load_recipe


def written(folder: Path, text: str) -> None:
    with atomic_directory(folder) as partial:
        (partial / "content").write_text(text)


def killed(code: str, *arguments: object) -> None:
    """Run Python code in a process that kills itself."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=30)
    assert done.returncode == -signal.SIGKILL


# kills itself instead of the n-th rename from here on
KILL_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from alula.files import atomic_directory, write_text

target, count, rename = Path(sys.argv[1]), int(sys.argv[2]), Path.rename

def counting(self, other):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, other)

Path.rename = Path.replace = counting
"""
REPLACE = KILL_AT_RENAME + 'with atomic_directory(target) as partial:\n    (partial / "content").write_text("new")\n'
WRITE = KILL_AT_RENAME + 'write_text(target, "new")\n'


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    written(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "model") as partial:
        (partial / "content").write_text(str(1 / 0))
    assert (tmp_path / "model" / "content").read_text() == "old"
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "content").write_text("new")
        (partial / "content").chmod(0o600)
    assert (tmp_path / "model" / "content").read_text() == "new"
    (tmp_path / "plain").touch()
    assert (tmp_path / "model" / "content").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("target", [".", "..", "../here", ""])
def test_where_one_works_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine").touch()
    monkeypatch.chdir(here)
    with pytest.raises(PathError, match="runs"):
        written(Path(target), "lost")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in here.iterdir()] == ["mine"]
    written(here / "new", "kept")


def test_the_old_content_comes_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "model", "old")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(FilesError, match="no space"):
        written(tmp_path / "model", "new")
    assert (tmp_path / "model" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model", "m" * 250])
def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    written(target, "old")
    written(tmp_path / "model-2", "mine")
    killed(REPLACE, target, 2)  # the earlier content has been moved away, the new has not come
    assert not target.exists()
    assert (recovered(target) / "content").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "model-2"])
    killed(REPLACE, target, 2)
    written(target, "newer")  # whoever writes next recovers first
    assert (target / "content").read_text() == "newer"
    killed(REPLACE, target, 2)
    restore_directories(tmp_path.parent, below=True)
    assert (target / "content").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "model-2"])


def test_a_kill_before_the_name_leaves_nothing_that_counts(tmp_path: Path) -> None:
    killed(WRITE, tmp_path / "plan.json", 1)
    assert len(list(tmp_path.iterdir())) == 1
    assert contents(tmp_path) == []
    restore_directories(tmp_path)
    assert list(tmp_path.iterdir()) == []
    killed(WRITE, tmp_path / "plan.json", 1)
    write_json(tmp_path / "plan.json", {})  # whoever writes it next tidies up first
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_what_others_are_writing_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / ".backup-20260101.old").mkdir()
    (tmp_path / ".backup-20260101.old" / "letters").touch()
    (tmp_path / ".film.mp4-abcdefgh.partial").touch()
    with atomic_directory(tmp_path / "model") as partial:
        code = "import sys, pathlib, alula.files as f; f.restore_directories(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=30)
        (partial / "content").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".backup-20260101.old", ".film.mp4-abcdefgh.partial", "model"
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / ".backup-20260101.old").iterdir()] == ["letters"]


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "model") as partial:
        restore_directory(tmp_path / "model")
        written(tmp_path / "model", "another's")
        assert partial.is_dir()
        (partial / "content").write_text("mine")
    assert (tmp_path / "model" / "content").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def write_directory(path: Path) -> None:
    written(path, "new")


def write_file(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.touch()


def write_words(path: Path) -> None:
    write_text(path, "new")


WRITERS = [write_directory, write_file, write_words]


@pytest.mark.parametrize("write", [*WRITERS, lambda path: append_text(path, "new")])
def test_paths_that_cannot_be(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letters").touch()
    (tmp_path / "round").symlink_to("round")
    places = [tmp_path / "file" / "there", tmp_path / "file" / "there" / "in", tmp_path / ("x" * 256)]
    places += [tmp_path / ("file" if write is write_directory else "folder"), tmp_path / "round" / "there"]
    for place in places:
        with pytest.raises(PathError) as caught:
            write(place)
        assert caught.value.exit_code == UsageError.exit_code == 2
        assert str(tmp_path) in (caught.value.where or "")
        assert ".partial" not in str(caught.value)
        assert caught.value.remedy
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "round"]


@pytest.mark.parametrize("write", WRITERS)
def test_names_as_long_as_the_file_system_takes(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / ("é" * 127))
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(FilesError, match="limit") as caught:
            write_text(tmp_path / "letter", "x" * 2000)
        with pytest.raises(FilesError, match="limit"):
            append_text(tmp_path / "rows", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.where, caught.value.exit_code) == (str(tmp_path / "letter"), 1)
    assert "make room" in (caught.value.remedy or "")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    # safetensors tells errors of the system in its own words
    told = files_error(SafetensorError("Error while serializing: I/O error: No space (os error 28)"), "here")
    assert told is not None
    assert (told.message, told.where) == ("no space is left on the device", "here")
    assert files_error(SafetensorError("header too large"), "here") is None
    with pytest.raises(FilesError, match="written whole") as caught, telling("here"):  # and so does torch
        torch.save(torch.zeros(1000), "/dev/full")
    assert caught.value.where == "here"


def test_pipes_are_refused_by_name_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refusals: list[AlulaError] = []

    def work() -> None:
        for open_it in (regular, read_json, lambda path: append_text(path, "x")):
            try:
                open_it(pipe)
            except FilesError as error:
                refusals.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert [(error.message, error.where) for error in refusals] == [("is a named pipe, not a file", str(pipe))] * 3
    write_text(pipe, "a file in its place")  # a rename does not open it
    assert regular(pipe).read_text() == "a file in its place"
    assert regular(tmp_path / "none") == tmp_path / "none"
    with pytest.raises(FilesError, match="is a directory"):
        regular(tmp_path)


def test_json_comes_back_and_damage_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}
    for damaged in (b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        (tmp_path / "a.json").write_bytes(damaged)
        with pytest.raises(FilesError, match="damaged"):
            read_json(tmp_path / "a.json")


READERS = {
    "records": (lambda path: RecordFile(path), DataError),
    "captions": (lambda path: read_captions(path), DataError),
    "result": (lambda path: TaskResult.load(path), EvaluationError),
    "curve": (lambda path: read_curve(path), EvaluationError),
    "recipe": (lambda path: load_recipe(path), RecipeError),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_cannot_be_read_is_told_alike_whoever_reads_it(reader: str, tmp_path: Path) -> None:
    read, kind = READERS[reader]
    lost = tmp_path / "lost.json"
    with pytest.raises(kind, match=r"lost\.json: cannot be read: No such file or directory") as told:
        read(lost)
    assert told.value.remedy


@pytest.mark.parametrize("reader", READERS)
def test_a_path_where_nothing_can_be_read_is_told_whoever_reads_it(reader: str, tmp_path: Path) -> None:
    read, kind = READERS[reader]
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00{")
    names = ["round", "bytes/inside", "a" * 300, "null\0", "half\udfff", "."]
    for name in [*names, *([] if reader == "records" else ["bytes"])]:  # which are bad records
        with pytest.raises((kind, FilesError, DataError)) as told:
            read(tmp_path / name)
        assert told.value.where


@pytest.mark.parametrize("key", ["jsonl", "llava", "coco", "dataset", "webdataset"])
def test_a_source_where_nothing_can_be_is_told(key: str, tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    for name in ("round", "a" * 300, "null\0"):
        with pytest.raises(AlulaError, match=r"circle|too long|such a name"):
            open_source({key: str(tmp_path / name)})


def test_a_working_directory_that_was_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(DataError, match="cannot be read: No such file") as lost:
        RecordFile(tmp_path / "lost.jsonl")
    assert lost.value.remedy == "check the path"
    with pytest.raises(FilesError, match="the working directory was removed"):
        RecordFile("lost.jsonl")
    monkeypatch.setattr(sys, "argv", ["alula", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
