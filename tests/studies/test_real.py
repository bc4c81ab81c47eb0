"""The study on real weights, on stand-ins: the fledgling in the place of released models, few pictures and questions.

``ALULA_REAL=DIR`` (of `alula real prepare`) runs its smallest whole on the released ones.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

import alula_fledgling
from alula.data import message_text
from alula.errors import UsageError
from alula.evaluation.caption_scores import cider
from alula.loading import load_model
from alula.reports import render
from studies.alignment.record import AlignmentRecord
from studies.real import RealPlan, RealRecord, figures, markdown, real, report, table, verdict
from studies.real.arms import ARMS, RATE
from studies.real.data import read, write_questions
from studies.real.pictures import NEGATIVES, blind, presence, presences, swapped
from studies.real.plan import BASE
from studies.real.record import answered, ordered
from studies.real.report import traits
from studies.real.words import blimp, coda, problems, read_blimp, weigh_answers

ROOT = Path(__file__).parents[2]
TRAINED = (
    ("animals-cats-cat", "A cat."),
    ("animals-cats-lion", "A lion."),
    ("food-soup", "A soup."),
    ("food-bread", "A bread."),
    ("food-more-bread", "Bread."),
)
HELD = (("animals-cats-owl", "An owl."), ("animals-cats-bear", "A bear."), ("food-cake", "A cake."))
VOTES = ({"red": 0.7, "green": 0.2, "blue": 0.1}, {"red": 0.0, "green": 0.9, "blue": 0.1})
THINGS = ("apples", "frogs")


def _pictures(folder: Path, split: str, captions: Sequence[tuple[str, str]]) -> None:
    (folder / "files").mkdir(parents=True, exist_ok=True)
    lines = []
    for place, (name, caption) in enumerate(captions):
        Image.new("RGB", (40, 40), (40 * place, 255 - 40 * place, 90)).save(folder / "files" / f"{name}.png")
        content = [{"type": "image", "image": f"files/{name}.png"}, {"type": "text", "text": "What is in the picture?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
        lines.append(json.dumps({"id": name, "messages": messages}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _benchmarks(own: Path) -> Path:
    (own / "blimp").mkdir(parents=True)
    for name, good, bad in (("agreement", "The cat sleeps.", "The cat sleep."), ("islands", "Who sleeps?", "Who do?")):
        rows = [
            {"sentence_good": good.replace("cat", who), "sentence_bad": bad, "linguistics_term": f"{name}_term"}
            for who in ("cat", "dog", "bird")
        ]
        (own / "blimp" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    colours = [{"class_id": thing, "colours": votes} for thing, votes in zip(THINGS, VOTES, strict=True)]
    (own / "coda_colours.jsonl").write_text("\n".join(map(json.dumps, colours)))
    named = [{"class_id": thing, "object_pl": thing} for thing in THINGS]
    (own / "coda_objects.jsonl").write_text("\n".join(map(json.dumps, named)))
    worked = [{"question": f"What is {n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}."} for n in range(4)]
    (own / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, worked)))
    return own


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RealPlan:
    root = tmp_path_factory.mktemp("real")
    for name in ("stamps", "emoji", "easy-vqa"):
        _pictures(root / "data" / name, "train", TRAINED)
        _pictures(root / "data" / name, "test", HELD)
    parts = alula_fledgling.directory()
    return RealPlan(
        root / "out", root, _benchmarks(root / "benchmarks"), parts / "llm", parts / "vision",
        arms=("projector", "full"), training=2, align=1, batch=2, items=1, precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def record(plan: RealPlan) -> RealRecord:
    return real(plan, command="python -m studies real", workers=0, quiet=True)


@pytest.fixture(scope="module")
def base(plan: RealPlan, record: RealRecord) -> Any:
    return load_model(plan.aligned(0))


def test_arms_differ_in_what_they_say_alone(plan: RealPlan) -> None:
    seen = []
    for arm in ARMS:
        recipe = plan.recipe_of(0, arm)
        seen.append(recipe.model_dump_json(exclude={"name", "output_dir"}))
        assert recipe.host.path == str(plan.aligned(0))
        assert sum(stage.steps or 0 for stage in recipe.stages) == plan.training
        last = recipe.stages[-1]
        assert [len(last.data.sources), last.batch_size] == [4, plan.batch]
        assert arm.replays == (last.data.text_replay is not None)
        tenth = arm.name in ("full-tenth", "wings-llm")
        for part, rate in last.learning_rates.items():
            assert rate == pytest.approx(RATE / 10 if tenth and part == "llm" else RATE)
    assert len(set(seen)) == len(ARMS)
    with pytest.raises(UsageError, match="no arm"):
        replace(plan, arms=("half",))
    with pytest.raises(UsageError, match="is no directory"):
        replace(plan, benchmarks=plan.benchmarks / "nowhere")


@torch.no_grad()
def _nats(model: Any, ids: list[int], first: int) -> float:
    logs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return -sum(float(logs[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_text_is_weighed_as_by_a_naive_loop(plan: RealPlan, base: Any) -> None:
    model, processor = base
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    paradigms = read_blimp(plan.benchmarks, 2)
    assert [(each.name, each.phenomenon, len(each.pairs)) for each in paradigms] == [
        ("agreement", "agreement_term", 2),
        ("islands", "islands_term", 2),
    ]
    assert [each.pairs[0] for each in read_blimp(plan.benchmarks, 1)] == [each.pairs[0] for each in paradigms]

    def whole(text: str) -> float:
        return _nats(model, [start, *tokenizer(text, add_special_tokens=False)["input_ids"]], 1)

    expected = {
        each.name: "".join(str(int(whole(good) < whole(bad))) for good, bad in each.pairs) for each in paradigms
    }
    assert blimp(model, processor, paradigms) == expected
    found = coda(model, processor, plan.benchmarks)
    for place, (thing, votes) in enumerate(zip(THINGS, VOTES, strict=True)):
        own = {colour: -whole(f"Most {thing} are {colour}") for colour in votes}
        assert found["spearman"][place] == pytest.approx(
            spearmanr([*own.values()], [*votes.values()]).statistic, abs=1e-4
        )
        assert found["top"][place] == str(int(max(own, key=own.__getitem__) == max(votes, key=votes.__getitem__)))
    samples = problems(plan.benchmarks, 3)
    assert all("<<" not in message_text(sample.messages[1]) for sample in samples)
    for nats, sample in zip(weigh_answers(model, processor, samples)["nats"], samples, strict=True):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in sample.messages]
        asked = processor.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=True)
        told = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
        before, ids = (list(np.array(each["input_ids"]).ravel()) for each in (asked, told))
        end = ids.index(tokenizer.eos_token_id, len(before)) + 1
        assert nats == pytest.approx(
            _nats(model, [int(i) for i in ids[:end]], len(before)) / (end - len(before)), abs=1e-3
        )


def test_questions_name_what_is_there_and_what_is_not(plan: RealPlan, base: Any, tmp_path: Path) -> None:
    held, trained = (read(plan.data("stamps", split)) for split in ("test", "train"))
    asked = presence(held, trained, 2)
    assert [which for _, which, _ in asked] == ["yes", *NEGATIVES] * 2
    for place, which, sample in asked:
        picture = next(each for each in held if each.images[0].path == sample.images[0].path)
        caption, (question, answer) = message_text(picture.messages[1]), map(message_text, sample.messages)
        thing = question.split()[3]
        assert answer == ("yes" if which == "yes" else "no")
        assert (thing in caption.lower()) == (which == "yes")
        assert which != "popular" or thing == "bread"
        if which == "adversarial":
            kinds = {"owl": {"bear"}, "bear": {"owl"}, "cake": {"soup", "bread"}}
            assert thing in kinds[message_text(picture.messages[1]).lower().strip(".").split()[-1]]
        assert place in (0, 1)
    model, processor = base
    odds = presences(model, processor, asked)
    assert [len(odds[which]) for which in ("yes", *NEGATIVES)] == [2] * 4
    moved = swapped(held)
    assert [each.images[0].path for each in moved] == [held[place].images[0].path for place in (1, 2, 0)]
    assert [each.messages[1] for each in moved] == [each.messages[1] for each in held]
    assert blind(plan.data("stamps", "train"), trained) == "10000"  # all five are asked alike; the first answer counts
    write_questions(tmp_path / "questions.jsonl", [plan.data("stamps", "train")])
    written = read(tmp_path / "questions.jsonl")
    assert [message_text(sample.messages[1]) for sample in written] == ["yes", "no"] * len(TRAINED)
    assert all(("bread" in message_text(sample.messages[0])) for sample in written if sample.id == "food-bread-yes")


def test_what_runs_is_measured_and_not_done_twice(plan: RealPlan, record: RealRecord) -> None:
    assert record.arms == ["projector", "full"]
    assert record.unchanged("projector")  # the decoder is the base's
    assert not record.unchanged("full")
    assert record.mean(BASE, "divergence") == 0.0
    assert record.mean("projector", "divergence") > 0
    assert record.change("projector", "gsm8k").value == 0.0
    assert record.change("full", "gsm8k").value != 0.0
    away = record.measured["0"]["full"]["sight"]["shapes"]
    assert len(away) == len(record.measured["0"]["full"]["shapes"]["nats"])
    own = [*record.measured["0"]["full"]["captions"]["nats"], *record.measured["0"]["full"]["shapes"]["nats"]]
    others = [*record.measured["0"]["full"]["sight"]["captions"], *away]
    assert record.figure("full", "had").value == pytest.approx(np.mean(others) - np.mean(own))
    half = record.on_the_way["0"]["full"]
    assert [*half] == ["1"]
    assert half["1"]["divergence"] != record.measured["0"]["full"]["divergence"]
    kept = {path: path.stat().st_mtime_ns for path in plan.seed_directory(0).rglob("*.json")}
    again = real(plan, command="python -m studies real", workers=0, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in plan.seed_directory(0).rglob("*.json")} == kept
    assert again.measured == record.measured
    assert RealRecord.load(plan.output / "outcome.json") == again
    said = json.loads(plan.measured(0, "full").read_text())
    references = [
        [message_text(s.messages[1])] for name in ("stamps", "emoji") for s in read(plan.data(name, "test"), 2, seed=0)
    ]
    assert said["captions"]["cider"] == [round(v, 4) for v in cider(said["captions"]["said"], references)]
    assert "said" not in record.measured["0"]["full"]["captions"]
    assert (
        (record.inside["0"]["full"]["skipped"]["none"]["nats"])
        != record.inside["0"]["full"]["skipped"]["block"]["nats"]
    )


def test_seeds_made_elsewhere_are_joined(plan: RealPlan, record: RealRecord, tmp_path: Path) -> None:
    (seed,) = record.seeds
    other = str(int(seed) + 1)
    parts = {part: {other: getattr(record, part)[seed]} for part in ("measured", "on_the_way", "inside")}
    elsewhere = record.model_copy(update={**parts, "settings": {**record.settings, "seeds": [int(other)]}})
    more = {"measured": {other: {**record.measured[seed], "lora": {}}}, "labels": {**record.labels, "lora": "LoRA"}}
    file = elsewhere.model_copy(update=more).save(tmp_path / "other.json")  # a way that this study leaves out
    both = real(plan, command="join", join=file, workers=0, quiet=True)
    assert both.seeds == [seed, other]
    assert both.settings["seeds"] == [int(seed), int(other)]
    assert both.seconds == pytest.approx(2 * record.seconds, abs=1)
    for name in record.labels:  # twice the same: the same value, and no spread of trainings
        assert both.figure(name, "gsm8k").value == pytest.approx(record.figure(name, "gsm8k").value)
    assert "0, 1" in render(report(both))
    said = markdown(both)
    half = f"{100 * record.change('full', 'blimp').value:+.1f}"
    assert f"(seeds {seed} / {other})" in said
    assert f"| full tuning | {half} / {half} |" in said
    assert "Training by training" not in markdown(record)
    assert both.of_seed(seed).measured == record.measured
    assert verdict(both)
    assert RealRecord.load(plan.output / "outcome.json") == both
    for wrong, what in (
        (record, f"holds seed {seed}"),
        (
            elsewhere.model_copy(update={"settings": {**elsewhere.settings, "training": 99}}),
            r"was made with training 99, this study has \d",
        ),
        (elsewhere.model_copy(update={"labels": {BASE: "base"}}), "has no 'connector only'"),
        (elsewhere.model_copy(update={"blind": "0"}), "asks of other sentences or questions"),
    ):
        with pytest.raises(UsageError, match=what):
            real(plan, command="join", join=wrong.save(tmp_path / "wrong.json"), workers=0, quiet=True)
    record.save(plan.output / "outcome.json")


def test_tables_and_sentences_are_of_the_record(record: RealRecord) -> None:
    other = AlignmentRecord.load(ROOT / "benchmarks/results/alignment.json")
    written = markdown(record, other)
    assert "text is the base's, bit for bit" in written
    assert "fledgling, 6 layers" in written
    assert table(record).row_count == 3
    assert any(sentence.startswith("Connector only: text is the base's, bit for bit") for sentence in verdict(record))
    assert set(figures(record)) == {"words-and-captions", "grammar-and-captions"}
    assert "what does each way cost in words?" in render(report(record, other))
    found = [traits(run.last.model_dump()) for run in other.runs]
    attention = other.answers.inside["attention"]
    assert attention is not None
    assert np.mean([each["aligned by attention, as kinds"] for each in found]) == pytest.approx(attention.value)


def test_presence_is_scored_by_order_and_by_answer() -> None:
    odds = {"yes": [2.0, -1.0, 0.5], "random": [1.0, -1.0, 3.0], "popular": [-1.0] * 3, "adversarial": [-1.0] * 3}
    found = {"presence": odds}
    assert ordered(found, "random") == [1.0, 0.5, 0.0]
    assert answered(found, "random") == [0.5, 0.5, 0.5]
    assert ordered(found) == pytest.approx([1.0, 0.5, 2 / 3])


def test_predictors_are_judged_over_trainings(record: RealRecord) -> None:
    measured, way = copy.deepcopy(record.measured["0"]), copy.deepcopy(record.on_the_way["0"])
    for place in range(1, 5):
        name = f"arm-{place}"
        measured[name], way[name] = copy.deepcopy(measured["full"]), copy.deepcopy(way["full"])
        for found, weight in ((measured[name], place), (way[name]["1"], place / 10)):
            found["divergence"], found["shift"] = [weight], -float(place)
            found["gsm8k"]["nats"] = [value + weight for value in measured[BASE]["gsm8k"]["nats"]][
                : len(found["gsm8k"]["nats"])
            ]
    for each in (measured, way):
        for name in ("projector", "full"):
            del each[name]
    labels = {name: name for name in (BASE, *(f"arm-{place}" for place in range(1, 5)))}
    made = record.model_copy(update={"labels": labels, "measured": {"0": measured}, "on_the_way": {"0": way}})
    told = made.predicted("gsm8k")
    assert told["divergence"]["end"].spearman.value == pytest.approx(1.0)
    assert told["divergence"]["way"].spearman.value == pytest.approx(1.0)
    assert told["shift"]["end"].spearman.value == pytest.approx(-1.0)
    assert told["divergence"]["end"].spearman.p == pytest.approx(2 / math.factorial(4))
    assert not record.predicted("gsm8k")  # two trainings say nothing


@pytest.mark.skipif("ALULA_REAL" not in os.environ, reason="no prepared directory is named (ALULA_REAL)")
def test_the_smallest_whole_on_released_weights(tmp_path: Path) -> None:
    plan = RealPlan(
        tmp_path / "out", Path(os.environ["ALULA_REAL"]), _benchmarks(tmp_path / "benchmarks"),
        arms=("full-replay",), training=2, align=1, batch=2, items=2,
    )  # fmt: skip
    record = real(plan, command="python -m studies real", workers=0, quiet=True)
    assert plan.replay(0).read_text().count("\n") > 2
    assert record.mean("full-replay", "divergence") > 0
    assert np.isfinite(record.change("full-replay", "gsm8k").value)
