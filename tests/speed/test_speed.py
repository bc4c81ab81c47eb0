"""`alula speed` on a tiny random host: what its figures are, that it goes on where it was, what it says and refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import alula
from alula.cli import app as cli
from alula.errors import DataError, HostError, UsageError
from alula.evaluation import Decoding, data_task, evaluate
from alula.inputs import Intake
from alula.policies import Prune, Skip, Withdraw, read_policies
from alula.settings import budget_of
from alula.speed import (
    Part,
    Plan,
    Row,
    Speed,
    Spread,
    default_grid,
    frontier,
    measure,
    read_grid,
    recommend,
    save_recommended,
    speed_report,
    speed_table,
    warnings,
)
from alula.stats import Estimate
from tests.hosts import tiny
from tests.hosts.qwen import written

LOAD = alula.load_model


def row(speed: Speed, name: str) -> Row:
    return next(each for each in speed.rows if each.name == name)


def one_policy(folder: Path) -> Path:
    """A grid of one."""
    file = folder / "one.yaml"
    file.write_text("alula_policies: {mine: {policy_type: withdraw, layer: 1}}")
    return file


def invented(speed: Speed, **rows: tuple[float, float]) -> Speed:
    """A measurement with rows of these times and agreements."""
    made = [
        Row(
            name=name,
            policies=[Withdraw(layer=1).to_dict()],
            prefill=Spread.of([time]),
            step=Spread.of([1.0]),
            answer=Spread.of([time]),
            cache=1.0,
            parts={"all": Part(n=100, agreement=Estimate(agreement, agreement, agreement))},
        )
        for name, (time, agreement) in rows.items()
    ]
    return speed.model_copy(update={"rows": made})


# -- what the figures are ----------------------------------------------------------------------------------------------


def test_answers_are_those_that_an_evaluation_gets(small: tuple[Plan, Speed]) -> None:
    """Agreement and accuracy, against `evaluate` of the model with and without the policy on for good."""
    plan, speed = small
    assert plan.data is not None
    task = data_task(plan.data, images=plan.images, n=8)
    runs = []
    for policy in (None, Withdraw(layer=1)):
        model, processor = LOAD(plan.model)
        if policy is not None:
            policy.attach(model)
        run = evaluate(model, processor, [task], batch_size=3, max_new_tokens=3, decoding=Decoding())
        runs.append(next(iter(run.tasks.values())))
    whole = row(speed, "withdrawn").parts["all"]
    same = sum(a.answer == b.answer for a, b in zip(runs[0].items, runs[1].items, strict=True))
    assert whole.agreement.value == same / 8
    assert whole.right is not None
    assert whole.right.base.value == runs[0].accuracy
    assert whole.right.tuned.value == runs[1].accuracy


def test_what_is_counted_is_what_is_computed(small: tuple[Plan, Speed]) -> None:
    """Operations, keys and bytes by hand for a decoder of two layers, against those of the model without a policy."""
    plan, speed = small
    model, _ = LOAD(plan.model)
    text = model.config.text_config
    tokens, image = speed.prompt_tokens, speed.image_tokens
    assert image == 16
    width, kv = text.hidden_size, text.num_key_value_heads * text.hidden_size // text.num_attention_heads

    def layer(count: int) -> int:
        projected = 2 * count * width * (2 * width + 2 * kv) + 6 * count * width * text.intermediate_size
        return projected + 4 * count * count * width

    # the prompt of median length may differ by a token from the median of the even number of prompts
    counted = [layer(n) - layer(n - image) for n in (tokens, tokens + 1)]
    missing = (1 - (row(speed, "withdrawn").operations or 0)) * speed.host.operations
    assert any(missing == pytest.approx(each) for each in counted)
    assert row(speed, "withdrawn").kept == pytest.approx(0.5)
    assert row(speed, "pooled").kept == pytest.approx(0.5)
    assert row(speed, "both").kept == pytest.approx(0.75)
    per_token = 2 * 2 * kv * 4  # keys and values of two layers in float32
    assert speed.host.cache_bytes in (tokens * per_token, (tokens + 1) * per_token)
    assert 0 < speed.host.tower_share < 1


def test_easy_questions_are_those_that_pooling_gets_right(small: tuple[Plan, Speed]) -> None:
    _, speed = small
    for name in ("withdrawn", "pooled", "both"):
        parts = row(speed, name).parts
        assert parts.get("easy", Part(n=0, agreement=Estimate(0))).n + parts["hard"].n == parts["all"].n == 8
    hard = row(speed, "pooled").parts["hard"].right
    assert hard is not None
    assert hard.tuned.value == 0.0  # pooling is its own measure


def test_localization_and_reading_stand_apart(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    """By what the records say: `task`, `category` or the family of the microworld."""
    plan, _ = small
    records = json.loads(plan.data.read_text()) if plan.data is not None else []
    for record, label in zip(records, ["Spatial relation", "ocr", "OCR", *["color"] * 5], strict=True):
        record["category"] = label
        record.pop("family", None)
    file = tmp_path / "labelled.json"
    file.write_text(json.dumps(records))
    quick = {"grid": one_policy(tmp_path), "rounds": 1}
    speed = measure(plan.model_copy(update={"output": tmp_path / "out", "data": file, **quick}), LOAD)
    parts = row(speed, "mine").parts
    assert (parts["localization"].n, parts["reading"].n) == (1, 2)
    assert "Localization and reading" in speed_report(speed, {"agreement": 0.98})


def test_a_refused_policy_is_a_row_and_the_others_are_measured(small: tuple[Plan, Speed]) -> None:
    _, speed = small
    refused = row(speed, "outside")
    assert "layer" in refused.refused
    assert refused.answer is None
    assert [each.name for each in speed.rows if each.answer] == ["withdrawn", "pooled", "both"]
    assert refused.refused.split(":")[-1].strip() in speed_report(speed, {"agreement": 0.98}).replace("&#39;", "'")


def test_policies_that_the_model_was_saved_with_are_one_of_them(llava: Path, tmp_path: Path) -> None:
    loaded = LOAD(llava)
    Withdraw(layer=1).attach(loaded.model)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.processor.save_pretrained(tmp_path / "saved")
    plan = Plan(
        output=tmp_path / "out", model=str(tmp_path / "saved"), grid=one_policy(tmp_path), samples=1, rounds=1,
        timed=1, steps=2, max_new_tokens=2,
    )  # fmt: skip
    speed = measure(plan, LOAD)
    mine, saved = speed.rows
    assert saved.name == "as the model was saved"
    assert mine.operations == saved.operations < 1
    assert speed.conditions.policies == []
    assert speed.invented
    assert "drawn pictures" in speed_report(speed, {"agreement": 0.98})


def test_time_is_taken_of_as_many_tokens_whatever_they_are(llava: Path, tmp_path: Path) -> None:
    """All tokens of this model but one end an answer. A timed pass has a forward for each token nevertheless."""
    calls: list[int] = []

    def load(name: str) -> Any:
        loaded = watched(name, calls)
        loaded.model.generation_config.eos_token_id = list(range(1, loaded.model.config.text_config.vocab_size))
        return loaded

    plan = Plan(
        output=tmp_path / "out", model=str(llava), grid=one_policy(tmp_path), samples=2, rounds=1, timed=1, steps=5
    )
    speed = measure(plan, load)
    assert speed.host.answer_tokens == 1
    arms, count, answer = 2, 1 + 2, 1
    warm, plain, own = 5, 5, 5
    assert len(calls) == arms * (count + answer + warm + plain + own)


# -- going on ----------------------------------------------------------------------------------------------------------


def watched(name: str, calls: list[int]) -> Any:
    loaded = LOAD(name)
    loaded.model.register_forward_pre_hook(lambda *arguments: calls.append(1))
    return loaded


def test_a_finished_measurement_runs_no_model_again(small: tuple[Plan, Speed]) -> None:
    plan, speed = small
    calls: list[int] = []
    again = measure(plan, lambda name: watched(name, calls))
    assert not calls
    assert again.rows == speed.rows
    other = measure(plan.model_copy(update={"budget": {"retention": 0.5}}), lambda name: watched(name, calls))
    assert not calls
    assert other.rows == speed.rows


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_measurement_goes_on(small: tuple[Plan, Speed], tmp_path: Path, share: float) -> None:
    """What a kill leaves is the file up to some byte; of what is whole nothing is done again."""
    plan, speed = small
    (tmp_path / "plan.json").write_bytes((plan.output / "plan.json").read_bytes())
    content = (plan.output / "measured.jsonl").read_bytes()
    cut = content[: int(share * len(content))]
    (tmp_path / "measured.jsonl").write_bytes(cut)
    calls: list[int] = []
    again = measure(plan.model_copy(update={"output": tmp_path}), lambda name: watched(name, calls))
    assert (tmp_path / "measured.jsonl").read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])
    assert calls
    for one, other in zip(again.rows, speed.rows, strict=True):
        assert (one.name, one.operations, one.parts, one.cache_bytes) == (
            other.name, other.operations, other.parts, other.cache_bytes
        )  # fmt: skip


@pytest.mark.parametrize("change", ["model", "data", "grid", "weights"])
def test_another_measurement_is_not_mixed_in(small: tuple[Plan, Speed], tmp_path: Path, change: str) -> None:
    plan, _ = small

    def load(name: str) -> Any:
        loaded = LOAD(plan.model)
        if change == "weights":
            with torch.no_grad():
                loaded.model.lm_head.weight.mul_(2)
        return loaded

    other = {"model": {"model": "other"}, "data": {"data": tmp_path}, "grid": {"grid": one_policy(tmp_path)}}
    with pytest.raises(UsageError, match=r"other weights" if change == "weights" else f"{change} was"):
        measure(plan.model_copy(update=other.get(change, {})), load)


def test_a_picture_that_changed_is_not_mixed_in(small: tuple[Plan, Speed]) -> None:
    plan, _ = small
    assert plan.images is not None
    first = sorted(plan.images.iterdir())[0]
    before = first.read_bytes()
    try:
        first.write_bytes(sorted(plan.images.iterdir())[1].read_bytes())
        with pytest.raises(UsageError, match="other questions, pictures"):
            measure(plan, LOAD)
    finally:
        first.write_bytes(before)


# -- smaller pictures --------------------------------------------------------------------------------------------------


def test_pictures_of_fewer_pixels_are_rows_where_a_processor_obeys(tmp_path: Path) -> None:
    """Answers are those to pictures that somebody else made smaller, and count as down-sampling's do: easy and hard."""
    model = written(tmp_path / "qwen", "qwen2_5_vl")
    records: dict[str, list[Any]] = {"whole": [], "quarter": []}
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        for name, size in (("whole", 64), ("quarter", 32)):
            file = tmp_path / f"{name}-{number}.png"
            picture.resize((size, size), Image.Resampling.BICUBIC).save(file)
            said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
            records[name].append({"id": str(number), "image": file.name, "conversations": said})
    for name, each in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    plan = Plan(
        output=tmp_path / "out",
        model=str(model),
        data=tmp_path / "whole.json",
        images=tmp_path,
        samples=4,
        rounds=1,
        timed=1,
        steps=2,
        batch_size=3,
        max_new_tokens=3,
    )
    speed = measure(plan, LOAD)
    smaller = [each for each in speed.rows if each.pixels < 1]
    assert [each.name for each in smaller] == [f"pictures of {share} % of the pixels" for share in (50, 25, 11)]
    assert not any(each.policies or each.refused for each in smaller)
    kept = [each.kept for each in smaller]
    assert kept[1] == 0.25  # 16 of 64 tokens
    assert 0.25 < kept[0] <= 0.5  # type: ignore[operator]
    assert 0 < kept[2] <= 0.11  # type: ignore[operator]
    quarter = smaller[1]
    assert quarter.operations is not None
    assert quarter.operations < row(speed, "pooling to 25 %").operations  # type: ignore[operator]  # the tower's, too
    runs = []
    for name in records:
        task = data_task(tmp_path / f"{name}.json", images=tmp_path, n=4)
        runs.append(evaluate(*LOAD(str(model)), [task], batch_size=3, max_new_tokens=3))
    before, after = (next(iter(run.tasks.values())).items for run in runs)
    same = sum(a.answer == b.answer for a, b in zip(before, after, strict=True))
    assert quarter.agreement == same / 4
    _, *noted = map(json.loads, (plan.output / "measured.jsonl").read_text().splitlines())
    batches = [line["value"] for line in noted if line["key"].startswith(f"answers/{quarter.name}")]
    assert sorted(answer["text"] for batch in batches for answer in batch) == sorted(each.answer for each in after)
    calls: list[int] = []
    assert measure(plan, lambda name: watched(name, calls)).rows == speed.rows
    assert not calls


