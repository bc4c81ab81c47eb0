"""Recipes: what is legal, and how a mistake is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from alula.errors import RecipeError
from alula.training import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_schema
from alula.training.methods import METHODS

GOOD = """\
name: two-stages
output_dir: runs/two
host:
  llm: fledgling
  vision: fledgling
stages:
  - name: align
    method: projector
    train: {projector: 1e-3}
    data:
      sources:
        - {microworld: caption}
    steps: 10
  - name: wings
    method: wings
    train: {wings: 2e-3, projector: 1e-4}
    wings: {rank: 16, router: mass}
    data:
      sources:
        - {microworld: visual, weight: 3}
        - {microworld: caption}
      text_replay:
        ratio: 0.25
        sources: [{microworld: text}]
    steps: 20
    batch_size: 16
    micro_batch_size: 4
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_recipe_survives_being_written_and_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD + "validation: {sources: [{microworld: caption}]}\n"))
    assert recipe.stages[0].learning_rates == {"projector": 1e-3}
    assert recipe.stages[1].learning_rates == {
        "wings.visual": 2e-3,
        "wings.textual": 2e-3,
        "wings.router": 2e-3,
        "projector": 1e-4,
    }
    assert recipe.stages[1].wings is not None
    assert recipe.stages[1].wings.rank == 16
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_writes_of_a_finished_host_is_read_back(
    plain: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    recipe = parse_recipe(plain(method=method, train={}, distill={"prompts": {"microworld": "text"}}))
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_methods_have_default_rates_and_frozen_models_cannot_be_changed(plain: Callable[..., Any]) -> None:
    recipe = parse_recipe(plain(method="lora", train={}))
    assert recipe.stages[0].learning_rates == {"lora": 2e-4, "projector": 2e-5}
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].steps = 5


@pytest.mark.parametrize("train", [{}, {"wings": 1e-3}, {"wings": 1e-3, "projector": 1e-3}])
def test_a_single_learner_has_no_router_to_train(plain: Callable[..., Any], train: dict[str, float]) -> None:
    recipe = parse_recipe(plain(method="wings", train=train, wings={"learners": ["visual"]}))
    assert set(recipe.stages[0].learning_rates) - {"projector"} == {"wings.visual"}


