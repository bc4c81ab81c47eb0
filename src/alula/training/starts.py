"""What a stage starts from and what it leaves: one code path for all ways to tune.

`begin` loads the host or the previous stage's output and puts the method's parts on it; `export` writes the tuned model
as the directory people expect of that method: a host directory, a PEFT adapter, or an alula adapter (beside the tuned
host it belongs to, where the decoder was trained with it). In each case the trained projector is inside, so
`alula.load_model(directory)` gives back exactly the trained model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from alula import grafts
from alula.anatomy import Anatomy
from alula.errors import RecipeError
from alula.files import atomic_directory
from alula.grafts import Graft, WingsConfig
from alula.grafts.storage import read_config
from alula.hosts import Host, build_host, load_host, save_host
from alula.hosts.quiet import quiet_loading
from alula.loading import load_peft
from alula.training.lora import add_lora
from alula.training.parts import Named, find_parts, select
from alula.training.prefix import add_prefix
from alula.training.recipe import HostSpec, LoraSpec, PrefixSpec, Stage


@dataclass
class Start:
    """A model ready for a stage.

    Attributes:
        model: what is trained: the host itself, or PEFT's wrapper around it.
        processor: the host's.
        parts: trained parameters by part.
        base: directory or hub id the adapter methods' output refers to.
        graft: of method wings.
        whole: paths of host modules that belong into a wings adapter: the projector, once any stage has trained it.
    """

    model: nn.Module
    processor: Any
    parts: Mapping[str, Named]
    base: str
    graft: Graft | None = None
    whole: tuple[str, ...] = ()


def assemble(spec: HostSpec, directory: Path, *, seed: int) -> None:
    """Join the recipe's LLM and tower and save the host to ``directory``, unless it is there already."""
    assert spec.llm is not None
    assert spec.vision is not None
    if not directory.is_dir():
        host = build_host(
            spec.llm,
            spec.vision,
            spec.connector,
            feature_layer=spec.feature_layer,
            audio=spec.audio,
            video=spec.video,
            shared=spec.shared,
            connector_options=spec.connector_options,
            seed=seed,
        )
        with quiet_loading():
            save_host(host, directory)


def begin(stage: Stage, *, base: str, previous: Path | None) -> Start:
    """Load what ``stage`` starts from and make exactly its parts trainable. Weights are float32.

    Args:
        base: the host (directory or hub id) under any adapter.
        previous: an adapter directory to go on with, or None for a fresh one.

    Raises:
        RecipeError: a part the model does not have.
    """
    with warnings.catch_warnings():
        # peft asks for gradient checkpointing by its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return _begin(stage, load_host(base, dtype=torch.float32), base, previous)


def _begin(stage: Stage, host: Host, base: str, previous: Path | None) -> Start:
    model: nn.Module = host.model
    graft: Graft | None = None
    whole: set[str] = set()
    rates = stage.learning_rates
    if "projector" in rates and Anatomy.of(model).projector is None:
        raise RecipeError(
            f"{type(model).__name__} has no projector of its own to train",
            where=f"stages.{stage.name}.train.projector",
            remedy="leave `projector` out of `train`; where it sits inside the tower, train `tower`",
        )
    if stage.method in ("lora", "prefix"):
        if previous is not None:
            model = load_peft(host.model, previous, trainable=True)
        elif stage.method == "prefix":
            spec = stage.prefix or PrefixSpec()
            model = add_prefix(host.model, spec, train_projector="projector" in rates, seed=torch.initial_seed())
        else:
            model = add_lora(host.model, stage.lora or LoraSpec(), train_projector="projector" in rates)
    elif stage.method == "wings":
        if previous is not None:
            graft = grafts.load_adapter(model, previous)
            whole.update(read_config(previous)["modules"])
        else:
            graft = grafts.attach(model, stage.wings or WingsConfig())
        if "projector" in rates:
            projector = Anatomy.of(model).projector
            whole.update(name for name, module in model.named_modules() if module is projector)
    parts = find_parts(model, rates, graft.parameter_groups() if graft is not None else None)
    select(model, parts)
    return Start(model, host.processor, parts, base, graft, tuple(sorted(whole)))


def export(start: Start, stage: Stage, directory: Path, host: Path) -> None:
    """Write the tuned model to ``directory``, complete or not at all.

    Args:
        host: where the tuned host goes when a graft was trained together with the decoder it is on.
    """
    model = start.model.eval()
    if stage.method in ("lora", "prefix"):
        assert isinstance(model, PeftModel)
        # a relative path would mean another place for whoever loads the adapter from elsewhere
        base = str(Path(start.base).resolve()) if Path(start.base).is_dir() else start.base
        model.peft_config["default"].base_model_name_or_path = base
        with atomic_directory(directory) as partial:
            model.save_pretrained(str(partial))
            start.processor.save_pretrained(partial)
    elif stage.method == "wings":
        base = start.base
        if "llm" in start.parts:
            assert isinstance(model, PreTrainedModel)
            with quiet_loading():
                base = str(save_host(Host(model, start.processor), host))
        grafts.save_adapter(model, directory, base=base, modules=start.whole, processor=start.processor)
    else:
        assert isinstance(model, PreTrainedModel)
        with quiet_loading():
            save_host(Host(model, start.processor), directory)
