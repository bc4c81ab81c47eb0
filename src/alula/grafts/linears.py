"""The linears of a decoder layer, however their weights are stored, for grafts that stand beside them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.grafts.base import TRAINED
from alula.seam import NAME
from alula.weights import target_names


def named_linears(anatomy: Anatomy, index: int) -> dict[str, tuple[nn.Module, set[str]]]:
    """A decoder layer's linears by path, each with the names that mean it (see `alula.weights.target_names`)."""
    # inside an adapter of PEFT's the linear is called base_layer; a graft stands behind the adapter as a whole
    modules = {path: getattr(each, "base_layer", each) for path, each in anatomy.layers[index].named_modules()}
    return {
        path: (each, target_names(anatomy, path))
        for path, each in modules.items()
        if widths(each) is not None and not {"base_layer", NAME} & {*path.split(".")} and "lora_" not in path
    }


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(o, i) of a linear; None for what is no linear."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    found = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return found if isinstance(found[0], int) and isinstance(found[1], int) else None  # type: ignore[return-value]


def trained_like(module: nn.Module, layer: nn.Module, *, where: str) -> Tensor:
    """The tensor whose dtype and device something beside a module takes: the module's weights, or where these are
    quantized the first of the layer's that are not, such as a norm's.

    Args:
        where: what stands there, for errors.

    Raises:
        UsageError: the layer has none.
    """
    for tensor in (getattr(module, "weight", None), *layer.parameters()):
        if isinstance(tensor, Tensor) and tensor.dtype in TRAINED:
            return tensor
    raise UsageError(
        f"{where} is quantized, and nothing in its layer says in which precision it computes",
        remedy="load the host with its norms in bfloat16, float16 or float32",
    )


def key(path: str) -> str:
    """The name among modules of what stands beside a linear."""
    return path.replace(".", "__")


def path_of(key: str) -> str:
    """Inverse of `key`."""
    return key.replace("__", ".")
