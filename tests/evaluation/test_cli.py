"""``alula eval`` on saved tiny models, through the command line's own entry point."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alula.cli import app as cli
from alula.cli.tasks import TaskString, task_strings
from alula.evaluation import PairedRun, RunResult
from alula.policies import Policy, Skip, save_policies


def alula(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["alula", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


TEXT = ("--task", "text_bare", "--task", "text_after_text")
ASKED = ("--task", "text_bare", "--task", "visual")
SMALL = ("--items", 6, "--max-new-tokens", 2, "--device", "cpu")


def test_one_model(
    folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, killed_while_writing: Callable[..., None]
) -> None:
    killed_while_writing(tmp_path / "out" / "base.json")  # which this call does not write
    assert alula(folders / "llm", *TEXT, "--output", tmp_path / "out", *SMALL, monkeypatch=monkeypatch) == 0
    assert "text, bare" in capsys.readouterr().out
    result = RunResult.load(tmp_path / "out" / "tuned.json")
    assert list(result.tasks) == ["text_bare", "text_after_text"]
    assert "Wrong answers" in (tmp_path / "out" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.html", "tuned-answers.jsonl", "tuned.json"
    ]  # fmt: skip


def test_models_in_a_row_have_a_directory_each(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for path, held in (("runs/digits/final", "llm"), ("my-wings", "host")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(folders / held)
    for path, name in (("runs/digits/final", "digits-final"), ("my-wings", "my-wings")):
        assert alula(path, "--task", "text_bare", *SMALL, monkeypatch=monkeypatch) == 0
        assert f"answers: runs/eval/{name}\n" in capsys.readouterr().err
        assert RunResult.load(f"runs/eval/{name}/tuned.json").model == path
    Path("my-wings").unlink()
    Path("my-wings").symlink_to(folders / "llm")  # what it holds is another model now
    assert alula("my-wings", "--task", "text_bare", *SMALL, monkeypatch=monkeypatch) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "my-wings/tuned-answers.jsonl: holds the answers of another run; changed since: the model (" in said
    assert "name another output directory (--output)" in said


def test_a_host_against_its_llm_compares_what_both_can_take(
    folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    arguments = (folders / "host", "--base", folders / "llm", *ASKED, "--output", tmp_path / "o", "--json", *SMALL)
    assert alula(*arguments, monkeypatch=monkeypatch) == 0
    streams = capsys.readouterr()
    pairs = PairedRun.model_validate(json.loads(streams.out))
    assert list(pairs.tasks) == ["text_bare"]
    assert "takes no images" in streams.err
    assert (tmp_path / "o" / "report.html").is_file()
    assert PairedRun.load(tmp_path / "o" / "paired.json") == pairs


def test_a_model_under_policies_against_itself(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    policies: dict[str, Policy] = {"skip": Skip(part="mlp", tokens="all")}
    file = save_policies(policies, tmp_path / "policies.json")
    host = folders / "host"
    under = (host, "--base", host, "--policies", file, *ASKED, "--output", tmp_path / "o", "--json", *SMALL)
    assert alula(*under, monkeypatch=monkeypatch) == 0
    pairs = PairedRun.model_validate(json.loads(capsys.readouterr().out))
    assert set(pairs.tasks) == {"text_bare", "visual"}
    tuned, base = (RunResult.load(tmp_path / "o" / f"{role}.json") for role in ("tuned", "base"))
    assert tuned.fingerprint != base.fingerprint
    assert (tuned.conditions.policies, base.conditions.policies) == ([policies["skip"].to_dict()], [])
    assert any(note.startswith("policies differ: none before, skip (part=mlp") for note in pairs.tasks["visual"].notes)
    assert "skip (part=mlp" in (tmp_path / "o" / "report.html").read_text()
    assert tuned.tasks["visual"].items != base.tasks["visual"].items
    (tmp_path / "policies.json").write_text('{"policies": {}}')
    assert alula(host, "--policies", file, *ASKED, *SMALL, monkeypatch=monkeypatch) == 2
    assert "unknown key 'policies'" in capsys.readouterr().err


def test_own_data_with_images(folders: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from alula_fledgling.microworld import export_llava, visual_items

    export_llava(visual_items(4, split="test", seed=0), tmp_path / "mine")
    file = next((tmp_path / "mine").glob("*.json"))
    arguments = (
        folders / "host",
        "--base",
        folders / "host",
        "--task",
        f"data:{file}",
        "--output",
        tmp_path / "o",
        *SMALL,
    )
    assert alula(*arguments, monkeypatch=monkeypatch) == 0
    (task,) = PairedRun.load(tmp_path / "o" / "paired.json").tasks.values()
    assert (task.overall.n, task.identical_answers) == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--task", "nonsense"), 2, "there is no task 'nonsense'"),
        (("--task", "mmlu"), 2, "a task of lm-evaluation-harness is written lm_eval:mmlu"),
        (("--task", __file__), 2, f"did you mean data:{__file__}?"),
        (("--task", "visual"), 2, "takes text only"),
        (("--items", "0"), 2, ""),
        (("--tasks", "nonsense"), 2, "--task NAME, once per task"),
        (("--lm-eval-fewshot=1",), 2, "--task lm_eval:NAME,fewshot=NUMBER"),
        (("--data", "missing.jsonl"), 1, "--task data:FILE now"),
        (("--data",), 2, "stands without its value"),
        (("--annotations", "a.json", "--tasks", "visual"), 2, "--task pope:FILE and --task chair:FILE"),
        (("--task", "text_bare,visual"), 2, "--task text_bare --task visual"),
        (("--task", "nothing:x"), 2, "one of data:, lm_eval:"),
        (("--task", "data:"), 2, "--task data:FILE"),
        (("--task", "pope:a.json"), 2, "--images"),
        (("--task", "pope:a.json", "--task", "chair:b.json"), 2, "once for each"),
        (("--task", "chair:a.json,words=b.txt"), 2, "captions=, synonyms="),
        (("--task", "lm_eval:a,b"), 2, "--task lm_eval:a --task lm_eval:b"),
        (("--task", "lm_eval:a,fewshot=x"), 2, "fewshot=5"),
        (("--task", "lm_eval:a", "--task", "lm_eval:b,fewshot=1"), 2, "differ in their settings"),
        (("--task", "data:missing.jsonl"), 1, "missing.jsonl"),
        (("--dtype", "float99"), 2, "float99"),
        (("--task", "text_bare", "--base", "no/such/model/here"), 1, "no/such/model/here"),
        ((), 2, "say what to ask: no questions come with this model"),
    ],
)
def test_errors_have_codes_and_leave_no_result(
    folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: Any, code: int, said: str
) -> None:
    call = (folders / "llm", "--output", tmp_path / "o", "-n", 2, "--max-new-tokens", 2, "--device", "cpu", *arguments)
    assert alula(*call, monkeypatch=monkeypatch) == code
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "o" / "paired.json").exists()
    assert not (tmp_path / "o" / "report.html").exists()


@pytest.mark.parametrize(
    ("earlier", "expected"),
    [
        ({"--tasks": ["text_bare, visual"]}, ["text_bare", "visual"]),
        ({"--data": ["a.jsonl"]}, ["data:a.jsonl"]),
        ({"--pope": ["a.jsonl", "b.jsonl"]}, ["pope_questions:a.jsonl", "pope_questions:b.jsonl"]),
        ({"--annotations": ["i.json"]}, ["pope:i.json", "chair:i.json"]),
        ({"--annotations": ["i.json"], "--tasks": ["visual,pope"]}, ["visual", "pope:i.json"]),
        (
            {"--annotations": ["i.json"], "--tasks": ["chair"], "--captions": ["c.json"], "--synonyms": ["s.txt"]},
            ["chair:i.json,captions=c.json,synonyms=s.txt"],
        ),
        (
            {
                "--lm-eval": ["a,b:acc"],
                "--lm-eval-include": ["dir"],
                "--lm-eval-fewshot": ["2"],
                "--lm-eval-chat": [""],
            },
            ["lm_eval:a,include=dir,fewshot=2,chat=true", "lm_eval:b:acc,include=dir,fewshot=2,chat=true"],
        ),
    ],
)
def test_options_of_earlier_versions_are_read_as_task_strings(
    earlier: dict[str, list[str]], expected: list[str]
) -> None:
    assert task_strings(earlier) == expected
    assert all(TaskString.parse(text) for text in expected)


def test_an_earlier_option_asks_what_its_task_string_asks(
    folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    results = []
    for number, given in enumerate((("--tasks", "text_bare"), ("--task", "text_bare"))):
        call = (folders / "llm", "-n", 2, "--max-new-tokens", 2, "--device", "cpu", "--no-report", "--json", *given)
        assert alula(*call, "--output", tmp_path / str(number), monkeypatch=monkeypatch) == 0
        shown = capsys.readouterr()
        assert ("is written --task NAME" in shown.err) == (number == 0)
        results.append(RunResult.model_validate_json(shown.out).tasks)
    assert results[0] == results[1]


def test_a_base_without_a_template_is_asked_in_the_hosts_words(
    folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folders / "llm", bare)
    (bare / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(bare).chat_template is None
    call = (folders / "host", "--base", bare, "--task", "text_bare", "--output", tmp_path / "o", *SMALL)
    assert alula(*call, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    (task,) = PairedRun.load(tmp_path / "o" / "paired.json").tasks.values()
    assert task.overall.n == 6


def test_how_likely_references_are(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    asked = ("--task", "text_bare", "--references", *SMALL)
    out = ("--output", tmp_path / "o")
    assert alula(folders / "host", "--base", folders / "llm", *asked, *out, "--json", monkeypatch=monkeypatch) == 0
    pairs = PairedRun.model_validate(json.loads(capsys.readouterr().out))
    figure = pairs.tasks["text_bare"].figures["all"]["reference_nats"]
    assert figure.difference is not None
    assert "How likely the references are" in (tmp_path / "o" / "report.html").read_text()
    assert alula(folders / "host", "--base", folders / "llm", *asked, *out, monkeypatch=monkeypatch) == 0
    assert "likelihoods in nats" in capsys.readouterr().out
    for refused, word in (
        (("--task", "lm_eval:arc_easy"), "the harness scores its tasks itself"),
        (("--truthfulness", "own"), "--references would be without effect"),
        (("--retrieval", "microworld:caption"), "leave --references out"),
        (("--task", "text_bare", "--bank", tmp_path), "not weighed behind demonstrations"),
    ):
        assert alula(folders / "llm", *refused, "--references", *out, monkeypatch=monkeypatch) == 2
        assert word in " ".join(capsys.readouterr().err.split())
