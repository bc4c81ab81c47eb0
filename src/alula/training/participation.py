"""Every trained parameter takes part in every backward pass, on every process.

Sharded training exchanges weights and gradients in lockstep: when one process has images and another only text, the
second one has no gradient for tower and projector, gathers other weights, or walks its graph in another order, and the
job hangs (NCCL) or dies (gloo). The cure here leaves the loss of a text-only batch bit-identical: where other processes
run their images, a blank one runs through tower and projector, and its features, times zero, are added to the token
embeddings. Grafts do the like for their own silent parameters. `fill_missing_gradients` gives one process the same
semantics: a part that no sample reached has the gradient zero, not none, so the optimizer's momentum moves alike for
any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.anatomy import HostParts
from alula.items import inputs_of
from alula.training.parts import Named


@contextlib.contextmanager
def lockstep(model: nn.Module, parts: Mapping[str, Named], blank: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, training forwards of ``model`` reach all of ``parts``. Enter it before the model is sharded.

    Args:
        model: the model, PEFT wrapped or not.
        parts: its trained parameters.
        blank: the image processor's output for one blank image.
    """
    anatomy = HostParts.of(model)
    handles: list[RemovableHandle] = []
    if {"projector", "tower"} & set(parts) or any(".lora_" in name for name, _ in _under(anatomy.tower, parts)):
        image = _BlankImage(anatomy.backbone, blank)
        handles.append(anatomy.backbone.register_forward_pre_hook(image.enter, with_kwargs=True))
        handles.append(anatomy.embeddings.register_forward_hook(image.embedded))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fill_missing_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that this step did not reach, but an earlier one did, the gradient they have: zero.

    What no step has ever reached (the tower's blocks behind the feature layer) is left alone, weight decay included.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None and optimizer.state.get(parameter):
                parameter.grad = torch.zeros_like(parameter)


def zero_touch(parts: Mapping[str, Named]) -> Tensor:
    """Zero, made of one element of every trained parameter: backward through it gives them gradients of zero."""
    elements = [parameter.reshape(-1)[0].float() for named in parts.values() for _, parameter in named]
    return torch.stack(elements).sum() * 0.0


class _BlankImage:
    """Runs one blank image through tower and projector when a batch has no image of its own.

    Its moment is right after the token embedding, and its place the decoder's input, as for real images: weights are
    gathered, and gradients exchanged, in the order in which a process walks its graph, so the graphs must be alike.
    """

    def __init__(self, backbone: nn.Module, blank: Mapping[str, Tensor]) -> None:
        self.backbone, self.blank = backbone, dict(blank)
        self._wanted = False

    def enter(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._wanted = backbone.training and all(kwargs.get(name) is None for name in inputs_of("vision"))

    def embedded(self, embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._wanted:
            return output
        self._wanted = False
        read: Any = self.backbone.get_image_features
        features = read(**{key: value.to(output.device) for key, value in self.blank.items()})
        features = getattr(features, "pooler_output", features)
        flat = [features] if isinstance(features, Tensor) else list(features)
        zero = torch.stack([item.float().sum() for item in flat]).sum() * 0.0
        return output + zero.to(output.dtype)


def _under(module: nn.Module | None, parts: Mapping[str, Named]) -> Named:
    inside = {id(parameter) for parameter in module.parameters()} if module is not None else set()
    return [(name, parameter) for named in parts.values() for name, parameter in named if id(parameter) in inside]
