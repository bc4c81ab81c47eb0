"""Parts taken out: MLP channels, attention heads, whole blocks. What is left is a smaller model of the same class.

Shapes: d the stream's width, D of a head, G key heads with as many query heads each, L layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy, unwrap
from alula.compress.calibration import Batches, Calibration
from alula.compress.originals import Originals
from alula.compress.settings import Removal
from alula.compress.targets import matrices, name_of
from alula.errors import DataError, HostError, UsageError
from alula.hosts.configs import first_line
from alula.seam import find
from alula.stats import Result
from alula.weights import linears, wanda_scores


@dataclass(frozen=True)
class Removed(Result):
    """What was taken out.

    Attributes:
        parameters_before, parameters_after: of the whole model.
        blocks: indices of the decoder layers that are gone.
        channels: of the MLP, by index of the layer in the model as it was.
        heads: key heads, with their query heads, likewise.
        config: the keys of the decoder's config that changed, and their values.
    """

    parameters_before: int
    parameters_after: int
    blocks: tuple[int, ...]
    channels: dict[int, tuple[int, ...]]
    heads: dict[int, tuple[int, ...]]
    config: dict[str, Any]


@torch.no_grad()
def remove(model: nn.Module, removal: Removal, batches: Batches | None = None) -> Removed:
    """Take parts out of a model, in place; save it as any other.

    Blocks are chosen first, all from one pass. Then the others are gone through in order, each calibrated with what was
    chosen before already without effect. Only when everything is chosen do matrices become smaller.

    Args:
        model: a host with separate query, key and value matrices, and an MLP of single matrices.
        removal: what, and how much of it.
        batches: model inputs, as for `prune`; none for magnitude.

    Raises:
        UsageError: something is attached to the model, or nothing, or all, would be removed; data as of `prune`.
        HostError: a decoder whose parts are not known, or whose config cannot say the new sizes. DataError: as `prune`.
        The
            model is left as it was then.
    """
    plan = _Plan(model, removal)
    if (removal.method == "wanda") != (batches is not None):
        missing = batches is None
        raise UsageError(
            "wanda needs calibration data" if missing else "magnitude looks at no data",
            remedy='pass batches, or method="magnitude"' if missing else "leave batches out",
        )
    plan.check_config()
    calibration = None
    if batches is not None:
        calibration = Calibration(model, batches, tokens=removal.tokens, skip_first=removal.skip_first)
    before = _parameters(model)
    with Originals() as originals:
        plan.choose_blocks(calibration, originals)
        plan.choose_parts(calibration, originals)
    changed = plan.cut()
    return Removed(before, _parameters(model), plan.blocks, plan.channels, plan.heads, changed)


def check_removal(model: nn.Module, removal: Removal) -> None:
    """Refuse what `remove` would refuse of a host, before any data are looked at. Nothing is changed.

    Raises:
        UsageError, HostError: see `remove`.
    """
    _Plan(model, removal).check_config()


class _Plan:
    """Chooses parts, and cuts them out."""

    def __init__(self, model: nn.Module, removal: Removal) -> None:
        if find(model) is not None:
            raise UsageError("something is attached to the model", remedy="detach grafts, policies and probes first")
        self.model, self.removal = model, removal
        self.anatomy = Anatomy.of(model)
        self.layers: Sequence[Any] = self.anatomy.layers
        self.common = set.intersection(*({path for path, _ in linears(layer)} for layer in self.layers))
        self.mlp = self.anatomy.mlp_names(self.common)
        self.attention, self.heads_at = self.anatomy.family.attention, self.anatomy.head_names(self.common)
        self.out = self.heads_at.out
        self._check_parts()
        config = self.anatomy.config
        self.width = int(getattr(config, self.mlp.width)) if self.mlp is not None else 0
        self.num_channels = self._count_channels()
        self.num_heads = _share(self.anatomy.num_kv_heads, removal.heads)
        self._check_counts()
        self.blocks: tuple[int, ...] = ()
        self.channels: dict[int, tuple[int, ...]] = {}
        self.heads: dict[int, tuple[int, ...]] = {}

    def _check_parts(self) -> None:
        kind = type(self.layers[0]).__name__
        if self.mlp is None and (self.removal.mlp or self.removal.blocks):
            raise HostError(
                f"the MLP of {kind} is not of single matrices that are known",
                remedy="remove heads, or prune single weights",
            )
        if self.removal.heads or self.removal.blocks:
            wanted = [self.out, *self.heads_at.read] if self.removal.heads else [self.out]
            if lacking := [path for path in wanted if path not in self.common]:
                raise HostError(
                    f"{kind} has no {lacking[0]} in every layer, by which its heads are known",
                    remedy="remove MLP channels, or prune single weights",
                )
        paths = self._changed_paths()
        if paths:
            matrices(self.model, paths, None)  # refuses what is quantized, shared or inside an adapter
        if self.removal.heads:
            self._check_heads()
        if self.removal.blocks and _numbers_layers(self.anatomy):
            raise HostError(
                f"{type(self.anatomy.host).__name__} numbers its layers: without a block the others would be others",
                remedy="remove heads or MLP channels",
            )

    def _changed_paths(self) -> tuple[str, ...]:
        paths: list[str] = []
        if self.removal.mlp and self.mlp is not None:
            paths += [*self.mlp.up, self.mlp.down]
        if self.removal.heads:
            paths += [self.out, *self.heads_at.read]
        if self.removal.blocks and self.mlp is not None:
            paths += [self.mlp.down, self.out]
        return tuple(dict.fromkeys(paths))

    def _check_heads(self) -> None:
        """Heads can be told apart in every matrix, and nothing looks at all of them together."""
        d, g, wide = self.anatomy.head_dim, self.anatomy.num_kv_heads, self.anatomy.num_heads
        for index, layer in enumerate(self.layers):
            attention: Any = layer.get_submodule(self.attention)
            known = tuple(path.removeprefix(f"{self.attention}.") for path in (*self.heads_at.read, self.out))
            own = {n: weight for n, weight in attention.named_parameters() if n.partition(".")[0] not in known}
            sizes = [layer.get_submodule(path).out_features for path in self.heads_at.read]
            sizes.append(layer.get_submodule(self.out).in_features)
            if sizes != [wide * d, g * d, g * d, wide * d]:
                raise HostError(
                    f"layer {index} has projections of widths {sizes}, not of {wide} heads of {d}",
                    remedy="remove MLP channels, or prune single weights",
                )
            if joint := [name for name, weight in own.items() if weight.shape != (d,)]:
                raise HostError(
                    f"{self.attention}.{joint[0]} of layer {index} looks at all heads together",
                    remedy="remove MLP channels, or prune single weights",
                )

    # -- how many -----------------------------------------------------------------------------------------------------

    def _count_channels(self) -> int:
        if not self.removal.mlp:
            return 0
        left = self.width - _share(self.width, self.removal.mlp)
        return self.width - -(-left // self.removal.multiple_of) * self.removal.multiple_of

    def _check_counts(self) -> None:
        asked = (
            (self.removal.mlp, self.num_channels, self.width, "MLP channels"),
            (self.removal.heads, self.num_heads, self.anatomy.num_kv_heads, "key heads"),
            (self.removal.blocks, self.removal.blocks, self.anatomy.num_layers, "blocks"),
        )
        for share, count, there, what in asked:
            if share and not 0 < count < there:
                by = f", {self.removal.multiple_of} at a time" if what == "MLP channels" else ""
                raise UsageError(
                    f"{share} of {there} {what} is {max(count, 0)}{by}: "
                    + ("nothing would be removed" if count <= 0 else "nothing would be left"),
                    remedy="ask for more" if count <= 0 else "ask for fewer",
                )

    def check_config(self) -> None:
        """The host's class, given the new config, has parameters of just the new shapes."""
        host: Any = self.anatomy.host
        try:
            kind = type(host.config)
            planned = kind.from_dict(self._with_changes(copy.deepcopy(host.config)).to_dict())
            with torch.device("meta"):
                shapes = {name: tuple(weight.shape) for name, weight in type(host)(planned).named_parameters()}
        except Exception as error:  # whatever a class says of sizes that it does not take
            raise self._unsaid(first_line(error)) from error
        expected = self._shapes_after()
        if shapes != expected:
            name = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
            raise self._unsaid(f"{name} would be {shapes.get(name)}, not {expected.get(name)}")

    def _unsaid(self, why: str) -> HostError:
        legal = ""
        if self.removal.heads:
            width, group = self.anatomy.hidden_size, self.anatomy.num_heads // self.anatomy.num_kv_heads
            left = [n for n in range(1, self.anatomy.num_kv_heads) if width % (n * group) == 0]
            legal = (
                f"; many classes take only numbers of heads that divide their width: here with {left} key heads left"
            )
        return HostError(
            f"the config of {type(self.anatomy.host).__name__} cannot say the new sizes: {why}",
            remedy=f"remove other parts, or another share of them{legal}",
        )

    def _changes(self) -> dict[str, Any]:
        config, found = self.anatomy.config, dict[str, Any]()
        if self.num_channels and self.mlp is not None:
            found[self.mlp.width] = self.width - self.num_channels
        if self.num_heads:
            group = self.anatomy.num_heads // self.anatomy.num_kv_heads
            found["num_attention_heads"] = self.anatomy.num_heads - group * self.num_heads
            if hasattr(config, "num_key_value_heads"):
                found["num_key_value_heads"] = self.anatomy.num_kv_heads - self.num_heads
            found["head_dim"] = self.anatomy.head_dim
        if self.removal.blocks:
            gone = set(self.blocks or range(self.removal.blocks))
            found["num_hidden_layers"] = self.anatomy.num_layers - len(gone)
            for name, values in _by_layer(self.anatomy).items():
                found[name] = [value for index, value in enumerate(values) if index not in gone]
        return found

    def _with_changes(self, config: Any) -> Any:
        text = config.get_text_config(decoder=True)
        for name, value in self._changes().items():
            setattr(text, name, value)
        return config

    def _shapes_after(self) -> dict[str, tuple[int, ...]]:
        """The shapes that parameters will have, by name, the first blocks taken for those that go."""
        host: Any = self.anatomy.host
        prefix = next(name for name, module in host.named_modules() if module is self.layers[0]).rpartition(".")[0]
        group = self.anatomy.num_heads // self.anatomy.num_kv_heads * self.anatomy.head_dim
        queries, *keys = self.heads_at.read
        cuts = {queries: group, **dict.fromkeys(keys, self.anatomy.head_dim)}
        found = {}
        for name, weight in host.named_parameters():
            shape = list(weight.shape)
            if name.startswith(f"{prefix}."):
                index, _, path = name.removeprefix(f"{prefix}.").partition(".")
                if int(index) >= self.anatomy.num_layers - self.removal.blocks:
                    continue
                module = path.rpartition(".")[0]
                if self.num_heads and module in cuts:
                    shape[0] -= self.num_heads * cuts[module]
                if self.num_heads and path == f"{self.out}.weight":
                    shape[1] -= self.num_heads * group
                if self.num_channels and self.mlp is not None and module in self.mlp.up:
                    shape[0] -= self.num_channels
                if self.num_channels and self.mlp is not None and path == f"{self.mlp.down}.weight":
                    shape[1] -= self.num_channels
            found[name] = tuple(shape)
        return found

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose_blocks(self, calibration: Calibration | None, originals: Originals) -> None:
        """Note the blocks that write least to the stream, and make them write nothing."""
        if not self.removal.blocks:
            return
        assert self.mlp is not None
        writing, count = (self.out, self.mlp.down), self.anatomy.num_layers
        sums: Mapping[str, Tensor] = {}
        if calibration is not None:
            sums = calibration.sums({index: ["", *writing] for index in range(count)})
        scores = []
        for index in range(count):
            score = sum(float(self._columns(index, path, sums).sum()) for path in writing)
            stream = float(sums[f"layers.{index}"].sum().sqrt()) if sums else 1.0
            scores.append(score / stream)
        order = sorted(range(count), key=scores.__getitem__)
        self.blocks = tuple(sorted(order[: self.removal.blocks]))
        for index in self.blocks:
            for path in writing:
                for parameter in self.layers[index].get_submodule(path).parameters():
                    originals.keep(parameter)
                    parameter.zero_()

    def choose_parts(self, calibration: Calibration | None, originals: Originals) -> None:
        """Note the heads and channels of each layer that is left, and make them of no effect."""
        paths = [self.out] if self.num_heads else []
        if self.num_channels and self.mlp is not None:
            paths.append(self.mlp.down)
        if not paths:
            return
        for index in range(self.anatomy.num_layers):
            if index in self.blocks:
                continue
            sums = {} if calibration is None else calibration.sums({index: paths})
            for path in paths:
                is_heads = path == self.out
                parts = self.anatomy.num_kv_heads if is_heads else self.width
                count = self.num_heads if is_heads else self.num_channels
                scores = self._columns(index, path, sums)
                width = len(scores) // parts
                order = torch.sort(scores.view(parts, width).sum(dim=1), stable=True).indices
                gone = order[:count].sort().values
                (self.heads if is_heads else self.channels)[index] = tuple(gone.tolist())
                weight = self.layers[index].get_submodule(path).weight
                originals.keep(weight)
                weight.view(len(weight), -1, width)[:, gone] = 0

    def _columns(self, index: int, path: str, sums: Mapping[str, Tensor]) -> Tensor:
        """(in,) the scores of a matrix summed over its outputs."""
        weight: Any = self.layers[index].get_submodule(path).weight
        scores = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        if sums:
            scores = wanda_scores(weight, sums[name_of(index, path)].sqrt())
        found = scores.sum(dim=0, dtype=torch.float64)
        if not bool(found.isfinite().all()):
            raise DataError(f"{name_of(index, path)} has weights that are not finite", remedy="load the model again")
        return found

    # -- cutting ------------------------------------------------------------------------------------------------------

    def cut(self) -> dict[str, Any]:
        """Make what was chosen be gone, and the config say so; return what changed in it."""
        changes = self._changes()
        for index, layer in enumerate(self.layers):
            if index in self.channels and self.mlp is not None:
                left = _left(self.width, self.channels[index], 1)
                for path in self.mlp.up:
                    _cut(layer.get_submodule(path), 0, left)
                _cut(layer.get_submodule(self.mlp.down), 1, left)
            if index in self.heads:
                self._cut_heads(layer, self.heads[index])
        kept = [layer for index, layer in enumerate(self.layers) if index not in self.blocks]
        if self.blocks:
            setattr(self.anatomy.decoder, self.anatomy.family.layers, nn.ModuleList(kept))
            for index, layer in enumerate(kept):
                for module in layer.modules():
                    if hasattr(module, "layer_idx"):
                        module.layer_idx = index
        for config in self._configs():
            for name, value in changes.items():
                setattr(config, name, value)
        return changes

    def _cut_heads(self, layer: Any, gone: Sequence[int]) -> None:
        attention = layer.get_submodule(self.attention)
        d, g, wide = self.anatomy.head_dim, self.anatomy.num_kv_heads, self.anatomy.num_heads
        queries, keys = _left(g, gone, wide // g * d), _left(g, gone, d)
        for path, left in zip(self.heads_at.read, (queries, keys, keys), strict=True):
            _cut(layer.get_submodule(path), 0, left)
        _cut(layer.get_submodule(self.out), 1, queries)
        # what some classes note beside their config
        now = {"num_heads": wide - wide // g * len(gone), "num_key_value_heads": g - len(gone)}
        for name, value in now.items():
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, value)

    def _configs(self) -> list[Any]:
        """The decoder's config, and copies of it that modules have."""
        kind = type(self.anatomy.config)
        modules = (getattr(module, "config", None) for module in self.anatomy.host.modules())
        found = [each for each in modules if type(each) is kind]
        return [*{id(each): each for each in (self.anatomy.config, *found)}.values()]


def _cut(linear: Any, axis: int, left: Tensor) -> None:
    """Leave some of the outputs (axis 0) or inputs (axis 1) of a linear layer."""
    weight = linear.weight
    linear.weight = nn.Parameter(weight.index_select(axis, left.to(weight.device)), requires_grad=weight.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
    if axis == 0 and linear.bias is not None:
        bias = linear.bias
        linear.bias = nn.Parameter(bias.index_select(0, left.to(bias.device)), requires_grad=bias.requires_grad)


def _share(count: int, share: float) -> int:
    """How many of some parts a share of them is: 29 of 100 by 0.29, though their product is a little less."""
    return int(count * share + 1e-9)


def _left(count: int, gone: Sequence[int], width: int) -> Tensor:
    """Indices of what is left of `count` parts of some width."""
    kept = torch.tensor([part for part in range(count) if part not in set(gone)])
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _by_layer(anatomy: Anatomy) -> dict[str, list[Any]]:
    """What the decoder's config lists layer by layer."""
    given = {name: value for name, value in vars(anatomy.config).items() if "layer" in name}
    return {n: list(v) for n, v in given.items() if isinstance(v, list | tuple) and len(v) == anatomy.num_layers}


def _numbers_layers(anatomy: Anatomy) -> bool:
    """Whether layers are known by number: by lists of numbers in the config, or as those that image features join."""
    lists = {n: v for n, v in vars(anatomy.config).items() if "layer" in n and isinstance(v, list | tuple) and v}
    joins = "deepstack_visual_embeds" in inspect.signature(type(anatomy.decoder).forward).parameters
    return joins or any(len(value) != anatomy.num_layers for value in lists.values())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unwrap(model).parameters())
