"""``alula bank``, and the bank in ``alula eval``, ``alula chat`` and Python."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import alula
from alula.cli import app as cli
from alula.demonstrations import Bank, Demonstration, FewShot, shots_in
from alula.errors import BankError
from alula.evaluation import RunResult
from alula.evaluation.generation import answer, neutral_config
from alula.evaluation.own_data import data_task
from alula.hosts import save_host
from alula.hosts.decoding import Decoding
from alula.serving import Conversation
from tests.demonstrations.conftest import asked, demonstration


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["alula", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(model: Any, stock: Any, processor: Any, demonstrations: list[Demonstration], tmp_path_factory: Any) -> Path:
    """A host, an adapter of it, and a file of conversations: four demonstrations, and one that is none."""
    root: Path = tmp_path_factory.mktemp("aim")
    save_host((stock, processor), root / "host")
    alula.save_adapter(model, root / "adapter", base=root / "host", processor=processor)
    lines = []
    for number, each in enumerate(demonstrations):
        each.picture.save(root / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": each.question}]
        lines.append([{"role": "user", "content": content}, {"role": "assistant", "content": each.answer}])
    lines.append([{"role": "user", "content": "no picture"}, {"role": "assistant", "content": "none"}])
    (root / "data.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in lines))
    return root


@pytest.fixture(scope="module")
def bank(folder: Path, tmp_path_factory: Any) -> Path:
    """Filled by the command."""
    directory: Path = tmp_path_factory.mktemp("filled") / "bank"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("bank", folder / "adapter", folder / "data.jsonl", "--output", directory, "--device", "cpu")
        assert run(*arguments, monkeypatch=patch) == 0
    return directory


def test_a_bank_is_filled_once(
    folder: Path, bank: Path, demonstrations: list[Demonstration], monkeypatch: Any, capsys: Any
) -> None:
    model, processor = alula.load_model(folder / "adapter")
    there = Bank(bank, model, processor)
    assert len(there) == 4
    assert all(each in there for each in demonstrations)
    again = ("bank", folder / "adapter", folder / "data.jsonl", "--output", bank, "--device", "cpu", "--json")
    assert run(*again, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) == {"conversations": 5, "without": 1, "encoded": 0, "known": 4}


def test_eval_asks_behind_shots(folder: Path, bank: Path, tmp_path: Path, monkeypatch: Any) -> None:
    task = ("--task", f"data:{folder / 'data.jsonl'}", "--max-new-tokens", 8, "--device", "cpu")
    for name, options in (("shown", ("--bank", bank, "--shots", 3)), ("bare", ())):
        assert (
            run("eval", folder / "adapter", *task, *options, "--output", tmp_path / name, monkeypatch=monkeypatch) == 0
        )
    shown, bare = (RunResult.load(tmp_path / name / "tuned.json") for name in ("shown", "bare"))
    assert (shown.conditions.shots, bare.conditions.shots) == (3, 0)
    answers = [[item.answer for item in result.tasks["data"].items] for result in (shown, bare)]
    assert answers[0] != answers[1]
    model, processor = alula.load_model(folder / "adapter")
    shots = shots_in(bank, model, processor, 3)
    from_python = alula.evaluate(model, processor, [data_task(folder / "data.jsonl")], shots=shots, max_new_tokens=8)
    assert [item.answer for item in from_python.tasks["data"].items] == answers[0]
    assert all(item.too_long == [] for item in from_python.tasks.values())


def test_chat_talks_behind_shots(folder: Path, bank: Path, monkeypatch: Any, capsys: Any) -> None:
    demonstration(9, "q", "a").picture.save(folder / "asked.png")
    model, processor = alula.load_model(folder / "adapter")
    shots = shots_in(bank, model, processor)
    assert len(shots) == 4
    prompt = FewShot(processor, shots, live=True).render(asked())
    expected = answer(model, processor, [prompt], neutral_config(model, processor, Decoding(), 6), 0)[0].text
    conversation = Conversation(model, processor, max_new_tokens=6, shots=shots)
    conversation.attach(demonstration(9, "q", "a").picture)
    assert conversation.ask("and this one?", lambda _: None).text == expected
    more = conversation.ask("and?", lambda _: None).text
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {folder / 'asked.png'}\nand this one?\nand?\n"))
    chat = ("chat", folder / "adapter", "--bank", bank, "--max-new-tokens", 6, "--device", "cpu")
    assert run(*chat, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.replace("\n", "") == (expected + more).replace("\n", "")
    bare = Conversation(model, processor, max_new_tokens=6)
    bare.attach(demonstration(9, "q", "a").picture)
    assert bare.ask("and this one?", lambda _: None).text != expected


def test_what_makes_no_sense_is_refused(
    folder: Path, bank: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    adapter, host = folder / "adapter", folder / "host"
    data = ("--task", f"data:{folder / 'data.jsonl'}", "--output", tmp_path / "out", "--device", "cpu")
    for arguments, told, code in (
        (("eval", adapter, "--shots", 2, *data), "shots are taken from a bank", 2),
        (("chat", adapter, "--shots", 2), "shots are taken from a bank", 2),
        (("eval", adapter, "--bank", bank, "--base", host, *data), "leave --base", 2),
        (("eval", host, "--bank", bank, *data), "no map that demonstrations could be encoded through", 2),
        (("eval", adapter, "--bank", bank, "--shots", 5, *data), "5 shots are asked for, and 4 demonstrations", 1),
        (("eval", adapter, "--bank", folder, *data), "holds no bank", 1),
        (("eval", adapter, "--bank", bank, "--dtype", "bfloat16", *data), "another dtype: float32", 1),
        (("bank", host, folder / "data.jsonl", "--output", tmp_path / "b"), "no map", 2),
        (("bank", adapter, "nothing.jsonl", "--output", tmp_path / "b"), "there is no file 'nothing.jsonl'", 2),
        (("bank", adapter, folder / "data.jsonl", "--output", folder), "holds something else than a bank", 1),
    ):
        assert run(*arguments, monkeypatch=monkeypatch) == code, arguments
        assert told in capsys.readouterr().err.replace("\n", " ")
    model, processor = alula.load_model(adapter)
    with pytest.raises(BankError, match="holds no bank"):
        shots_in(tmp_path / "none", model, processor)
