"""The native tasks and tasks from files: which questions, in which order, scored how."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

import alula
import alula_fledgling as fledgling
from alula.cli.tasks import requested
from alula.data import RecordError, open_file
from alula.data.interleave import SETTINGS, interleave, questions, write_dialogues
from alula.errors import AlulaError, EvaluationError, UsageError
from alula.evaluation import data_task, evaluate, exact_match, normalise
from alula.evaluation.items import TaskItem, images_of
from alula_fledgling import microworld
from alula_fledgling.tasks import (
    NATIVE,
    dialogue,
    interleaved,
    native_tasks,
    text_after_image,
    text_after_text,
    text_bare,
    visual,
    visual_later,
    visual_unseen,
)


def words(item: TaskItem) -> list[str]:
    return ["".join(part.get("text", "<image>") for part in message["content"]) for message in item.messages]


def test_all_text_families_in_equal_parts() -> None:
    items = text_bare(40).items()
    counts = {family: sum(item.family == family for item in items) for family in microworld.TEXT_FAMILIES}
    assert set(counts.values()) == {40 // len(microworld.TEXT_FAMILIES)}


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_items_are_the_same_at_every_call_and_gold_scores_one(name: str) -> None:
    first, second = native_tasks([name], n=24, seed=3)[0], native_tasks([name], n=24, seed=3)[0]
    assert [(i.id, words(i), i.gold) for i in first.items()] == [(i.id, words(i), i.gold) for i in second.items()]
    assert all(first.score(item, item.gold) == 1 for item in first.items())
    assert all(first.score(item, "no such answer") == 0 for item in first.items())
    assert all(item.messages[-1]["role"] == "user" for item in first.items())
    assert [words(i) for i in native_tasks([name], n=24, seed=4)[0].items()] != [words(i) for i in first.items()]


@pytest.mark.parametrize("style", ["answered", "plain"])
def test_after_an_image_asks_the_same_questions(style: str) -> None:
    bare, after = text_bare(30).items(), text_after_image(30, style=style).items()
    for one, two in zip(bare, after, strict=True):
        assert (one.family, one.gold) == (two.family, two.gold)
        assert two.id == f"{one.id}@image"
        assert len(list(images_of(two.messages))) == 1
        if style == "plain":
            assert words(two)[0] == "<image>" + words(one)[0]
            assert words(two)[1:] == words(one)[1:]
        else:
            assert words(two)[2:] == words(one)
            assert two.messages[1]["role"] == "assistant"


def test_the_control_turn_is_of_another_skill() -> None:
    bare, after = text_bare(60).items(), text_after_text(60).items()
    family_of = {
        words(item)[0]: family
        for family in microworld.TEXT_FAMILIES
        for item in text_bare(200, families=[family]).items()
    }
    for one, two in zip(bare, after, strict=True):
        assert words(two)[-len(words(one)) :] == words(one)
        assert len(words(two)) > len(words(one))
        assert not list(images_of(two.messages))
        assert family_of.get(words(two)[0]) != one.family


def test_dialogues_score_every_turn_with_its_history() -> None:
    items = dialogue(14).items()
    assert len(items) == sum(len(pattern) for pattern in microworld.DIALOGUE_PATTERNS)
    last = [item for item in items if item.tags["pattern"] == "TVT"][-1]
    assert [message["role"] for message in last.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert len({item.cluster for item in items if item.cluster}) == sum(
        len(p) > 1 for p in microworld.DIALOGUE_PATTERNS
    )
    assert all(item.follows == () for item in items)
    own = dialogue(14, history="generated").items()
    assert next(i for i in own if i.id == last.id).follows == tuple((t, f"{last.cluster}#{t}") for t in (1, 3))


def test_unseen_combinations_are_other_scenes() -> None:
    assert {item.id.split("-")[1] for item in visual_unseen(8).items()} == {"unseen"}


def test_wrong_usage() -> None:
    with pytest.raises(UsageError, match="no task 'nonsense'"):
        native_tasks(["nonsense"])
    with pytest.raises(UsageError, match="at least 1"):
        native_tasks(n=0)
    with pytest.raises(UsageError, match="'sideways'"):
        text_after_image(style="sideways")
    with pytest.raises(UsageError, match="'none'"):
        dialogue(history="none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" The  Cat. ", "the cat", True),
        ("'yes'", "Yes!", True),
        ("-3", "3", False),
        ("3.5", "35", False),
        ("**42**", "42", True),
        ("", ".", True),
    ],
)
def test_normalised_exact_match(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) == same


def write(path: Path, *conversations: list[tuple[str, list[dict]]]) -> Path:
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) for turns in conversations]
    path.write_text("\n".join(lines) + "\n")
    return path


def text(value: str) -> list[dict]:
    return [{"type": "text", "text": value}]


def test_a_task_from_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "red.png")
    file = write(
        tmp_path / "mine.jsonl",
        [("user", text("hi")), ("assistant", text("ho")), ("user", text("2+2?")), ("assistant", text("Four."))],
        [("user", [{"type": "image", "image": "red.png"}, *text("colour?")]), ("assistant", text("red"))],
    )
    task = data_task(file)
    first, second = task.items()
    assert (task.name, task.title) == ("mine", "mine")
    assert words(first) == ["hi", "ho", "2+2?"]
    assert (first.gold, task.score(first, "four")) == ("Four.", 1.0)
    assert words(second) == ["<image>colour?"]
    assert next(iter(images_of(second.messages))).load().getpixel((0, 0)) == (200, 0, 0)
    assert [first.tags["kind"], second.tags["kind"]] == ["text", "visual"]
    assert len(data_task(file, n=1).items()) == 1


def test_the_microworld_as_a_source_needs_a_number() -> None:
    assert len(data_task({"microworld": "text", "split": "test"}, n=5).items()) == 5
    with pytest.raises(EvaluationError, match="never ends"):
        data_task({"microworld": "text", "split": "test"})
    with pytest.raises(AlulaError, match="weight: the first samples of the source are read"):
        data_task({"microworld": "text", "weight": 2}, n=5)


def test_conversations_without_a_reference_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AlulaError, match="ends with a user turn"):
        data_task(write(tmp_path / "a.jsonl", [("user", text("hi")), ("assistant", text("x")), ("user", text("?"))]))
    with pytest.raises(AlulaError):
        data_task(tmp_path / "missing.jsonl")


def test_questions_that_share_an_id_are_one_cluster(tmp_path: Path) -> None:
    """LLaVA's own file names a record after its picture, and asks several things about one."""
    lines = [
        {"id": name, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]}
        for name, asked in (("9", "x"), ("9", "y"), ("9.2", "z"), ("7", "w"), ("9", "v"))
    ]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = data_task(tmp_path / "twice.jsonl").items()
    assert [(item.id, item.cluster) for item in items] == [
        ("9", "9"),
        ("9.3", "9"),
        ("9.2", ""),
        ("7", ""),
        ("9.4", "9"),
    ]
    assert [words(item) for item in items] == [["x"], ["y"], ["z"], ["w"], ["v"]]
    assert data_task(tmp_path / "twice.jsonl", n=1).items()[0].id == "9"


