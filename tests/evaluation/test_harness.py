"""lm-evaluation-harness tasks from local files: scored as the harness scores them, and paired item by item."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import alula
from alula.chat_template import TemplateSettings
from alula.cli import app as cli
from alula.errors import EvaluationError, UsageError
from alula.evaluation import HarnessTasks, PairedRun, RunResult, compare, run_harness
from alula.policies import Skip
from tests.silence import silenced

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

CHOICES = ["red", "a deep shade of blue", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    documents = [{"q": f"number {k} is", "choices": CHOICES, "gold": k % 3, "answer": f"{k}!"} for k in range(7)]
    (root / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {root}/data.jsonl}}, cache_dir: {root}/cache}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{q}}}}"
metadata: {{version: 3}}
"""
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    accuracy = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    exact = "metric_list: [{metric: exact_match}]\n"
    generate = (
        'output_type: generate_until\ndoc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["q"], max_gen_toks: 6}\n'
    )
    (root / "choose.yaml").write_text("task: choose\n" + common + choice + accuracy)
    (root / "say.yaml").write_text("task: say\n" + common + generate + exact)
    (root / "rolling.yaml").write_text(
        "task: rolling\n" + common + "output_type: loglikelihood_rolling\ndoc_to_target: answer\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    (root / "look.yaml").write_text("task: look\n" + common + generate + exact + "doc_to_image: q\n")
    (root / "both.yaml").write_text("group: both\ntask: [choose, say]\n")
    return root


def likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    """Sum of log-probabilities of the ending's tokens, straight from the logits."""
    start = tokenizer(context, return_tensors="pt").input_ids
    whole = tokenizer(context + ending, return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = model(input_ids=whole).logits.double().log_softmax(-1)
    at = range(start.shape[1], whole.shape[1])
    return float(sum(log_p[0, k - 1, whole[0, k]] for k in at))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_multiple_choice_is_the_likeliest_ending(llm: Any, tokenizer: Any, folder: Path, metric: str) -> None:
    result = run_harness(llm, tokenizer, HarnessTasks([f"choose:{metric}"], folder), batch_size=2)
    task = result.tasks[f"choose:{metric}"]
    assert len(task.items) == 7
    for k, item in enumerate(task.items):
        values = [likelihood(llm, tokenizer, f"number {k} is", " " + choice) for choice in CHOICES]
        if metric == "acc_norm":
            values = [value / len(choice) for value, choice in zip(values, CHOICES, strict=True)]
        assert item.answer == CHOICES[values.index(max(values))]
        assert item.gold == CHOICES[k % 3]
        assert item.score == (item.answer == item.gold)
    assert task.settings["harness"]["choose"]["metric"] == metric
    assert task.settings["harness"]["choose"]["version"] == 3
    assert {"lm_eval", "torch"} <= set(result.conditions.versions)
    assert result.conditions.batch_size == 2


def test_policies_that_tell_steps_from_prompts_are_refused(llm: Any, tokenizer: Any, folder: Path) -> None:
    with (
        Skip(part="mlp", layers=[1], tokens="all", when="prompts").on(llm),
        pytest.raises(UsageError, match="in one forward"),
    ):
        run_harness(llm, tokenizer, HarnessTasks(["choose"], folder))


def test_generated_answers_are_greedy_and_stop_where_the_task_says(llm: Any, tokenizer: Any, folder: Path) -> None:
    llm.generation_config.update(repetition_penalty=1.9, max_new_tokens=2)
    try:
        task = run_harness(llm, tokenizer, HarnessTasks(["say"], folder), batch_size=3).tasks["say"]
    finally:
        llm.generation_config.update(repetition_penalty=None, max_new_tokens=None)
    assert task.max_new_tokens == 6
    for k, item in enumerate(task.items):
        inputs = tokenizer(f"number {k} is", return_tensors="pt")
        output = llm.generate(**inputs, do_sample=False, max_new_tokens=6)
        expected = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).split("q")[0]
        assert item.answer.strip() == expected.strip()
        assert item.gold == f"{k}!"


def test_what_is_attached_takes_part_in_generated_answers(llm: Any, tokenizer: Any, folder: Path) -> None:
    with silenced(llm, tokenizer.eos_token_id):
        task = run_harness(llm, tokenizer, HarnessTasks(["say"], folder), batch_size=3).tasks["say"]
    assert [item.answer.strip() for item in task.items] == [""] * 7


def test_ids_behind_the_vocabulary_take_no_mass_from_texts(llm: Any, tokenizer: Any) -> None:
    from alula.evaluation.harness_model import HarnessModel

    wider = copy.deepcopy(llm)
    alula.attach(wider, alula.TealConfig(codes={"image": {"size": 3000, "tokens": 4, "width": 5}}))
    before, after = (
        HarnessModel(model, tokenizer, None, 2, template=TemplateSettings(), opening=())._loglikelihood_tokens(
            [(None, [5, 6], [7, 8]), (None, [5], [9])]
        )
        for model in (llm, wider)
    )
    assert after == before


def test_hosts_adapters_and_grafts_answer_as_their_base(
    llm: Any, host: Any, tokenizer: Any, processor: Any, folder: Path
) -> None:
    tasks = HarnessTasks(["both"], folder, n=3)
    lora = get_peft_model(copy.deepcopy(llm), LoraConfig(target_modules=["q_proj"]))
    grafted = copy.deepcopy(host)
    alula.attach(grafted, alula.WingsConfig(rank=4))
    for base, tuned, reads in ((llm, lora, tokenizer), (host, grafted, processor)):
        before, after = (run_harness(model, reads, tasks, batch_size=4) for model in (base, tuned))
        result = compare(before, after).tasks["both"]
        assert (result.overall.n, result.identical_answers) == (6, 6)
        assert list(result.families) == ["choose", "say"]


def test_flips_are_counted_and_kept(llm: Any, tokenizer: Any, folder: Path) -> None:
    other = copy.deepcopy(llm)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    tasks = HarnessTasks(["choose:acc_norm"], folder)
    before, after = run_harness(llm, tokenizer, tasks, name="a"), run_harness(other, tokenizer, tasks, name="b")
    result = compare(before, after).tasks["choose:acc_norm"]
    runs = (run.tasks["choose:acc_norm"].items for run in (before, after))
    pairs = list(zip(*runs, strict=True))
    lost = [one.id for one, two in pairs if one.score > two.score]
    gained = [one.id for one, two in pairs if one.score < two.score]
    assert lost or gained
    assert (sorted(f.id for f in result.lost), sorted(f.id for f in result.gained)) == (sorted(lost), sorted(gained))


def test_other_prompts_are_refused(llm: Any, tokenizer: Any, folder: Path) -> None:
    bare = run_harness(llm, tokenizer, HarnessTasks(["say"], folder))
    for other in (
        HarnessTasks(["say"], folder, num_fewshot=2),
        HarnessTasks(["say"], folder, num_fewshot=2, seed=1),
        HarnessTasks(["say"], folder, chat=True),
    ):
        result = run_harness(llm, tokenizer, other)
        assert result.tasks["say"].settings["seed"] == other.seed
        with pytest.raises(EvaluationError, match="token ids of item 'say/0' differ from position"):
            compare(bare, result)
        bare = result
    assert bare.tasks["say"].items[0].prompt[0].content[0].text == "<|user|>number 0 is<|end|><|assistant|>"


@pytest.mark.parametrize(("name", "fits"), [("choose", 22), ("say", 18)])
def test_what_does_not_fit_into_the_context_is_left_out(
    llm: Any, tokenizer: Any, folder: Path, tmp_path: Path, name: str, fits: int
) -> None:
    """The harness would cut the question from the left and score what is left of it."""
    documents = [{"q": "x" * n, "choices": ["red", "blue"], "gold": 0, "answer": "!"} for n in (4, fits, fits + 1)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    text = (folder / f"{name}.yaml").read_text().replace(str(folder), str(tmp_path))
    (tmp_path / f"{name}.yaml").write_text(text)
    tasks = HarnessTasks([name], tmp_path)
    free, bound = run_harness(llm, tokenizer, tasks), copy.deepcopy(llm)
    bound.config.max_position_embeddings = 24 if name == "say" else 26
    task = run_harness(bound, tokenizer, tasks).tasks[name]
    assert [item.answer for item in task.items] == [item.answer for item in free.tasks[name].items[:2]]
    assert [item.id for item in task.too_long] == [f"{name}/2"]
    assert task.too_long[0].tokens == (fits + 1 if name == "say" else fits + 1 + len(" blue"))
    assert "1 of 3 questions were not asked" in task.notes[0]
    bound.config.max_position_embeddings = 7
    with pytest.raises(EvaluationError, match=r"none of its items fits into the model's context of 7 tokens"):
        run_harness(bound, tokenizer, tasks)


SEVERAL_RIGHT = """
import numpy

def process_results(doc, results):  # as truthfulqa_mc2
    probabilities = numpy.exp(numpy.array([likelihood for likelihood, _ in results]))
    return {"mass": (probabilities / probabilities.sum())[0], "acc": results[0][0] > results[1][0]}
"""


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Questions with several right answers, scored by their probability; all answers to the second are very long."""
    (tmp_path / "several.py").write_text(SEVERAL_RIGHT)
    texts = [["yes", "no"], ["yes " * 400, "no " * 400], ["left", "right"]]
    documents = [{"q": f"number {k} is", "choices": choices} for k, choices in enumerate(texts)]
    (tmp_path / "several.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "several.yaml").write_text(f"""
task: several
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/several.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: 0
process_results: !function several.process_results
metric_list: [{{metric: mass, aggregation: mean, higher_is_better: true}}, {{metric: acc}}]
""")
    return tmp_path


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_score_that_is_not_a_number_is_left_out_by_name(llm: Any, tokenizer: Any, several: Path) -> None:
    tasks = HarnessTasks(["several"], several)
    sharp = run_harness(llm, tokenizer, tasks, name="sharp")
    task = sharp.tasks["several"]
    assert ([item.id for item in task.items], task.unscored) == (["several/0", "several/2"], ["several/1"])
    assert 0 < task.accuracy < 1
    assert task.settings["harness"]["several"]["metric"] == "mass"  # not another one for another model
    whole = sharp.model_copy(deep=True, update={"model": "whole"})
    whole.tasks["several"].items.insert(1, task.items[0].model_copy(update={"id": "several/1"}))
    whole.tasks["several"].unscored = []
    for before, after in ((whole, sharp), (sharp, whole)):
        result = compare(before, after).tasks["several"]
        assert result.overall.n == 2
        assert result.notes == ["sharp: left out, since the score is not a number (1): several/1"]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_no_score_at_all_is_refused(llm: Any, tokenizer: Any, several: Path) -> None:
    data = several / "several.jsonl"
    data.write_text(data.read_text().splitlines(keepends=True)[1])
    with pytest.raises(EvaluationError, match=r"not a number for all 1 items that could be asked \(several/0\)"):
        run_harness(llm, tokenizer, HarnessTasks(["several"], several))


def test_other_metrics_are_refused(llm: Any, tokenizer: Any, several: Path) -> None:
    by_mass, by_rank = (
        run_harness(llm, tokenizer, HarnessTasks([f"several:{metric}"], several, n=1)) for metric in ("mass", "acc")
    )
    by_rank.tasks = {"several:mass": by_rank.tasks["several:acc"]}
    with pytest.raises(EvaluationError, match=r"other metrics: several=mass .* against several=acc"):
        compare(by_mass, by_rank)


def test_nothing_is_left_behind(llm: Any, tokenizer: Any, folder: Path) -> None:
    side, padding = tokenizer.padding_side, tokenizer.pad_token
    states = random.getstate(), torch.random.get_rng_state()
    run_harness(llm, tokenizer, HarnessTasks(["choose"], folder, n=1))
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, padding)
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("chose", UsageError, r"no task 'chose'(.|\n)*did you mean.*choose"),
        ("choose:nonsense", UsageError, r"no metric 'nonsense'(.|\n)*acc, acc_norm"),
        ("rolling", EvaluationError, "scores single items"),
        ("look", EvaluationError, r"'look'.* which require multimodal input"),
    ],
)
def test_what_cannot_be_done_is_said(
    llm: Any, tokenizer: Any, folder: Path, name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_harness(llm, tokenizer, HarnessTasks([name], folder, n=2))


def test_without_the_extra(monkeypatch: Any, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"extra `eval`(.|\n)*pip install 'alula\[eval\]'"):
        HarnessTasks(["choose"], folder).check()


def test_on_the_command_line(
    tmp_path: Path, folder: Path, llm: Any, tokenizer: Any, monkeypatch: Any, capsys: Any
) -> None:
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    arguments = [
        "--task",
        f"lm_eval:choose,include={folder}",
        "--task",
        f"lm_eval:say,include={folder}",
        "--base",
        tmp_path / "llm",
        "--json",
    ]
    call = ["alula", "eval", tmp_path / "llm", *arguments, "--output", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, call)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    pairs = PairedRun.model_validate(json.loads(capsys.readouterr().out))
    assert list(pairs.tasks) == ["choose", "say"]
    assert list(RunResult.load(tmp_path / "out" / "tuned.json").tasks) == ["choose", "say"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Wrong answers of" in report  # no flips, but what both get wrong
