"""Method aim: what it trains and leaves alone, what it learns from, and what its batches hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula import AimConfig
from alula.data import Quarantine, open_source
from alula.data.errors import RecordError
from alula.data.samples import Sample, text_part
from alula.demonstrations import demonstrations_in, encode
from alula.demonstrations.fusing import Fusing
from alula.demonstrations.interleaved import DEMONSTRATIONS, FUSED_FROM, FUSED_TO, InterleavedCollator
from alula.errors import AdapterError, RecipeError
from alula.grafts.aim import AimGraft
from alula.hosts import build_host, load_host, save_host
from alula.training import train
from alula.training.metrics import read_rows
from tests.grafts.common import wake
from tests.hosts import tiny
from tests.training.conftest import MakeRecipe
from tests.training.test_mks2 import Hashes

STAGE: dict[str, Any] = {
    "name": "map",
    "method": "aim",
    "train": {"aim": 1e-2},
    "aim": {"shots": [1, 3]},
    "data": {"sources": [{"microworld": "episode"}]},
}


def collated(processor: Any, count: int = 4, *, seen: bool = False, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Episodes and their batch; `seen`: without their questions in words, so that the last one shows a picture."""
    source = open_source({"microworld": "episode"})
    samples = [source[index] for index in range(4 * count)]
    if seen:
        samples = [replace(sample, messages=pictured(sample)) for sample in samples if len(pictured(sample)) > 2]
    samples = samples[:count]
    return samples, dict(InterleavedCollator(processor, shots=(1, 3), **options)(samples))


def pictured(sample: Any) -> list[Any]:
    """The turns of an episode that show a picture, all of them to be learnt from."""
    turns = zip(sample.messages[::2], sample.messages[1::2], strict=True)
    shown = [turn for turn in turns if turn[0]["content"][0]["type"] == "image"]
    return [{key: message[key] for key in ("role", "content")} for turn in shown for message in turn]


def fused_by_hand(model: Any, processor: Any, samples: list[Sample], batch: dict[str, Any]) -> Tensor:
    """(B, L, d) embeddings with each demonstration's fused tokens, encoded one by one, where its words stand."""
    tokenizer, rows = processor.tokenizer, []
    for sample, ids, mask in zip(samples, batch["input_ids"], batch["attention_mask"], strict=True):
        embeddings = model.get_input_embeddings()(ids).detach().clone()
        tokens = ids[mask.bool()].tolist()
        every = [*demonstrations_in(sample.messages[:-2])]
        asked = tokenizer("Remember the picture.", add_special_tokens=False)["input_ids"]
        turns = [at for at in range(len(tokens)) if tokens[at : at + len(asked)] == asked]
        seen = any(part["type"] == "image" for part in sample.messages[-2]["content"])
        turns = turns[:-1] if seen else turns
        for at, shown in zip(turns, every[-len(turns) :], strict=True):
            shot = encode(model, processor, [shown])[0]
            where = [*range(at, at + len(asked))]
            answer = next(
                p for p in range(at + len(asked), len(tokens))
                if tuple(tokens[p : p + len(shot.answer_ids)]) == shot.answer_ids
            )  # fmt: skip
            where += range(answer, answer + len(shot.answer_ids))
            first = int(mask.argmax())
            embeddings[[first + place for place in where]] = shot.fused
        rows.append(embeddings)
    return torch.stack(rows)


@pytest.mark.parametrize(("side", "seen"), [("right", False), ("left", False), ("right", True), ("left", True)])
def test_logits_are_those_of_the_host_over_fused_tokens(host_directory: Any, side: str, seen: bool) -> None:
    """Pictures read one by one; documents of different lengths in one batch; the last answers alone to be learnt."""
    model, processor = load_host(host_directory)
    graft = wake(alula.attach(model, AimConfig()))
    assert isinstance(graft, AimGraft)
    samples, batch = collated(processor, seen=seen, padding_side=side)
    labels = batch.pop("labels")
    assert len(batch.get("pixel_values", ())) == 4 * seen, "of demonstrations no picture stands in the prompts"
    shown = [int((row != -100).sum()) for row in labels]
    answers = [len(processor.tokenizer(sample.messages[-1]["content"][0]["text"])["input_ids"]) for sample in samples]
    assert shown == [count + 1 for count in answers], "the last answer and the token that ends it"
    found = Fusing(model, graft)(**batch).logits
    others = {key: batch[key] for key in ("pixel_values", "attention_mask") if key in batch}
    embeddings = fused_by_hand(model, processor, samples, batch)
    alula.detach(model)
    expected = model(inputs_embeds=embeddings, **others).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-5, rtol=1e-4)
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1
    assert len(batch[FUSED_FROM]) == len(batch[FUSED_TO])


