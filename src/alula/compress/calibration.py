"""What the matrices of one decoder layer are given, over calibration data: sums over real tokens, in one pass.

The data are run through the host once per layer, up to that layer, so that whatever was done to the layers before
counts. Nothing is held but the sums of one layer.

Shapes: B samples of a batch, S tokens, M of them in the layer, in the width of a matrix's inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alula.anatomy import unwrap
from alula.errors import DataError, HostError, UsageError
from alula.inputs import placed
from alula.probes import token_sets
from alula.seam import ForwardContext, InputOf, LayerView, Owner, Phase, Point, Seam, evaluating, install, marked
from alula.tokens import TokenMap
from alula.weights import channel_squares

Batches = Iterable[Mapping[str, Any]]
"""What a processor (or `alula.data.Collator`) makes, batch by batch; gone through once per layer, so no iterator."""
Sums = Literal["squares", "products"]
"""of a matrix's inputs x: (in,) sums of their squares, or (in, in) sums of x x^T"""

_LABELS = "labels"


@dataclass(frozen=True)
class Seen:
    """What one pass saw.

    Attributes:
        batches, samples, tokens: how many; of tokens those that count.
        digest: sha256 (hex) of what the model was given.
    """

    batches: int
    samples: int
    tokens: int
    digest: str


class _Done(Exception):  # noqa: N818 - it is none
    """Raised behind the last layer that is looked at."""


class _Asker(Owner):
    """Tells the seam that roles are asked for."""

    def __init__(self, tokens: str) -> None:
        self._by_role = token_sets.by_role(tokens)

    @property
    def needs_roles(self) -> bool:
        return self._by_role


class Calibration:
    """Passes of a host over calibration data.

    Args:
        model: the host. It is run in evaluation mode and left as it was.
        batches: model inputs, padded on either side. Labels among them are passed over.
        tokens: whose inputs count, a name of `alula.probes.token_sets`.
        skip_first: not each sample's first token.

    Raises:
        UsageError: data that can be gone through once only.
    """

    def __init__(self, model: nn.Module, batches: Batches, *, tokens: str = "all", skip_first: bool = False) -> None:
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise UsageError(
                "calibration data are gone through once per layer, and this can be only once",
                where="batches",
                remedy="pass a list of batches, a DataLoader that does not shuffle, or alula.compress.MixtureBatches",
            )
        token_sets.check(tokens, "tokens")
        self.model, self.batches, self.tokens, self.skip_first = model, batches, tokens, skip_first
        self.seen: Seen | None = None

    def sums(self, layers: Mapping[int, Sequence[str]], kind: Sums = "squares") -> dict[str, Tensor]:
        """Sums over the tokens that count, from one pass through the layers up to the last one named.

        Args:
            layers: paths below each of these decoder layers; "" is the stream that enters the layer.
            kind: what is summed.

        Returns:
            ``{"layers.I.PATH": (in,) float64}`` sums of squares, or (in, in) sums of products in float32 (float64 for
            a model in float64). Matrices that are given the same tensor share theirs.

        Raises:
            DataError: numbers that are not finite, or other data than in an earlier pass. UsageError: no data, or no
                token that counts, in one of the matrices.
        """
        reading = _Reading(self, kind)
        with reading.on(self.model, layers), evaluating(self.model), torch.no_grad():
            for number, batch in enumerate(self.batches):
                reading.run(self.model, number, batch)
        self._check(reading.seen())
        found = reading.result()
        wanted = [f"layers.{index}.{path}" if path else f"layers.{index}" for index in layers for path in layers[index]]
        if missing := [name for name in wanted if name not in found]:
            raise HostError(
                f"{missing[0]} was not run on any of the calibration data",
                remedy="name other targets, or calibrate on data that reach it",
            )
        if empty := [name for name in wanted if not reading.tokens_of(name)]:
            raise UsageError(
                f"{empty[0]} is given no token of {self.tokens!r}: what is on the model keeps them out of it",
                remedy="take policies off the model, or name layers, targets and tokens that go together",
            )
        return found

    def _check(self, seen: Seen) -> None:
        if not seen.batches:
            raise UsageError("there are no calibration data", where="batches", remedy="pass batches of samples")
        if not seen.tokens:
            raise UsageError(
                f"none of the {seen.samples} calibration samples has a token of {self.tokens!r}",
                remedy="calibrate on samples that have such tokens, or on others",
            )
        if self.seen is not None and seen != self.seen:
            raise DataError(
                f"calibration data changed from one pass to the next: {self.seen.samples} samples with "
                f"{self.seen.tokens} tokens, then {seen.samples} with {seen.tokens}",
                where="batches",
                remedy="go through the same samples in the same order every time: no shuffling, no random cropping",
            )
        self.seen = seen


