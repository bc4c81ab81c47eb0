"""A second model over the weights of a first one: a module tree of its own, whose tensors are the same."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import nn

from alula.files import regular
from alula.grafts.storage import WEIGHTS_FILE, read_facts
from alula.seam.hooks import settle_captures

_M = TypeVar("_M", bound=nn.Module)


def sharing(model: _M, *, without: Collection[str] = ()) -> _M:
    """A copy of `model` that shares its weights: what is put on one of the two is not on the other.

    Parameters of the copy are objects of their own over the same memory, which need no gradients; so are buffers that a
    checkpoint holds. Other buffers are copied, as forwards write into some (frequencies of rotary positions that go by
    the length, `longrope`), and config, hooks, grafts and policies are. Whatever writes into a weight in place changes
    both.

    Args:
        model: any.
        without: names of parameters, or of modules, whose weights are copied because they are to be written to.
    """
    settle_captures(model)
    memo: dict[int, Any] = {}
    own: set[int] = set()
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved]
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *buffers]:
        if name in without or name.startswith(tuple(f"{path}." for path in without)):
            own.add(id(tensor))
        elif id(tensor) not in memo:
            shared = tensor.detach()
            memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    return copy.deepcopy(model, {key: shared for key, shared in memo.items() if key not in own})


def written_by(path: Path, model: nn.Module) -> set[str]:
    """Names of weights and modules of a base that putting the adapter of a directory on writes to (`put_adapter`)."""
    facts = read_facts(path)
    modules = facts.get("modules", ())
    file = path / WEIGHTS_FILE
    if "peft_type" not in facts or not file.is_file():
        return set(modules)
    with safe_open(regular(file), framework="pt") as weights:
        names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in weights.keys()}  # noqa: SIM118
    return names & model.state_dict().keys()
