"""Settings of chat templates: read by the template or refused, and the same at every door."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import alula
from alula.chat_template import TemplateSettings, fixed
from alula.data import Collator, Sample
from alula.errors import EvaluationError, UsageError
from alula.evaluation import ItemTask, RunResult, TaskItem, compare, evaluate, exact_match
from alula.hosts.templates import adapt
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


def parts(kind: str, template: str = THINKING) -> tuple[Any, Any]:
    llm, tokenizer = tiny.decoder("llama"), tiny.tokenizer(template)
    return (llm, tokenizer) if kind == "llm" else alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["llm", "host"])
def test_settings_reach_the_prompt_and_the_record(kind: str) -> None:
    model, processor = parts(kind)

    def asked(template: TemplateSettings | None) -> RunResult:
        return evaluate(model, processor, [TASK], template=template)

    plain, silent = asked(None), asked(SILENT)
    spoken = asked(TemplateSettings({"enable_thinking": True}))
    hashes = [result.tasks["one"].items[0].prompt_hash for result in (plain, silent, spoken)]
    assert hashes[0] == hashes[2] != hashes[1]
    assert silent.conditions.template == {"enable_thinking": False}


@pytest.mark.parametrize("kind", ["llm", "host"])
def test_what_no_template_reads_is_refused(kind: str) -> None:
    model, processor = parts(kind)
    with pytest.raises(UsageError, match="without effect") as caught:
        evaluate(model, processor, [TASK], template=TemplateSettings({"thinking": False}))
    assert caught.value.where == "template: thinking"
    assert "enable_thinking" in str(caught.value.remedy)


def test_pairs_are_read_as_yaml_writes_values() -> None:
    pairs = ["enable_thinking=False", "effort=low", "budget=3", "tools_of={a: [1, 2]}"]
    expected = {"enable_thinking": False, "effort": "low", "budget": 3, "tools_of": {"a": [1, 2]}}
    assert TemplateSettings.parse(pairs).arguments == expected
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


DATED = "{{- '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' -}}" + tiny.CHATML
"""as Granite's: today's date goes before the first message"""


def literal(date: str) -> str:
    return DATED.replace("strftime_now('%d %b %Y')", f"'{date}'")


@pytest.mark.parametrize("kind", ["llm", "host"])
def test_a_template_that_writes_todays_date_is_told_a_fixed_one(kind: str) -> None:
    (model, processor), (_, plain) = parts(kind, DATED), parts(kind, literal("26 Jul 2024"))
    today, written = evaluate(model, processor, [TASK], name="today"), evaluate(model, plain, [TASK])
    assert today.tasks["one"].items[0].token_ids == written.tasks["one"].items[0].token_ids
    assert (today.conditions.template, written.conditions.template) == ({"date": "2024-07-26"}, {})
    other = evaluate(model, processor, [TASK], template=TemplateSettings.parse(["date=2025-01-02"]))
    _, expected = parts(kind, literal("02 Jan 2025"))
    assert other.tasks["one"].items[0].token_ids == evaluate(model, expected, [TASK]).tasks["one"].items[0].token_ids
    with pytest.raises(EvaluationError, match=r"template: \{'date': '2024-07-26'\} against \{'date': '2025-01-02'\}"):
        compare(today, other)


def test_a_conversation_is_told_todays_date_unless_another_is_set() -> None:
    tokenizer = tiny.tokenizer(DATED)
    assert TemplateSettings().keywords(tokenizer, live=True) == {}
    set_once = TemplateSettings({"date": datetime.date(2025, 1, 2)})
    told = set_once.keywords(tokenizer, live=True)
    assert told == set_once.keywords(tokenizer)
    assert "02 Jan 2025" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, **told)


def test_a_template_that_writes_the_time_is_adapted() -> None:
    template = DATED.replace("%d %b %Y", "%H:%M:%S.%f")
    adapted = adapt(tiny.tokenizer(template), {"image": "<image>"}, ["<|im_end|>"])
    assert "strftime_now('%H:%M:%S.%f')" in adapted


def test_training_and_measuring_tell_it_the_same_date() -> None:
    (_, processor), (_, written) = parts("host", DATED), parts("host", literal("26 Jul 2024"))
    sample = Sample(id="a", messages=[ASK, {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]}])
    dated, expected = (Collator(each)([sample]) for each in (processor, written))
    assert {key: value.tolist() for key, value in dated.items()} == {
        key: value.tolist() for key, value in expected.items()
    }


def test_a_calendar_that_stands_still_writes_what_the_real_one_writes() -> None:
    formats = "%d %b %Y|%-d.%-m.%y|%A, %B %e %Y|%Y-%m-%dT%H:%M:%S|%j %U %%d %%%d"
    asking = f"strftime_now('{formats}')"
    template = "\n  {% if strftime_now is defined %}{{ ASKING }}{% endif %}\n {% if true %}a{% endif %}\n"
    template = template.replace("ASKING", asking)
    day = datetime.datetime(2025, 3, 9)
    rendered = [
        render_jinja_template([[ASK]], chat_template=each)[0][0]
        for each in (fixed(template, day.date()), template.replace(asking, repr(day.strftime(formats))))
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize(("template", "date"), [(tiny.CHATML, "2025-01-02"), (DATED, "yesterday"), (DATED, 20250102.0)])
def test_dates_without_effect_or_sense_are_refused(template: str, date: Any) -> None:
    told = r"template: date: (the chat template of this model does not read|.* is no date)"
    with pytest.raises(UsageError, match=told):
        TemplateSettings({"date": date}).keywords(tiny.tokenizer(template))
