"""POPE and CHAIR: the questions, the counts and the figures, each against a naive computation."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alula.cli import app as cli
from alula.data.annotations import AnnotatedPicture, read_annotations, read_questions
from alula.errors import AlulaError, DataError, EvaluationError, UsageError
from alula.evaluation import ObjectFiles, PairedRun, RunResult, evaluate, object_tasks, pope_of_questions
from alula.evaluation.chair import chair_of_annotations, count_objects
from alula.evaluation.items import TaskItem, images_of
from alula.evaluation.mentions import COCO_PHRASES, ObjectWords
from alula.evaluation.pope import pope_items, pope_of_annotations, read_yes_no
from alula.evaluation.ratios import compared_figures, figures
from alula.evaluation.results import ItemResult, Ratio
from alula.stats import Resampling
from alula_fledgling.tasks import chair, pope

CATEGORIES = ["person", "dog", "cat", "dining table", "hot dog", "knife", "bus", "tie", "toilet", "bear"]


@pytest.fixture
def coco(tmp_path: Path, picture: Any) -> Path:
    """Instances, captions, synonyms and questions of twelve pictures."""
    draw = random.Random(3)
    (tmp_path / "images").mkdir()
    images, annotations, captions = [], [], []
    for number in range(12):
        picture.save(tmp_path / "images" / f"{number:04}.png")
        images.append({"id": number, "file_name": f"{number:04}.png"})
        for category in draw.sample(range(len(CATEGORIES)), draw.randint(0, 5)):
            annotations += [{"image_id": number, "category_id": 10 + category}] * draw.randint(1, 3)
        captions.append({"image_id": number, "caption": draw.choice(["A man with two knives.", "Nothing here."])})
    listed = [{"id": 10 + index, "name": name} for index, name in enumerate(CATEGORIES)]
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    write("instances.json", {"images": images, "categories": listed, "annotations": annotations})
    write("captions.json", {"annotations": captions})
    (tmp_path / "synonyms.txt").write_text(
        "\n".join(
            ", ".join([name, *{"person": ["man", "woman", "baby"], "dog": ["puppy"]}.get(name, [])])
            for name in CATEGORIES
        )
    )
    lines = [
        {
            "question_id": k,
            "image": f"{k % 3:04}.png",
            "text": f"Is there a {CATEGORIES[k]} in the image?",
            "label": label,
        }
        for k, label in enumerate(["yes", "no", "yes", "no"])
    ]
    for setting in ("random", "adversarial"):
        (tmp_path / f"coco_pope_{setting}.json").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def text_of(item: TaskItem) -> str:
    return item.messages[0]["content"][-1]["text"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A dog and two dogs eat hot dogs.", ["dog", "dog", "hot dog"]),
        ("The MAN's puppy; women, a baby bear, knives", ["person", "dog", "person", "bear", "knife"]),
        ("dining tables, buses and a bow tie on a toilet seat", ["dining table", "bus", "tie", "toilet"]),
        ("home plate, dogma, category, tabled", []),
        ("", []),
    ],
)
def test_mentions(text: str, named: list[str]) -> None:
    synonyms = {name: [] for name in CATEGORIES} | {"person": ["man", "woman", "baby"], "dog": ["puppy"]}
    assert ObjectWords(synonyms, COCO_PHRASES).find(text) == named


@pytest.mark.parametrize(
    ("answer", "published", "strict"),
    [
        ("Yes, there is a dog.", "yes", "yes"),
        ("No.", "no", "no"),
        ("There is not. Yes!", "no", "no"),
        ("I see a dog. No cat.", "yes", None),
        ("there isn't one", "yes", "no"),
        ("yes, no doubt", "no", "yes"),
        ("nobody knows", "yes", None),
        ("", "yes", None),
    ],
)
def test_yes_and_no_are_read_as_published_or_strictly(answer: str, published: str, strict: str | None) -> None:
    # POPE's own evaluate.py, apart from case
    words = answer.split(".")[0].replace(",", "").split(" ")
    assert published == ("no" if {"No", "no", "not"} & set(words) else "yes")
    assert (read_yes_no(answer), read_yes_no(answer, "strict")) == (published, strict)


def naive_negatives(
    setting: str, pictures: list[AnnotatedPicture], one: AnnotatedPicture, asked: list[str]
) -> list[str]:
    """What the published generator asks about in vain, with ties by name."""
    frequency = {name: sum(name in p.objects for p in pictures) for name in CATEGORIES}
    chosen: list[str] = []
    for present in asked:
        if setting == "popular":
            weight = frequency
        else:
            weight = {name: sum({name, present} <= p.objects for p in pictures) for name in CATEGORIES}
            weight = {name: value for name, value in weight.items() if value}
        order = sorted(weight, key=lambda name: (-weight[name], name))
        free = [name for name in order if name not in one.objects and name not in chosen]
        chosen.append(free[0] if free else "")
    return chosen


def test_pope_asks_what_the_published_generator_asks(coco: Path) -> None:
    annotations = read_annotations(coco / "instances.json", images=coco / "images")
    pictures = list(annotations.pictures)
    items = pope_of_annotations(annotations).items()
    by_picture = {p.id: p for p in pictures}
    assert {item.cluster for item in items} == {p.id for p in pictures if len(p.objects) >= 3}
    for (name, setting), group in itertools.groupby(items, key=lambda item: (item.cluster, item.family)):
        six, one = list(group), by_picture[name]
        assert [item.gold for item in six] == ["yes", "no"] * 3
        assert all((item.tags["object"] in one.objects) == (item.gold == "yes") for item in six)
        assert len({item.tags["object"] for item in six}) == 6
        asked, absent = ([item.tags["object"] for item in six[k::2]] for k in (0, 1))
        if setting != "random":
            expected = naive_negatives(setting, pictures, one, asked)
            assert all(e in ("", a) for e, a in zip(expected, absent, strict=True))
        assert all(re.fullmatch(rf"Is there an? {item.tags['object']} in the image\?", text_of(item)) for item in six)


def test_random_negatives_are_even_and_reproducible() -> None:
    pictures = [AnnotatedPicture(str(k), None, frozenset(CATEGORIES[:3])) for k in range(2000)]
    items = pope_items(pictures, CATEGORIES, pictures, ["random"], seed=0, template="{}?")
    counts = Counter(item.tags["object"] for item in items if item.gold == "no")
    assert set(counts) == set(CATEGORIES[3:])
    expected = 2000 * 3 / 7
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())
    again = pope_items(pictures, CATEGORIES, pictures, ["random"], seed=0, template="{}?")
    other = pope_items(pictures, CATEGORIES, pictures, ["random"], seed=1, template="{}?")
    assert again == items
    assert other != items


def test_microworld_pope_is_true_to_its_pictures() -> None:
    items = pope(120).items()
    assert Counter(item.family for item in items) == dict.fromkeys(
        ("random", "popular", "adversarial", "confusable"), 30
    )
    for item in items:
        (image,) = images_of(item.messages)
        there = {thing.name for thing in image.scene.things}
        assert (item.tags["object"] in there) == (item.gold == "yes")
        if item.family == "confusable" and item.gold == "no":
            colour, shape = item.tags["object"].split()
            assert any(colour in name or shape in name for name in there)
    assert [i.id for i in pope(120).items()] == [i.id for i in items]


def test_pope_figures_are_the_textbook_ones() -> None:
    task, draw = pope(480), random.Random(0)
    answers = [draw.choice(["Yes.", "No, there is not.", "red", "yes it is"]) for _ in task.items()]
    rows = [result(item, answer, task) for item, answer in zip(task.items(), answers, strict=True)]
    found = figures(rows, task.ratios)
    for group in ("all", "random", "popular", "adversarial", "confusable"):
        chosen = [(r.gold, r.answer) for r in rows if group in ("all", r.family)]
        said = [(gold, {"Y": "yes", "y": "yes", "N": "no"}.get(answer[0])) for gold, answer in chosen]
        tp = sum(pair == ("yes", "yes") for pair in said)
        fp = sum(pair == ("no", "yes") for pair in said)
        right = sum(gold == answer for gold, answer in said)
        precision, recall = tp / (tp + fp), tp / sum(gold == "yes" for gold, _ in said)
        expected = {
            "accuracy": right / len(said),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_rate": (tp + fp) / len(said),
            "neither": sum(answer is None for _, answer in said) / len(said),
        }
        for name, value in expected.items():
            estimate = found[group][name]
            assert estimate.value == pytest.approx(value, abs=1e-12), (group, name)
            assert estimate.low <= value <= estimate.high
    assert sum(r.score for r in rows) / len(rows) == pytest.approx(found["all"]["accuracy"].value)


def test_chair_counts_as_published(coco: Path) -> None:
    annotations = read_annotations(coco / "instances.json", images=coco / "images", captions=coco / "captions.json")
    words = ObjectWords.read(coco / "synonyms.txt")
    task = chair_of_annotations(annotations, words=words)
    raw = json.loads((coco / "instances.json").read_text())
    people = {
        entry["image_id"]
        for entry in json.loads((coco / "captions.json").read_text())["annotations"]
        if "man" in entry["caption"]
    }
    draw, vocabulary = random.Random(1), [*CATEGORIES, "grass", "puppy", "woman"]
    invented = mentions = recalled = objects = bad = length = 0
    rows = []
    for item in task.items():
        truth = {CATEGORIES[a["category_id"] - 10] for a in raw["annotations"] if str(a["image_id"]) == item.id}
        truth |= {"person", "knife"} if int(item.id) in people else set()
        assert item.gold == ", ".join(sorted(truth))
        said = draw.choices(vocabulary, k=draw.randint(0, 5))
        nodes = [{"puppy": "dog", "woman": "person"}.get(word, word) for word in said if word != "grass"]
        answer = "I see " + " and a ".join(said)
        rows.append(result(item, answer, task))
        wrong = [node for node in nodes if node not in truth]
        invented, mentions, bad = invented + len(wrong), mentions + len(nodes), bad + bool(wrong)
        recalled, objects = recalled + len(truth & set(nodes)), objects + len(truth)
        length += len(answer.split())
        assert rows[-1].score == float(bool(nodes) and not wrong)
    found = figures(rows, task.ratios)["all"]
    expected = {
        "chair_i": invented / mentions,
        "chair_s": bad / len(rows),
        "recall": recalled / objects,
        "length": length / len(rows),
    }
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(expected)


def test_gold_descriptions_of_the_microworld_invent_nothing_and_forget_nothing() -> None:
    task = chair(40)
    for item in task.items():
        (image,) = images_of(item.messages)
        gold = " and ".join(f"a {thing.full_name} at the {thing.position}" for thing in image.scene.things)
        counts = task.counts(item, gold)
        assert (counts["invented"], counts["recalled"]) == (0, counts["objects"])
        assert task.score(item, gold) == 1
        assert task.score(item, "no such answer") == 0
        assert task.score(item, gold + " and a small pink elephant") == 1  # not an object of this world
    other = count_objects("two red circles", frozenset({"red ring"}), _words())
    assert (other["mentions"], other["invented"], other["inventing"]) == (1, 1, 1)


def _words() -> ObjectWords:
    from alula_fledgling.tasks.pictures import microworld_words

    return microworld_words()


def result(item: TaskItem, answer: str, task: Any) -> ItemResult:
    return ItemResult(
        id=item.id,
        family=item.family,
        prompt_hash=item.id,
        gold=item.gold,
        answer=answer,
        score=task.score(item, answer),
        cluster=item.cluster,
        counts=dict(task.counts(item, answer)),
    )


HOW = Resampling(resamples=4000)
RATIO = Ratio(name="r", title="r", over={"a": 1}, under={"a": 1, "b": 1})


def rows_of(seed: int, n: int = 60) -> list[ItemResult]:
    draw = np.random.default_rng(seed)
    return [
        ItemResult(
            id=str(k), family="f", prompt_hash=str(k), gold="", answer="", score=0, cluster=str(k // 3),
            counts={"a": float(draw.integers(3)), "b": float(draw.integers(2))},
        )
        for k in range(n)
    ]  # fmt: skip


def test_intervals_of_ratios_resample_clusters() -> None:
    base, tuned = rows_of(0), rows_of(1)
    draw = np.random.default_rng(5)
    values, changes = [], []
    for _ in range(3000):
        clusters = draw.integers(20, size=20)
        chosen = [3 * c + k for c in clusters for k in range(3)]
        one, two = (
            sum(r[i].counts["a"] for i in chosen) / sum(r[i].counts["a"] + r[i].counts["b"] for i in chosen)
            for r in (base, tuned)
        )
        values.append(one)
        changes.append(two - one)
    alone = figures(base, [RATIO], HOW)["all"]["r"]
    pair = compared_figures(base, tuned, [RATIO], HOW)["all"]["r"]
    assert (alone.low, alone.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.012)
    assert (pair.difference.low, pair.difference.high) == pytest.approx(np.percentile(changes, [2.5, 97.5]), abs=0.015)
    assert pair.base.value == alone.value
    assert pair.difference.value == pytest.approx(pair.tuned.value - pair.base.value)


def test_a_ratio_over_nothing_is_none() -> None:
    empty = [row.model_copy(update={"counts": {}}) for row in rows_of(0)]
    assert figures(empty, [RATIO]) == {"all": {"r": None}}
    assert compared_figures(empty, rows_of(0), [RATIO])["all"]["r"].difference is None
    assert figures(rows_of(0), []) == {}


def test_question_files_are_settings(coco: Path, host: Any, processor: Any) -> None:
    files = [coco / f"coco_pope_{name}.json" for name in ("random", "adversarial")]
    task = pope_of_questions(itertools.chain(*(read_questions(f, images=coco / "images") for f in files)), n=3)
    found = evaluate(host, processor, [task], max_new_tokens=2).tasks["pope_questions"]
    assert Counter(item.family for item in found.items) == {"random": 3, "adversarial": 3}
    assert set(found.figures) == {"all", "random", "adversarial"}
    assert [item.gold for item in found.items] == ["yes", "no", "yes"] * 2
    assert len({item.cluster for item in found.items}) == 3


def test_the_command_line_takes_coco_files_and_compares(
    coco: Path, tmp_path: Path, host: Any, processor: Any, monkeypatch: Any, capsys: Any
) -> None:
    host.save_pretrained(tmp_path / "host")
    processor.save_pretrained(tmp_path / "host")
    about = f"{coco}/instances.json,captions={coco}/captions.json"
    tasks = [
        f"pope:{about}",
        f"chair:{about},synonyms={coco}/synonyms.txt",
        f"pope_questions:{coco}/coco_pope_random.json",
    ]
    arguments = [word for task in tasks for word in ("--task", task)] + ["--images", str(coco / "images")]
    call = ["alula", "eval", str(tmp_path / "host"), "--base", str(tmp_path / "host"), "--output", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", [*call, *arguments, "--max-new-tokens", "2", "--device", "cpu", "--references"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    streams = capsys.readouterr()
    assert not stop.value.code, streams.err
    pairs = PairedRun.load(tmp_path / "o" / "paired.json")
    assert list(pairs.tasks) == ["pope", "chair", "pope_questions"]
    assert pairs.tasks["pope"].figures["all"]["accuracy"].difference.value == 0
    assert pairs.tasks["pope"].figures["all"]["reference_nats"].difference.value == 0
    assert set(pairs.tasks["pope"].figures) == {"all", "random", "popular", "adversarial"}
    tuned = RunResult.load(tmp_path / "o" / "tuned.json").tasks["chair"]
    assert set(tuned.figures["all"]) == {"chair_i", "chair_s", "recall", "length"}
    assert "said yes" in streams.out
    assert "Objects made up" in (tmp_path / "o" / "report.html").read_text()
    chair_alone = ["--task", tasks[1], "--images", str(coco / "images"), "--device", "cpu", "--references"]
    monkeypatch.setattr(sys, "argv", [*call, *chair_alone])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "the references of chair are no answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no list 'categories'"),
        ('{"categories": [{"id": 1}]}', "has no 'name'"),
        (
            '{"categories": [{"id": 1, "name": "dog"}], "images": [],'
            ' "annotations": [{"image_id": 4, "category_id": 1}]}',
            "image 4",
        ),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_annotations(tmp_path / "a.json", images=tmp_path)


def test_wrong_calls_say_what_is_wrong(tmp_path: Path, coco: Path) -> None:
    for call, kind in [
        (lambda: ObjectFiles(annotations="a.json"), UsageError),
        (lambda: ObjectFiles(synonyms="a.txt"), UsageError),
        (lambda: object_tasks(["nonsense"], ObjectFiles()), UsageError),
        (lambda: pope(10, negatives=["odd"]), UsageError),
        (lambda: list(read_questions(coco / "instances.json", images=coco)), DataError),
        (lambda: ObjectWords.read(tmp_path / "none.txt"), DataError),
        (lambda: chair_of_annotations(_annotations(coco), words=ObjectWords({"cow": []})), EvaluationError),
    ]:
        with pytest.raises(kind) as raised:
            call()
        assert isinstance(raised.value, AlulaError)


def _annotations(coco: Path) -> Any:
    return read_annotations(coco / "instances.json", images=coco / "images")
