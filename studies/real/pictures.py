"""What a model sees of things no training showed: captions, yes-no questions in POPE's manner, shapes (easy-vqa)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alula.data import Collator, Sample, message_text
from alula.data.captions import CaptionedPicture
from alula.data.samples import text_part, user
from alula.draws import Draw
from alula.evaluation import evaluate_captions
from alula.evaluation.caption_scores import cider
from alula.evaluation.references import last_answers
from alula.hosts.stops import stop_ids
from alula.inputs import Intake
from alula.real.things import words_of
from alula.seam import evaluating, needs_roles, text_logits
from alula.training.measuring import batches
from studies.real.data import asked, popular, read, thing_of
from studies.real.words import BATCH

NEGATIVES = ("random", "popular", "adversarial")
TOKENS = 20  # of a caption


@dataclass(frozen=True)
class Held:
    """Held-out pictures and what is asked of them.

    Attributes:
        captions: of Tux Paint's stamps and of emoji, equally many where there are.
        presence: per question the picture's place, what it asks about (``yes`` or a kind of `NEGATIVES`), the sample.
        shapes: easy-vqa's.
    """

    captions: list[Sample]
    presence: list[tuple[int, str, Sample]]
    shapes: list[Sample]


def held_out(real: Path, items: int, seed: int = 0) -> Held:
    """Draw them: four times ``items`` captions, twice as many pictures that are asked about, six times as many
    shapes."""
    data = real / "data"
    stamps, emoji = (read(data / name / "test.jsonl", 2 * items, seed=seed) for name in ("stamps", "emoji"))
    return Held(
        captions=[*stamps, *emoji],
        presence=presence(read(data / "stamps" / "test.jsonl"), read(data / "stamps" / "train.jsonl"), 2 * items),
        shapes=read(data / "easy-vqa" / "test.jsonl", 6 * items, seed=seed),
    )


def presence(held: list[Sample], trained: list[Sample], count: int) -> list[tuple[int, str, Sample]]:
    """Four questions about each of ``count`` held-out pictures: of its thing, of another held-out one (``random``), of
    the most frequent trained one that its caption does not name (``popular``) and of one of its own kind, by the folder
    it lies in, held-out where there is one (``adversarial``; single things do not go together with others)."""
    things = {sample.id: thing for sample in (*held, *trained) if (thing := thing_of(sample))}
    pictures = [sample for sample in held if sample.id in things]
    frequent, others = popular(trained), sorted({things[sample.id] for sample in pictures})
    drawn = Draw("presence", 0).sample(pictures, min(count, len(pictures)))
    found = []
    for place, picture in enumerate(drawn):
        draw = Draw("presence", picture.id)
        named = set(words_of(message_text(picture.messages[-1])))
        absent = [thing for thing in others if thing not in named]
        kind = picture.id.rpartition("-")[0]
        alike = [
            sorted({things[s.id] for s in group if s.id in things and s.id.rpartition("-")[0] == kind} - named)
            for group in (held, trained)
        ]
        about = {
            "yes": things[picture.id],
            "random": draw.choice(absent),
            "popular": next(thing for thing in frequent if thing not in named),
            "adversarial": draw.choice(alike[0] or alike[1] or absent),
        }
        for which, thing in about.items():
            turns = [user(asked(thing), picture.images[0]), _answer("yes" if which == "yes" else "no")]
            found.append((place, which, Sample(f"{picture.id}-{which}", turns)))
    return found


def swapped(samples: list[Sample]) -> list[Sample]:
    """The samples, each behind the next one's picture."""
    found = []
    for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True):
        parts = [
            {**part, "image": other.images[0]} if part["type"] == "image" else part
            for part in sample.messages[0]["content"]
        ]
        found.append(replace(sample, messages=[{**sample.messages[0], "content": parts}, *sample.messages[1:]]))
    return found


def blind(training: Path, samples: list[Sample]) -> str:
    """A digit for each question whose answer is the most frequent one to the same words in training: what is right
    without a look."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in read(training):
        question, answer = map(message_text, sample.messages)
        answers[question][answer] += 1
    found = ""
    for sample in samples:
        question, answer = map(message_text, sample.messages)
        told = answers[question].most_common(1)
        found += str(int(bool(told) and told[0][0] == answer))
    return found


def captions(model: Any, processor: Any, samples: list[Sample]) -> dict[str, Any]:
    """What a model says of pictures: per picture CIDEr-D, of all BLEU-4, and its words."""
    shown = [
        CaptionedPicture(
            f"{place}", sample.images[0], (message_text(sample.messages[-1]),), tuple(sample.messages[:-1])
        )
        for place, sample in enumerate(samples)
    ]
    run = evaluate_captions(model, processor, shown, batch_size=len(shown), max_new_tokens=TOKENS)
    said = [run.captions[each.id] for each in shown]
    scores = cider(said, [each.captions for each in shown])
    return {"cider": [round(score, 4) for score in scores], "bleu4": run.bleu4, "said": said}


@torch.no_grad()
def presences(model: Any, processor: Any, questions: list[tuple[int, str, Sample]]) -> dict[str, list[float]]:
    """Log odds of yes against no, where the answer begins, by kind of question, in the order of the pictures. Both are
    taken in lower case and with a capital."""
    tokenizer = Intake.of(processor).tokenizer
    collate = Collator(processor, roles=needs_roles(model), stops=stop_ids(model, tokenizer))
    sides = [
        [tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in (word, word.capitalize())]
        for word in ("yes", "no")
    ]
    found: dict[str, list[float]] = {}
    odds: list[float] = []
    with evaluating(model):
        for batch in batches([sample for *_, sample in questions], collate, BATCH, next(model.parameters()).device):
            labels = last_answers(batch.pop("labels"), tokenizer.eos_token_id)
            logits = text_logits(model, model(**batch, use_cache=False).logits)
            for row, wanted in zip(logits, labels, strict=True):
                first = int((wanted != -100).nonzero()[0])
                logs = row[first - 1].float()
                yes, no = (torch.logsumexp(logs[side], 0) for side in sides)
                odds.append(round(float(yes - no), 4))
    for (_, which, _), value in zip(questions, odds, strict=True):
        found.setdefault(which, []).append(value)
    return found


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(text)]}
