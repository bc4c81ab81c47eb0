"""How likely a model holds endings behind contexts.

B rows of a batch, S tokens, K of them at the end whose logits are needed, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alula.anatomy import HostParts
from alula.errors import EvaluationError
from alula.seam import text_logits

Pair = tuple[Sequence[int], Sequence[int]]
"""ids of a context and of the ending behind it, neither empty"""


@torch.no_grad()
def log_likelihoods(
    model: Any, pairs: Sequence[Pair], *, pad: int, batch_size: int, advance: Callable[[int], None] = lambda count: None
) -> list[float]:
    """Sums of log-probabilities, in nats, of the tokens of each ending behind its context.

    Endings are text: ids behind a host's vocabulary (`alula.grafts.TealGraft`) take no part.

    Texts that differ in their last token alone are one row; rows of similar length share a batch, padded on the right.

    Args:
        model: a decoder or a host, adapters and all, in eval mode.
        pad: id that fills up; it is masked.
        advance: told how many pairs are done.

    Raises:
        EvaluationError: one of them is not a number.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, ending) in enumerate(pairs):
        rows[(*context, *ending)[:-1]].append(number)
    order = sorted(rows, key=lambda row: (-len(row), row))
    device = next(model.parameters()).device
    takes_fewer = "logits_to_keep" in inspect.signature(HostParts.of(model).host.forward).parameters
    found = [math.nan] * len(pairs)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(map(len, batch))
        members = [(place, number) for place, row in enumerate(batch) for number in rows[row]]
        # the logits before an ending's first token are the first that tell anything of it
        first = min(len(pairs[number][0]) for _, number in members) - 1
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
        fewer = {"logits_to_keep": width - first} if takes_fewer else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **fewer).logits  # (B, K, V)
        offset = width - logits.shape[1]  # also below 0: a learned prompt stands in front
        logs = text_logits(model, logits).float().log_softmax(dim=-1)
        sums = []
        for place, number in members:
            context, ending = pairs[number]
            begin = len(context) - 1 - offset
            targets = torch.tensor(ending, device=device)
            sums.append(logs[place, begin : begin + len(ending)].gather(1, targets[:, None]).sum())
        for (_, number), value in zip(members, torch.stack(sums).tolist(), strict=True):
            found[number] = value
        advance(len(members))
    if any(map(math.isnan, found)):
        raise EvaluationError(
            "the model's log-likelihood of a text is not a number",
            where=type(model).__name__,
            remedy="look for weights that are NaN, or load it with another dtype (float16 overflows)",
        )
    return found
