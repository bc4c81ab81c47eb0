"""Hugging Face datasets on disk and parquet, with images as stored bytes or paths."""

from __future__ import annotations

import builtins
import io
import pickle

import pytest
from PIL import Image

from alula.data import open_source
from alula.errors import DataError, UsageError

datasets = pytest.importorskip("datasets")


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
    with pytest.raises(DataError, match="needs a column 'messages' or 'conversations'; it has text"):
        open_source({"dataset": str(tmp_path / "other")})
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UsageError, match=r"pip install 'alula\[data\]'"):
        open_source({"dataset": str(tmp_path / "other")})
