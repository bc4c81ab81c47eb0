"""Adapters and checkpoints saved under names of earlier versions are read, with a note."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from alula import WingsConfig, attach, load_adapter, save_adapter
from alula.errors import AdapterError
from alula.grafts import Graft, grafts_of
from alula.grafts.checkpoint import restore
from alula.training.parts import load_trained
from tests import zoo
from tests.grafts.common import wake

EARLIER = {"down": "a", "up": "b"}
CONFIGS = {
    "mass": WingsConfig(rank=4),
    "attention": WingsConfig(rank=3, router="attention", router_tokens=40),
    "published": WingsConfig(compat="published", rank=3, router_tokens=64),
}


def _earlier(key: str) -> str:
    """A weight's name in an earlier version."""
    path, _, last = key.rpartition(".")
    return f"{path}.{EARLIER.get(last, last)}"


def _rename_weights(file: Path) -> set[str]:
    """Give low-rank weights in a file their earlier names; returns those."""
    with safe_open(file, "pt") as tensors:
        weights = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118  a handle is no mapping
        metadata = tensors.metadata()
    save_file({_earlier(key): value for key, value in weights.items()}, file, metadata)
    return {_earlier(key) for key in weights} - weights.keys()


def _assert_equal(ours: Graft, theirs: Graft) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])


def _saved(directory: Path, config: WingsConfig) -> Graft:
    graft = wake(attach(zoo.build("llava-llama"), config))
    save_adapter(graft.seam.anatomy.host, directory)
    return graft


def test_an_adapter_with_the_settings_names_of_an_earlier_version_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = WingsConfig(rank=4, router="attention", router_tokens=77)
    graft = _saved(tmp_path, config)
    file = tmp_path / "adapter_config.json"
    facts = json.loads(file.read_text())
    facts["config"]["router_rows"] = facts["config"].pop("router_tokens")
    facts["config"]["system_rows"] = facts["config"].pop("system_tokens")
    file.write_text(json.dumps(facts))
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(zoo.build("llava-llama"), tmp_path)
    assert loaded.config == config
    assert "router_rows" in caplog.text
    _assert_equal(graft, loaded)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_with_the_weights_names_of_an_earlier_version_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: WingsConfig
) -> None:
    graft = _saved(tmp_path, config)
    names = _rename_weights(tmp_path / "adapter_model.safetensors")
    assert {"graft.layers.0.visual.q.a", "graft.layers.0.textual.o.b"} <= names
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(zoo.build("llava-llama"), tmp_path)
    (note,) = [record.getMessage() for record in caplog.records if "weights" in record.getMessage()]
    assert f"{len(names)} weights under their names of an earlier version" in note
    _assert_equal(graft, loaded)


def test_todays_adapters_load_without_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graft = _saved(tmp_path, CONFIGS["mass"])
    with caplog.at_level(logging.WARNING):
        _assert_equal(graft, load_adapter(zoo.build("llava-llama"), tmp_path))
    assert "earlier version" not in caplog.text


def test_a_stock_checkpoint_with_the_weights_names_of_an_earlier_version_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graft = wake(attach(zoo.build("llava-llama"), CONFIGS["mass"]))
    host: Any = graft.seam.anatomy.host
    host.save_pretrained(tmp_path)
    assert _rename_weights(tmp_path / "model.safetensors")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        restore(again, str(tmp_path))
    assert "earlier version" in caplog.text
    _assert_equal(graft, grafts_of(again)["wings"])


def test_a_training_checkpoint_with_the_weights_names_of_an_earlier_version_is_continued(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def tuned(seed: int) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        host = zoo.build("llava-llama")
        wake(attach(host, CONFIGS["mass"]), seed)
        wake(attach(host, WingsConfig(rank=2, learners=("visual",)), "second"), seed)
        return host, {name: parameter for name, parameter in host.named_parameters() if ".alula." in name}

    (_, trained), (host, own) = tuned(1), tuned(2)
    earlier = {_earlier(key): value.detach() for key, value in trained.items()}
    assert earlier.keys() != trained.keys()
    with caplog.at_level(logging.WARNING):
        load_trained(host, {"wings": list(own.items())}, earlier)
    assert "earlier version" in caplog.text
    for key, value in trained.items():
        assert torch.equal(own[key], value)


def test_weights_under_both_names_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, CONFIGS["mass"])
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights["graft.layers.0.visual.q.a"] = weights["graft.layers.0.visual.q.down"] + 1
    save_file(weights, file)
    with pytest.raises(AdapterError, match=r"1 weights are not used: layers\.0\.visual\.q\.a"):
        load_adapter(zoo.build("llava-llama"), tmp_path)
