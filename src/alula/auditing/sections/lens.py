"""Which words image tokens read as under the model's own head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alula.anatomy import Anatomy
from alula.auditing.drawing import SERIES, drawn_row, flat, line, over_depth
from alula.auditing.finding import Finding, Status, interval, number
from alula.auditing.record import Audit
from alula.auditing.sections.base import IMA_PAPER, KEPT_BYTES, SUM_BYTES, Measurement, Section, kinds_of
from alula.hosts.host import tokenizer_of
from alula.probes import LensResult, Resampling, VocabularyLens
from alula.reports.document import Block, Cell, Table
from alula.reports.palette import NEUTRAL
from alula.reports.wording import percent

COLLAPSED = 0.5
"""one word for half of all image tokens is a collapse"""


@dataclass(frozen=True)
class LensMeasured:
    """What the lens found, and the tokens it names as text."""

    result: LensResult
    words: Mapping[int, str]


def _words(lens: LensResult, processor: Any) -> dict[int, str]:
    """The text of every token the lens names."""
    tokenizer = tokenizer_of(processor)
    named = {token for kind in lens.kinds.values() for state in kind.top for token, _ in state}
    named |= {tokens[0] for example in lens.examples for row in example.tokens for tokens in row}
    return {token: tokenizer.decode([token]) for token in sorted(named)}


def word(measured: LensMeasured, token: int) -> str:
    """A token as a reader sees it: spaces and line ends visible."""
    shown = repr(measured.words.get(token, f"#{token}"))[1:-1]
    return shown if shown.strip() else "\N{OPEN BOX}" * max(1, len(shown))


def _verdict(audit: Audit, measured: LensMeasured) -> Finding | None:
    lens = measured.result
    if lens is None:
        return None
    title = "Which words do image tokens stand for?"
    kind = next((name for name in lens.kinds if name != "text"), None)
    if kind is None:
        return None
    top, entropy = lens.kinds[kind].top[-1], lens.kinds[kind].entropy
    if not top:
        return None
    token, share = top[0]
    uniform = math.log(lens.vocabulary)
    jensen = lens.divergence[f"{kind}||text"].jensen_shannon[-1] if f"{kind}||text" in lens.divergence else math.nan
    figure = f"{percent(share, 0)} of {kind} tokens read {word(measured, token)!r} at the end"
    against = f"entropy {interval(entropy[-1], 1)} of {uniform:.1f} nats (no preference)"
    far = (
        f" As distributions over words, {kind} and text tokens differ by {number(jensen)} at the end (0: alike, "
        f"{math.log(2):.2f}: nothing in common)."
        if math.isfinite(jensen)
        else ""
    )
    if share > COLLAPSED:
        status = Status.LOOK
        says = f"Most {kind} tokens read as one word at the end: {word(measured, token)!r} in {percent(share, 0)} "
        says += f"of them.{far}"
        do = (
            "Harmless where that word ends a line or an image (tokens behind it still see the states below). If "
            "answers do not depend on the image either, look at the alignment above."
        )
    else:
        words = ", ".join(f"{word(measured, t)!r} {percent(s, 0)}" for t, s in top[:3])
        status = Status.FINE
        says = f"The {kind} tokens read as different words; at the end most often {words}.{far}"
        do = "Read the table below: words that fit the image early on mean that it is understood early."
    return Finding("lens", title, status, figure, against, says, do)


def _blocks(audit: Audit, measured: LensMeasured) -> list[Block]:
    lens = measured.result
    assert lens is not None
    order = ("text", *(kind for kind in lens.kinds if kind != "text"))
    kinds = {name: lens.kinds[name] for name in order if name in lens.kinds}
    uniform = math.log(lens.vocabulary)
    entropy = over_depth(
        [
            *(line(name, SERIES[name], kind.entropy) for name, kind in kinds.items()),
            flat("no preference", NEUTRAL, [uniform] * len(lens.states), dashed=True),
        ],
        "0: one word for certain. Bands: 95 % bootstrap intervals over samples.",
        title="How sure a token is of its word", xs=lens.states, x_title="state of the stream",
        y_title="entropy over the vocabulary, nats",
    )  # fmt: skip
    pairs = [
        flat(f"{pair.replace('||', ' and ')}", SERIES[pair.split("||")[0]], values.jensen_shannon)
        for pair, values in lens.divergence.items()
        if pair.endswith("||text")
    ]
    if pairs:
        pairs.append(flat("nothing shared", NEUTRAL, [math.log(2)] * len(lens.states), dashed=True))
    shared = over_depth(
        pairs, "Of the mean distributions of both kinds; 0: the same words.", xs=lens.states, least=0.1,
        title="Do images and text stand for the same words?", x_title="state of the stream",
        y_title="Jensen-Shannon divergence, nats",
    )  # fmt: skip
    blocks: list[Block] = [*drawn_row([*entropy, *shared])]
    example = next((example for example in lens.examples if example.kind != "text"), None)
    if example is not None:
        rows = []
        for position, tokens, shares in zip(example.positions, example.tokens, example.shares, strict=True):
            cells = [
                Cell(_clip(word(measured, t[0])), shade=0.9 * s[0], hint=f"{word(measured, t[0])}: {percent(s[0], 0)}")
                for t, s in zip(tokens, shares, strict=True)
            ]
            rows.append([Cell(f"token {position}"), *cells])
        rows = rows[:: max(1, len(rows) // 8)][:8]
        caption = (
            f"What some {example.kind} tokens of one sample would say if a state were the last: the likeliest token, "
            "darker where it is surer."
        )
        blocks.append(Table(["", *(f"state {state}" for state in lens.states)], rows, caption, heat=True))
    tops = [
        [
            Cell(f"state {state}"),
            *(
                Cell(", ".join(f"{_clip(word(measured, t))} {percent(s, 0)}" for t, s in kind.top[at][:4]))
                for kind in kinds.values()
            ),
        ]
        for at, state in enumerate(lens.states)
    ]
    caption = "The tokens that most often come first, with the share of tokens they come first in."
    blocks.append(Table(["", *(f"{name} tokens" for name in kinds)], tops, caption, words=True))
    return blocks


def _clip(text: str, most: int = 11) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _bound(probe: VocabularyLens, anatomy: Anatomy) -> int:
    kinds, head = kinds_of(anatomy), anatomy.head
    vocabulary = 0 if head is None else head.get_parameter("weight").shape[0]
    examples = probe.examples * 4 * probe.tokens_per_kind * (2 * 9 * probe.top + 1) * KEPT_BYTES
    return 3 * kinds * 9 * vocabulary * SUM_BYTES + examples + kinds * 2 * 3 * 9 * (probe.keep * KEPT_BYTES + SUM_BYTES)


def _result(probes: Mapping[str, Any], how: Resampling, model: Any, processor: Any) -> LensMeasured:
    lens = probes["model"].result(how)
    return LensMeasured(lens, _words(lens, processor))


def _export(measured: LensMeasured | None) -> dict[str, Any]:
    if measured is None:
        return {"lens": None, "words": {}}
    return {"lens": measured.result.to_dict(), "words": {str(token): word for token, word in measured.words.items()}}


LENS = Section(
    name="lens",
    result=LensMeasured,
    verdict=_verdict,
    blocks=_blocks,
    links=(IMA_PAPER,),
    export=_export,
    measurement=Measurement(VocabularyLens, _bound, result=_result),
)
