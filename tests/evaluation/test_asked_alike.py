"""Two models that are compared were given the same token ids: BOS, chat templates, and what is said where they were
not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import alula
from alula.chat_template import TemplateSettings
from alula.errors import EvaluationError, UsageError
from alula.evaluation import (
    HarnessTasks,
    ItemTask,
    RunResult,
    TaskItem,
    compare,
    evaluate,
    exact_match,
    run_harness,
    run_session,
    token_ids,
)
from alula.evaluation.prompts import encode
from alula.hosts import load_host, save_host
from tests.hosts import tiny

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

WITH_BOS = "{{- bos_token -}}" + tiny.CHATML
CHOOSE = """
output_type: multiple_choice
doc_to_choice: ["red", "a blue circle"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
SAY = """
output_type: generate_until
doc_to_target: ""
generation_kwargs: {until: ["q"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alike")
    asked = ["what do you see?", "<s>how many?", "three", "of lines ", ""]
    (root / "data.jsonl").write_text("".join(json.dumps({"q": q}) + "\n" for q in asked))
    files = f"{{data_files: {{test: {root}/data.jsonl}}, cache_dir: {root}/cache}}"
    common = f'\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test\ndoc_to_text: "{{{{q}}}}"'
    for name, rest in (("choose", CHOOSE), ("say", SAY)):
        (root / f"{name}.yaml").write_text(f"task: {name}{common}{rest}")
    return root


def writing_bos(template: str = tiny.CHATML) -> PreTrainedTokenizerFast:
    return tiny.tokenizer(template, add_bos_token=True)


@pytest.fixture(scope="module")
def llm() -> Any:
    return tiny.decoder("llama")


@pytest.fixture(scope="module")
def host(llm: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untrained host of `llm`, whose tokenizer writes BOS; saved and loaded, as most are."""
    built = alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=writing_bos())
    return load_host(save_host(built, tmp_path_factory.mktemp("host") / "host"))


def rows(result: RunResult, task: str) -> list[list[list[int]]]:
    return [token_ids.read(item.token_ids) for item in result.tasks[task].items]


def test_an_untrained_host_is_asked_what_its_llm_is_asked(llm: Any, host: Any, folder: Path) -> None:
    tokenizer = writing_bos()
    tasks = HarnessTasks(["choose", "say:exact_match"], folder)
    before, after = run_harness(llm, tokenizer, tasks), run_harness(*host, tasks)
    for name, result in compare(before, after).tasks.items():
        assert result.identical_answers == result.overall.n == 5
        assert before.tasks[name].settings["opening"] == ["<s>"]
        assert rows(before, name) == rows(after, name)
    asked = tokenizer(["what do you see? red", "what do you see? a blue circle"]).input_ids
    assert rows(after, "choose")[0] == asked  # what the language model's tokenizer writes, to the letter
    assert {row[:2].count(1) for item in rows(after, "choose") for row in item} == {1}
    # one that starts with BOS by itself is not the measure of its batch
    assert [item[0][0] for item in rows(after, "say:exact_match")] == [1] * 5
    assert rows(after, "say:exact_match")[1] == [tokenizer("how many?").input_ids]


def test_a_placeholder_as_a_word_is_what_the_llm_reads(host: Any) -> None:
    """The host's vocabulary holds the word as a token, its language model's does not."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "what is <image>, the element?"}]}]
    tokenizer = writing_bos()
    assert tokenizer.convert_tokens_to_ids("<image>") == tokenizer.unk_token_id
    prompt = encode(host.processor, asked)
    assert host.processor.image_token_id not in prompt.ids
    assert prompt.ids == encode(tokenizer, asked).ids


def test_a_tokenizer_that_ends_texts_by_itself_does_not_end_prompts(llm: Any, folder: Path) -> None:
    """EOS at the end of the question and of the choice: the harness would score the wrong tokens."""
    tasks = HarnessTasks(["choose", "say"], folder)
    plain, ending = (
        run_harness(llm, tiny.tokenizer(add_bos_token=True, add_eos_token=eos), tasks) for eos in (False, True)
    )
    for result in compare(plain, ending).tasks.values():
        assert result.identical_answers == result.overall.n


def test_other_ids_are_refused_with_the_place(llm: Any, folder: Path) -> None:
    tasks = HarnessTasks(["choose"], folder)
    with_bos, without = (run_harness(llm, tokenizer, tasks) for tokenizer in (writing_bos(), tiny.tokenizer()))
    first = token_ids.read(without.tasks["choose"].items[0].token_ids)[0][0]
    told = f"token ids of item 'choose/0' differ from position 0 on, 1 against {first}"
    with pytest.raises(EvaluationError, match=told):
        compare(with_bos, without)
    assert [item.prompt_hash for item in with_bos.tasks["choose"].items] == [
        item.prompt_hash for item in without.tasks["choose"].items
    ]  # the texts are the same
    for item in without.tasks["choose"].items:  # a file of an earlier version
        item.token_ids = ""
    without.model = "old"
    assert any("old: token ids were not recorded" in note for note in compare(with_bos, without).tasks["choose"].notes)


@pytest.mark.parametrize("base_writes", [True, False])
def test_the_bases_rule_counts_for_both(llm: Any, folder: Path, base_writes: bool) -> None:
    """A tuned model saved with another tokenizer setting than its base's."""
    tokenizers = {"base": writing_bos(), "tuned": tiny.tokenizer()}
    if not base_writes:
        tokenizers = {"base": tokenizers["tuned"], "tuned": tokenizers["base"]}
    session = run_session(
        "tuned",
        lambda name: (llm, tokenizers[name]),
        lambda processor: [],
        base="base",
        harness=HarnessTasks(["say"], folder),
    )
    assert session.paired is not None
    assert session.paired.tasks["say"].identical_answers == 5
    starts = [item[0][:1] == [1] for item in rows(session.tuned, "say")]
    assert starts == [base_writes or number == 1 for number in range(5)]


