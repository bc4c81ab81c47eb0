"""A real language model that hears: what it learnt of speech, against controls, and what it cost in words.

    alula real prepare real
    python benchmarks/speech.py host --real real --output runs/speech
    alula train recipes/speech.yaml
    alula codes fit recipes/speech-codes.yaml
    python benchmarks/speech.py measure --real real --output runs/speech --benchmarks DIR

`host` joins SmolLM2-135M-Instruct, EfficientNet-Lite0 and Whisper tiny.en's encoder, and keeps the encoder beside it.
`measure` asks the run as far as it came (its newest checkpoint): what it writes to held-out prompts, whether it finds
what was said among other held-out prompts, the same of held-out pictures, and minimal pairs of BLiMP before and after.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

from alula import build_host, load_model, save_host
from alula.codes import load_codes
from alula.data import AudioRef, Collator, Sample, open_source
from alula.draws import Draw
from alula.files import read_json, write_json
from alula.hosts import load_host
from alula.hosts.stops import stop_ids
from alula.real.held_out import SPOKEN
from alula.stats import percentile_interval, resample_totals, wilson
from alula.training.checkpoint import newest, step_of
from alula.training.environment import readable_environment
from alula.training.layout import RunDirectory
from alula.training.metrics import read_rows
from alula.training.parts import load_trained
from alula.training.reading import load_recipe
from alula.training.stage import StagePlan
from alula.training.trainer import WEIGHTS
from studies.real.words import blimp, read_blimp

SECONDS = 6
"""window of the ear, where Whisper's own is thirty"""
BATCH = 12
CANDIDATES = 6
PICTURES = 16


def host(real: Path, output: Path) -> None:
    """The three models in one host, and the ear alone."""
    models = real / "models"
    extractor = WhisperFeatureExtractor.from_pretrained(models / "whisper-tiny.en", chunk_length=SECONDS)
    built = build_host(
        str(models / "smollm2-135m-instruct"),
        str(models / "efficientnet-lite0"),
        audio=str(models / "whisper-tiny.en"),
        feature_extractor=extractor,
    )
    save_host(built, output / "host")
    built.model.model.audio_tower.save_pretrained(output / "ear")
    extractor.save_pretrained(output / "ear")


def trained(output: Path) -> tuple[Any, int]:
    """The run's model, and after how many steps."""
    run = RunDirectory(output / "run")
    recipe = load_recipe(run.recipe)
    plan = StagePlan(recipe, 0, run, recipe.host.path or "", recipe.host.path or "", None)
    checkpoint = newest(plan.paths.checkpoints)
    if checkpoint is None:
        return load_model(run.root / "final").model, recipe.stages[0].steps or 0
    tunable = plan.begin()
    load_trained(tunable.model, tunable.parts, load_file(checkpoint / WEIGHTS))
    return tunable.model.eval(), step_of(checkpoint)


def records(real: Path, name: str) -> list[Sample]:
    """Held-out records that a host takes: sounds as long as its window."""
    source = open_source({"jsonl": str(real / "data" / name / "test.jsonl")})
    found = [source[index] for index in range(source.size or 0)]
    return [each for each in found if not each.media("audio") or len(each.media("audio")[0].load(100)) <= 100 * SECONDS]


def answer(sample: Sample) -> str:
    return str(sample.messages[-1]["content"][0]["text"])


def answering(sample: Sample, text: str, sound: AudioRef | None = None) -> Sample:
    """The record with another answer, and another sound."""
    asked, said = sample.messages
    content = [
        {**part, "audio": sound} if part["type"] == "audio" and sound is not None else part for part in asked["content"]
    ]
    return Sample(sample.id, [{**asked, "content": content}, {**said, "content": [{"type": "text", "text": text}]}])


def words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def edit_distance(one: Sequence[str], two: Sequence[str]) -> int:
    """How many words have to be put in, taken out or changed (Levenshtein)."""
    row = list(range(len(two) + 1))
    for place, word in enumerate(one, 1):
        above, row = row, [place]
        for column, other in enumerate(two):
            row.append(min(above[column] + (word != other), above[column + 1] + 1, row[column] + 1))
    return row[-1]


def error(said: Sequence[str], meant: Sequence[str]) -> dict[str, float]:
    """Word error rate over all, its interval over clips, and the share of clips without an error."""
    edits = [float(edit_distance(words(one), words(two))) for one, two in zip(said, meant, strict=True)]
    lengths = [len(words(two)) for two in meant]
    totals = resample_totals(np.array([edits, lengths]).T)
    rate = percentile_interval(sum(edits) / sum(lengths), totals[:, 0] / totals[:, 1], 0.95)
    return {
        "word_error_rate": rate.value,
        "low": rate.low,
        "high": rate.high,
        "exact": sum(not each for each in edits) / len(edits),
        "clips": len(edits),
        "words": sum(lengths),
    }


