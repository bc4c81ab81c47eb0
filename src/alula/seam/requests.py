"""What may be asked of a forward, and who asks it.

Who wants something of attention is a record by layer: it is found by whoever computes attention, and told in the same
forward. What it gives and gets is per key or per token of the whole forward, or of a `LayerView`, never guessed by
length.

Shapes: B batch, K all tokens so far (cached and new), S new tokens, M of them in the layer, H query heads, C values
per key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

from torch import Tensor
from transformers import LogitsProcessor

from alula.errors import UsageError
from alula.seam.view import LayerView


class Sums(Protocol):
    """Something that wants sums of the decoder's own attention in a layer, and receives them in the same forward."""

    separate_pass: bool = False
    """whether its sums come from a pass of their own, without gradients or dropout, which leaves every bit of the
    forward as it is: for probes. The others share the forward's own pass and its gradients."""

    def key_values(self, view: LayerView) -> Tensor | None:
        """(B, K, C) values per key over all tokens so far, or None when nothing is wanted this time."""

    def on_sums(self, view: LayerView, sums: Tensor) -> None:
        """Take the (B, M, H, C) sums of the values, weighted by attention."""


class Bias(Protocol):
    """Something that biases the decoder's own attention in a layer, key by key."""

    def key_bias(self, view: LayerView) -> Tensor | None:
        """(B or 1, H or 1, S or 1, K), added to the logits of attention right before their softmax; None: nothing.

        Keys are all tokens so far and queries the new ones, whichever of them stand in the layer. Asked again where
        gradient checkpointing recomputes the layer.
        """


class Weights(Protocol):
    """Something that wants the decoder's own attention of a few tokens in a layer, over all keys."""

    def queries(self, view: LayerView) -> Tensor | None:
        """(B, n) of the forward's new tokens, all in this layer; None when nothing is wanted this time."""

    def on_weights(self, view: LayerView, weights: Tensor) -> None:
        """Take the (B, H, n, P + S) attention of these over all tokens so far, without gradients; 0 at those that are
        not in the layer."""