# (what replaces what in the good recipe, what the error must say)
MISTAKES = [
    ("method: projector", "method: projecter", ["stages.0.method (line", "did you mean `projector`?"]),
    ("    steps: 10", "    stpes: 10", ["stages.0.stpes (line 13): unknown key; did you mean `steps`?", "epochs"]),
    ("weight: 3", "wieght: 3", ["stages.1.data.sources.0.wieght", "did you mean `weight`?", "families"]),
    ("rank: 16", "rnak: 16", ["stages.1.wings.rnak", "did you mean `rank`?", "router"]),
    ("rank: 16", "rank: 0", ["stages.1.wings.rank (line 17): input should be greater than or equal to 1, got 0"]),
    ("router: mass", "router: mess", ["stages.1.wings.router", "'attention', 'mass' or 'constant'", "'mess'"]),
    ("microworld: text}", "microword: text}", ["stages.1.data.text_replay.sources.0", "jsonl, llava, dataset"]),
    ("steps: 10", "steps: ten", ["stages.0.steps (line 13)", "whole number", "'ten'"]),
    ("steps: 10", "steps: 2.5", ["stages.0.steps", "whole number"]),
    ("steps: 10", "steps: -1", ["stages.0.steps", "greater than or equal to 1", "got -1"]),
    ("steps: 10", "steps: 18446744073709551616", ["stages.0.steps (line 13)", "less than or equal to 2147483647"]),
    ("steps: 10", "steps: 10\n    betas: [0.9, 1.0]", ["stages.0.betas.1 (line 14)", "less than 1", "got 1.0"]),
    ("steps: 10", "steps: 10\n    weight_decay: '0.1'", ["stages.0.weight_decay", "a number is wanted here, not text"]),
    ("steps: 10", "steps: 10\n    data: 5", ["not valid YAML", "'data' appears twice"]),
    ("output_dir: runs/two", "output_dir: ''", ["output_dir (line 2)", "at least 1 character"]),
    ("weight: 3", "weight: true", ["stages.1.data.sources.0.weight", "not true or false"]),
    ("weight: 3", "limit: '3'", ["stages.1.data.sources.0.limit", "a whole number is wanted here, got '3'"]),
    ("rank: 16", "rank: '8'", ["stages.1.wings.rank (line 17): a whole number is wanted here, got '8'"]),
    ("rank: 16", "rank: true", ["stages.1.wings.rank (line 17)", "a whole number is wanted here, got True"]),
    ("rank: 16", "rank: 100000000", ["stages.1.wings.rank (line 17): input should be less than or equal to 65536"]),
    ("rank: 16", "init_std: -3", ["stages.1.wings.init_std (line 17)", "greater than 0", "got -3"]),
    ("rank: 16", "gain: -1", ["stages.1.wings.gain", "got -1"]),
    ("rank: 16", "gain: .nan", ["stages.1.wings.gain", "finite number"]),
    ("rank: 16", "rope: 'no'", ["stages.1.wings.rope (line 17): true or false is wanted here, got 'no'"]),
    ("rank: 16", "layers: []", ["stages.1.wings.layers (line 17): it is empty"]),
    ("rank: 16", "learners: 5", ["stages.1.wings.learners (line 17): a list is wanted here"]),
    ("rank: 16", "system_tokens: 3", ["stages.1.wings.system_tokens", "only for compat"]),
    ("wings: {rank: 16, router: mass}", "wings: 5", ["stages.1.wings (line 17): a mapping is wanted here", "router"]),
    ("micro_batch_size: 4", "prefix: {init_std: 1e30}", ["stages.1.prefix.init_std", "less than or equal to 10"]),
    ("micro_batch_size: 4", "lora: {rank: 100000000}", ["stages.1.lora.rank", "less than or equal to 65536"]),
    ("steps: 10", "log_every: 5", ["stages.0", "`steps` or `epochs`"]),
    ("steps: 10", "steps: 10\n    epochs: 1", ["stages.0", "`steps` or `epochs`"]),
    ("projector: 1e-3", "projector: -1e-3", ["stages.0.train.projector", "greater than 0", "got -0.001"]),
    ("projector: 1e-3", "projector: true", ["stages.0.train.projector", "not true or false"]),
    (
        "method: projector",
        "method: adapter",
        ["stages.0.method", "'experts', 'mks2', 'aim', 'browse', 'universal' or 'teal'"],
    ),
    ("{projector: 1e-3}", "{llm: 1e-5}", ["stages.0", "`projector` freezes `llm`", "it trains `projector`"]),
    ("{projector: 1e-3}", "{projectr: 1e-5}", ["does not know `projectr`"]),
    ("{wings: 2e-3, projector: 1e-4}", "{projector: 1e-4}", ["stages.1", "without the part `wings.*`"]),
    ("        sources: [{microworld: text}]\n", "", ["stages.1.data.text_replay.sources", "required"]),
    ("ratio: 0.25", "ratio: 1.0", ["stages.1.data.text_replay.ratio", "less than 1"]),
    ("micro_batch_size: 4", "micro_batch_size: 5", ["5 does not divide batch_size 16"]),
    ("micro_batch_size: 4", "lora: {rank: 4}", ["`lora` configures method lora", "method is wings"]),
    ("runs/two", "runs/two\ntemplate: {date: soon}", ["template (line 3): ", "date: 'soon' is no date"]),
    ("runs/two", "runs/two\ntemplate: {messages: []}", ["messages: is not a setting"]),
    ("micro_batch_size: 4", "schedule: {kind: cosin}", ["stages.1.schedule.kind", "'constant', 'linear' or 'cosine'"]),
    ("micro_batch_size: 4", "schedule: {warmup: 2.5}", ["stages.1.schedule", "whole number of steps"]),
    ("  vision: fledgling\n", "", ["host (line 3)", "either `path`"]),
    ("  llm: fledgling\n", "  llm: fledgling\n  path: there\n", ["`path` takes a finished host", "`llm` and `vision`"]),
    ("name: wings\n", "name: align\n", ["`align` is used twice"]),
    ("name: align", "name: a/b", ["stages.0.name"]),
    ("name: two-stages\n", "", ["name (line 1): this key is required"]),
    ("steps: 20", "steps: 20\n    steps: 30", ["not valid YAML", "'steps' appears twice"]),
    ("stages:", "stages: [", ["not valid YAML"]),
]


