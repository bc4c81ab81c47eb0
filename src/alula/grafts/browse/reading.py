"""Conditions: what a decoder holds at the end of a prompt. Shapes: B samples, S tokens, D the decoder's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.seam import READING, SECOND, evaluating, marked
from alula.tokens import PROMPT_ENDS

IGNORED = -100


@torch.no_grad()
def read_conditions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(B, D) the condition of each prompt: the decoder's final state, behind its last norm, at the prompt's last token.

    What is attached to the model takes part, but for browse-and-concentrate: images are as the connector encodes them
    without a condition. Nothing of the model is trained by it, and dropout has no part in it.

    Args:
        model: any decoder host.
        inputs: of a forward: `input_ids`, `attention_mask`, `pixel_values` and so on, padded on either side. With
            `labels` a prompt ends before the first token that has one; with ``prompt_ends`` (B,) there; else at the
            last token that is no padding.

    Raises:
        UsageError: no `input_ids`.
    """
    anatomy = Anatomy.of(model)
    given = dict(inputs)
    ids, labels, ends = given.get("input_ids"), given.pop("labels", None), given.pop(PROMPT_ENDS, None)
    if ids is None:
        raise UsageError("conditions are of prompts, and there are no input_ids", where="read_conditions")
    mask = given.get("attention_mask")
    with marked(READING), marked(SECOND), evaluating(anatomy.backbone):
        states = anatomy.backbone(**{**given, "use_cache": False}).last_hidden_state
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return at_ends(states, prompt_ends(valid, labels) if ends is None else ends.to(states.device))


def prompt_ends(valid: Tensor, labels: Tensor | None) -> Tensor:
    """(B,) the last token of each prompt.

    Args:
        valid: (B, S) bool, tokens that are no padding.
        labels: (B, S) of tokens that are learnt, -100 elsewhere; a prompt ends before the first. None: nothing is
            learnt, and all is prompt.
    """
    places = torch.arange(valid.shape[1], device=valid.device)
    last = (places * valid).amax(dim=1)
    if labels is None:
        return last
    learnt = labels != IGNORED
    first = learnt.to(torch.int8).argmax(dim=1)
    return torch.where(learnt.any(dim=1), (first - 1).clamp(min=0), last)


def at_ends(states: Tensor, ends: Tensor) -> Tensor:
    """(B, D) of the (B, S, D) states, those at (B,) `ends`."""
    return states[torch.arange(len(states), device=states.device), ends]
