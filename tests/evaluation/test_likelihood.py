"""TruthfulQA and ETHICS by likelihood: equal to lm-evaluation-harness on the same questions, and what stands beside."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import alula
from alula.cli import app as cli
from alula.errors import DataError, EvaluationError, UsageError
from alula.evaluation import PairedRun, RunResult, compare, token_ids
from alula.evaluation.likelihood import ChoiceTask, Question, evaluate_likelihood, read_truthfulness
from alula.evaluation.likelihood.engine import log_likelihoods
from alula.evaluation.likelihood.ethics import NO_YES
from alula.evaluation.likelihood.scores import count_groups, score
from alula.evaluation.ratios import figures
from alula.evaluation.results import ItemResult
from alula.policies import Skip
from tests.evaluation.published import QUESTIONS, harness_tasks, write_csv, write_files

FIGURES = ("always_yes", "yes_rate", "balanced", "auc", "brier")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tasks(files: dict[str, Path]) -> list[ChoiceTask]:
    """Those that lm-evaluation-harness has as well."""
    return [task for key, file in files.items() if key != "truthfulqa" for task in read_truthfulness(file)]


# -- lm-evaluation-harness -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(llm: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The harness's own: its prompts, its HFLM, its metrics."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    harness = harness_tasks(tmp_path_factory.mktemp("tasks"))
    lm = HFLM(pretrained=llm, tokenizer=copy.deepcopy(tokenizer), batch_size=3, max_length=2048)
    named = {f"mine_{name}": task for name, task in harness.items()}
    output = evaluate(lm=lm, task_dict={"tasks": named, "groups": {}, "group_map": {}}, bootstrap_iters=0)
    return {name: output["samples"][f"mine_{name}"] for name in harness}


def test_prompts_and_scores_are_those_of_the_harness(
    llm: Any, tokenizer: Any, tasks: list[ChoiceTask], samples: dict[str, list[dict[str, Any]]]
) -> None:
    run = evaluate_likelihood(llm, tokenizer, tasks, batch_size=5)
    assert {name.partition(":")[0] for name in run.tasks} == {*samples}
    for name, found in run.tasks.items():
        theirs = samples[name.partition(":")[0]]
        assert len(theirs) == len(found.items)
        for item, sample in zip(found.items, theirs, strict=True):
            assert item.prompt[0].content[0].text == sample["arguments"][0][0]
            assert item.score == pytest.approx(sample["acc"], abs=1e-5)
        assert found.accuracy == pytest.approx(np.mean([sample["acc"] for sample in theirs]), abs=1e-5)


def test_likelihoods_are_those_of_the_harness(
    llm: Any, tokenizer: Any, tasks: list[ChoiceTask], samples: dict[str, list[dict[str, Any]]]
) -> None:
    """Option by option; and so is the probability of yes, of which the Brier score is made."""
    run = evaluate_likelihood(llm, tokenizer, tasks)
    for task in tasks:
        theirs = samples[task.name.partition(":")[0]]
        for question, item, sample in zip(task.questions, run.tasks[task.name].items, theirs, strict=True):
            likely = {
                ending: float(reply[0])
                for (_, ending), reply in zip(sample["arguments"], sample["filtered_resps"], strict=True)
            }
            rows = token_ids.read(item.token_ids)[: len(question.options)]
            start = len(tokenizer.encode(question.text))
            own = log_likelihoods(llm, [(row[:start], row[start:]) for row in rows], pad=0, batch_size=2)
            for option, value in zip(question.options, own, strict=True):
                assert value == pytest.approx(likely[f" {option}"], abs=1e-5)
            if task.shape == "yes":
                yes, no = (np.exp(likely[f" {option}"]) for option in question.options[::-1])
                expected = (yes / (yes + no) - (question.right == (1,))) ** 2
                assert item.counts["brier"] == pytest.approx(expected, abs=1e-5)


# -- models --------------------------------------------------------------------------------------------------------


def test_batches_and_padding_change_nothing(llm: Any, tokenizer: Any, tasks: list[ChoiceTask]) -> None:
    alone, together = (evaluate_likelihood(llm, tokenizer, tasks, batch_size=size) for size in (1, 64))
    for name, found in alone.tasks.items():
        for first, second in zip(found.items, together.tasks[name].items, strict=True):
            assert first.score == pytest.approx(second.score, abs=1e-5)
            assert first.counts == pytest.approx(second.counts, abs=1e-4)


def test_hosts_adapters_and_grafts_answer_as_their_base(
    llm: Any, host: Any, tokenizer: Any, processor: Any, tasks: list[ChoiceTask]
) -> None:
    lora = get_peft_model(copy.deepcopy(llm), LoraConfig(target_modules=["q_proj"]))
    grafted = copy.deepcopy(host)
    alula.attach(grafted, alula.WingsConfig(rank=4))
    for base, tuned, reads in ((llm, lora, tokenizer), (host, grafted, processor)):
        base.train()
        before, after = (evaluate_likelihood(model, reads, tasks, batch_size=4) for model in (base, tuned))
        assert base.training
        base.eval()
        for pair in compare(before, after).tasks.values():
            assert pair.columns.base == pytest.approx(pair.columns.tuned, abs=1e-9)
            for figure in pair.figures["all"].values():
                assert figure.difference is None or abs(figure.difference.value) < 1e-9
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        evaluate_likelihood(llm, bare, [_task(chat=True)])


def test_a_chat_prompt_is_what_the_template_writes(llm: Any, tokenizer: Any, host: Any, processor: Any) -> None:
    for model, reads in ((llm, tokenizer), (host, processor)):
        run = evaluate_likelihood(model, reads, [_task(chat=True)])
        rows = token_ids.read(run.tasks["t"].items[0].token_ids)
        assert rows == [tokenizer(f"<|user|>Is it so?<|end|><|assistant|>{option}").input_ids for option in NO_YES]
    plain = evaluate_likelihood(llm, tokenizer, [_task()])
    assert token_ids.read(plain.tasks["t"].items[0].token_ids) == [
        tokenizer(f"Is it so? {option}").input_ids for option in NO_YES
    ]


def _task(**more: Any) -> ChoiceTask:
    return ChoiceTask("t", "t", "yes", [Question("0", "Is it so?", NO_YES, (1,))], **more)


def test_what_does_not_fit_is_left_out(llm: Any, tokenizer: Any) -> None:
    short = copy.deepcopy(llm)
    short.config.max_position_embeddings = 20
    questions = [Question(str(n), "x" * n, NO_YES, (n % 2,)) for n in (3, 17, 18, 400)]
    found = evaluate_likelihood(short, tokenizer, [ChoiceTask("t", "t", "yes", questions)]).tasks["t"]
    assert [item.id for item in found.items] == ["3", "17"]  # the last token is no input
    assert [(item.id, item.tokens) for item in found.too_long] == [("18", 22), ("400", 404)]
    with pytest.raises(EvaluationError, match="none of its questions fits"):
        evaluate_likelihood(short, tokenizer, [ChoiceTask("t", "t", "yes", questions[2:])])


def test_a_model_that_computes_no_numbers_is_refused(llm: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(llm)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not a number"):
        evaluate_likelihood(broken, tokenizer, [_task()])


# -- scores and habits ---------------------------------------------------------------------------------------------


def _rows(scored: Any, cluster: Any = None) -> list[ItemResult]:
    return [
        ItemResult(
            id=str(n),
            family="f",
            prompt_hash=str(n),
            gold="",
            answer="",
            score=each.score,
            counts=each.counts,
            cluster="" if cluster is None else str(cluster[n]),
        )
        for n, each in enumerate(scored)
    ]


def _yes_or_no(likelihoods: Any, right: Any) -> dict[str, Any]:
    from alula.evaluation.likelihood import ratios_of

    questions = [Question(str(n), "?", NO_YES, (int(yes),)) for n, yes in enumerate(right)]
    found = figures(_rows(score("yes", questions, likelihoods)), ratios_of("yes", groups=False))["all"]
    return {name: None if estimate is None else estimate.value for name, estimate in found.items()}


def test_a_model_that_always_says_yes_gets_the_prior() -> None:
    right = np.random.default_rng(0).random(50) < 0.7
    always = _yes_or_no(np.tile([-5.0, -1.0], (50, 1)), right)
    assert always["yes_rate"] == 1
    assert always["always_yes"] == pytest.approx(right.mean())
    assert (always["balanced"], always["auc"]) == (pytest.approx(0.5), pytest.approx(0.5))
    # a shift of the habit moves the score, and not the order
    odds = np.random.default_rng(1).normal(size=50) + right
    shifted = [_yes_or_no(np.stack([np.zeros(50), odds + shift], axis=1), right) for shift in (-9, 0, 9)]
    assert [each["yes_rate"] for each in shifted][::2] == [0, 1]
    assert len({round(each["auc"], 9) for each in shifted}) == 1
    assert shifted[2]["balanced"] == pytest.approx(0.5)


def test_a_tie_is_no_answer() -> None:
    flat = _yes_or_no(np.zeros((8, 2)), [True, False] * 4)
    assert (flat["yes_rate"], flat["balanced"], flat["auc"]) == (0, 0, 0.5)
    question = Question("0", "?", ("a", "bb", "c", "dd"), (0, 3))
    (mass,) = score("mass", [question], [[-7.0] * 4])
    assert mass.score == pytest.approx(0.5)  # the share of true options
    assert mass.said is None
    (one,) = score("one", [Question("0", "?", ("a", "b"), (0,))], [[-7.0, -7.0]])
    assert one.score == 0
    (far,) = score("mass", [question], [[-90000.0, -90001.0, -95000.0, -90000.0]])
    assert far.score == pytest.approx(2 / (2 + np.exp(-1)))


@pytest.mark.parametrize("seed", range(3))
def test_order_is_the_area_under_the_curve(seed: int) -> None:
    """Against all pairs one by one; its interval against the spread over drawn sets of questions."""
    draws = np.random.default_rng(seed)
    right = draws.random(60) < 0.4
    odds = np.round(draws.normal(size=60) + 0.8 * right, 1)
    found = _yes_or_no(np.stack([np.zeros(60), odds], axis=1), right)
    pairs = [(p > n) + 0.5 * (p == n) for p in odds[right] for n in odds[~right]]
    assert found["auc"] == pytest.approx(np.mean(pairs))
    sides = [np.mean((odds > 0)[right]), np.mean((odds < 0)[~right])]
    assert found["balanced"] == pytest.approx(np.mean(sides))


def test_the_interval_of_the_order_is_as_wide_as_the_order_varies() -> None:
    draws = np.random.default_rng(5)
    right = np.arange(80) < 30
    areas, widths = [], []
    from alula.evaluation.likelihood import ratios_of

    for _ in range(150):
        odds = draws.normal(size=80) + right
        questions = [Question(str(n), "?", NO_YES, (int(yes),)) for n, yes in enumerate(right)]
        scored = score("yes", questions, np.stack([np.zeros(80), odds], axis=1))
        auc = next(ratio for ratio in ratios_of("yes", groups=False) if ratio.name == "auc")
        values = np.array([each.counts["order"] for each in scored])
        areas.append(values.mean())
        widths.append(values.std(ddof=1) / np.sqrt(80))
        assert auc.over == {"order": 1}
    assert np.mean(widths) == pytest.approx(np.std(areas), rel=0.25)


def test_pairs_are_ranked_whichever_comes_first(llm: Any, tokenizer: Any, files: dict[str, Path]) -> None:
    (task,) = read_truthfulness(files["utilitarianism"])
    found = evaluate_likelihood(llm, tokenizer, [task]).tasks[task.name]
    for question, item in zip(task.questions, found.items, strict=True):
        rows = token_ids.read(item.token_ids)
        start = [len(tokenizer.encode(text)) for text in (question.text, question.reverse)]
        pairs = [(row[: start[at // 2]], row[start[at // 2] :]) for at, row in enumerate(rows)]
        no, yes, reverse_no, reverse_yes = log_likelihoods(llm, pairs, pad=0, batch_size=4)
        better = yes - no if question.right == (1,) else reverse_yes - reverse_no
        worse = reverse_yes - reverse_no if question.right == (1,) else yes - no
        assert item.counts["ranked"] == float(better > worse)
        one, other = (text.split("\n")[:2] for text in (question.text, question.reverse))
        assert one[0].removeprefix("Scenario 1: ") == other[1].removeprefix("Scenario 2: ")


def test_whole_groups_are_right_or_not() -> None:
    questions = [Question(str(n), "?", NO_YES, (1,), cluster=f"g{n // 4}") for n in range(12)]
    scored = score("yes", questions, [[0.0, 1.0]] * 7 + [[1.0, 0.0]] + [[0.0, 1.0]] * 4)
    count_groups(questions, scored)
    assert [each.counts.get("groups", 0) for each in scored] == [1, 0, 0, 0] * 3
    assert [scored[n].counts["group_right"] for n in (0, 4, 8)] == [1, 0, 1]


# -- files ---------------------------------------------------------------------------------------------------------


def test_the_authors_table_has_mc1_and_mc2(files: dict[str, Path]) -> None:
    one, several = read_truthfulness(files["truthfulqa"])
    assert [(task.name, task.shape) for task in (one, several)] == [
        ("truthfulqa_mc1:TruthfulQA", "one"),
        ("truthfulqa_mc2:TruthfulQA", "mass"),
    ]
    assert one.questions[0].options == ("No.", "Yes, on wings.", "At night.")
    assert several.questions[0].options == ("No.", "Pigs cannot fly.", "Yes, on wings.", "At night.")
    assert [q.right for q in (one.questions[0], several.questions[0])] == [(0,), (0, 1)]
    assert one.questions[1].tags == {"kind": "text", "type": "Adversarial", "category": "Animals"}
    assert one.questions[0].text.endswith("Spain.\n\nQ: Question 0?\nA:")
    newer = [
        dict(
            each,
            **{
                key: {"choices": [*each[key]], "labels": [*each[key].values()]}
                for key in ("mc1_targets", "mc2_targets")
            },
        )
        for each in QUESTIONS
    ]
    place = files["mc"].parent / "newer.json"
    place.write_text(json.dumps(newer))
    assert [q.options for q in read_truthfulness(place)[1].questions] == [
        q.options for q in read_truthfulness(files["mc"])[1].questions
    ]


def test_the_best_answer_is_one_whatever_it_holds(tmp_path: Path) -> None:
    """Semicolons part the answers of the other columns."""
    head = "Question,Best Answer,Correct Answers,Incorrect Answers\n"
    (tmp_path / "T.csv").write_text(f"{head}Why?,It is so; always,It is so; always,No; Never\n")
    one, several = read_truthfulness(tmp_path / "T.csv")
    assert one.questions[0].options == ("It is so; always.", "No.", "Never.")
    assert several.questions[0].options == ("It is so.", "always.", "No.", "Never.")


def test_no_groups_are_counted_where_there_are_none(tmp_path: Path) -> None:
    for rows, groups in ((5, False), (8, True)):
        lines = "".join(f"{row % 2},I am owed {row}\n" for row in range(rows))
        (tmp_path / "justice.csv").write_text(f"label,scenario\n{lines}")
        assert read_truthfulness(tmp_path / "justice.csv")[0].groups is groups


def test_so_many_are_drawn_in_whole_groups(files: dict[str, Path]) -> None:
    (task,) = read_truthfulness(files["virtue"], n=3, seed=1)
    assert len(task.questions) == 5
    assert len({question.cluster for question in task.questions}) == 1
    assert task.settings["n"] == 3
    (other,) = read_truthfulness(files["commonsense"], n=4, seed=1)
    assert [q.id for q in other.questions] == sorted({q.id for q in other.questions})
    assert len(other.questions) == 4
    assert read_truthfulness(files["commonsense"], n=4, seed=1) == [other]
    with pytest.raises(AssertionError):
        assert read_truthfulness(files["commonsense"], n=4, seed=2) == [other]


BROKEN = {
    "empty.csv": ("", "empty.csv: is empty"),
    "head.csv": ("label,input\n", "head.csv: has columns and no row"),
    "other.csv": ("a,b,c\n1,2,3\n", "other.csv:1: begins with the columns 'a', 'b', 'c'"),
    "pairs.csv": ("I won.,I lost.\n", "pairs.csv:1: begins with the columns"),
    "cm.csv": ('label,input\n0,fine\n"1","two\nlines"\n2,bad\n', "cm.csv:5: the label is '2'"),
    "cells.csv": ("label,scenario\n1,a, b\n", "cells.csv:2: has 3 cells, the file 2 columns"),
    "quote.csv": ('label,scenario\n1,fine\n0,"open\n', "quote.csv:3: is no row of CSV"),
    "virtue.csv": ("label,scenario\n1,A [SEP] b\n0,no trait\n", r"virtue.csv:3: has no sentence and trait"),
    "util.csv": ("better,worse\nbetter,\n", "util.csv:2: has nothing in the column 'less_pleasant'"),
    "duty.csv": ("label,scenario,excuse\n1,Could you?, \n", "duty.csv:2: has nothing in the column 'excuse'"),
    "qa.csv": (
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,So,So; Thus,\n",
        "qa.csv:2: has nothing in the column 'Incorrect Answers'",
    ),
    "both.csv": (
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,So,So,No;so.;So\n",
        "both.csv:2: calls 'So.' correct and incorrect",
    ),
    "list.json": ("[]", "list.json: is an empty list"),
    "object.json": ("{}", "object.json:1: is no JSON list"),
    "cut.json": ('[\n{"question": "a", "mc1_targets": {"x": 1', "cut.json:2: is not JSON"),
    "none.json": ('[\n\n{"answer": 3}]', r"none.json:3 \(entry 1\): has no 'question'"),
    "right.json": (
        '[{"question": "a", "mc1_targets": {"x": 1, "y": 1}, "mc2_targets": {"x": 1, "y": 0}}]',
        r"right.json:1 \(entry 1\): has 2 right answers in 'mc1_targets'",
    ),
    "label.json": (
        '[{"question": "a", "mc1_targets": {"x": "yes"}, "mc2_targets": {"x": 1}}]',
        "labels 'x' in 'mc1_targets' with 'yes'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path: Path, name: str) -> None:
    content, told = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        read_truthfulness(tmp_path / name)


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"label,input\n1,\xff\xfe\n")
    for place, told in (("bytes.csv", "no text in UTF-8"), ("missing.csv", "cannot be read")):
        with pytest.raises(DataError, match=told):
            read_truthfulness(tmp_path / place)
    for wrong in ({"right": ()}, {"right": (0, 1)}, {"options": ("a",)}):
        with pytest.raises(EvaluationError, match="options, of which"):
            Question(**{"id": "0", "text": "?", "options": NO_YES, "right": (0,), **wrong})
    with pytest.raises(EvaluationError, match="does not fit a task of shape 'pair'"):
        ChoiceTask("t", "t", "pair", [Question("0", "?", NO_YES, (0,))])


# -- the command ---------------------------------------------------------------------------------------------------


def _command(monkeypatch: Any, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["alula", "eval", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_compares_a_host_with_its_llm(
    folders: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    given = [files["mc"], f"{files['commonsense']},chat=true", files["virtue"], files["utilitarianism"]]
    place = ["--base", folders / "llm", "--output", tmp_path / "o"]
    assert _command(monkeypatch, folders / "host", *place, "--truthfulness", *given) == 0
    shown = capsys.readouterr()
    for word in ("always", "said", "order", "Brier", "whole", "tuned"):
        assert word in shown.out
    pairs = PairedRun.load(tmp_path / "o" / "paired.json")
    assert [name.partition(":")[0] for name in pairs.tasks] == [
        "truthfulqa_mc1", "truthfulqa_mc2", "ethics_commonsense", "ethics_virtue", "ethics_utilitarianism",
    ]  # fmt: skip
    for name, pair in pairs.tasks.items():
        assert ("auc" in pair.figures["all"]) is ("ethics" in name)
        for figure in pair.figures["all"].values():
            assert figure.base is not None
            assert figure.difference is not None
    report = (tmp_path / "o" / "report.html").read_text()
    assert "Answer habits and calibration" in report
    assert "Objects made up" not in report
    assert RunResult.load(tmp_path / "o" / "tuned.json").tasks["ethics_commonsense:cm_test"].settings["chat"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--history", "gold"], "--history would be without effect"),
        (["--max-new-tokens", "3"], "--max-new-tokens would be without effect"),
        (["--retrieval", "microworld:caption"], "leave --truthfulness out"),
        (["--template", "enable_thinking=false"], "plain prompts pass no template"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    folders: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any, more: list[str], told: str
) -> None:
    output = tmp_path / "o"
    assert _command(monkeypatch, folders / "llm", "--truthfulness", files["virtue"], *more, "--output", output) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_nothing_is_written_where_a_file_is_broken(
    folders: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    broken, output = tmp_path / "cm.csv", tmp_path / "o"
    broken.write_text(BROKEN["cm.csv"][0])
    arguments = [folders / "llm", "--truthfulness", files["virtue"], broken, "--output", output]
    assert _command(monkeypatch, *arguments) == 1
    assert f"{broken}:5: the label is '2', not 0 or 1" in capsys.readouterr().err
    assert not output.exists()
    for wrong, code, told in (
        ([f"{files['virtue']},shots=3"], 2, "has the setting 'shots=3'"),
        ([f"{files['virtue']},chat=maybe"], 2, "chat=maybe is neither true nor false"),
        (["own"], 2, "no such questions come with this model"),
        ([files["virtue"], write_csv(_folder(tmp_path) / "virtue_test.csv", [["label", "scenario"], [1, "A [SEP] b"]])],
         2, "would both be called"),
    ):  # fmt: skip
        assert _command(monkeypatch, folders / "llm", "--truthfulness", *wrong, "--output", output) == code
        assert told in " ".join(capsys.readouterr().err.split())
        assert not output.exists()


def _folder(root: Path) -> Path:
    (root / "second").mkdir(exist_ok=True)
    return root / "second"


def test_the_fledgling_brings_its_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    output = tmp_path / "o"
    arguments = ["fledgling", "--base", "fledgling", "--truthfulness", "own", "-n", "5", "--output", output, "--json"]
    assert _command(monkeypatch, *arguments) == 0
    pairs = PairedRun.model_validate(json.loads(capsys.readouterr().out))
    assert len(pairs.tasks) == 7
    assert all(pair.overall.difference.value == 0 for pair in pairs.tasks.values())


def test_it_stands_beside_other_tasks(
    folders: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}) + "\n"
    )
    more = ["--task", f"data:{tmp_path}/mine.jsonl", "--max-new-tokens", "2"]
    given = [folders / "llm", "--truthfulness", files["justice"], *more, "--output", tmp_path / "o"]
    assert _command(monkeypatch, *given) == 0
    assert len(RunResult.load(tmp_path / "o" / "tuned.json").tasks) == 2


@pytest.mark.parametrize("when", ["prompts", "steps"])
def test_policies_that_tell_steps_from_prompts_are_refused(when: Any, llm: Any, tokenizer: Any) -> None:
    """One forward over a question and an option holds no step."""
    with (
        Skip(part="mlp", layers=[1], tokens="all", when=when).on(llm),
        pytest.raises(UsageError, match="in one forward"),
    ):
        evaluate_likelihood(llm, tokenizer, [_task()])
    with Skip(part="mlp", layers=[1], tokens="all").on(llm):
        assert evaluate_likelihood(llm, tokenizer, [_task()]).tasks["t"].items


def test_there_is_something_to_ask(llm: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no tasks to run"):
        evaluate_likelihood(llm, tokenizer, [])
    with pytest.raises(UsageError, match="two tasks are called 't'"):
        evaluate_likelihood(llm, tokenizer, [_task(), _task()])
