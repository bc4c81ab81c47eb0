"""Stages of browse-and-concentrate: what they train, what is read and told, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import alula
from alula.cli.app import main
from alula.data import Collator, open_file, open_source
from alula.data.conditions import Conditions
from alula.data.samples import BROWSED
from alula.errors import AlulaError, DataError, RecipeError
from alula.grafts import BrowseConfig, read_conditions
from alula.hosts import load_host
from alula.training import train
from alula.training.browsing import Browsing, browse_data, prompt_of, settle
from alula.training.metrics import read_rows
from tests.grafts.common import wake
from tests.training.conftest import MakeRecipe
from tests.training.test_mks2 import Hashes

RATES = {"browse.condition": 1e-2, "projector": 1e-2}
CAPTIONS = {
    "name": "captions",
    "method": "browse",
    "train": RATES,
    "browse": {"zero": 0.3, "bias": True},
    "data": {"sources": [{"microworld": "pictures_caption"}]},
}
ANSWERS = {
    "name": "answers",
    "method": "browse",
    "browse": {"zero": 0, "drop": ["last", "blank"]},
    "data": {"sources": [{"microworld": "pictures"}]},
}
SEVERAL = {"microworld": "pictures", "limit": 12}


@pytest.fixture(scope="module")
def host(host_directory: Path) -> Any:
    return load_host(host_directory)


def test_each_stage_changes_what_it_trains_and_nothing_else(recipe: MakeRecipe) -> None:
    hashes = Hashes()
    made = recipe(stages=[CAPTIONS, {**ANSWERS, "train": {"browse.condition": 1e-2, "llm": 1e-2}}])
    result = train(made, callbacks=[hashes])
    for changed, parts in zip(
        hashes.changed,
        [{"alula.browse.", "multi_modal_projector"}, {"alula.browse.", "language_model."}],
        strict=True,
    ):
        own = {name for name in hashes.names if any(part in name for part in parts)}
        assert {name for name in changed if "lm_head" not in name} == own  # the head is tied
    model, _ = alula.load_model(str(result.final))
    (graft,) = alula.grafts_of(model).values()
    assert graft.config == BrowseConfig(bias=True)


def test_the_recipe_that_comes_with_alula_trains(recipe: MakeRecipe, host_directory: Path, tmp_path: Path) -> None:
    from alula.training import load_recipe

    changes = [f"host.path={host_directory}", f"output_dir={tmp_path / 'run'}"]
    changes += [f"stages.{name}.{key}" for name in ("captions", "answers") for key in ("steps=1", "batch_size=4")]
    made = load_recipe(Path(__file__).parents[2] / "recipes" / "browse.yaml", changes)
    assert made.stages[0].settings.zero == 0.15
    assert made.stages[1].settings.zero == 0
    assert (train(made, quiet=True).final / "adapter_config.json").is_file()


def batch(host: Any, *, source: dict[str, Any] = SEVERAL, zero: float = 0.0, **options: Any) -> tuple[Any, Any]:
    """Samples, and the batch that training is given of them."""
    prompts = Collator(host.processor, train=False)
    browsing = Browsing(prompts, **{"ways": (), "zero": zero, "conditions": None, "seed": 3, **options})
    samples = [open_source(source)[index] for index in range(8)]
    for position, sample in enumerate(samples):
        sample.position = position
    return samples, Collator(host.processor, beside=browsing)(samples)


def test_conditions_are_of_the_whole_conversation_whatever_is_left_out(host: Any) -> None:
    samples, given = batch(host, ways=("last", "blank"))
    prompts = Collator(host.processor, train=False)([prompt_of(sample) for sample in samples])
    expected = read_conditions(host.model, prompts)
    inputs = dict(given)
    settle(host.model, inputs)
    torch.testing.assert_close(inputs["conditions"], expected)
    whole = sum(len(sample.images) for sample in samples)
    assert len(given["pixel_values"]) < whole == len(given[BROWSED]["pixel_values"])
    assert all(BROWSED not in name for name in inputs)


def test_captions_are_told_what_their_record_names(host: Any) -> None:
    source = {"microworld": "pictures_caption"}
    samples, given = batch(host, source=source, zero=0.5)
    told = given[BROWSED]["told"][:, 0].tolist()
    assert {*told} == {0.0, 1.0}
    inputs = dict(given)
    settle(host.model, inputs)
    asked = [prompt_of(sample) for sample in samples]
    assert all(
        len(each.images) > 1 and "picture" in each.messages[0]["content"][-1]["text"].lower() for each in asked[:2]
    )
    expected = read_conditions(host.model, Collator(host.processor, train=False)(asked)) * torch.tensor(told)[:, None]
    torch.testing.assert_close(inputs["conditions"], expected)
    assert len(given["pixel_values"]) == 8


def test_where_all_is_read_as_it_stands_the_forward_reads_it(host: Any) -> None:
    _, given = batch(host)
    assert BROWSED not in given
    learnt = (given["labels"] != -100).int().argmax(dim=1)
    assert torch.equal(given["prompt_ends"], learnt - 1)


def test_a_file_of_conditions_stands_for_reading(host: Any, tmp_path: Path) -> None:
    """Explicit equals implicit, with one browser."""
    file = browse_data(host.model, host.processor, open_source(SEVERAL), tmp_path / "c", batch_size=5)
    stored = Conditions.load(file, width=host.model.config.text_config.hidden_size)
    _, explicit = batch(host, conditions=stored, zero=0.3, ways=("last",))
    _, implicit = batch(host, zero=0.3, ways=("last",))
    inputs = dict(implicit)
    settle(host.model, inputs)
    torch.testing.assert_close(explicit["conditions"], inputs["conditions"], atol=1e-5, rtol=1e-4)
    wake(alula.attach(host.model, BrowseConfig()))
    try:
        for name in ("labels",):
            inputs.pop(name), explicit.pop(name)
        told, read = host.model(**explicit).logits, host.model(**inputs).logits
        torch.testing.assert_close(told, read, atol=1e-4, rtol=1e-3)
    finally:
        alula.detach(host.model)


def test_trained_with_a_file_and_without_the_first_loss_is_one(recipe: MakeRecipe, host: Any, tmp_path: Path) -> None:
    file = browse_data(host.model, host.processor, open_source(SEVERAL), tmp_path / "c")
    stage = {**ANSWERS, "train": RATES, "data": {"sources": [SEVERAL]}}
    rows = []
    for conditions in (None, str(file)):
        made = recipe(stages=[{**stage, "browse": {"drop": ["last"], "conditions": conditions}}], steps=2)
        rows.append(read_rows(train(made, resume=False, quiet=True).directory / "metrics.jsonl"))
    # read once before training and at every step: the frozen decoder holds the same
    for implicit, explicit in zip(*rows, strict=True):
        assert implicit["loss"] == pytest.approx(explicit["loss"], rel=1e-3)


def test_records_name_what_is_read_for_them(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    picture = {"type": "image", "image": "a.png"}
    record = {
        "messages": [
            {"role": "user", "content": [picture, {"type": "text", "text": "Describe it."}]},
            {"role": "assistant", "content": "black"},
        ],
        "browsed": [{"role": "user", "content": [picture, picture, {"type": "text", "text": "Which is darker?"}]}],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    sample = open_file(tmp_path / "data.jsonl")[0]
    assert len(prompt_of(sample).images) == 2
    assert len(sample.images) == 1
    record["browsed"] = [{"role": "user", "content": 3}]
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(AlulaError, match="jsonl"):
        open_file(tmp_path / "data.jsonl")[0]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"browse": {"drop": []}}, "drop is empty"),
        ({"browse": {"drop": ["middle"]}}, "no way to leave out context"),
        ({"browse": {"drop": ["last", "last"]}}, "listed twice"),
        ({"browse": {"zero": 1}}, "zero"),
        ({"browse": {"gate": 1}}, "gate"),
        ({"train": {"projector": 1e-3}}, "browse.condition"),
    ],
)
def test_settings_that_mean_nothing_are_refused(recipe: MakeRecipe, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(stages=[{**ANSWERS, "train": RATES, **stage}])


def test_files_of_conditions_are_checked_before_anything_runs(recipe: MakeRecipe, host: Any, tmp_path: Path) -> None:
    stage = {**ANSWERS, "train": RATES}
    with pytest.raises(DataError, match="no such file"):
        train(recipe(stages=[{**stage, "browse": {"conditions": str(tmp_path / "none")}}]), quiet=True)
    file = browse_data(host.model, host.processor, open_source(SEVERAL), tmp_path / "c", n=2)
    made = recipe(stages=[{**stage, "browse": {"conditions": str(file)}, "data": {"sources": [SEVERAL]}}])
    with pytest.raises(DataError, match="no condition of"):
        train(made, quiet=True)


def test_the_command_reads_data_into_a_file(
    host_directory: Path,
    host: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "c.safetensors"

    def run(data: str) -> object:
        arguments = ["alula", "browse", str(host_directory), data, "--output", str(file), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    assert run("microworld:pictures,limit=5") in (0, None)
    assert "5 conditions of width 32" in " ".join(capsys.readouterr().out.split())
    prompts = [prompt_of(open_source(SEVERAL)[index]) for index in range(5)]
    expected = read_conditions(host.model, Collator(host.processor, train=False)(prompts))
    torch.testing.assert_close(Conditions.load(file).of(prompts), expected, atol=1e-5, rtol=1e-4)
    for wrong in ("microworld:pictures", "nothing", "microworld:pictures,limit"):
        assert run(wrong) not in (0, None)
