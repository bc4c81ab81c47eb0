"""The contract of a policy: settings that say what it does in which layer, put on a host for a block or for good."""

from __future__ import annotations

import abc
import itertools
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from transformers import LogitsProcessor

from alula.anatomy import Anatomy, unwrap
from alula.errors import UsageError
from alula.seam import (
    POLICIES,
    Bias,
    Foresight,
    Heads,
    Owner,
    Phase,
    Point,
    Seam,
    Sums,
    Tower,
    Weights,
    Worker,
    declare,
    install,
    marked,
    marks,
    retract,
)
from alula.seam.points import PointFunction
from alula.settings import Settings

_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class _Block:
    """One block under a policy: the mark of the forwards that begin in it. Other threads have blocks of their own."""

    policy: Policy
    host: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        return _Block(self.policy, self.host)  # another mark: nothing is on a copy of the host


class _Mark:
    """The mark of the forwards under a policy that is on a host for good; a copy of the host has one of its own."""


class Stand:
    """Where a policy stands on one host. What it asks for here ends when the policy is taken off.

    Attributes:
        anatomy: of the host.
        owner: name under which the policy has the seam; the key of its notes in `ForwardContext.memo`.
    """

    def __init__(self, seam: Seam, owner: str, mark: Hashable) -> None:
        self.anatomy: Anatomy = seam.anatomy
        self.owner = owner
        self._seam, self._mark = seam, mark

    def at(self, point: Point, layer: int, function: PointFunction, *, phase: Phase = Phase.EDIT) -> None:
        """Call ``function(view, hidden)`` at a point of a layer, see `Seam.on`.

        Raises:
            UsageError: no such point or layer. HostError: the host has no such point, or it can only be read.
        """
        self._seam.on(point, layer, function, phase=phase, owner=self.owner, mark=self._mark)

    def sums(self, layer: int, sums: Sums) -> None:
        """Have ``sums`` receive sums of attention in a layer, see `Seam.request_sums`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        self._seam.request_sums(layer, sums, mark=self._mark)

    def weights(self, layer: int, weights: Weights) -> None:
        """Have ``weights`` receive the attention of a few tokens in a layer, see `Seam.request_weights`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        self._seam.request_weights(layer, weights, mark=self._mark)

    def foresight(self, layer: int, foresight: Foresight) -> None:
        """Have ``foresight`` receive the attention of a few tokens before a layer is run, see `Seam.request_foresight`.

        Raises:
            HostError: the decoder runs an attention implementation that does not show queries and keys.
        """
        self._seam.request_foresight(layer, foresight, mark=self._mark)

    def tower(self, tower: Tower) -> None:
        """Have ``tower`` read what the host's vision tower makes of images, see `Seam.request_tower`.

        Raises:
            HostError: the host has no tower whose layers are known.
        """
        self._seam.request_tower(tower, owner=self.owner, mark=self._mark)

    def heads(self, layer: int, heads: Heads) -> None:
        """Have ``heads`` receive queries and keys of a layer's attention, see `Seam.request_heads`.

        Raises:
            HostError: the decoder runs an attention implementation that does not show them.
        """
        self._seam.request_heads(layer, heads, mark=self._mark)

    def bias(self, layer: int, bias: Bias) -> None:
        """Add what ``bias`` gives to the logits of attention in a layer, see `Seam.request_bias`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be biased.
        """
        self._seam.request_bias(layer, bias, mark=self._mark)

    def work(self, layer: int, worker: Worker, *, has_parts: bool = False) -> None:
        """Have only those tokens computed in a layer that have work there, see `Seam.request_work`.

        Raises:
            HostError: the decoder runs an attention implementation whose masks cannot be read; or its layers have no
                MLP module that parts could be told by.
        """
        self._seam.request_work(layer, worker, has_parts=has_parts, mark=self._mark)


