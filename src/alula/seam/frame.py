"""What a compiled decoder layer is given in the place of the `ForwardContext`: tensors, and nothing that changes by
layer, by length or by step, so that one graph serves all layers of a kind.

What a forward knows is found out before its layers are entered, by hooks that stand outside of what is compiled; a
graft puts what one of its layers needs of it into a `Part`. Inside, hooks and the attention function find the `Frame`
under the name at which they look for the context.

Shapes: B batch, S new tokens, d stream width, K keys of the decoder's attention, H query heads, C values per key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Uncompiled(Exception):  # noqa: N818
    """What a forward asks of a layer cannot be compiled: the layer runs as it is written. It never leaves the seam."""


class Part(Protocol):
    """What a graft adds in one compiled layer. Whatever it reads of itself is guarded: tensors may be of any size, but
    a number or a string that differs is compiled anew."""

    @property
    def by(self) -> Any:
        """Who asks for its sums (`requests.Sums`). Its ``forget(ctx)`` lets go of what it kept for a layer that runs
        as it is written."""

    @property
    def wants_sums(self) -> bool:
        """Whether it wants sums of attention; of what, `by` says."""

    @property
    def is_few(self) -> bool:
        """Whether there are so few queries that their attention had better be written out."""

    def add(self, stream: Tensor, branch: Tensor, sums: Tensor | None) -> Tensor:
        """(B, S, d) what attention adds to the stream, with the graft's.

        Args:
            stream: (B, S, d) input of the layer.
            branch: (B, S, d) what attention adds.
            sums: (B, S, H, C) of the values that it wants sums of.
        """


class LinearPart(Protocol):
    """What a graft adds to the output of one module below a compiled layer; guarded as a `Part` is."""

    def add(self, output: Tensor, given: Tensor) -> Tensor:
        """(B, S, o) the module's output with the graft's.

        Args:
            output: (B, S, o) of the module.
            given: (B, S, i) what it was given.
        """


@dataclass(frozen=True, eq=False)
class Sums:
    """How sums of attention are taken in a compiled layer.

    Attributes:
        columns: (B, K, ..) values of all parts that want some, side by side.
        widths: how many are whose.
        is_few: there are so few queries that their weights are written out.
        is_apart: they are taken in a pass of their own: some samples have to keep the decoder's own attention.
        mask: of that attention, in which every query may attend to something; None: the layer's own.
        is_blank: (B, S, 1, 1) bool queries that may attend to nothing; None: there are none, as far as is known.
    """

    columns: Tensor
    widths: tuple[int, ...]
    is_few: bool
    is_apart: bool
    mask: Tensor | None
    is_blank: Tensor | None


@dataclass(eq=False)
class Frame:
    """One compiled layer in one forward. It is made inside of what is compiled, and gone when that ends.

    Attributes:
        parts: of grafts, in the order in which they stand there.
        stream: (B, S, d) input of the layer.
        asked: which sums of attention they want; None: none.
        linears: what grafts add to outputs of modules below the layer, by path.
        sums: (B, S, H, C) those of each part that wants some, once attention has run.
    """

    parts: tuple[Part, ...]
    stream: Tensor
    asked: Sums | None
    linears: dict[str, tuple[LinearPart, ...]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)

    def join(self, branch: Tensor) -> Tensor:
        """(B, S, d) what attention adds to the stream, with what grafts add."""
        place = 0
        for part in self.parts:
            of_part = None
            if part.wants_sums:
                of_part, place = self.sums[place], place + 1
            branch = part.add(self.stream, branch, of_part)
        return branch

    def at(self, path: str, output: Tensor, given: Tensor) -> Tensor:
        """(B, S, o) the output of a module below the layer, with what grafts add to it."""
        for part in self.linears.get(path, ()):
            output = part.add(output, given)
        return output


# Modules below a layer are not told which forward they are in. While a layer is traced the frame stands here, as torch
# sees it; a graph, once made, knows its parts and neither reads nor leaves anything here, so threads do not meet. Where
# torch is told to run what would be compiled as it is written, nothing is put here, and hooks do what they always do.
_inside: Frame | None = None


def inside() -> Frame | None:
    """The frame of the layer that is traced; None elsewhere."""
    return _inside if torch.compiler.is_dynamo_compiling() else None


def enter(frame: Frame | None) -> None:
    """Say which layer is traced from here on; None: no more."""
    global _inside
    if torch.compiler.is_dynamo_compiling():
        _inside = frame
