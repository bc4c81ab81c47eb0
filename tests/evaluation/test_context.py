"""Prompts that do not fit into a model's context are not answered as if they did."""

from __future__ import annotations

import copy
import html
from typing import Any

import pytest
import transformers as hf
from peft import PrefixTuningConfig

from alula.errors import EvaluationError
from alula.evaluation import ItemTask, RunResult, TaskItem, compare, evaluate, exact_match
from alula.hosts.context import context_length
from alula.hosts.prompted import PromptedModel
from alula.reports import run_report

LENGTHS = (10, 40, 20, 60)
FRAME = 22  # tokens around a question


def task(*lengths: int, max_new_tokens: int = 4) -> ItemTask:
    items = [
        TaskItem(f"of-{n}", "f", [{"role": "user", "content": [{"type": "text", "text": "x" * n}]}], "zz")
        for n in lengths
    ]
    return ItemTask("t", "t", items, exact_match, max_new_tokens)


def within(llm: Any, context: int) -> Any:
    bounded = copy.deepcopy(llm)
    bounded.config.max_position_embeddings = context
    return bounded


def answers(result: RunResult) -> dict[str, str]:
    return {item.id: item.answer for item in result.tasks["t"].items}


def test_prompts_that_do_not_fit_are_left_out_and_named(llm: Any, tokenizer: Any) -> None:
    free = evaluate(llm, tokenizer, [task(*LENGTHS)])
    bound = evaluate(within(llm, 50 + FRAME), tokenizer, [task(*LENGTHS)], name="bound")
    assert answers(bound) == {name: answers(free)[name] for name in ("of-10", "of-40", "of-20")}
    found = bound.tasks["t"]
    assert [(item.id, item.tokens) for item in found.too_long] == [("of-60", 60 + FRAME)]
    (note,) = [note for note in found.notes if "not asked" in note]
    assert note.startswith("1 of 4 questions were not asked")
    assert "context of 72 tokens: 'of-60' (82 tokens)" in note
    assert note in html.unescape(run_report(bound))


@pytest.mark.parametrize("room", [1, 3])
def test_an_answer_ends_where_the_context_does(llm: Any, tokenizer: Any, room: int) -> None:
    whole = answers(evaluate(llm, tokenizer, [task(40, max_new_tokens=12)]))["of-40"]
    (item,) = evaluate(within(llm, 40 + FRAME + room), tokenizer, [task(40, max_new_tokens=12)]).tasks["t"].items
    assert whole.startswith(item.answer)
    assert len(item.answer) <= room
    assert item.truncated


@pytest.mark.parametrize("prompt", [0, 3])
def test_learned_positions_are_never_overrun(tokenizer: Any, prompt: int) -> None:
    """Nor where some of them are a learned prompt's."""
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=48 + FRAME + prompt,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = hf.GPT2LMHeadModel(config).eval()
    if prompt:
        model = PromptedModel(model, PrefixTuningConfig(num_virtual_tokens=prompt, task_type="CAUSAL_LM")).eval()
    result = evaluate(model, tokenizer, [task(10, 46, 47, 48, max_new_tokens=8)]).tasks["t"]
    assert [item.id for item in result.items] == ["of-10", "of-46", "of-47"]


def test_a_task_that_does_not_fit_at_all_is_refused(llm: Any, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="none of its items fits into the model's context of 20 tokens"):
        evaluate(within(llm, 20), tokenizer, [task(40, 60)])


def test_turns_behind_one_that_does_not_fit_are_left_out_too(llm: Any, tokenizer: Any) -> None:
    def say(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    first, talk = [say("user", "x" * 40)], [say("user", "x" * 40), say("assistant", "z"), say("user", "y")]
    items = [
        TaskItem("short", "f", [say("user", "x")], "z"),
        TaskItem("other", "g", [say("user", "x")], "z"),
        TaskItem("a", "f", first, "z", scored=False),
        TaskItem("b", "f", talk, "z", follows=((1, "a"),)),
    ]
    result = evaluate(within(llm, 30 + FRAME), tokenizer, [ItemTask("t", "t", items, exact_match, 2)]).tasks["t"]
    assert [item.id for item in result.items] == ["short", "other"]
    assert result.notes[0].endswith("by family: f 1")
    assert [item.id for item in result.too_long] == ["b"]


def test_only_the_same_questions_are_compared(llm: Any, tokenizer: Any) -> None:
    runs = {n: evaluate(within(llm, n + FRAME), tokenizer, [task(*LENGTHS)], name=f"up-to-{n}") for n in (30, 50, 52)}
    pairs = compare(runs[50], runs[52]).tasks["t"]
    assert pairs.overall.n == 3
    assert any(note.startswith("up-to-50: 1 of 4 questions were not asked") for note in pairs.notes)
    for first, second in ((30, 50), (50, 30)):
        with pytest.raises(EvaluationError, match=r"up-to-30 was not asked item 'of-40'.*62 of the 52 tokens"):
            compare(runs[first], runs[second])


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (hf.LlamaConfig(), 2048),
        (hf.LlavaConfig(text_config=hf.Qwen2Config(max_position_embeddings=100)), 100),
        (hf.GPT2Config(n_positions=77), 77),
        (hf.LlamaConfig(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 4096),
        (
            hf.Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
        (hf.Gemma3TextConfig(rope_scaling={"rope_type": "linear", "factor": 8.0}), 131072),
        (hf.BloomConfig(), None),
        (hf.MambaConfig(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, hf.PreTrainedConfig) else str(value),
)
def test_the_context_of_a_config(config: Any, length: int | None) -> None:
    class Model:
        pass

    model = Model()
    model.config = config  # type: ignore[attr-defined]
    assert context_length(model) == length
