"""The retention budget: what is measured, that measuring changes nothing, and what happens when it is broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback

import alula
from alula.cli import app as cli
from alula.data import Collator
from alula.errors import DataError, RecipeError
from alula.evaluation import ItemTask, evaluate, exact_match
from alula.evaluation.references import last_answers, score_answers
from alula.hosts import load_host
from alula.probes import Alignment, AttentionShift
from alula.training import parse_recipe, train
from alula.training.metrics import read_rows
from alula.training.recipe import Retention
from alula.training.retention import RetentionEvaluator, open_probe_set
from alula.training.retention.measurement import attention_moved
from alula_fledgling import microworld
from alula_fledgling.tasks.skills import turns
from tests.training.conftest import MakeRecipe, rows

RETENTION: dict[str, Any] = {
    "every": 2, "items": 12, "samples": 6, "batch_size": 5, "measure": "likelihood",
    "text": {"microworld": "text", "split": "test", "seed": 41},
    "pictures": {"microworld": "visual", "split": "test", "seed": 41},
}  # fmt: skip
CHANGING = ("seconds", "retention_seconds")
FULL: dict[str, Any] = {"method": "full", "train": {"llm": 1e-2, "projector": 1e-2}, "batch_size": 4}
WINGS: dict[str, Any] = {
    "method": "wings",
    "train": {"wings": 1e-2, "projector": 1e-2},
    "wings": {"rank": 4, "dropout": 0.2},
    "batch_size": 4,
}


class Interrupt(TrainerCallback):
    """Ends the session right after a step, before its row is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def schooled(host_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny host after a little schooling on text: something to lose."""
    folder = tmp_path_factory.mktemp("schooled")
    stage = {"name": "school", "steps": 40, "data": {"sources": [{"microworld": "text"}]}, **FULL}
    raw = {"name": "school", "output_dir": str(folder / "run"), "device": "cpu", "host": {"path": str(host_directory)}}
    return train({**raw, "stages": [stage]}, quiet=True).final


def breaking(schooled: Path, **section: Any) -> dict[str, Any]:
    """Upper keys of a run that unlearns its text; the stage is `BREAKING`."""
    return {"host": {"path": str(schooled)}, "retention": {**RETENTION, "min": 0.9, **section}}


BREAKING: dict[str, Any] = {
    "method": "full",
    "train": {"llm": 0.03, "projector": 1e-2},
    "batch_size": 4,
    "steps": 10,
    "schedule": {"kind": "linear", "warmup": 9},
    "save_every": 3,
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path for path in sorted(directory.glob("*model.safetensors"))))


def same(left: Path, right: Path) -> bool:
    one, two = weights(left), weights(right)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_one_pass_tells_what_greedy_decoding_would_answer() -> None:
    model, processor = alula.load_model("fledgling", dtype=torch.float32)
    families = [family for family in microworld.TEXT_FAMILIES if family != "reading"]  # its lists match in any order
    chosen = {"microworld": "text", "split": "test", "seed": 41, "families": families}
    samples = open_probe_set(Retention(items=60, probes=False, text=chosen))
    measurement = RetentionEvaluator(samples, processor, batch_size=16).measure(model)
    asked = [turns(item)[-1] for item in microworld.text_items(60, split="test", seed=41, families=families)]
    found = evaluate(model, processor, [ItemTask("t", "t", asked, exact_match)]).tasks["t"].items
    assert list(measurement.right) == [item.answer == item.gold for item in found]
    assert 0 < sum(measurement.right) < 60 or all(measurement.right)


def test_what_is_asked_is_the_last_answer_up_to_its_end() -> None:
    ignored, stop = -100, 9
    labels = torch.tensor([[ignored, 3, 9, ignored, 4, 5, 9, 7], [ignored, ignored, 6, 9, ignored, 2, 3, ignored]])
    expected = [[ignored] * 4 + [4, 5, 9, ignored], [ignored] * 5 + [2, 3, ignored]]
    assert last_answers(labels, stop).tolist() == expected


def test_answers_and_their_loss_against_a_loop() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, 4), torch.randint(4, (5, 7))
    labels[torch.rand(5, 7) < 0.6] = -100
    logits[0] = F.one_hot(labels[0].clamp(min=0).roll(-1), 4) * 9.0
    right, loss, count = score_answers(logits, labels)
    total, number = 0.0, 0
    for row in range(5):
        places = [s for s in range(1, 7) if labels[row, s] != -100]
        assert bool(right[row]) == all(logits[row, s - 1].argmax() == labels[row, s] for s in places)
        total += sum(float(-logits[row, s - 1].double().log_softmax(-1)[labels[row, s]]) for s in places)
        number += len(places)
    assert bool(right[0])
    assert (float(loss), int(count)) == (pytest.approx(total, rel=1e-5), number)


def test_probes_are_those_of_one_batch(host_directory: Path) -> None:
    host = load_host(host_directory)
    samples = open_probe_set(Retention(**{**RETENTION, "samples": 7}))
    evaluator = RetentionEvaluator(samples, host.processor, batch_size=5)
    host.model.train()
    state = torch.random.get_rng_state()
    measurement = evaluator.measure(host.model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in host.model.modules())
    batch = dict(Collator(host.processor)(samples.pictures))
    batch.pop("labels")
    shift, alignment = AttentionShift(), Alignment()
    with torch.no_grad(), shift.on(host.model.eval()), alignment.on(host.model):
        host.model(**batch)
    pair = alignment.result().pairs["image-text"]
    assert measurement.probes == pytest.approx(
        {
            "attention_shift": shift.result().shift["main"].value,
            "alignment": pair.score.value,
            "alignment_contrast": pair.contrast_score.value,
        },
        abs=1e-5,
    )
    curves = shift.result().curves["main"]
    assert {name: pytest.approx([p.value for p in curve], abs=1e-6) for name, curve in curves.items()} == {
        name: list(curve) for name, curve in measurement.curves.items()
    }


def test_attention_that_moved() -> None:
    start = {"before": (0.5, 0.2), "image": (0.5, 0.8)}
    assert attention_moved(start, start) == 0
    assert attention_moved({"before": (0.0, 0.2), "image": (1.0, 0.8)}, start) == pytest.approx(0.25)
    assert (
        attention_moved({"before": (0.0, 1.0), "image": (1.0, 0.0)}, {"before": (1.0, 0.0), "image": (0.0, 1.0)}) == 1
    )
    assert attention_moved({}, start) is None


@pytest.mark.parametrize("stage", [FULL, WINGS], ids=["full", "wings"])
def test_a_measured_run_trains_exactly_as_one_that_is_not(
    recipe: MakeRecipe, tmp_path: Path, stage: dict[str, Any]
) -> None:
    plain = train(recipe({"output_dir": str(tmp_path / "plain")}, **stage, steps=5), quiet=True)
    measured = train(
        recipe({"output_dir": str(tmp_path / "measured"), "retention": RETENTION}, **stage, steps=5), quiet=True
    )
    found = rows(measured.directory, without=CHANGING)
    assert [row["step"] for row in found if "retention" in row] == [2, 4, 5]
    bare = [{key: value for key, value in row.items() if key not in ("retention", "probes")} for row in found]
    assert bare == rows(plain.directory)
    assert same(plain.final, measured.final)
    for row in found:
        if "retention" in row:
            assert set(row["probes"]) == {"attention_shift", "alignment", "alignment_contrast", "attention_moved"}
            assert row["retention"]["value"] == pytest.approx(
                torch.tensor(row["retention"]["loss_before"] - row["retention"]["loss"]).exp().item(), rel=1e-5
            )
    if stage is WINGS:  # the exact gate leaves text alone
        assert {row["retention"]["value"] for row in found if "retention" in row} == {1.0}
    assert measured.stopped is None


def test_measured_steps_are_written_though_others_are_not(recipe: MakeRecipe) -> None:
    result = train(recipe({"retention": {**RETENTION, "probes": False}}, steps=5, log_every=100), quiet=True)
    assert [row["step"] for row in rows(result.directory)] == [2, 4, 5]
    assert not any("probes" in row for row in rows(result.directory))


def test_a_killed_run_goes_on_with_the_same_curve_and_measures_nothing_twice(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    measure = RetentionEvaluator.measure
    monkeypatch.setattr(
        RetentionEvaluator, "measure", lambda self, model: (counted.append("measured"), measure(self, model))[1]
    )
    stages = [{"name": "one", **FULL, "steps": 6, "save_every": 3}, {"name": "two", **FULL, "steps": 2}]
    budget = {"retention": {**RETENTION, "items": 6, "samples": 3}}
    whole = train(recipe({"output_dir": str(tmp_path / "whole"), **budget}, stages=stages), quiet=True)
    assert len(counted) == (1 + 3) + (1 + 1)  # each stage's start, and its measured steps
    # measured after the last checkpoint, by a session that was killed then
    for stop, repeated in ((1, 0), (3, 1), (4, 1)):
        counted.clear()
        made = recipe({"output_dir": str(tmp_path / f"killed-{stop}"), **budget}, stages=stages)
        with pytest.raises(KeyboardInterrupt):
            train(made, callbacks=[Interrupt(stop)], quiet=True)
        again = train(made, quiet=True)
        assert len(counted) == 6 + repeated
        assert rows(again.directory, without=CHANGING) == rows(whole.directory, without=CHANGING)
        assert same(again.final, whole.final)
    counted.clear()
    assert train(made, quiet=True).was_done
    assert counted == []


def test_a_run_that_an_earlier_version_began_goes_on(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it measured at the start is read under the file's earlier name, and said so; so are its rows."""
    stages = [{"name": "one", **FULL, "steps": 4, "save_every": 2}, {"name": "two", **FULL, "steps": 2}]
    budget = {"retention": {**RETENTION, "items": 6, "samples": 3}}
    whole = train(recipe({"output_dir": str(tmp_path / "whole"), **budget}, stages=stages), quiet=True)
    made = recipe({"output_dir": str(tmp_path / "killed"), **budget}, stages=stages)
    with pytest.raises(KeyboardInterrupt):
        train(made, callbacks=[Interrupt(3)], quiet=True)
    stage, metrics = tmp_path / "killed/stages/01-one", tmp_path / "killed/metrics.jsonl"
    earlier = (stage / "retention.json").rename(stage / "watch.json").read_bytes()
    assert "retention_seconds" in metrics.read_text()
    metrics.write_text(metrics.read_text().replace("retention_seconds", "watch_seconds"))
    measured: list[int] = []
    measure = RetentionEvaluator.measure
    monkeypatch.setattr(RetentionEvaluator, "measure", lambda *given: (measured.append(1), measure(*given))[1])
    again = train(made, quiet=True)
    assert len(measured) == 1 + 2  # the last step of the first stage; start and last step of the second
    assert rows(again.directory, without=CHANGING) == rows(whole.directory, without=CHANGING)
    assert same(again.final, whole.final)
    assert "watch_seconds" not in metrics.read_text()
    assert json.loads((stage / "stage.json").read_text())["retention"]["measurements"] == 2
    assert (stage / "watch.json").read_bytes() == earlier
    assert not (stage / "retention.json").exists()
    assert [record.getMessage() for record in caplog.records if "watch.json" in record.getMessage()]


def test_both_stages_are_compared_with_the_start_of_the_run(recipe: MakeRecipe) -> None:
    stages = [{"name": "one", **FULL}, {"name": "two", **FULL}]
    result = train(recipe({"retention": RETENTION}, stages=stages), quiet=True)
    found = [row["retention"]["loss_before"] for row in rows(result.directory) if "retention" in row]
    assert len(found) == 4
    assert len(set(found)) == 1


def test_warn_says_so_and_goes_on(recipe: MakeRecipe, schooled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(recipe(breaking(schooled), **BREAKING))
    assert result.stages[0].steps == 10
    assert result.stopped is None
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: text retention was" in said
    assert "of stage only, below 0.9" in said
    record = json.loads((result.directory / "stages/01-only/stage.json").read_text())["retention"]
    assert record["stopped"] is None
    assert record["lowest"] < 0.9


class Snapshot(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}


@pytest.mark.parametrize("action", ["stop", "rewind"])
def test_a_broken_budget_ends_the_run_in_a_normal_directory(
    recipe: MakeRecipe, schooled: Path, tmp_path: Path, action: str
) -> None:
    stages = [{"name": "tune", **BREAKING}, {"name": "more", **FULL}]
    snapshot = Snapshot()
    made = recipe({**breaking(schooled, action=action), "output_dir": str(tmp_path / "run")}, stages=stages)
    result = train(made, callbacks=[snapshot], quiet=True)
    measured = {row["step"]: row["retention"]["value"] for row in rows(result.directory) if "retention" in row}
    step = max(measured)
    assert measured[step] < 0.9 <= min((value for at, value in measured.items() if at < step), default=1)
    assert 2 < step < 10, "the recipe should break its budget in the middle"
    assert [stage.name for stage in result.stages] == ["tune"]
    assert result.stages[0].steps == step
    assert result.stopped is not None
    assert f"at step {step} of stage tune, below 0.9" in result.stopped
    assert result.final.resolve() == (result.directory / "stages/01-tune/model").resolve()
    record = json.loads((result.directory / "stages/01-tune/stage.json").read_text())
    kept = step if action == "stop" else step - 2
    assert record["retention"]["stopped"]["kept_step"] == kept
    assert record["stopped"] == result.stopped
    model = load_host(result.final).model
    expected = snapshot.at[kept]
    decoder = {name: value for name, value in model.named_parameters() if "language_model" in name}
    assert decoder
    assert all(torch.equal(value, expected[name]) for name, value in decoder.items())
    assert not list(result.directory.rglob("checkpoint-*"))
    assert not list(result.directory.rglob("within-budget*"))
    assert not (result.directory / "stages/02-more").exists()
    again = train(made, quiet=True)
    assert again.was_done
    assert again.stopped == result.stopped
    # killed after the decision, before anything of it was on disk: it is come to again
    killed = recipe({**breaking(schooled, action=action), "output_dir": str(tmp_path / "killed")}, stages=stages)
    with pytest.raises(KeyboardInterrupt):
        train(killed, callbacks=[Interrupt(step)], quiet=True)
    resumed = train(killed, quiet=True)
    assert resumed.stopped == result.stopped
    assert rows(resumed.directory, without=CHANGING) == rows(result.directory, without=CHANGING)
    assert same(resumed.final, result.final)


def test_patience_waits(recipe: MakeRecipe, schooled: Path, tmp_path: Path) -> None:
    held_out = {"every": 100, "samples": 1, "sources": [{"microworld": "text", "split": "test"}]}
    made = recipe(
        {**breaking(schooled, action="stop", patience=3, every=1), "validation": held_out},
        **{**BREAKING, "save_every": 4},
    )
    with pytest.raises(KeyboardInterrupt):  # what was seen before a kill counts too
        train(made, callbacks=[Interrupt(5)], quiet=True)
    result = train(made, quiet=True)
    within = [row["retention"]["value"] >= 0.9 for row in rows(result.directory)]
    assert within == [True] * (len(within) - 3) + [False] * 3
    assert result.stages[0].steps == len(within) == 6
    assert [row["step"] for row in rows(result.directory) if "validation" in row] == [6]  # the last, which came early


def test_the_command_says_why_it_stopped(
    plain: Callable[..., Any],
    schooled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**plain(**BREAKING), **breaking(schooled, action="stop", probes=False)}))

    def told(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["alula", "train", str(file), "-q", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    for _ in range(2):  # the second time there is nothing to do but to say it again
        assert "stopped by the retention budget: text retention was" in told()
    assert "below 0.9" in json.loads(told("--json"))["stages"][0]["stopped"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"min": 1.5}, "retention.min: input should be less than or equal to 1"),
        ({"min": 0}, "retention.min: input should be greater than 0"),
        ({"action": "halt"}, "retention.action: input should be 'warn', 'stop' or 'rewind'"),
        ({"evry": 5}, "unknown key; did you mean `every`?"),
        ({"every": 0}, "retention.every"),
        ({"samples": 1}, "retention.samples"),
        ({"text": {"microwrld": "text"}}, "a source needs one of the keys"),
        ({"text": {"microworld": "txt"}}, "retention.text.microworld"),
        ({"probes": 1}, "retention.probes"),
    ],
)
def test_mistakes_in_the_recipe_are_told(plain: Callable[..., Any], section: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe({**plain(), "retention": section})
    assert said.lower() in str(error.value).lower()


def test_sets_that_cannot_tell_anything_are_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    sets: list[tuple[dict[str, Any], str]] = [
        ({"text": {"microworld": "visual"}}, "is not text alone"),
        ({"text": {"microworld": "sound"}}, "is not text alone"),
        ({"pictures": {"microworld": "text"}}, "shows no picture"),
        ({"measure": "exact"}, "answers none of the text items"),
    ]
    for number, (section, said) in enumerate(sets):
        output = tmp_path / str(number)
        with pytest.raises((DataError, RecipeError), match=said):
            train(recipe({"output_dir": str(output), "retention": {**RETENTION, **section}}), quiet=True)
        assert read_rows(output / "metrics.jsonl") == []
        if "measure" not in section:  # found out before anything ran: nothing there claims the directory
            assert [path.name for path in output.iterdir()] == [".lock"]
