"""Real weights and real data, made ready in one directory out of packages that are on the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alula.errors import HostError, UsageError
from alula.files import PathLike, atomic_directory, read_json, write_json, write_text
from alula.hosts.quiet import quiet_loading
from alula.real import data, weights
from alula.real.packages import (
    EASY_VQA,
    EFFICIENTNET,
    EFFICIENTNET_CODE,
    EMOJI,
    PROMPT_TEXTS,
    PROMPTS,
    SMOLLM2,
    STAMPS,
    WHISPER,
    Package,
    find,
)

Writer = Callable[[Mapping[str, Path], Path], dict[str, int] | None]

RECORD = "prepared.json"
LICENCES = "licences.md"


@dataclass(frozen=True)
class Part:
    """One directory that `prepare` makes.

    Args:
        name: of the part.
        place: of its directory, below the one that is prepared.
        what: it is, in a few words.
        packages: it is made of.
        write: makes it, from package name -> folder, and returns how many records each split has, if it has any.
        rules: goes up when the same packages make something else; what earlier rules made is made anew.
    """

    name: str
    place: str
    what: str
    packages: tuple[Package, ...]
    write: Writer
    rules: int = 1


PARTS = (
    Part("smollm2", "models/smollm2-135m-instruct", "SmolLM2-135M-Instruct, a language model", (SMOLLM2,),
         weights.smollm2),
    Part("efficientnet", "models/efficientnet-lite0", "EfficientNet-Lite0, a vision tower of 49 tokens",
         (EFFICIENTNET, EFFICIENTNET_CODE), weights.efficientnet),
    Part("whisper", "models/whisper-tiny.en", "Whisper tiny.en, whose encoder is an ear", (WHISPER,), weights.whisper),
    Part("stamps", "data/stamps", "drawings and photographs with captions", (STAMPS,), data.stamps, rules=2),
    Part("emoji", "data/emoji", "emoji with their names", (EMOJI,), data.emoji, rules=2),
    Part("easy-vqa", "data/easy-vqa", "questions about single coloured shapes", (EASY_VQA,), data.easy_vqa),
    Part("speech", "data/speech", "spoken captions of the stamps in three languages", (STAMPS,), data.speech,
         rules=2),
    Part("sounds", "data/sounds", "the stamps' own sounds", (STAMPS,), data.sounds, rules=2),
    Part("prompts", "data/prompts", "a telephone exchange's prompts, spoken in English", (PROMPTS, PROMPT_TEXTS),
         data.prompts),
)  # fmt: skip
"""all there is to prepare"""


@dataclass
class Prepared:
    """What a call of `prepare` made, found there already, and could not make for want of packages.

    Args:
        made, kept: parts by name -> directory.
        missing: parts by name -> the packages that are not there.
        counts: parts by name -> split -> records.
    """

    made: dict[str, Path] = field(default_factory=dict)
    kept: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, tuple[Package, ...]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def commands(self) -> list[str]:
        """What gets the packages that are missing, a command for each registry's."""
        lacking = {package.name: package for packages in self.missing.values() for package in packages}
        by_registry: dict[str, list[Package]] = {}
        for package in lacking.values():
            by_registry.setdefault(package.registry, []).append(package)
        return [
            " ".join([packages[0].command, *(each.pin for each in packages[1:])]) for packages in by_registry.values()
        ]


def prepare(
    directory: PathLike,
    *,
    sources: Sequence[PathLike] = (),
    only: Sequence[str] = (),
    told: Callable[[str], object] = lambda line: None,
) -> Prepared:
    """Make every part whose packages are there, and say what is missing for the others.

    Nothing is fetched or installed. A part is complete or not there; one that was made of the same packages by
    the same rules stands.

    Args:
        directory: made where it is not there.
        sources: where packages are unpacked; places of the registries' own tools are looked at besides.
        only: names of parts; all by default.
        told: takes a line about each part as it begins.

    Raises:
        UsageError: no part of such a name, a source that is no directory, nothing that can be made.
        HostError: a package of another version, or a damaged one.
    """
    known = {part.name: part for part in PARTS}
    for name in only:
        if name not in known:
            raise UsageError(f"there is no part {name!r}", where="only", remedy=f"one of {', '.join(known)}")
    for source in sources:
        if not Path(source).is_dir():
            raise UsageError("is no directory", where=str(source), remedy="unpack the package, and name where")
    root, given = Path(directory), [Path(source) for source in sources]
    record = _record(root)
    found: dict[str, Path | None] = {}
    outcome = Prepared()
    for part in PARTS:
        if only and part.name not in only:
            continue
        place = root / part.place
        stamp = {package.name: package.digest for package in part.packages}
        before = record.get(part.name, {})
        if place.is_dir() and before.get("packages") == stamp and before.get("rules", 1) == part.rules:
            outcome.kept[part.name] = place
            outcome.counts[part.name] = before.get("records", {})
            continue
        for package in part.packages:
            if package.name not in found:
                told(f"looking for {package.name}")
                found[package.name] = find(package, given)
        lacking = tuple(package for package in part.packages if found[package.name] is None)
        if lacking:
            outcome.missing[part.name] = lacking
            continue
        told(f"{part.name}: {part.what}")
        folders = {package.name: folder for package in part.packages if (folder := found[package.name]) is not None}
        with atomic_directory(place) as partial, quiet_loading():
            counts = part.write(folders, partial) or {}
        record[part.name] = {
            "place": part.place,
            "packages": stamp,
            "rules": part.rules,
            **({"records": counts} if counts else {}),
        }
        write_json(root / RECORD, record)
        write_text(root / LICENCES, _licences(record, known))
        outcome.made[part.name], outcome.counts[part.name] = place, counts
    if not outcome.made and not outcome.kept:
        names = sorted({package.name for packages in outcome.missing.values() for package in packages})
        raise UsageError(
            f"none of the packages is here: {', '.join(names)}",
            where=str(root),
            remedy="; ".join(outcome.commands()) + "; or unpack them and name where (--from)",
        )
    return outcome


def _record(root: Path) -> dict[str, Any]:
    if not (root / RECORD).is_file():
        return {}
    record = read_json(root / RECORD)
    if not isinstance(record, dict):
        raise HostError("is no record of what was prepared", where=str(root / RECORD), remedy="remove it")
    return record


def _licences(record: Mapping[str, Any], known: Mapping[str, Part]) -> str:
    """A table of what lies in the directory and under which terms."""
    lines = [
        "# Where this comes from, and under which terms",
        "",
        "| in | from | version | licence |",
        "|---|---|---|---|",
    ]
    for name, said in record.items():
        if name in known:
            lines += [
                f"| `{said['place']}` | {package.registry}: {package.name} | {package.version} | {package.licence} |"
                for package in known[name].packages
            ]
    return "\n".join([*lines, ""])
