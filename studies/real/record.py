"""The record of the study on real weights, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alula.errors import UsageError
from alula.evaluation.results import Estimate
from alula.stats import CHANGE, SHARE, Range, over_seeds
from studies.association import Association, associate
from studies.real.pictures import NEGATIVES
from studies.real.plan import BASE
from studies.records import StudyRecord

Measured = Mapping[str, Any]
Items = Callable[[Measured], list[float]]
"""what was measured of a model -> a value per item"""


def digits(found: str) -> list[float]:
    """The digits of right and wrong as numbers."""
    return [float(digit) for digit in found]


def _pairs(found: Measured) -> list[float]:
    return [value for right in found["blimp"].values() for value in digits(right)]


def ordered(found: Measured, kind: str | None = None) -> list[float]:
    """Per picture whether yes is likelier of its own thing than of the absent one, ties half; mean over kinds if none
    is named."""
    odds = found["presence"]
    kinds = NEGATIVES if kind is None else (kind,)
    return [
        sum(0.5 + 0.5 * math.copysign(1, own - odds[each][place]) * (own != odds[each][place]) for each in kinds)
        / len(kinds)
        for place, own in enumerate(odds["yes"])
    ]


def answered(found: Measured, kind: str | None = None) -> list[float]:
    """Per picture the mean of: yes is likelier than no of what is there, and no than yes of what is not."""
    odds = found["presence"]
    kinds = NEGATIVES if kind is None else (kind,)
    return [
        sum((float(own > 0) + float(odds[each][place] < 0)) / 2 for each in kinds) / len(kinds)
        for place, own in enumerate(odds["yes"])
    ]


def said_yes(found: Measured) -> list[float]:
    """Per question whether yes is the likelier answer."""
    return [float(value > 0) for values in found["presence"].values() for value in values]


def had(found: Measured) -> list[float]:
    """Per caption and answer about shapes the nats per token more behind another picture than behind its own."""
    return [
        other - own
        for task in ("captions", "shapes")
        for own, other in zip(found[task]["nats"], found["sight"][task], strict=True)
    ]


WORDS: dict[str, tuple[Items, Range | None]] = {
    "blimp": (_pairs, SHARE),
    "coda": (lambda found: found["coda"]["spearman"], (-1.0, 1.0)),
    "coda_top": (lambda found: digits(found["coda"]["top"]), SHARE),
    "gsm8k": (lambda found: found["gsm8k"]["nats"], None),
    "formats": (lambda found: found["formats"]["nats"], None),
    "followed": (lambda found: digits(found["formats"]["followed"]), SHARE),
    "ended": (lambda found: digits(found["formats"]["ended"]), SHARE),
}
"""figures of text: what is taken of a measurement, and what an item's value can be"""
PICTURES: dict[str, tuple[Items, Range | None]] = {
    "captions": (lambda found: found["captions"]["nats"], None),
    "cider": (lambda found: found["captions"]["cider"], None),
    "ordered": (ordered, SHARE),
    "answered": (answered, SHARE),
    "yes": (said_yes, SHARE),
    "had": (had, None),
    "shapes": (lambda found: digits(found["shapes"]["right"]), SHARE),
    "shape_nats": (lambda found: found["shapes"]["nats"], None),
}
"""figures of held-out pictures"""
FIGURES = {**WORDS, **PICTURES}
LOSSES = ("gsm8k", "formats", "captions", "shape_nats")
"""figures of which less is better: nats per token"""
PREDICTORS = ("divergence", "shift", "alignment", "contrast")


