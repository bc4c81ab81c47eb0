"""The bank on disk: what is encoded once is never encoded again, and nothing else is ever taken for it."""

from __future__ import annotations

import copy
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import alula
from alula import AimConfig, WingsConfig
from alula.demonstrations import Bank, Demonstration, FewShot, encode
from alula.errors import BankError, FilesError, UsageError
from tests.demonstrations.conftest import asked, demonstration
from tests.grafts.common import wake

many = [demonstration(seed, f"question {seed % 5}?", f"answer {seed}") for seed in range(24)]


def test_what_it_gives_is_what_is_encoded_to_the_bit(
    model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    """On the fly and from the disk, in any order, together and one by one."""
    bank, counted = Bank(tmp_path / "bank", model, processor), []
    assert len(bank) == 0
    assert not (tmp_path / "bank").exists()
    first = bank.encoded(demonstrations, on_done=counted.append)
    assert counted == [4]
    assert len(bank) == 4
    again = Bank(tmp_path / "bank", model, processor)
    backward = again.encoded(demonstrations[::-1], on_done=counted.append)
    assert counted == [4], "nothing was encoded again"
    for fresh, one, other in zip(encode(model, processor, demonstrations), first, backward[::-1], strict=True):
        assert torch.equal(fresh.fused, one.fused)
        assert torch.equal(one.fused, other.fused)
        assert (fresh.question, fresh.answer, fresh.question_ids, fresh.answer_ids) == (
            other.question,
            other.answer,
            other.question_ids,
            other.answer_ids,
        )
    assert all(each in again for each in demonstrations)
    assert demonstration(8, "color?", "red") not in again


def test_the_key_is_of_picture_words_map_host_and_dtype(
    model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    shown = demonstrations[0]
    others = [
        Demonstration(demonstrations[1].picture, shown.question, shown.answer),
        Demonstration(shown.picture, shown.question + "?", shown.answer),
        Demonstration(shown.picture, shown.question, shown.answer + "!"),
        Demonstration(shown.picture, shown.question + shown.answer[:1], shown.answer[1:]),
    ]
    bank = Bank(tmp_path, model, processor)
    keys = {bank.key(each) for each in (shown, *others)}
    rest = [
        Bank(tmp_path, each, processor).key(shown)
        for each in (changed_map(model), changed_host(model), copy.deepcopy(model).to(torch.bfloat16))
    ]
    assert len({*keys, *rest}) == 8
    again = Demonstration(shown.picture.copy(), shown.question, shown.answer)
    processor.tokenizer(["one text", "and a longer one"], padding=True, truncation=True, max_length=3)  # leaves traces
    assert bank.key(again) == Bank(tmp_path / "other", copy.deepcopy(model), copy.deepcopy(processor)).key(shown)


def changed_map(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(alula.grafts_of(other)["aim"].parameters())[0, 0] += 1e-6
    return other


def changed_host(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    return other


def with_wings(model: Any) -> Any:
    other = copy.deepcopy(model)
    wake(alula.attach(other, WingsConfig(rank=2)))
    return other


def other_template(processor: Any) -> Any:
    other = copy.deepcopy(processor)
    other.chat_template = other.chat_template.replace("<|end|>", "<|end|>\n")
    return other


def other_words(processor: Any) -> Any:
    """A tokenizer that reads one more word as one token."""
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["question"])
    return other


def other_patches(processor: Any) -> Any:
    """A processor that writes another number of tokens for a picture; its image processor is the same."""
    other = copy.deepcopy(processor)
    other.patch_size *= 2
    return other


def test_the_bank_of_another_is_refused_by_name(
    model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    Bank(tmp_path / "bank", model, processor).encoded(demonstrations[:1])
    for other, reader, named in (
        (changed_map(model), processor, "another map"),
        (changed_host(model), processor, "another host"),
        (with_wings(model), processor, "another host"),
        (model, other_template(processor), "another host"),
        (model, other_words(processor), "another host"),
        (model, other_patches(processor), "another host"),
        (
            copy.deepcopy(model).to(torch.bfloat16),
            processor,
            "another dtype: float32, and this model computes in bfloat16",
        ),
    ):
        with pytest.raises(BankError, match=named) as refusal:
            Bank(tmp_path / "bank", other, reader)
        assert "bank.json" in str(refusal.value)


@pytest.mark.parametrize("fact", ["map", "host", "dtype"])
def test_a_record_of_another_is_refused_by_name(
    fact: str, model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    """Wherever it was copied from, and whatever it is called."""
    other = {
        "map": changed_map(model),
        "host": changed_host(model),
        "dtype": copy.deepcopy(model).to(torch.bfloat16),
    }[fact]
    theirs = Bank(tmp_path / "theirs", other, processor)
    theirs.encoded(demonstrations[:1])
    ours = Bank(tmp_path / "ours", model, processor)
    ours.encoded(demonstrations[1:2])
    path = ours.records / f"{ours.key(demonstrations[0])}.safetensors"
    path.write_bytes((theirs.records / f"{theirs.keys()[0]}.safetensors").read_bytes())
    with pytest.raises(BankError, match=f"another {fact}") as refusal:
        ours.encoded(demonstrations[:2])
    assert refusal.value.where == str(path)


def test_a_damaged_file_is_named(
    model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    bank = Bank(tmp_path, model, processor)
    bank.encoded(demonstrations[:2])
    path = bank.records / f"{bank.key(demonstrations[0])}.safetensors"
    whole = path.read_bytes()
    other = (bank.records / f"{bank.key(demonstrations[1])}.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damage in (whole[:-5], whole[:4], b"", bytes(flipped), other, b"x" * 300):
        path.write_bytes(damage)
        with pytest.raises(BankError, match="is damaged") as refusal:
            bank.encoded(demonstrations)
        assert refusal.value.where == str(path)
    save_file({"fused": torch.zeros(2, 2)}, path)
    with pytest.raises(BankError, match="is no record: it lacks 'picture'"):
        bank.read(path.stem)
    path.unlink()
    assert len(bank.encoded(demonstrations)) == 4, "the remedy: removed, it is encoded again"
    assert load_file(path)["fused"].shape == (len("color?red"), 32)
    with pytest.raises(BankError, match="no such record"):
        bank.read("0" * 64)


def test_a_directory_that_is_no_bank_is_refused(model: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match="holds something else than a bank"):
        Bank(tmp_path, model, processor)
    (tmp_path / "bank.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(BankError, match="no bank of this version"):
        Bank(tmp_path, model, processor)
    (tmp_path / "bank.json").write_text("{")
    with pytest.raises(FilesError, match="is damaged"):
        Bank(tmp_path, model, processor)
    bare = copy.deepcopy(model)
    alula.detach(bare)
    with pytest.raises(UsageError, match="no map"):
        Bank(tmp_path / "new", bare, processor)


def test_shots_are_drawn_by_seed(model: Any, processor: Any, tmp_path: Path) -> None:
    bank = Bank(tmp_path, model, processor)
    bank.encoded(many)
    five = [shot.key for shot in bank.shots(5)]
    assert [shot.key for shot in bank.shots(3)] == five[:3]
    assert len(set(five)) == 5
    assert [shot.key for shot in bank.shots(5, seed=1)] != five
    with pytest.raises(BankError, match="25 shots are asked for, and 24 demonstrations are there"):
        bank.shots(25)
    with torch.no_grad():
        inputs, _ = FewShot(processor, bank.shots(24)).tensors(asked())
        assert model(**inputs).logits.isfinite().all()


def fill(directory: Path, model: Any, processor: Any, order: list[int], start: Any) -> None:
    torch.set_num_threads(1)
    start.wait()
    for index in order:
        Bank(directory, model, processor).encoded([many[index]])


def test_two_processes_fill_one_bank(model: Any, processor: Any, tmp_path: Path) -> None:
    """Of the same demonstrations at the same moment, from both ends; a third reads meanwhile."""
    forking = multiprocessing.get_context("fork")
    start = forking.Event()
    orders = ([*range(24)], [*range(24)][::-1], [*range(0, 24, 2), *range(1, 24, 2)])
    workers = [forking.Process(target=fill, args=(tmp_path, model, processor, order, start)) for order in orders]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    bank = Bank(tmp_path, model, processor)
    assert len(bank) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank.json", "records"], "nothing half-written is left"
    assert all(path.suffix == ".safetensors" for path in bank.records.iterdir())
    for fresh, shot in zip(encode(model, processor, many), bank.encoded(many), strict=True):
        torch.testing.assert_close(fresh.fused, shot.fused, atol=1e-5, rtol=1e-5)


def test_maps_of_two_grafts_are_told_apart(
    model: Any, processor: Any, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    host = copy.deepcopy(model)
    wake(alula.attach(host, AimConfig(layer=0), "early"), seed=5)
    Bank(tmp_path, host, processor, name="early").encoded(demonstrations)
    with pytest.raises(BankError, match="another"):
        Bank(tmp_path, host, processor, name="aim")
