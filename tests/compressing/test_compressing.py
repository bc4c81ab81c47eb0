"""`alula compress` on a tiny random host: what it finds and saves, that it goes on where it was, and refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import alula
from alula.cli import app as cli
from alula.compress import WeightMask, WeightPruning, prune
from alula.compressing import Compressed, Plan, compress, compress_report, largest
from alula.compressing.run import MASK, MODEL, PAIRED
from alula.data import Collator, open_file
from alula.errors import AlulaError, DataError, EvaluationError, HostError, UsageError
from alula.evaluation import Decoding, PairedRun, data_task, evaluate
from alula.evaluation.conditions import fingerprint
from alula.hosts import save_host
from alula_fledgling.microworld import export_llava, visual_items
from tests.hosts import tiny

LOAD = alula.load_model
CALIBRATED, ASKED = 4, 16


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressing") / "llava"
    llm = tiny.decoder("llama", seed=1)
    save_host(alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer()), path)
    return path


@pytest.fixture(scope="module")
def data(llava: Path) -> Path:
    """Questions with and without an image, to all of which what the model says is the right answer."""
    file = export_llava(visual_items(10, split="test", seed=0), llava.parent / "data")
    records = json.loads(file.read_text())
    for record in [dict(record) for record in records]:
        first, last = record.pop("conversations")
        bare = {**first, "value": first["value"].replace("<image>", "").strip()}
        record.pop("image")
        records.append({**record, "id": f"{record['id']}-text", "conversations": [bare, dict(last)]})
    file.write_text(json.dumps(records))
    run = evaluate(*LOAD(llava), [data_task(file)], batch_size=5, max_new_tokens=1)
    (task,) = run.tasks.values()
    for record, item in zip(records, task.items, strict=True):
        record["conversations"][-1]["value"] = item.answer or "nothing"
    file.write_text(json.dumps(records))
    return file


def planned(model: Path, file: Path, output: Path, **changes: Any) -> Plan:
    settings = {
        "output": output, "model": str(model), "data": file, "images": file.parent / "images", "items": ASKED,
        "calibration": None if changes.get("method") == "magnitude" else CALIBRATED, "batch_size": 5,
        "max_new_tokens": 1,
    }  # fmt: skip
    return Plan(**{**settings, **changes})


@pytest.fixture(scope="module")
def searched(llava: Path, data: Path) -> tuple[Plan, Compressed]:
    """The largest of 30, 60 and 90 % that keeps half of what the model says."""
    plan = planned(
        llava, data, llava.parent / "out", budget={"retention": 0.5, "visual": 0.5}, step=0.3, targets=("mlp",)
    )
    return plan, compress(plan, LOAD)


def watched(name: str, calls: list[int]) -> Any:
    loaded = LOAD(name)
    loaded.model.register_forward_pre_hook(lambda *arguments: calls.append(1))
    return loaded


def copied(data: Path, folder: Path) -> tuple[Path, list[Any]]:
    """The data in another place, to be changed there, and its records."""
    shutil.copytree(data.parent, folder)
    return folder / data.name, json.loads(data.read_text())


@pytest.mark.parametrize("change", ["answers", "order", "picture"])
def test_data_that_changed_are_not_mixed_in(llava: Path, data: Path, tmp_path: Path, change: str) -> None:
    """In the same file: what is asked and calibrated on is another, and what is known of the other says nothing."""
    file, records = copied(data, tmp_path / "mine")
    plan = planned(llava, file, tmp_path / "out", sparsity=0.5)
    compress(plan, LOAD)
    if change == "answers":
        records[0]["conversations"][-1]["value"] = "another"
    pictures = sorted((file.parent / "images").iterdir())
    if change == "picture":
        shutil.copyfile(pictures[1], pictures[0])
    file.write_text(json.dumps(records[::-1] if change == "order" else records))
    with pytest.raises(UsageError, match="other questions, pictures"):
        compress(plan, LOAD)


def test_amounts_that_are_nearly_alike_are_two(llava: Path, data: Path, tmp_path: Path) -> None:
    shares = 0.33333, 0.33334
    found = [compress(planned(llava, data, tmp_path / "out", sparsity=share), LOAD) for share in shares]
    assert [each.trial.share for each in found] == list(shares)
    assert [each.trial.made["settings"]["sparsity"] for each in found] == list(shares)


# -- what is found -----------------------------------------------------------------------------------------------------


def test_the_search_finds_the_largest_and_asks_few() -> None:
    for count, last in itertools.product(range(1, 20), range(-1, 20)):
        asked: list[int] = []

        def within(index: int, asked: list[int] = asked, last: int = last) -> bool:
            asked.append(index)
            return index <= last

        assert largest(count, within) == (None if last < 0 else min(last, count - 1))
        assert len(asked) == len(set(asked)) <= count.bit_length()


def test_figures_are_those_of_pruning_and_evaluation(searched: tuple[Plan, Compressed], data: Path) -> None:
    """Every trial against the functions for it, on the conversations that the seed draws."""
    plan, found = searched
    source = open_file(data, images=plan.images)
    generator = np.random.default_rng(0)
    order = generator.permutation(20).tolist()
    calibrated = [source[index] for index in order[:CALIBRATED]]
    records = json.loads(data.read_text())
    other = data.with_name("asked.json")
    other.write_text(json.dumps([records[index] for index in order[CALIBRATED:]]))
    for trial in found.trials:
        model, processor = LOAD(plan.model)
        mask = prune(
            model,
            WeightPruning(sparsity=trial.share, targets=("mlp",)),
            [Collator(processor, labels=False)(calibrated)],
        )
        run = evaluate(model, processor, [data_task(other)], batch_size=5, max_new_tokens=1, decoding=Decoding())
        (task,) = run.tasks.values()
        scores = {item.id: item.score for item in task.items}
        for comparison, is_text in ((trial.text, True), (trial.visual, False)):
            own = [score for name, score in scores.items() if name.endswith("-text") == is_text]
            assert comparison is not None
            assert comparison.n == len(own)
            assert comparison.tuned.value == pytest.approx(sum(own) / len(own))
        assert trial.fingerprint == fingerprint(model)
        zeros = sum(mask.shapes[name][0] * mask.shapes[name][1] - mask.count(name) for name in mask.shapes)
        assert trial.saved == pytest.approx(zeros / sum(each.numel() for each in model.parameters()))
    assert {trial.visual.n + trial.text.n for trial in found.trials if trial.visual and trial.text} == {ASKED}


def test_what_is_saved_is_the_largest_within_the_budget(searched: tuple[Plan, Compressed]) -> None:
    plan, found = searched
    assert plan.budget is not None
    within = [trial for trial in found.trials if trial.margin(plan.budget) >= 0]
    assert found.trial == within[-1]
    assert len(within) < len(found.trials)  # there was something to find
    following = found.possible[found.possible.index(found.chosen) + 1]
    assert next(trial for trial in found.trials if trial.name == following).margin(plan.budget) < 0
    stock = AutoModelForImageTextToText.from_pretrained(plan.output / MODEL)
    assert fingerprint(stock) == found.trial.fingerprint
    mask = WeightMask.load(plan.output / MASK)
    layers = stock.model.language_model.layers
    for name in mask.shapes:
        _, index, path = name.split(".", 2)
        assert torch.equal(layers[int(index)].get_submodule(path).weight != 0, mask.unpack(name))
    assert PairedRun.load(plan.output / PAIRED).tuned == found.chosen


@pytest.mark.parametrize(
    ("kind", "sparsity", "name"), [("mlp", 0.4, "40 % of"), ("heads", 0.6, "1 of 2"), ("blocks", 0.5, "1 of 2")]
)
def test_parts_taken_out(llava: Path, data: Path, tmp_path: Path, kind: Any, sparsity: float, name: str) -> None:
    found = compress(planned(llava, data, tmp_path / "out", kind=kind, sparsity=sparsity), LOAD)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / MODEL)
    left = sum(each.numel() for each in stock.parameters())
    assert found.chosen.startswith(name)
    assert found.trial.parameters == left == found.parameters - round(found.trial.saved * found.parameters)
    assert not (tmp_path / "out" / MASK).exists()
    assert found.bytes_after < found.bytes_before
    assert "smaller in memory" in compress_report(found, PairedRun.load(tmp_path / "out" / PAIRED))


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4", "method": "sparsegpt"},
        {"pattern": "4:8", "method": "magnitude", "targets": ("mlp",)},
        {"sparsity": 0.5, "tokens": "text", "coded": True},
    ],
)
def test_ways_to_prune(llava: Path, data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    found = compress(planned(llava, data, tmp_path / "out", **settings), LOAD)
    mask = WeightMask.load(tmp_path / "out" / MASK)
    assert mask.sparsity == pytest.approx(0.5)
    assert mask.made["settings"]["method"] == settings.get("method", "wanda")
    assert found.coded == settings.get("coded", False)
    assert fingerprint(LOAD(tmp_path / "out" / MODEL).model) == found.trial.fingerprint
    assert (found.calibrated == "") == (settings.get("method") == "magnitude")


def test_a_text_model_with_questions_of_its_own(tmp_path: Path) -> None:
    plan = Plan(output=tmp_path, model="fledgling", kind="heads", sparsity=0.5, items=2, calibration=2, batch_size=2)
    found = compress(plan, LOAD)
    assert found.chosen == "1 of 2 key heads"
    assert found.trial.text is not None
    assert found.trial.visual is None
    assert found.calibrated == "2 questions of text"
    assert "n/a" in compress_report(found, PairedRun.load(tmp_path / PAIRED))


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_finished_compression_runs_no_model_again(searched: tuple[Plan, Compressed]) -> None:
    plan, found = searched
    calls: list[int] = []
    again = compress(plan, lambda name: watched(name, calls))
    assert not calls
    assert (again.trials, again.chosen) == (found.trials, found.chosen)


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_killed_compression_goes_on(searched: tuple[Plan, Compressed], tmp_path: Path, share: float) -> None:
    """What a kill leaves are files up to some byte; answers that were given are not given again."""
    plan, found = searched
    for name in ("plan.json", "base.jsonl", f"tried/weights-{found.trials[0].share!r}.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((plan.output / name).read_bytes())
    measured = (plan.output / "measured.jsonl").read_bytes()
    (tmp_path / "measured.jsonl").write_bytes(measured[: int(share * len(measured))])
    (tmp_path / "base.json").write_bytes((plan.output / "base.json").read_bytes())
    anew: list[int] = []
    whole = compress(plan.model_copy(update={"output": tmp_path / "whole"}), lambda name: watched(name, anew))
    calls: list[int] = []
    again = compress(plan.model_copy(update={"output": tmp_path}), lambda name: watched(name, calls))
    assert 0 < len(calls) < len(anew)
    for one, other in zip(again.trials, whole.trials, strict=True):
        assert (one.name, one.text, one.visual, one.fingerprint) == (
            other.name,
            other.text,
            other.visual,
            other.fingerprint,
        )


def test_another_compression_is_not_mixed_in(searched: tuple[Plan, Compressed]) -> None:
    plan, _ = searched

    def other(name: str) -> Any:
        loaded = LOAD(name)
        with torch.no_grad():
            loaded.model.lm_head.weight.mul_(2)
        return loaded

    with pytest.raises(UsageError, match="other weights"):
        compress(plan, other)
    with pytest.raises(UsageError, match="method was 'wanda', now 'sparsegpt'"):
        compress(plan.model_copy(update={"method": "sparsegpt"}), LOAD)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_meets(searched: tuple[Plan, Compressed], tmp_path: Path) -> None:
    """Is named, leaves no model, and what was measured serves the next budget."""
    plan, found = searched
    copy = tmp_path / "out"
    shutil.copytree(plan.output, copy)
    calls: list[int] = []
    strict = {"output": copy, "budget": {"retention": 1.0, "visual": 1.0}, "step": 0.9}
    with pytest.raises(
        EvaluationError, match=r"nothing that was tried keeps retention of at least 100.*the nearest is"
    ):
        compress(plan.model_copy(update=strict), lambda name: watched(name, calls))
    assert not any((copy / name).exists() for name in (MODEL, MASK, PAIRED))
    assert not list(copy.glob(".*"))
    calls.clear()
    again = compress(plan.model_copy(update={"output": copy}), lambda name: watched(name, calls))
    assert again.chosen == found.chosen
    assert fingerprint(LOAD(copy / MODEL).model) == found.trial.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "say how much"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one"),
        ({"sparsity": 1.0}, "--sparsity"),
        ({"budget": {"sight": 0.9}}, "there is no 'sight'"),
        ({"budget": {"visual": 1.5}}, "a share above 0"),
        ({"sparsity": 0.5, "kind": "mlp", "coded": True}, "--coded is of --kind weights"),
        ({"sparsity": 0.5, "kind": "mlp", "method": "sparsegpt"}, "--method sparsegpt is of --kind weights"),
        ({"sparsity": 0.5, "kind": "heads", "method": "sparsegpt"}, "--method sparsegpt is of --kind weights"),
        ({"sparsity": 0.5, "tokens": "words"}, "cannot be 'words'"),
        ({"sparsity": 0.5, "method": "magnitude", "calibration": 3}, "magnitude looks at no data"),
        ({"sparsity": 0.1, "budget": {"visual": 0.9}, "step": 0.2}, "is more than the most"),
        ({"sparsity": 0.5, "step": 0.1}, "--step has no effect"),
        ({"kind": "heads", "budget": {"visual": 0.9}, "step": 0.1}, "--step has no effect"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Plan(output=tmp_path, model="model", **changes)


def test_data_that_do_not_do(llava: Path, data: Path, tmp_path: Path) -> None:
    def refused(error: type[AlulaError], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            compress(planned(llava, data, tmp_path / "out", **{"sparsity": 0.5, **changes}), LOAD)
        assert not (tmp_path / "out").exists()

    adapted = LOAD(llava).model
    adapted = peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HostError, match="is inside an adapter"):
        compress(planned(llava, data, tmp_path / "out", sparsity=0.5), lambda name: (adapted, LOAD(name).processor))
    assert not (tmp_path / "out").exists()
    refused(DataError, "20 usable conversations, 128 to calibrate on", calibration=128)
    refused(UsageError, "no questions come with this model", data=None, images=None)
    refused(UsageError, "prunes nothing|nothing would be removed", kind="mlp", sparsity=0.01)
    text = tmp_path / "text.json"
    records = json.loads(data.read_text())
    text.write_text(json.dumps([record for record in records if "image" not in record]))
    refused(UsageError, "visual is asked for, and no question", data=text, images=None, budget={"visual": 0.5})
    wrong = tmp_path / "wrong.json"
    for record in records:
        record["conversations"][-1]["value"] = "never said"
    wrong.write_text(json.dumps(records))
    with pytest.raises(EvaluationError, match="the model itself answers none right"):
        compress(planned(llava, wrong, tmp_path / "out", images=data.parent / "images", budget={"visual": 0.5}), LOAD)


def test_the_command(
    llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["alula", "compress", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    own = ["--data", str(data), "--calibration", "4", "--items", "8", "--max-new-tokens", "1"]
    output = ["--output", str(tmp_path / "out")]
    assert run(str(llava), *own, *output, "--sparsity", "0.5", "--budget", "visual:0.01", "--step", "0.5") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50 % of weights" in shown.replace("\N{NO-BREAK SPACE}", " ")
    found = Compressed.load(tmp_path / "out" / "compress.json")
    assert found.budget == {"visual": 0.01}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "is not faster" in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()
    assert run(str(llava), "--sparsity", "0.5", "--budget", "visual") == 2
    assert "is not NAME:SHARE" in capsys.readouterr().err
    assert run("--help") == 0
    said = " ".join(re.sub(r"[^\w.,:;-]+", " ", capsys.readouterr().out).split())
    assert "Not faster, whatever the sparsity" in said
