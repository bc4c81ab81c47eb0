"""How likely references are: against one forward per conversation, and what cannot be weighed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from PIL import Image

from alula.chat_template import TemplateSettings
from alula.errors import EvaluationError, UsageError
from alula.evaluation import ItemTask, PairedRun, RunResult, TaskItem, compare, evaluate, exact_match
from alula.evaluation.ratios import ALL
from alula.evaluation.references import REFERENCES
from alula.hosts.prompted import PromptedModel
from alula.inputs import Intake
from alula.policies import Prune, Skip
from alula.reports import run_report
from alula.seam.dialect import cache_keyword, cache_of_output

NAME = REFERENCES.name


def says(role: str, text: str, *images: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def task(*golds: str, images: bool = False) -> ItemTask:
    """Items of one to three turns, with pictures where asked."""
    drawn = np.random.default_rng(0)
    items = []
    for number, gold in enumerate(golds):
        earlier = [says("user", "hi " * number), says("assistant", "ho")] if number % 2 else []
        pixels = drawn.integers(0, 255, (2, 30, 30, 3), dtype=np.uint8)
        shown = [Image.fromarray(each) for each in pixels[: 1 + number % 2]] if images else []
        asked = [*earlier, says("user", "ask " + "x" * 7 * number, *shown)]
        items.append(TaskItem(f"i{number}", "f", asked, gold, cluster=f"c{number // 2}"))
    return ItemTask("t", "t", items, exact_match, max_new_tokens=2)


def weighed(model: Any, processor: Any, asked: ItemTask, **options: Any) -> RunResult:
    return evaluate(model, processor, [asked], references=["t"], **options)


def found(run: RunResult) -> dict[str, tuple[float, float]]:
    return {
        item.id: (item.counts["reference_nats"], item.counts["reference_tokens"])
        for item in run.tasks["t"].items
        if "reference_nats" in item.counts
    }


@torch.no_grad()
def by_hand(model: Any, processor: Any, item: TaskItem) -> tuple[float, int]:
    """One forward over the conversation that the template writes, the reference's tokens added up one by one."""
    whole = [*item.messages, says("assistant", item.gold)]
    inputs = processor.apply_chat_template(whole, tokenize=True, return_dict=True, return_tensors="pt")
    before = processor.apply_chat_template(
        [*item.messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )["input_ids"].shape[1]
    ids = inputs["input_ids"][0].tolist()
    logs = model(**inputs).logits[0, -len(ids) :].double().log_softmax(dim=-1)  # a learned prompt stands in front
    assert len(ids) == before + len(item.gold) + 1, "one token a character, and the one that ends the turn"
    return -sum(float(logs[at - 1, ids[at]]) for at in range(before, len(ids) - 1)), len(item.gold)


GOLDS = ("a", "long answer with words", "no", "7", "a, b and c")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_references_against_one_forward_each(kind: str, batch_size: int, request: pytest.FixtureRequest) -> None:
    pictures = kind == "pictures"
    model, processor = (
        request.getfixturevalue(name) for name in (("host", "processor") if pictures else ("llm", "tokenizer"))
    )
    asked = task(*GOLDS, images=pictures)
    run = weighed(model, processor, asked, batch_size=batch_size)
    expected = {item.id: by_hand(model, processor, item) for item in asked.items()}
    assert found(run).keys() == expected.keys()
    for name, (nats, tokens) in expected.items():
        assert found(run)[name] == (pytest.approx(nats, rel=1e-5), tokens)
    total, count = (sum(column) for column in zip(*expected.values(), strict=True))
    figure = run.tasks["t"].figures[ALL][NAME]
    assert figure is not None
    assert figure.value == pytest.approx(total / count, rel=1e-5)
    assert figure.low < figure.value < figure.high
    assert "nats per token of the reference" in run_report(run)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_adapters_of_peft(kind: str, llm: Any, tokenizer: Any) -> None:
    """Logits behind a learned prompt of embeddings are more than there are tokens."""
    learned = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
    base = copy.deepcopy(llm)
    torch.manual_seed(0)
    if kind in learned:
        model: Any = PromptedModel(base, learned[kind](num_virtual_tokens=3, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.normal_(std=2)
    else:
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    asked = task(*GOLDS)
    run = weighed(model.eval(), tokenizer, asked, batch_size=2)
    for item in asked.items():
        nats, tokens = by_hand(model, tokenizer, item)
        assert found(run)[item.id] == (pytest.approx(nats, rel=1e-4), tokens)
    assert found(run)["i1"] != (pytest.approx(by_hand(llm, tokenizer, asked.items()[1])[0], rel=1e-3), len(GOLDS[1]))


POLICIES = {
    "by the last token of a prompt": Prune(stages=[(1, 0.5)]),
    "in prompts": Skip(part="block", layers=(1,), tokens="all", when="prompts", keys="lent"),
    "in steps": Skip(part="mlp", layers=(1,), tokens="all", when="steps"),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_see_a_prompt_and_what_is_said_behind_it(
    policy: str, batch_size: int, host: Any, processor: Any
) -> None:
    asked, model = task(*GOLDS, images=True), copy.deepcopy(host)
    POLICIES[policy].attach(model)
    run = weighed(model, processor, asked, batch_size=batch_size)
    expected = {item.id: said_by_hand(model, processor, item) for item in asked.items()}
    assert found(run) == {name: (pytest.approx(nats, rel=1e-4), tokens) for name, (nats, tokens) in expected.items()}
    whole = {item.id: by_hand(host, processor, item) for item in asked.items()}
    assert any(nats != pytest.approx(whole[name][0], rel=1e-3) for name, (nats, _) in expected.items())


@torch.no_grad()
def said_by_hand(model: Any, processor: Any, item: TaskItem) -> tuple[float, int]:
    """The prompt, then the reference token by token behind a cache."""
    given: Any = dict(
        processor.apply_chat_template(
            [*item.messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )
    nats, mask = 0.0, given["attention_mask"]
    for character in item.gold:
        output = model(**given, use_cache=True)
        token = processor.tokenizer.convert_tokens_to_ids(character)
        nats -= float(output.logits[0, -1].double().log_softmax(dim=-1)[token])
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        given = {"input_ids": torch.tensor([[token]]), "attention_mask": mask, cache_keyword(): cache_of_output(output)}
    return nats, len(item.gold)


def test_an_empty_reference_is_named(llm: Any, tokenizer: Any) -> None:
    """Templates may write nothing of it: then the last answer of the conversation is one of its history."""
    run = weighed(llm, tokenizer, task("a", "", "b", " "))
    assert found(run).keys() == {"i0", "i2"}
    (note,) = [note for note in run.tasks["t"].notes if "leaves out" in note]
    assert note.endswith("(2): 'i1' (an empty reference), 'i3' (an empty reference)")


def test_a_base_is_weighed_in_the_words_of_the_host(llm: Any, host: Any, processor: Any) -> None:
    """A text model that is asked through a host's processor weighs what the host's own decoder would."""
    inner = copy.deepcopy(llm)
    inner.model, inner.lm_head = host.model.language_model, host.lm_head
    before = weighed(inner, Intake(processor, text_only=True), task(*GOLDS), name="base")
    after = weighed(host, processor, task(*GOLDS), name="tuned")
    for name, (nats, tokens) in found(after).items():
        assert found(before)[name] == (pytest.approx(nats, rel=1e-5), tokens)
    change = compare(before, after).tasks["t"].figures[ALL][NAME]
    assert change.difference is not None
    assert change.difference.value == pytest.approx(0, abs=1e-5)


def test_two_models_are_compared(llm: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(llm)
    with torch.no_grad():
        other.lm_head.weight += 0.3 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    first, second = (weighed(model, tokenizer, task(*GOLDS)) for model in (llm, other))
    change = PairedRun.model_validate_json(compare(first, second).model_dump_json()).tasks["t"].figures[ALL][NAME]
    per_token = [
        sum(n for n, _ in found(run).values()) / sum(t for _, t in found(run).values()) for run in (first, second)
    ]
    assert change.base is not None
    assert change.difference is not None
    assert change.base.value == pytest.approx(per_token[0])
    assert change.difference.value == pytest.approx(per_token[1] - per_token[0])


def test_what_is_weighed_is_kept(llm: Any, tokenizer: Any, tmp_path: Path) -> None:
    asked, journal = task(*GOLDS), tmp_path / "journal.jsonl"
    whole = weighed(llm, tokenizer, asked, journal=journal, batch_size=2)
    lines = journal.read_text().splitlines()
    forwards: list[int] = []
    watched = copy.deepcopy(llm)
    watched.register_forward_pre_hook(lambda *_: forwards.append(1))
    again = weighed(watched, tokenizer, asked, journal=journal, batch_size=2)
    assert found(again) == found(whole)
    assert not forwards
    # killed before the last batch was kept: it is weighed as a whole again
    journal.write_text("\n".join(lines[:-1]) + "\n")
    assert found(weighed(watched, tokenizer, asked, journal=journal, batch_size=2)) == found(whole)
    assert len(forwards) == 1
    # another reference is weighed anew, though the question is the same
    other = weighed(watched, tokenizer, task("b", *GOLDS[1:]), journal=journal, batch_size=2)
    expected = by_hand(llm, tokenizer, task("b").items()[0])
    assert found(other)["i0"] == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert {name: value for name, value in found(other).items() if name != "i0"} == {
        name: (pytest.approx(nats, rel=1e-5), tokens) for name, (nats, tokens) in found(whole).items() if name != "i0"
    }


def test_what_a_template_writes_otherwise_is_weighed_anew(llm: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The prompts are the same, and a journal holds what they were answered with."""
    loud = copy.deepcopy(tokenizer)
    loud.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}", "{{ message.content | upper if loud and message.role != 'user' else message.content }}"
    )
    asked, quiet, told = task(*GOLDS), TemplateSettings({"loud": False}), TemplateSettings({"loud": True})
    plain = TaskItem("i0", "f", [says("user", "ask ")], "A")
    first = weighed(llm, loud, asked, template=quiet, journal=tmp_path / "journal.jsonl")
    again = weighed(llm, loud, asked, template=told, journal=tmp_path / "journal.jsonl")
    assert found(first)["i0"] == (pytest.approx(by_hand(llm, tokenizer, asked.items()[0])[0], rel=1e-5), 1)
    assert found(again)["i0"] == (pytest.approx(by_hand(llm, tokenizer, plain)[0], rel=1e-5), 1)


def test_one_model_alone_is_weighed(llm: Any, tokenizer: Any) -> None:
    asked = task(*GOLDS)
    with_, without = weighed(llm, tokenizer, asked, name="one"), evaluate(llm, tokenizer, [asked], name="other")
    for pair in ((with_, without), (without, with_)):
        told = compare(*pair).tasks["t"]
        assert told.ratios == []
        assert told.figures == {}
        assert "how likely references are was weighed of one alone" in told.notes


def test_references_that_do_not_fit_are_named_and_take_no_part(llm: Any, tokenizer: Any) -> None:
    small = copy.deepcopy(llm)
    small.config.max_position_embeddings = 90
    asked = task("a", "long " * 20, "b")
    run = weighed(small, tokenizer, asked)
    assert found(run).keys() == {"i0", "i2"}
    (note,) = [note for note in run.tasks["t"].notes if "leaves out" in note]
    assert note.startswith("how likely references are leaves out (1): 'i1' (")
    assert "context of 90" in note
    # a model with room for it does not count it either, beside one without
    pairs = compare(run, weighed(llm, tokenizer, asked)).tasks["t"]
    difference = pairs.figures[ALL][NAME].difference
    assert difference is not None
    assert difference.value == pytest.approx(0, abs=1e-5)
    assert any("leaves out 1" in note for note in pairs.notes)


def test_progress_ends_where_it_says(llm: Any, tokenizer: Any, capsys: Any) -> None:
    small = copy.deepcopy(llm)
    small.config.max_position_embeddings = 60
    asked = task("a", "long " * 20, "", "b", "c", "d", "e")
    run = weighed(small, tokenizer, asked, progress=True)
    assert run.tasks["t"].too_long
    assert run.tasks["t"].unweighed
    assert "references of t: 14/14 in" in capsys.readouterr().err


def test_one_question_has_no_interval(llm: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A bootstrap of one thing has no width, which is no certainty."""
    run = weighed(llm, tokenizer, task("a long answer"))
    pairs = compare(run, run)
    file = pairs.save(tmp_path / "paired.json")
    change = PairedRun.load(file).tasks["t"].figures[ALL][NAME]
    for estimate in (run.tasks["t"].figures[ALL][NAME], change.base, change.tuned, change.difference):
        assert estimate is not None
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)
    assert change.difference is not None
    assert change.difference.value == 0
    assert "no interval" in run_report(run)
    two = weighed(llm, tokenizer, task("a", "", "b")).tasks["t"].figures[ALL][NAME]
    assert two is not None
    assert two.low < two.value < two.high


def test_what_cannot_be_weighed_is_refused_before_anything_is_asked(llm: Any, tokenizer: Any) -> None:
    for named in (["other"], "other", ["t", "other"]):
        with pytest.raises(UsageError, match="no task 'other'") as refused:
            evaluate(llm, tokenizer, [task("a")], references=named)
        assert refused.value.remedy == "name one of t"
    with pytest.raises(UsageError, match="the references of 't' are no answers"):
        weighed(llm, tokenizer, replace(task("a, b"), answers=False))
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = "{{ messages[-1].content[0].text }}{% if messages | length > 4 %}{% endif %}<|end|>"
    assert evaluate(llm, silent, [task("a")]).tasks["t"].ratios == []
    with pytest.raises(UsageError):
        weighed(llm, silent, task("a"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_of_no_finite_numbers_is_refused(value: float, llm: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(llm)
    with torch.no_grad():
        broken.lm_head.weight[tokenizer.convert_tokens_to_ids("a")] = value
    with pytest.raises(EvaluationError, match="not a finite number"):
        weighed(broken, tokenizer, task("a"))
