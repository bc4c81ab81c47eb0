"""PaliGemma: its processor makes labels of a suffix, all -100 where there is none (loss NaN), and changes the text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from alula.data import Collator
from alula.errors import EvaluationError, UsageError
from alula.evaluation import ItemTask, TaskItem, evaluate, exact_match
from alula.serving import Conversation
from tests import media_hosts

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (9, 5), "blue")
TEMPLATE = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<image>"
TEMPLATE += "{% endif %}{% endfor %}{% endfor %}{% generation %}{% endgeneration %}"


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    tokenizer = copy.deepcopy(tokenizer)  # the processor adds a thousand tokens
    tokenizer.add_special_tokens({"bos_token": "<|system|>"})
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(processor: PaliGemmaProcessor) -> Any:
    size = len(processor.tokenizer)
    text = media_hosts.text("gemma", head_dim=8, vocab_size=size, pad_token_id=0, eos_token_id=1)
    tower = {**media_hosts.siglip(), "projection_dim": 32}
    parts = {"vision_config": tower, "text_config": text, "projection_dim": 32, "hidden_size": 32}
    return media_hosts.build("paligemma", **parts, image_token_id=processor.image_token_id, vocab_size=size)


def asked(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@torch.no_grad()
def expected(model: Any, processor: PaliGemmaProcessor, messages: list[dict[str, Any]]) -> str:
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs.pop("labels").eq(-100).all()
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_prompts_hold_no_labels(model: Any, processor: PaliGemmaProcessor) -> None:
    prompts = [asked("what?", RED), asked("what is the colour?", BLUE)]
    items = [TaskItem(str(n), "f", messages, "red") for n, messages in enumerate(prompts)]
    task = ItemTask("color", "color", items, exact_match, max_new_tokens=5)
    answers = evaluate(model, processor, [task], batch_size=2).tasks["color"].items
    assert [item.answer for item in answers] == [expected(model, processor, messages).strip() for messages in prompts]
    conversation = Conversation(model, processor, max_new_tokens=5)
    conversation.attach(RED)
    assert conversation.ask("what?", lambda text: None).text == expected(model, processor, prompts[0])


def test_training_and_dialogues_are_refused_by_name(processor: PaliGemmaProcessor) -> None:
    for options in ({}, {"labels": False}, {"train": False}):
        with pytest.raises(UsageError, match=r"PaliGemmaProcessor makes labels by itself"):
            Collator(processor, **options)


def test_a_prompt_without_an_image_is_refused_by_name(model: Any, processor: PaliGemmaProcessor) -> None:
    task = ItemTask("text", "text", [TaskItem("a", "f", asked("what?"), "red")], exact_match, max_new_tokens=5)
    with pytest.raises(EvaluationError, match=r"the PaliGemmaProcessor refuses the prompt: `images` are expected"):
        evaluate(model, processor, [task])
