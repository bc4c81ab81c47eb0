"""Settings of chat templates: read by the template or refused, and the same at every door."""

from __future__ import annotations

from typing import Any

import pytest

import alula
from alula.chat_template import TemplateSettings
from alula.errors import UsageError
from alula.evaluation import ItemTask, RunResult, TaskItem, exact_match, run
from tests.hosts import tiny

THINKING = tiny.CHATML.replace(
    "{{- '<|im_start|>assistant\n' -}}",
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
)
"""as Qwen3's: an empty thought goes before the answer where thinking is switched off"""
ASK = {"role": "user", "content": [{"type": "text", "text": "what do you see?"}]}
TASK = ItemTask("one", "one", [TaskItem("a", "f", [ASK], "gold")], exact_match, max_new_tokens=2)
SILENT = TemplateSettings({"enable_thinking": False})


def parts(kind: str) -> tuple[Any, Any]:
    llm, tokenizer = tiny.decoder("llama"), tiny.tokenizer(THINKING)
    return (llm, tokenizer) if kind == "llm" else alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["llm", "host"])
def test_settings_reach_the_prompt_and_the_record(kind: str) -> None:
    model, processor = parts(kind)

    def asked(template: TemplateSettings | None) -> RunResult:
        return run(model, processor, [TASK], template=template)

    plain, silent = asked(None), asked(SILENT)
    spoken = asked(TemplateSettings({"enable_thinking": True}))
    hashes = [result.tasks["one"].items[0].prompt_hash for result in (plain, silent, spoken)]
    assert hashes[0] == hashes[2] != hashes[1]
    assert silent.conditions.template == {"enable_thinking": False}


@pytest.mark.parametrize("kind", ["llm", "host"])
def test_what_no_template_reads_is_refused(kind: str) -> None:
    model, processor = parts(kind)
    with pytest.raises(UsageError, match="without effect") as caught:
        run(model, processor, [TASK], template=TemplateSettings({"thinking": False}))
    assert caught.value.where == "template: thinking"
    assert "enable_thinking" in str(caught.value.remedy)


def test_pairs_are_read_as_yaml_writes_values() -> None:
    pairs = ["enable_thinking=False", "effort=low", "budget=3", "tools_of={a: [1, 2]}"]
    expected = {"enable_thinking": False, "effort": "low", "budget": 3, "tools_of": {"a": [1, 2]}}
    assert TemplateSettings.parse(pairs).to_dict() == expected
    assert TemplateSettings.parse([]) == TemplateSettings()


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["enable_thinking"], "NAME=VALUE"),
        (["enable_thinking="], "NAME=VALUE"),
        (["a=1", "a=2"], "twice"),
        (["a=[1"], "no value"),
        (["messages=x"], "not a setting"),
        (["bos_token=x"], "not a setting"),
        (["strftime_now=x"], "not a setting"),
        (["not-a-name=x"], "no name"),
        (["enable_thinking='false'"], "in quotes"),
        (["a=2026-01-01"], "JSON"),
        (["a=.nan"], "JSON"),
    ],
)
def test_pairs_that_say_nothing_are_refused(pairs: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TemplateSettings.parse(pairs)