@pytest.mark.parametrize("template", [tiny.CHATML, WITH_BOS])
@pytest.mark.parametrize("kind", ["llm", "host"])
def test_chat_prompts_are_those_of_the_template(llm: Any, folder: Path, template: str, kind: str) -> None:
    """Its BOS, if it has one, and no second one by the tokenizer, which would write one."""
    tokenizer = writing_bos(template)
    model, processor = llm, tokenizer
    if kind == "host":
        model, processor = alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=copy.deepcopy(tokenizer))
    result = run_harness(model, processor, HarnessTasks(["choose"], folder, chat=True, n=1))
    ask = {"role": "user", "content": "what do you see?"}
    own = tokenizer.apply_chat_template([ask], add_generation_prompt=True, return_dict=False)
    assert rows(result, "choose")[0][0][: len(own)] == own
    assert own.count(1) == (template == WITH_BOS)


def test_chat_prompts_are_dated_alike(llm: Any, folder: Path) -> None:
    head = "{{- '<|im_start|>system\n' + @DATE@ + '<|im_end|>\n' -}}" + tiny.CHATML
    tasks, later = HarnessTasks(["choose"], folder, chat=True, n=2), TemplateSettings({"date": "2025-01-02"})
    today, other, then = (
        run_harness(llm, tiny.tokenizer(head.replace("@DATE@", date)), tasks, template=template)
        for date, template in (
            ("strftime_now('%d %b %Y')", None),
            ("strftime_now('%d %b %Y')", later),
            ("'26 Jul 2024'", None),
        )
    )
    assert rows(today, "choose") == rows(then, "choose")
    assert today.conditions.template == {"date": "2024-07-26"}
    with pytest.raises(EvaluationError, match=r"template: .*2024-07-26.* against .*2025-01-02"):
        compare(today, other)
    with pytest.raises(UsageError, match="without effect"):
        run_harness(llm, tiny.tokenizer(), HarnessTasks(["say"], folder), template=later)


def test_two_bos_are_refused_wherever_prompts_are_made(llm: Any, folder: Path) -> None:
    twice = writing_bos("{{- bos_token + bos_token -}}" + tiny.CHATML)
    with pytest.raises(EvaluationError, match="'<s>' twice"):
        run_harness(llm, twice, HarnessTasks(["say"], folder, chat=True))
    ask = {"role": "user", "content": [{"type": "text", "text": "what do you see?"}]}
    task = ItemTask("one", "one", [TaskItem("a", "f", [ask], "gold")], exact_match, max_new_tokens=2)
    with pytest.raises(EvaluationError, match="BOS twice"):
        evaluate(llm, twice, [task])


def test_a_token_the_vocabulary_lacks_is_refused(llm: Any, folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'<bos>', which is not in the vocabulary"):
        run_harness(llm, tiny.tokenizer(), HarnessTasks(["say"], folder), opening=["<bos>"])


def test_a_model_of_nan_is_not_scored(llm: Any, folder: Path) -> None:
    broken = copy.deepcopy(llm)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(EvaluationError, match="not a number"):
        run_harness(broken, tiny.tokenizer(), HarnessTasks(["choose"], folder))


def test_ids_are_read_as_they_were_written() -> None:
    for asked in ([[1, 7, 7, 7, 2], [1, 7, 7, 7, 3, 3]], [[5]], [[], [1]], [[1, 2], [1, 2]], [[3, 3]] * 3):
        assert token_ids.read(token_ids.write(asked)) == asked
    assert token_ids.write([[1, *[9] * 576, 2], [1, *[9] * 576, 4]]) == "1 9*576 2|^577 4"
    one, two = token_ids.write([[1, 2, 3], [1, 2]]), token_ids.write([[1, 2, 3], [1, 2, 5]])
    assert token_ids.difference(one, one) is None
    assert token_ids.difference(one, two) == (1, 2, None, 5)
