"""The microworld as files, in the formats the readers take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alula.errors import UsageError
from alula_fledgling import microworld

_WRITERS = {"jsonl": microworld.export_jsonl, "llava": microworld.export_llava}


def export_microworld(
    stream: str,
    directory: str | os.PathLike[str],
    *,
    form: str = "jsonl",
    n: int = 1000,
    split: str = "train",
    seed: int = 0,
    families: Sequence[str] | None = None,
) -> Path:
    """Write ``n`` items of a microworld stream as JSONL messages or LLaVA conversations with media files (LLaVA: PNG
    only).

    Args:
        stream: a member of ``microworld.SOURCES``.
        directory: new folder (or an empty one); nothing is found in it before all is written.
        form: ``jsonl`` or ``llava``.

    Returns:
        The path of the data file.

    Raises:
        UsageError: an unknown stream, split, family or form, or a folder that already holds something.
    """
    if form not in _WRITERS:
        raise UsageError(f"unknown format {form!r}", remedy=f"formats are {', '.join(_WRITERS)}")
    if n < 1:
        raise UsageError(f"the number of items must be at least 1, not {n}")
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError("already there, and not an empty folder", where=str(directory), remedy="name a new folder")
    items: Any = microworld.source(stream, split=split, seed=seed, families=families, n=n)  # type: ignore[arg-type]
    return _WRITERS[form](items, target)
