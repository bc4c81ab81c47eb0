"""What may be asked of a decoder's attention, and who asks it.

Shapes: B batch, K key tokens, Q query tokens, H query heads, C values per key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class SumsReader(Protocol):
    """Something that wants sums of attention over keys of a layer, and receives them in the same forward.

    A reader whose attribute `separate_pass` is true gets its sums from a pass of its own, without gradients or dropout,
    which leaves every bit of the forward as it is: for probes. The others share the forward's own pass and its
    gradients.
    """

    def key_values(self, forward: Any, layer: int) -> Tensor | None:
        """(B, K, C) values per key over all tokens seen so far, or None when nothing is wanted this time."""

    def on_sums(self, forward: Any, layer: int, sums: Tensor) -> None:
        """Take the (B, Q, H, C) sums of the values, weighted by attention."""


class LearnerSumsReader(SumsReader, Protocol):
    """A reader that also wants sums of the attention of grafts' own learners. They come after the main branch's."""

    def learner_key_values(self, forward: Any, layer: int) -> Tensor | None:
        """(B, K, C) values per key, or None when nothing is wanted this time."""

    def on_learner_sums(self, forward: Any, layer: int, weight: Tensor, sums: Tensor) -> None:
        """Take the (B, Q, H, C) sums of one learner's attention (0 where it is inactive), and the weight, broadcastable
        to (B, Q, 1), with which its output joins the stream."""


@dataclass(frozen=True, eq=False)
class Ending:
    """A function that is given each finished forward (a `ForwardContext`) that carries its mark."""

    function: Callable[[Any], None]
    mark: Hashable


@dataclass(frozen=True, eq=False)
class Requests:
    """Who takes part in a forward. It is replaced as a whole, never changed: a forward sees what it began with.

    Attributes:
        owners: the grafts, policies and probes on the host, by name.
        readers: those who request sums of attention, by decoder layer.
        gated: the readers that need no sums of samples without media.
        endings: who is given a forward when it ends.
    """

    owners: Mapping[str, Any] = field(default_factory=dict)
    readers: Mapping[int, tuple[SumsReader, ...]] = field(default_factory=dict)
    gated: frozenset[SumsReader] = frozenset()
    endings: tuple[Ending, ...] = ()

    def owner_id(self, name: str) -> str | None:
        """What tells the owner of that name from others that had or will have it; None where none is there."""
        return getattr(self.owners.get(name), "owner_id", None)
