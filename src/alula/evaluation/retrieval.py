"""Captions and pictures: which finds which among all (R@K), and what a model's own captions are worth.

Shapes: T captions, N pictures, r width of the space they are compared in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alula.chat_template import TemplateSettings
from alula.data.captions import CaptionedPicture
from alula.data.collate import Collator, description
from alula.data.samples import Sample, text_part, user
from alula.errors import EvaluationError
from alula.evaluation.caption_scores import bleu4, cider, require_bleu
from alula.evaluation.items import ItemTask, TaskItem
from alula.evaluation.results import Conditions, Record
from alula.evaluation.runner import evaluate
from alula.evaluation.scoring import exact_match
from alula.grafts import grafts_of
from alula.grafts.mks2 import MKS2Graft
from alula.hosts.host import tokenizer_of
from alula.hosts.stops import stop_ids
from alula.inputs import placed
from alula.items import inputs_of
from alula.stats import PAIRED, SHARE, Estimate, Resampling, bounded, percentile_interval, resample_totals, unseen

AT = (1, 5, 10)


class Recall(Record):
    """How often what belongs together is among the nearest, of 1, 5 and 10; intervals resample pictures."""

    caption_to_image: dict[int, Estimate]
    image_to_caption: dict[int, Estimate]


class CaptionRun(Record):
    """What a model made of pictures and their captions.

    Attributes:
        recall: None: the model has nothing to compare captions and pictures with.
        bleu4: in [0, 100]; `bleu_signature` says how it was computed.
        cider: mean over pictures, its interval resamples pictures.
        captions: the model's own, by picture.
    """

    model: str
    source: str
    pictures: int
    references: int
    recall: Recall | None
    bleu4: float
    bleu_signature: str
    cider: Estimate
    captions: dict[str, str]
    conditions: Conditions


def recall_of(similarity: NDArray[np.float64], picture: Sequence[int], how: Resampling = PAIRED) -> Recall:
    """Recall at 1, 5 and 10 among all, both ways.

    A picture finds its captions where any of them is among the nearest. What is as near as what belongs there stands
    before it, so that a model to which all is alike finds nothing.

    Args:
        similarity: (T, N).
        picture: which picture each caption is of.
        how: bootstrap over pictures, each with its captions; what is searched stays whole.
    """
    own = np.asarray(picture)
    count, pictures = similarity.shape
    belongs = own[:, None] == np.arange(pictures)[None, :]
    mine = similarity[np.arange(count), own]
    of_captions = ((similarity >= mine[:, None]) & ~belongs).sum(axis=1)
    best = np.where(belongs, similarity, -np.inf).max(axis=0)
    of_pictures = ((similarity >= best[None, :]) & ~belongs).sum(axis=0)
    size = np.bincount(own, minlength=pictures)
    rows = np.stack(
        [
            *(np.bincount(own, weights=of_captions < k, minlength=pictures) for k in AT),
            *((of_pictures < k).astype(float) for k in AT),
            size,
            np.ones(pictures),
        ],
        axis=1,
    )
    whole, totals = rows.sum(axis=0), resample_totals(rows, how)

    def share(column: int, over: int) -> Estimate:
        value = float(whole[column] / whole[over])
        found = percentile_interval(value, totals[:, column] / totals[:, over], how.confidence)
        return bounded(found, SHARE, unseen(rows[:, over], how.confidence))

    places = range(len(AT))
    return Recall(
        caption_to_image={AT[at]: share(at, 2 * len(AT)) for at in places},
        image_to_caption={AT[at]: share(len(AT) + at, 2 * len(AT) + 1) for at in places},
    )


def evaluate_captions(
    model: Any,
    processor: Any,
    pictures: Sequence[CaptionedPicture],
    *,
    name: str = "model",
    source: str = "pictures",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    template: TemplateSettings | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CaptionRun:
    """Have a model caption pictures, and find pictures by captions and captions by pictures.

    Args:
        model: an image host; with MKS2 that was trained to compare captions and pictures (`retrieval`), recall too.
        pictures: with one caption or more each.
        name, source: how the result calls the model and the pictures.
        batch_size, max_new_tokens, template, journal, progress: as `evaluate`.

    Raises:
        EvaluationError: fewer than two pictures, pictures of equal ids, or as `evaluate`.
    """
    if len(pictures) < 2:
        raise EvaluationError("there is one picture, which nothing can be compared with", where=source)
    require_bleu()
    graft = next((each for each in grafts_of(model).values() if isinstance(each, MKS2Graft) and each.compares), None)
    recall = None
    if graft is not None:
        collate = Collator(processor, stops=stop_ids(model, tokenizer_of(processor)), template=template)
        with torch.no_grad():
            captions, images, of = _embedded(graft, collate, pictures, batch_size)
        recall = recall_of((captions.double() @ images.double().T).cpu().numpy(), of)
    references = {picture.id: picture.captions for picture in pictures}
    task = ItemTask(
        name="captions",
        title="captions",
        source=[
            TaskItem(id=each.id, family="captions", messages=list(each.messages), gold=each.captions[0])
            for each in pictures
        ],
        scorer=lambda item, answer: max(
            exact_match(TaskItem(item.id, item.family, item.messages, gold), answer) for gold in references[item.id]
        ),
        max_new_tokens=max_new_tokens,
    )
    run = evaluate(
        model,
        processor,
        [task],
        name=name,
        batch_size=batch_size,
        template=template,
        journal=journal,
        progress=progress,
    )
    said = {item.id: item.answer for item in run.tasks["captions"].items}
    answers, known = list(said.values()), [references[id] for id in said]
    bleu, signature = bleu4(answers, known)
    scores = np.array(cider(answers, known))[:, None]
    totals = resample_totals(np.concatenate([scores, np.ones_like(scores)], axis=1))
    return CaptionRun(
        model=name,
        source=source,
        pictures=len(said),
        references=sum(map(len, known)),
        recall=recall,
        bleu4=bleu,
        bleu_signature=signature,
        cider=percentile_interval(float(scores.mean()), totals[:, 0] / totals[:, 1], PAIRED.confidence),
        captions=said,
        conditions=run.conditions,
    )


def _embedded(
    graft: MKS2Graft, collate: Collator, pictures: Sequence[CaptionedPicture], batch_size: int
) -> tuple[Tensor, Tensor, list[int]]:
    """(T, r) captions, (N, r) pictures, and which picture each caption is of."""
    parameter = next(graft.parameters())
    images, captions, texts, of = [], [], [], []
    for number, picture in enumerate(pictures):
        texts += [(picture.id, caption) for caption in picture.captions]
        of += [number] * len(picture.captions)
    for start in range(0, len(pictures), batch_size):
        shown = pictures[start : start + batch_size]
        batch = collate([Sample(each.id, [*each.messages, _answer(each.captions[0])]) for each in shown])
        given = {key: batch[key] for key in inputs_of("vision") if batch.get(key) is not None}
        images.append(graft.embed_images(placed(given, parameter)))
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        batch = collate([Sample(id, [user("?"), _answer(text)]) for id, text in part])
        rows = [
            torch.tensor(description(row.tolist(), labels.tolist(), collate.tokenizer.bos_token_id))
            for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=collate.pad_token_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        captions.append(graft.embed_captions(ids.to(parameter.device), mask.to(parameter.device)))
    return torch.cat(captions), torch.cat(images), of


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(text)]}
