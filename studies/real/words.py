"""What the decoder could do before: BLiMP, CoDa, GSM8K and formats of a chat, by likelihood where it can be.

BLiMP (Warstadt et al., TACL 2020): of two sentences the grammatical one is to be likelier. CoDa (Paik et al., EMNLP
2021): colours of things, as shares of annotators' votes. GSM8K (Cobbe et al., 2021): worked answers to word problems.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from alula.data import Collator, Sample
from alula.data.samples import text_part, user
from alula.draws import Draw
from alula.errors import UsageError
from alula.evaluation import ItemTask, TaskItem, evaluate
from alula.evaluation.likelihood.engine import log_likelihoods
from alula.evaluation.references import last_answers, score_answers
from alula.hosts.stops import stop_ids
from alula.inputs import Intake
from alula.seam import evaluating, needs_roles, text_logits
from alula.training.measuring import batches

BATCH = 16


@dataclass(frozen=True)
class Paradigm:
    """Minimal pairs of one kind.

    Attributes:
        name: BLiMP's. phenomenon: what it is of, as BLiMP's paper groups them.
        pairs: the good sentence and the bad one.
    """

    name: str
    phenomenon: str
    pairs: tuple[tuple[str, str], ...]


def read_blimp(directory: Path, count: int, seed: int = 0) -> list[Paradigm]:
    """So many pairs of every paradigm, drawn by a seed.

    Raises:
        UsageError: neither ``blimp.zip`` nor ``blimp/`` is there.
    """
    found = []
    for name, text in sorted(_blimp_files(directory)):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        drawn = Draw("blimp", name, seed).sample(rows, min(count, len(rows)))
        pairs = tuple((row["sentence_good"], row["sentence_bad"]) for row in drawn)
        found.append(Paradigm(name, rows[0]["linguistics_term"], pairs))
    return found


def _blimp_files(directory: Path) -> Iterator[tuple[str, str]]:
    packed, folder = directory / "blimp.zip", directory / "blimp"
    if folder.is_dir():
        for path in folder.glob("*.jsonl"):
            yield path.stem, path.read_text(encoding="utf-8")
    elif packed.is_file():
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                if name.endswith(".jsonl") and not Path(name).name.startswith("."):
                    yield Path(name).stem, archive.read(name).decode()
    else:
        raise UsageError("holds neither blimp.zip nor blimp/", where=str(directory), remedy="put your copy there")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a benchmark's file.

    Raises:
        UsageError: it is not there.
    """
    if not path.is_file():
        raise UsageError("is not there", where=str(path), remedy="put your copy of the benchmark there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def blimp(model: Any, processor: Any, paradigms: list[Paradigm]) -> dict[str, str]:
    """Per paradigm a digit for each pair: 1 where the good sentence is the likelier, as the harness weighs it (behind
    the token that begins a text)."""
    tokenizer = Intake.of(processor).tokenizer
    start = _start(tokenizer)
    sentences = [sentence for paradigm in paradigms for pair in paradigm.pairs for sentence in pair]
    pairs = [([start], tokenizer(sentence, add_special_tokens=False)["input_ids"]) for sentence in sentences]
    weighed = iter(_weigh(model, tokenizer, pairs))
    return {
        paradigm.name: "".join(str(int(next(weighed) > next(weighed))) for _ in paradigm.pairs)
        for paradigm in paradigms
    }


def coda(model: Any, processor: Any, directory: Path) -> dict[str, Any]:
    """Per thing the rank correlation of the model's likelihoods of colours ("Most ... are ...") with the votes, and a
    digit: whether the likeliest colour is the most voted one."""
    names = {row["class_id"]: row["object_pl"] for row in read_lines(directory / "coda_objects.jsonl")}
    things = [row for row in read_lines(directory / "coda_colours.jsonl") if row["class_id"] in names]
    tokenizer = Intake.of(processor).tokenizer
    start = _start(tokenizer)
    colours = sorted(things[0]["colours"])

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = [
        ([start, *ids(f"Most {names[thing['class_id']]} are")], ids(f" {colour}"))
        for thing in things
        for colour in colours
    ]
    weighed = _weigh(model, tokenizer, pairs)
    correlations, top = [], ""
    for place, thing in enumerate(things):
        own = weighed[place * len(colours) : (place + 1) * len(colours)]
        votes = [float(thing["colours"][colour]) for colour in colours]
        correlations.append(round(float(spearmanr(own, votes).statistic), 4) if len(set(votes)) > 1 else 0.0)
        top += str(int(votes[own.index(max(own))] == max(votes)))
    return {"spearman": correlations, "top": top}


def problems(directory: Path, count: int, seed: int = 0) -> list[Sample]:
    """Problems of GSM8K with their worked answers, the calculator's marks taken out."""
    rows = read_lines(directory / "gsm8k_test.jsonl")
    drawn = Draw("gsm8k", seed).sample(rows, min(count, len(rows)))
    return [
        _told(str(number), row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for number, row in enumerate(drawn)
    ]


def _told(name: str, question: str, answer: str) -> Sample:
    return Sample(name, [user(question), {"role": "assistant", "content": [text_part(answer)]}])


@torch.no_grad()
def weigh_answers(model: Any, processor: Any, samples: list[Sample]) -> dict[str, Any]:
    """Of reference answers, their end of turn included: a digit for each that greedy decoding would give, and its
    nats per token."""
    tokenizer = Intake.of(processor).tokenizer
    collate = Collator(processor, roles=needs_roles(model), stops=stop_ids(model, tokenizer))
    right, nats = "", []
    with evaluating(model):
        for batch in batches(samples, collate, BATCH, next(model.parameters()).device):
            labels = last_answers(batch.pop("labels"), tokenizer.eos_token_id)
            logits = text_logits(model, model(**batch, use_cache=False).logits)
            for row, wanted in zip(logits, labels, strict=True):
                hit, loss, tokens = score_answers(row[None], wanted[None])
                right += str(int(hit))
                nats.append(round(float(loss) / int(tokens), 4))
    return {"right": right, "nats": nats}


Check = Callable[[str], bool]


def _json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _dashed(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) >= 3 and all(line.lstrip().startswith("-") for line in lines)


_CHECKS: dict[str, tuple[str, Check, tuple[tuple[str, str], ...]]] = {
    "capitals": (
        "{} Answer in capital letters only.",
        str.isupper,
        (
            ("Which animal barks?", "A DOG."),
            ("What do bees make?", "HONEY."),
            ("Which season comes after winter?", "SPRING."),
            ("What do you call frozen water?", "ICE."),
            ("Which planet do we live on?", "EARTH."),
            ("What do we breathe?", "AIR."),
        ),
    ),
    "yes or no": (
        "{} Answer only with yes or no.",
        lambda text: re.fullmatch(r"(yes|no)[.!]?", text.strip().lower()) is not None,
        (
            ("Can birds fly?", "Yes"),
            ("Is ice hot?", "No"),
            ("Do fish live in water?", "Yes"),
            ("Is a mouse larger than an elephant?", "No"),
            ("Is the sky blue on a clear day?", "Yes"),
            ("Can stones talk?", "No"),
        ),
    ),
    "number": (
        "{} Answer with a number in digits and nothing else.",
        lambda text: re.fullmatch(r"\d+\.?", text.strip()) is not None,
        (
            ("How many legs has a spider?", "8"),
            ("How many days has a week?", "7"),
            ("What is two plus three?", "5"),
            ("How many wheels has a bicycle?", "2"),
            ("How many months has a year?", "12"),
            ("How many minutes has an hour?", "60"),
        ),
    ),
    "list": (
        "Name three {}. Write one per line, each line beginning with a dash.",
        _dashed,
        (
            ("fruits", "- Apple\n- Banana\n- Cherry"),
            ("colours", "- Red\n- Green\n- Blue"),
            ("animals", "- Dog\n- Cat\n- Horse"),
            ("rivers", "- Nile\n- Amazon\n- Danube"),
            ("tools", "- Hammer\n- Saw\n- Drill"),
            ("vegetables", "- Carrot\n- Onion\n- Pea"),
        ),
    ),
    "JSON": (
        'Give the {} as a JSON object with the one key "answer", and write nothing else.',
        _json,
        (
            ("capital of France", '{"answer": "Paris"}'),
            ("colour of grass", '{"answer": "green"}'),
            ("opposite of hot", '{"answer": "cold"}'),
            ("largest ocean", '{"answer": "Pacific"}'),
            ("plural of mouse", '{"answer": "mice"}'),
            ("first month of the year", '{"answer": "January"}'),
        ),
    ),
    "one word": (
        "{} Answer in one word.",
        lambda text: len(text.split()) == 1,
        (
            ("What is the capital of Italy?", "Rome."),
            ("What do cows drink?", "Water."),
            ("Which animal says meow?", "Cat."),
            ("What do you wear on your feet?", "Shoes."),
            ("What shines at night?", "Moon."),
            ("What do you write with?", "Pen."),
        ),
    ),
}
FORMATS = tuple(_CHECKS)


def formats(model: Any, processor: Any) -> dict[str, Any]:
    """How a chat is kept: of instructions on form a digit for each that the answer follows, one for each answer that
    ends its turn within 40 tokens, and the nats per token of a reference that follows them."""
    items, samples, checks = [], [], []
    for form, (instruction, check, cases) in _CHECKS.items():
        for number, (about, reference) in enumerate(cases):
            text = instruction.format(about)
            items.append(TaskItem(f"{form} {number}", form, [user(text)], gold=reference))
            samples.append(_told(f"{form} {number}", text, reference))
            checks.append(check)
    task = ItemTask("formats", "formats", items, lambda item, answer: 0.0, max_new_tokens=40)
    run = evaluate(model, processor, [task], batch_size=len(items))
    said = {item.id: item for item in run.tasks["formats"].items}
    answers = [said[item.id] for item in items]
    return {
        "followed": "".join(
            str(int(check(answer.answer.strip()))) for check, answer in zip(checks, answers, strict=True)
        ),
        "ended": "".join(str(int(not answer.truncated)) for answer in answers),
        "nats": weigh_answers(model, processor, samples)["nats"],
        "answers": [answer.answer for answer in answers],
    }


def _start(tokenizer: Any) -> int:
    """The token that begins a text: the tokenizer's, or the one that ends one."""
    return int(next(id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None))


def _weigh(model: Any, tokenizer: Any, pairs: list[Any]) -> list[float]:
    pad = next(int(id) for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None)
    with evaluating(model):
        return log_likelihoods(model, pairs, pad=pad, batch_size=64)
