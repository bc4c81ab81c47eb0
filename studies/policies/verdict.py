"""A verdict per claim, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alula.reports.wording import bounds, listing, percent, points
from alula.stats import CHANGE, SHARE, Estimate
from studies.policies.claims import (
    against,
    hard,
    initial,
    later_turns,
    loss,
    lower_half,
    of_places,
    over_shares,
    reference,
    ways,
)
from studies.policies.record import PoliciesRecord, among, mean
from studies.policies.rows import CHAINED, LAYERS, LOOKED, PLAIN, kept, share_name

_SHORT = {
    "diversity": "DivPrune", "dpp": "CDPruner", "dpp-like-text": "CDPruner turned to the text",
    "tower-attention": "the tower's attention", "visionzip": "VisionZip", "tower-similarity": "the tower's similarity",
    "grid-nearest": "the grid merged into the nearest", "last-query": "FastV",
    "instruction": "the instruction's attention",
    "rope-free": "attention without positions", "feather": "FEATHER", "duplicates": "DART", "pyramid": "PyramidDrop",
    "grid": "the grid", "pooling": "down-sampling", "random": "random",
}  # fmt: skip
_NO_LAYER = "none"


def verdict(record: PoliciesRecord) -> list[str]:
    """What the study found, claim by claim."""
    said: list[str] = []
    names = {way.name for way in ways(record)}
    shares: list[float] = record.settings["shares"]
    if {"pooling", "random"} <= names:
        said += [_downsampling(record), _random(record)]
        if LOOKED in shares:
            said.append(_difficult(record))
    if "last-query" in names:
        said.append(_fastv(record, shares))
    if {"last-query", "rope-free"} <= names:
        said.append(_feather(record, shares))
    if record.has("withdraw-1"):
        said.append(_withdrawal(record))
    if record.has("skip-mlp-from-0"):
        said += [_mlp(record), _attention(record)]
    if all(model.turns for model in record.models):
        said.append(_turns(record))
    if all(model.text for model in record.models):
        said.append(_text(record))
    return said


def sign(estimate: Estimate) -> int:
    """1 or -1 where the interval excludes 0 on that side, else 0."""
    return int(estimate.low > 0) - int(estimate.high < 0)


def told(estimate: Estimate) -> str:
    """``-2.3 points (-5.0 to 0.4)``."""
    return f"{points(estimate)} points ({bounds(estimate)})"


def _sides(record: PoliciesRecord, plain: str) -> dict[int, list[str]]:
    """Criteria that are above (1), below (-1) and not told from a plain way that begins at the same layer."""
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for way in ways(record):
        other = reference(record, way, plain)
        if way.name not in PLAIN and other is not None:
            estimate = against(record, way.name, other)
            assert estimate is not None
            found[sign(estimate)].append(f"{_SHORT[way.name]} ({points(estimate)})")
    return found


def _told_sides(found: dict[int, list[str]]) -> str:
    words = {1: "above it", -1: "below it", 0: "not told from it"}
    return "; ".join(f"{word} {listing(found[side])}" for side, word in words.items() if found[side])


def _downsampling(record: PoliciesRecord) -> str:
    sides = _sides(record, "pooling")
    best = not sides[1]
    head = (
        "Down-sampling beats the clever ones (VTC-Bench): not contradicted, no criterion is above it"
        if best
        else "Down-sampling beats the clever ones (VTC-Bench): not here"
    )
    chance = against(record, "pooling", "random")
    assert chance is not None
    return (
        f"{head}. Over all shares and questions, against down-sampling that begins at the same layer, "
        f"{_told_sides(sides)}. Down-sampling against random: {told(chance)}."
    )


def _random(record: PoliciesRecord) -> str:
    sides = _sides(record, "random")
    head = {
        True: "Random is hard to beat (UniPruneBench): not here, where criteria",
        False: "Random is hard to beat (UniPruneBench): so it is here, where criteria",
    }[len(sides[1]) > len(sides[0]) + len(sides[-1])]
    return f"{head} stand so to random at the same layer: {_told_sides(sides)}."


def _difficult(record: PoliciesRecord) -> str:
    split = hard(record, LOOKED)
    chance = record.right(share_name("random", LOOKED))
    sides: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for way in ways(record):
        if way.name in PLAIN:
            continue
        found = among(record.right(share_name(way.name, LOOKED)) - chance, split.hard, CHANGE)
        if found is not None:
            sides[sign(found)].append(f"{_SHORT[way.name]} ({points(found)})")
    least = among(chance, split.hard, SHARE)
    told_least = "" if least is None else f", of which random gets {percent(least.value)} right"
    return (
        f"What down-sampling gets wrong, others get right (VTC-Bench's difficult items): at {kept(LOOKED)} tokens "
        f"these are {split.hard.sum(axis=1).mean():.0f} questions a seed{told_least}. Against random there, by "
        f"intervals over seeds alone ({len(record.models)}): {_told_sides(sides)}."
    )


def _fastv(record: PoliciesRecord, shares: Sequence[float]) -> str:
    parts = []
    for share in shares:
        found = loss(record, share_name("last-query", share))
        parts.append(f"{told(found)} at {kept(share)} tokens")
    first = loss(record, share_name("last-query", shares[0]))
    head = "does not hold" if sign(first) < 0 else "is not contradicted"
    return f"Half of the image is enough behind the first layers (FastV): {head}. Against no policy {listing(parts)}."


def _feather(record: PoliciesRecord, shares: Sequence[float]) -> str:
    said = []
    if LOOKED in shares and all(model.stays for model in record.models):
        lower = {name: lower_half(record, share_name(name, LOOKED)) for name in ("last-query", "rope-free")}
        skewed = lower["last-query"] > lower["rope-free"] and lower["last-query"] > 0.5
        said.append(
            f"Early attention keeps the bottom of the image (FEATHER): {'so it does' if skewed else 'not here'}. Of "
            f"what it keeps at {kept(LOOKED)} tokens {percent(lower['last-query'])} stand in the two lower rows of "
            f"five (40 % would be even), without positions in it {percent(lower['rope-free'])}."
        )
    places = of_places(record, "last-query")
    worse = "more" if sign(places) < 0 else "less" if sign(places) > 0 else "not more"
    said.append(
        f"Localization suffers most (FEATHER): FastV loses {worse} of questions for a place than of those for what is "
        f"there ({told(places)})."
    )
    chosen = record.of("position")
    base = over_shares(record, "last-query")[:, chosen]
    for name in ("rope-free", "feather"):
        if any(way.name == name for way in ways(record)):
            found = mean(over_shares(record, name)[:, chosen] - base)
            said.append(f"Against it, {_SHORT[name]} makes {told(found)} of questions for a place.")
    return " ".join(said)


def _withdrawal(record: PoliciesRecord) -> str:
    half = LAYERS // 2
    whole = loss(record, f"withdraw-{half}")
    first, answers, _ = initial(record, half)
    layers = [layer for layer in range(1, LAYERS) if sign(loss(record, f"withdraw-{layer}")) == 0]
    head = "does not hold" if sign(whole) < 0 else "is not contradicted"
    found = [model.first.chosen for model in record.models if model.first is not None]
    said = (
        f"Upper layers do not need pixels (VTW): at half of the depth it {head}, {told(whole)} of answers right, "
        f"{told(loss(record, f'withdraw-{half}', 'caption'))} of descriptions and "
        f"{told(loss(record, f'withdraw-{half}', 'existence'))} of yes and no. The first token stays in "
        f"{percent(first)} of prompts and the whole answer in {percent(answers)}. "
    )
    said += (
        f"Nothing is shown to be lost with {listing([str(layer) for layer in layers])} of {LAYERS} layers. "
        if layers
        else f"Something is lost with {LAYERS - 1} of {LAYERS} layers already. "
    )
    told_chosen = listing([_NO_LAYER if layer is None else str(layer) for layer in found])
    said += f"VTW's own rule (KL at most 0.003) takes, seed by seed, {told_chosen}."
    name = share_name("random", 0.5)
    if record.has(name):
        plain = mean(record.right(f"withdraw-{half}") - record.right(name))
        said += f" Against random pruning before the first layer to as many tokens over all layers: {told(plain)}."
    return said


def _mlp(record: PoliciesRecord) -> str:
    image, everybody = (loss(record, f"skip-{name}-from-0") for name in ("mlp", "mlp-all"))
    same = float(record.same("skip-mlp-from-0").mean())
    head = "does not hold" if image.high < -0.02 else "holds" if image.low > -0.02 else "holds by the estimate"
    if head == "holds by the estimate" and image.value < -0.02:
        head = "is not settled"
    return (
        f"Image tokens may skip the MLP (IMA), judged by two points: it {head}. In all six layers {told(image)} of "
        f"answers right, {percent(same)} of answers stay as they were; where text of the prompt skips too, "
        f"{told(everybody)}."
    )


def _attention(record: PoliciesRecord) -> str:
    parts = [
        f"{label} {told(loss(record, f'skip-{name}'))}"
        for name, label in (
            ("attention-own-from-0", "attention in all layers, keys staying,"),
            ("block-own-from-0", "whole blocks in all layers, keys staying (so that the image is frozen),"),
            ("block-own-from-1", "the same from the second layer on"),
            ("block-every-2", "in every second block from the third on"),
            ("block-every-2-all", "where the whole prompt skips these, as published,"),
        )
    ]
    return f"And the rest (IMA, ShortV): {'; '.join(parts)}."


def _turns(record: PoliciesRecord) -> str:
    rows = [row for row in record.models[0].turns if row != "none"]
    question = ("last-query", "instruction", "rope-free", "dpp")
    sides: dict[bool, list[float]] = {True: [], False: []}
    worse = []
    for row in rows:
        way = row.rpartition("-")[0]
        if way in CHAINED:
            _, early = later_turns(record, row)
            sides[way in question].append(early.value)
            if sign(early) < 0:
                worse.append(f"{_SHORT.get(way, way)} at {row.rpartition('-')[2]} % ({points(early)})")
    means = {side: f"{100 * float(np.mean(values)):+.1f}" for side, values in sides.items() if values}
    said = (
        "Pruned conversations lose more (LLMC+): tokens chosen before the second question is known, against chosen "
        f"when it is: {'shown for ' + listing(worse) if worse else 'shown for nobody'}."
    )
    if len(means) == 2:
        said += f" On average {means[True]} points for criteria that read the question, {means[False]} for the others."
    return said


def _text(record: PoliciesRecord) -> str:
    found = [model.text for model in record.models if model.text is not None]
    changed = sorted({name for each in found for name in each.changed})
    head = f"changed by {listing(changed)}" if changed else "not a bit of a logit is changed"
    return (
        f"Text alone: {head}, under {found[0].policies} policies and {len(found)} seeds. In a batch beside pictures "
        f"logits of text move by up to {max(each.beside for each in found):.1g} (the largest are "
        f"{max(each.largest for each in found):.0f}), and "
        f"{sum(len(each.turned) for each in found)} next tokens change."
    )
