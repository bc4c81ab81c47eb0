"""What the command line says of errors: a sentence with place and remedy, an exit code; a traceback only if asked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alula.cli import app as cli

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def alula(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: arguments -> exit code, and what it says on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alula", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


def test_paths_that_cannot_be_are_wrong_usage(alula: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"messages": []}\n')
    recipe = tmp_path / "recipe.yaml"
    stage = "{name: s, method: projector, train: {projector: 0.1}, data: {sources: [{microworld: visual}]}, steps: 1}"
    recipe.write_text(f"name: n\nhost: {{llm: fledgling, vision: fledgling}}\nstages: [{stage}]\noutput_dir: {file}\n")
    for arguments in (
        ("data", "export", "text", file / "there", "-n", 1),
        ("data", "export", "text", tmp_path / ("x" * 300), "-n", 1),
        ("train", recipe),
        ("train", recipe, "--set", f"output_dir={file}/there"),
        ("train", recipe, "--set", f"output_dir={tmp_path / ('x' * 300)}"),
        ("train", tmp_path),
        ("quickstart", "--output", file),
        ("quickstart", "--output", tmp_path / ("x" * 300)),
        ("audit", "fledgling", "--output", file),
        ("eval", "fledgling", "--task", "text_bare", "--n", 1, "--max-new-tokens", 1, "--output", file),
    ):
        code, said = alula(*arguments)
        assert code == 2, (arguments, said)
        assert "error" in said
        assert str(tmp_path) in said.replace("\n", "")
        assert "remedy" in said
        assert "Traceback" not in said
        assert ".partial" not in said


def test_data_that_is_not_there_is_told_with_its_key_and_where_paths_start(
    alula: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = "[{microworld: visual}, {llava: vis/dat.json}]"
    stage = f"{{name: s, method: projector, train: {{projector: 0.1}}, data: {{sources: {sources}}}, steps: 1}}"
    Path("bad.yaml").write_text(
        f"name: n\nhost: {{llm: fledgling, vision: fledgling}}\nstages: [{stage}]\noutput_dir: out\n"
    )
    remedy = f"remedy check the path: relative ones start from the working directory, {tmp_path}"
    for arguments, where in (
        (("train", "bad.yaml", "--check"), "stages.s.data.sources.1: vis/dat.json: cannot be read: No such file"),
        (("eval", "fledgling", "--task", "data:vis/dat.json"), "error vis/dat.json: cannot be read: No such file"),
    ):
        code, said = alula(*arguments)
        assert code == 1
        assert where in said
        assert remedy in said


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100, 100)); from alula.cli.app import main; main()"
    words = [sys.executable, "-c", code, "data", "export", "text", str(tmp_path / "out"), "-n", "20"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{tmp_path}/out" in done.stderr
    assert "limit" in done.stderr
    assert "remedy" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/data/x"), "/data/x: the device failed"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/\x1b[31mx"), "/data/\\x1b[31mx: permission denied"),
        (OSError("Can't load it.\nMany lines follow."), "OSError: Can't load it."),
        (ValueError("Caught\nTraceback (most recent call last):\n  x\nValueError: late"), "error ValueError: late"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (MemoryError(), "memory ran out"),
    ],
)
def test_errors_that_nobody_expected(
    alula: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, tmp_path: Path
) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("alula_fledgling.export.export_microworld", stumble)
    command = ("data", "export", "text", tmp_path / "out")
    code, told = alula(*command)
    assert code == 1
    assert said in told.replace("\n", " ")
    assert "Traceback" not in told
    code, told = alula("--debug", *command)
    assert code == 1
    assert "Traceback (most recent call last)" in told


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["eval"], "alula eval: missing argument 'model'\nremedy `"),
        (["evil"], "alula: no such command 'evil'. Did you mean 'eval'?"),
        (["audit", "x", "--itmes", "3"], "--itmes"),
        (["train"], "alula train: invalid value for RECIPE: name a recipe file"),
    ],
)
def test_what_is_typed_wrong_is_told_as_any_other_error(alula: Run, typed: list[str], said: str) -> None:
    code, told = alula(*typed)
    assert code == 2
    assert said in told
    assert "\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}" not in told
    assert "remedy" in told


def test_names_that_are_no_utf_8_can_be_shown(tmp_path: Path) -> None:
    file = os.fsencode(tmp_path) + b"/data-\xff.jsonl"
    with open(file, "w") as stream:
        stream.write('{"messages": []}\n')
    words = [sys.executable, "-m", "alula", "data", "check", os.fsdecode(file)]
    done = subprocess.run(
        words, capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    )
    assert done.returncode == 1
    assert b"data-\\udcff.jsonl:1: record: " in done.stdout
    assert b"Traceback" not in done.stderr


def test_help_is_in_paragraphs_and_names_no_type_behind_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["alula", "train", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "resumes when the same command is given again." in " ".join(shown.split())
    assert "given \n again." not in shown
    assert [line for line in shown.splitlines() if "<bool>" in line and "--help" not in line] == []