def test_a_host_of_one_size_has_no_such_rows(llava: Path) -> None:
    assert not Intake(LOAD(str(llava)).processor).sizes_are_obeyed
    assert not any(each.pixels < 1 for each in default_grid(4, 576))


def test_smaller_pictures_that_do_better_are_told_and_not_saved(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    speed = invented(small[1], policy=(0.8, 1.0), pictures=(0.6, 0.99))
    first, second = speed.rows
    speed = speed.model_copy(update={"rows": [first, second.model_copy(update={"pixels": 0.25, "policies": []})]})
    found = recommend(speed, {"agreement": 0.98})
    assert found.row is not None
    assert found.row.name == "policy"
    assert found.says[-1].startswith("'pictures' do without a policy, agreement 99")
    assert "max_pixels" in found.says[-1]
    assert save_recommended(found, tmp_path / "policies.json") is not None
    alone = speed.model_copy(update={"rows": speed.rows[1:]})
    assert save_recommended(recommend(alone, {"agreement": 0.98}), tmp_path / "policies.json") is None
    assert "max_pixels" in recommend(alone, {"agreement": 0.98}).says[-1]
    assert "max_pixels" not in " ".join(recommend(speed, {"agreement": 0.995}).says)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_cheapest_within_the_budget_is_recommended_and_loads(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    speed = invented(small[1], slow=(0.9, 1.0), quick=(0.7, 0.98), wrong=(0.3, 0.5), slower=(1.2, 1.0))
    found = recommend(speed, {"agreement": 0.98})
    assert found.row is not None
    assert found.row.name == "quick"
    assert recommend(speed, {"agreement": 0.99}).row.name == "slow"  # type: ignore[union-attr]
    file = save_recommended(found, tmp_path / "policies.json")
    assert file is not None
    assert read_policies(file) == {"withdraw": Withdraw(layer=1)}
    loaded = alula.load_model(small[0].model, policies=file)
    assert "withdraw" in loaded.model.config.alula_policies


def test_where_nothing_meets_the_budget_the_nearest_is_named_and_nothing_written(
    small: tuple[Plan, Speed], tmp_path: Path
) -> None:
    speed = invented(small[1], near=(0.9, 0.9), far=(0.5, 0.2), slower=(1.2, 1.0))
    found = recommend(speed, {"agreement": 0.98})
    assert found.row is None
    assert found.nearest is not None
    assert found.nearest.name == "near"
    (tmp_path / "policies.json").write_text("of an earlier budget")
    assert save_recommended(found, tmp_path / "policies.json") is None
    assert not list(tmp_path.iterdir())
    slow = recommend(invented(small[1], slower=(1.2, 1.0)), {"agreement": 0.98})
    assert (slow.row, slow.nearest) == (None, None)
    assert "faster" in slow.says[0]
    # nothing is known of right answers: no policy keeps any
    assert recommend(speed, {"accuracy": 0.1}).row is None


def test_several_policies_are_saved_together(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    both = row(small[1], "both")
    speed = invented(small[1], both=(0.5, 1.0))
    speed = speed.model_copy(update={"rows": [speed.rows[0].model_copy(update={"policies": both.policies})]})
    file = save_recommended(recommend(speed, {"agreement": 0.98}), tmp_path / "policies.json")
    assert file is not None
    assert read_policies(file) == {"prune": Prune(stages=((1, 0.5),)), "skip": Skip(part="mlp", layers=(1,))}


def test_the_frontier_is_what_nothing_dominates(small: tuple[Plan, Speed]) -> None:
    speed = invented(small[1], a=(0.3, 0.5), b=(0.4, 0.4), c=(0.5, 0.9), d=(0.6, 0.9), e=(1.1, 1.0))
    assert [each.name for each in frontier(speed.rows)] == ["a", "c", "e"]


def test_it_warns_where_a_policy_cannot_pay(small: tuple[Plan, Speed]) -> None:
    speed = invented(small[1], slow=(1.2, 1.0), fast=(0.5, 1.0))

    def said(**changes: Any) -> str:
        return "\n".join(warnings(speed.model_copy(update=changes))).replace("\N{NO-BREAK SPACE}", " ")

    assert "Slower here than the model without a policy: slow." in said()
    long = {"image_tokens": 600, "prompt_tokens": 650}
    host = speed.host.model_copy(update={"decode_share": 0.2, "tower_share": 0.1})
    assert said(**long, host=host, rows=[]) == ""
    assert "one at a time" in said(settings={**speed.settings, "batch_size": 1})
    assert "80 % of their time behind the prompt" in said(host=host.model_copy(update={"decode_share": 0.8}))
    assert "mostly text" in said(image_tokens=100, prompt_tokens=300)
    assert "16 image tokens each" in said()
    assert "accelerator mostly waits" in said(**long, is_accelerated=True)
    assert "vision tower's" in said(host=host.model_copy(update={"tower_share": 0.5}))


def test_the_report_stands_alone(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    speed = Speed.load(small[1].save(tmp_path / "speed.json"))
    for budget in ({"agreement": 0.98}, {"agreement": 0.01, "accuracy": 0.01}):
        html = speed_report(speed, budget)
        assert not re.search(r'(src|href)="(?!#|data:)', html)
        assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()
        for each in speed.rows:
            assert each.name in html


# -- grids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (2, 4), (4, 16), (32, 576), (80, 2880)])
def test_the_default_grid_fits_any_depth(layers: int, tokens: int) -> None:
    grid = default_grid(layers, tokens)
    names = [each.name for each in grid]
    assert len(set(names)) == len(names)
    assert (len(grid) > 12) == (layers >= 4)
    for each in grid:
        for policy in each.policies:
            if isinstance(policy, Withdraw):
                assert 0 < policy.layer < layers
            if isinstance(policy, Prune):
                assert all(0 <= layer < layers for layer, _ in policy.stages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alula_policies: {a: {policy_type: withdrawal}}", "no policy of type 'withdrawal'"),
        ("alula_policies: {a: {policy_type: withdraw, layers: 1}}", "unknown key"),
        ("alula_policies: {a: 3}", "neither the settings of a policy"),
        ("alula_policies: {a: []}", "neither the settings of a policy"),
        ("alula_policies: {}", "is not a file of policies"),
        ("policies: {a: {policy_type: withdraw, layer: 1}}", "is not a file of policies"),
        ("alula_policies: [", "not valid YAML"),
        (
            "alula_policies: {a: {policy_type: withdraw, layer: 1}, a: {policy_type: withdraw, layer: 2}}",
            "'a' appears twice",
        ),
    ],
)
def test_a_grid_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_grid(tmp_path / "grid.yaml")


def test_a_file_of_policies_is_a_grid(tmp_path: Path) -> None:
    file = alula.policies.save_policies({"mine": Withdraw(layer=1)}, tmp_path / "policies.json")
    assert [(each.name, each.policies) for each in read_grid(file)] == [("mine", (Withdraw(layer=1),))]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agrement:0.9", "did you mean agreement"),
        ("speed:0.9", "there is no 'speed'"),
        ("agreement", "not NAME:SHARE"),
        ("agreement:all", "not NAME:SHARE"),
        ("agreement:0.9,agreement:0.8", "given twice"),
        ("agreement:98", "of 1 at most, not 98"),
        ("agreement:nan", "finite"),
    ],
)
def test_a_budget_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(output=Path("out"), model="model", budget=budget_of(text))
    assert budget_of(" agreement:0.98, accuracy:.5") == {"agreement": 0.98, "accuracy": 0.5}


def _text_llm(path: Path) -> None:
    tiny.decoder("llama", seed=1).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)


