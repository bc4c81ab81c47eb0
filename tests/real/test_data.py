"""Data out of packages: records that alula reads, with things held out of training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from alula.data import MixtureSpec, open_mixture
from alula.real import data
from alula.real.held_out import SPOKEN, TEST, VALIDATION
from alula.real.things import split_of, words_of

CAPTIONS = {
    "animals/koala": "A koala.",
    "animals/gorilla": "A gorilla.",
    "animals/dogs/two": "Two dogs.",
    "animals/dog": "A dog with a shark.",
    "animals/hen": "A hen.",
    "signs/four": "Four.",
}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stamps")
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 4), 40 * number, np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=En français {number}.\nes.utf8=\n", encoding="utf-8")
        if number < 2:
            for ending in ("_desc.ogg", "_desc_fr.ogg", "_desc_es.ogg", ".ogg"):
                sound = (0.1 * np.random.default_rng(number).standard_normal(4000)).astype(np.float32)
                soundfile.write(file.with_name(file.stem + ending), sound, 8000, format="OGG")
    Image.new("RGB", (8, 8)).save(folder / "animals" / "koala_mirror.png")  # without a caption
    return folder


def lines(out: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_things_of_the_test_are_named_nowhere_in_training() -> None:
    assert not TEST & VALIDATION
    assert split_of("A gorilla.") == "test"
    assert split_of("A hen.") == "validation"
    assert split_of("A dog with a shark.") == "test"  # its last word is its thing
    assert split_of("A shark beside a dog.") is None
    assert split_of("A hen with a gorilla beside a dog") is None
    assert split_of("Two dogs.") == split_of("A DOG!") == "train"
    assert split_of("A dog. It likes gorillas.") is None
    assert split_of("Family: man, girl, boy.") is None
    assert split_of("A couple with children") == "test"
    assert split_of("Knives and forks beside a dog") is None
    assert split_of("Strawberries") == "test"
    assert split_of("Four.") is None
    assert words_of("A dog. It likes gorillas.") == ["dog"]
    for word in sorted(TEST | VALIDATION):
        assert words_of(word) == [word]  # or nothing would ever be held out by it


def test_pictures_with_captions(stamps: Path, tmp_path: Path) -> None:
    counts = data.stamps({"tuxpaint-stamps-default": stamps}, tmp_path)
    assert counts == {"train": 2, "validation": 1, "test": 2, "left out": 1}
    answers = {
        each["id"]: each["messages"][1]["content"] for split in ("train", "test") for each in lines(tmp_path, split)
    }
    assert answers == {
        "animals-koala": "A koala.",
        "animals-dogs-two": "Two dogs.",
        "animals-gorilla": "A gorilla.",
        "animals-dog": "A dog with a shark.",
    }
    source = {"sources": [{"jsonl": str(tmp_path / "train.jsonl")}]}
    sample = open_mixture(MixtureSpec.model_validate(source))[0]
    assert sample.images[0].load().size == (8, 8)
    again = tmp_path / "again"
    again.mkdir()
    data.stamps({"tuxpaint-stamps-default": stamps}, again)
    assert (again / "train.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


def test_speech_and_sounds(stamps: Path, tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    counts = data.speech({"tuxpaint-stamps-default": stamps}, tmp_path / "speech")
    assert counts == {"train": 2, "validation": 0, "test": 2, "left out": 0}  # Spanish has no words
    said = {
        each["id"]: (each["language"], each["messages"][1]["content"]) for each in lines(tmp_path / "speech", "test")
    }
    assert said == {"animals-gorilla_en": ("en", "A gorilla."), "animals-gorilla_fr": ("fr", "En français 1.")}
    (tmp_path / "sounds").mkdir()
    assert data.sounds({"tuxpaint-stamps-default": stamps}, tmp_path / "sounds")["train"] == 1
    source = {"sources": [{"jsonl": str(tmp_path / "sounds" / "train.jsonl")}]}
    sample = open_mixture(MixtureSpec.model_validate(source))[0]
    assert len(sample.media("audio")[0].load(8000)) == 4000


def test_prompts_of_held_out_words_are_the_test(tmp_path: Path) -> None:
    spoken, written, out = (tmp_path / name for name in ("spoken", "written", "out"))
    for folder in (spoken, spoken / "digits", written, out):
        folder.mkdir()
    said = {
        "again": "please try again...",
        "digits/17": "seventeen",
        "lamp": "Switch the lamp on.",  # a thing
        "long": "Press one.",
        "tone": "[a tone]",
        "unspoken": "Nobody said it.",
    }
    for name in ("again", "digits/17", "lamp", "long", "tone"):
        soundfile.write(spoken / f"{name}.wav", np.zeros(8000 * (7 if name == "long" else 1), np.int16), 8000)
    text = "; Sounds\n\n" + "".join(f"{name}: {words}\n" for name, words in said.items())
    (written / "core-sounds-en.txt.gz").write_bytes(gzip.compress(text.encode()))
    counts = data.prompts({"asterisk-core-sounds-en-wav": spoken, "asterisk-core-sounds-en": written}, out)
    assert counts == {"train": 1, "validation": 0, "test": 1, "left out": 3}
    assert [(each["id"], each["messages"][1]["content"]) for each in lines(out, "test")] == [
        ("digits-17", "Seventeen.")
    ]
    assert lines(out, "train")[0]["messages"][1]["content"] == "Please try again."
    assert not SPOKEN & {
        word for each in lines(out, "train") for word in each["messages"][1]["content"].lower().split()
    }


def test_emoji_and_easy_vqa(tmp_path: Path) -> None:
    package = tmp_path / "emoji"
    (package / "img/twitter/64").mkdir(parents=True)
    known = [
        {"name": "TIGER FACE", "short_name": "tiger", "image": "a.png", "has_img_twitter": True},
        {"name": "KOALA", "short_name": "koala", "image": "b.png", "has_img_twitter": False},
    ]
    (package / "emoji.json").write_text(json.dumps(known))
    Image.new("RGBA", (8, 8)).save(package / "img/twitter/64/a.png")
    out = tmp_path / "out"
    out.mkdir()
    assert data.emoji({"emoji-datasource-twitter": package}, out)["train"] == 1
    assert lines(out, "train")[0]["messages"][1]["content"] == "Tiger face."
    questions = tmp_path / "easy"
    for split, count in (("train", 3), ("test", 2)):
        (questions / split / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(questions / split / "images" / "0.png")
        asked = [["what shape is it?", "circle", 0]] * count
        (questions / split / "questions.json").write_text(json.dumps(asked))
    out = tmp_path / "vqa"
    out.mkdir()
    assert data.easy_vqa({"easy-vqa": questions}, out) == {"train": 3, "test": 2}
    assert len({each["id"] for each in lines(out, "train")}) == 3
    assert [path.name for path in (out / "files" / "train").iterdir()] == ["0.png"]  # a picture of three questions once
