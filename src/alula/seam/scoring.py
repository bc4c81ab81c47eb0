"""A forward that weighs answers: what is attached may have to know where the prompts end, and there are no labels to
say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from alula.seam.install import find
from alula.tokens import PROMPT_ENDS


def scoring_inputs(model: nn.Module, inputs: Mapping[str, Any], ends: Tensor) -> dict[str, Any]:
    """The inputs of a forward over prompts with their answers, without labels, for what is attached to take part as if
    it had been given the prompts and had said the answers: nothing reads an answer before it is weighed.

    Args:
        model: a host, with or without anything attached.
        inputs: of the forward.
        ends: (B,) int64, the last token of each prompt.

    Returns:
        The inputs, with ``prompt_ends`` where something that is attached asks for it, and is not told already.
    """
    seam = find(model)
    if seam is None or not any(PROMPT_ENDS in owner.further_inputs for owner in seam.owners.values()):
        return dict(inputs)
    return {PROMPT_ENDS: ends, **inputs}


def text_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """The logits of the host's own vocabulary: (..., V) of (..., V or more).

    Text is weighed by these. Ids behind the vocabulary (`Seam.request_wider`) take mass from words, and are not said
    where text is generated (`generation_extras`).
    """
    seam = find(model)
    return logits if seam is None or seam.own_vocabulary is None else logits[..., : seam.own_vocabulary]
