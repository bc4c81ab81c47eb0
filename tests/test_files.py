"""Directories that are whole or not there, also after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alula.files import atomic_directory, restore_directories, restore_directory


def written(folder: Path, text: str) -> None:
    with atomic_directory(folder) as partial:
        (partial / "content").write_text(text)


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


def test_the_old_content_comes_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "model", "old")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path / "model", "new")
    assert (tmp_path / "model" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".model-x.old" / "model").mkdir(parents=True)
    (tmp_path / ".model-x.old" / "model" / "content").write_text("old")
    (tmp_path / ".model-y.partial").mkdir()
    restore_directories(tmp_path)
    assert (tmp_path / "model" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KILLED = """
import os, sys
from pathlib import Path
from alula.files import atomic_directory

rename = Path.rename

def last(self, target):
    if self.suffix == ".partial":
        os._exit(9)
    return rename(self, target)

Path.rename = last
with atomic_directory(sys.argv[1]) as partial:
    (partial / "content").write_text("new")
    if sys.argv[2:]:
        os._exit(9)
"""


@pytest.mark.parametrize("when", ["while writing", "between the renames"])
def test_what_a_killed_writer_left_is_undone_by_the_next_reader_and_writer(tmp_path: Path, when: str) -> None:
    (tmp_path / "model-x").mkdir()  # another's, of a name that begins alike
    arguments = [str(tmp_path / "model"), *(["early"] if when == "while writing" else [])]
    for again in (lambda: restore_directory(tmp_path / "model"), lambda: written(tmp_path / "model", "newer")):
        written(tmp_path / "model", "old")
        assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == 9
        assert (tmp_path / "model").exists() == (when == "while writing")
        again()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-x"]
    assert (tmp_path / "model" / "content").read_text() == "newer"


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "model") as partial:
        restore_directory(tmp_path / "model")
        written(tmp_path / "model", "another's")
        assert partial.is_dir()
        (partial / "content").write_text("mine")
    assert (tmp_path / "model" / "content").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
