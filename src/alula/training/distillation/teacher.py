"""A teacher: a model that is asked text questions, and whose answers are written down with their distributions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.chat_template import TemplateSettings
from alula.data import IGNORED, Collator, Sample, SourceSpec, TooLongError, message_text, open_source
from alula.data.samples import text_part, user
from alula.data.soft_labels import SoftLabels
from alula.errors import DataError, HostError
from alula.evaluation import ItemTask, TaskItem, evaluate
from alula.grafts.browse.reading import prompt_ends
from alula.hosts import Host
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding, generation_config
from alula.hosts.stops import stop_ids
from alula.inputs import Intake
from alula.seam import evaluating, scoring_inputs, text_logits
from alula.training.distillation.lessons import Lessons, concatenated

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
"""questions a model may write for each that is wanted; some are empty, unfinished or were written before"""
_LEAST = 0.5
"""share of the wanted questions below which a model is one that writes none"""


def questions_of(spec: SourceSpec, count: int, key: str) -> list[str]:
    """The first user turns of a source's samples, each once; answers that stand there are not looked at.

    Args:
        count: how many samples are read at most.
        key: of the source in its recipe, for errors.

    Raises:
        DataError: a source that cannot be read, a sample with media, no question at all.
    """
    source = open_source(spec, key=key)
    found: dict[str, None] = {}
    for index in range(count if source.size is None else min(count, source.size)):
        sample = source[index]
        if sample.media():
            raise DataError(
                "is not text alone",
                where=f"{key}: {sample.place or sample.id}",
                remedy="name a source of text questions",
            )
        found[message_text(next(turn for turn in sample.messages if turn["role"] == "user"))] = None
    if not found:
        raise DataError("holds no question", where=key, remedy="name a source of text questions")
    return list(found)


@torch.no_grad()
def own_questions(
    host: Host, count: int, template: TemplateSettings, *, max_new_tokens: int, batch_size: int, seed: int
) -> list[str]:
    """Questions the model writes itself when a user's turn is opened for it, each once (Magpie, arXiv 2406.08464).

    Raises:
        HostError: the chat template marks no end of a user's turn, or the model writes hardly any.
    """
    model: Any = host.model
    opened, closed = Intake(host.processor, template).user_turn()
    tokenizer: Any = host.processor.tokenizer
    if not closed.strip():
        raise HostError(
            "the chat template does not mark where a user's turn ends, so the model cannot be had write one",
            where="distill.prompts",
            remedy="name questions: {jsonl: FILE}",
        )
    config = generation_config(model, host.processor, Decoding(do_sample=True), max_new_tokens)
    config.stop_strings = [closed.strip()]
    device = next(model.parameters()).device
    start = tokenizer(opened, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    found: dict[str, None] = {}
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(-(-count * _ATTEMPTS // batch_size)):
            rows = start.expand(batch_size, -1)
            written = model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), generation_config=config, tokenizer=tokenizer
            )
            for text in tokenizer.batch_decode(written[:, rows.shape[1] :], skip_special_tokens=False):
                question, ended, _ = text.partition(closed.strip())
                if ended and _is_question(question, tokenizer):
                    found.setdefault(question.strip())
            if len(found) >= count:
                break
    if len(found) < max(1, _LEAST * count):
        raise HostError(
            f"asked for {count} questions, the model wrote {len(found)}: it was hardly trained to write what users say",
            where="distill.prompts",
            remedy="name questions: {jsonl: FILE}; their answers, if any, are not looked at",
        )
    return list(found)[:count]


def _is_question(text: str, tokenizer: Any) -> bool:
    """Whether the text is one a user could have written: some words, and no sign of the tokenizer's in them."""
    return any(map(str.isalnum, text)) and not any(
        token.content in text for token in tokenizer.added_tokens_decoder.values()
    )


def teach(
    host: Host,
    questions: Sequence[str],
    template: TemplateSettings,
    *,
    candidates: int,
    max_new_tokens: int,
    batch_size: int,
    journal: Path | None = None,
    progress: bool = False,
) -> Lessons:
    """Have the model answer the questions (greedily), and write down the distribution of each token of its answers.

    Questions it has no answer to, or that do not fit into its context, are left out.

    Args:
        template: variables for its chat template beside the messages.
        candidates: likeliest tokens that are kept of each distribution; at most the vocabulary.
        journal: a file of the answers so far, from which a later call goes on.
        progress: draw a bar on stderr.

    Raises:
        DataError: nothing was answered.
    """
    asked = [TaskItem(str(index), "text", [user(question)], gold="") for index, question in enumerate(questions)]
    task = ItemTask("distill", "questions to distill from", asked, lambda item, answer: 0.0, max_new_tokens)
    run = evaluate(
        host.model,
        host.processor,
        [task],
        batch_size=batch_size,
        template=template,
        journal=journal,
        progress=progress,
    )
    answered = [(questions[int(item.id)], item.answer) for item in run.tasks["distill"].items if item.answer.strip()]
    samples = [
        Sample(
            id=str(index),
            messages=[
                user(question),
                {"role": "assistant", "content": [text_part(answer)]},
            ],
        )
        for index, (question, answer) in enumerate(answered)
    ]
    stops = stop_ids(host.model, host.processor.tokenizer)
    collate = Collator(host.processor, template=template, context=context_length(host.model), stops=stops)
    samples = [sample for sample in samples if _fits(sample, collate)]
    if not samples:
        raise DataError(
            f"the model answered none of {len(questions)} questions",
            where="distill.prompts",
            remedy="name questions it can answer, or raise distill.max_new_tokens where it thinks first",
        )
    return Lessons(
        questions=tuple(answered[int(sample.id)][0] for sample in samples),
        answers=tuple(answered[int(sample.id)][1] for sample in samples),
        **concatenated(list(_labels(host.model, samples, collate, candidates, batch_size))),
    )


def _fits(sample: Sample, collate: Collator) -> bool:
    """Whether question and answer fit into the context; what was generated may be longer once it is read again."""
    try:
        collate([sample])
    except TooLongError:
        return False
    return True


@torch.no_grad()
def _labels(
    model: Any, samples: Sequence[Sample], collate: Collator, candidates: int, batch_size: int
) -> Iterator[SoftLabels]:
    """Those of each sample's answer, by one pass over question and answer."""
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(samples), batch_size):
            batch: dict[str, Any] = dict(collate(samples[start : start + batch_size]))
            labels: Tensor = batch.pop("labels")
            inputs = {key: value.to(device) for key, value in batch.items()}
            ends = prompt_ends(inputs["attention_mask"].bool(), labels.to(device))
            inputs = scoring_inputs(model, inputs, ends)
            logits = text_logits(model, model(**inputs, use_cache=False).logits)[:, :-1].float()
            logprobs, tokens = logits.log_softmax(dim=-1).topk(min(candidates, logits.shape[-1]), dim=-1)
            for row, label in enumerate(labels[:, 1:]):
                spoken = (label != IGNORED).to(device)
                yield SoftLabels(label[label != IGNORED], tokens[row, spoken].cpu(), logprobs[row, spoken].cpu())
