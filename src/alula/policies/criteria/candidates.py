"""The perceptual tokens of a forward that compete for the places there are, packed group by group.

A group is an image (video, sound) or all those of a request. How many tokens it has is read from the device once per
forward; from there on every count is the host's, and what chooses among them waits for nothing.

Shapes: B batch, S new tokens, U groups, N tokens of the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alula.errors import SeamError, UsageError
from alula.seam import LayerView
from alula.tokens import UNKNOWN, Modality, TokenMap, on_device

Per = Literal["image", "request"]
Shapes = Callable[[], Mapping[Modality, list[tuple[int, int]]]]


_TEXT, _PADDING = -1, UNKNOWN - 1


class Group(NamedTuple):
    """Tokens that compete with one another.

    Attributes:
        sample: of the batch.
        item: number of the image, video or sound in its sample; 0 for a request.
        size: how many tokens it came with.
        rows, columns: of these; one row where they are not known.
    """

    sample: int
    item: int
    size: int
    rows: int
    columns: int


class Scene(NamedTuple):
    """What a criterion may go by.

    Attributes:
        view: the layer in front of which it chooses, all tokens of the forward in it.
        hidden: (B, S, d) the layer's input.
        owner: name under which what was read earlier stands in the forward's memo.
    """

    view: LayerView
    hidden: Tensor
    owner: str

    def noted(self, what: str, layer: int | None = None) -> Tensor:
        """What was read in a layer; None: in the one before.

        Raises:
            SeamError: its attention showed nothing.
        """
        layer = self.view.layer - 1 if layer is None else layer
        if (self.owner, what, layer) not in self.view.ctx.memo:
            raise SeamError(
                f"the attention of decoder layer {layer} did not show what tokens are chosen by",
                remedy="leave the model's attention implementation alone under a policy that reads it",
            )
        return self.view.ctx.memo[self.owner, what, layer]


class Layout(NamedTuple):
    """Where the new tokens of a forward stand, as the host knows it.

    Attributes:
        items: (B, S) as `TokenMap.item`, padding told apart from text.
        instructions: of every sample, its text behind the first image; all text where none is behind; where there is
            none at all, its last token.
        ends_in_image: whether some sample's last token is an image's.
        text_counts: of every sample, how many tokens of text it has.
    """

    items: NDArray[np.int64]
    instructions: list[NDArray[np.int64]]
    ends_in_image: bool
    text_counts: list[int]

    @classmethod
    def of(cls, tokens: TokenMap) -> Layout:
        """Reads the device once."""
        items = np.array(torch.where(tokens.valid, tokens.item, _PADDING).tolist())
        found, last = [], []
        for of in items:
            text, seen = np.flatnonzero(of == _TEXT), np.flatnonzero(_is_perceptual(of))
            behind = text[text > seen[0]] if len(seen) else text
            found.append(next(each for each in (behind, text, seen[-1:], np.array([len(of) - 1])) if len(each)))
            last.append(of[of != _PADDING][-1:])
        counts = (items == _TEXT).sum(axis=1).tolist()
        return cls(items, found, bool(_is_perceptual(np.concatenate(last)).any()), counts)


def instructions(view: LayerView) -> tuple[Tensor, Tensor]:
    """(B, n) of every sample's instruction among its new tokens, the last once more where (B, n) bool it is shorter."""
    return view.ctx.once(_table, view.ctx.once(Layout.of, view.ctx.tokens), view.ctx.tokens)


def _table(layout: Layout, tokens: TokenMap) -> tuple[Tensor, Tensor]:
    most = max(map(len, layout.instructions))
    index = [np.pad(each, (0, most - len(each)), mode="edge") for each in layout.instructions]
    is_there = [np.arange(most) < len(each) for each in layout.instructions]
    return on_device(np.stack(index), tokens.device), on_device(np.stack(is_there), tokens.device)


