"""One block in which tokens are highlighted: what its methods read.

Shapes: B batch, S new tokens of a forward, K all tokens so far (cached and new), L tokens that are known to be marked
or not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.seam import Owner, Seam

HIGHLIGHTED = "highlighted"
"""input of a forward: (B, L) weights of its tokens, from the first one on"""


class Highlight(Owner):
    """One block: which tokens are highlighted in the forwards that begin in it.

    Attributes:
        marks: (B, L) weights, 0 for what is not highlighted; None: each forward is told by its input `HIGHLIGHTED`.
        anatomy: of the host.
    """

    further_inputs = (HIGHLIGHTED,)

    def __init__(self, seam: Seam, marks: Tensor | None, name: str) -> None:
        self.anatomy: Anatomy = seam.anatomy
        self.seam, self.name = seam, name
        self.marks = marks
        self._copies: dict[torch.device, Tensor] = {}
        self.first: Hashable = object()
        self.second: Hashable = object()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner()  # nothing is highlighted on a copy of the host

    def are_there(self, given: Mapping[str, Any]) -> bool:
        """Whether any token of a forward that was given this is highlighted, as far as is known without asking the
        device."""
        marks = given.get(HIGHLIGHTED, self.marks)
        return marks is not None and (marks.device.type != "cpu" or bool(marks.any()))

    def of(self, ctx: Any) -> Tensor | None:
        """(B, K) float32 weights of all tokens so far; those behind the marked ones are 0. None: there are none.

        Args:
            ctx: the `ForwardContext`.
        """
        if self not in ctx.memo:
            ctx.memo[self] = self._of(ctx)
        return ctx.memo[self]

    def _of(self, ctx: Any) -> Tensor | None:
        given = ctx.given.get(HIGHLIGHTED)
        marks = self.marks if given is None else checked(given)
        if marks is None or not self.are_there({HIGHLIGHTED: marks}):
            return None
        batch, keys = ctx.all_tokens.shape
        if batch % len(marks):
            raise UsageError(f"marks are of {len(marks)} samples, the forward of {batch}")
        if given is None:
            marks = self._on(ctx.tokens.device)
        marks = marks.to(device=ctx.tokens.device, dtype=torch.float32)
        if batch != len(marks):  # beams and samples of a prompt stand side by side
            marks = marks.repeat_interleave(batch // len(marks), dim=0)
        return torch.nn.functional.pad(marks[:, :keys], (0, max(keys - marks.shape[1], 0)))

    def _on(self, device: torch.device) -> Tensor:
        """The block's own marks on a device, copied there once."""
        assert self.marks is not None
        if device not in self._copies:
            self._copies[device] = self.marks.to(device=device, dtype=torch.float32)
        return self._copies[device]

    def of_new(self, ctx: Any) -> Tensor | None:
        """(B, S) of the new tokens; None where they are behind the marked ones."""
        marks = self.of(ctx)
        behind = ctx.all_tokens.shape[1] - ctx.tokens.shape[1]
        given = ctx.given.get(HIGHLIGHTED, self.marks)
        return None if marks is None or behind >= given.shape[1] else marks[:, behind:]


class Method(Protocol):
    """How a highlight is brought about."""

    def place(self, block: Highlight, strength: float | None, guidance: float | None) -> None:
        """Ask the seam for what it takes, with the marks ``block.first`` and ``block.second``.

        Args:
            strength: of the pull on highlighted tokens; None: the method's own.
            guidance: how far next tokens are told against a second run; None: the method's own.

        Raises:
            UsageError: it has no use for one of them. HostError: the host cannot be had this way.
        """


def checked(marks: Any) -> Tensor:
    """Marks, of which only the shape and the kind can be wrong."""
    if not isinstance(marks, Tensor) or marks.dim() != 2:
        got = tuple(marks.shape) if isinstance(marks, Tensor) else type(marks).__name__
        raise UsageError(
            f"marks are a (samples, tokens) tensor of weights, not {got}",
            remedy="make them with Prompt(processor, inputs).marks(spans=..., regions=...)",
        )
    return marks