def test_it_trains_the_map_and_nothing_else(recipe: MakeRecipe) -> None:
    hashes = Hashes()
    result = train(recipe(**STAGE), callbacks=[hashes])
    (changed,) = hashes.changed
    assert changed == {name for name in hashes.names if ".alula.aim." in name}
    assert len(changed) == 4
    model, processor = alula.load_model(str(result.final))
    (graft,) = alula.grafts_of(model).values()
    assert isinstance(graft, AimGraft)
    assert graft.config == AimConfig()
    sample = open_source({"microworld": "episode", "split": "test"})[0]
    assert len(encode(model, processor, [*demonstrations_in(sample.messages)])) > 1
    other = build_host(tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()).model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(AdapterError, match="trained"):
        alula.load_adapter(other, result.final)


def test_it_learns(recipe: MakeRecipe) -> None:
    """Eight documents by heart, through the map alone."""
    data = {"sources": [{"microworld": "episode", "limit": 8}]}
    result = train(recipe(**{**STAGE, "train": {"aim": 3e-2}, "data": data}, batch_size=8, steps=25, save_every=1000))
    losses = [row["loss"] for row in read_rows(result.directory / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_micro_batches_and_recomputed_blocks_come_to_the_same(recipe: MakeRecipe, tmp_path: Any) -> None:
    runs = []
    for name, run, stage in (
        ("whole", {}, {}),
        ("micro", {}, {"micro_batch_size": 1}),
        ("again", {"gradient_checkpointing": True}, {}),
    ):
        result = train(recipe(run={**run, "output_dir": str(tmp_path / name)}, **STAGE, **stage))
        runs.append(read_rows(result.directory / "metrics.jsonl"))
    for other in runs[1:]:
        for left, right in zip(runs[0], other, strict=True):
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
            assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)


def test_a_later_stage_goes_on_with_the_map(recipe: MakeRecipe) -> None:
    second = {**STAGE, "name": "more", "aim": {"shots": [2, 5]}}
    hashes = Hashes()
    train(recipe(stages=[STAGE, second]), callbacks=[hashes])
    assert hashes.changed[0] == hashes.changed[1]
    with pytest.raises(RecipeError, match="layer"):
        recipe(stages=[STAGE, {**second, "aim": {"layer": 0}}])


def test_documents_without_demonstrations_are_named_or_stepped_over(host_directory: Any, tmp_path: Any) -> None:
    _, processor = load_host(host_directory)
    collate = InterleavedCollator(processor, shots=(1, 8))
    for source in ({"microworld": "visual"}, {"microworld": "text"}):
        with pytest.raises(RecordError, match="it holds no demonstration"):
            collate([open_source(source)[0]])
    unanswered = open_source({"microworld": "episode"})[0]
    unanswered.messages = [*unanswered.messages, {"role": "user", "content": [text_part("and?")]}]
    with pytest.raises(RecordError, match="it holds no demonstration"):
        collate([unanswered])
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    stepping = InterleavedCollator(processor, shots=(1, 8), quarantine=quarantine)
    good, bad = open_source({"microworld": "episode"})[1], open_source({"microworld": "visual"})[0]
    alone, both = collate([good]), stepping([bad, good])
    assert torch.equal(both["input_ids"], alone["input_ids"])
    assert quarantine.counts() == {"record": 1}


def test_how_many_shots_is_drawn_by_position(host_directory: Any) -> None:
    _, processor = load_host(host_directory)
    samples, batch = collated(processor, 12)
    again = collated(processor, 12)[1]
    assert torch.equal(batch["input_ids"], again["input_ids"])
    asked = [row.tolist() for row in batch["input_ids"]]
    question = processor.tokenizer("Remember the picture.", add_special_tokens=False)["input_ids"]
    counts = [sum(row[at : at + len(question)] == question for at in range(len(row))) for row in asked]
    assert set(counts) == {1, 2, 3}
    assert len(batch[DEMONSTRATIONS]["input_ids"]) == sum(counts)
    assert [len([*demonstrations_in(s.messages)]) >= n for s, n in zip(samples, counts, strict=True)] == [True] * 12


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shots": [0, 3]}, "shots are .fewest, most. of 1 to"),
        ({"shots": [4, 3]}, "shots are .fewest, most. of 1 to"),
        ({"layers": [1]}, "layers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(recipe: MakeRecipe, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(**{**STAGE, "aim": settings})


def test_hosts_and_budgets_without_a_meaning_are_refused(recipe: MakeRecipe, tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match="layer 7 does not exist"):
        train(recipe(**{**STAGE, "aim": {"layer": 7}}))
    with pytest.raises(RecipeError, match="leaves the host as it is"):
        recipe(run={"retention": {"min": 0.9}}, **STAGE)
    opt = build_host(tiny.decoder("opt"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    path = save_host(opt, tmp_path / "opt")
    with pytest.raises(RecipeError, match="adds positions to embeddings"):
        train(recipe(run={"host": {"path": str(path)}}, **STAGE))