def test_a_model_without_images_is_refused(tmp_path: Path) -> None:
    _text_llm(tmp_path / "llm")
    with pytest.raises(HostError, match="takes no images"):
        measure(Plan(output=tmp_path / "out", model=str(tmp_path / "llm")), LOAD)
    assert not (tmp_path / "out").exists()


def test_data_without_images_is_refused(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    plan = small[0].model_copy(update={"output": tmp_path / "out", "data": file, "images": None})
    with pytest.raises(DataError, match="no conversation shows an image"):
        measure(plan, LOAD)
    assert not (tmp_path / "out").exists()


def test_right_answers_cannot_be_asked_for_where_none_are_known(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    plan, _ = small
    assert plan.data is not None
    records = json.loads(plan.data.read_text())[:2]
    for record in records:
        del record["conversations"][-1]
    file = tmp_path / "unanswered.json"
    file.write_text(json.dumps(records))
    asked = {"output": tmp_path / "out", "data": file, "grid": one_policy(tmp_path), "rounds": 1}
    with pytest.raises(UsageError, match="none are known"):
        measure(plan.model_copy(update={**asked, "budget": {"accuracy": 0.5}}), LOAD)
    speed = measure(plan.model_copy(update=asked), LOAD)
    assert (speed.n, speed.answered, speed.host.accuracy) == (2, 0, None)
    assert set(row(speed, "mine").parts) == {"all"}
    assert "right" not in str(speed_table(speed).caption)
    assert "right" not in {cell.split("<")[0] for cell in speed_report(speed, plan.budget).split('<th scope="col">')}


def test_questions_that_do_not_fit_are_passed_over(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    plan = small[0].model_copy(update={"output": tmp_path / "out", "max_new_tokens": 512})
    with pytest.raises(DataError, match="leaves room for an answer"):
        measure(plan, LOAD)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_not_there_is_passed_over(small: tuple[Plan, Speed], tmp_path: Path) -> None:
    plan, _ = small
    assert plan.data is not None
    records = json.loads(plan.data.read_text())[:3]
    records[1]["image"] = "nowhere.png"
    file = tmp_path / "lost.json"
    file.write_text(json.dumps(records))
    asked = {"output": tmp_path / "out", "data": file, "grid": one_policy(tmp_path), "rounds": 1}
    speed = measure(plan.model_copy(update=asked), LOAD)
    assert (speed.n, speed.unusable, speed.passed_over) == (2, 1, "1 unusable")


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["alula", "speed", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_goes_on_and_writes_all(
    small: tuple[Plan, Speed], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = small
    arguments = [
        plan.model, "--data", plan.data, "--images", plan.images, "--grid", plan.grid, "--output", plan.output,
        "--items", 8, "--rounds", 2, "--timed", 1, "--steps", 2, "--batch-size", 3, "--max-new-tokens", 3,
    ]  # fmt: skip
    assert command(monkeypatch, *arguments, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["n"] == 8
    assert "report:" in said.err
    assert {"speed.json", "report.html"} <= {path.name for path in plan.output.iterdir()}
    assert command(monkeypatch, *arguments, "--budget", "agrement:0.9") == 2
    assert "did you mean agreement" in " ".join(capsys.readouterr().err.split())
    assert command(monkeypatch, *arguments, "--seed", 1) == 2
    assert "seed was 0, now 1" in " ".join(capsys.readouterr().err.split())


def test_a_model_of_the_fledgling_is_asked_the_microworlds_questions(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = alula.build_host("fledgling", "fledgling")
    alula.save_host(alula.hosts.Host(model, processor), tmp_path / "host")
    arguments = ["--grid", one_policy(tmp_path), "--items", 6, "--rounds", 1, "--timed", 1, "--steps", 2]
    assert command(monkeypatch, tmp_path / "host", *arguments, "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "mine" in said.out
    assert "same: whole answers as without it; right: right answers" in said.out
    speed = Speed.load(tmp_path / "out" / "speed.json")
    assert (speed.n, speed.answered, speed.invented) == (6, 6, False)
    assert "visual skill" in speed.source
