"""Hosts and adapters that several tests of serving are about."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from alula.hosts import Host, build_host, load_host
from tests.hosts import tiny
from tests.hosts.test_multimodal import EARS_FOR_MICROWORLD, SMALL


def sensing() -> Host:
    """A host that takes images, films and sounds."""
    return build_host(
        tiny.decoder("llama"),
        tiny.TOWERS["siglip"][0],
        "queries",
        tokenizer=tiny.tokenizer(),
        audio=EARS_FOR_MICROWORLD,
        video=True,
        connector_options=SMALL,
    )


def saved_lora(host: Path, folder: Path) -> None:
    """Save a LoRA of the host in a directory whose weights are no zeros."""
    model, _ = load_host(host)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)"))
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    tuned.peft_config["default"].base_model_name_or_path = str(host)
    tuned.save_pretrained(folder)
