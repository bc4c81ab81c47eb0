"""The weights: a tiny language model and its towers, found by the name ``fledgling`` wherever a model is named."""

from __future__ import annotations

import functools
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from alula.errors import FilesError, HostError
from alula.files import read_json

NAME = "fledgling"
PARTS = ("llm", "vision", "audio")
ELSEWHERE = "ALULA_FLEDGLING"
"""environment variable that names the folder of another fledgling, to be used in place of the installed one"""
DEMO = "demo"
"""what `alula serve --demo` puts together with these: a connector, and adapters of the host that it makes"""


def directory() -> Path:
    """The folder of ``llm/``, ``vision/``, ``audio/``, ``card.json`` and ``README.md``: the package's data, or what
    `alula fledgling raise` wrote where the environment variable ``ALULA_FLEDGLING`` says so.

    Raises:
        HostError: the installation lacks it, or the variable names no fledgling, or one with a part missing.
    """
    named = os.environ.get(ELSEWHERE)
    if named:
        _whole(Path(named), f"{ELSEWHERE}={named}")
        return Path(named).absolute()
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
    folder = path or directory()
    return _card(folder, str(folder))


def check_whole(path: Path) -> None:
    """Look whether `alula fledgling raise` wrote ``path``, and all parts are there.

    Raises:
        HostError: it holds no fledgling, or one with a part missing.
    """
    _whole(path, str(path))


def _whole(path: Path, where: str) -> None:
    _card(path, where)
    for part in PARTS:
        for file in ("config.json", "model.safetensors"):
            if not (path / part / file).is_file():
                raise HostError(f"this fledgling has no {part}/{file}", where=where, remedy=_RAISED)


def _card(path: Path, where: str) -> dict[str, Any]:
    file = path / "card.json"
    if not file.is_file():
        raise HostError("no fledgling here: card.json is missing", where=where, remedy=_RAISED)
    try:
        card = read_json(file)
    except FilesError as error:
        raise HostError(f"no fledgling here: card.json {error.message}", where=where, remedy=_RAISED) from error
    if not isinstance(card, dict) or card.get("name") != NAME:
        raise HostError("no fledgling here: card.json is of something else", where=where, remedy=_RAISED)
    return card


_RAISED = "name the folder that `alula fledgling raise` wrote"


@functools.cache
def digest() -> str:
    """A short name for the weights in `directory`: others, another name. Runs say by it what they started from."""
    weights = hashlib.sha256()
    for part in PARTS:
        weights.update((directory() / part / "model.safetensors").read_bytes())
    return weights.hexdigest()[:16]


def part_directory(part: str) -> Path:
    """The directory of ``part``, a member of ``PARTS``, or of the demo, which goes with the shipped weights alone.

    Raises:
        HostError: there is no such part, or `directory` lacks it.
    """
    if part not in (*PARTS, DEMO):
        raise HostError(f"the fledgling has no part {part!r}", remedy=f"use one of: {', '.join(PARTS)}")
    found = directory() / part
    if not found.is_dir():
        raise HostError(f"this fledgling has no {part}", where=str(found.parent), remedy=f"unset {ELSEWHERE}")
    return found
