"""The page of supported classes: made by its command from its record, and true of the classes tried here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from alula.anatomy import Anatomy
from alula.errors import HostError

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("supported", ROOT / "tools" / "supported.py")
supported: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = supported
spec.loader.exec_module(supported)
RECORD: dict[str, Any] = json.loads(supported.RECORD.read_text())
ROWS: dict[str, dict[str, str]] = RECORD["classes"]

on_the_same_release = pytest.mark.skipif(
    transformers.__version__ != RECORD["transformers"], reason="the record is of another transformers"
)


def test_the_page_is_what_the_command_writes() -> None:
    assert supported.PAGE.read_text() == supported.page(RECORD)


@on_the_same_release
def test_every_class_of_the_tables_has_a_row() -> None:
    assert set(ROWS) == set(supported.classes())


def test_nothing_fails_without_a_reason() -> None:
    assert not [name for name, row in ROWS.items() for said in row.values() if said.startswith("fails")]


@on_the_same_release
@pytest.mark.parametrize(
    "name",
    [
        "LlavaForConditionalGeneration",  # an image of its own tower
        "SmolVLMForConditionalGeneration",  # its decoder is called text_model
        "Olmo3ForCausalLM",
        "Glm4ForCausalLM",
        "Cohere2ForCausalLM",  # parallel halves, rotary angles in pairs, scaled logits
        "Glm4vForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",  # M-RoPE that counts by input_ids alone
        "DeepseekV3ForCausalLM",
        "MixtralForCausalLM",  # refuses some uses
        "GptOssForCausalLM",  # sinks, under eager attention
        "MllamaForConditionalGeneration",
    ],
)
def test_a_class_does_what_its_row_says(name: str) -> None:
    row = ROWS[name]
    assert supported.examine(name, row["type"]) == {key: row[key] for key in row if key not in ("table", "type")}


def test_norms_behind_the_halves_under_the_names_of_those_in_front_are_refused() -> None:
    config = supported.small(transformers.ChameleonConfig())
    config.swin_norm = True
    with torch.device("meta"):
        model = transformers.ChameleonForConditionalGeneration(config)
    with pytest.raises(HostError, match="its norms stand behind its halves"):
        Anatomy.of(model)


def test_what_comes_out_wrong_is_told_from_what_is_refused() -> None:
    case = supported.Case(supported.build("LlamaForCausalLM", "llama"))

    def wrong(case: Any) -> None:
        raise supported.Wrong("text alone changes")

    def crash(case: Any) -> None:
        raise KeyError("alula")

    def refuse(case: Any) -> None:
        supported.alula.attach(case.model, supported.alula.WingsConfig(layers=(7,)))

    assert supported._outcome(wrong, case) == "fails: text alone changes"
    assert supported._outcome(crash, case) == "fails: KeyError: 'alula'"
    assert supported._outcome(refuse, case) == "refused: layer 7 does not exist"
    assert supported._outcome(supported.wings, case) == "works"
