"""The door: a block in which a model attends to what somebody pointed at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from alula.errors import UsageError
from alula.seam import install, marked
from alula.steering.block import Highlight, Method, checked
from alula.steering.shift import Shift

_serial = itertools.count()


@contextmanager
def highlight(
    model: nn.Module,
    prompt: Any = None,
    *,
    spans: Sequence[Any] | str = (),
    regions: Sequence[Any] = (),
    strength: float | None = None,
    guidance: float | None = None,
    by: Method | None = None,
) -> Iterator[Highlight]:
    """Have `model` attend to what is highlighted, in forwards that this thread (or asyncio task) begins in the block.

        prompt = Prompt(processor, inputs, messages)
        with alula.highlight(model, prompt, spans=["the left one"], regions=[Box(0, 0, 40, 80)]):
            model.generate(**inputs, max_new_tokens=20)

    Without a prompt every forward is told by an input of its own, `highlighted` (B, L), which `generate` takes inside
    of `alula.seam.generation_extras`; samples in which nothing is highlighted are computed as they would be without.

    Args:
        model: a host, with or without grafts, policies and PEFT adapters.
        prompt: what spans and regions are found in (`alula.steering.Prompt`).
        spans: of text; of a batch, one list per sample.
        regions: of images, films and sounds; of a batch, one list per sample.
        strength: what is added to the logits of attention for a highlighted token: log(beta) of the paper, by default
            log(2). Negative: attention turns away from it.
        guidance: gamma of the paper, by default 1.3: next tokens are told against a second run that hardly sees what is
            highlighted. 1: there is no second run. Below 1 answers move toward that run, away from what is highlighted.
        by: the method, by default `Shift()`, Prompt Highlighter (Zhang et al., CVPR 2024, arXiv 2312.04302); its
            rivals are `KeyDirections`, `Hidden` and `Distorted`.

    Raises:
        UsageError: a span or region is not found, two blocks want a second run, or an option has no effect.
        HostError: a class of host that alula does not know, or one that cannot be had this way.
    """
    marks = None
    if prompt is not None:
        marks = checked(prompt.marks(spans=spans, regions=regions))
    elif spans or regions:
        raise UsageError(
            "spans and regions are found in a prompt, and there is none",
            remedy="write alula.highlight(model, Prompt(processor, inputs), spans=...)",
        )
    name = f"highlight-{next(_serial)}"
    seam = install(model, name)
    block = Highlight(seam, marks, name)
    try:
        seam.set_owner(name, block)
        (Shift() if by is None else by).place(block, strength, guidance)
        with marked(block.first):
            yield block
    finally:
        seam.forget(block.first)
        seam.forget(block.second)
        seam.release(name)
