"""What a run says while it trains beside its loss: held-out samples, the user's own evaluations, trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from alula.data import Collator
from alula.errors import DataError, RecipeError, UsageError
from alula.hosts import load_host
from alula.training import Evaluation, check, parse_recipe, train
from alula.training.trackers import flat
from alula.training.validation import open_validation
from tests.training.conftest import MakeRecipe, rows

VALIDATION: dict[str, Any] = {
    "every": 2,
    "samples": 5,
    "batch_size": 3,
    "sources": [
        {"microworld": "visual", "split": "test", "seed": 5},
        {"microworld": "text", "split": "test", "seed": 5},
    ],
}
FULL: dict[str, Any] = {"method": "full", "train": {"llm": 1e-2, "projector": 1e-2}, "batch_size": 4, "steps": 5}
TIMES = ("seconds", "evaluation_seconds")


class Logged(TrainerCallback):
    """Keeps what trackers are told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def width(model: Any, processor: Any) -> dict[str, float]:
    assert not model.training
    assert not torch.is_grad_enabled()
    torch.rand(3)  # the run does not feel it
    return {"norm": float(model.get_output_embeddings().weight.norm()), "words": len(processor.tokenizer)}


def test_held_out_samples_and_own_evaluations_stand_in_the_rows_and_change_nothing(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    bare = recipe(**FULL)
    train(bare, quiet=True)
    made = recipe(run={"validation": VALIDATION, "output_dir": str(tmp_path / "watched")}, **FULL)
    logged = Logged()
    result = train(made, callbacks=[logged], evaluations=[Evaluation("width", width, every=3)], quiet=True)
    found = rows(result.directory, without=TIMES)
    extra = ("validation", "evaluations")
    assert [{k: v for k, v in row.items() if k not in extra} for row in found] == rows(Path(bare.output_dir))
    assert [row["step"] for row in found if "validation" in row] == [2, 4, 5]
    assert [row["step"] for row in found if "evaluations" in row] == [3, 5]

    # the last figures, by a loop over single samples of the model as it was saved
    host = load_host(result.final)
    assert found[-1]["evaluations"]["width"] == {
        "norm": pytest.approx(float(host.model.get_output_embeddings().weight.detach().norm())),
        "words": len(host.processor.tokenizer),
    }
    total, tokens, right = 0.0, 0, 0
    assert made.validation is not None
    samples = open_validation(made.validation)
    assert len(samples) == 10
    for sample in samples:
        batch = Collator(host.processor)([sample])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logits = host.model.eval()(**batch).logits[0].double()
        asked = [place for place in range(1, len(labels)) if labels[place] != -100]
        total += sum(float(F.cross_entropy(logits[place - 1], labels[place])) for place in asked)
        tokens += len(asked)
        right += all(int(logits[place - 1].argmax()) == int(labels[place]) for place in asked)
    wanted = {"loss": pytest.approx(total / tokens, abs=1e-4), "right": right / 10, "tokens": tokens}
    assert found[-1]["validation"] == wanted

    # trackers are told the same, one number each
    last = next(logs for logs in reversed(logged.logs) if "loss" in logs)
    assert last["eval_loss"] == found[-1]["validation"]["loss"]
    assert last["eval_width/norm"] == found[-1]["evaluations"]["width"]["norm"]
    assert last["lr/llm"] == found[-1]["lr"]["llm"]


def test_what_cannot_be_measured_is_refused_before_anything_runs(recipe: MakeRecipe, plain: Any) -> None:
    nowhere = {**VALIDATION, "sources": [{"jsonl": "nowhere.jsonl"}]}
    with pytest.raises(DataError, match="nowhere"):
        check(recipe(run={"validation": nowhere}))
    with pytest.raises(RecipeError, match="behind demonstrations"):
        parse_recipe({**plain(method="aim", train={}, aim={}), "validation": VALIDATION})
    twice = [Evaluation("own", width), Evaluation("own", width)]
    with pytest.raises(UsageError, match="two evaluations are called 'own'"):
        train(plain(), evaluations=twice, quiet=True)
    with pytest.raises(UsageError, match="is no evaluation"):
        train(plain(), evaluations=[width], quiet=True)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="whole number"):
        Evaluation("own", width, every=0.5)  # type: ignore[arg-type]


