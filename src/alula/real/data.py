"""Pictures, speech and sounds of the packages as records of messages, with things held out.

Each writer makes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` and the files they name beside them, in the
layout `alula train` and `alula eval` read (`docs/usage/data.md`), and returns how many records each split has.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import wave
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alula.draws import Draw
from alula.real.held_out import SPOKEN
from alula.real.packages import PROMPT_TEXTS, PROMPTS
from alula.real.things import Split, names_held_out, split_of

_LOOK = ("What is in the picture?", "Describe the picture in a few words.", "What does the picture show?")
_LISTEN = ("What is said?", "Write down what you hear.")
_SOUND = ("What makes this sound?", "What do you hear?")
_LONGEST_PROMPT = 6.0
"""seconds; the longest would last more than a minute"""
_LANGUAGES = {"en": "", "es": "_es", "fr": "_fr"}
"""languages of spoken captions, and how their files are named"""


class Record(NamedTuple):
    """One question about one file.

    Args:
        name: unique among the records.
        medium: ``image`` or ``audio``.
        file: the picture or sound.
        question, answer: words.
        more: what else is to be known of it.
        stored: what the copy of the file is called, without its ending; ``name`` by default. Several records may share
            one.
    """

    name: str
    medium: str
    file: Path
    question: str
    answer: str
    more: Mapping[str, Any] = {}
    stored: str | None = None


def stamps(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """Tux Paint's stamps that are PNG, with their English captions."""
    (folder,) = folders.values()
    pictures = ((file, _captions(file).get("en")) for file in sorted(folder.glob("**/*.png")))
    return _written(
        out, ((_image(_name(file, folder), file, caption), caption) for file, caption in pictures if caption)
    )


def emoji(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """Twitter's emoji by their names, without their variants of skin and hair."""
    (folder,) = folders.values()
    known = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    named = [each for each in known if each["has_img_twitter"] and each["name"]]
    return _written(
        out,
        (
            (_image(each["short_name"], folder / "img/twitter/64" / each["image"], caption), caption)
            for each in named
            for caption in [each["name"].lower()]
        ),
    )


def speech(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """Spoken captions of the stamps in English, Spanish and French; things by the English caption."""
    (folder,) = folders.values()

    def records() -> Iterator[tuple[Record, str]]:
        for text in sorted(folder.glob("**/*.txt")):
            said = _captions(text)
            for language, ending in _LANGUAGES.items():
                file = text.with_name(f"{text.stem}_desc{ending}.ogg")
                if file.is_file() and said.get(language) and said.get("en"):
                    name = f"{_name(text, folder)}_{language}"
                    question = _phrased(_LISTEN, name)
                    yield Record(name, "audio", file, question, said[language], {"language": language}), said["en"]

    return _written(out, records())


def sounds(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """The stamps' own sounds, with their captions."""
    (folder,) = folders.values()

    def records() -> Iterator[tuple[Record, str]]:
        for file in sorted(folder.glob("**/*.ogg")):
            text = file.with_suffix(".txt")
            caption = _captions(text).get("en") if text.is_file() else None
            if caption:
                name = _name(file, folder)
                yield Record(name, "audio", file, _phrased(_SOUND, name), caption), caption

    return _written(out, records())


def prompts(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """Prompts of a telephone exchange, spoken by one voice, with what is said.

    A prompt with a word of `SPOKEN` is of the test, so that each one there has a word that training neither speaks nor
    writes; a twentieth of the other texts is for validation. Prompts that name a held-out thing go nowhere, nor do
    sounds that are no words, nor what takes more than six seconds.
    """
    spoken, written = folders[PROMPTS.name], folders[PROMPT_TEXTS.name] / PROMPT_TEXTS.patterns[0]
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    left_out = 0
    for line in gzip.decompress(written.read_bytes()).decode("utf-8").splitlines():
        name, _, said = line.partition(":")
        file = spoken / f"{name}.wav"
        if line.startswith(";") or not said or not file.is_file():
            continue
        text = " ".join(said.replace("...", " ").split())
        split = _prompt_split(text)
        if split is None or _seconds(file) > _LONGEST_PROMPT:
            left_out += 1
            continue
        text = text[0].upper() + text[1:]
        name = name.replace("/", "-")
        splits[split].append(
            Record(name, "audio", file, _phrased(_LISTEN, name), text if text[-1] in ".!?" else text + ".")
        )
    counts = {split: _write(out, split, chosen) for split, chosen in splits.items()}
    return {**counts, "left out": left_out}


def _prompt_split(text: str) -> Split | None:
    if re.search(r"[][(){}]", text) or not re.search(r"[a-zA-Z]", text) or names_held_out(text):
        return None
    if SPOKEN & set(re.findall(r"[a-z']+", text.lower())):
        return "test"
    return "validation" if Draw("prompts", text.lower()).below(20) == 0 else "train"


def _seconds(file: Path) -> float:
    with wave.open(str(file)) as opened:
        return opened.getnframes() / opened.getframerate()


def easy_vqa(folders: Mapping[str, Path], out: Path) -> dict[str, int]:
    """Easy-VQA's questions, in its own two splits."""
    (folder,) = folders.values()
    counts = {}
    for split in ("train", "test"):
        questions = json.loads((folder / split / "questions.json").read_text(encoding="utf-8"))
        records = [
            Record(
                f"{split}-{number}",
                "image",
                folder / split / "images" / f"{image}.png",
                question,
                answer,
                stored=str(image),
            )
            for number, (question, answer, image) in enumerate(questions)
        ]
        counts[split] = _write(out, split, records)
    return counts


def _written(out: Path, records: Iterator[tuple[Record, str]]) -> dict[str, int]:
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    left_out = 0
    for record, caption in records:
        split = split_of(caption)
        if split is None:
            left_out += 1
        else:
            splits[split].append(record)
    counts = {split: _write(out, split, chosen) for split, chosen in splits.items()}
    return {**counts, "left out": left_out}


def _write(out: Path, split: str, records: list[Record]) -> int:
    seen: Counter[str] = Counter()
    with (out / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
        for record in records:
            seen[record.name] += 1
            name = record.name if seen[record.name] == 1 else f"{record.name}-{seen[record.name]}"
            place = Path("files") / split / f"{record.stored or name}{record.file.suffix}"
            target = out / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(record.file, target)
            content = [
                {"type": record.medium, record.medium: place.as_posix()},
                {"type": "text", "text": record.question},
            ]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": record.answer}]
            lines.write(json.dumps({"id": name, **record.more, "messages": messages}, ensure_ascii=False) + "\n")
    return len(records)


def _image(name: str, file: Path, caption: str) -> Record:
    answer = caption.strip()
    answer = answer[0].upper() + answer[1:]
    return Record(name, "image", file, _phrased(_LOOK, name), answer if answer[-1] in ".!?" else answer + ".")


def _phrased(questions: tuple[str, ...], name: str) -> str:
    return Draw("real", name).choice(questions)


def _captions(file: Path) -> dict[str, str]:
    """Language -> caption of a stamp: the first line is English, the others say which language they are."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return {}
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
    for line in lines[1:]:
        key, _, said = line.partition(".utf8=")
        if said.strip():
            found[key.strip()] = said.strip()
    return found


def _name(file: Path, folder: Path) -> str:
    return "-".join(file.relative_to(folder).with_suffix("").parts).replace(" ", "_")