class RealRecord(StudyRecord):
    """What was found.

    Attributes:
        labels: model -> its name for people, the base first.
        phenomena: BLiMP's paradigm -> the phenomenon it is of.
        blind: of easy-vqa's questions a digit for each that is right without a look, by the most frequent answer to
            the same words in training.
        measured: seed -> model -> what was measured of it, item by item; the words of models are left out.
        on_the_way: seed -> arm -> step -> what was measured in training; step 0 of the base.
        inside: seed -> model -> what probes saw.
    """

    labels: dict[str, str]
    phenomena: dict[str, str]
    blind: str
    measured: dict[str, dict[str, dict[str, Any]]]
    on_the_way: dict[str, dict[str, dict[str, dict[str, Any]]]]
    inside: dict[str, dict[str, dict[str, Any]]]

    @property
    def seeds(self) -> list[str]:
        return list(self.measured)

    def of_seed(self, seed: str) -> RealRecord:
        """The record of one training of each way."""
        parts = ("measured", "on_the_way", "inside")
        return self.model_copy(
            update={
                "settings": {**self.settings, "seeds": [int(seed)]},
                **{part: {seed: getattr(self, part)[seed]} for part in parts if seed in getattr(self, part)},
            }
        )

    def refuse_unlike(self, settings: Mapping[str, Any], labels: Mapping[str, str], where: str) -> None:
        """Raise a UsageError where this record, of the file ``where``, cannot stand beside seeds of these settings and
        models."""
        parted = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        if found := [name for name in parted if name != "seeds"]:
            raise UsageError(
                f"was made with {found[0]} {self.settings.get(found[0])}, this study has {settings.get(found[0])}",
                where=where,
                remedy="join what was made alike",
            )
        if missing := [label for name, label in labels.items() if self.labels.get(name) != label]:
            raise UsageError(f"has no {missing[0]!r}", where=where, remedy="leave it out with --arms")
        if both := [seed for seed in self.seeds if int(seed) in settings["seeds"]]:
            raise UsageError(
                f"holds seed {both[0]}, which this study has", where=where, remedy="leave it out of --seeds"
            )

    def joined(self, other: RealRecord, where: str) -> RealRecord:
        """This record with the seeds of another, which was made with the same settings; what that has of further models
        is left out.

        Args:
            where: the other's file, for errors.

        Raises:
            UsageError: other settings, models or items, or a seed that both have.
        """
        other.refuse_unlike(self.settings, self.labels, where)
        if (other.phenomena, other.blind) != (self.phenomena, self.blind):
            raise UsageError("asks of other sentences or questions", where=where, remedy="join what was made alike")
        seeds = sorted([*self.seeds, *other.seeds], key=int)
        parts = ("measured", "on_the_way", "inside")
        theirs = {
            part: {
                seed: {name: each for name, each in found.items() if name in self.labels}
                for seed, found in getattr(other, part).items()
            }
            for part in parts
        }
        together = {part: {**getattr(self, part), **theirs[part]} for part in parts}
        note = (
            f"seeds {', '.join(other.seeds)} of {other.environment.get('commit', 'an unknown build')}, {other.created}"
        )
        return self.model_copy(
            update={
                "seconds": self.seconds + other.seconds,
                "environment": {**self.environment, "joined": note},
                "settings": {**self.settings, "seeds": [int(seed) for seed in seeds]},
                **{part: {seed: found[seed] for seed in seeds if seed in found} for part, found in together.items()},
            }
        )

    @property
    def arms(self) -> list[str]:
        """The tuned models."""
        return [name for name in self.labels if name != BASE]

    def figure(self, name: str, figure: str) -> Estimate:
        """A model's figure (`FIGURES`); the interval is over items, and over seeds where there are several."""
        items, within = FIGURES[figure]
        return over_seeds([items(self.measured[seed][name]) for seed in self.seeds], within)

    def change(self, name: str, figure: str, against: str = BASE) -> Estimate:
        """A model's figure minus another's, item by item."""
        items, within = FIGURES[figure]
        rows = [
            np.subtract(items(self.measured[seed][name]), items(self.measured[seed][against])) for seed in self.seeds
        ]
        return over_seeds(rows, None if within is None else CHANGE if within == SHARE else (-2.0, 2.0))

    def kind(self, name: str, kind: str, how: Callable[[Measured, str], list[float]]) -> Estimate:
        """A model's figure of one kind of absent things."""
        return over_seeds([how(self.measured[seed][name], kind) for seed in self.seeds], SHARE)

    def phenomenon(self, name: str, phenomenon: str, against: str | None = None) -> Estimate:
        """A model's share right of a phenomenon of BLiMP, or that minus another model's."""
        own = [paradigm for paradigm, of in self.phenomena.items() if of == phenomenon]

        def items(model: str, seed: str) -> list[float]:
            blimp = self.measured[seed][model]["blimp"]
            return [value for paradigm in own for value in digits(blimp[paradigm])]

        rows = [np.array(items(name, seed)) for seed in self.seeds]
        if against is None:
            return over_seeds(rows, SHARE)
        others = [np.array(items(against, seed)) for seed in self.seeds]
        return over_seeds([row - other for row, other in zip(rows, others, strict=True)], CHANGE)

    def mean(self, name: str, *keys: str) -> float:
        """The mean over seeds of a number that was measured of a model; of a list, of its mean."""
        found = []
        for seed in self.seeds:
            value: Any = self.measured[seed][name]
            for key in keys:
                value = value[key]
            found.append(math.nan if value is None else float(np.mean(value)))
        return float(np.mean(found))

    def unchanged(self, name: str) -> bool:
        """Whether a model's every answer and likelihood of text is the base's, to the last digit kept."""
        return all(
            self.measured[seed][name][task] == self.measured[seed][BASE][task]
            for seed in self.seeds
            for task in ("blimp", "coda", "gsm8k", "formats")
        )

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Trainings that were measured on their way: seed and arm."""
        return [(seed, name) for seed in self.seeds for name in self.arms if self.on_the_way.get(seed, {}).get(name)]

    def predicted(self, outcome: str) -> dict[str, dict[str, Association]]:
        """How predictors go with what was lost of text (``gsm8k``: nats more per token; ``blimp``: share fewer), or
        with what is seen (``shapes``: share right; ``captions``: nats fewer per token), over the trained models at
        their end (``end``) and over these and those on their way, both on the few items asked of the latter (``way``);
        empty with fewer than three trainings."""
        if len(self.runs) < 3:
            return {}
        found: dict[str, dict[str, Association]] = {}
        for predictor in PREDICTORS:
            table = np.array([[_predictor(each, predictor) for each in self._both(*run)] for run in self.runs])
            if not np.isfinite(table).all():
                continue
            few = np.array([self._outcomes(*run, outcome) for run in self.runs])
            full = np.array([[self._at_end(*run, outcome)] for run in self.runs])
            found[predictor] = {"end": associate(table[:, -1:], full), "way": associate(table, few)}
        return found

    def _both(self, seed: str, name: str) -> tuple[Measured, Measured]:
        """What was measured of a training half-way and at its end."""
        way = self.on_the_way[seed][name]
        return way[min(way, key=int)], self.measured[seed][name]

    def _at_end(self, seed: str, name: str, outcome: str) -> float:
        items, _ = FIGURES[outcome]
        now, start = (float(np.mean(items(self.measured[seed][model]))) for model in (name, BASE))
        return _sign(outcome) * (now - start)

    def _outcomes(self, seed: str, name: str, outcome: str) -> list[float]:
        """Half-way and at the end, on the items that were asked half-way."""
        half, end = self._both(seed, name)
        start = self.measured[seed][BASE]
        return [_sign(outcome) * (_few(each, outcome, half) - _few(start, outcome, half)) for each in (half, end)]


def _sign(outcome: str) -> float:
    """1 where a larger figure means what is asked about: more lost of text, more seen of pictures."""
    return -1.0 if outcome in ("blimp", "captions", "shape_nats") else 1.0


def _few(found: Measured, outcome: str, half: Measured) -> float:
    """A figure on what was asked half-way, which are the first items of what is asked at the end."""
    if outcome == "blimp":
        return float(
            np.mean([v for name, right in half["blimp"].items() for v in digits(found["blimp"][name][: len(right)])])
        )
    task, key = {
        "gsm8k": ("gsm8k", "nats"),
        "shapes": ("shapes", "right"),
        "shape_nats": ("shapes", "nats"),
        "captions": ("captions", "nats"),
    }[outcome]
    values, count = found[task][key], len(half[task][key])
    if task == "captions":  # evenly spread over those of the end
        values = [values[place * len(values) // count] for place in range(count)]
    return float(np.mean([float(value) for value in values[:count]]))


def _predictor(found: Measured, name: str) -> float:
    value = found[name]
    return math.nan if value is None else float(np.mean(value))
