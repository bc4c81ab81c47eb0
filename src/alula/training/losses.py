"""Auxiliary losses of a method: computed beside the next-token loss, added with their weights, logged by name.

The next-token loss is a mean over the supervised tokens of an optimizer step, an auxiliary one over its samples. So
what a method gives is the *sum* over the samples of a micro-batch: divided by the samples of the whole step,
micro-batches and processes add up to what one big batch gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alula.errors import AlulaError
from alula.seam import ForwardContext, install, marked

LossFunction = Callable[[Any, Mapping[str, Any], Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """An auxiliary loss.

    Attributes:
        function: ``function(outputs, batch, context)``, a scalar: the sum over the samples of a micro-batch. Given are
            the model's outputs (`logits`, (B, S, V)), the batch as the collator made it (`labels` included), and what
            the forward knew and grafts kept in it (a `ForwardContext`, or None). It calls no module of the model, whose
            weights may be sharded.
        weight: what its mean over the samples is multiplied by before it is added.
        observes: whether it is given the context. Where no loss of a stage is, nothing is put on the model, and
            decoders that no seam can be put on will do.
        in_batch: whether it compares the samples of a micro-batch with one another (those of all processes): then
            another split of an optimizer step is another loss.
    """

    function: LossFunction
    weight: float = 1.0
    observes: bool = True
    in_batch: bool = False


class AuxiliaryLosses:
    """The auxiliary losses of a stage.

    Args:
        losses: by name.
        samples: of one optimizer step, over all micro-batches and processes.
    """

    def __init__(self, losses: Mapping[str, Loss], samples: int) -> None:
        self.losses, self.samples = losses, samples
        self.observes = any(loss.observes for loss in losses.values())
        self._context: ForwardContext | None = None
        self._sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block forwards of ``model`` can be `observed`. Enter it before the model is sharded."""
        if not self.observes:
            yield
            return
        name = "auxiliary losses"
        seam = install(model, name)
        handle = seam.at_end(self._keep, mark=self)
        try:
            yield
        finally:
            handle.remove()
            seam.release(name)

    def observed(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the forward that is to be judged runs."""
        return marked(self) if self.observes else contextlib.nullcontext()

    def _keep(self, context: ForwardContext) -> None:
        self._context = context

    def added(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor | None:
        """This micro-batch's share of the weighted losses, None without any.

        Raises:
            AlulaError: a loss is no scalar.
        """
        context, self._context = self._context, None
        shares = []
        for name, loss in self.losses.items():
            assert context is not None or not loss.observes, "the forward was not observed"
            value = loss.function(outputs, batch, context if loss.observes else None)
            if value.ndim:
                raise AlulaError(
                    f"the loss {name!r} has the shape {tuple(value.shape)}", remedy="have it return a sum over samples"
                )
            value = value.float() / self.samples
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
            shares.append(loss.weight * value)
        return torch.stack(shares).sum() if shares else None

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Each loss's mean over the samples of the step that has ended, without its weight.

        Args:
            reduce: sums a tensor over processes.
        """
        sums, self._sums = self._sums, {}
        return {name: float(reduce(value)) for name, value in sums.items()}
