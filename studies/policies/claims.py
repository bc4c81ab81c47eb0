"""The comparisons behind the verdicts, each an estimate over trainings and items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alula.stats import Estimate
from studies.policies.record import Marks, PoliciesRecord, apart, marks, mean
from studies.policies.rows import TOKENS, WAYS, Way, kept, share_name

LOOKS = ("colour", "shape", "existence")
"""kinds of questions about what is there, against which `position` is held"""


def ways(record: PoliciesRecord) -> list[Way]:
    """The ways to prune that were asked at every share."""
    shares = record.settings["shares"]
    return [way for way in WAYS if all(record.has(share_name(way.name, share)) for share in shares)]


def over_shares(record: PoliciesRecord, way: str) -> Marks:
    """(seeds, items) of single questions, the share of the kept shares at which each is answered right."""
    shares = record.settings["shares"]
    return np.mean([record.right(share_name(way, share)) for share in shares], axis=0)


def reference(record: PoliciesRecord, way: Way, plain: str) -> str | None:
    """The plain way that begins at the same layer as another; None where it was not asked."""
    name = f"{plain}-1" if way.layer else plain
    return name if any(each.name == name for each in ways(record)) else None


def against(record: PoliciesRecord, way: str | None, other: str) -> Estimate | None:
    """A way (None: no policy) less another one, over all shares; None where it was not asked."""
    if not any(each.name == other for each in ways(record)):
        return None
    return mean((record.none if way is None else over_shares(record, way)) - over_shares(record, other))


def loss(record: PoliciesRecord, row: str, *kinds: str) -> Estimate:
    """A policy less none, of all questions or some kinds."""
    differences = record.right(row) - record.none
    return mean(differences[:, record.of(*kinds)] if kinds else differences)


def of_places(record: PoliciesRecord, way: str) -> Estimate:
    """What a way loses of questions for a place less what it loses of those for what is there, over all shares."""
    differences = over_shares(record, way) - record.none
    return apart(differences[:, record.of("position")], differences[:, record.of(*LOOKS)])


@dataclass(frozen=True)
class Hard:
    """(seeds, items) what down-sampling gets right (easy) and wrong (hard), of what is right without a policy."""

    easy: Marks
    hard: Marks


def hard(record: PoliciesRecord, share: float) -> Hard:
    """The questions by what down-sampling to a share makes of them (VTC-Bench's filter)."""
    sampled = record.right(share_name("pooling", share))
    return Hard(record.none * sampled, record.none * (1 - sampled))


def initial(record: PoliciesRecord, layer: int) -> tuple[float, float, float]:
    """Of withdrawal at a layer: the share of first tokens and of whole answers that stay, and the mean KL in nats."""
    firsts, wholes, nats = [], [], []
    for model in record.models:
        found = model.first
        assert found is not None
        at = found.layers.index(layer)
        agreed = np.array([each[at] for each in found.agreed])
        firsts.append(float((agreed >= 1).mean()))
        wholes.append(float((agreed == np.array(found.lengths)).mean()))
        nats.append(float(np.mean([each[at] for each in found.nats])))
    return float(np.mean(firsts)), float(np.mean(wholes)), float(np.mean(nats))


def later_turns(record: PoliciesRecord, row: str) -> tuple[Estimate, Estimate]:
    """Of the second of two questions about a picture under a policy, against none: what a conversation loses less what
    the question alone loses; and less what it loses where all was read at once."""

    def lost(how: str) -> Marks:
        now, before = (marks([getattr(model.turns[name], how) for model in record.models]) for name in (row, "none"))
        return now - before

    chat = lost("chat")
    return mean(chat - lost("alone")), mean(chat - lost("prompt"))


def lower_half(record: PoliciesRecord, row: str) -> float:
    """The share of the tokens that stay which stand in the two lower rows of five."""
    counts = np.sum([model.stays[row].stays for model in record.models], axis=0)
    return float(counts[15:].sum() / counts.sum())


def named(row: str, tokens: int = TOKENS) -> str:
    """A policy of conversations, for people."""
    if row == "none":
        return "no policy"
    if row.startswith("withdraw-"):
        return f"withdrawal, {row.removeprefix('withdraw-')} layers see pixels"
    way, _, share = row.rpartition("-")
    label = next(each.label for each in WAYS if each.name == way)
    return f"{label}, {kept(int(share) / 100, tokens)} of {tokens}"
