"""Task strings of ``alula eval``: ``NAME``, or ``FAMILY:WHAT`` with settings behind commas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.core

from alula.errors import UsageError

if TYPE_CHECKING:
    from alula.evaluation import HarnessTasks, ObjectFiles

HELP = (
    "What to ask; repeatable. NAME: text_bare, text_after_image, text_after_text, visual, visual_unseen, dialogue, "
    "interleaved, film, film_unseen, sound, sound_unseen, pope, chair. data:FILE: your own conversations. "
    r"lm_eval:NAME\[:METRIC]: a task of lm-evaluation-harness. pope:FILE, chair:FILE: objects made up about the images "
    "of a COCO instances file. pope_questions:FILE: questions as POPE publishes them. (default: what MODEL can take)"
)
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "data": (),
    "lm_eval": ("include", "fewshot", "chat"),
    "pope": ("captions",),
    "chair": ("captions", "synonyms"),
    "pope_questions": (),
}
_EARLIER = {
    "--tasks": "--task NAME, once per task",
    "--data": "--task data:FILE",
    "--annotations": "--task pope:FILE and --task chair:FILE",
    "--captions": "--task chair:FILE,captions=FILE",
    "--synonyms": "--task chair:FILE,synonyms=FILE",
    "--pope": "--task pope_questions:FILE",
    "--lm-eval": "--task lm_eval:NAME, once per task",
    "--lm-eval-include": "--task lm_eval:NAME,include=FOLDER",
    "--lm-eval-fewshot": "--task lm_eval:NAME,fewshot=NUMBER",
    "--lm-eval-chat": "--task lm_eval:NAME,chat=true",
}
"""options of earlier versions, and what is written now"""


class EvalCommand(typer.core.TyperCommand):
    """Refuses options of earlier versions by naming what replaced them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as any command does, once the options are known to be of today."""
        for argument in args:
            if argument == "--":
                break
            option = argument.partition("=")[0]
            if option in _EARLIER:
                raise UsageError(f"{option} is no longer an option", where="alula eval", remedy=_EARLIER[option])
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class TaskString:
    """One parsed task: ``family`` is empty for a task that goes by its name alone."""

    family: str
    what: str
    settings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> TaskString:
        """Take a task string apart.

        Raises:
            UsageError: an unknown family, an unknown or repeated setting, or nothing where something must stand.
        """
        family, colon, rest = text.strip().partition(":")
        if not colon:
            if "," in family:
                raise _refusal(text, "is a list", " ".join(f"--task {name.strip()}" for name in family.split(",")))
            if not family:
                raise _refusal(text, "is empty", "--task text_bare")
            return cls("", family, {})
        if family not in _SETTINGS:
            raise _refusal(text, f"starts with {family!r}", f"one of {', '.join(f'{name}:' for name in _SETTINGS)}")
        what, *parts = rest.split(",")
        settings: dict[str, str] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals and family == "lm_eval":
                raise _refusal(text, "names several tasks", f"--task {family}:{what} --task {family}:{part}")
            if not equals:  # a comma in the name of a file
                what = f"{what},{part}"
            elif key not in _SETTINGS[family] or key in settings or not value:
                legal = ", ".join(f"{name}=" for name in _SETTINGS[family]) or "none"
                raise _refusal(text, f"has the setting {part!r}", f"settings of {family}, each once: {legal}")
            else:
                settings[key] = value
        if not what:
            raise _refusal(text, "names nothing", f"--task {family}:{'NAME' if family == 'lm_eval' else 'FILE'}")
        return cls(family, what, settings)


@dataclass(frozen=True)
class Requested:
    """What the task strings of one command ask for; ``names`` is None if none is named."""

    names: list[str] | None
    data: Path | None
    objects: ObjectFiles
    harness: HarnessTasks | None


def requested(texts: Sequence[str], *, images: Path | None, n: int | None, seed: int) -> Requested:
    """Read the task strings of a command.

    Args:
        images: the folder that image paths in files start from.
        n: items per task. seed: of what harness tasks draw.

    Raises:
        UsageError: a string that is not a task, or strings that contradict each other.
    """
    from alula.evaluation import HarnessTasks, ObjectFiles

    tasks = [TaskString.parse(text) for text in texts]
    names = [task.family or task.what for task in tasks if task.family in ("", "pope", "chair")]
    by_name = {task.what for task in tasks if not task.family}
    about = [task for task in tasks if task.family in ("pope", "chair")]
    if about and by_name & {"pope", "chair"}:
        raise UsageError(
            "pope and chair ask about one set of images", where="--task", remedy=f"--task pope:{about[0].what}"
        )
    files = [task.what for task in tasks if task.family == "pope_questions"]
    objects = ObjectFiles(
        images,
        _path(_one([task.what for task in about], "pope and chair ask about one file")),
        _path(_one([task.settings["captions"] for task in about if "captions" in task.settings], "one captions file")),
        _path(_one([task.settings["synonyms"] for task in about if "synonyms" in task.settings], "one synonyms file")),
        tuple(Path(file) for file in files),
    )
    asked = [task for task in tasks if task.family == "lm_eval"]
    harness = None
    if asked:
        settings = asked[0].settings
        if any(task.settings != settings for task in asked):
            raise UsageError(
                "the lm_eval tasks differ in their settings", where="--task", remedy="give each the same, or run twice"
            )
        harness = HarnessTasks(
            [task.what for task in asked],
            _path(settings.get("include")),
            num_fewshot=_whole_number(settings.get("fewshot")),
            chat=_yes_or_no(settings.get("chat", "false")),
            n=n,
            seed=seed,
        )
    data = _path(_one([task.what for task in tasks if task.family == "data"], "one data file"))
    return Requested(list(dict.fromkeys(names)) or None, data, objects, harness)


def _refusal(text: str, what: str, remedy: str) -> UsageError:
    return UsageError(f"{text!r} {what}", where="--task", remedy=remedy)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _one(texts: Sequence[str], what: str) -> str | None:
    if len(set(texts)) > 1:
        raise UsageError(
            f"{what}, not {' and '.join(dict.fromkeys(texts))}", where="--task", remedy="run alula eval once for each"
        )
    return texts[0] if texts else None


def _whole_number(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise UsageError(f"fewshot={text} is not a whole number", where="--task", remedy="e.g. fewshot=5")
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"chat={text} is neither true nor false", where="--task", remedy="chat=true")
    return text == "true"