class _Reading:
    """One pass."""

    def __init__(self, calibration: Calibration, kind: Sums) -> None:
        self.calibration, self.kind = calibration, kind
        self._sums: dict[str, Tensor] = {}
        self._same_as: dict[str, str] = {}
        self._counts: dict[str, Tensor] = {}
        self._batches = self._samples = self._tokens = 0
        self._digest = hashlib.sha256()
        self._last: Tensor | None = None

    @contextmanager
    def on(self, model: nn.Module, layers: Mapping[int, Sequence[str]]) -> Iterator[None]:
        name = f"calibration-{id(self)}"
        seam = install(model, name, _Asker(self.calibration.tokens))
        with ExitStack() as stack:
            stack.callback(seam.release, name)
            for index, paths in layers.items():
                for path in paths:
                    self._listen(seam, stack, name, index, path)
            last = seam.on(Point.BLOCK_OUTPUT, max(layers), self._stop, phase=Phase.READ, owner=name, mark=self)
            stack.callback(last.remove)
            stack.enter_context(marked(self))
            yield

    def _listen(self, seam: Seam, stack: ExitStack, owner: str, index: int, path: str) -> None:
        read = partial(self._read, f"layers.{index}.{path}" if path else f"layers.{index}")
        point = InputOf(path) if path else Point.BLOCK_INPUT
        stack.callback(seam.on(point, index, read, phase=Phase.READ, owner=owner, mark=self).remove)

    def run(self, model: nn.Module, number: int, batch: Any) -> None:
        """Run one batch and add it."""
        if not isinstance(batch, Mapping):
            raise DataError(
                f"batch {number} is a {type(batch).__name__}, not what a processor returns",
                where="batches",
                remedy="pass mappings from names to tensors",
            )
        like = next(model.parameters())
        given = placed({key: value for key, value in batch.items() if key != _LABELS}, like)
        _note(self._digest, given)
        with suppress(_Done):
            model(**given, use_cache=False)
        if self._last is None:
            raise HostError(
                f"{type(unwrap(model)).__name__} does not give its matrices their inputs by place, and none was seen",
                remedy="prune by magnitude, which needs no data",
            )
        self._batches, self._samples = self._batches + 1, self._samples + len(self._last)
        self._tokens, self._last = self._tokens + int(self._last.sum()), None
        # a model may lie on several devices, and so do the sums of its layers
        finite = torch.stack([_finite(each).to(like.device) for each in self._sums.values()])
        if not bool(finite.all()):
            name = next(name for name, good in zip(self._sums, finite.tolist(), strict=True) if not good)
            raise DataError(
                f"batch {number} gives {name} numbers that are not finite",
                where="batches",
                remedy="look at its pixel values, or calibrate in another precision than "
                f"{str(like.dtype).removeprefix('torch.')}",
            )

    def _read(self, name: str, view: LayerView, inputs: Tensor) -> None:
        """Add the (B, M, in) inputs of one matrix."""
        notes = view.ctx.memo.setdefault(self, {})
        last = notes.get("last")
        if last is not None and last[0] is inputs:  # query, key and value matrices read one tensor
            self._same_as[name] = last[1]
            return
        notes["last"] = inputs, name
        x = inputs.detach().flatten(0, 1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        here = view.pick_real(self._chosen(view.ctx, notes)).flatten().to(x.device)
        self._counts[name] = self._counts.get(name, 0) + here.sum()
        x = x.masked_fill(~here[:, None], 0)  # what padding holds may be anything, NaN too
        if self.kind == "squares":
            found = channel_squares(x, x.new_ones(1, len(x), dtype=dtype), x.new_zeros(1, dtype=dtype))[0].double()
            self._sums[name] = self._sums[name].add_(found) if name in self._sums else found
        else:
            x = x.to(dtype)
            # a product beside the sums would take as much memory again
            self._sums[name] = self._sums[name].addmm_(x.T, x) if name in self._sums else x.T @ x

    def _chosen(self, ctx: ForwardContext, notes: dict[str, Any]) -> Tensor:
        """(B, S) bool: the tokens that count."""
        if "chosen" not in notes:
            tokens: TokenMap = ctx.tokens
            chosen = token_sets.select(tokens, self.calibration.tokens)
            if self.calibration.skip_first:
                chosen = chosen & (tokens.position != 0)
            notes["chosen"] = self._last = chosen
        return notes["chosen"]

    @staticmethod
    def _stop(view: LayerView, hidden: Tensor) -> None:
        raise _Done

    def seen(self) -> Seen:
        """What was seen."""
        return Seen(self._batches, self._samples, self._tokens, self._digest.hexdigest())

    def tokens_of(self, name: str) -> int:
        """How many tokens the sums of a matrix are over."""
        return int(self._counts[self._same_as.get(name, name)])

    def result(self) -> dict[str, Tensor]:
        """The sums."""
        return {**self._sums, **{name: self._sums[other] for name, other in self._same_as.items()}}


def _finite(sums: Tensor) -> Tensor:
    """Whether all sums are finite. A product that is not leaves no finite number on the diagonal of its channels."""
    return (sums.diagonal() if sums.dim() > 1 else sums).isfinite().all()


def _note(digest: Any, batch: Mapping[str, Any]) -> None:
    """Add to a digest what the model is given."""
    for key, value in sorted(batch.items()):
        value = value.stack() if isinstance(value, TokenMap) else value
        if torch.is_tensor(value):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{key} {value!r}".encode())
