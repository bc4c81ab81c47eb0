"""Progress down a pipe: lines now and then, whole labels, nothing that a terminal alone understands."""

from __future__ import annotations

import pytest

from alula import progress
from alula.jobs import Job, run_jobs


def test_lines_stand_in_for_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.bar(4, True) as told:
        for _ in range(4):
            told.advance("runs/a/very/long/path/of/a/model/final: interleaved dialogues", 1)
    said = capsys.readouterr().err
    assert said == "runs/a/very/long/path/of/a/model/final: interleaved dialogues: 4/4 in 0:00:00\n"
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.bar(4, True) as told:
        for _ in range(4):
            told.advance("asking", 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" in")[0] for line in lines] == [f"asking: {n}/4" for n in (1, 2, 3, 4)], "each once"
    with progress.bar(4, False) as told:
        told.advance("asking", 4)
    assert capsys.readouterr().err == ""


def _nothing() -> None:
    """A job."""


def test_jobs_tell_how_far_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    run_jobs([Job("one", _nothing, ()), Job("two", _nothing, (), after=("one",))], label="study", workers=0)
    said = capsys.readouterr().err
    assert said == "study: 2 jobs; each is told when it is done\ndone: one\ndone: two\n"


def test_labels_are_no_markup_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories may have brackets in their names."""
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.setenv(name, "1")
    with progress.bar(2, True) as told:
        assert told.progress is not None
        for label in ("runs/[/x]/final", "runs/[red]/final"):
            told.advance(label, 1)
            told.progress.refresh()
    said = capsys.readouterr().err
    assert "runs/[/x]/final" in said
    assert "runs/[red]/final" in said


def test_long_labels_keep_their_end() -> None:
    assert progress.shortened("x" * 50 + ": visual skill").endswith(": visual skill")
    assert len(progress.shortened("x" * 50)) == 40
    assert progress.shortened("short") == "short"
