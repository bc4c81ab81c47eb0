"""Conditions in a file: found again by what was read, resumed, and strict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from alula.data import ImageRef
from alula.data.conditions import Conditions, key_of, write_conditions
from alula.data.samples import Sample, user
from alula.errors import DataError

MADE = {"browser": "one"}


def prompt(number: int, shade: int = 0) -> Sample:
    picture = ImageRef.from_object(Image.new("RGB", (3, 3), (shade, 0, 0)))
    return Sample(str(number), [user(f"question {number}", picture)])


class Reader:
    """Reads a prompt as its key, and stops after so many batches."""

    def __init__(self, stops_after: int | None = None) -> None:
        self.read, self.stops_after = [], stops_after
        self.batches = 0

    def __call__(self, prompts: Sequence[Sample]) -> Tensor:
        if self.batches == self.stops_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.read += [each.id for each in prompts]
        return torch.stack([expected(each) for each in prompts])


def expected(prompt: Sample) -> Tensor:
    return torch.tensor([*key_of(prompt.messages)][:6]).float()


def test_what_was_read_is_found_by_words_and_pictures(tmp_path: Path) -> None:
    prompts = [prompt(number) for number in range(5)] + [prompt(2), prompt(1, shade=9)]
    reader = Reader()
    file = write_conditions(prompts, reader, tmp_path / "c.safetensors", MADE, batch_size=2)
    assert sorted(reader.read) == ["0", "1", "1", "2", "3", "4"]  # what is the same is read once
    found = Conditions.load(file, width=6)
    assert len(found) == 6
    assert torch.equal(found.of(prompts), torch.stack([expected(each) for each in prompts]))
    assert found.made["browser"] == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(DataError, match="no condition of 7"):
        found.of([prompt(7)])


def test_an_interrupted_call_goes_on_unless_something_else_reads(tmp_path: Path) -> None:
    prompts, file = [prompt(number) for number in range(6)], tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_conditions(prompts, Reader(2), file, MADE, batch_size=2)
    assert not file.exists()
    (tmp_path / "c.safetensors.parts" / "000001.safetensors").write_bytes(b"cut")
    reader, counts = Reader(), []
    write_conditions(prompts, reader, file, MADE, batch_size=2, on_batch=counts.append)
    assert reader.read == ["2", "3", "4", "5"]  # the damaged part is read again
    assert counts == [2, 4, 6]
    assert len(Conditions.load(file)) == 6
    with pytest.raises(KeyboardInterrupt):
        write_conditions(prompts, Reader(2), file, MADE, batch_size=2)
    reader = Reader()
    write_conditions(prompts, reader, file, {"browser": "another"}, batch_size=2)
    assert len(reader.read) == 6
    assert Conditions.load(file).made["browser"] == "another"
    with pytest.raises(DataError, match="nothing to read"):
        write_conditions([], Reader(), file, MADE)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    file = write_conditions([prompt(0), prompt(1)], Reader(), tmp_path / "c.safetensors", MADE)
    with pytest.raises(DataError, match="6 wide, and the decoder is 8"):
        Conditions.load(file, width=8)
    with pytest.raises(DataError, match="no such file"):
        Conditions.load(tmp_path / "other.safetensors")
    tensors = load_file(file)
    label = {"format": "alula-conditions-1"}
    broken = {
        "format": (tensors, {}),
        "keys": ({**tensors, "keys": tensors["keys"][:1]}, label),
        "values": ({**tensors, "conditions": tensors["conditions"] * torch.nan}, label),
        "none": ({"keys": tensors["keys"]}, label),
    }
    for name, (held, metadata) in broken.items():
        save_file(held, tmp_path / name, metadata=metadata)
        with pytest.raises(DataError, match="holds no conditions"):
            Conditions.load(tmp_path / name)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match="holds no conditions"):
        Conditions.load(tmp_path / "cut")
