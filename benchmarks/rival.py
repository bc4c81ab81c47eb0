"""A benchmark beside the build of another checkout."""

from __future__ import annotations

import argparse
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


def refuse_idle(parser: argparse.ArgumentParser, given: argparse.Namespace, *taken: str) -> None:
    """End with an error where an option was given that has no effect beside a rival: all but those ``taken``."""
    for name, value in vars(given).items():
        if name not in ("rival", "rounds", "output", "shrink", *taken) and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is without effect beside --rival: leave it out")


def beside(
    script: str,
    rival: Path,
    rounds: int,
    options: Sequence[str],
    read: Callable[[Any], Ratios],
    contenders: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """What contenders take of the plain model, of this build over another: by part, median and extremes over rounds.

    Both builds run in processes of their own, in turn within each round, each with the script of its checkout.

    Args:
        script: its name.
        rival: the other checkout.
        options: of the script, beside ``--rounds`` and ``--output``.
        read: takes the ratios out of the script's record.
        contenders: who takes part, of the script's ``CONTENDERS``; None: all.
    """
    builds = {"build": Path(__file__).parents[1], "rival": rival.resolve()}
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        each = {
            name: read(_of_build(builds[name], script, options, contenders))
            for name in (builds if turn % 2 else reversed(builds))
        }
        for part, ratios in each["build"].items():
            for contender, ratio in ratios.items():
                if contender in each["rival"][part]:
                    found.setdefault(part, {}).setdefault(contender, []).append(ratio / each["rival"][part][contender])
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr)
    return {
        part: {
            contender: {"median": round(statistics.median(r), 3), "low": round(min(r), 3), "high": round(max(r), 3)}
            for contender, r in ratios.items()
        }
        for part, ratios in found.items()
    }


def _of_build(checkout: Path, script: str, options: Sequence[str], contenders: Sequence[str] | None) -> Any:
    """The record of one round in a process of its own."""
    folder = checkout / "benchmarks"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "record.json"
        path = os.pathsep.join(str(each) for each in (checkout / "src", checkout / "fledgling/src", folder, checkout))
        # of a build that has no option for it, too
        name = Path(script).stem
        chosen = "" if contenders is None else f"{name}.CONTENDERS = {tuple(contenders)!r}; "
        arguments = ["--rounds", "1", "--output", str(output), *options]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys, {name}; {chosen}{name}.main()", *arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{folder / script} failed:\n{done.stderr}")
        return json.loads(output.read_text())