def bag(said: Sequence[str], meant: Sequence[str]) -> float:
    """Share of the words meant that are written, in any order."""
    hits = [sum(min(words(one).count(word), words(two).count(word)) for word in set(words(two)))
            for one, two in zip(said, meant, strict=True)]  # fmt: skip
    return sum(hits) / sum(len(words(two)) for two in meant)


@torch.no_grad()
def written(model: Any, processor: Any, samples: Sequence[Sample]) -> list[str]:
    """What the model writes, greedily."""
    prompts, found = Collator(processor, train=False), []
    for start in range(0, len(samples), BATCH):
        batch = prompts([Sample(each.id, each.messages[:1]) for each in samples[start : start + BATCH]])
        with torch.autocast("cpu", torch.bfloat16):
            ids = model.generate(
                **batch,
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=sorted(stop_ids(model, processor.tokenizer)),
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        found += processor.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


@torch.no_grad()
def nats(model: Any, processor: Any, samples: Sequence[Sample]) -> Tensor:
    """Mean nats per token of each answer."""
    collate, found = Collator(processor, stops=stop_ids(model, processor.tokenizer)), []
    for start in range(0, len(samples), BATCH):
        batch = dict(collate(samples[start : start + BATCH]))
        labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits.float().mT, labels, ignore_index=-100, reduction="none")
        found.append(loss.sum(1) / (labels != -100).sum(1))
    return torch.cat(found)


def ranked(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether the right answer is the likeliest of some held-out ones, and how likely it is with its own item, with
    another's, and, of sounds, with silence."""
    others = [
        [other for other in Draw("speech", place).sample(range(len(samples)), min(3 * CANDIDATES, len(samples)))
         if answer(samples[other]) != answer(sample)][: CANDIDATES - 1]
        for place, sample in enumerate(samples)
    ]  # fmt: skip
    asked = [
        answering(sample, text)
        for place, sample in enumerate(samples)
        for text in (answer(sample), *(answer(samples[other]) for other in others[place]))
    ]
    table = nats(model, processor, asked).view(len(samples), CANDIDATES)
    hits = (table.argmin(1) == 0).float().tolist()
    found = {"right_is_likeliest": interval(hits), "chance": 1 / CANDIDATES, "nats": float(table[:, 0].mean())}
    if samples[0].media("audio"):
        silence = AudioRef.from_object(_Silence())
        blank = nats(model, processor, [answering(sample, answer(sample), silence) for sample in samples])
        swapped = [sample.media("audio")[0] for sample in (*samples[1:], samples[0])]
        mixed = nats(
            model, processor, [answering(s, answer(s), sound) for s, sound in zip(samples, swapped, strict=True)]
        )
        found |= {"nats_silence": float(blank.mean()), "nats_shuffled": float(mixed.mean())}
        # what a caption gains by its own clip, over silence: how likely it is anyway is taken out
        unheard = nats(
            model,
            processor,
            [answering(each, answer(each), silence) for each in asked],
        ).view(len(samples), CANDIDATES)
        gains = ((table - unheard).argmin(1) == 0).float().tolist()
        found["right_gains_most"] = interval(gains)
        found["own_clip_beats_silence"] = interval((table[:, 0] < blank).float().tolist())
        found["own_clip_beats_another"] = interval((table[:, 0] < mixed).float().tolist())
    return found


class _Silence:
    rate = 16_000

    def load(self) -> np.ndarray:
        return np.zeros(16_000, np.float32)


def interval(values: Sequence[float]) -> dict[str, Any]:
    estimate = wilson(sum(values), len(values))
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": len(values)}


def codes(real: Path, output: Path) -> dict[str, Any]:
    """k-means codes of held-out prompts: how much of the frames they keep, and whether they find prompts alike.

    Retrieval: the training prompt whose histogram of codes is nearest, and how many of its words the held-out one has;
    beside it by the mean of the frames themselves, and drawn at random.
    """
    tokenizer = load_codes(output / "codes")
    sounds, texts = {}, {}
    for split in ("train", "test"):
        source = open_source({"jsonl": str(real / "data" / "prompts" / f"{split}.jsonl")})
        found = [source[index] for index in range(source.size or 0)]
        sounds[split] = [each.media("audio")[0].load(16_000) for each in found]
        texts[split] = [answer(each) for each in found]
    frames = {split: [tokenizer.features([sound])[0] for sound in each] for split, each in sounds.items()}
    centroids = tokenizer.codebook()
    kept, histograms, means = {}, {}, {}
    middle = torch.cat(frames["train"]).mean(0)
    for split, each in frames.items():
        every = torch.cat(each)
        ids = torch.cdist(every, centroids).argmin(1)
        kept[split] = 1 - float((every - centroids[ids]).square().sum() / (every - middle).square().sum())
        counts = [F.one_hot(part, len(centroids)).float().sum(0) for part in ids.split([len(part) for part in each])]
        histograms[split] = F.normalize(torch.stack(counts), dim=1)
        means[split] = F.normalize(torch.stack([part.mean(0) - middle for part in each]), dim=1)
    nearest = {
        "codes": (histograms["test"] @ histograms["train"].T).argmax(1).tolist(),
        "frames": (means["test"] @ means["train"].T).argmax(1).tolist(),
        "random": [Draw("retrieval", number).below(len(texts["train"])) for number in range(len(texts["test"]))],
    }
    return {
        "codes": len(centroids),
        "frames": {split: sum(map(len, each)) for split, each in frames.items()},
        "variance_kept": kept,
        "words_of_the_nearest": {
            name: bag([texts["train"][place] for place in places], texts["test"]) for name, places in nearest.items()
        },
    }


def whisper(real: Path, samples: Sequence[Sample]) -> list[str]:
    """What Whisper tiny.en itself writes, with its own decoder and window."""
    where = real / "models" / "whisper-tiny.en"
    model: Any = WhisperForConditionalGeneration.from_pretrained(where).eval()
    extractor, tokenizer = WhisperFeatureExtractor.from_pretrained(where), WhisperTokenizerFast.from_pretrained(where)
    found = []
    for sample in samples:
        sound = sample.media("audio")[0].load(16_000)
        given = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_features
        ids = model.generate(given, max_new_tokens=40)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in found]


