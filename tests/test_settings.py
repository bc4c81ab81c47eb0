"""One account of wrong settings, whoever reads them: recipes, mixtures, sources."""

from __future__ import annotations

from typing import Any

import pytest

from alula.data import open_mixture
from alula.errors import RecipeError, UsageError
from alula.grafts import WingsConfig
from alula.policies import Budget, Prune, policy_of
from alula.probes import AttentionShift, Geometry, Overlap, Probe
from alula.training import parse_recipe
from alula.training.notation import read_yaml

RECIPE = """
name: run
output_dir: out
host: {path: fledgling}
stages:
  - name: wings
    method: wings
    steps: 3
    data: {sources: [{microworld: text}]}
    wings: {rank: 4}
"""


def refused(text: str) -> str:
    raw, lines = read_yaml(text, where="r.yaml")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, where="r.yaml", lines=lines)
    return str(caught.value)


@pytest.mark.parametrize(
    ("slip", "words"),
    [
        ({"microworld": "smell"}, "input should be 'text'"),
        ({"microworld": "text", "limit": True}, "whole number"),
        ({"microworld": "text", "weight": "1"}, "a number is wanted here, not text"),
        ({"jsonl": "a", "imags": "b"}, "unknown key; did you mean `images`?"),
        ({"json": "a"}, "a source needs one of the keys"),
    ],
)
def test_recipes_and_mixtures_say_the_same_of_a_source(slip: dict[str, Any], words: str) -> None:
    written = "{" + ", ".join(f"{key}: {value!r}" for key, value in slip.items()) + "}"
    told = refused(RECIPE.replace("{microworld: text}", written))
    assert "stages.0.data.sources.0" in told
    assert "(line 9)" in told
    assert "problems" not in told
    with pytest.raises(RecipeError) as caught:
        open_mixture({"sources": [slip]})
    assert words in str(caught.value)
    assert words in told
    assert (caught.value.where or "").startswith("data.sources.0")


def test_places_in_lists_are_told_as_set_takes_them() -> None:
    """Settings made in Python and read from files as those of recipes: stages.1.steps."""
    for make, where in (
        (lambda: Prune(stages=[(2, 0.5), ("x", 0.5)]), "Prune.stages.1.0"),
        (lambda: WingsConfig(layers=[1, "x"]), "wings.layers.1"),
        (lambda: policy_of({"policy_type": "prune", "stages": [[2, 0.5], ["x", 0.5]]}), "stages.1.0"),
        (lambda: open_mixture({"sources": [{"jsonl": "a", "limit": "x"}]}), "data.sources.0.limit"),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert (caught.value.where or "").endswith(where)


def test_a_list_whose_only_item_is_wrong_is_one_problem() -> None:
    told = refused(RECIPE.replace("steps: 3", "steps: -3"))
    assert "stages.0.steps (line 8)" in told
    assert "at least 1 item" not in told


@pytest.mark.parametrize(
    "slip", [{"rank": True}, {"rank": "8"}, {"init_std": -3}, {"gain": "x"}, {"rope": "no"}, {"layers": [True]}]
)
def test_a_graft_refuses_a_slip_in_code_and_in_a_recipe(slip: dict[str, Any]) -> None:
    ((key, value),) = slip.items()
    with pytest.raises(UsageError, match=key):
        WingsConfig(**slip)
    yaml_value = str(value).lower() if isinstance(value, bool) else "[true]" if key == "layers" else repr(value)
    assert f"stages.0.wings.{key}" in refused(RECIPE.replace("rank: 4", f"{key}: {yaml_value}"))
    assert "(line 10)" in refused(RECIPE.replace("rank: 4", f"{key}: {yaml_value}"))


@pytest.mark.parametrize(
    ("probe", "slip", "words"),
    [
        (AttentionShift, {"keep": "8"}, "AttentionShift.keep: a whole number is wanted here, got '8'"),
        (AttentionShift, {"keep": 2.5}, "keep: a whole number is wanted here"),
        (AttentionShift, {"seed": True}, "seed: a whole number is wanted here, got True"),
        (Overlap, {"sparsity": "half"}, "sparsity: a number is wanted here, not text"),
        (Geometry, {"offsets": (True,)}, "offsets.0: a number is wanted here, not true or false|whole number"),
        (Overlap, {"skip_first": "no"}, "skip_first: true or false is wanted here"),
    ],
)
def test_a_probe_refuses_settings_of_another_type(probe: type[Probe], slip: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        probe(**slip)


def test_published_settings_take_no_stand_ins_and_no_phantoms() -> None:
    with pytest.raises(UsageError, match="gain=True is not what"):
        WingsConfig(compat="published", gain=True)
    with pytest.raises(UsageError) as caught:
        WingsConfig(compat="publishd", system_tokens=14)  # type: ignore[arg-type]
    assert "more)" not in caught.value.message
    with pytest.raises(UsageError, match=r"router_rows: it stands beside router_tokens"):
        WingsConfig.from_dict({"router_tokens": 8, "router_rows": 4096})


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it() -> None:
    with pytest.raises(UsageError, match=r"Budget\.tokens: unknown key; did you mean `image_tokens`\? \(and 1 more\)"):
        Budget(tokens=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        ("gird", "Prune.criterion: unknown name 'gird'; did you mean `grid`?"),
        ({"name": "fastv"}, "Prune.criterion: unknown name 'fastv'\n  remedy: name is one of: last_query_attention, "),
        ({"seed": 1}, "Prune.criterion: the key 'name' is required here"),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(criterion: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Prune(stages=[(2, 0.5)], criterion=criterion)
    assert words in str(caught.value)


def test_saved_policies_without_a_type_are_asked_for_one() -> None:
    with pytest.raises(UsageError, match=r"the key 'policy_type' is required\n.*policy_type is one of: budget"):
        policy_of({"layer": 3})
