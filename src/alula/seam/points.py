"""Named points of a decoder layer, and the one hook the seam has at each: who reads or changes what, in which order.

At a point stand functions. They run in order of their phases, within a phase in the order in which they were put there,
so what a graft sees does not depend on what else was attached before it or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cached_property, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alula.anatomy import Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.seam import dialect
from alula.seam.attention import EAGER, answer_from_weights, mask_with_bias
from alula.seam.compiled import CompiledLayer
from alula.seam.conductor import Conductor
from alula.seam.context import NAME, ForwardContext
from alula.seam.frame import Frame, LinearPart, Part, Uncompiled, inside
from alula.seam.hooks import ByThread, Handle, with_keywords
from alula.seam.requests import Foresight, Request
from alula.seam.view import LayerView

# The functions at a point are compiled, the way to them is not: torch.compile guards no hooks, and would run those of
# one layer in another.
_untraced = torch.compiler.disable(recursive=False)


# of a layer that is compiled; what stands at its input runs before it, and what stands at its output behind it
_COMPILED_HOOKS = frozenset({"compile", "enter", "leave", "before attention, compiled", "after attention, compiled"})


class Point(StrEnum):
    """Where in a decoder layer: the block's input and output, the output of a norm, the input of attention or MLP, and
    what attention ("attention", grafts included) and the MLP ("mlp") add to the stream."""

    BLOCK_INPUT = "block_input"
    ATTENTION_NORM = "attention_norm"
    ATTENTION_INPUT = "attention_input"
    ATTENTION = "attention"
    MLP_NORM = "mlp_norm"
    MLP_INPUT = "mlp_input"
    MLP = "mlp"
    BLOCK_OUTPUT = "block_output"


_COMPILED_POINTS = frozenset({Point.BLOCK_INPUT, Point.ATTENTION, Point.BLOCK_OUTPUT})


class Phase(IntEnum):
    """When at a point. Functions of all phases but READ run again where gradient checkpointing recomputes the layer."""

    TOKENS = 0  # whoever takes tokens out says which are left: (B, M) of those it leaves, among the forward's new ones
    EDIT = 1  # interventions: the hidden states become others
    ADD = 2  # grafts: something is added to them
    READ = 3  # taps and probes: they are looked at


@dataclass(frozen=True)
class InputOf:
    """Where a module below a decoder layer, such as "mlp.down_proj", is given its input.

    Attributes:
        path: of the module, below the layer.
    """

    path: str

    def __str__(self) -> str:
        return f"input of {self.path}"


@dataclass(frozen=True)
class OutputOf:
    """Where a module below a decoder layer, such as "mlp.down_proj", gives its output.

    Functions there are given the module's input as well: ``function(view, output, given)``.

    Attributes:
        path: of the module, below the layer.
    """

    path: str

    def __str__(self) -> str:
        return f"output of {self.path}"


AnyPoint = Point | InputOf | OutputOf
PointFunction = Callable[..., Tensor | None]
"""``function(view, hidden)``; at an `OutputOf` ``function(view, output, given)``"""
PartMaker = Callable[[LayerView], Part | LinearPart | None]
"""given a layer of a forward, what a graft adds there once it is compiled; None: nothing"""


@dataclass(frozen=True, eq=False)
class Entry:
    """A function at a point, and the mark that a forward has to carry for it to be called (None: every one).

    Attributes:
        part: gives what stands there in a compiled layer; None: the layer cannot be compiled while it is called.
    """

    phase: Phase
    function: PointFunction
    owner: str
    mark: Hashable | None
    part: PartMaker | None = None

    @cached_property
    def is_reading(self) -> bool:
        """Whether it changes nothing."""
        return self.phase is Phase.READ

    def is_for(self, ctx: ForwardContext | None) -> bool:
        """Whether it is called in that forward."""
        return self.mark is None or (ctx is not None and self.mark in ctx.marks)


class LayerHooks:
    """The hooks of one decoder layer. Each is there only while something needs it.

    Attributes:
        has_workers: whether somebody says which tokens have work in this layer.
        has_parts: whether somebody tells its attention from its MLP there.
        foresights: who wants to know its attention before.
        reads_weights: whether eager attention's weights are read in this layer.
        is_biased: whether attention may be biased in this layer.
    """

    def __init__(self, anatomy: Anatomy, index: int, *, is_watched: bool) -> None:
        """
        Args:
            is_watched: whether forwards have to see this layer entered, whoever stands in it.
        """
        self.anatomy, self.index, self.is_watched = anatomy, index, is_watched
        self.reads_weights = self.is_biased = self.has_workers = self.has_parts = False
        self.foresights: tuple[Request[Foresight], ...] = ()
        self._conductor = Conductor(anatomy, index, self._current)
        self.compiled: CompiledLayer | None = None
        self._entries: dict[AnyPoint, tuple[Entry, ...]] = {}
        self._handles: dict[str, RemovableHandle | Handle] = {}
        self._inside: ByThread[ref[ForwardContext]] = ByThread()
        self._is_released = False
        # its layer drops the keyword that says which forward it is in (Nemotron)
        self._is_bridged = index in anatomy.attended and not anatomy.passes_keywords
        self._own: set[int] = set()  # of its handles, by which hooks are told from those of others
        self._is_met_before = False  # whether what attention is given is looked at before it runs
        self._tables: list[Mapping[int, Any]] = []  # of hooks at the modules below the layer
        self._hooked_for: Any = None if is_watched else self._needs()
        self.update()

    # -- who stands here ------------------------------------------------------------------------------------------

    def put(self, point: AnyPoint, entry: Entry) -> None:
        """Add a function to a point, behind those of its phase."""
        before = self._entries
        there = sorted((*before.get(point, ()), entry), key=lambda each: each.phase)
        self._entries = {**before, point: tuple(there)}
        try:
            self.update()
        except BaseException:  # a point that this layer does not have
            self._entries = before
            raise

    def drop(self, is_gone: Callable[[Entry | Request[Any]], bool]) -> None:
        """Take away what is said to be gone."""
        left = {point: tuple(each for each in there if not is_gone(each)) for point, there in self._entries.items()}
        self._entries = {point: there for point, there in left.items() if there}
        self.foresights = tuple(request for request in self.foresights if not is_gone(request))
        self.update()

    def replace(self, point: Point, module: nn.Module) -> Handle:
        """Put `module` in the place of the layer's attention or MLP; see `Seam.replace`."""
        layer = self.anatomy.layers[self.index]
        own = self.anatomy.attention(self.index) if point is Point.ATTENTION else self.anatomy.mlp(self.index)
        path = next(name for name, each in layer.named_modules() if each is own)
        self._put_module(path, module)
        return Handle(self._restore, point, path, module, own)

    def _put_module(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self.remove()
        setattr(self.anatomy.layers[self.index].get_submodule(parent), name, module)
        self.update()

    def _restore(self, point: Point, path: str, module: nn.Module, own: nn.Module) -> None:
        if self.anatomy.layers[self.index].get_submodule(path) is not module:
            raise UsageError(
                f"another module stands in for the {point} of decoder layer {self.index}",
                remedy="take stand-ins away in reverse order",
            )
        self._put_module(path, own)

    def _needs(self) -> tuple[Any, ...]:
        """What hooks are registered for."""
        work = self.has_workers, self.has_parts
        return self._entries, work, self.foresights, self.reads_weights, self.is_biased, self.compiled

    def update(self) -> None:
        """Register the hooks that are needed now, and remove the others."""
        if self._is_released or (needs := self._needs()) == self._hooked_for:
            return
        self._hooked_for = None  # until all of them are there
        entering = self._entries.get(Point.BLOCK_INPUT, ())
        self._takers = tuple(entry for entry in entering if entry.phase is Phase.TOKENS)
        self._editors = tuple(entry for entry in entering if entry.phase is Phase.EDIT)
        self._others = tuple(entry for entry in entering if entry.phase >= Phase.ADD)
        used = set(self._entries)
        inner = used - {Point.BLOCK_INPUT, Point.BLOCK_OUTPUT}
        layer = self.anatomy.layers[self.index]
        wanted: dict[str, Callable[[], RemovableHandle | Handle]] = {}
        how = "" if self.compiled is None else ", compiled"
        if self.compiled is not None:
            wanted["compile"] = self.compiled.put
        self._conductor.foresights = self.foresights
        if self.has_workers or self.foresights:
            wanted["conduct"] = self._conductor.put
        if self.has_parts:
            wanted["conduct parts"] = self._conductor.put_parts
        if self.is_watched or used:
            wanted["enter"] = lambda: layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        is_bridged = self._is_bridged and bool(
            used or self.has_workers or self.foresights or self.reads_weights or self.is_biased
        )
        if is_bridged:
            wanted["enter"] = lambda: layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        # attention alone is told of its forward; what runs behind it asks what was put down by those that know
        attended = self.index in self.anatomy.attended
        is_out = attended and self.anatomy.family.attention_out == self.anatomy.family.attention
        own = {Point.ATTENTION} if is_out else set()
        told = own | {Point.ATTENTION_INPUT} if attended else set()
        is_read = any(entry.phase is Phase.READ for point in inner for entry in self._entries[point])
        if is_bridged or self.has_parts or is_read or used - told - {Point.BLOCK_INPUT}:
            wanted["leave"] = lambda: layer.register_forward_hook(self._leave)
        if attended:
            wanted |= self._wanted_at_attention(used, own, is_bridged=is_bridged, how=how)
        if Point.ATTENTION_NORM in used:
            norm = self.anatomy.attention_norm(self.index)
            wanted["attention norm"] = lambda: norm.register_forward_hook(self._after_input_norm)
        if Point.MLP_NORM in used:
            mlp_norm = self.anatomy.mlp_norm(self.index)
            wanted["mlp norm"] = lambda: mlp_norm.register_forward_hook(self._after_mlp_norm)
        if Point.MLP_INPUT in used:
            mlp = self.anatomy.mlp(self.index)
            wanted["before mlp"] = lambda: mlp.register_forward_pre_hook(self._before_mlp, with_kwargs=True)
        if Point.MLP in used:
            mlp_out = self.anatomy.mlp_out(self.index)
            wanted["after mlp"] = lambda: mlp_out.register_forward_hook(self._after_mlp)
        for point in used:
            # a stand-in may lack the module
            if isinstance(point, InputOf) and (module := _below(layer, point.path)) is not None:
                wanted[str(point)] = partial(module.register_forward_pre_hook, partial(self._before_module, point))
            if isinstance(point, OutputOf) and (module := _below(layer, point.path)) is not None:
                after_module = self._after_module if self.compiled is None else self._behind_compiled_module
                name = str(point) + how
                wanted[name] = partial(module.register_forward_hook, partial(after_module, point))
        if ("compile" in self._handles) != ("compile" in wanted) and self._conductor.is_outermost:
            self._handles.pop("conduct").remove()  # it stands on what comes or goes, and is put again
        for name in self._handles.keys() - wanted.keys():
            self._handles.pop(name).remove()
        for name, register in wanted.items():
            if name not in self._handles:
                self._handles[name] = register()
        self._own = {each.id for each in self._handles.values() if isinstance(each, RemovableHandle)}
        self._is_met_before = not {"before attention", "before attention, compiled"}.isdisjoint(self._handles)
        self._hooked_for = needs

    def _wanted_at_attention(
        self, used: set[AnyPoint], own: set[Point], *, is_bridged: bool, how: str
    ) -> dict[str, Callable[[], RemovableHandle | Handle]]:
        """Hooks at the layer's attention and behind it, by name.

        Args:
            used: points at which something stands.
            own: those of them whose functions attention's own output is handed to.
            is_bridged: whether attention is told of its forward by the seam.
            how: what a name ends with in a layer that is compiled.
        """
        attention, after = self.anatomy.attention(self.index), self.anatomy.attention_out(self.index)
        wanted: dict[str, Callable[[], RemovableHandle | Handle]] = {}
        if is_bridged:
            wanted["bridge"] = lambda: attention.register_forward_pre_hook(self._tell, with_kwargs=True, prepend=True)
        # its own output is told, too, which tokens attention was given
        if self.has_parts or self.reads_weights or self.is_biased or used - own - {Point.BLOCK_INPUT}:
            before = self._before_attention if self.compiled is None else self._into_compiled
            wanted["before attention" + how] = lambda: attention.register_forward_pre_hook(before, with_kwargs=True)
        if self.reads_weights or (Point.ATTENTION in used and after is attention):
            behind = self._after_attention if self.compiled is None else self._behind_compiled
            wanted["after attention" + how] = lambda: attention.register_forward_hook(behind, with_kwargs=True)
        if Point.ATTENTION in used and after is not attention:
            wanted["behind attention"] = lambda: after.register_forward_hook(self._after_attention_norm)
        return wanted

    def remove(self) -> None:
        """Take every hook out of the layer."""
        self._hooked_for = None
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def release(self) -> None:
        """Take every hook out of the layer for good: handles that are removed later put none back."""
        self._is_released = True
        self.remove()

    # -- one forward ----------------------------------------------------------------------------------------------

    def parts(self, ctx: ForwardContext) -> tuple[tuple[Part, ...], dict[str, tuple[LinearPart, ...]]]:
        """What grafts add in this layer once it is compiled: to attention, and to outputs of modules below by path.

        Raises:
            Uncompiled: something is asked of it in this forward that cannot be.
        """
        if self.compiled is None:
            raise Uncompiled("it is compiled no more")  # somebody wraps its forward, which could not be given back
        below = [point for point in self._entries if isinstance(point, OutputOf)]
        strange = [str(point) for point in self._entries.keys() - _COMPILED_POINTS - {*below}]
        if strange or self._handles.keys() - _COMPILED_HOOKS - {f"{point}, compiled" for point in below}:
            raise Uncompiled(f"something in it is not compiled ({', '.join(strange) or 'a policy'})")
        if self._is_hooked(anew=ctx.past_tokens is None):
            raise Uncompiled("a hook that is not the seam's stands at one of its modules")
        view = ctx.at(self.index)
        if view.index is not None or view.key_index is not None:
            raise Uncompiled("tokens were taken out of it")
        at_linears = {point.path: self._parts_at(point, ctx, view) for point in below}
        return self._parts_at(Point.ATTENTION, ctx, view), {path: each for path, each in at_linears.items() if each}

    def _parts_at(self, point: AnyPoint, ctx: ForwardContext, view: LayerView) -> tuple[Any, ...]:
        parts = []
        for entry in self._entries.get(point, ()):
            if not entry.is_for(ctx):
                continue
            if entry.part is None:
                raise Uncompiled(f"{entry.owner!r} is not compiled")
            part = entry.part(view)
            if part is not None:
                parts.append(part)
        return tuple(parts)

    def _is_hooked(self, *, anew: bool) -> bool:
        """Whether somebody else hooked a module below the layer. torch guards no hooks: in a graph that is there
        already none would be called, and one that is made with them would call them in other layers.

        Args:
            anew: look for modules again, which takes long; else those that were found will do.
        """
        if anew or not self._tables:
            below = [*self.anatomy.layers[self.index]._modules.values()]  # `modules()` takes four times as long
            self._tables = []
            while below:
                module = below.pop()
                if module is not None:
                    self._tables += _hooks(module)
                    below += module._modules.values()
        return any(table.keys() - self._own for table in filter(None, self._tables))

    @_untraced
    def _run(
        self,
        point: AnyPoint,
        ctx: ForwardContext | None,
        hidden: Tensor,
        entries: tuple[Entry, ...],
        *given: Tensor,
    ) -> Tensor:
        """`hidden` as the functions there leave it, which are told what the module there was `given`."""
        view = None
        for entry in entries:
            if entry.mark is not None and not entry.is_for(ctx):
                continue
            if ctx is None:
                if entry.is_reading:
                    continue
                raise SeamError(
                    f"the {point} of decoder layer {self.index}, with {entry.owner!r} there, was run without its host",
                    remedy="call the whole model; its forward tells the graft which tokens are images",
                )
            if entry.is_reading and (self.index in ctx.left or ctx.foresight is not None or ctx.is_second):
                continue  # gradient checkpointing computes it again, or it is run for its attention or a contrast alone
            if view is None:
                view = ctx.at(self.index)
            shape, known = hidden.shape, view.tokens.shape
            if shape[:-1] == known:
                changed = entry.function(view, hidden, *given)
            elif hidden.dim() == 2 and len(hidden) == known[0] * known[1]:
                # OPT's MLP is given the tokens of all samples in one line
                changed = entry.function(view, hidden.view(*known, -1), *(each.view(*known, -1) for each in given))
                changed = None if changed is None else changed.view(shape)
            else:
                raise SeamError(
                    f"the {point} of decoder layer {self.index} is of {tuple(shape[:-1])} tokens, where "
                    f"{view.tokens.shape} are known",
                    remedy=dialect.REMEDY,
                )
            hidden = hidden if changed is None else changed
        return hidden

    @torch.compiler.disable  # threads and weak references, which cannot be traced
    def _put(self, ctx: ForwardContext) -> None:
        self._inside.put(ref(ctx))

    @torch.compiler.disable
    def _current(self, *, drop: bool = False) -> ForwardContext | None:
        """The forward that is in this layer in this thread, which `drop` lets go of."""
        inside = self._inside.get()
        if drop:
            self._inside.drop()
        return None if inside is None else inside()

    @with_keywords
    @torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inside.drop()  # a forward that failed there
        ctx: ForwardContext | None = kwargs.get(NAME)
        if ctx is None and not self._entries.get(Point.BLOCK_INPUT):
            return None
        hidden = given = dialect.hidden_of(args, kwargs, where=type(layer).__name__)
        if ctx is not None:
            if self._takers:
                self._ask_for_tokens(ctx, given)
            ctx.meet(self.index, given.shape[1], kwargs)
        if self._editors:
            hidden = self._run(Point.BLOCK_INPUT, ctx, given, self._editors)
        if ctx is not None:
            if "leave" in self._handles:
                self._put(ctx)
            ctx.enter(self.index, layer, hidden, args, kwargs)
        if self._others:
            hidden = self._run(Point.BLOCK_INPUT, ctx, hidden, self._others)
        return None if hidden is given else dialect.with_hidden(args, kwargs, hidden)

    def _ask_for_tokens(self, ctx: ForwardContext, given: Tensor) -> None:
        """Have those that take tokens out say which they leave."""
        for entry in self._takers:
            if entry.is_for(ctx):
                left = entry.function(ctx.at(self.index), given)
                if left is not None:
                    ctx.leave_tokens(self.index, left)

    @_untraced
    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        ctx = self._current(drop=True)
        if ctx is None and not self._entries.get(Point.BLOCK_OUTPUT):
            return None
        changed = self._at(Point.BLOCK_OUTPUT, ctx, output)
        if ctx is not None:
            ctx.left.add(self.index)
        return changed

    @_untraced
    def _at(self, point: AnyPoint, ctx: ForwardContext | None, output: Any, *given: Tensor) -> Any:
        """A module's output as the functions at a point leave it; None where they leave it as it is."""
        before = dialect.hidden_of_output(output)
        hidden = self._run(point, ctx, before, self._entries.get(point, ()), *given)
        return None if hidden is before else dialect.output_with_hidden(output, hidden)

    @with_keywords
    @_untraced
    def _tell(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand attention the keyword that its layer dropped."""
        ctx = self._current()
        return None if ctx is None or NAME in kwargs else (args, {**kwargs, NAME: ctx})

    @with_keywords
    def _into_compiled(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`_before_attention` of a layer that may run compiled, where everything was done before."""
        is_inside = isinstance(kwargs.get(NAME), Frame)
        return None if is_inside else self._before_attention(attention, args, kwargs)

    @with_keywords
    def _behind_compiled(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> Any:
        """`_after_attention` of a layer that may run compiled."""
        frame = kwargs.get(NAME)
        if isinstance(frame, Frame):
            # this layer's hook may run in the graph of another: everything of a layer is the frame's
            return dialect.output_with_hidden(output, frame.join(dialect.hidden_of_output(output)))
        return self._after_attention(attention, args, kwargs, output)

    @with_keywords
    @_untraced
    def _before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ctx, given = kwargs.get(NAME), kwargs
        if ctx is not None:
            hidden = dialect.hidden_of(args, kwargs, where=type(attention).__name__)
            ctx.meet(self.index, hidden.shape[1], kwargs, inside=True)
            if "leave" in self._handles:
                self._put(ctx)
            if self.is_biased and self.index not in ctx.plans:
                kwargs = mask_with_bias(attention, kwargs, ctx, hidden)
        changed = None
        if self._entries.get(Point.ATTENTION_INPUT):
            changed = self._before(Point.ATTENTION_INPUT, ctx, attention, args, kwargs)
        return (args, kwargs) if changed is None and kwargs is not given else changed

    @with_keywords
    @_untraced
    def _before_mlp(self, mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._before(Point.MLP_INPUT, self._current(), mlp, args, kwargs)

    @_untraced
    def _before(
        self, point: Point, ctx: ForwardContext | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = dialect.hidden_of(args, kwargs, where=type(module).__name__)
        hidden = self._run(point, ctx, given, self._entries.get(point, ()))
        return None if hidden is given else dialect.with_hidden(args, kwargs, hidden)

    @with_keywords
    @_untraced
    def _after_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> Any:
        ctx = kwargs.get(NAME)
        is_conducted = ctx is not None and self.index in ctx.plans
        if self.reads_weights and ctx is not None and not is_conducted and ctx.implementation == EAGER:
            answer_from_weights(attention, output[1], ctx)
        if "behind attention" in self._handles:
            return None  # "attention" is what the norm gives
        if ctx is not None and not self._is_met_before:
            ctx.meet(self.index, dialect.hidden_of_output(output).shape[1], kwargs, inside=True)
        return self._at(Point.ATTENTION, ctx, output)

    @_untraced
    def _after_attention_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self._at(Point.ATTENTION, self._current(), output)

    @_untraced
    def _after_input_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self._at(Point.ATTENTION_NORM, self._current(), output)

    @_untraced
    def _after_mlp_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self._at(Point.MLP_NORM, self._current(), output)

    @_untraced
    def _before_module(self, point: InputOf, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self._run(point, self._current(), args[0], self._entries.get(point, ()))

    @_untraced
    def _after_module(self, point: OutputOf, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self._at(point, self._current(), output, *args[:1])

    def _behind_compiled_module(self, point: OutputOf, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """`_after_module` of a layer that may run compiled."""
        frame = inside()
        if frame is not None:
            return frame.at(point.path, output, args[0])  # as in `_behind_compiled`
        return self._after_module(point, module, args, output)

    @_untraced
    def _after_mlp(self, mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return self._at(Point.MLP, self._current(), output)


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Those of a module, by kind."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def _below(layer: nn.Module, path: str) -> nn.Module | None:
    """The module of that path below a layer; None where there is none."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def check_named(point: str | InputOf | OutputOf) -> AnyPoint:
    """The point of that name.

    Raises:
        UsageError: there is none.
    """
    if isinstance(point, InputOf | OutputOf):
        return point
    if point not in set(Point):
        raise UsageError(f"a decoder layer has no point {point!r}", remedy=f"use {', '.join(Point)}")
    return Point(point)


def check_point(anatomy: Anatomy, point: AnyPoint, layer: int, phase: Phase) -> None:
    """Refuse what cannot be had.

    Raises:
        UsageError: a layer has no such module. HostError: it has no such point, or it can only be read.
    """
    if isinstance(point, InputOf | OutputOf):
        if _below(anatomy.layers[layer], point.path) is None:
            raise UsageError(f"decoder layer {layer} has no module {point.path!r}")
        if isinstance(point, InputOf) and phase is not Phase.READ:
            raise HostError(f"the {point} can only be read", remedy='change "attention_input" or "mlp_input"')
    if point in (Point.ATTENTION, Point.ATTENTION_INPUT):
        anatomy.attention(layer)  # refuses where there is none
    if point is Point.MLP_INPUT:
        anatomy.mlp(layer)  # likewise
    if phase is Phase.TOKENS and point is not Point.BLOCK_INPUT:
        raise HostError(f"which tokens are left is said where a block begins, not at {point!s}")
    if point is Point.ATTENTION_NORM and phase is not Phase.READ:
        # under gradient checkpointing the norm is run again before anything says which forward it belongs to
        raise HostError('"attention_norm" can only be read', remedy='change "attention_input", or "block_input"')
