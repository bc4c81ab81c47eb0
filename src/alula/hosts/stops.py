"""Where answers end."""

from __future__ import annotations

from typing import Any


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer of ``model``: those of its generation settings, and the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(named) if isinstance(named, list | tuple) else [named]
    return [token for token in dict.fromkeys([*ids, tokenizer.eos_token_id]) if token is not None]
