"""Models that think before they answer are judged by their answers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alula.chat_template import TemplateSettings
from alula.evaluation import HarnessTasks, ItemTask, TaskItem, compare, evaluate, exact_match, run_harness
from alula.hosts import thoughts
from alula.hosts.thoughts import Said
from alula.serving import Conversation
from alula_fledgling.tasks import pope

WORDS = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<unk>", "red", "hm", "well", "blue"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if opening %}<think>{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
COLOR = ItemTask(
    "color",
    "color",
    [TaskItem("a", "f", [{"role": "user", "content": [{"type": "text", "text": "blue"}]}], "red")],
    exact_match,
    max_new_tokens=8,
)


@pytest.fixture(params=[False, True], ids=["plain tags", "special tags"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>", chat_template=TEMPLATE
    )
    made.add_tokens([AddedToken(word, special=True) for word in WORDS[2:4]], special_tokens=True)
    made.add_tokens([AddedToken(word, special=request.param) for word in WORDS[4:6]], special_tokens=request.param)
    return made


def saying(*words: str) -> LlamaForCausalLM:
    """A Llama without thoughts of its own: each word is followed by the next one of ``words``."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(weight.dim() == 1)  # norms stay, layers are silent
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 16))
        for before, after in pairwise(words):
            model.lm_head.weight[WORDS.index(after), WORDS.index(before)] = 1
    return model


THINKING = ("<|assistant|>", "<think>", "hm", "</think>", "red", "<|end|>")


@pytest.mark.parametrize("template", [{}, {"opening": True}, {"enable_thinking": False}], ids=str)
def test_the_answer_is_scored_without_its_thought(tokenizer: Any, template: dict[str, Any]) -> None:
    settings = TemplateSettings(template)
    (item,) = evaluate(saying(*THINKING), tokenizer, [COLOR], template=settings).tasks["color"].items
    thought = "" if template == {"enable_thinking": False} else "hm"
    assert (item.answer, item.thought, item.score, item.unfinished) == ("red", thought, 1.0, False)


def test_answers_that_never_leave_their_thought_are_wrong_and_counted(tokenizer: Any, tmp_path: Any) -> None:
    ever = saying("<|assistant|>", "<think>", "hm", "well", "hm")
    lenient = ItemTask("color", "color", COLOR.items(), lambda item, answer: 1.0, max_new_tokens=8)
    for _ in range(2):  # asked, then read from the journal
        task = evaluate(ever, tokenizer, [lenient], journal=tmp_path / "answers.jsonl").tasks["color"]
        (item,) = task.items
        assert (item.answer, item.score, item.unfinished, item.truncated) == ("", 0.0, True, True)
        assert item.thought.startswith("hm")
        assert "1 of 1 answers never left their thought and count as wrong" in task.notes
    thinking = evaluate(saying(*THINKING), tokenizer, [COLOR], name="thinking")
    notes = compare(evaluate(ever, tokenizer, [COLOR], name="ever"), thinking).tasks["color"].notes
    assert "ever: 1 of 1 answers never left their thought and count as wrong" in notes


def test_so_it_is_in_tasks_of_the_harness(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "color.jsonl").write_text('{"q": "blue"}\n{"q": "red"}\n')
    (tmp_path / "color.yaml").write_text(f"""
task: color
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/color.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: red
generation_kwargs: {{until: ["never"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
""")
    tasks = HarnessTasks(["color"], tmp_path, chat=True)
    for settings in ({}, {"opening": True}):
        told = TemplateSettings(settings)
        task = run_harness(saying(*THINKING), tokenizer, tasks, template=told).tasks["color"]
        assert [(item.answer, item.thought, item.score) for item in task.items] == [("red", "hm", 1.0)] * 2
    ever = saying("<|assistant|>", "<think>", "hm", "well", "hm")
    task = run_harness(ever, tokenizer, tasks).tasks["color"]
    assert [(item.answer, item.score, item.unfinished) for item in task.items] == [("", 0.0, True)] * 2
    assert "2 of 2 answers never left their thought and count as wrong" in task.notes


def test_nothing_said_is_no_yes() -> None:
    task = pope(n=6)
    for item in task.items():
        assert task.counts(item, None) == {f"unread_{item.gold}": 1.0, "neither": 1.0}


@pytest.mark.parametrize(
    ("text", "opened", "said"),
    [
        ("red", False, Said("", "red", True)),
        ("<think>\nhm\n</think>\n\nred", False, Said("hm", "red", True)),
        ("hm</think>red", True, Said("hm", "red", True)),
        ("hm</think>red", False, Said("hm", "red", True)),  # opened in the prompt in a way not known here
        ("<think></think>", False, Said("", "", True)),
        ("<think>hm", False, Said("hm", "", False)),
        ("hm", True, Said("hm", "", False)),
        ("<think>hm</think> <think>well</think> red", False, Said("hmwell", "red", True)),
        ("the tag is <think>.", False, Said("", "the tag is <think>.", True)),
        ("<think>hm</think>the tag is </think>.", False, Said("hm", "the tag is </think>.", True)),
        ("[THINK]hm[/THINK]red", False, Said("hm", "red", True)),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>red",
            False,
            Said("hm<|end|><|start|>assistant", "red", True),
        ),
        ("", False, Said("", "", True)),
    ],
)
def test_where_a_thought_ends(text: str, opened: bool, said: Said) -> None:
    assert thoughts.split(text, opened=opened) == said


def test_a_chat_remembers_answers_without_thoughts(tokenizer: Any) -> None:
    talk = Conversation(saying(*THINKING), tokenizer, max_new_tokens=8)
    talk.ask("blue", lambda text: None)
    assert talk.messages[-1]["content"] == [{"type": "text", "text": "red"}]
    silent = Conversation(
        saying(*THINKING), tokenizer, max_new_tokens=8, template=TemplateSettings({"enable_thinking": False})
    )
    assert silent.ask("blue", lambda text: None).text == "red"