def heard(said: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    """What was written of held-out clips, and the same held against other clips' words."""
    meant = [answer(sample) for sample in samples]
    held = [[word for word in words(text) if word in SPOKEN] for text in meant]
    hits = [float(word in words(one)) for one, mine in zip(said, held, strict=True) for word in mine]
    found = {
        **error(said, meant),
        "words_written": bag(said, meant),
        "shuffled": {**error([*said[1:], said[0]], meant), "words_written": bag([*said[1:], said[0]], meant)},
        "examples": [{"said": two, "written": one} for one, two in zip(said[:12], meant[:12], strict=True)],
    }
    return found | ({"held_out_words": interval(hits)} if hits else {})


def measure(options: argparse.Namespace) -> None:
    """The run as far as it came."""
    real, output = options.real, options.output
    model, steps = trained(output)
    base = load_host(output / "host", dtype=torch.float32)
    processor = base.processor
    record: dict[str, Any] = read_json(options.result) if options.result.is_file() else {}
    if record.get("steps") != steps:
        record = {"command": "python " + " ".join(sys.argv), "environment": readable_environment(), "steps": steps}

    def note(name: str, find: Callable[[], Any]) -> None:
        """Ask, unless the record knows."""
        if name not in record:
            record[name] = find()
            print(name, json.dumps(record[name])[:300], flush=True)
            write_json(options.result, record)

    rows = [row for row in read_rows(RunDirectory(output / "run").metrics) if row["step"] <= steps]
    curve = [{"step": row["step"], "loss": round(row["loss"], 4), "validation": row.get("validation")} for row in rows]
    note("curve", lambda: curve)
    clips = {
        "prompts": records(real, "prompts"),
        "captions": [each for each in records(real, "speech") if each.id.endswith("_en")],
    }
    pictures = Draw("pictures").sample(records(real, "emoji"), PICTURES)
    asked = [pictures[0], clips["prompts"][0]]
    for name, samples in clips.items():
        note(f"{name} written", lambda own=samples: heard(written(model, processor, own), own))
        note(f"{name} ranked", lambda own=samples: ranked(model, processor, own))
    note("one host", lambda: [{"meant": answer(each), "written": written(model, processor, [each])} for each in asked])
    if options.benchmarks is not None:
        paradigms = read_blimp(options.benchmarks, 2)
        for name, each in (("before", base.model), ("after", model)):
            note(
                f"blimp {name}",
                lambda of=each: interval([float(d) for d in "".join(blimp(of.eval(), processor, paradigms).values())]),
            )
    note("pictures ranked", lambda: ranked(model, processor, pictures))
    for name, samples in clips.items():
        note(f"{name} by whisper", lambda own=samples: heard(whisper(real, own), own))
    note("pictures before", lambda: ranked(base.model, processor, pictures))
    if (output / "codes").is_dir():
        note("codes", lambda: codes(real, output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=["host", "measure"])
    parser.add_argument("--real", type=Path, default=Path("real"), help="made by alula real prepare")
    parser.add_argument("--output", type=Path, default=Path("runs/speech"))
    parser.add_argument("--benchmarks", type=Path, help="directory of your copy of BLiMP")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/real-speech.json"))
    options = parser.parse_args()
    if options.do == "host":
        host(options.real, options.output)
    else:
        measure(options)


if __name__ == "__main__":
    main()
