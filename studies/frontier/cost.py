"""What an arm's training costs beside full tuning's: a few steps of both in turn, again and again.

Times of whole trainings do not tell it: what else a machine had to do while they ran is in them.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from statistics import median

from alula.files import read_json, write_json
from alula.training import train
from alula.training.recipe import Recipe

STEPS = 8
"""of every stage in a round; the first is not counted"""


def costs(path: Path, arm: Recipe, reference: Recipe, rounds: int) -> list[float]:
    """Training time of one recipe as a multiple of another's, once per round; each round trains a little of both.

    A recipe's time is what a step takes, times the steps, over its stages; what is done once before a training
    (loading, asking a teacher) is not in it. Rounds that an earlier call measured are kept at ``path``.
    """
    found: list[float] = read_json(path)["ratios"] if path.is_file() else []
    while len(found) < rounds:
        # whoever comes second has a warmer machine
        first, second = (reference, arm) if len(found) % 2 == 0 else (arm, reference)
        before, after = _seconds(first), _seconds(second)
        found.append(after / before if first is reference else before / after)
        write_json(path, {"ratios": found})
    return found[:rounds]


def _seconds(recipe: Recipe) -> float:
    """What all steps of a training would take, by those of a short one."""
    stages = tuple(
        stage.model_copy(update={"steps": STEPS, "log_every": 1, "save_every": 2 * STEPS}) for stage in recipe.stages
    )
    with tempfile.TemporaryDirectory() as place:
        short = recipe.model_copy(update={"stages": stages, "output_dir": str(Path(place) / "run")})
        train(short, quiet=True)
        rows = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    total = 0.0
    for stage in recipe.stages:
        ends = [row["seconds"] for row in rows if row["stage"] == stage.name]
        total += (stage.steps or 0) * median(after - before for before, after in itertools.pairwise(ends))
    return total
