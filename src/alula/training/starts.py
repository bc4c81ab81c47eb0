"""What a stage starts from and what it leaves: one code path for all ways to tune.

`begin` loads the host or the previous stage's output and puts the method's parts on it; `export` writes the tuned model
as the directory people expect of that method: a host directory, a PEFT adapter, or an alula adapter (beside the tuned
host it belongs to, where the decoder was trained with it). In each case the trained projector is inside, so
`alula.load_model(directory)` gives back exactly the trained model.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from alula.anatomy import HostParts
from alula.errors import RecipeError
from alula.hosts import build_host, load_host, save_host
from alula.hosts.quiet import quiet_loading
from alula.training.methods import METHODS, Tunable
from alula.training.parts import find_parts, select
from alula.training.recipe import HostSpec, Stage


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
            audio_stack=spec.audio_stack,
            feature_extractor=spec.feature_extractor,
            encoder=spec.encoder,
            modalities=spec.modalities,
            modality_options=spec.modality_options,
            seed=seed,
        )
        with quiet_loading():
            save_host(host, directory)


def begin(stage: Stage, *, base: str, previous: Path | None) -> Tunable:
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
        host, rates = load_host(base, dtype=torch.float32), stage.learning_rates
        if "projector" in rates and HostParts.of(host.model).projector is None:
            raise RecipeError(
                f"{type(host.model).__name__} has no projector of its own to train",
                where=f"stages.{stage.name}.train.projector",
                remedy="leave `projector` out of `train`; where it sits inside the tower, train `tower`",
            )
        tunable = METHODS[stage.method].put_on(
            host,
            stage.settings,
            base=base,
            previous=previous,
            train_projector="projector" in rates,
            seed=torch.initial_seed(),
        )
        graft = tunable.graft
        tunable.parts = find_parts(tunable.model, rates, graft.parameters_by_part() if graft is not None else None)
        select(tunable.model, tunable.parts)
        return tunable


def export(tuned: Tunable, stage: Stage, directory: Path, host: Path) -> None:
    """Write the tuned model to ``directory``, complete or not at all.

    Args:
        host: where the tuned host goes when a graft was trained together with the decoder it is on.
    """
    tuned.model.eval()
    METHODS[stage.method].export(tuned, directory, host)
