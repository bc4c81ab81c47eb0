"""Dialogues from two question files: which questions meet, in which order, and that nothing moves between runs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from alula.cli import data as commands
from alula.data import DatasetSource, RecordError, message_text, open_file
from alula.data.interleave import (
    PAPER_SETTINGS,
    SETTINGS,
    Dialogue,
    Question,
    interleave,
    questions,
    sentence_encoder,
    write_dialogues,
)
from alula.errors import DataError, UsageError

TEXTS = [
    "Which planet is the largest?",
    "Which planet is nearest to the sun?",
    "Who wrote the play Hamlet?",
    "Who wrote the novel Emma?",
    "What is the boiling point of water?",
    "How many legs has a spider?",
    "how many legs has a  SPIDER?",
]
LOOKS = [
    "Which planet is shown here?",
    "How many spiders are in the picture?",
    "Who wrote the book on the table?",
    "Is the water in the pot boiling?",
    "How many legs are visible?",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"id": f"t{k}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"a{k}"}]}
        for k, q in enumerate(TEXTS)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images").mkdir()
    for k in range(len(LOOKS)):
        Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
    talk = [
        {
            "id": f"v{k}",
            "image": f"{k}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{q}"},
                {"from": "gpt", "value": f"b{k}"},
                {"from": "human", "value": "And why?"},
                {"from": "gpt", "value": "so"},
            ],
        }
        for k, q in enumerate(LOOKS)
    ]
    (tmp_path / "look.json").write_text(json.dumps(talk))
    return tmp_path


@pytest.fixture
def pools(folder: Path) -> dict[str, list[Question]]:
    return {"T": questions(open_file(folder / "text.jsonl"), "T"), "V": questions(open_file(folder / "look.json"), "V")}


def naive_vectors(texts: list[str]) -> list[dict[str, float]]:
    """TF-IDF over 2 to 4 characters within padded words: log term counts, smooth idf, unit length."""
    bags = []
    for text in texts:
        words = [f" {word} " for word in text.lower().split()]
        bags.append(Counter(w[i : i + n] for w in words for n in (2, 3, 4) for i in range(len(w) - n + 1)))
    document = Counter(gram for bag in bags for gram in bag)
    vectors = []
    for bag in bags:
        v = {g: (1 + math.log(c)) * (math.log((1 + len(bags)) / (1 + document[g])) + 1) for g, c in bag.items()}
        length = math.sqrt(sum(x * x for x in v.values()))
        vectors.append({g: x / length for g, x in v.items()})
    return vectors


def test_pairs_are_those_of_a_naive_search(pools: dict[str, list[Question]]) -> None:
    everything = [*pools["T"], *pools["V"]]
    vectors = dict(zip([q.id for q in everything], naive_vectors([q.text for q in everything]), strict=True))

    def similar(one: Question, two: Question) -> float:
        return sum(x * vectors[two.id].get(gram, 0.0) for gram, x in vectors[one.id].items())

    seen = Counter()
    for dialogue in interleave(pools["T"], pools["V"]):
        *earlier, last = dialogue.questions
        seen[dialogue.setting] += 1
        for kind in "TV":
            others = [
                q
                for q in pools[kind]
                if q.id != last.id and (q.kind != "T" or q.text.casefold() != last.text.casefold())
            ]
            ranked = sorted(others, key=lambda q: -round(similar(q, last), 6))
            asked = [q.text.casefold() for q in ranked]
            ranked = [q for i, q in enumerate(ranked) if kind == "V" or asked[i] not in asked[:i]]
            mine = [q.id for q in earlier if q.kind == kind]
            assert mine == [q.id for q in ranked[: len(mine)]][::-1]
        assert dialogue.similarity == pytest.approx([similar(q, last) for q in earlier], abs=2e-6)
    assert seen == {setting: len(pools[setting[-1]]) for setting in SETTINGS}


def test_settings_are_the_papers_and_text_after_images() -> None:
    assert PAPER_SETTINGS == ("T", "TT", "TTT", "TTV", "TV", "V")
    assert set(SETTINGS) - set(PAPER_SETTINGS) == {"VT", "VTT", "VVT"}


def test_settings_share_their_last_questions_and_a_smaller_number_is_a_part(pools: dict[str, list[Question]]) -> None:
    def ends(n: int, seed: int = 0) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for dialogue in interleave(pools["T"], pools["V"], n=n, seed=seed):
            found.setdefault(dialogue.setting, []).append(dialogue.questions[-1].id)
        return found

    three = ends(3)
    assert {tuple(three[s]) for s in SETTINGS if s[-1] == "T"} == {tuple(three["T"])}
    assert {tuple(three[s]) for s in SETTINGS if s[-1] == "V"} == {tuple(three["V"])}
    assert ends(2)["TTV"] == three["TTV"][:2]
    assert ends(3, seed=1) != three


def test_questions_that_could_tell_the_answer_do_not_come_before(pools: dict[str, list[Question]]) -> None:
    for dialogue in interleave(pools["T"], pools["V"], settings=["TTT", "VVT", "VV"]):
        texts = [q.text.casefold() for q in dialogue.questions if q.kind == "T"]
        assert len(set(texts)) == len(texts)
        pictures = [image.name for q in dialogue.questions for image in q.images]
        assert len(set(pictures)) == len(pictures)


def test_two_questions_about_one_picture_do_not_meet(pools: dict[str, list[Question]]) -> None:
    """Not even in front of a question about something else."""
    first, second, *others = pools["V"]
    shown = [part for part in first.content if part["type"] == "image"]
    asked = [part for part in second.content if part["type"] == "text"]
    again = dataclasses.replace(second, content=(*shown, *asked))
    (text,) = [q for q in pools["T"] if "spider?" in q.text]
    for visual, pictures in (([first, again, *others], 4), ([first, again], 1)):
        found = interleave([text, *pools["T"][:2]], visual, settings=["VVT"])
        if pictures == 1:
            with pytest.raises(DataError, match="too few different pictures to put 2 of kind V before"):
                list(found)
        else:
            for dialogue in found:
                assert not {first.id, again.id} <= {q.id for q in dialogue.questions}


def test_the_first_exchange_of_a_record_is_taken_and_equal_ones_once(folder: Path) -> None:
    look = questions(open_file(folder / "look.json"), "V")
    assert [(q.id, q.text, q.answer, len(q.images)) for q in look[:2]] == [
        ("v0", LOOKS[0], "b0", 1),
        ("v1", LOOKS[1], "b1", 1),
    ]
    line = (folder / "text.jsonl").read_text().splitlines()[0] + "\n"
    (folder / "twice.jsonl").write_text(line * 3)
    assert len(questions(open_file(folder / "twice.jsonl"), "T")) == 1


def test_the_file_is_the_same_in_another_process_and_folder(folder: Path, tmp_path: Path) -> None:
    arguments = [folder / "text.jsonl", folder / "look.json", folder / "out.jsonl", "-n", 4]
    app = typer.Typer()
    commands.register(app)
    result = CliRunner().invoke(app, ["data", "interleave", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    for name in ("text.jsonl", "look.json", "images"):
        (folder / name).rename(elsewhere / name)
    code = "import sys; from alula.cli.app import main; sys.argv[0] = 'alula'; main()"
    moved = [elsewhere / "text.jsonl", elsewhere / "look.json", elsewhere / "out.jsonl", "-n", 4]
    subprocess.run([sys.executable, "-c", code, "data", "interleave", *map(str, moved)], check=True)
    assert (elsewhere / "out.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()


def test_written_dialogues_read_back(folder: Path, pools: dict[str, list[Question]]) -> None:
    made = list(interleave(pools["T"], pools["V"], n=3, history="generated"))
    counts = write_dialogues(made, folder / "out.jsonl")
    assert counts == dict.fromkeys(SETTINGS, 3)
    source = open_file(folder / "out.jsonl")
    assert len({source[k].id for k in range(source.size)}) == len(made)
    for k, dialogue in enumerate(made):
        sample = source[k]
        assert (sample.id, sample.meta["setting"], sample.meta["history"]) == (
            dialogue.id,
            dialogue.setting,
            "generated",
        )
        assert sample.meta["parts"] == [q.id for q in dialogue.questions]
        assert [m["role"] for m in sample.messages] == ["user", "assistant"] * len(dialogue.questions)
        pictures = [image.load().getpixel((0, 0)) for image in sample.images]
        assert pictures == [image.load().getpixel((0, 0)) for q in dialogue.questions for image in q.images]
    word = [Question("T", "w", ({"type": "text", "text": r"is <image> or \<image> it?"},), "<image>")] * 2
    for kind in ("TT", "VT"):
        shown = pools["V"][0] if kind == "VT" else word[0]
        write_dialogues([Dialogue((shown, word[0]), (1.0,), "gold")], folder / f"{kind}.jsonl")
        asked, answered = open_file(folder / f"{kind}.jsonl")[0].messages[-2:]
        assert message_text(asked) == r"is <image> or \<image> it?"
        assert message_text(answered) == "<image>"
    gold = list(interleave(pools["T"], pools["V"], n=3))
    assert not {d.id for d in gold} & {d.id for d in made}


def test_images_outside_the_folder_and_in_parquet(folder: Path, pools: dict[str, list[Question]]) -> None:
    write_dialogues(interleave(pools["T"], pools["V"], settings=["V"]), folder / "deep" / "out.jsonl")
    assert open_file(folder / "deep" / "out.jsonl")[0].images[0].load().size == (8, 8)
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "messages": [{"role": "user", "content": f"<image>{q}"}, {"role": "assistant", "content": "x"}],
            "images": [{"bytes": (folder / "images" / f"{k}.png").read_bytes(), "path": None}],
        }
        for k, q in enumerate(LOOKS)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "look.parquet")
    stored = questions(DatasetSource(folder / "look.parquet"), "V")
    write_dialogues(interleave(pools["T"], stored, settings=["VT"]), folder / "out.jsonl")
    assert open_file(folder / "out.jsonl")[0].images[0].load().size == (8, 8)


def test_any_embedding_decides(pools: dict[str, list[Question]]) -> None:
    def by_length(texts: list[str]) -> np.ndarray:
        angle = np.array([len(text) for text in texts]) / 60
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    for dialogue in interleave(pools["T"], pools["V"], settings=["TV"], embed=by_length):
        before, last = dialogue.questions
        gaps = [abs(len(q.text) - len(last.text)) for q in pools["T"]]
        assert abs(len(before.text) - len(last.text)) == min(gaps)


def test_wrong_usage(folder: Path, pools: dict[str, list[Question]]) -> None:
    with pytest.raises(UsageError, match="'TX' is not an order"):
        list(interleave(pools["T"], pools["V"], settings=["TX"]))
    with pytest.raises(UsageError, match="'own'"):
        list(interleave(pools["T"], pools["V"], history="own"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        list(interleave(pools["T"], pools["V"], n=0))
    with pytest.raises(DataError, match="needs 3 text questions, there are 2"):
        list(interleave(pools["T"][:2], pools["V"]))
    with pytest.raises(DataError, match="too few different"):
        list(interleave(pools["T"][-2:], pools["V"], settings=["TT"]))
    with pytest.raises(RecordError, match="shows an image"):
        questions(open_file(folder / "look.json"), "T")
    with pytest.raises(RecordError, match=r"text.jsonl:1.*shows no image"):
        questions(open_file(folder / "text.jsonl"), "V")


def test_an_encoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UsageError, match="sentence-transformers"):
        sentence_encoder("any")
