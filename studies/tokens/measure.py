"""Training an arm, and what it reads and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from alula.codes import CodesProcessor, CodeTokenizer, EncoderFeatures
from alula.codes.drawing import pixels_of
from alula.data import Collator, Sample, open_source
from alula.files import write_json
from alula.grafts import grafts_of
from alula.grafts.teal import GENERATES
from alula.loading import load_model
from alula.seam import generation_extras
from alula.training import train
from alula.training.codes import KMeansSpec, encoder_features, fit_codes
from alula.training.methods.teal import turned
from studies.tokens.plan import TokensPlan

BATCH, CHOICES = 24, 8


def measurements(plan: TokensPlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [plan.measured(seed) / f"{arm}.json" for arm in plan.arms]


def measure(plan: TokensPlan, seed: int) -> None:
    """Fit, train and ask every arm of a seed; what was measured before is left as it is."""
    for arm, path in zip(plan.arms, measurements(plan, seed), strict=True):
        if path.is_file():
            continue
        for name in plan.codes_of(arm):
            if not plan.codes_directory(seed, name).is_dir():
                fit_codes(plan.fitted(seed, name))
        result = train(plan.tuning(seed, arm), quiet=True)
        write_json(path, asked(plan, str(result.final)))


def held_out(plan: TokensPlan) -> list[Sample]:
    """Captions and pictures that no training showed."""
    source = open_source(
        {"microworld": "caption", "split": "test", "families": ["caption"], "seed": plan.task_seed, "limit": plan.items}
    )
    return [source[index] for index in range(plan.items)]


@torch.no_grad()
def asked(plan: TokensPlan, directory: str) -> dict[str, Any]:
    """What a trained arm reads and draws, picture by picture."""
    model, processor = load_model(directory)
    samples = held_out(plan)
    pictures = [sample.images[0].load() for sample in samples]
    drawn = draw(model, processor, samples)
    name = processor.written_by("image")
    coded = through(processor.codes[name], pictures)
    tower = encoder_features(KMeansSpec(encoder="fledgling"), "image", 0)
    contact_sheet([pictures[:8], coded[:8], drawn[:8]], Path(directory).parent / "drawn.png")
    return {
        "read": told_by_pictures(model, processor, samples),
        "drawn": matched(tower, drawn, pictures),
        "coded": matched(tower, coded, pictures),
        "pixels": [error(one, other) for one, other in zip(drawn, pictures, strict=True)],
        "pixels_coded": [error(one, other) for one, other in zip(coded, pictures, strict=True)],
    }


def told_by_pictures(model: Any, processor: Any, samples: Sequence[Sample]) -> list[float]:
    """By how many nats a picture makes its caption likelier than another's picture makes it, caption by caption."""
    others = [*samples[1:], samples[0]]
    swapped = [
        Sample(mine.id, [{**mine.messages[0], "content": [_image(other), *_words(mine)]}, mine.messages[1]])
        for mine, other in zip(samples, others, strict=True)
    ]
    collate = Collator(processor)
    own, another = (_likelihoods(model, collate, each) for each in (samples, swapped))
    return [float(one - other) for one, other in zip(own, another, strict=True)]


def _image(sample: Sample) -> dict[str, Any]:
    return next(part for part in sample.messages[0]["content"] if part["type"] == "image")


def _words(sample: Sample) -> list[dict[str, Any]]:
    return [part for part in sample.messages[0]["content"] if part["type"] != "image"]


def _likelihoods(model: Any, collate: Collator, samples: Sequence[Sample]) -> Tensor:
    found = []
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH])
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        found.append(-loss.sum(dim=1))
    return torch.cat(found)


def draw(model: Any, processor: CodesProcessor, samples: Sequence[Sample]) -> list[Image.Image]:
    """A picture of every caption, greedily."""
    graft: Any = next(iter(grafts_of(model).values()))
    name = processor.written_by("image")
    assert name is not None
    number = graft.vocabulary.names.index(name)
    collate = Collator(processor, train=False)
    prompts = [turned(sample, processor) for sample in samples]
    drawn: list[Image.Image] = []
    for start in range(0, len(samples), BATCH):
        part = [Sample(each.id, each.messages[:1]) for each in prompts[start : start + BATCH] if each is not None]
        batch = dict(collate(part))
        length = batch["input_ids"].shape[1]
        batch[GENERATES] = torch.full((len(part), 1), number)
        with generation_extras(model, batch) as given:
            ids = model.generate(**given, max_new_tokens=graft.vocabulary[name].length, do_sample=False)
        drawn += [processor.items(row[length:])[0][1] for row in ids]
    return drawn


def through(codes: CodeTokenizer, pictures: Sequence[Any]) -> list[Any]:
    """Pictures as they are behind the tokenizer: no drawing can be better."""
    return codes.decode(torch.stack(codes.encode(pictures)))


def matched(tower: EncoderFeatures, made: Sequence[Any], pictures: Sequence[Any]) -> list[bool]:
    """Whether the fledgling's own tower finds that a picture shows what was asked: among the caption's own picture and
    those of seven other captions it is nearest to its own, by the angle between all of their patches."""
    seen, true = (_features(tower, each) for each in (made, pictures))
    middle = true.mean(dim=0)
    near = F.normalize(seen - middle, dim=1) @ F.normalize(true - middle, dim=1).mT
    count = len(pictures)
    others = torch.stack([(torch.arange(count) + shift) % count for shift in range(min(CHOICES, count))], dim=1)
    return (near.gather(1, others).argmax(dim=1) == 0).tolist()


def _features(tower: EncoderFeatures, pictures: Sequence[Any]) -> Tensor:
    return torch.stack(tower(pictures)).flatten(1)


def error(one: Image.Image, other: Image.Image) -> float:
    """Mean squared error of pixels in [-1, 1]."""
    pair = pixels_of([one, other], other.width)
    return float((pair[0] - pair[1]).square().mean())


def contact_sheet(rows: Sequence[Sequence[Image.Image]], path: Path, scale: int = 3) -> None:
    """Rows of pictures side by side, for people."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (len(rows[0]) * (side + 4), len(rows) * (side + 4)))
    for line, row in enumerate(rows):
        for place, picture in enumerate(row):
            sheet.paste(picture, (place * (side + 4), line * (side + 4)))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)
