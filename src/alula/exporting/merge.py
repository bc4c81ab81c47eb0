"""Adapters whose weights are a change of the host's own become part of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from alula.errors import AdapterError, UsageError
from alula.exporting.export import check_target, directory_of
from alula.grafts import grafts_of
from alula.hosts import save_host
from alula.loading import load_model


def merge_model(
    source: str | os.PathLike[str], directory: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None
) -> Path:
    """Write the host of a LoRA run (or of any adapter of PEFT that merges) with the adapter's weights in its own.

    The result is a stock host: transformers, vLLM and others load it, and it computes what host and adapter did, but
    for rounding. Rounding is least where both are merged in float32 (``dtype``).

    Args:
        source: directory of a PEFT adapter.
        directory: made; a model that is there is replaced as a whole.
        dtype: of the weights; by default the host's own.

    Raises:
        UsageError: there is nothing to merge; a ``directory`` that `export_model` refuses. AdapterError: an
            adapter that is no change of weights.
    """
    path = directory_of(source)
    check_target(path, Path(directory))
    model, processor = load_model(path, dtype=dtype)
    if grafted := grafts_of(model):
        kinds = " and ".join(sorted({graft.config.graft_type for graft in grafted.values()}))
        raise AdapterError(
            f"{kinds} acts on some tokens and not on others, so no change of the host's weights does the same",
            where=str(path),
            remedy="hand it on with its host: alula export",
        )
    if not isinstance(model, PeftModel):
        raise UsageError(
            "it is a host without an adapter, so there is nothing to merge",
            where=str(path),
            remedy="copy the directory as it is, or alula export",
        )
    tuner: Any = model.base_model
    if not isinstance(tuner, BaseTuner):
        raise AdapterError(
            "a learned prompt stands before the text and changes no weight",
            where=str(path),
            remedy="hand it on with its host: alula export",
        )
    try:
        merged = tuner.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise AdapterError(f"PEFT cannot merge it ({error})", where=str(path), remedy="alula export") from error
    return save_host((merged, processor), directory, overwrite=True)
