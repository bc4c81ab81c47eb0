"""What a check refuses before anything is built: settings that a host or the disk does not go with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BloomConfig

from alula.errors import AlulaError, HostError, RecipeError, UsageError
from alula.training import check, parse_recipe, train
from tests import zoo
from tests.hosts import tiny

Plain = Callable[..., dict[str, Any]]

# changes of the only stage (a Llama of two layers, 32 wide) -> the key at fault, and what is said
STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (
        {"method": "wings", "train": {}, "wings": {"rank": 4, "layers": [99]}},
        r"only\.wings\.layers: layer 99",
    ),
    "wings rank": ({"method": "wings", "train": {}, "wings": {"rank": 65}}, r"only\.wings\.rank: 65 .*\n.*at most 64"),
    "lora rank": ({"method": "lora", "train": {}, "lora": {"rank": 33}}, r"only\.lora\.rank: 33 .*\n.*at most 32"),
    "targets": ({"method": "lora", "train": {}, "lora": {"targets": ["wq"]}}, r"only\.lora\.targets: `wq`.*\n.*q_proj"),
    "disk": ({"feature_cache": {"disk": "/dev/null/there"}}, r"only\.feature_cache\.disk: .*a file stands where"),
}


@pytest.mark.parametrize("case", STAGES)
def test_settings_the_host_does_not_go_with(plain: Plain, case: str) -> None:
    changes, told = STAGES[case]
    with pytest.raises(RecipeError, match=r"^stages\." + told):
        check(plain(**changes))


def test_places_that_cannot_be_written(plain: Plain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "thesis.txt").write_text("mine")
    for place, told in (
        (tmp_path / "file", "output_dir: .*a file stands where a directory is meant"),
        (tmp_path / "file" / "run", "output_dir: .*a file stands where a directory is meant"),
        (tmp_path / ("x" * 300), "output_dir: .*the name is too long"),
        (tmp_path / "strangers", "not empty and holds no run"),
    ):
        with pytest.raises(UsageError, match=told):
            check({**plain(), "output_dir": str(place)})


# changes of a host of two fledgling parts -> what is said
HOSTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such model": ({"llm": "./nowhere"}, "llm ./nowhere: no such directory"),
    "no such tower": ({"vision": "./nowhere"}, "vision ./nowhere: no such directory"),
    "connector": ({"connector": "mlp3x_gelu"}, "connector: .*3 linear layers"),
    "options": (
        {"connector": "queries", "connector_options": {"width": 9}},
        "connector_options: 8 heads do not divide",
    ),
    "feature layer": ({"feature_layer": 99}, "feature_layer: the tower has hidden states"),
    "a host twice": ({"shared": True}, "shared, .* have no meaning for an image host"),
}


@pytest.mark.parametrize("case", HOSTS)
def test_hosts_that_cannot_be_joined(plain: Plain, case: str) -> None:
    changes, told = HOSTS[case]
    check({**plain(), "host": {"llm": "fledgling", "vision": "fledgling"}})
    with pytest.raises(AlulaError, match=told):
        check({**plain(), "host": {"llm": "fledgling", "vision": "fledgling", **changes}})


@pytest.mark.parametrize("method", ["projector", "full", "lora", "prefix", "wings"])
def test_decoders_without_a_seam_are_refused_before_a_host_is_built(plain: Plain, tmp_path: Path, method: str) -> None:
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    raw = plain(method=method, train={})
    raw["host"] = {"llm": str(tmp_path / "llm"), "vision": "fledgling"}
    with pytest.raises(HostError, match=r"decoder type 'bloom'\) is not supported: its attention"):
        train(raw, quiet=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert not (tmp_path / "run" / "host").exists()


def test_a_prefix_on_a_host_that_takes_none_is_refused_by_the_check(plain: Plain, tmp_path: Path) -> None:
    zoo.build("qwen2_5_vl").save_pretrained(tmp_path / "host")
    raw = plain(method="prefix", train={"prefix": 1e-3})
    with pytest.raises(HostError, match="M-RoPE"):
        check({**raw, "host": {"path": str(tmp_path / "host")}})


PUBLISHED = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- for part in message['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_a_template_that_rewrites_answers_is_refused_by_the_check(
    plain: Plain, host_directory: Path, tmp_path: Path
) -> None:
    """Training would refuse it once the weights are loaded."""
    own = tmp_path / "own"
    shutil.copytree(host_directory, own)
    (own / "chat_template.jinja").write_text("{{ messages[0]['content'] | length }}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^host\.path: .*does not mark what the assistant says") as caught:
        check({**plain(), "host": {"path": str(own)}})
    assert "{% generation %}" in str(caught.value.remedy)
    # one without markers, as published models have, is marked
    (own / "chat_template.jinja").write_text(PUBLISHED, encoding="utf-8")
    check({**plain(), "host": {"path": str(own)}})
    with pytest.raises(RecipeError, match=r"^host\.path: template: mood: .*does not read it"):
        check({**plain(), "template": {"mood": "fine"}})


def test_a_good_recipe_is_read_and_nothing_written(plain: Plain, tmp_path: Path) -> None:
    raw = plain(method="lora", train={}, lora={"rank": 4, "targets": ["q_proj", "down_proj"]})
    assert check(raw) == parse_recipe(raw)
    assert not (tmp_path / "run").exists()
