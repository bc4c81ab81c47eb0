"""The weights: a tiny language model and its towers, found by the name ``fledgling`` wherever a model is named."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from alula.errors import HostError

NAME = "fledgling"
PARTS = ("llm", "vision", "audio")
DEMO = "demo"
"""what `alula serve --demo` puts together with these: a connector, and adapters of the host that it makes"""


def directory() -> Path:
    """The folder of the package data: ``llm/``, ``vision/``, ``audio/``, ``card.json`` and ``README.md``.

    Raises:
        HostError: the installation lacks it.
    """
    path = Path(str(files("alula_fledgling") / "assets"))
    if not (path / "card.json").is_file():
        raise HostError(
            "the fledgling is not part of this installation",
            where=str(path),
            remedy="reinstall alula-fledgling, or raise one: alula fledgling raise --output DIR",
        )
    return path


def card(path: Path | None = None) -> dict[str, Any]:
    """What a fledgling was taught, how it scores, and the command that raised it; of the shipped one by default.

    Raises:
        HostError: ``path`` holds no fledgling.
    """
    file = (path or directory()) / "card.json"
    if not file.is_file():
        raise HostError(
            "no fledgling here: card.json is missing",
            where=str(path),
            remedy="name the folder that `alula fledgling raise` wrote",
        )
    card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return card


@functools.cache
def digest() -> str:
    """A short name for the shipped weights: other weights, another name. Runs say by it what they started from."""
    weights = hashlib.sha256()
    for part in PARTS:
        weights.update((directory() / part / "model.safetensors").read_bytes())
    return weights.hexdigest()[:16]


def part_directory(part: str) -> Path:
    """The shipped directory of ``part``, a member of ``PARTS``, or of the demo.

    Raises:
        HostError: there is no such part, or the installation lacks it.
    """
    if part not in (*PARTS, DEMO):
        raise HostError(f"the fledgling has no part {part!r}", remedy=f"use one of: {', '.join(PARTS)}")
    return directory() / part
