"""Captions and pictures: recall both ways, BLEU and CIDEr against naive loops, files of every layout, the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import alula
from alula.cli.app import _registered
from alula.cli.tasks import pictures_named
from alula.data import open_source
from alula.data.captions import CaptionedPicture, captions_of, read_captions
from alula.errors import DataError, EvaluationError, UsageError
from alula.evaluation import CaptionRun, evaluate_captions, recall_of
from alula.evaluation.caption_scores import bleu4, cider, words
from alula.grafts import MKS2Config
from alula.hosts import build_host, save_host
from tests.hosts import tiny

CAPTIONS = [["a red cat sits", "the cat is red"], ["two dogs run in the park"], ["a boat"], ["the red dog's boat"]]


# -- recall --------------------------------------------------------------------------------------------------------


def test_recall_is_that_of_a_sorted_list() -> None:
    generator = np.random.default_rng(3)
    pictures, of = 30, sorted([*range(30), *range(0, 30, 2), *range(0, 30, 5)])
    similarity = generator.normal(size=(len(of), pictures)) + 1.5 * np.eye(pictures)[of]
    found = recall_of(similarity, of)
    for k in (1, 5, 10):
        to_image = [of[i] in sorted(range(pictures), key=lambda j: -similarity[i, j])[:k] for i in range(len(of))]
        first = [sorted(range(len(of)), key=lambda i: -similarity[i, j])[:k] for j in range(pictures)]
        to_caption = [any(of[i] == j for i in first[j]) for j in range(pictures)]
        assert found.caption_to_image[k].value == pytest.approx(np.mean(to_image))
        assert found.image_to_caption[k].value == pytest.approx(np.mean(to_caption))
        for share in (found.caption_to_image[k], found.image_to_caption[k]):
            assert share.low <= share.value <= share.high
    assert found.caption_to_image[1].low < found.caption_to_image[1].high


def test_to_whom_all_is_alike_finds_nothing() -> None:
    found = recall_of(np.zeros((12, 12)), range(12))
    assert [found.caption_to_image[k].value for k in (1, 5, 10)] == [0, 0, 0]
    assert recall_of(np.eye(12), range(12)).image_to_caption[1].value == 1


# -- BLEU and CIDEr ------------------------------------------------------------------------------------------------


def naive_cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """The formulas of Vedantam et al., one n-gram at a time."""

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        split = words(text)
        return [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]

    def rareness(gram: tuple[str, ...]) -> float:
        holding = sum(any(gram in grams(text, len(gram)) for text in each) for each in references)
        return math.log(len(references) / max(1, holding))

    found = []
    for caption, each in zip(captions, references, strict=True):
        total = 0.0
        for reference in each:
            short = math.exp(-((len(words(caption)) - len(words(reference))) ** 2) / 72)
            for n in range(1, 5):
                one, two = Counter(grams(caption, n)), Counter(grams(reference, n))
                first = {gram: count * rareness(gram) for gram, count in one.items()}
                second = {gram: count * rareness(gram) for gram, count in two.items()}
                norm = math.sqrt(sum(v**2 for v in first.values())) * math.sqrt(sum(v**2 for v in second.values()))
                if norm:
                    total += short * sum(min(v, second.get(g, 0)) * second.get(g, 0) for g, v in first.items()) / norm
        found.append(10 * total / 4 / len(each))
    return found


def test_cider_is_that_of_the_formulas() -> None:
    said = ["A red cat sits.", "dogs run, dogs run in the park", "a boat!", "nothing of it"]
    assert cider(said, CAPTIONS) == pytest.approx(naive_cider(said, CAPTIONS), rel=1e-9)
    itself = cider([each[0] for each in CAPTIONS], [[each[0]] for each in CAPTIONS])
    assert itself[1] == pytest.approx(10)  # a caption of four words and more, word for word
    assert cider(said, CAPTIONS)[3] == 0


def test_bleu_takes_pictures_with_more_captions_and_with_fewer() -> None:
    exact, signature = bleu4(["A red cat sits", "two dogs run in the park"], CAPTIONS[:2])
    assert exact == pytest.approx(100)
    assert "nrefs:var" in signature
    assert "case:lc" in signature
    assert bleu4(["a red dog sits", "two dogs walk in the park"], CAPTIONS[:2])[0] < 60


# -- files ---------------------------------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 1, "caption": "a cat "},
        {"image_id": 2, "caption": "a dog"},
        {"image_id": 1, "caption": "the cat"},
    ],
}
KARPATHY = {
    "images": [
        {"filepath": "val", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "a cat"}, {"raw": "the cat"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "a dog"}]},
    ]
}
LAYOUTS = {
    "coco.json": (json.dumps(COCO), ["a.jpg", "b.jpg"]),
    "karpathy.json": (json.dumps(KARPATHY), ["val/a.jpg", "b.jpg"]),
    "results.token": ("a.jpg#0\ta cat\na.jpg#1\tthe cat\nb.jpg#0\ta dog\n", ["a.jpg", "b.jpg"]),
    "captions.txt": ("image,caption\na.jpg,a cat\na.jpg,the cat\nb.jpg,a dog\n", ["a.jpg", "b.jpg"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_captions(name: str, tmp_path: Path) -> None:
    text, files = LAYOUTS[name]
    (tmp_path / name).write_text(text)
    found = read_captions(tmp_path / name)
    assert [picture.id for picture in found] == files
    assert [picture.captions for picture in found] == [("a cat", "the cat"), ("a dog",)]
    assert found[0].messages[0]["role"] == "user"
    if name == "karpathy.json":
        assert [picture.id for picture in read_captions(tmp_path / name, split="test")] == files[:1]
        with pytest.raises(DataError, match="holds no captions of split 'val'"):
            read_captions(tmp_path / name, split="val")
    else:
        with pytest.raises(DataError, match="names no splits"):
            read_captions(tmp_path / name, split="test")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"images": [{"id": 1}]}', "is no file of captions that is known"),
        ('{"images": [], "annotations": [{"caption": "x"}]}', "is no file of captions"),
        ('["a cat"]', "is no file of captions"),
        ("a.jpg#0\ta cat\nb.jpg a dog\n", ":2: is no `name"),
        ("picture,text\na.jpg,a cat\n", "is no file of captions"),
        ("image,caption\na.jpg,\n", ":2: lacks an image or a caption"),
        ("", "holds no captions"),
    ],
)
def test_files_of_another_layout_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(DataError) as caught:
        read_captions(tmp_path / "file")
    assert said in str(caught.value)
    assert "COCO" in (caught.value.remedy or "")


def test_a_picture_whose_caption_is_taken_is_left_out() -> None:
    found = pictures_named("microworld:caption,split=test", n=60)
    captions = [picture.captions[0] for picture in found]
    assert len({*captions}) == len(captions) > 20
    again = captions_of(open_source({"microworld": "caption", "split": "test"}), 60)
    assert [(each.id, each.captions) for each in again] == [(each.id, each.captions) for each in found]
    with pytest.raises(DataError, match="holds no pictures with captions"):
        captions_of(open_source({"microworld": "text"}), 5)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nowhere.json", "there is no file 'nowhere.json'"),
        ("microworld:caption,test", "'test' is no setting"),
        ("microworld:captions", "caption"),
        ("jsonl:a.jsonl,runs=8", "--retrieval: runs: the first samples of the source are read"),
    ],
)
def test_what_is_not_there_is_said(what: str, said: str) -> None:
    with pytest.raises((UsageError, DataError)) as caught:
        pictures_named(what)
    assert said in str(caught.value)


# -- a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Any:
    return build_host(tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())


def drawn(count: int, folder: Path) -> tuple[CaptionedPicture, ...]:
    """Pictures in a file of COCO's layout."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number in range(count):
        color = (40 * number % 256, 90 * number % 256, 255 - 30 * number)
        Image.new("RGB", (16, 16), color).save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        content["annotations"] += [{"image_id": number, "caption": f"a picture {w} {number}"} for w in ("of", "with")]
    (folder / "captions.json").write_text(json.dumps(content))
    return read_captions(folder / "captions.json")