def _shaped(
    groups: list[Group], firsts: list[int], tokens: TokenMap, shapes: Mapping[Modality, list[tuple[int, int]]]
) -> list[Group]:
    """Images with their rows and columns: as the host is told them, else of a square.

    Args:
        firsts: the first token of each among the B * S.
    """
    left = {}
    if any(shapes.values()):  # a read of the device that other hosts are spared
        kinds = tokens.modality.flatten()[on_device(np.array(firsts), tokens.device)].tolist()
        left = {kind: iter(told) for kind, told in shapes.items() if len(told) == kinds.count(kind)}
    found = []
    for at, group in enumerate(groups):
        side = math.isqrt(group.size)
        rows, columns = next(left[kinds[at]]) if left and kinds[at] in left else (side, side)
        found.append(group._replace(rows=rows, columns=columns) if rows * columns == group.size else group)
    return found


def _is_perceptual(items: NDArray[np.int64]) -> NDArray[np.bool_]:
    return (items >= 0) | (items == UNKNOWN)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that compete, and how many of every group are wanted. They outlive the layer they compete in front of.

    Attributes:
        shape: (B, S).
        groups: U of them.
        index: (U, N) of the tokens among the B * S of the batch, in reading order; B * S where a group has fewer.
        place: (U, N) of the tokens in the group as it came.
        real: (U, N) bool: the token is there; the others fill up.
        counts: how many of every group are there.
        wanted: how many of every group stay, at most as many as there are.
        instructions: of every group, that of its sample, among the B * S.
    """

    shape: tuple[int, int]
    groups: tuple[Group, ...]
    index: Tensor
    place: Tensor
    real: Tensor
    counts: tuple[int, ...]
    wanted: tuple[int, ...] = ()
    instructions: tuple[NDArray[np.int64], ...] = ()

    @classmethod
    def of(cls, tokens: TokenMap, layout: Layout, *, per: Per, shapes: Shapes | None = None) -> Candidates:
        """All perceptual tokens of a forward.

        Args:
            shapes: gives the rows and columns of images, where they are wanted.

        Raises:
            UsageError: per image, where it cannot be told which image a token is of.
        """
        batch, length = tokens.shape
        groups, members, texts = [], [], []
        for sample, of in enumerate(layout.items):
            if per == "image" and (of == UNKNOWN).any():
                raise UsageError(
                    f"prompt {sample} has tokens of images, and it cannot be told which are of which",
                    where="per",
                    remedy='have them chosen per="request", by a criterion that needs no single image; or give one '
                    "prompt at a time",
                )
            seen = np.flatnonzero(_is_perceptual(of))
            for item in np.unique(of[seen]) if per == "image" else [0] if len(seen) else []:
                here = seen[of[seen] == item] if per == "image" else seen
                groups.append(Group(sample, int(item), len(here), 1, len(here)))
                members.append(here + sample * length)
                texts.append(layout.instructions[sample] + sample * length)
        if shapes is not None:
            groups = _shaped(groups, [int(here[0]) for here in members], tokens, shapes())
        most = max((group.size for group in groups), default=0)
        index = np.full((len(groups), most), batch * length)
        for row, here in zip(index, members, strict=True):
            row[: len(here)] = here
        at = on_device(index, tokens.device)
        place = torch.arange(most, device=tokens.device).expand(len(groups), -1)
        counts = tuple(group.size for group in groups)
        return cls(tokens.shape, tuple(groups), at, place, at < batch * length, counts, instructions=tuple(texts))

    @property
    def numbers(self) -> Tensor:
        """(N,) of the candidates in their group as it is now."""
        return torch.arange(self.index.shape[1], device=self.index.device)

    def wanting(self, wanted: tuple[int, ...]) -> Candidates:
        """The same, of which so many of every group are to stay."""
        return replace(self, wanted=wanted)

    def gather(self, values: Tensor) -> Tensor:
        """(U, N, ..) of the candidates, from (B, S, ..) of all new tokens; of no meaning where none is."""
        return values.flatten(0, 1)[self.index.clamp(max=values.shape[0] * values.shape[1] - 1)]

    def instruction(self) -> tuple[Tensor, Tensor]:
        """(U, T) of every group's instruction among the B * S tokens, of no meaning where (U, T) bool it is shorter."""
        index = self.table(list(self.instructions))
        lengths = on_device(np.array([len(each) for each in self.instructions]), index.device)
        return index, torch.arange(index.shape[1], device=index.device) < lengths[:, None]

    def table(self, rows: list[NDArray[Any]]) -> Tensor:
        """(U, most) of what the host says of every group, filled up with 0."""
        table = np.zeros((len(rows), max(map(len, rows))), dtype=rows[0].dtype)
        for row, here in zip(table, rows, strict=True):
            row[: len(here)] = here
        return on_device(table, self.index.device)

    def top(self, scores: Tensor) -> Tensor:
        """(U, N) bool: as many candidates as are wanted, with the largest of (U, N) scores; of equal ones the first."""
        order = scores.masked_fill(~self.real, -torch.inf).argsort(dim=1, descending=True, stable=True)
        first = (self.numbers < self.wanted_on_device()).expand_as(order)
        return torch.zeros_like(first).scatter(1, order, first) & self.real

    def wanted_on_device(self) -> Tensor | int:
        """(U, 1) how many of every group stay; a number where it is the same one."""
        if len(set(self.wanted)) == 1:
            return self.wanted[0]
        return on_device(np.array(self.wanted), self.index.device)[:, None]

    def counted(self, text: list[int]) -> tuple[int, ...] | None:
        """Of every sample, how many tokens are left: of text so many, and those wanted of its groups; None where none
        leaves."""
        left = list(text)
        for group, wanted in zip(self.groups, self.wanted, strict=True):
            left[group.sample] += wanted
        is_any_out = any(wanted < group.size for group, wanted in zip(self.groups, self.wanted, strict=True))
        return tuple(left) if is_any_out else None

    def spread(self, chosen: Tensor) -> Tensor:
        """(B, S) bool of all new tokens, from the (U, N) bool of the candidates."""
        batch, length = self.shape
        every = chosen.new_zeros(batch * length + 1).scatter(0, self.index.flatten(), chosen.flatten())
        return every[:-1].view(batch, length)

    def only(self, stays: Tensor) -> Candidates:
        """The (U, N) bool candidates that stay, of which no group has more than were wanted."""
        most = max(self.wanted)
        order = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
        real, size = stays.gather(1, order), self.shape[0] * self.shape[1]
        index = self.index.gather(1, order).masked_fill(~real, size)
        return replace(self, index=index, place=self.place.gather(1, order), real=real, counts=self.wanted)

    def merged(self, hidden: Tensor, into: Tensor, *, is_added: bool = False) -> Tensor:
        """(B, S, d) hidden states in which every candidate that others join is the mean of itself and these.

        Args:
            hidden: (B, S, d) of all new tokens.
            into: (U, N) of the candidate that each joins; its own for those that join none.
            is_added: the mean of the others is added to it.
        """
        size, width = self.shape[0] * self.shape[1], hidden.shape[2]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        values = self.gather(hidden).to(precise).masked_fill(~self.real[..., None], 0)
        joins = self.real & (into != self.numbers) if is_added else self.real
        sums = torch.zeros_like(values).scatter_add(1, into[..., None].expand_as(values), values * joins[..., None])
        counts = torch.zeros_like(values[..., 0]).scatter_add(1, into, joins.to(precise))
        means = (sums / counts.clamp(min=1)[..., None] + (values if is_added else 0)).to(hidden)
        kept = self.real & (into == self.numbers)
        rows = hidden.flatten(0, 1)
        rows = torch.cat([rows, rows[:1]])  # the last takes what is not put anywhere
        at = self.index.masked_fill(~kept, size).flatten()
        rows = rows.scatter(0, at[:, None].expand(-1, width), means.flatten(0, 1))
        return rows[:-1].view_as(hidden)
