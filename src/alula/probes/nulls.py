"""Controls that change the model on purpose, inside a context: measure with a probe of its own and compare.

with noise_prompt(model), control.on(model):
    model(**batch)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.seam import LayerView, Phase, Point, install, marked

Noise = Literal["gaussian", "uniform"]

_serial = itertools.count()


@contextmanager
def noise_prompt(model: nn.Module, noise: Noise = "gaussian", *, seed: int = 0) -> Iterator[None]:
    """Inside, the perceptual tokens that enter the decoder are noise: what is left is not about what was seen.

    Only in the forwards that this thread begins.

    Args:
        model: a host.
        noise: "gaussian", with the mean and standard deviation of each channel over the perceptual tokens of the batch
            it replaces; "uniform", on [0, 1), as in the published code.
        seed: of the noise. One generator serves all forwards inside the block.
    """
    if noise not in get_args(Noise):
        raise UsageError(f"noise cannot be {noise!r}", remedy=f"use one of: {', '.join(get_args(Noise))}")
    name = f"noise-{next(_serial)}"
    seam = install(model, name)
    generator = torch.Generator().manual_seed(seed)

    def replace(view: LayerView, hidden: Tensor) -> Tensor | None:
        chosen = view.tokens.is_perceptual
        if not bool(chosen.any()):
            return None
        hidden = hidden.clone()
        hidden[chosen] = _draw(hidden[chosen].float(), noise, generator).to(hidden)
        return hidden

    handle = seam.on(Point.BLOCK_INPUT, 0, replace, phase=Phase.EDIT, owner=name, mark=name)
    try:
        with marked(name):
            yield
    finally:
        handle.remove()
        seam.release(name)


def _draw(like: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    if noise == "uniform":
        return torch.rand(like.shape, generator=generator).to(like.device)
    drawn = torch.randn(like.shape, generator=generator).to(like.device)
    return like.mean(dim=0) + drawn * like.std(dim=0, correction=0)


@contextmanager
def untrained_connector(model: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Inside, the host's projector has fresh random weights; afterwards its own again, bit for bit.

    Raises:
        HostError: the host has no projector, or one with a part that does not know how to start afresh.
    """
    anatomy = Anatomy.of(model)
    projector = anatomy.projector
    if projector is None:
        raise HostError(f"{type(anatomy.host).__name__} has no projector to replace")
    resettable = [module for module in projector.modules() if hasattr(module, "reset_parameters")]
    covered = {id(parameter) for module in resettable for parameter in module.parameters(recurse=False)}
    own = {name: parameter for name, parameter in projector.named_parameters() if id(parameter) not in covered}
    if own:
        raise HostError(f"the projector's {next(iter(own))} does not know how to start afresh")
    trained = {name: value.detach().clone() for name, value in projector.state_dict().items()}
    devices = {parameter.device for parameter in projector.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            for module in resettable:
                module.reset_parameters()  # type: ignore[operator]
        yield
    finally:
        projector.load_state_dict(trained)
