"""Whether a run still learns from the data it began with: the sizes and the contents of its sources' files.

Only the files of records and tables count. Images, videos and audio clips that records name are not looked at, nor is
what the worlds draw, which is a function of the recipe.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alula.data import SourceSpec, source_files
from alula.errors import UsageError
from alula.files import read_json, regular, telling, write_json
from alula.training.layout import RunDirectory
from alula.training.recipe import Recipe

_BLOCK = 2**16
_OF_A_FILE, _OF_A_SHARD = 2**28, 2**20
"""Bytes that are read of a source's only file, and of one among several; a longer one is sampled evenly."""

Identity = dict[str, dict[str, list[Any]]]
"""Per source (its key in the recipe), per file: size and digest."""


def record_data(run: RunDirectory, recipe: Recipe, stages: Collection[int]) -> None:
    """Write down what the sources of ``stages`` are now."""
    write_json(run.data, _identity(recipe, stages))


def check_same_data(run: RunDirectory, recipe: Recipe, stages: Collection[int]) -> None:
    """Raise a UsageError if a source of ``stages`` is not what it was when the run began, naming the file."""
    before = read_json(run.data)
    for key, now in _identity(recipe, stages).items():
        then = before.get(key, {})
        path = next((file for file in [*then, *now] if then.get(file) != now.get(file)), None)
        if path is None:
            continue
        old, new = then.get(path), now.get(path)
        if old is None or new is None:
            message = "was not there then" if old is None else "is no longer there"
        else:
            message = (
                f"had {old[0]:,} bytes, now {new[0]:,}" if old[0] != new[0] else "had the same size, other content"
            )
        raise UsageError(
            f"holds a run that began with other data: {path} ({key}) {message}",
            where=str(run.root),
            remedy="restore the data, name another output_dir, or start over with --no-resume (drops what is there); "
            f"to go on with the data as they are now, remove {run.data}",
        )


def _identity(recipe: Recipe, stages: Collection[int]) -> Identity:
    found = {}
    for key, spec in _sources(recipe, stages).items():
        files = source_files(spec)
        limit = _OF_A_FILE if len(files) == 1 else _OF_A_SHARD
        found[key] = {str(file): _digest(file, limit) for file in files}
    return found


def _sources(recipe: Recipe, stages: Collection[int]) -> dict[str, SourceSpec]:
    found: dict[str, SourceSpec] = {}
    for index in stages:
        key, data = f"stages.{recipe.stages[index].name}.data", recipe.stages[index].data
        replay = data.text_replay.sources if data.text_replay is not None else ()
        found |= {f"{key}.sources.{number}": spec for number, spec in enumerate(data.sources)}
        found |= {f"{key}.text_replay.sources.{number}": spec for number, spec in enumerate(replay)}
        distill = recipe.stages[index].distill
        if distill is not None and distill.prompts is not None:
            found[f"stages.{recipe.stages[index].name}.distill.prompts"] = distill.prompts
    if stages and recipe.retention is not None:
        if recipe.retention.text is not None:
            found["retention.text"] = recipe.retention.text
        if recipe.retention.probes and recipe.retention.pictures is not None:
            found["retention.pictures"] = recipe.retention.pictures
    return found


def _digest(path: Path, limit: int) -> list[Any]:
    """Size and digest of a file; of one of more than ``limit`` bytes as many are read, in blocks spread over it."""
    digest = hashlib.sha256()
    with telling(path), open(regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= limit:
            while block := stream.read(_BLOCK):
                digest.update(block)
        else:
            blocks = limit // _BLOCK
            for number in range(blocks):
                stream.seek(number * (size - _BLOCK) // (blocks - 1))
                digest.update(stream.read(_BLOCK))
    return [size, digest.hexdigest()[:32]]
