"""Which policies are measured: every criterion at every share, withdrawal at every layer, what may be skipped where.

The decoder has six layers. Where a paper names a layer of 32, it stands here at the same share of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAYERS = 6
TOKENS = 25
"""of a picture"""
SHARES = (0.5, 0.33, 0.22, 0.11)
"""of a picture's tokens that stay: 13, 8, 6 and 3 of 25"""
LOOKED = 0.22
"""at which layers are compared, and who stays is looked at"""


@dataclass(frozen=True)
class Way:
    """A way to prune.

    Attributes:
        name: under which it is kept.
        label: what it is for people, with the paper it stands for.
        layer: the first one without the tokens that leave.
        settings: of the policy, given a share.
        draws: chance decides, so prompts are given draws of their own.
    """

    name: str
    label: str
    layer: int
    settings: Callable[[float], Mapping[str, Any]]
    draws: bool = False


@dataclass(frozen=True)
class Row:
    """A policy that is measured.

    Attributes:
        name: under which it is kept.
        label: for people.
        settings: of the policy.
        draws: chance decides, so prompts are given draws of their own.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    draws: bool = False

    def drawn(self, number: int) -> Mapping[str, Any]:
        """The settings for a batch of prompts, with a draw of its own where chance decides."""
        if not self.draws:
            return self.settings
        return {**self.settings, "criterion": {"name": "random", "seed": number}}


def kept(share: float, tokens: int = TOKENS) -> int:
    """Tokens that stay of so many."""
    return max(1, math.floor(share * tokens + 0.5))


def _prune(layer: int, criterion: Any, **more: Any) -> Callable[[float], Mapping[str, Any]]:
    return lambda share: {"policy_type": "prune", "stages": [[layer, share]], "criterion": criterion, **more}


def _stages(layers: Sequence[int], criterion: Any, **more: Any) -> Callable[[float], Mapping[str, Any]]:
    """Each stage leaves the same share of the last one's tokens: such that all layers together have as many tokens as
    with one stage of the given share at the first of these layers."""

    def settings(share: float) -> Mapping[str, Any]:
        ends = (*layers[1:], LAYERS)
        spans = [end - start for start, end in zip(layers, ends, strict=True)]
        wanted, low, high = (LAYERS - layers[0]) * share, 0.0, 1.0
        for _ in range(50):
            step = (low + high) / 2
            low, high = (low, step) if _total(spans, step) > wanted else (step, high)
        stages = [[layer, round(low ** (place + 1), 4)] for place, layer in enumerate(layers)]
        return {"policy_type": "prune", "stages": stages, "criterion": criterion, **more}

    return settings


def _total(spans: Sequence[int], step: float) -> float:
    return sum(span * step ** (place + 1) for place, span in enumerate(spans))


WAYS = (
    Way("pooling", "down-sampling (pooling)", 0, _prune(0, "pooling")),
    Way("grid", "grid", 0, _prune(0, "grid")),
    Way("random", "random", 0, _prune(0, "random"), draws=True),
    Way("diversity", "max-min diversity (DivPrune)", 0, _prune(0, "max_min_diversity")),
    Way("dpp", "conditional DPP (CDPruner)", 0, _prune(0, "conditional_dpp")),
    Way("dpp-like-text", "the same, relevant is what is like the text", 0,
        _prune(0, {"name": "conditional_dpp", "relevance": "like_text"})),
    Way("tower-attention", "tower's attention", 0, _prune(0, "tower_attention")),
    Way("visionzip", "the same, merged (VisionZip)", 0, _prune(0, "tower_attention", merge="contextual", per="image")),
    Way("tower-similarity", "tower's similarity", 0, _prune(0, "tower_similarity")),
    Way("grid-nearest", "grid, merged into the nearest", 0, _prune(0, "grid", merge="nearest")),
    Way("pooling-dense", "down-sampling, positions counted anew", 0, _prune(0, "pooling", positions="dense")),
    Way("random-dense", "random, positions counted anew", 0, _prune(0, "random", positions="dense"), draws=True),
    Way("pooling-1", "down-sampling behind a layer", 1, _prune(1, "pooling")),
    Way("random-1", "random behind a layer", 1, _prune(1, "random"), draws=True),
    Way("last-query", "last query's attention (FastV)", 1, _prune(1, "last_query_attention")),
    Way("instruction", "instruction's attention", 1, _prune(1, "instruction_attention")),
    Way("rope-free", "attention without positions", 1, _prune(1, {"name": "rope_free_attention", "stride": None})),
    Way("feather", "the same in stages, with a uniform share (FEATHER)", 1, _stages((1, 3), "rope_free_attention")),
    Way("duplicates", "duplicates (DART)", 1, _prune(1, "duplicates")),
    Way("pyramid", "stages (PyramidDrop)", 1,
        _stages((1, 3, 5), {"name": "last_query_attention", "of_layer": "itself"}, positions="dense")),
)  # fmt: skip
PLAIN = ("pooling", "grid", "random", "pooling-dense", "random-dense", "pooling-1", "random-1")
"""ways that look at nothing"""
CHAINED = ("random", "diversity", "random-1", "last-query", "rope-free")
"""those asked in conversations"""


def share_rows(ways: Sequence[Way], shares: Sequence[float]) -> list[Row]:
    """Every way at every share."""
    return [
        Row(share_name(way.name, share), way.label, way.settings(share), way.draws) for way in ways for share in shares
    ]


def share_name(way: str, share: float) -> str:
    """Under which a way at a share is kept."""
    return f"{way}-{round(100 * share)}"


def knee_rows() -> list[Row]:
    """As many tokens as stand above the knee: the first stage of 2409.01162, and both."""
    first = {"policy_type": "prune", "stages": [[0, "knee"]], "criterion": "tower_similarity", "per": "image"}
    both = {**first, "stages": [[0, "knee"], [1, "knee"]], "criterion": ["tower_similarity", "instruction_attention"]}
    return [
        Row("knee", "tower's similarity to the knee", first),
        Row("knee-both", "and instruction's attention to the knee (2409.01162)", both),
    ]


DEEPER = range(2, LAYERS)


def layer_rows() -> list[Row]:
    """The same share at later layers."""
    makers = {"pooling": "pooling", "random": "random", "last-query": "last_query_attention"}
    return [
        Row(f"{name}-at-{layer}", f"{name} at layer {layer}", _prune(layer, criterion)(LOOKED), name == "random")
        for name, criterion in makers.items()
        for layer in DEEPER
    ]


def withdrawal_rows() -> list[Row]:
    """Image tokens in the first layers alone."""
    return [
        Row(f"withdraw-{layer}", f"{layer} of {LAYERS} layers see pixels", {"policy_type": "withdraw", "layer": layer})
        for layer in range(1, LAYERS)
    ]


@dataclass(frozen=True)
class Skipping:
    """Something that is skipped from a layer on.

    Attributes:
        starts: of the layers.
    """

    name: str
    label: str
    settings: Mapping[str, Any]
    starts: Sequence[int]


SKIPPED = (
    Skipping("mlp", "image tokens, MLP", {"part": "mlp"}, range(LAYERS)),
    Skipping("mlp-all", "all tokens of the prompt, MLP", {"part": "mlp", "tokens": "all", "when": "prompts"},
             range(LAYERS)),
    Skipping("attention-own", "image tokens, attention, own keys stay", {"part": "attention", "keys": "own"},
             range(LAYERS)),
    Skipping("attention", "image tokens, attention and keys", {"part": "attention"}, range(1, LAYERS)),
    Skipping("block-own", "image tokens, block, own keys stay (ShortV)", {"part": "block", "keys": "own"},
             range(LAYERS)),
)  # fmt: skip


def skip_rows() -> list[Row]:
    """What image tokens may skip: from a layer on, layer by layer, at intervals, a share of them."""

    def row(name: str, label: str, layers: Sequence[int], **settings: Any) -> Row:
        return Row(f"skip-{name}", label, {"policy_type": "skip", "layers": [*layers], **settings})

    rows = [
        row(f"{each.name}-from-{start}", f"{each.label}, from layer {start}", range(start, LAYERS), **each.settings)
        for each in SKIPPED
        for start in each.starts
    ]
    rows += [row(f"mlp-in-{layer}", f"image tokens, MLP of layer {layer}", [layer], part="mlp") for layer in range(5)]
    every = [("2", (2, 4)), ("2-odd", (1, 3, 5)), ("3", (3,))]
    for name, layers in every:
        told = ", ".join(map(str, layers))
        rows.append(row(f"mlp-every-{name}", f"image tokens, MLP of layers {told}", layers, part="mlp"))
    rows.append(row("block-every-2", "image tokens, blocks 2, 4, own keys stay", (2, 4), part="block", keys="own"))
    rows.append(row("block-every-2-absent", "image tokens, blocks 2, 4 and keys", (2, 4), part="block"))
    lent = {"part": "block", "tokens": "all", "when": "prompts", "keys": "lent"}
    rows.append(row("block-every-2-all", "all tokens of the prompt, blocks 2, 4, keys lent", (2, 4), **lent))
    everywhere = range(LAYERS)
    for share in (0.25, 0.5, 0.75):
        label = f"{share:.0%} of image tokens, MLP, evenly spread"
        rows.append(row(f"mlp-share-{round(100 * share)}", label, everywhere, part="mlp", share=share))
    for choice in ("first", "random", "norm"):
        told = {"first": "the first half", "random": "a random half", "norm": "the half of largest norm"}[choice]
        label = f"{told} of image tokens, MLP"
        rows.append(row(f"mlp-half-{choice}", label, everywhere, part="mlp", share=0.5, choice=choice))
    for tokens, label in (("image", "image tokens"), ("all", "all tokens")):
        settings = {"policy_type": "parallel_attention", "tokens": tokens}
        rows.append(Row(f"parallel-{tokens}", f"{label}, MLP beside attention", settings))
    return rows


def changes_text(settings: Mapping[str, Any]) -> bool:
    """Whether a policy is one for all tokens, text included."""
    return settings.get("tokens") == "all"
