"""What policies are held to: nothing is taken out, tokens without work are barred as keys, and nothing is cached.

What such a token becomes in a layer it has no work in plays no part then: nobody looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.seam import dialect

Left = Callable[[int, Tensor], Tensor]
"""given a layer and the (B, S) ids of all tokens so far, the (B, S) bool tokens that have work in that layer"""


@contextmanager
def masked(model: Any, left: Left, *, puts_back: bool = True) -> Iterator[None]:
    """The host with tokens barred by masks alone; to be run without a cache.

    Args:
        puts_back: a token that comes back in a later layer is put back there as it was when it left.
    """
    anatomy = Anatomy.of(model)
    seen: dict[str, Tensor] = {}

    def note(host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs["input_ids"]

    def bar(index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        named = dialect.named_of(dialect.positional_names(layer), args, kwargs)
        working = left(index, seen["ids"])
        length = working.shape[1]
        keys = working[:, None, None] | torch.eye(length, dtype=torch.bool)
        mask = named.get(dialect.MASK)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask.dtype == torch.bool:
            named[dialect.MASK] = mask & keys
        else:
            named[dialect.MASK] = mask.expand(len(keys), -1, -1, -1).masked_fill(~keys, torch.finfo(mask.dtype).min)
        hidden = named.pop(dialect.HIDDEN)
        seen["before"] = hidden
        return (hidden,), named

    def put_back(index: int, layer: nn.Module, args: Any, output: Any) -> Tensor:
        return torch.where(left(index, seen["ids"])[..., None], output, seen["before"])

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    for index, layer in enumerate(anatomy.layers):

        def hook(layer: nn.Module, args: Any, kwargs: Any, index: int = index) -> Any:
            return bar(index, layer, args, kwargs)

        def back(layer: nn.Module, args: Any, output: Any, index: int = index) -> Any:
            return put_back(index, layer, args, output)

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if puts_back:
            handles.append(layer.register_forward_hook(back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def silenced(model: Any, part: str, layers: tuple[int, ...], skips: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What attention, the MLP or both add to tokens that skip them, put to 0; nothing else is changed.

    Args:
        skips: from the (B, S) ids of all tokens so far, the (B, S) bool that skip.
    """
    anatomy = Anatomy.of(model)
    seen: dict[str, Tensor] = {}

    def note(host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["ids"] = kwargs["input_ids"]

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        added = dialect.hidden_of_output(output)
        here = skips(seen["ids"]).reshape(added.shape[:-1])  # OPT's MLP has the tokens of all samples in one line
        return dialect.output_with_hidden(output, added.masked_fill(here[..., None], 0))

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    for layer in layers:
        modules = {"attention": [anatomy.attention_out(layer)], "mlp": [anatomy.mlp_out(layer)]}
        for module in modules.get(part) or modules["attention"] + modules["mlp"]:
            handles.append(module.register_forward_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
