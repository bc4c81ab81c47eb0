"""Directories that are whole or not there, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from alula.files import atomic_directory, restore_directories


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
