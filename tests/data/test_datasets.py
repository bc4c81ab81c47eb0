"""Hugging Face datasets on disk and parquet, with images as stored bytes or paths."""

from __future__ import annotations

import builtins
import io
import os
import pickle

import pytest
from PIL import Image

from alula.data import PlaceholderError, open_source
from alula.errors import DataError, UsageError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


PART = {"type": datasets.Value("string"), "text": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(PART)}),
        "images": datasets.List(datasets.Image()),
    }
)


def table() -> datasets.Dataset:
    def record(number: int, colours: list[str]) -> dict:
        places = [{"type": "image", "text": None} for _ in colours]
        return {
            "id": number,
            "messages": [
                {"role": "user", "content": [*places, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": " ".join(colours) or "nothing"}]},
            ],
            "images": [{"bytes": png(colour), "path": None} for colour in colours],
        }

    records = [record(0, ["red"]), record(1, []), record(2, ["blue", "red"])]
    return datasets.Dataset.from_list(records, features=FEATURES)


def check(source) -> None:
    assert source.size == 3
    assert [[ref.load().getpixel((0, 0)) for ref in source[n].images] for n in range(3)] == [
        [(255, 0, 0)],
        [],
        [(0, 0, 255), (255, 0, 0)],
    ]
    assert source[1].messages[0]["content"] == [{"type": "text", "text": "what?"}]
    assert (source[2].id, source[2].place.unit, source[2].place.line) == ("2", "row", 2)
    assert source[0].images[0].data == png("red")  # stored bytes, nothing decoded and encoded again


def test_saved_to_disk_with_and_without_splits(tmp_path) -> None:
    table().save_to_disk(tmp_path / "one")
    check(open_source({"dataset": str(tmp_path / "one")}))
    check(pickle.loads(pickle.dumps(open_source({"dataset": str(tmp_path / "one")}))))
    datasets.DatasetDict({"train": table(), "test": table()}).save_to_disk(tmp_path / "two")
    check(open_source({"dataset": str(tmp_path / "two"), "split": "test"}))
    with pytest.raises(UsageError, match="train, test"):
        open_source({"dataset": str(tmp_path / "two")})
    with pytest.raises(UsageError, match="no split 'dev'"):
        open_source({"dataset": str(tmp_path / "two"), "split": "dev"})


def test_parquet_file_and_folder(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "folder" / "a.parquet")
    check(open_source({"dataset": str(tmp_path / "folder" / "a.parquet")}))
    check(open_source({"dataset": str(tmp_path / "folder")}))


def rows(*answers: str, **columns: object) -> list[dict]:
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    return [{"messages": turn, **columns} for turn in turns]


def write(path, table: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(table), path)


def answers(source) -> list[str]:
    return [source[n].messages[-1]["content"][0]["text"] for n in range(source.size)]


LAYOUTS = {
    "sharded": ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"],
    "of any name": ["data/odd-00000-of-00001", "data/even-00000-of-00001"],
    "files": ["training", "dev_1", "x-eval-2"],
    "folders": ["a/train/0", "a/valid/0", "a/test/0", "a/test/1"],
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_splits_of_a_folder_are_those_that_datasets_finds(tmp_path, names: list[str]) -> None:
    folder = tmp_path / "snapshot"
    for name in names:
        write(folder / f"{name}.parquet", rows(name))
    theirs = datasets.load_dataset(str(folder))
    assert len(theirs) > 1
    for split, table in theirs.items():
        ours = open_source({"dataset": str(folder), "split": split})
        assert answers(ours) == [row["messages"][-1]["content"] for row in table]
        assert ours[0].place.file == str(folder)
    with pytest.raises(UsageError, match=", ".join(theirs)):
        open_source({"dataset": str(folder)})
    with pytest.raises(UsageError, match="no split 'none'"):
        open_source({"dataset": str(folder), "split": "none"})


def test_a_folder_of_one_split_needs_no_name_and_pictures_are_no_splits(tmp_path) -> None:
    write(tmp_path / "set" / "a.parquet", rows("one"))
    for place in ("images/test", "train"):
        (tmp_path / "set" / place).mkdir(parents=True)
        (tmp_path / "set" / place / "test.png").write_bytes(png("red"))
    assert answers(open_source({"dataset": str(tmp_path / "set")})) == ["one"]
    write(tmp_path / "only" / "data" / "train-00000-of-00001.parquet", rows("one"))
    assert answers(open_source({"dataset": str(tmp_path / "only")})) == ["one"]
    write(tmp_path / "only" / "more.parquet", rows("two"))  # which datasets would leave out
    with pytest.raises(UsageError, match=r"1 of 2 parquet files belong to no split, such as more.parquet"):
        open_source({"dataset": str(tmp_path / "only")})
    assert answers(open_source({"dataset": str(tmp_path / "only"), "split": "train"})) == ["one"]


def test_splits_that_a_readme_declares(tmp_path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.parquet", rows(name))
    readme = tmp_path / "README.md"
    files = ["- {split: seen, path: one.parquet}", "- {split: kept, path: two.parquet}"]
    readme.write_text("---\nconfigs:\n- config_name: all\n  data_files:\n  " + "\n  ".join(files) + "\n---\n")
    assert answers(open_source({"dataset": str(tmp_path), "split": "kept"})) == ["two"]
    readme.write_text("---\nconfigs:\n- {config_name: a, data_files: one.parquet}\n- {config_name: b}\n---\n")
    with pytest.raises(UsageError, match=r"several datasets \(configurations\): a, b"):
        open_source({"dataset": str(tmp_path)})
    readme.write_text("---\nconfigs:\n- {config_name: a, data_files: gone.parquet}\n---\n")
    with pytest.raises(DataError, match=r"splits cannot be told: .*gone.parquet"):
        open_source({"dataset": str(tmp_path)})


NOTHINGS = {
    "null": None,
    "struct of nulls": {"bytes": None, "path": None},
    "empty list": [],
    "null in a list": [None],
    "struct in a list": [{"bytes": None, "path": None}],
}


@pytest.mark.parametrize("nothing", NOTHINGS.values(), ids=NOTHINGS)
@pytest.mark.parametrize("first", ["text", "image"])
def test_every_spelling_of_no_image(tmp_path, first: str, nothing: object) -> None:
    """Whichever shard stands first, whose type is then taken for that of all."""
    real: object = {"bytes": png("red"), "path": None}
    real = [real] if isinstance(nothing, list) or nothing is None else real
    seen = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]}
    order = [rows("text", image=nothing), [{**seen, "image": real, "id": "own"}]]
    for number, table in enumerate(order if first == "text" else order[::-1]):
        write(tmp_path / "set" / f"{number}.parquet", table)
    source = open_source({"dataset": str(tmp_path / "set")})
    found = {len(source[n].images): answers(source)[n] for n in range(2)}
    assert found == {0: "text", 1: "red"}
    write(tmp_path / "one.parquet", [*order[0], *order[1]])
    assert [len(open_source({"dataset": str(tmp_path / "one.parquet")})[n].images) for n in range(2)] == [0, 1]


def test_places_in_a_list_count_what_is_nothing(tmp_path) -> None:
    def record(*parts: dict) -> dict:
        images = [None, {"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
        turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [text]}]
        return {"messages": turns, "images": images}

    text = {"type": "text", "text": "a", "index": None}
    named = [{"type": "image", "text": None, "index": index} for index in (2, 1, 0)]
    next_one = {**named[0], "index": None}
    write(tmp_path / "a.parquet", [record(*named[:2]), record(next_one, next_one), record(named[1], named[2])])
    source = open_source({"dataset": str(tmp_path / "a.parquet")})
    colours = [[ref.load().getpixel((0, 0)) for ref in source[n].images] for n in range(2)]
    assert colours == [[(0, 0, 255), (255, 0, 0)], [(255, 0, 0), (0, 0, 255)]]
    with pytest.raises(PlaceholderError):
        source[2]


def test_the_file_and_the_innermost_cause_are_named(tmp_path) -> None:
    write(tmp_path / "set" / "a.parquet", rows("one", id=1))
    write(tmp_path / "set" / "b.parquet", rows("two", id="x"))
    with pytest.raises(DataError, match="int64") as told:
        open_source({"dataset": str(tmp_path / "set")})
    assert told.value.where == str(tmp_path / "set" / "b.parquet")
    table = [{**row, "noise": os.urandom(2000)} for row in rows(*map(str, range(50)))]
    write(tmp_path / "set" / "b.parquet", table)
    write(tmp_path / "set" / "a.parquet", rows("one"))
    whole = (tmp_path / "set" / "b.parquet").read_bytes()
    (tmp_path / "set" / "b.parquet").write_bytes(whole[:4] + b"\xff" * 5000 + whole[5004:])
    with pytest.raises(DataError, match="cannot be read as a dataset") as told:
        open_source({"dataset": str(tmp_path / "set")})
    assert told.value.where == str(tmp_path / "set" / "b.parquet")
    assert "error occurred while generating" not in str(told.value)


def test_conversations_with_image_paths(tmp_path) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "red"}]
    datasets.Dataset.from_list([{"conversations": turns, "image": "red.png"}]).to_parquet(tmp_path / "a.parquet")
    sample = open_source({"dataset": str(tmp_path / "a.parquet")})[0]
    assert sample.images[0].load().getpixel((0, 0)) == (255, 0, 0)
    assert sample.id == "a-0"


def test_errors(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match="no such dataset"):
        open_source({"dataset": str(tmp_path / "none")})
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        open_source({"dataset": str(tmp_path / "bad.parquet")})
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="has columns of no shape that is read; it has 'text'"):
        open_source({"dataset": str(tmp_path / "other")})
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UsageError, match=r"pip install 'alula\[data\]'"):
        open_source({"dataset": str(tmp_path / "other")})
