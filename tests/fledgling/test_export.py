"""Exports, read back by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from alula_fledgling.microworld import dialogue_items, export_jsonl, export_llava, text_items, visual_items


def mixture():
    return [
        *text_items(10, split="train", seed=0),
        *visual_items(8, split="train", seed=0),
        *dialogue_items(14, split="train", seed=0),
    ]


def images_of(item):
    return [part["image"] for message in item.messages for part in message["content"] if part["type"] == "image"]


def same(path, image):
    with Image.open(path) as file:
        return np.array_equal(np.asarray(file.convert("RGB")), np.asarray(image.load()))


def test_jsonl_holds_messages_and_pictures(tmp_path):
    path = export_jsonl(mixture(), tmp_path / "set")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["id"] for record in records] == [item.id for item in mixture()]
    for record, item in zip(records, mixture(), strict=True):
        files = []
        for message, original in zip(record["messages"], item.messages, strict=True):
            assert message["role"] == original["role"]
            for part, source in zip(message["content"], original["content"], strict=True):
                assert part["type"] == source["type"]
                if part["type"] == "text":
                    assert part == source
                else:
                    files.append(path.parent / part["image"])
        assert len(files) == len(images_of(item))
        assert all(same(file, image) for file, image in zip(files, images_of(item), strict=True))


def test_llava_holds_conversations_and_pictures(tmp_path):
    path = export_llava(mixture(), tmp_path / "set")
    for record, item in zip(json.loads(path.read_text()), mixture(), strict=True):
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert all(same(path.parent / "images" / n, i) for n, i in zip(names, images_of(item), strict=True))
        texts = [turn["value"] for turn in record["conversations"]]
        assert sum(text.count("<image>") for text in texts) == len(names)
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(texts) // 2)
        for text, message in zip(texts, item.messages, strict=True):
            assert text.removeprefix("<image>\n") == message["content"][-1]["text"]


@pytest.mark.parametrize("export", [export_jsonl, export_llava])
def test_a_failed_export_leaves_nothing(tmp_path, export):
    def items():
        yield from visual_items(3, split="train", seed=0)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        export(items(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
