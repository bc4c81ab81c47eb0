"""How much a model takes in."""

from __future__ import annotations

from typing import Any


def context_length(model: Any) -> int | None:
    """Rows, prompt and answer together, that a model was made for; None where its config names no such bound.

    Scaled rotary angles reach further than the positions they were trained on: linear and dynamic scaling by their
    factor, YaRN to its factor times the original length. Other kinds, and configs that scale single layers
    (Gemma-3), name the scaled length themselves.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    match rope.get("rope_type"):
        case "linear" | "dynamic":
            return int(limit * rope.get("factor", 1.0))
        case "yarn":
            return max(limit, int(rope.get("original_max_position_embeddings", 0) * rope.get("factor", 1.0)))
    return limit
