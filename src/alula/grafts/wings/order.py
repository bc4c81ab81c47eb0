"""Which tokens are keys of which learner, and the order in which many queries are asked.

Tokens come as they stand in the prompt, text and images in turns. Put side by side, the tokens that are keys of one
learner attend to one another as in any causal decoder, each to those before it. That needs no mask, which lets the
fastest kernels in, and no keys are gathered per learner.

Shapes: B batch, S tokens, T tokens in order (S, or more where samples are filled up), K keys of one learner.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.grafts.wings.config import WingsConfig
from alula.tokens import Role, TokenMap

MOST_RUNS = 16
PARTS = ("textual", "visual", "others")


@dataclass(frozen=True)
class Order:
    """The rows of a batch with the keys of the textual learner first, then those of the visual one, then others.

    Attributes:
        index: (B, T) the token at each place. Where tokens are moved one by one, samples with fewer tokens in a part
            than others are filled up with token 0, and padding has no place; in runs it stays behind the text.
        real: (B, T) whether the place holds a token of the prompt: neither padding nor there to fill up.
        sizes: how many places each of the three parts has.
        cuts: places in front of which a run of tokens ends that were neighbours in the prompt.
        runs: the lengths of all runs, and which of them comes when, where that is the same in all samples. None: tokens
            are moved one by one, by `index` and `back`.
        back: (B, S) the place of each token; only without runs. Padding has place 0.
    """

    index: Tensor
    real: Tensor
    sizes: tuple[int, int, int]
    cuts: tuple[int, ...]
    runs: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    back: Tensor | None = None

    def part(self, learner: str) -> slice:
        """The places of a learner's keys."""
        place = PARTS.index(learner)
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])

    def arrange(self, x: Tensor) -> Tensor:
        """(B, S, ..) -> (B, T, ..)."""
        if self.runs is None:
            return pick_tokens(x, self.index)
        lengths, sequence = self.runs
        return _permuted(x, lengths, sequence)

    def restore(self, x: Tensor) -> Tensor:
        """(B, T, ..) -> (B, S, ..)."""
        if self.back is not None:
            return pick_tokens(x, self.back)
        assert self.runs is not None
        lengths, sequence = self.runs
        places = sorted(range(len(sequence)), key=sequence.__getitem__)
        return _permuted(x, [lengths[run] for run in sequence], places)


def order_tokens(tokens: TokenMap, config: WingsConfig) -> Order:
    """The order for all tokens of a prompt. Reads the device three times."""
    part = torch.where(tokens.is_perceptual, 1, 0)
    if "textual" in config.learners:
        part = torch.where(tokens.is_text & ~chosen_tokens(tokens, "textual", config), 2, part)
    column = torch.arange(tokens.shape[1], device=tokens.device)
    # behind the last token padding is a key of nobody, and need not be told from text
    alike = (part == part[:1]).all() & ((tokens.position == column) | ~tokens.valid).all()
    lengths = run_lengths(part[0])
    if len(lengths) <= MOST_RUNS and bool(alike):
        return _by_runs(part[0], lengths, tokens.valid)
    return _by_index(part, tokens.valid)


def _by_runs(part: Tensor, lengths: Sequence[int], valid: Tensor) -> Order:
    starts = list(itertools.accumulate(lengths, initial=0))
    owner = part[torch.tensor(starts[:-1], device=part.device)].tolist()
    sequence = tuple(sorted(range(len(lengths)), key=owner.__getitem__))
    ordered = [lengths[run] for run in sequence]
    index = torch.cat([torch.arange(starts[run], starts[run + 1], device=part.device) for run in sequence])
    sizes = [sum(n for n, o in zip(lengths, owner, strict=True) if o == place) for place in range(3)]
    return Order(
        index.expand(len(valid), -1),
        valid[:, index],
        (sizes[0], sizes[1], sizes[2]),
        tuple(itertools.accumulate(ordered[:-1])),
        (tuple(lengths), sequence),
    )


def _by_index(part: Tensor, valid: Tensor) -> Order:
    chosen = [(part == place) & valid for place in range(3)]
    counts = torch.stack([each.sum(dim=1).max() for each in chosen]).tolist()
    picked = [first_tokens(each, most) for each, most in zip(chosen, counts, strict=True)]
    index = torch.cat([index for index, _ in picked], dim=1)
    real = torch.cat([real for _, real in picked], dim=1)
    batch, length = part.shape
    back = index.new_zeros(batch, length + 1)
    places = torch.arange(index.shape[1], device=index.device).expand(batch, -1)
    back.scatter_(1, torch.where(real, index, length), places)  # what fills up lands behind the last token
    sizes = (counts[0], counts[1], counts[2])
    cuts = tuple(cut for cut in itertools.accumulate(counts[:2]) if 0 < cut < index.shape[1])
    return Order(index, real, sizes, cuts, back=back[:, :-1])


def chosen_tokens(tokens: TokenMap, learner: str, config: WingsConfig) -> Tensor:
    """(B, S) bool: the token is a key of `learner`."""
    if learner == "visual":
        return tokens.is_perceptual
    if config.system_keys:
        return tokens.is_text
    if not bool((tokens.role != Role.UNKNOWN).any()):
        raise UsageError(
            "wings: system_keys=False leaves out the system prompt, but nothing says which tokens it is",
            remedy="pass token_map=TokenMap.from_modalities(..., roles=...) to the model, or leave system_keys at True",
        )
    return tokens.is_text & (tokens.role != Role.SYSTEM)


def first_tokens(chosen: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, most) the chosen tokens of (B, S) in their order, filled up with token 0, and (B, most) which are real.

    Args:
        most: the largest number of chosen tokens; read from the device where it is not given.
    """
    most = int(chosen.sum(dim=1).max()) if most is None else most
    index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :most]
    real = chosen.gather(1, index)
    return index.masked_fill(~real, 0), real


def run_lengths(labels: Tensor) -> list[int]:
    """Lengths of the runs of equal values in (S,) labels. Reads the device."""
    changes = ((labels[1:] != labels[:-1]).nonzero().flatten() + 1).tolist()
    return [stop - start for start, stop in itertools.pairwise([0, *changes, len(labels)])]


def _permuted(x: Tensor, lengths: Sequence[int], sequence: Sequence[int]) -> Tensor:
    if list(sequence) == sorted(sequence):
        return x
    runs = x.split(list(lengths), dim=1)
    return torch.cat([runs[i] for i in sequence], dim=1)


def pick_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, S, ..) -> (B, places, ..)."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *(1,) * (x.dim() - 2)).expand(shape))
