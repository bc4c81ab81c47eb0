"""Shapes that people have: each is read as its makers meant it, or refused by the name of what would be lost."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import datasets
import pyarrow.parquet
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from alula.cli import data as command
from alula.data import BadSampleError, RecordError, Sample, open_file, open_source
from alula.data.check import check
from alula.errors import DataError, RecipeError, UsageError

RED = (255, 0, 0)

app = typer.Typer()
command.register(app)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return tmp_path


def written(folder, *records, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def told(sample: Sample) -> list:
    """Roles and contents, a picture by its color; an answer that is not learnt marked."""
    return [
        (
            message["role"],
            [
                part["text"] if part["type"] == "text" else part["image"].load().getpixel((0, 0))
                for part in message["content"]
            ],
            *([] if message.get("train", True) else ["unlearnt"]),
        )
        for message in sample.messages
    ]


def say(role: str, content: object) -> dict:
    return {"role": role, "content": content}


SEEN = [("user", [RED, "what?"]), ("assistant", ["red"])]


@pytest.mark.parametrize(
    ("record", "want"),
    [
        ({"prompt": "what?", "completion": "red", "image": "red.png"}, SEEN),
        ({"prompt": "what?", "response": "red", "images": ["red.png"], "input": ""}, SEEN),
        ({"prompt": [say("user", "what?")], "completion": [say("assistant", "red")], "images": ["red.png"]}, SEEN),
        (
            {
                "prompt": [say("system", "brief"), say("user", "hi"), say("assistant", "yes"), say("user", "and?")],
                "completion": [say("assistant", "no")],
            },
            [("system", ["brief"]), ("user", ["hi"]), ("assistant", ["yes"], "unlearnt"), ("user", ["and?"]),
             ("assistant", ["no"])],
        ),
        ({"instruction": "name it", "input": "", "output": "red"}, [("user", ["name it"]), ("assistant", ["red"])]),
        (
            {"instruction": "name it", "input": "#f00", "output": "red", "system": "brief", "history": [["a", "b"]]},
            [("system", ["brief"]), ("user", ["a"]), ("assistant", ["b"]), ("user", ["name it\n#f00"]),
             ("assistant", ["red"])],
        ),
        (
            {"instruction": "append 1", "input": "[]", "output": "{}", "history": "[]", "context": "[]"},
            [("user", ["append 1\n[]"]), ("assistant", ["{}"])],
        ),
        ({"query": "what?", "response": "red", "history": []}, [("user", ["what?"]), ("assistant", ["red"])]),
        ({"image": "red.png", "question": "what?", "answer": "red", "question_id": 7}, SEEN),
        ({"image": "red.png", "question": "what?", "answers": ["blue", "red", "red"]}, SEEN),
        ({"image": "red.png", "question": "what?", "answer": ["blue", "red", "red"]}, SEEN),
        (
            {"image": "red.png", "question": "what?", "multiple_choice_answer": "red",
             "answers": [{"answer": "blue", "answer_id": 1}]},
            SEEN,
        ),
        ({"question": "how many?", "answer": 2}, [("user", ["how many?"]), ("assistant", ["2"])]),
        (
            {"images": ["red.png"], "texts": [{"user": "what?", "assistant": "red", "source": "x"},
                                              {"user": "sure?", "assistant": "yes", "source": "x"}]},
            [*SEEN, ("user", ["sure?"]), ("assistant", ["yes"])],
        ),
        ({"file_name": "red.png", "text": "a square"}, [("user", [RED]), ("assistant", ["a square"])]),
        ({"image": "red.png", "caption": "a square", "text": None}, [("user", [RED]), ("assistant", ["a square"])]),
        (
            {"image": "red.png", "question": "Is it <image> here?", "answer": "yes"},
            [("user", ["Is it ", RED, " here?"]), ("assistant", ["yes"])],
        ),
    ],
)  # fmt: skip
def test_records_of_other_shapes(folder, record: dict, want: list) -> None:
    path = written(folder, record)
    assert told(open_file(path)[0]) == told(open_source({"jsonl": str(path)})[0]) == want
    assert check(path).ok


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "which?", "choices": ["a", "b"], "answer": 0}, "column 'choices' would be dropped"),
        ({"question": "which?", "A": "a", "B": "b", "answer": "B"}, "column 'A' would be dropped"),
        ({"question": "which?", "option_a": "a", "answer": "a"}, "column 'option_a' would be dropped"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is false"),
        ({"image": "red.png", "text": "read", "caption": "seen"}, "one answer, not 'text' and 'caption'"),
        ({"context": "It is red.", "question": "what?", "answer": "red"}, "column 'context' would be dropped"),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, "column 'rejected' would be dropped"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "one answer, not 'completion' and 'answer'"),
        ({"question": "a", "answer": None}, "one answer, not none"),
        ({"question": None, "answer": "a"}, "no prompt stands beside 'answer'"),
        ({"question": "a", "answer": {"text": ["b"]}}, "must be text or a list of messages"),
        ({"question": "a", "answers": [True]}, "holds no texts"),
        ({"prompt": "a", "completion": "b", "tools": "[1]"}, "key 'tools' of the record would be dropped"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, r"history\[0\] is no pair"),
        ({"texts": [{"user": "a", "assistant": "b", "reasoning": "c"}]}, r"texts\[0\]: the key 'reasoning'"),
        ({"texts": [{"user": "a"}]}, r"texts\[0\] needs"),
    ],
)
def test_what_would_be_lost_is_refused(folder, record: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        open_file(written(folder, record))[0]
    assert caught.value.place.line == 1


def test_parquet_of_questions_and_of_texts(folder) -> None:
    rows = [{"image": {"bytes": png(), "path": None}, "question": "what?", "answer": "red"}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "vqa.parquet")
    texts = [{"user": "what?", "assistant": "red", "source": "x"}]
    datasets.Dataset.from_list([{"images": [rows[0]["image"]], "texts": texts}]).to_parquet(folder / "cauldron.parquet")
    for name in ("vqa", "cauldron"):
        assert told(open_file(folder / f"{name}.parquet")[0]) == SEEN


def test_columns_say_what_is_what(folder) -> None:
    record = {"bild": "red.png", "q": "what?", "a": "red", "answer": "not this one"}
    path = written(folder, record)
    columns = {"image": "bild", "question": "q", "answer": "a"}
    assert told(open_source({"jsonl": str(path), "columns": columns})[0]) == SEEN
    datasets.Dataset.from_list([record]).to_parquet(folder / "own.parquet")
    source = open_source({"dataset": str(folder / "own.parquet"), "columns": columns})
    assert told(source[0]) == SEEN
    both = written(
        folder, {**record, "messages": [say("user", "not this one"), say("assistant", "no")]}, name="c.jsonl"
    )
    assert told(open_source({"jsonl": str(both), "columns": columns})[0]) == SEEN
    talk = written(
        folder, {"talk": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, name="b.jsonl"
    )
    assert told(open_source({"llava": str(talk), "columns": {"conversations": "talk"}})[0])[1] == ("assistant", ["yes"])

    with pytest.raises(RecipeError, match="'reply' is no column that is read"):
        open_source({"jsonl": str(path), "columns": {"reply": "a"}})
    for spec in ({"jsonl": str(path)}, {"dataset": str(folder / "own.parquet")}):
        with pytest.raises(UsageError, match=r"columns\.answer: there is no column 'reply'; it has 'a', 'answer'"):
            open_source({**spec, "columns": {"answer": "reply"}})
    odd = written(folder, {"q": "what?", "a": "red"}, name="odd.jsonl")
    with pytest.raises(DataError, match="it has 'a', 'q'") as caught:
        open_file(odd)
    # the remedy works
    assert "--column question=COLUMN" in caught.value.remedy
    options = ["--column", "question=q", "--column", "answer=a"]
    for verb in ("check", "show"):
        assert CliRunner().invoke(app, ["data", verb, str(odd), *options]).exit_code == 0
    with pytest.raises(UsageError, match="columns is without effect on coco"):
        open_file(path, form="coco", columns={"answer": "a"})


def test_a_folder_of_pictures_with_metadata(folder) -> None:
    for split in ("train", "test"):
        (folder / "set" / split).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(folder / "set" / split / "1.png")
        written(folder / "set" / split, {"file_name": "1.png", "text": f"of {split}"}, name="metadata.jsonl")
    with pytest.raises(UsageError, match=r"several splits(.|\n)*one of test, train"):
        open_file(folder / "set")
    for split in ("train", "test"):
        source = open_source({"dataset": str(folder / "set"), "split": split})
        assert told(source[0]) == [("user", [RED]), ("assistant", [f"of {split}"])]
        assert told(open_file(folder / "set" / split)[0]) == told(source[0])
    with pytest.raises(UsageError, match="no split 'dev'"):
        open_source({"dataset": str(folder / "set"), "split": "dev"})
    talk = [say("user", "<image>what?"), say("assistant", "red")]
    (folder / "talks").mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "talks" / "1.png")
    lines = [{"file_name": "1.png", "messages": turns} for turns in (talk, [say("user", "what?"), talk[1]])]
    written(folder / "talks", *lines, name="metadata.jsonl")
    source = open_file(folder / "talks")
    assert told(source[0]) == SEEN
    with pytest.raises(BadSampleError, match="0 image placeholder"):  # its picture is not left out
        source[1]
    written(folder / "set", {"file_name": "train/1.png", "text": "of all"}, name="metadata.jsonl")
    with pytest.raises(UsageError, match="of its own and in `train`"):
        open_source({"dataset": str(folder / "set"), "split": "train"})


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_metadata_of_pictures_as_a_table(folder, form: str) -> None:
    (folder / "set").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4), "red").save(folder / "set" / f"{number}.png")
    file = folder / "set" / f"metadata.{form}"
    captions = ['a "red", square', "a red\nsquare"]
    if form == "csv":
        rows = [["", "file_name", "text"], *([n, f"{n}.png", captions[n]] for n in range(2))]  # as pandas writes it
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    else:
        files = [f"{n}.png" for n in range(2)]
        pyarrow.parquet.write_table(pyarrow.table({"file_name": files, "text": captions}), file)
    source = open_source({"dataset": str(folder / "set")})
    assert [told(source[n]) for n in range(2)] == [[("user", [RED]), ("assistant", [text])] for text in captions]
    assert str(source[1].place) == (f"{file}:4" if form == "csv" else f"{file} [row 1]")
    assert told(open_file(folder / "set", columns={"caption": "text"})[0])[1] == ("assistant", [captions[0]])
    if form == "csv":
        file.write_text("file_name,text\n0.png,a red, square\n")
        with pytest.raises(DataError, match="another number of values than the header's 2") as caught:
            open_file(folder / "set")
        assert str(caught.value).startswith(f"{file}:2")
        file.write_text("file_name,text\n")
        with pytest.raises(DataError, match="holds no records"):
            open_file(folder / "set")
    written(folder / "set", {"file_name": "0.png", "text": "a"}, name="metadata.jsonl")
    with pytest.raises(UsageError, match="which is meant cannot be told"):
        open_file(folder / "set")


def test_coco_captions_and_vqa(folder) -> None:
    Image.new("RGB", (4, 4), "red").save(folder / "COCO_train2014_000000000009.jpg")
    captions = folder / "captions.json"
    pictures = [{"id": 9, "file_name": "red.png"}]
    captions.write_text(
        json.dumps({"images": pictures, "annotations": [{"id": 3, "image_id": 9, "caption": "a square "}]})
    )
    for source in (open_file(captions), open_source({"coco": str(captions)})):
        assert (source.size, source[0].id, str(source[0].place)) == (1, "3", f"{captions} [annotation 0]")
        assert told(source[0]) == [("user", [RED]), ("assistant", ["a square"])]
    captions.write_text(json.dumps(json.loads(captions.read_text()), indent=1))
    assert told(open_file(captions)[0]) == [("user", [RED]), ("assistant", ["a square"])]
    questions, answers = folder / "questions.json", folder / "answers.json"
    asked = [{"question_id": 90, "image_id": 9, "question": "what?"}]
    questions.write_text(json.dumps({"data_subtype": "train2014", "questions": asked}))
    given = {"question_id": 90, "multiple_choice_answer": "red", "answers": [{"answer": "blue"}]}
    answers.write_text(json.dumps({"annotations": [given]}))
    sample = open_source({"coco": str(questions), "answers": str(answers)})[0]
    assert sample.id == "90"
    assert [role for role, *_ in told(sample)] == ["user", "assistant"]
    assert [part.get("text") for message in sample.messages for part in message["content"]] == [None, "what?", "red"]
    assert sample.images[0].path == str(folder / "COCO_train2014_000000000009.jpg")
    assert CliRunner().invoke(app, ["data", "check", str(questions), "--answers", str(answers)]).exit_code == 0
    with pytest.raises(UsageError, match="their answers are in a file of their own"):
        open_file(questions)
    with pytest.raises(UsageError, match="holds no questions"):
        open_source({"coco": str(captions), "answers": str(answers)})
    answers.write_text(json.dumps({"annotations": [{**given, "question_id": 91}]}))
    with pytest.raises(DataError, match=r"questions\[0\]: has no picture, question or answer"):
        open_source({"coco": str(questions), "answers": str(answers)})


def shard(path, **members: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name.replace("__", "."))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_webdataset_shards(folder) -> None:
    (folder / "shards").mkdir()
    talk = {"id": "x", "image": "red.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"},
                                                             {"from": "gpt", "value": "red"}]}  # fmt: skip
    meta = json.dumps({"caption": "a square", "url": "https://x.org/1.png", "width": 4}).encode()
    shard(folder / "shards" / "train-000.tar", a__png=png(), a__txt=b"a square\n", a__json=meta)
    shard(
        folder / "shards" / "train-001.tar", b__png=png(), b__json=json.dumps(talk).encode(), c__cls=b"4", c__png=png()
    )
    for where in (folder / "shards", folder / "shards" / "train-{000..001}.tar"):
        source = open_source({"webdataset": str(where)})
        assert source.size == 3
        assert told(source[0]) == [("user", [RED]), ("assistant", ["a square"])]
        assert told(source[1]) == SEEN
        assert (source[0].id, source[1].id) == ("a", "b")
    (bad,) = check(folder / "shards").bad
    assert str(bad).startswith(f"{folder}/shards/train-001.tar/c: record: ")
    shard(folder / "odd.tar", a__png=png(), a__npy=b"1", a__txt=b"x")
    with pytest.raises(RecordError, match=r"member \.npy would be dropped"):
        open_file(folder / "odd.tar")[0]
    (folder / "cut.tar").write_bytes((folder / "odd.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"cannot be read as a tar file|cut off"):
        open_file(folder / "cut.tar")
    with pytest.raises(DataError, match="no such tar file"):
        open_source({"webdataset": str(folder / "shards" / "train-{000..002}.tar")})
    with pytest.raises(RecipeError, match=r"source\.images: unknown key"):
        open_source({"webdataset": str(folder / "odd.tar"), "images": "here"})


def numbered(count: int) -> dict[str, bytes]:
    """Members of a sample, pictures that tell their number, in the order of their names."""
    found = {}
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
        found[f"a__{number}__png"] = buffer.getvalue()
    return dict(sorted(found.items()))


def test_pictures_of_a_shard_come_in_the_order_that_is_meant(folder) -> None:
    shard(folder / "many.tar", **numbered(12), a__txt=b"x")
    order = [ref.load().getpixel((0, 0))[0] for ref in open_file(folder / "many.tar")[0].images]
    assert order == list(range(12))
    talk = {"images": ["a.1.png", "a.0.png"], "messages": [say("user", "<image>or<image>?"), say("assistant", "yes")]}
    shard(folder / "listed.tar", **numbered(2), a__json=json.dumps(talk).encode())
    assert told(open_file(folder / "listed.tar")[0])[0] == ("user", [(1, 0, 0), "or", (0, 0, 0), "?"])


def test_no_member_of_a_shard_is_lost(folder) -> None:
    record = json.dumps({"question": "what?", "answer": "red"}).encode()
    shard(folder / "both.tar", a__png=png(), a__txt=b"a square", a__json=record)
    with pytest.raises(RecordError, match=r"\.txt would be dropped beside 'answer'"):
        open_file(folder / "both.tar")[0]
    with tarfile.open(folder / "twice.tar", "w") as archive:
        for content in (png(), png()):
            entry = tarfile.TarInfo("a.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(RecordError, match=r"two members are called 'a\.png'"):
        open_file(folder / "twice.tar")[0]


def test_twenty_lines_of_each_kind_and_a_count(folder) -> None:
    record = {"image": "gone.png", "question": "what?", "answer": "red"}
    path = written(folder, *[record] * 30, *[{"question": "a", "answer": None}] * 2)
    result = CliRunner().invoke(app, ["data", "check", str(path)])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert sum(": image: image 'gone.png' is missing" in line for line in lines) == 20
    assert sum(": record: " in line for line in lines) == 2
    assert f"{path}: image: 10 more bad records of this kind (all with --json)" in lines
    everything = json.loads(CliRunner().invoke(app, ["data", "check", str(path), "--json"]).stdout)
    assert len(everything["bad"]) == 32