@pytest.mark.parametrize(("old", "new", "told"), MISTAKES, ids=[str(new).strip()[:30] for _, new, _ in MISTAKES])
def test_a_mistake_is_told_with_file_key_and_what_is_legal(tmp_path: Path, old: str, new: str, told: list[str]) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    for part in told:
        assert part in text
    assert "pydantic" not in text
    assert "after validation" not in text  # nor what pydantic counts as missing because it is wrong
    assert caught.value.exit_code == 2


# what YAML can do to a reader, and what must be said
UNREADABLE = {
    "anchors that multiply": (
        "a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in pairwise("abcdefgh")),
        "more than 20,000 values",
    ),
    "an anchor inside itself": ("a: &a [1, *a]", "an anchor that holds itself"),
    "anchors that dig": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}}}\n" for n in range(1, 1500)),
        "nested deeper than 50 levels",
    ),
    "deep lists": ("[" * 3000 + "]" * 3000, "nested deeper than 50 levels"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, "nested deeper than 50 levels"),
    "a list for a key": ("? [a, b]\n: c", "a list or mapping cannot be a key"),
    "a mapping for a key": ("stages: [{train: {? {a: b} : 1}}]", "a list or mapping cannot be a key"),
    "no date": ("name: 2024-13-45", "month must be in 1..12"),
    "no timestamp": ("name: !!timestamp zz", "not valid YAML"),
    "a number without end": ("steps: " + "9" * 5000, "not valid YAML"),
    "a number nobody writes": ("steps: 0x" + "f" * 4000, "a number of 16000 bits"),
    "a huge file": ("a: [" + "1," * 150_000 + "]", "more than the 200,000 read"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_yaml_that_nobody_writes_is_refused_at_once(tmp_path: Path, plain: Callable[..., Any], case: str) -> None:
    """From a file and after `--set` alike, before anything of it is built."""
    text, told = UNREADABLE[case]
    with pytest.raises(RecipeError, match=told):
        load_recipe(written(tmp_path, text))
    with pytest.raises(RecipeError, match=told):
        parse_recipe(plain(), overrides=[f"name={text}"])


def test_anchors_and_merges_that_people_write_are_read(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("stages:")] + (
        "stages:\n"
        "  - &one {name: one, method: projector, steps: 3, data: &data {sources: [{microworld: visual}]}}\n"
        "  - {<<: *one, name: two, steps: 4}\n"
        "  - {name: three, method: projector, steps: 5, data: *data}\n"
    )
    assert [stage.steps for stage in load_recipe(written(tmp_path, text)).stages] == [3, 4, 5]
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "<<" in line)
    with pytest.raises(RecipeError, match=rf"line {line}\b.*stages.1.steps|stages.1.steps.*line {line}\b"):
        load_recipe(written(tmp_path, text.replace("steps: 4", "steps: many")))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("steps: 10", "stpes: 10").replace("rank: 16", "rank: many"))
    with pytest.raises(RecipeError, match="problems") as caught:
        load_recipe(path)
    assert "stages.0.stpes" in str(caught.value)
    assert "stages.1.wings.rank" in str(caught.value)


