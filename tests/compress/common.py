"""Calibration data and oracles that tests of compression share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo

LAYOUTS = ("3I4I2", "2I5", "1I6", "7")


def samples(name: str) -> list[dict[str, Tensor]]:
    """The samples of `zoo.batch(name, *LAYOUTS)`, one by one and without padding."""
    return [
        zoo.batch(name, layout, seed=i) if name in zoo.TEXT else _one(name, i) for i, layout in enumerate(layouts(name))
    ]


def layouts(name: str) -> tuple[str, ...]:
    return ("9", "7", "5", "8") if name in zoo.TEXT else LAYOUTS


def _one(name: str, index: int) -> dict[str, Tensor]:
    """One sample out of the whole batch, with the pixels it has there."""
    whole, before = zoo.pixels(name, 4), sum(layout.count("I") for layout in LAYOUTS[:index])
    one, count = zoo.batch(name, LAYOUTS[index], seed=index), LAYOUTS[index].count("I")
    parts = {key: value.tensor_split(4) for key, value in whole.items()}
    own = {key: torch.cat(value[before : before + count]) for key, value in parts.items()} if count else {}
    return {**one, **own}


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def linears(decoder: Any) -> dict[int, dict[str, nn.Linear]]:
    layers = decoder.layers
    return {
        i: {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        for i, layer in enumerate(layers)
    }


def decoder_of(model: Any) -> Any:
    inner = getattr(model, "model", model)
    inner = getattr(inner, "language_model", inner)
    return getattr(inner, "decoder", inner)


def captured(model: Any, modules: dict[str, nn.Linear], sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """{path: (S, in)} what matrices are given for one sample without padding."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: seen.__setitem__(path, args[0].detach().reshape(-1, args[0].shape[-1]).clone())
        )
        for path, module in modules.items()
    ]
    with torch.no_grad():
        model(**sample)
    for handle in handles:
        handle.remove()
    return seen


def chosen(sample: dict[str, Tensor], tokens: str) -> Tensor:
    """(S,) bool: the tokens of one sample without padding that count."""
    image = sample["input_ids"][0] == zoo.IMAGE
    return {"all": torch.ones_like(image), "image": image, "text": ~image}[tokens]


def state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
