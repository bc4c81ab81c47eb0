"""The whole way through torch's DataLoader with worker processes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from alula.data import Collator, ImageError, Mixture, PositionBatches, Quarantine, open_source


@pytest.fixture
def folder(tmp_path):
    records = []
    for number in range(20):
        name = f"{number}.png"
        Image.new("RGB", (8, 8), (number * 10, 0, 0)).save(tmp_path / name)
        messages = [
            {"role": "user", "content": f"<image>\nnumber {number}?"},
            {"role": "assistant", "content": str(number)},
        ]
        records.append({"id": f"r{number}", "messages": messages, "images": [name]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def loader(folder, processor, *, workers: int, quarantine: Quarantine | None = None, **batches: int) -> DataLoader:
    mixture = Mixture(
        [open_source({"jsonl": str(folder / "data.jsonl")}), open_source({"microworld": "text"})],
        [2, 1],
        seed=5,
        quarantine=quarantine,
    )
    return DataLoader(
        mixture,
        batch_sampler=PositionBatches(4, 8, **batches),
        collate_fn=Collator(processor, quarantine=quarantine, replacer=mixture),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


def test_workers_and_ranks_change_nothing(folder, processor) -> None:
    plain = list(loader(folder, processor, workers=0))
    assert len(plain) == 4
    for one, two in zip(plain, loader(folder, processor, workers=2), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    halves = [list(loader(folder, processor, workers=1, rank=rank, world=2)) for rank in range(2)]
    for step, whole in enumerate(plain):
        rows = [row[row != 0].tolist() for half in halves for row in half[step]["input_ids"]]
        assert rows == [row[row != 0].tolist() for row in whole["input_ids"]]
    resumed = list(loader(folder, processor, workers=2, start=2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(resumed, plain[2:], strict=True) for key in a)


def test_a_worker_s_error_reads_like_any_other(folder, processor) -> None:
    (folder / "3.png").write_bytes(b"broken")
    with pytest.raises(ImageError) as caught:
        list(loader(folder, processor, workers=1))
    text = str(caught.value)
    assert "Traceback" not in text
    assert text.startswith(f"{folder}/data.jsonl:4: image '3.png' is corrupt")
    with pytest.raises(ImageError) as here:
        list(loader(folder, processor, workers=0))
    assert str(here.value) == text


def test_skipping_in_workers(folder, processor, tmp_path) -> None:
    (folder / "3.png").write_bytes(b"broken")
    (folder / "7.png").unlink()
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    batches = list(loader(folder, processor, workers=2, quarantine=quarantine))
    assert all(len(batch["input_ids"]) == 8 for batch in batches)
    assert {(entry["line"], entry["id"], entry["kind"]) for entry in quarantine.entries()} == {
        (4, "r3", "image"),
        (8, "r7", "image"),
    }
    alone = list(loader(folder, processor, workers=0, quarantine=Quarantine(tmp_path / "other.jsonl")))
    for one, two in zip(batches, alone, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
