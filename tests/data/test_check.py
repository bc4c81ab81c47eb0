"""`alula data`: what it counts, what it lists, how it exits."""

from __future__ import annotations

import io
import json
import os
import wave
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from alula.cli import data as command
from alula.data import open_source
from alula.data.check import check
from alula.data.errors import RecordError
from alula.errors import UsageError
from alula.evaluation import data_task
from alula_fledgling import microworld
from alula_fledgling.cli import export
from alula_fledgling.export import export_microworld

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.fixture
def run():
    app = typer.Typer()
    command.register(app)
    export.register(app)
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def bad_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    asked = {"role": "user", "content": "<image>\nwhat?"}
    records = [
        {"messages": [asked, ANSWER], "images": ["good.png"]},
        {"messages": [USER, ANSWER]},
        {"id": "cut", "messages": [asked, ANSWER], "images": ["cut.png"]},
        {"messages": [asked, ANSWER], "images": ["none.png"]},
        {"messages": [asked, ANSWER], "images": ["good.png", "good.png"]},
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": "<image><image>?"}, ANSWER], "images": ["cut.png", "none.png"]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{oops\n")
    return path


def test_counts_and_faults(bad_file) -> None:
    report = check(bad_file)
    assert (report.samples, report.text_only, report.images, report.placeholders) == (8, 1, 7, 6)
    assert dict(report.turns) == {"user": 2, "assistant": 2}
    assert [(record.line, record.kind) for record in report.bad] == [
        (3, "image"),
        (4, "image"),
        (5, "placeholders"),
        (6, "unsupervised"),
        (7, "image"),
        (8, "record"),
    ]
    assert report.bad[0].id == "cut"
    assert "1 image placeholder(s) but 2 image(s)" in report.bad[2].reason
    assert "cut.png" in report.bad[4].reason
    assert "none.png" in report.bad[4].reason
    assert [record.line for record in check(bad_file, prompts=True).bad] == [3, 4, 5, 7, 8]


def odd(record: object) -> str:
    return json.dumps(record) + "\n"


def test_records_nobody_thought_of_are_told_by_line(tmp_path, run, monkeypatch) -> None:
    """What JSON may hold and Python, the file system or a decoder cannot take."""
    os.mkfifo(tmp_path / "pipe.png")
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8))
    (tmp_path / "odd.wav").write_bytes(sound.getvalue()[:16] + b"\xff\xff\xff\x7f" + sound.getvalue()[20:])
    ask = [{"role": "user", "content": "<image>\nwhat?"}, ANSWER]
    heard = [{"role": "user", "content": [{"type": "audio", "path": "odd.wav"}, {"type": "text", "text": "?"}]}, ANSWER]
    lines = [odd({"messages": ask, "images": [image]}) for image in (
        "a\0b.png", "\ud800.png", {"bytes": "text"}, {"bytes": [1, 2]}, {"bytes": 5}, "pipe.png", "."
    )]  # fmt: skip
    lines += [odd({"messages": [{"role": "user", "content": [{"type": "video", "video": {"bytes": "text"}}]}, ANSWER]})]
    lines += [odd({"messages": heard}), odd({"messages": [USER, ANSWER], "n": 0}).replace("0}", "1" * 5000 + "}")]
    lines += ["[" * 100_000 + "]" * 100_000 + "\n", odd({"messages": [USER, ANSWER]})]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(lines))
    report = check(path, form="jsonl")
    assert [record.line for record in report.bad] == list(range(1, 12))
    told = [
        *["no file can have such a name"] * 2,
        *["are str: 'text'", "are list", "are int", "is a named pipe, not a file", "is a directory", "are str: 'text'"],
        *["not a WAV file", "more than 4,300 digits", "nested too deeply"],
    ]
    assert [words in record.reason for words, record in zip(told, report.bad, strict=True)] == [True] * len(told)
    (tmp_path / "data.json").write_text(f"[{lines[-1]},\n{lines[9]}]")
    assert [record.line for record in check(tmp_path / "data.json").bad] == [3]
    assert f"{path}:2: image: image '\\ud800.png'" in run("check", path, "--format", "jsonl").stdout


def test_half_a_character_is_told_by_line(tmp_path, run) -> None:
    def asked(text: str) -> list[dict]:
        return [{"role": "user", "content": text}, ANSWER]

    path = tmp_path / "data.jsonl"
    records = [{"messages": asked("whole \U0001f600")}, {"messages": asked("hi \ud83d"), "id": "x"}]
    records += [{"messages": asked([{"type": "text", "text": "\ude00"}])}, {"messages": asked("hi"), "id": "\ud83d"}]
    records += [{"messages": asked("hi"), "more": {"deep": ["\ud83d"]}}]
    path.write_text("".join(map(odd, records)))
    report = check(path)
    assert [(record.line, record.kind) for record in report.bad] == [(n, "record") for n in (2, 3, 4, 5)]
    assert "user: half of a surrogate pair (U+D83D) behind 'hi '" in report.bad[0].reason
    shown = run("check", path).stdout
    with pytest.raises(RecordError, match=rf"{path}:2 \(record x\): user: half of a surrogate pair"):
        data_task(path)
    assert f"{path}:2: record: user: half of a surrogate pair" in shown
    assert f"{path}:4: record: id: half of a surrogate pair" in shown
    path.write_text(odd({"conversations": [{"from": "human", "value": "\ud83d"}, {"from": "gpt", "value": "a"}]}))
    assert [record.line for record in check(path).bad] == [1]


