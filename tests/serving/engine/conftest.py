"""What the engine's tests share: tiny models and adapters on disk, and the answers they give alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from PIL import Image

import alula
from alula.grafts import ExpertsConfig, MKS2Config, WingsConfig, save_adapter
from alula.hosts import build_host, load_host, save_host
from alula.seam import find, needs_roles
from alula.serving.engine import Delta, Engine, Finished, Handle, Request, Sampling
from tests.grafts.common import wake
from tests.hosts import qwen, tiny
from tests.serving.made import saved_lora

RED, BLUE = Image.new("RGB", (50, 40), (255, 0, 0)), Image.new("RGB", (30, 70), (0, 0, 255))


def asked(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    """A first turn."""
    media = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def llm(folder: Path, kind: str, **changes: Any) -> Path:
    tiny.decoder(kind, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, a host of it with adapters of three kinds, and a text model whose layers slide."""
    folder = tmp_path_factory.mktemp("engine")
    torch.manual_seed(0)
    llm(folder / "llm", "qwen2")
    llm(folder / "sliding", "mistral")
    save_host(build_host(str(folder / "llm"), tiny.TOWERS["siglip"][0]), folder / "host")
    configs = {
        "wings": WingsConfig(rank=4),
        "experts": ExpertsConfig(rank=4, alpha=8),
        "turns": ExpertsConfig(tokens="turn", rank=4, alpha=8),  # goes by whose turn a token belongs to
        "mks2": MKS2Config(rank=4, memory_width=8),
        "modality": MKS2Config(rank=4, memory_width=8, route="modality"),  # goes by what kind a token is of
    }
    for name, config in configs.items():
        model, _ = load_host(folder / "host")
        wake(alula.attach(model, config))
        save_adapter(model, folder / name, base=folder / "host")
    saved_lora(folder / "host", folder / "lora")
    model = alula.load_model(folder / "llm").model
    prefix = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prefix.peft_config["default"].base_model_name_or_path = str(folder / "llm")
    prefix.save_pretrained(folder / "prefix")
    qwen.written(folder / "qwen-vl", "qwen2_5_vl")
    model, _ = load_host(folder / "qwen-vl")
    wake(alula.attach(model, configs["mks2"]))
    save_adapter(model, folder / "relating", base=folder / "qwen-vl")
    return folder


@pytest.fixture(scope="package")
def engine(parts: Path) -> Iterator[Engine]:
    with Engine() as made:
        made.load("host", parts / "host")
        for name in ("wings", "experts", "turns", "mks2", "modality", "lora"):
            made.load(f"host+{name}", parts / name)
        made.load("llm", parts / "llm")
        made.load("llm+prefix", parts / "prefix")
        made.load("sliding", parts / "sliding")
        made.load("qwen-vl", parts / "qwen-vl")
        made.load("qwen-vl+relating", parts / "relating")
        yield made


@functools.cache
def loaded(path: Path) -> Any:
    return alula.load_model(path)


def rendered(path: Path, messages: Sequence[Any]) -> dict[str, Any]:
    """Inputs of the model in a directory."""
    inputs = alula.inputs.Intake(loaded(path).processor).tensors(list(messages))[0]
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


def alone(path: Path, messages: Sequence[Any], most: int = 12, **options: Any) -> list[int]:
    """What the model in a directory answers by `generate`, greedily."""
    model, processor = loaded(path)
    inputs = rendered(path, messages)
    roles = alula.inputs.Intake(processor).tensors(list(messages), roles=needs_roles(model))[1]
    given = nullcontext() if roles is None else find(model).given_roles(torch.tensor([roles]))
    with torch.no_grad(), given:
        found = model.generate(**inputs, max_new_tokens=most, do_sample=False, **options)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def tokens_of(handle: Handle) -> tuple[list[int], Finished]:
    """The answer's tokens, and its end."""
    *deltas, end = handle
    assert isinstance(end, Finished)
    return [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids], end


def told(engine: Engine, name: str, messages: Any, most: int = 12, **options: Any) -> list[int]:
    """What the engine answers."""
    sampling = Sampling(max_tokens=most, **options.pop("sampling", {}))
    return tokens_of(engine.submit(Request(name, messages, sampling=sampling, **options)))[0]
