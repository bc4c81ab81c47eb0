"""The contract of a graft: a config, per-layer modules that live inside the host, and the hooks that run them."""

from __future__ import annotations

import abc
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import AfterValidator, ValidationError
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import AdapterError, UsageError
from alula.seam import NAME, Handle, OutputOf, Owner, Phase, Point, Seam, marked, marks, retract
from alula.seam.points import PartMaker, PointFunction
from alula.settings import Int, Settings, refusal

logger = logging.getLogger(__name__)
TRAINED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _some(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if layers == ():
        raise ValueError("it is empty; name some, or leave it out for all")
    return layers


Layers = Annotated[tuple[Int, ...] | None, AfterValidator(_some)]
"""decoder layers that get a graft, negative ones counted from the last; None: all"""


class GraftConfig(Settings):
    """Settings of a graft, whose fields are JSON values."""

    graft_type: ClassVar[str]
    free: ClassVar[tuple[str, ...]] = ()
    """settings that trained weights do not depend on"""
    renamed: ClassVar[Mapping[str, str]] = {}
    """settings' names in adapters of earlier versions, and today's"""
    renamed_weights: ClassVar[Mapping[str, str]] = {}
    """last parts of weights' names in adapters of earlier versions, and today's"""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str | None = None) -> Self:
        """Inverse of `to_dict`.

        Raises:
            UsageError: an unknown setting (naming the nearest known one) or a value the config refuses.
        """
        old = [key for key in values if key in cls.renamed]
        twice = next((key for key in old if cls.renamed[key] in values), None)
        if twice is not None:
            raise UsageError(f"it stands beside {cls.renamed[twice]}, its name today", where=cls.named(twice))
        if old:
            logger.warning(
                "%s: read %s under their names of an earlier version", where or cls.graft_type, ", ".join(old)
            )
            values = {cls.renamed.get(key, key): value for key, value in values.items()}
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise refusal(
                error, cls, values, where=lambda path: ": ".join(filter(None, (where, cls.named(path))))
            ) from None

    @classmethod
    def named(cls, path: str) -> str:
        """Settings are called by the graft's type in errors."""
        return ".".join(filter(None, (cls.graft_type, path)))

    @classmethod
    def with_current_names(cls, weights: Mapping[str, Tensor], *, where: str | None = None) -> Mapping[str, Tensor]:
        """Weights of an adapter under today's names, whatever version saved it; earlier names are logged."""
        renamed = {}
        for key in weights:
            path, dot, last = key.rpartition(".")
            today = f"{path}{dot}{cls.renamed_weights.get(last, last)}"
            if today not in weights:
                renamed[key] = today
        if not renamed:
            return weights
        logger.warning(
            "%s: read %d weights under their names of an earlier version, such as %s for %s",
            where or cls.graft_type,
            len(renamed),
            *next(iter(renamed.items())),
        )
        return {renamed.get(key, key): value for key, value in weights.items()}