def test_bad_records_name_file_line_and_id_and_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    def line(name: str, *media: dict, answer: str = "a") -> str:
        asked = {"role": "user", "content": [*media, *text("what?")]}
        return json.dumps({"id": name, "messages": [asked, {"role": "assistant", "content": answer}]}) + "\n"

    lines = [line("good"), line("cut", {"type": "image", "image": "cut.png"}), "{oops\n", line("none", answer=" ")]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(lines))
    with pytest.raises(RecordError, match=r"mine\.jsonl:3: not valid JSON") as caught:
        data_task(file)
    assert "on_bad=skip" in str(caught.value)
    (tmp_path / "one-line.json").write_text(f"[{lines[0].strip()}, {lines[3].strip()}]")
    with pytest.raises(RecordError, match=r"one-line\.json:1 \(record none\): "):
        data_task(tmp_path / "one-line.json")
    task = data_task(file, on_bad="skip")
    assert [item.id for item in task.items()] == ["good"]
    assert [told.split(": ")[0] for told in task.settings["bad"]] == [f"{file}:{number}" for number in (2, 3, 4)]
    host, processor = alula.build_host("fledgling", "fledgling")
    result = evaluate(host, processor, [task]).tasks["mine"]
    assert result.notes[0].startswith(f"3 bad records were left out: {file}:2: image 'cut.png' is")

    file.write_text("".join(lines[:2]))
    with pytest.raises(EvaluationError, match=rf"{file}:2: item 'cut': image 'cut\.png' is .*corrupt"):
        evaluate(host, processor, [data_task(file)])
    with pytest.raises(UsageError, match="'drop' is not one of 'fail', 'skip'"):
        data_task(file, on_bad="drop")  # type: ignore[arg-type]
    assert requested([f"data:{file},on_bad=skip"], images=None, n=None, seed=0).on_bad == "skip"
    with pytest.raises(UsageError, match="on_bad=drop is neither"):
        requested([f"data:{file},on_bad=drop"], images=None, n=None, seed=0)


