"""Generation's side of what owners of the seam bring: processors of scores, and further inputs.

transformers takes logits processors by an argument of `generate` and from nowhere else, and refuses inputs that the
host's own `forward` does not name. So both are handed over around the call, in sight of the caller; no method is
replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import LogitsProcessorList

from alula.seam.install import find
from alula.seam.scope import marks


@contextmanager
def generation_extras(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What to pass to ``model.generate`` inside the block, for what is attached to `model` to take part.

        with generation_extras(model, {**batch, "highlighted": mask}) as given:
            model.generate(**given, max_new_tokens=20)

    Args:
        model: a host, with or without anything attached.
        inputs: of the prompt, by name: those of the host, those that owners take (`Owner.further_inputs`), and other
            arguments of `generate`.

    Yields:
        The arguments, without what owners take, which reaches every forward that this thread begins in the block (each
        sample's as often as there are beams or samples made of it); with the owners' logits processors behind those
        of the caller, in the order in which the owners came.
    """
    seam = find(model)
    if seam is None:
        yield dict(inputs)
        return
    owners = seam.owners.values()
    taken = {name: inputs[name] for owner in owners for name in owner.further_inputs if name in inputs}
    arguments = {name: value for name, value in inputs.items() if name not in taken}
    brought = [
        processor
        for owner in owners
        if owner.owner_id is None or owner.owner_id not in marks()
        for processor in owner.logits_processors(inputs)
    ]
    if brought:
        arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or ()), *brought])
    with seam.given_inputs(taken):
        yield arguments
