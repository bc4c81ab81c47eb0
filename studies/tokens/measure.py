"""Training an arm, and what it reads and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
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
from alula_fledgling.microworld import source
from alula_fledgling.microworld.render import render
from alula_fledgling.microworld.scenes import NUM_BACKGROUNDS, NUMBER_INKS, AnyScene, NumberScene
from alula_fledgling.microworld.sounds import SAMPLE_RATE, SoundClip
from studies.tokens.plan import SOURCES, TokensPlan, kind_of

BATCH, CHOICES = 24, 8


def fit(plan: TokensPlan, seed: int, name: str) -> None:
    """Fit a tokenizer; one that is there is left as it is."""
    if not plan.codes_directory(seed, name).is_dir():
        fit_codes(plan.fitted(seed, name))


def measure(plan: TokensPlan, seed: int, arm: str) -> None:
    """Train and ask an arm of a seed; what was measured before is left as it is."""
    path = plan.measurement(seed, arm)
    if not path.is_file():
        result = train(plan.tuning(seed, arm), quiet=True)
        write_json(path, asked(plan, arm, str(result.final)))


def held_out(plan: TokensPlan, kind: str) -> list[Sample]:
    """Captions and pictures or sounds that no training showed."""
    source = open_source({**SOURCES[kind], "split": "test", "seed": plan.task_seed, "limit": plan.items})
    return [source[index] for index in range(plan.items)]


def shown(plan: TokensPlan, kind: str) -> list[list[Any]]:
    """What would show each of the captions of `held_out`: the picture on every background, of which captions say
    nothing, or the sound."""
    chosen = SOURCES[kind]
    items = source(
        chosen["microworld"], split="test", seed=plan.task_seed, families=chosen.get("families"), n=plan.items
    )
    clips = [part[kind] for item in items for part in item.messages[0]["content"] if part["type"] == kind]
    if kind == "audio":
        return [[waveform(clip)] for clip in clips]
    return [[render(scene) for scene in on_backgrounds(clip.scene)] for clip in clips]


def on_backgrounds(scene: AnyScene) -> list[AnyScene]:
    """The scene on every background that its ink is seen on."""
    seen = [
        number
        for number in range(NUM_BACKGROUNDS)
        if not isinstance(scene, NumberScene) or scene.ink in NUMBER_INKS[number]
    ]
    return [replace(scene, background=number) for number in seen]


def waveform(clip: SoundClip) -> np.ndarray:
    """(samples,) float32 in [-1, 1]."""
    return clip.load().astype(np.float32) / 32768


@torch.no_grad()
def asked(plan: TokensPlan, arm: str, directory: str) -> dict[str, Any]:
    """What a trained arm reads and draws, item by item."""
    kind: Any = kind_of(arm)
    model, processor = load_model(directory)
    samples = held_out(plan, kind)
    loading = {"rate": SAMPLE_RATE} if kind == "audio" else {}
    items = [sample.media(kind)[0].load(**loading) for sample in samples]
    drawn = draw(model, processor, samples, kind)
    coded = through(processor.codes[processor.written_by(kind)], items)
    senses = encoder_features(KMeansSpec(encoder="fledgling"), kind, 0)
    wanted = shown(plan, kind)
    found: dict[str, Any] = {
        "read": told_by_items(model, processor, samples),
        "drawn": matched(senses, drawn, wanted),
        "coded": matched(senses, coded, wanted),
    }
    if kind == "audio":
        for place, wave in enumerate(drawn[:8]):
            samples_16 = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
            wavfile.write(Path(directory).parent / f"drawn-{place}.wav", SAMPLE_RATE, samples_16)
        return found
    contact_sheet([items[:16], coded[:16], drawn[:16]], Path(directory).parent / "drawn.png")
    return {
        **found,
        "pixels": [error(one, other) for one, other in zip(drawn, items, strict=True)],
        "pixels_coded": [error(one, other) for one, other in zip(coded, items, strict=True)],
    }


def told_by_items(model: Any, processor: Any, samples: Sequence[Sample]) -> list[float]:
    """By how many nats an item makes its caption likelier than another's item makes it, caption by caption."""
    others = [*samples[1:], samples[0]]
    swapped = [
        Sample(mine.id, [{**mine.messages[0], "content": [_item(other), *_words(mine)]}, mine.messages[1]])
        for mine, other in zip(samples, others, strict=True)
    ]
    collate = Collator(processor)
    own, another = (_likelihoods(model, collate, each) for each in (samples, swapped))
    return [float(one - other) for one, other in zip(own, another, strict=True)]


def _item(sample: Sample) -> dict[str, Any]:
    return next(part for part in sample.messages[0]["content"] if part["type"] != "text")


def _words(sample: Sample) -> list[dict[str, Any]]:
    return [part for part in sample.messages[0]["content"] if part["type"] == "text"]


def _likelihoods(model: Any, collate: Collator, samples: Sequence[Sample]) -> Tensor:
    found = []
    for start in range(0, len(samples), BATCH):
        batch = collate(samples[start : start + BATCH])
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        found.append(-loss.sum(dim=1))
    return torch.cat(found)


def draw(model: Any, processor: CodesProcessor, samples: Sequence[Sample], kind: str) -> list[Any]:
    """An item of every caption, drawn as likely as the model holds it.

    The likeliest code of a place is not taken: captions leave open by how much a thing is shifted, so that what is
    there is shared among several codes, and nothing is likelier than any of them.
    """
    graft: Any = next(iter(grafts_of(model).values()))
    name = processor.written_by(kind)
    assert name is not None
    number = graft.vocabulary.names.index(name)
    collate = Collator(processor, train=False)
    prompts = [turned(sample, processor) for sample in samples]
    drawn: list[Any] = []
    for start in range(0, len(samples), BATCH):
        part = [Sample(each.id, each.messages[:1]) for each in prompts[start : start + BATCH] if each is not None]
        batch = dict(collate(part))
        length = batch["input_ids"].shape[1]
        batch[GENERATES] = torch.full((len(part), 1), number)
        with generation_extras(model, batch) as given, torch.random.fork_rng(devices=()):
            torch.manual_seed(start)
            settings = {"do_sample": True, "top_k": 0, "temperature": 1.0}
            ids = model.generate(**given, max_new_tokens=graft.vocabulary[name].length, **settings)
        drawn += [processor.items(row[length:])[0][1] for row in ids]
    return drawn


def through(codes: CodeTokenizer, items: Sequence[Any]) -> list[Any]:
    """Items as they are behind the tokenizer: no drawing can be better."""
    return codes.decode(torch.stack(codes.encode(items)))


def matched(senses: EncoderFeatures, made: Sequence[Any], wanted: Sequence[Sequence[Any]]) -> list[bool]:
    """Whether the fledgling's own tower (ears) finds that a picture (sound) shows what was asked.

    Among what would show the caption and what would show seven others it is nearest to one of the former, by the angle
    between all of their patches.
    """
    seen = _features(senses, made)
    true = [_features(senses, each) for each in wanted]
    middle = torch.cat(true).mean(dim=0)
    near = torch.stack(
        [(F.normalize(seen - middle, dim=1) @ F.normalize(each - middle, dim=1).mT).amax(dim=1) for each in true], dim=1
    )
    count = len(wanted)
    others = torch.stack([(torch.arange(count) + shift) % count for shift in range(min(CHOICES, count))], dim=1)
    return (near.gather(1, others).argmax(dim=1) == 0).tolist()


def _features(senses: EncoderFeatures, items: Sequence[Any]) -> Tensor:
    return torch.stack(senses(items)).flatten(1)


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
