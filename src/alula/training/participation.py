"""Every trained parameter takes part in every backward pass, on every process.

Sharded training exchanges gradients in lockstep: when one process has images and another only text, the second one has
no gradient for tower, projector or learners, the two reduce buffers of different sizes, and the job hangs (NCCL) or
dies (gloo). The cure here leaves the loss of a text-only batch bit-identical: *inside* the host's forward, where
sharded weights are gathered in the same order as on the other process, a blank image runs through tower and projector
and its features, times zero, are added to the last hidden state. Grafts do the like for their own silent parameters.
`fill_missing_gradients` gives one process the same semantics: a part that no sample reached has the gradient zero, not
none, so the optimizer's momentum moves alike for any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.training.parts import Named

_PERCEPTS = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@contextlib.contextmanager
def lockstep(model: nn.Module, parts: Mapping[str, Named], blank: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, training forwards of ``model`` reach all of ``parts``. Enter it before the model is sharded.

    Args:
        model: the model, PEFT wrapped or not.
        parts: its trained parameters.
        blank: the image processor's output for one blank image.
    """
    anatomy = Anatomy.of(model)
    handles = []
    if {"projector", "tower"} & set(parts) or any(".lora_" in name for name, _ in _under(anatomy.tower, parts)):
        image = _BlankImage(blank)
        handles.append(anatomy.backbone.register_forward_pre_hook(image.before, with_kwargs=True))
        handles.append(anatomy.backbone.register_forward_hook(image.after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fill_missing_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters that the batch did not reach the gradient they have: zero."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class _BlankImage:
    """Runs one blank image through tower and projector when a batch has no image of its own."""

    def __init__(self, blank: Mapping[str, Tensor]) -> None:
        self.blank = dict(blank)
        self._waiting: list[Tensor] = []  # a stack, so that a forward inside a forward finds its own

    def before(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._needed(backbone, kwargs):
            return
        where = next(value for value in kwargs.values() if isinstance(value, Tensor)).device
        read: Any = backbone.get_image_features
        output = read(**{key: value.to(where) for key, value in self.blank.items()})
        features = getattr(output, "pooler_output", output)
        flat = [features] if isinstance(features, Tensor) else list(features)
        self._waiting.append(sum((item.sum() for item in flat), start=flat[0].new_zeros(())) * 0.0)

    def after(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._needed(backbone, kwargs):
            return None
        hidden = output["last_hidden_state"]
        output["last_hidden_state"] = hidden + self._waiting.pop().to(hidden.dtype)
        return output

    @staticmethod
    def _needed(backbone: nn.Module, kwargs: dict[str, Any]) -> bool:
        return backbone.training and all(kwargs.get(name) is None for name in _PERCEPTS)


def _under(module: nn.Module | None, parts: Mapping[str, Named]) -> Named:
    inside = {id(parameter) for parameter in module.parameters()} if module is not None else set()
    return [(name, parameter) for named in parts.values() for name, parameter in named if id(parameter) in inside]
