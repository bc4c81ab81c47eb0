"""Taking in what others trained: released weights in their own layout become a stock host and an alula adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, LlavaImageProcessorPil

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.files import atomic_directory
from alula.grafts import attach, save_adapter
from alula.grafts.wings import Release, WingsConfig
from alula.hosts import build_host, names, save_host

HOST, ADAPTER = "host", "adapter"


class Imported(NamedTuple):
    """Where an import was written: a stock host directory, an adapter directory, and the adapter's settings."""

    host: Path
    adapter: Path
    config: WingsConfig


def import_wings(
    checkpoint: str | os.PathLike[str],
    llm: Any,
    vision: Any,
    out: str | os.PathLike[str],
    *,
    system_tokens: int = 14,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
) -> Imported:
    """Turn a released Wings checkpoint into `out/host` and `out/adapter`.

    `alula.load_model(out/adapter)` then answers in the released arithmetic (`compat="published"`). Images are squared
    with the mean colour before they are resized, as in the release. The host's generation configuration switches the
    cache off, which the released arithmetic does not allow.

    Args:
        checkpoint: directory of the released safetensors (see `alula.grafts.wings.released` for the layout).
        llm: the LLM it was tuned from (for its configuration and tokenizer; the release has neither), as
            `alula.build_host` takes it.
        vision: the SigLIP tower it was trained with.
        out: a new directory.
        system_tokens: tokens of system prompt and user header; 14 for Qwen1.5 with its default system prompt.
        dtype: of the host; that of `llm` by default.
        tokenizer: for an `llm` given as an object.

    Raises:
        UsageError: `out` exists. AdapterError: the checkpoint is damaged, or does not fit these parts key by key.
    """
    out = Path(out)
    if out.exists():
        raise UsageError("it exists already", where=str(out), remedy="name a new directory")
    release = Release.open(checkpoint)
    config = release.config(system_tokens=system_tokens)
    host = build_host(llm, vision, "mlp2x_gelu", dtype=dtype, tokenizer=tokenizer)
    model: Any = host.model
    graft = attach(model, config)
    release.load(Anatomy.of(model), graft, vocabulary=_vocabulary(llm))
    size = model.config.vision_config.image_size
    host.processor.image_processor = LlavaImageProcessorPil(
        do_pad=True,
        do_center_crop=False,
        size={"height": size, "width": size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    model.generation_config.use_cache = False
    with atomic_directory(out) as partial:
        save_adapter(model, partial / ADAPTER, base=f"../{HOST}")
        graft.detach()
        save_host(host, partial / HOST)
    return Imported(out / HOST, out / ADAPTER, config)


def _vocabulary(llm: Any) -> int:
    """Rows of an LLM's embeddings, in whatever form the LLM is given."""
    if isinstance(llm, str | os.PathLike):
        llm = AutoConfig.from_pretrained(names.resolve(str(llm), "llm"))
    return int(getattr(llm, "config", llm).get_text_config().vocab_size)
