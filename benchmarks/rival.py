"""A benchmark beside the build of another checkout."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Ratios = Mapping[str, Mapping[str, float]]
"""by part and contender, what it takes of the plain model in one round"""


def beside(
    script: str, rival: Path, rounds: int, options: Sequence[str], read: Callable[[Any], Ratios]
) -> dict[str, dict[str, dict[str, float]]]:
    """What contenders take of the plain model, of this build over another: by part, median and extremes over rounds.

    Both builds run in processes of their own, in turn within each round, each with the script of its checkout.

    Args:
        script: its name.
        rival: the other checkout.
        options: of the script, beside ``--rounds`` and ``--output``.
        read: takes the ratios out of the script's record.
    """
    builds = {"build": Path(__file__).parents[1], "rival": rival.resolve()}
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        each = {
            name: read(_of_build(builds[name], script, options)) for name in (builds if turn % 2 else reversed(builds))
        }
        for part, contenders in each["build"].items():
            for contender, ratio in contenders.items():
                if contender in each["rival"][part]:
                    found.setdefault(part, {}).setdefault(contender, []).append(ratio / each["rival"][part][contender])
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr)
    return {
        part: {
            contender: {"median": round(statistics.median(r), 3), "low": round(min(r), 3), "high": round(max(r), 3)}
            for contender, r in contenders.items()
        }
        for part, contenders in found.items()
    }


def _of_build(checkout: Path, script: str, options: Sequence[str]) -> Any:
    """The record of one round in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "record.json"
        path = os.pathsep.join(str(checkout / part) for part in ("src", "fledgling/src", "fledgling", ""))
        subprocess.run(
            [sys.executable, checkout / "benchmarks" / script, "--rounds", "1", "--output", output, *options],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(output.read_text())