class Attached(Owner):
    """A policy on a host for good, until it is detached.

    It holds for every forward of the host, whatever thread begins it, and goes with the host: a deep copy has its own,
    and whatever saves the host's config (`save_pretrained`, Trainer, `save_host`) or an adapter of it (`save_adapter`)
    saves it for `load_model`.

    Attributes:
        name: under which it is on the host.
        policy: its settings.
    """

    def __init__(self, seam: Seam, name: str, policy: Policy) -> None:
        self.seam, self.name, self.policy = seam, name, policy
        self.owner_id: str = uuid.uuid4().hex
        self.standing = _Mark()
        self.further_inputs = policy.further_inputs

    @property
    def needs_roles(self) -> bool:
        return self.policy.needs_roles

    def logits_processors(self, inputs: Mapping[str, Any]) -> Sequence[LogitsProcessor]:
        return self.policy.logits_processors(inputs)

    @property
    def enabled(self) -> bool:
        """Whether it holds for the forwards that this thread begins."""
        return self.owner_id not in marks()

    def disabled(self) -> AbstractContextManager[None]:
        """The host without this policy, for the forwards that this thread (or asyncio task) begins inside the block."""
        return marked(self.owner_id)

    def detach(self) -> None:
        """Take it off, where it was not yet; without others the host is bit for bit what it was."""
        if self.seam.owners.get(self.name) is not self:
            return  # another may have its name by now
        self.seam.forget(self.standing)
        retract(self.seam.anatomy.host, self.name, key=POLICIES)
        self.seam.release(self.name)

    def __repr__(self) -> str:
        return f"Attached(name={self.name!r}, policy={self.policy!r})"


class Policy(Settings, Owner, abc.ABC):
    """An inference-time rule about what a host's decoder layers do with the tokens in them.

        with policy.on(model):
            model.generate(**inputs)

        policy.attach(model)  # for good

    The fields of a policy are its settings; it keeps nothing else. What it finds out in a forward belongs to that
    forward (`ForwardContext.memo`), and what later forwards need to the cache.
    """

    policy_type: ClassVar[str]
    """its name in saved settings"""

    @property
    def concerns_text(self) -> bool:
        """Whether it changes anything where there is text alone, without images, videos and sounds."""
        return True

    @property
    def goes_by_steps(self) -> bool:
        """Whether a token that is said in a step is treated otherwise than the same token in a prompt."""
        return False

    @abc.abstractmethod
    def place(self, stand: Stand) -> None:
        """Ask ``stand`` for what the rule does and reads, layer by layer.

        Raises:
            UsageError, HostError: the host cannot be had this way.
        """

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Self]:
        """Apply the rule in forwards of ``model`` that this thread (or asyncio task) begins inside the block.

        Several policies, grafts and probes go together, in whatever order they came.

        Args:
            model: a host, with or without grafts and PEFT adapters.

        Raises:
            UsageError: this policy is on this model already in this thread, or the host lacks what it names.
            HostError: a class of host that alula does not know, or one that cannot be had this way.
        """
        host = unwrap(model)
        if any(each is self for each in in_blocks(host)):
            raise UsageError(f"this {type(self).__name__} is on this model already")
        with asked(model, self, self.place, _Block(self, host)):
            yield self

    def attach(self, model: nn.Module, name: str | None = None) -> Attached:
        """Apply the rule in every forward of ``model`` from here on.

        Args:
            model: a host, with or without grafts and PEFT adapters.
            name: to tell it from others; by default the type of policy.

        Returns:
            what takes it off again, and lets one thread do without it.

        Raises:
            UsageError: the name is taken or no word, or the host lacks what the policy names.
            HostError: a class of host that alula does not know, or one that cannot be had this way.
        """
        name = self.policy_type if name is None else name
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"{name!r} cannot name a policy", remedy="use letters, digits and underscores")
        seam = install(model, name, self)
        attached = Attached(seam, name, self)
        seam.set_owner(name, attached)
        try:
            self.place(Stand(seam, name, attached.standing))
        except BaseException:
            attached.detach()
            raise
        declare(seam.anatomy.host, name, self.to_dict(), key=POLICIES)
        return attached

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, with ``policy_type``; `policy_of` reads them."""
        return {"policy_type": self.policy_type, **self.model_dump(mode="json")}


def in_blocks(host: nn.Module) -> list[Policy]:
    """The policies in whose blocks on ``host`` this thread is."""
    return [mark.policy for mark in marks() if isinstance(mark, _Block) and mark.host is host]


@contextmanager
def asked(model: nn.Module, owner: Owner, place: Callable[[Stand], None], mark: Hashable) -> Iterator[None]:
    """What ``place`` asks of a stand on ``model``, in forwards that this thread begins inside the block.

    Args:
        owner: who has the seam.
        mark: of these forwards; no other block has it.
    """
    name = f"policy-{next(_serial)}"
    seam = install(model, name, owner)
    try:
        place(Stand(seam, name, mark))
        with marked(mark):
            yield
    finally:
        seam.forget(mark)
        seam.release(name)
