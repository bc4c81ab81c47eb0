"""How much a model takes in."""

from __future__ import annotations

from typing import Any

from peft import PeftModel


def context_length(model: Any) -> int | None:
    """Tokens, prompt and answer together, that a model takes; None where its config names no such bound.

    It is what the model was made for, less the tokens of a learned prompt (PEFT's) that stands in front of all others.
    Scaled rotary angles reach further than the positions they were trained on: linear and dynamic scaling by their
    factor, YaRN to its factor times the original length. Other kinds, and configs that scale single layers
    (Gemma-3), name the scaled length themselves.
    """
    config = getattr(model, "config", None)
    made_for = None if config is None else _made_for(config.get_text_config())
    return None if made_for is None else made_for - _learned_rows(model)


def _made_for(config: Any) -> int | None:
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


def _learned_rows(model: Any) -> int:
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    prompt: Any = model.active_peft_config
    return int(prompt.num_virtual_tokens)