def test_a_model_with_a_memory_and_one_without(host: Any, tmp_path: Path) -> None:
    pictures = drawn(6, tmp_path)
    bare = evaluate_captions(host.model, host.processor, pictures, max_new_tokens=4)
    assert bare.recall is None
    assert (bare.pictures, bare.references) == (6, 12)
    graft: Any = alula.attach(host.model, MKS2Config(memory_width=8, rank=2, retrieval=16))
    try:
        runs = [
            evaluate_captions(host.model, host.processor, pictures, max_new_tokens=4, batch_size=size)
            for size in (2, 6)
        ]
        assert runs[0].recall is not None
        assert runs[0].recall == runs[1].recall
        assert runs[0].recall.caption_to_image[10].value == 1  # of six pictures
        runs[0].save(tmp_path / "retrieval.json")
        assert CaptionRun.load(tmp_path / "retrieval.json") == runs[0]
        with pytest.raises(EvaluationError, match="there is one picture"):
            evaluate_captions(host.model, host.processor, pictures[:1])
    finally:
        graft.detach()


def test_the_command(host: Any, tmp_path: Path) -> None:
    drawn(4, tmp_path)
    save_host(host, tmp_path / "host")
    graft = alula.attach(host.model, MKS2Config(memory_width=8, rank=2, retrieval=16))
    alula.save_adapter(host.model, tmp_path / "memory", base=tmp_path / "host", processor=host.processor)
    graft.detach()
    given = ["eval", str(tmp_path / "memory"), "--retrieval", str(tmp_path / "captions.json"), "--max-new-tokens", "4"]
    output = ["--output", str(tmp_path / "out")]
    done = CliRunner().invoke(_registered(), [*given, *output, "--json"], catch_exceptions=False)
    run = CaptionRun.load(tmp_path / "out" / "retrieval.json")
    assert json.loads(done.stdout)["pictures"] == run.pictures == 4
    shown = CliRunner().invoke(_registered(), [*given, *output], catch_exceptions=False)
    for part in ("caption to picture, R@1", "picture to caption, R@10", "BLEU-4", "CIDEr-D"):
        assert part in shown.stdout
    with pytest.raises(UsageError, match="asks no questions: leave --task out"):
        CliRunner().invoke(_registered(), [*given, "--task", "text_bare"], catch_exceptions=False)
