"""The contract of a policy: settings that say what it does in which layer, put on a host for a while."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from alula.anatomy import Anatomy, unwrap
from alula.errors import UsageError
from alula.seam import Bias, Owner, Phase, Point, Seam, Sums, Weights, Worker, install, marked, marks
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


class Stand:
    """Where a policy stands on one host. What it asks for here ends with the policy's block.

    Attributes:
        anatomy: of the host.
        owner: name under which the policy has the seam; the key of its notes in `ForwardContext.memo`.
    """

    def __init__(self, seam: Seam, owner: str, mark: Hashable, stack: ExitStack) -> None:
        self.anatomy: Anatomy = seam.anatomy
        self.owner = owner
        self._seam, self._mark, self._stack = seam, mark, stack

    def at(self, point: Point, layer: int, function: PointFunction, *, phase: Phase = Phase.EDIT) -> None:
        """Call ``function(view, hidden)`` at a point of a layer, see `Seam.on`.

        Raises:
            UsageError: no such point or layer. HostError: the host has no such point, or it can only be read.
        """
        handle = self._seam.on(point, layer, function, phase=phase, owner=self.owner, mark=self._mark)
        self._stack.callback(handle.remove)

    def sums(self, layer: int, sums: Sums) -> None:
        """Have ``sums`` receive sums of attention in a layer, see `Seam.request_sums`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        self._stack.callback(self._seam.request_sums(layer, sums, mark=self._mark).remove)

    def weights(self, layer: int, weights: Weights) -> None:
        """Have ``weights`` receive the attention of a few tokens in a layer, see `Seam.request_weights`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        self._stack.callback(self._seam.request_weights(layer, weights, mark=self._mark).remove)

    def bias(self, layer: int, bias: Bias) -> None:
        """Add what ``bias`` gives to the logits of attention in a layer, see `Seam.request_bias`.

        Raises:
            HostError: the decoder runs an attention implementation that cannot be biased.
        """
        self._stack.callback(self._seam.request_bias(layer, bias, mark=self._mark).remove)

    def work(self, layer: int, worker: Worker, *, has_parts: bool = False) -> None:
        """Have only those tokens computed in a layer that have work there, see `Seam.request_work`.

        Raises:
            HostError: the decoder runs an attention implementation whose masks cannot be read; or its layers have no
                MLP module that parts could be told by.
        """
        handle = self._seam.request_work(layer, worker, has_parts=has_parts, mark=self._mark)
        self._stack.callback(handle.remove)


class Policy(Settings, Owner, abc.ABC):
    """An inference-time rule about what a host's decoder layers do with the tokens in them.

        with policy.on(model):
            model.generate(**inputs)

    The fields of a policy are its settings; it keeps nothing else. What it finds out in a forward belongs to that
    forward (`ForwardContext.memo`), and what later forwards need to the cache.
    """

    policy_type: ClassVar[str]
    """its name in saved settings"""

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
        if any(isinstance(mark, _Block) and mark.policy is self and mark.host is host for mark in marks()):
            raise UsageError(f"this {type(self).__name__} is on this model already")
        name, mark = f"policy-{next(_serial)}", _Block(self, host)
        seam = install(model, name, self)
        with ExitStack() as stack:
            stack.callback(seam.release, name)
            self.place(Stand(seam, name, mark, stack))
            stack.enter_context(marked(mark))
            yield self

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, with ``policy_type``; `policy_of` reads them."""
        return {"policy_type": self.policy_type, **self.model_dump(mode="json")}