class Contrast(Protocol):
    """Something that has forwards run a second time, otherwise, and next tokens told by both runs.

    The second run has a cache of its own, which rides on that of the first and follows all that is done to it. Readings
    (probes) are of first runs alone.

    Attributes:
        second: mark that second runs carry in the place of the one that the contrast was asked for with.
    """

    second: Hashable

    def changed(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What the second run of a forward is given otherwise, by name; None: it is run once.

        Args:
            given: by name, what the host was given for the first, and inputs that owners take.
        """

    def combined(self, logits: Tensor, others: Tensor) -> Tensor:
        """What stands in the place of the (B, T, vocabulary) logits, given those of the second run."""


Tokens = Tensor | Literal[False] | None
"""some of a forward's new tokens: (B, S) bool; None: all, False: none, which is known without reading the device"""


class Foresight(Weights, Protocol):
    """`Weights` of a layer that are wanted before it is run, to say who has work in it."""

    def standing(self, view: LayerView) -> Work | None:
        """The work of those that would stand in the layer; None: of all."""


class Tower(Protocol):
    """Something that reads what the host's vision tower makes of images."""

    def on_tower(self, states: Tensor, query: Tensor | None, key: Tensor | None) -> Tensor:
        """What is to be known of them in the forwards that their tokens come in, without gradients.

        Args:
            states: what the layer gives that the host takes its features from, (images, positions, width) or (positions
                of all images, width).
            query, key: of that layer's attention, likewise; None where it has no modules of these names.
        """


class Heads(Protocol):
    """Something that wants queries and keys of the decoder's own attention in a layer, as they are compared there."""

    def on_heads(self, view: LayerView, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take what new tokens ask and are asked, without gradients.

        Args:
            view: the layer.
            query: (B, H, M, D), rotated where the host rotates.
            key: (B, G, M, D) likewise, of G key heads.
            scaling: of their products.
        """


@dataclass(frozen=True, eq=False)
class Work:
    """Which of a forward's new tokens do what in a decoder layer.

    A token in none of these sets is not in the layer: it costs nothing there, and its hidden state passes by.

    Attributes:
        attend: to these is added what attention gives them. They leave a key and a value.
        feed: to these is added what the MLP gives them.
        keys: these leave a key and a value too, for others to attend to.
        lend: of those that leave none of their own, these leave the one that they have in the layer before.
        positions: (B, S) int64, by which attention turns queries and keys here; None: by the host's own.
        counts: where the sets that are given are one and the same, and some tokens are not in it, how many of each
            sample are, padding left out, if the host knows it; None: it is read from the device.
    """

    attend: Tokens = None
    feed: Tokens = None
    keys: Tokens = False
    lend: Tokens = False
    positions: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tokens: Tokens, counts: tuple[int, ...] | None = None) -> Work:
        """These are in the layer and all others are not."""
        return cls(tokens, tokens, counts=counts)

    @property
    def is_whole(self) -> bool:
        """Whether a token is in all of the layer or not in it."""
        return self.attend is self.feed and self.keys is False and self.lend is False

    @property
    def owning(self) -> Tokens:
        """Those that leave a key of their own."""
        return either(self.attend, self.keys)

    @property
    def leaving(self) -> Tokens:
        """Those that leave a key."""
        return either(self.owning, self.lend)

    def __and__(self, other: Work) -> Work:
        """What both let tokens do. A key is left where both have the token leave one.

        Raises:
            UsageError: they are of two minds about positions.
        """
        attend = both(self.attend, other.attend)
        positions = self.positions if other.positions is None else other.positions
        if self.positions is not None and positions is not self.positions:
            raise UsageError(
                "two policies count the positions of tokens in one layer, each in its own way",
                remedy="have one of them leave positions as they are",
            )
        if self.is_whole and other.is_whole:
            return Work(attend, attend, positions=positions)
        is_apart = self.keys is not False or other.keys is not False
        return Work(
            attend,
            both(self.feed, other.feed),
            both(self.owning, other.owning) if is_apart else False,
            either(both(self.lend, other.leaving), both(other.lend, self.leaving)),
            positions,
        )


def both(one: Tokens, other: Tokens) -> Tokens:
    """Tokens that are among these and those."""
    if one is False or other is False:
        return False
    if one is None or other is None:
        return other if one is None else one
    return one & other


def either(one: Tokens, other: Tokens) -> Tokens:
    """Tokens that are among these or those."""
    if one is None or other is None:
        return None
    if one is False or other is False:
        return other if one is False else one
    return one | other


class Worker(Protocol):
    """Something that says which new tokens of a forward have work in a decoder layer.

    It may also have a method `rests`, given a `ForwardContext`: whether it gives None in all layers of that forward.
    Then it is not asked in each of them where it does in a step of generation.
    """

    def work(self, view: LayerView, hidden: Tensor) -> Work | None:
        """The work in this layer; None: all do all.

        Where nothing changed, give the same object as in the layer before: what follows from it is computed once per
        object. Asked again where gradient checkpointing recomputes the layer.

        Args:
            view: the layer, all tokens of the forward in it.
            hidden: (B, S, d) its input.
        """


@dataclass(frozen=True, eq=False)
class Branch:
    """Attention that something on the host adds beside the decoder's own in a layer.

    Attributes:
        owner: name under which its owner has the seam.
        name: of the branch among those of its owner.
        weight: broadcastable to (B, S, 1), with which its output joins the stream.
        sums: given (B, K, C) values per key, the (B, S, H, C) sums of them weighted by the branch's attention, with
            heads of its own; 0 at tokens where it adds nothing. Without gradients or dropout.
    """

    owner: str
    name: str
    weight: Tensor
    sums: Callable[[Tensor], Tensor]


class BranchReader(Protocol):
    """Something that wants to know the branches of a layer. They come after the sums of the decoder's own attention."""

    def on_branch(self, view: LayerView, branch: Branch) -> None:
        """Take a branch of this layer. What it wants of it has to be computed before it returns."""


Asker = TypeVar("Asker", covariant=True)


@dataclass(frozen=True, eq=False)
class Request(Generic[Asker]):
    """Somebody who asks something of a layer.

    Attributes:
        by: who it is.
        mark: it asks in forwards that carry this mark only (see `scope`); None: in all.
        is_gated: it needs nothing of samples without media.
        has_parts: it tells a layer's attention from its MLP.
        is_ahead: it wants to know before the layer is run.
    """

    by: Asker
    mark: Hashable | None = None
    is_gated: bool = False
    has_parts: bool = False
    is_ahead: bool = False


@dataclass(frozen=True, eq=False)
class Ending:
    """A function that is given each finished forward (a `ForwardContext`) that carries its mark."""

    function: Callable[[Any], None]
    mark: Hashable


class Owner:
    """Who has the seam of a host under a name: a graft, a policy, a probe, or somebody who says nothing of itself."""

    # without annotations, which policies, whose annotated attributes are settings, would have as settings, too
    owner_id = cast("str | None", None)
    """tells it from others that had or will have its name; a mark of it disables what it brings (see `scope`)"""

    standing = cast("Hashable | None", None)
    """a mark that forwards of its host carry wherever they begin, unless it is disabled there"""

    further_inputs = cast("tuple[str, ...]", ())
    """names of inputs that it takes beside the host's own: tensors of (B, ..), at `ForwardContext.given`"""

    @property
    def needs_roles(self) -> bool:
        """Whether it asks whose turn a token belongs to: then inputs have to say it (`token_roles`)."""
        return False

    def logits_processors(self, inputs: Mapping[str, Any]) -> Sequence[LogitsProcessor]:
        """What it does to the scores of next tokens while generating, in order (see `generation_extras`).

        Args:
            inputs: of the prompt, by name; those that it takes are as they were given, (B, ..), while scores are of
                (B * beams, vocabulary), the beams of a sample side by side.
        """
        return ()


@dataclass(frozen=True, eq=False)
class Requests:
    """Who takes part in a forward. It is replaced as a whole, never changed: a forward sees what it began with.

    Attributes:
        owners: the grafts, policies and probes on the host, by name.
        sums: those who request sums of attention, by decoder layer.
        biases: those who bias attention, by decoder layer.
        weights: those who request attention of a few tokens, by decoder layer.
        heads: those who request queries and keys, by decoder layer.
        branches: those who subscribed to branches, by decoder layer.
        workers: those who say which tokens have work, by decoder layer.
        contrasts: those who have forwards run a second time.
        endings: who is given a forward when it ends.
    """

    owners: Mapping[str, Owner] = field(default_factory=dict)
    sums: Mapping[int, tuple[Request[Sums], ...]] = field(default_factory=dict)
    biases: Mapping[int, tuple[Request[Bias], ...]] = field(default_factory=dict)
    weights: Mapping[int, tuple[Request[Weights], ...]] = field(default_factory=dict)
    heads: Mapping[int, tuple[Request[Heads], ...]] = field(default_factory=dict)
    branches: Mapping[int, tuple[Request[BranchReader], ...]] = field(default_factory=dict)
    workers: Mapping[int, tuple[Request[Worker], ...]] = field(default_factory=dict)
    contrasts: tuple[Request[Contrast], ...] = ()
    endings: tuple[Ending, ...] = ()

    @cached_property
    def is_any(self) -> bool:
        """Whether anything is asked of attention in any layer."""
        return bool(self.sums or self.weights or self.biases or self.heads)

    def is_any_of(self, layer: int) -> bool:
        """Whether anything is asked of attention in a decoder layer."""
        return layer in self.sums or layer in self.weights or layer in self.biases or layer in self.heads

    def owner_id(self, name: str) -> str | None:
        """What tells the owner of that name from others that had or will have it; None where none is there."""
        return self.owners[name].owner_id if name in self.owners else None