def test_exact_match_scores() -> None:
    item = TaskItem("a", "f", [{"role": "user", "content": text("?")}], "Blue")
    assert (exact_match(item, "blue."), exact_match(item, "red")) == (1.0, 0.0)


def test_interleaved_scores_the_last_turn_by_setting() -> None:
    items = interleaved(18).items()
    assert [item.family for item in items] == [*SETTINGS, *SETTINGS]
    dialogues = list(microworld.dialogue_items(18, split="test", seed=0, patterns=SETTINGS))
    for item, whole in zip(items, dialogues, strict=True):
        assert (item.gold, item.tags["skill"]) == (whole.targets[-1].answer, whole.targets[-1].family)
        assert list(item.messages) == list(whole.messages[:-1])
        assert item.tags["kind"] == {"T": "text", "V": "visual"}[item.family[-1]]
    own = interleaved(18, history="generated").items()
    for item, other in zip(items, (item for item in own if item.scored), strict=True):
        assert replace(other, follows=()) == item
    assert [len(item.follows) for item in own if item.scored] == [len(setting) - 1 for setting in SETTINGS] * 2
    assert sum(not item.scored for item in own) == 2 * sum(len(setting) - 1 for setting in SETTINGS)


def test_interleaved_data_is_broken_down_by_setting(tmp_path: Path) -> None:
    pools = []
    for stream, kind, families in (("text", "T", microworld.SINGLE_TURN_FAMILIES[:3]), ("visual", "V", None)):
        items = microworld.source(stream, split="test", families=families, n=6)
        pools.append(questions(open_file(microworld.export_jsonl(items, tmp_path / stream)), kind))
    write_dialogues(interleave(*pools, n=2, history="generated"), tmp_path / "mine.jsonl")
    scored = [item for item in data_task(tmp_path / "mine.jsonl").items() if item.scored]
    assert [item.family for item in scored] == [setting for setting in SETTINGS for _ in range(2)]
    assert all(len(item.follows) == len(item.family) - 1 for item in scored)
    assert {item.cluster for item in scored if item.family.endswith("T")} == {
        item.cluster for item in scored if item.family == "T"
    }
    assert {item.tags["kind"] for item in scored if item.family == "VT"} == {"text"}
    assert {item.tags["before"] for item in scored if item.family == "TTV"} == {"TT"}
    gold = data_task(tmp_path / "mine.jsonl", history="gold").items()
    assert all(item.scored and not item.follows for item in gold)
    with pytest.raises(UsageError, match="'own'"):
        data_task(tmp_path / "mine.jsonl", history="own")  # type: ignore[arg-type]


def test_every_reference_fits_within_the_limit() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fledgling.directory() / "llm")
    for task in native_tasks(tuple(NATIVE), n=100):
        longest = max(len(tokenizer(item.gold).input_ids) for item in task.items())
        assert longest + 1 < task.max_new_tokens  # one token ends the turn


def test_a_turn_later_the_same_questions_come_without_their_image() -> None:
    now, later = visual(16).items(), visual_later(16).items()
    assert [item.id for item in later] == [f"{item.id}@later" for item in now]
    assert [item.gold for item in later] == [item.gold for item in now]
    for before, after in zip(now, later, strict=True):
        *earlier, asked = after.messages
        assert [part["type"] for part in asked["content"]] == ["text"]
        shown = list(images_of(before.messages))
        assert len(shown) == 1
        assert list(images_of(earlier)) == shown
        assert earlier[-1]["role"] == "assistant"