def test_an_adapter_can_only_be_gone_on_with_by_its_own_method(plain: Callable[..., Any]) -> None:
    raw = plain(name="one", method="lora", train={})
    for other, told in (("full", "lora adapter, which `two` .method full. cannot"), ("lora", "leave its `lora`")):
        second = {**raw["stages"][0], "name": "two", "method": other, "lora": {"rank": 2} if other == "lora" else None}
        with pytest.raises(RecipeError, match=told):
            parse_recipe({**raw, "stages": [raw["stages"][0], second]})


def test_the_cache_needs_a_frozen_tower(plain: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="the tower is trained in this stage"):
        parse_recipe(plain(method="full", train={"llm": 1e-4, "tower": 1e-5}, feature_cache={}))
    with pytest.raises(RecipeError, match="the tower is trained in this stage"):
        parse_recipe(plain(method="lora", train={}, lora={"tower": True}, feature_cache={}))


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ("validation: {sources: [{microworld: visual}, SOURCE]}", "validation.sources.1"),
        ("retention: {text: SOURCE}", "retention.text"),
        ("retention: {pictures: SOURCE}", "retention.pictures"),
    ],
)
@pytest.mark.parametrize("key", ["weight", "runs"])
def test_how_to_draw_is_refused_where_first_samples_are_read(tmp_path: Path, section: str, path: str, key: str) -> None:
    def told(source: str) -> Recipe:
        return load_recipe(written(tmp_path, GOOD + section.replace("SOURCE", source) + "\n"))

    again = told(f"{{jsonl: a.jsonl, {key}: 1}}")  # what holds without it, as a run writes it down
    assert again == told("{jsonl: a.jsonl}")
    with pytest.raises(RecipeError, match=rf"{path}[^\n]*: {key}: the first samples of the source are read"):
        told(f"{{jsonl: a.jsonl, {key}: 2}}")


def test_a_prefix_cannot_be_recomputed(plain: Callable[..., dict[str, Any]]) -> None:
    raw = plain(method="prefix", train={})
    assert parse_recipe(raw).stages[0].learning_rates == {"prefix": 5e-3, "projector": 2e-5}
    with pytest.raises(RecipeError, match="fill twice"):
        parse_recipe({**raw, "gradient_checkpointing": True})


def test_values_can_be_set_from_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, GOOD),
        [
            "seed=7",
            "stages.0.steps=11",
            "stages.wings.steps=12",
            "stages.wings.train.wings.router=5e-3",
            "stages.wings.schedule.kind=linear",
            "stages.1.data.sources.0.seed=3",
        ],
    )
    assert recipe.seed == 7
    assert [stage.steps for stage in recipe.stages] == [11, 12]
    assert recipe.stages[1].learning_rates["wings.router"] == 5e-3
    assert recipe.stages[1].schedule.kind == "linear"
    assert recipe.stages[1].data.sources[0].seed == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.0.steps", "key.path=value"),
        ("stages.5.steps=1", "0 to 1 or align, wings"),
        ("name.x=1", "plain value"),
        ("stages.0.stpes=1", "did you mean `steps`"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(written(tmp_path, GOOD), [override])


def test_a_missing_file_and_a_non_mapping_are_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(written(tmp_path, "- 1\n"))


def test_the_schema_names_every_key() -> None:
    schema = json.dumps(recipe_schema())
    for key in ("stages", "text_replay", "micro_batch_size", "microworld", "router"):
        assert f'"{key}"' in schema


RECIPES = [
    path
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    if "\nstages:" in path.read_text()  # not of codes, which `alula codes fit` reads
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_the_shipped_recipes_are_legal(path: Path) -> None:
    recipe = load_recipe(path)
    assert yaml.safe_load(dump_recipe(recipe))["name"] == recipe.name
