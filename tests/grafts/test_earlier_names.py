"""Adapters saved under names of earlier versions are read, with a note."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from alula import WingsConfig, attach, load_adapter, save_adapter
from tests import zoo


def test_an_adapter_with_the_settings_names_of_an_earlier_version_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = WingsConfig(rank=4, router="attention", router_tokens=77)
    graft = attach(zoo.build("llava-llama"), config)
    save_adapter(graft.seam.anatomy.host, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    facts = json.loads(file.read_text())
    facts["config"]["router_rows"] = facts["config"].pop("router_tokens")
    facts["config"]["system_rows"] = facts["config"].pop("system_tokens")
    file.write_text(json.dumps(facts))
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(zoo.build("llava-llama"), tmp_path / "adapter")
    assert loaded.config == config
    assert "router_rows" in caplog.text
    for key, value in graft.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
