"""Token embeddings of a host, for grafts that put something in their place."""

from __future__ import annotations

from typing import Any

import torch

from alula.anatomy import Anatomy

_SAMPLE = 4096


def embedding_length(anatomy: Anatomy) -> float:
    """Root mean square of token embeddings, as the embedding module gives them (Gemma's scales them)."""
    embeddings: Any = anatomy.embeddings
    count = int(embeddings.weight.shape[0])
    ids = torch.arange(0, count, max(1, count // _SAMPLE), device=embeddings.weight.device)
    with torch.no_grad():
        return float(embeddings(ids).float().square().mean().sqrt())
