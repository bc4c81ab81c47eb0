"""Which policies are measured: those of a user's file, or a grid made for a model's depth and its images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alula.errors import RecipeError, UsageError
from alula.files import regular, telling
from alula.policies import Policy, Prune, Skip, Withdraw, policy_of
from alula.policies.criteria import (
    ConditionalDPP,
    Criteria,
    Duplicates,
    MaxMinDiversity,
    Pooling,
    Random,
    TowerAttention,
)
from alula.seam import POLICIES
from alula.training.notation import read_yaml

_EXAMPLE = "alula_policies: {half: {policy_type: withdraw, layer: 16}}"

_OTHERS: Mapping[str, Criteria] = {
    "random": Random(),
    "max-min diversity": MaxMinDiversity(),
    "conditional DPP": ConditionalDPP(),
    "tower attention": TowerAttention(),
}


@dataclass(frozen=True)
class Candidate:
    """What is measured under a name: one policy, several together, or smaller pictures; none: the model as it is.

    Attributes:
        pixels: the share of its pixels that every picture keeps before the model sees it.
    """

    name: str
    policies: tuple[Policy, ...] = ()
    pixels: float = 1.0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """All of them, for the forwards that this thread begins inside the block."""
        with ExitStack() as stack:
            for policy in self.policies:
                stack.enter_context(policy.on(model))
            yield

    @property
    def key(self) -> str:
        """Tells it from all others in what was noted of them."""
        told: list[Any] = [*self.settings(), *([self.pixels] if self.pixels < 1 else [])]
        return f"{self.name} {hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]}"

    @property
    def is_plain(self) -> bool:
        """Whether it is the model as it is."""
        return not self.policies and self.pixels == 1

    def settings(self) -> list[dict[str, Any]]:
        """Those of each policy, as JSON values."""
        return [policy.to_dict() for policy in self.policies]

    def named(self) -> dict[str, Policy]:
        """The policies by names that a file of `save_policies` has them under."""
        found: dict[str, Policy] = {}
        for policy in self.policies:
            kind = policy.policy_type
            count = sum(name == kind or name.startswith(f"{kind}_") for name in found)
            found[f"{kind}_{count + 1}" if count else kind] = policy
        return found


def read_grid(file: str | os.PathLike[str]) -> list[Candidate]:
    """The candidates of a YAML or JSON file in the notation of ``policies.json``.

        alula_policies:
          half: {policy_type: withdraw, layer: 16}
          both:                                      # several that hold together
            - {policy_type: prune, stages: [[2, 0.5]]}
            - {policy_type: skip, part: mlp, layers: [20, 21]}

    Raises:
        UsageError: it cannot be read, holds another key, or settings that are none. FilesError: no regular file.
    """
    path = Path(file)
    try:
        with telling(path):
            found, _ = read_yaml(regular(path).read_text(encoding="utf-8"), where=str(path))
    except (RecipeError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, RecipeError) else str(error)
        raise UsageError(reason, where=str(path), remedy=f"write {_EXAMPLE}") from None
    grid = found.get(POLICIES) if isinstance(found, Mapping) else None
    if not isinstance(grid, Mapping) or not grid or set(found) != {POLICIES}:
        raise UsageError("is not a file of policies", where=str(path), remedy=f"write {_EXAMPLE}")
    candidates = []
    for name, settings in grid.items():
        several = settings if isinstance(settings, list) and settings else [settings]
        if not all(isinstance(each, Mapping) for each in several):
            raise UsageError(
                "is neither the settings of a policy nor a list of such",
                where=f"{path}: {name}",
                remedy=f"write {_EXAMPLE}",
            )
        policies = tuple(policy_of(each, where=f"{path}: {name}") for each in several)
        candidates.append(Candidate(str(name), policies))
    return candidates


def default_grid(layers: int, image_tokens: int, *, sizes_are_obeyed: bool = False) -> list[Candidate]:
    """A grid for a decoder of so many layers and prompts with so many image tokens.

    Down-sampling (of pictures too, where ``sizes_are_obeyed`` by their processor) and the published ways at a half, a
    quarter and a ninth of the tokens, random choice as the control, withdrawal behind a half and three quarters of the
    layers, layers skipped by image tokens, and by all in steps.
    """
    shares = {f"{100 * share:.0f}": share for share in (0.5, 0.25, 0.11)}
    counts = {name: max(1, int(share * image_tokens + 0.5)) for name, share in shares.items()}
    # of few tokens, two shares may be as many
    shares = {name: shares[name] for name in shares if counts[name] < image_tokens and name == _first(counts, name)}
    early, quarter, half, late = min(2, layers - 1), max(1, layers // 4), layers // 2, 3 * layers // 4
    grid = list[Candidate]()
    if sizes_are_obeyed:
        grid += [Candidate(f"pictures of {name} % of the pixels", pixels=share) for name, share in shares.items()]
    for name, share in shares.items():
        grid.append(Candidate(f"pooling to {name} %", (Prune(stages=((0, share),), criterion=(Pooling(),)),)))
    if early:
        for name, share in shares.items():
            by_attention = Prune(stages=((early, share),))
            grid.append(Candidate(f"last-query attention, {name} % from layer {early}", (by_attention,)))
    if "25" in shares:
        for label, criterion in _OTHERS.items():
            grid.append(Candidate(f"{label}, 25 %", (Prune(stages=((0, 0.25),), criterion=(criterion,)),)))
        if early:
            by_keys = Prune(stages=((early, 0.25),), criterion=(Duplicates(),))
            grid.append(Candidate(f"duplicates, 25 % from layer {early}", (by_keys,)))
    if layers >= 4:
        stages = tuple(zip((quarter, half, late), (0.5, 0.25, 0.125), strict=True))
        grid.append(Candidate("in three stages", (Prune(stages=stages),)))
    for layer in dict.fromkeys(each for each in (half, late) if 0 < each < layers):
        grid.append(Candidate(f"withdrawn at layer {layer}", (Withdraw(layer=layer),)))
    if layers >= 4:
        behind, second = tuple(range(quarter, layers)), tuple(range(2, layers, 2))
        grid += [
            Candidate("MLP skipped behind a quarter", (Skip(part="mlp", layers=behind),)),
            Candidate("every second block frozen", (Skip(part="block", layers=second, keys="own"),)),
            Candidate(
                "every second block skipped in steps",
                (Skip(part="block", layers=second, tokens="all", when="steps"),),
            ),
        ]
    return grid


def _first(counts: Mapping[str, int], name: str) -> str:
    return next(other for other, count in counts.items() if count == counts[name])


def pooled(share: float) -> Candidate:
    """Plain down-sampling to a share of the image tokens, which tells easy questions from hard ones."""
    return Candidate(f"pooling at {share:.2f}", (Prune(stages=((0, share),), criterion=(Pooling(),)),))