class Graft(Owner, abc.ABC):
    """A graft attached to a host.

    The trainable parts are per-layer modules found at ``layer.alula[name]``, or one of the decoder as a whole found at
    ``decoder.alula[name]``: they belong to the host's module tree, so `.to`, FSDP, deepcopy, optimizers and device maps
    treat them like any other part of it. This object is their handle.

    Attributes:
        name: under which it is attached.
        config: its settings.
        layers: the per-layer modules by decoder layer index.
        whole: the module of the decoder as a whole, or None.
        owner_id: tells what it left in a cache from what others of its name did.
    """

    def __init__(self, seam: Seam, name: str, config: Any) -> None:
        self.seam, self.name, self.config = seam, name, config
        self.layers: dict[int, nn.Module] = {}
        self.whole: nn.Module | None = None
        self.owner_id: str = uuid.uuid4().hex
        self._handles: list[Handle] = []

    # -- for subclasses -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def build_layer(self, index: int) -> nn.Module:
        """The module for decoder layer `index`, on that layer's device."""

    @abc.abstractmethod
    def place(self, index: int, module: Any) -> None:
        """Put the module's functions (bound methods of it) at points of decoder layer `index`, with `on`; what else it
        asks of the seam is given back when the graft is detached, with `hold`."""

    @abc.abstractmethod
    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part name, e.g. "wings.visual"; together all of them, none twice."""

    def on(self, point: Point | OutputOf, index: int, function: PointFunction, part: PartMaker | None = None) -> None:
        """Have ``function(view, hidden)`` called at a point of a decoder layer, until the graft is detached.

        Args:
            point: where in the layer.
            index: index of the decoder layer.
            function: a bound method of the layer's module, which returns other hidden states, or None.
            part: another, which gives what stands there once the layer is compiled.
        """
        self.hold(self.seam.on(point, index, function, phase=Phase.ADD, owner=self.name, part=part))

    def hold(self, handle: Handle) -> None:
        """Have `handle` removed when the graft is detached."""
        self._handles.append(handle)

    # -- lifecycle ------------------------------------------------------------------------------------------------

    @classmethod
    def indices(cls, anatomy: Anatomy, config: Any) -> list[int]:
        """Indices of the decoder layers it is to grow in: those that its settings name, or all it can stand in.

        Raises:
            UsageError: a layer that the decoder does not have. HostError: one that lacks what the graft needs.
        """
        return sorted(set(anatomy.layer_indices(getattr(config, "layers", None))))

    def grow(self, indices: list[int]) -> None:
        """Build and hook the modules of the given decoder layers."""
        for index in indices:
            layer = self.seam.anatomy.layers[index]
            module = self.layers[index] = self._put_into(layer, self.build_layer(index))
            self.place(index, module)

    def grow_whole(self, module: nn.Module) -> None:
        """Put in the module of the decoder as a whole."""
        self.whole = self._put_into(self.seam.anatomy.decoder, module)

    def _put_into(self, parent: nn.Module, module: nn.Module) -> nn.Module:
        container: Any = getattr(parent, NAME, None) or nn.ModuleDict()
        container[self.name] = module.train(parent.training)
        parent.add_module(NAME, container)
        return module

    def detach(self) -> None:
        """Take every part and hook out of the host again, where they were not yet."""
        if self.seam.owners.get(self.name) is not self:
            return  # another may have its name by now
        for handle in self._handles:
            handle.remove()
        parents = [self.seam.anatomy.layers[index] for index in self.layers]
        for parent in parents if self.whole is None else [*parents, self.seam.anatomy.decoder]:
            container: Any = parent.get_submodule(NAME)
            del container[self.name]
            if not container:
                delattr(parent, NAME)
        retract(self.seam.anatomy.host, self.name)
        self.seam.release(self.name)

    @property
    def enabled(self) -> bool:
        """Whether it takes part in the forwards that this thread begins."""
        return self.owner_id not in marks()

    def disabled(self) -> AbstractContextManager[None]:
        """The host without this graft, for the forwards that this thread (or asyncio task) begins inside the block."""
        return marked(self.owner_id)

    @property
    def leaves_text(self) -> bool:
        """Whether prompts without media are the host's own computation with it, to the bit, and their answers too."""
        return False

    @property
    def further_tokens(self) -> int:
        """How many ids it has behind the host's vocabulary."""
        return 0

    # -- parameters -----------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters as ("layers.3.visual.q.down", tensor); those of the decoder as a whole as "decoder.condition"."""
        for place, module in self._modules():
            for name, parameter in module.named_parameters():
                yield f"{place}.{name}", parameter

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        if self.whole is not None:
            yield "decoder", self.whole
        for index, module in self.layers.items():
            yield f"layers.{index}", module

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by the names of `named_parameters`."""
        return {
            f"{place}.{name}": value for place, module in self._modules() for name, value in module.state_dict().items()
        }

    def load_state_dict(self, weights: Mapping[str, Tensor], *, where: str | None = None) -> None:
        """Copy weights in, strictly.

        Raises:
            AdapterError: any key missing, unused, of another shape, or holding what cannot be a trained weight; nothing
                is changed then.
        """
        mine = self.state_dict()
        check_keys(mine, weights, where=where)
        check_values(mine, weights, where=where)
        for name, value in mine.items():
            value.copy_(weights[name])

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        layers = f", layers={len(self.layers)}" if self.layers else ""
        return f"{type(self).__name__}(name={self.name!r}{layers}, parameters={count:,})"


def check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Raise an AdapterError unless both mappings hold the same names with the same shapes."""
    for verdict, names in (("missing", expected.keys() - given.keys()), ("not used", given.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise AdapterError(
                f"{len(names)} weights are {verdict}: {shown}",
                where=where,
                remedy="load it into the host and with the settings it was trained with",
            )
    for name, value in expected.items():
        if value.shape != given[name].shape:
            raise AdapterError(
                f"{name} has shape {tuple(given[name].shape)}, the host needs {tuple(value.shape)}",
                where=where,
                remedy="load it into a host of the size it was trained with",
            )


def check_values(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, where: str | None = None) -> None:
    """Raise an AdapterError unless the tensors can be trained weights: finite, and of a type that is trained."""
    for name, value in given.items():
        wanted = expected[name].dtype
        if value.dtype not in TRAINED if wanted.is_floating_point else value.dtype != wanted:
            raise AdapterError(
                f"{name} is of type {str(value.dtype).removeprefix('torch.')}",
                where=where,
                remedy="save it in float32, float16 or bfloat16" if wanted.is_floating_point else "save it again",
            )
        if wanted.is_floating_point and not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"{name} holds {int((~torch.isfinite(value)).sum())} values that are NaN or infinite",
                where=where,
                remedy="its training diverged, or the file is damaged: take an earlier one",
            )