def test_what_a_terminal_would_obey_is_shown(tmp_path, run) -> None:
    path = tmp_path / "data.jsonl"
    ask = [{"role": "user", "content": "a\x1b[2Jb \xa0 c\u202ed"}, ANSWER]
    path.write_text(odd({"id": "i\x07", "messages": ask}) + odd({"id": "j\x1b[0m", "messages": []}))
    for verb, told in ((["check", path], r"j\x1b[0m"), (["show", path, "-n", "1"], r"i\x07")):
        shown = run(*verb).stdout
        assert not set(shown) & {"\x1b", "\x07", "\u202e"}
        assert told in shown


def test_an_error_of_another_kind_is_one_records(tmp_path, monkeypatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(odd({"messages": [USER, ANSWER]}) * 3)

    def stumble(messages, place) -> None:
        if place.line == 2:
            raise ZeroDivisionError("by chance")

    monkeypatch.setattr("alula.data.shapes.check_turns", stumble)
    (bad,) = check(path).bad
    assert (bad.line, bad.kind) == (2, "record")
    assert "cannot be read (ZeroDivisionError: by chance)" in bad.reason


def test_pixel_limit(bad_file) -> None:
    assert "more than the limit of 15" in check(bad_file, max_pixels=15).bad[0].reason


def test_processes_find_the_same(tmp_path) -> None:
    path = export_microworld("dialogue", tmp_path / "out", n=600)
    (tmp_path / "out" / "images" / "dialogue-train-0-1-0.png").write_bytes(b"")
    seen = []
    alone, shared = check(path), check(path, workers=2, progress=lambda *done: seen.append(done))
    assert shared.as_dict() | {"seconds": 0} == alone.as_dict() | {"seconds": 0}
    assert [record.line for record in shared.bad] == [2]
    assert seen[-1] == (600, 600)


@pytest.mark.parametrize("form", ["jsonl", "llava"])
@pytest.mark.parametrize("stream", ["dialogue", "visual", "text", "caption"])
def test_exports_read_back_as_they_were(tmp_path, stream: str, form: str) -> None:
    path = export_microworld(stream, tmp_path / "out", form=form, n=30, seed=3)
    key = {"jsonl": "jsonl", "llava": "llava"}[form]
    from_file, direct = open_source({key: str(path)}), open_source({"microworld": stream, "seed": 3, "limit": 30})
    assert from_file.size == direct.size == 30
    for index in range(30):
        one, two = from_file[index], direct[index]
        assert one.id == two.id
        assert [ref.load().tobytes() for ref in one.images] == [ref.load().tobytes() for ref in two.images]
        strip = [
            [(m["role"], [p["text"] if p["type"] == "text" else "image" for p in m["content"]]) for m in s.messages]
            for s in (one, two)
        ]
        assert strip[0] == strip[1]
    assert check(path).ok


def test_microworld_sources_are_the_stream(tmp_path) -> None:
    source = open_source({"microworld": "visual", "split": "test", "seed": 2, "families": ["colour"]})
    items = list(microworld.visual_items(5, split="test", seed=2, families=["colour"]))
    assert source.size is None
    for index in (4, 0, 3):
        assert source[index].id == items[index].id
        assert source[index].meta == {"family": "colour", "kind": "visual", "split": "test"}
    with pytest.raises(UsageError, match="choose from"):
        open_source({"microworld": "visual", "families": ["taste"]})
    assert open_source({"microworld": "text", "limit": 3}).size == 3


def test_exports_never_overwrite(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an empty folder"):
        export_microworld("text", tmp_path / "mine", n=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_command_on_bad_data(run, bad_file) -> None:
    result = run("check", bad_file)
    assert result.exit_code == 1
    assert f"{bad_file}:3: image: image 'cut.png' is truncated or corrupt" in result.stdout
    assert f"{bad_file}:8: record: not valid JSON" in result.stdout
    report = json.loads(run("check", bad_file, "--json", "--workers", 0).stdout)
    assert report["ok"] is False
    assert [record["line"] for record in report["bad"]] == [3, 4, 5, 6, 7, 8]


def test_command_on_good_data(run, tmp_path) -> None:
    made = run("export", "visual", tmp_path / "out", "-n", 12, "--format", "llava")
    assert made.exit_code == 0
    path = made.stdout.strip()
    result = run("check", path)
    assert result.exit_code == 0
    assert "all good" in result.stdout
    assert json.loads(run("check", path, "--json").stdout)["images"] == 12
    shown = run("show", path, "-n", 2)
    assert shown.exit_code == 0
    assert "visual-train-0-1.png" not in shown.stderr
    assert "visual-train-0-0" in shown.stdout


def test_command_misused(run, tmp_path) -> None:
    assert run("check", tmp_path / "none.jsonl").exit_code == 2
    assert run("check").exit_code == 2
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    assert run("check", tmp_path / "a.jsonl", "--max-pixels", 0).exit_code == 2
    wrong = run("check", tmp_path / "a.jsonl", "--format", "csv")
    assert isinstance(wrong.exception, UsageError)  # alula.cli.app turns it into exit code 2
    assert wrong.exception.exit_code == 2


def test_a_picture_is_no_file_of_records(tmp_path: Any) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "pic.png")
    with pytest.raises(UsageError, match="is a picture, film or sound") as told:
        check(tmp_path / "pic.png")
    assert "messages" in str(told.value.remedy)