def test_a_held_out_record_without_an_answer_is_told_before_the_first_step(recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "held-out.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "what is it?"}]}) + "\n")
    made = recipe(run={"validation": {**VALIDATION, "sources": [{"jsonl": str(file)}]}}, **FULL)
    with pytest.raises(DataError, match="no token to learn from") as raised:
        train(made, quiet=True)
    assert "on_bad" not in (raised.value.remedy or "")  # which would not step over it
    assert not (Path(made.output_dir) / "metrics.jsonl").exists() or not rows(Path(made.output_dir))


def test_an_evaluation_that_gives_no_number_is_named(recipe: MakeRecipe) -> None:
    made = recipe(**{**FULL, "steps": 1})
    with pytest.raises(UsageError, match="holds no number") as raised:
        train(made, evaluations=[Evaluation("mine", lambda model, processor: "good")], quiet=True)
    assert "'mine'" in (raised.value.where or "")


def test_a_figure_that_is_no_number_is_said(recipe: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    """JSON has no NaN: other readers of the file would stop at it, or skip the row."""
    odd = Evaluation("odd", lambda model, processor: {"a": float("nan"), "b": 2.0, "c": float("-inf")}, every=2)
    result = train(recipe(**{**FULL, "steps": 2}), evaluations=[odd], quiet=True)

    def strictly(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    *before, row = (json.loads(line, parse_constant=strictly) for line in lines)
    assert row["evaluations"] == {"odd": {"a": None, "b": 2.0, "c": None}}
    assert row["not_finite"] == ["evaluations.odd.a is nan", "evaluations.odd.c is -inf"]
    assert "step 2: evaluations.odd.a is nan; evaluations.odd.c is -inf" in caplog.text
    assert not [each for each in before if "not_finite" in each]
    assert flat(row)["eval_odd/b"] == 2.0


def test_trackers_have_one_name_per_number() -> None:
    row = {
        "lr": {"llm": 0.1},
        "losses": {},
        "retention": {"value": 0.5, "lost": 1},
        "probes": {"attention_shift": None},
        "validation": {"loss": 2.0},
        "evaluations": {"mine": {"value": 3.0}},
    }
    assert flat(row) == {
        "lr/llm": 0.1,
        "retention/value": 0.5,
        "retention/lost": 1,
        "eval_loss": 2.0,
        "eval_mine/value": 3.0,
    }


def test_a_tracker_that_is_not_installed_is_refused_by_name(plain: Any, tmp_path: Path) -> None:
    from alula.training import trackers

    missing = [name for name, there in trackers._AVAILABLE.items() if not there()]
    for name in missing:
        with pytest.raises(RecipeError, match=f"{name} is not installed"):
            check({**plain(), "report_to": name})
    assert parse_recipe({**plain(), "report_to": "wandb"}).report_to == ("wandb",)
    with pytest.raises(RecipeError, match="report_to"):
        parse_recipe({**plain(), "report_to": "paper"})


def test_a_run_that_learned_nothing_takes_any_change(recipe: MakeRecipe, tmp_path: Path) -> None:
    """A bad record ends a run at its first step: what is changed then to go on is no other run's recipe."""
    good = {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}]}
    shown = [{"type": "image", "path": "no.png"}, {"type": "text", "text": "?"}]
    bad = {"id": "7", "messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": "red"}]}
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (bad, good, good, good)))
    options = {**FULL, "data": {"sources": [{"jsonl": str(file)}]}, "steps": 2}
    with pytest.raises(DataError, match=r"data\.jsonl:1 \(record 7\): .*is missing") as raised:
        train(recipe(**options), quiet=True)
    assert "on_bad=skip steps over bad records; `alula data check`" in (raised.value.remedy or "")
    check(recipe(**options, on_bad="skip"))
    assert train(recipe(**options, on_bad="skip"), quiet=True).stages[0].steps == 2
    with pytest.raises(UsageError, match=r"another recipe: stages\.0\.on_bad was 'skip', now 'fail'"):
        check(recipe(**options))
    with pytest.raises(DataError, match="1 of 4 cannot be learnt from"):  # no other recipe's any more
        check(recipe(**options), resume=False)


def test_a_stage_of_warm_up_alone_says_so(recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    made = recipe(**{**FULL, "steps": 1})
    train(made)
    said = " ".join(capfd.readouterr().err.split())
    assert "all its 1 steps are warm-up, and the first is at rate 0; schedule.warmup: 0 leaves it out" in said
    assert rows(Path(made.output_dir))[0]["lr"] == {"llm": 0.0, "projector": 0.0}


def test_an_empty_list_is_told_in_plain_words(plain: Any) -> None:
    with pytest.raises(RecipeError, match="stages: at least 1 is wanted here, not 0"):
        parse_recipe({**plain(), "stages": []})
    with pytest.raises(RecipeError, match=r"host\.path: a text is wanted here, got 1"):
        parse_recipe({**plain(), "host": {"path": 1}})
