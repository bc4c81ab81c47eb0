"""Task strings of ``alula eval``: ``NAME``, or ``FAMILY:WHAT`` with settings behind commas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.core

from alula import plugins
from alula.errors import UsageError

if TYPE_CHECKING:
    from alula.data import Source
    from alula.data.captions import CaptionedPicture
    from alula.evaluation import ChoiceTask, HarnessTasks, ObjectFiles

HELP = (
    f"What to ask; repeatable. NAME: {', '.join(plugins.names('alula.tasks')) or 'a task that a package brings'}. "
    r"data:FILE\[,on_bad=skip]: your own conversations, bad records left out. "
    r"lm_eval:NAME\[:METRIC]: a task of lm-evaluation-harness. pope:FILE, chair:FILE: objects made up about the images "
    "of a COCO instances file. pope_questions:FILE: questions as POPE publishes them. (default: those that "
    "come with MODEL, if any do)"
)
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "data": ("on_bad",),
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
"""options of earlier versions, which scripts may hold, and what is written now"""
_FLAGS = ("--lm-eval-chat",)
TRUTHFULNESS = "--truthfulness"
OWN = "own"
"""in the place of a file: the questions that come with the model"""


class EvalCommand(typer.core.TyperCommand):
    """Reads options of earlier versions as the task strings that took their place, and says so; and several files
    behind one ``--truthfulness``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as any command does, earlier options rewritten."""
        rest, earlier = _take_earlier(_each_with_its_option(args))
        for option in earlier:
            typer.echo(f"{option} is written {_EARLIER[option]} now", err=True)
        return super().parse_args(ctx, [*(part for text in task_strings(earlier) for part in ("--task", text)), *rest])


def _each_with_its_option(args: Sequence[str]) -> list[str]:
    """Write ``--truthfulness`` before every further file that stands behind one."""
    found: list[str] = []
    valued, within = False, False  # the argument before wants a value; was a value of the option
    for argument in args:
        file = argument.partition(",")[0]
        if valued:
            valued, within = False, True
        elif within and (file == OWN or file.lower().endswith((".csv", ".json"))):
            found.append(TRUTHFULNESS)
        else:
            valued, within = argument == TRUTHFULNESS, argument.startswith(f"{TRUTHFULNESS}=")
        found.append(argument)
    return found


def _take_earlier(args: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take the earlier options out of arguments, with all their values.

    Raises:
        UsageError: one stands without its value.
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    left = iter(args)
    for argument in left:
        option, equals, value = argument.partition("=")
        if argument == "--":
            return [*rest, argument, *left], found
        if option not in _EARLIER:
            rest.append(argument)
            continue
        if option not in _FLAGS and not equals:
            value = next(left, "")
        if option not in _FLAGS and not value:
            raise UsageError(f"{option} stands without its value", where="alula eval", remedy=_EARLIER[option])
        found.setdefault(option, []).append(value)
    return rest, found


def task_strings(earlier: Mapping[str, Sequence[str]]) -> list[str]:
    """The task strings that ask what options of earlier versions asked.

    Raises:
        UsageError: a setting without the tasks it is one of.
    """
    last = {option: values[-1] for option, values in earlier.items()}
    for setting, of in (
        ("--captions", "--annotations"),
        ("--synonyms", "--annotations"),
        *((option, "--lm-eval") for option in ("--lm-eval-include", "--lm-eval-fewshot", "--lm-eval-chat")),
    ):
        if setting in last and of not in last:
            raise UsageError(f"{setting} needs {of}", where="alula eval", remedy=_EARLIER[setting])

    def listed(option: str) -> list[str]:
        return [name.strip() for name in last.get(option, "").split(",") if name.strip()]

    def written(what: str, **settings: str) -> str:
        return what + "".join(f",{key}={last[option]}" for key, option in settings.items() if option in last)

    names, objects = listed("--tasks"), last.get("--annotations")
    about: list[str] = []
    if objects is not None:
        about = [name for name in ("pope", "chair") if not names or name in names]
        names = [name for name in names if name not in about]
        if not about:
            raise UsageError(
                "--annotations is of pope and chair, and --tasks names neither",
                where="alula eval",
                remedy=_EARLIER["--annotations"],
            )
    texts = [*names, *([f"data:{last['--data']}"] if "--data" in last else [])]
    if "pope" in about:
        texts.append(written(f"pope:{objects}", captions="--captions"))
    if "chair" in about:
        texts.append(written(f"chair:{objects}", captions="--captions", synonyms="--synonyms"))
    texts += [f"pope_questions:{file}" for file in earlier.get("--pope", ())]
    harness = {"include": "--lm-eval-include", "fewshot": "--lm-eval-fewshot"}
    chat = ",chat=true" if "--lm-eval-chat" in last else ""
    return [*texts, *(written(f"lm_eval:{name}", **harness) + chat for name in listed("--lm-eval"))]


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
    on_bad: str
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
    from alula.evaluation import HarnessTasks, ObjectFiles, check_names

    tasks = [TaskString.parse(text) for text in texts]
    names = [task.family or task.what for task in tasks if task.family in ("", "pope", "chair")]
    by_name = {task.what for task in tasks if not task.family}
    check_names(sorted(by_name))  # before a model is loaded
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
    on_bad = [task.settings.get("on_bad", "fail") for task in tasks if task.family == "data"]
    if wrong := [value for value in on_bad if value not in ("fail", "skip")]:
        raise UsageError(f"on_bad={wrong[0]} is neither fail nor skip", where="--task", remedy="on_bad=skip")
    return Requested(list(dict.fromkeys(names)) or None, data, (on_bad or ["fail"])[-1], objects, harness)


def truthfulness_named(
    texts: Sequence[str], *, n: int | None, seed: int
) -> Callable[[Any], Sequence[ChoiceTask]] | None:
    """What gives a model's processor the tasks that ``--truthfulness`` names; None where it names nothing.

    Files are read now, before any model is loaded.

    Args:
        texts: ``FILE[,chat=true]``, or ``own`` for the questions that come with the model.
        n: about this many questions each, drawn by ``seed``.

    Raises:
        UsageError: an unknown setting, or tasks of one name. DataError: unusable data.
    """
    from alula.evaluation.defaults import defaults_for
    from alula.evaluation.likelihood import read_truthfulness, refuse_doubles

    if not texts:
        return None
    read: list[ChoiceTask] = []
    for text in dict.fromkeys(texts):
        what, *settings = text.split(",")
        legal = "chat=true" if what != OWN else f"{OWN} takes none"
        for setting in settings:
            if what == OWN or not setting.startswith("chat=") or len(settings) > 1:
                raise UsageError(f"{text!r} has the setting {setting!r}", where=TRUTHFULNESS, remedy=legal)
        if what != OWN:
            chat = bool(settings) and _yes_or_no(settings[0].removeprefix("chat="), TRUTHFULNESS)
            read += read_truthfulness(what, chat=chat, n=n, seed=seed)
    refuse_doubles(read)

    def chosen(processor: Any) -> Sequence[ChoiceTask]:
        if OWN not in texts:
            return read
        defaults = defaults_for(processor)
        brought = defaults.truthfulness(n, seed) if defaults is not None else ()
        if not brought:
            raise UsageError(
                "no such questions come with this model", where=f"{TRUTHFULNESS} {OWN}", remedy="name published files"
            )
        return [*read, *brought]

    return chosen


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


def _yes_or_no(text: str, where: str = "--task") -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"chat={text} is neither true nor false", where=where, remedy="chat=true")
    return text == "true"


def pictures_named(
    text: str, *, images: Path | None = None, n: int | None = None, seed: int = 0
) -> tuple[CaptionedPicture, ...]:
    """The pictures with captions that ``--retrieval`` names.

    Args:
        text: ``FILE[,split=NAME]`` or ``KEY:VALUE[,NAME=VALUE...]``, a source as recipes name it.
        images: folder that paths in a file start from.
        n: pictures of a file, drawn by ``seed``, or samples of a source; default: all, and 500.

    Raises:
        UsageError: neither of the two, or a setting of a file that is not its split. DataError: unusable data.
    """
    from alula.data.captions import captions_of, read_captions
    from alula.draws import Draw

    what, settings = _taken_apart(text, "--retrieval")
    if Path(what).is_file():
        if others := sorted({*settings} - {"split"}):
            raise UsageError(f"a file has no setting {others[0]!r}", where="--retrieval", remedy="split=NAME")
        pictures = list(read_captions(what, images=images, split=settings.get("split")))
        if n is not None:
            Draw("captioned pictures", seed).shuffle(pictures)
        return tuple(pictures[:n])
    if images is not None and ":" in what:
        raise UsageError("--images is for a file of captions", where="--retrieval")
    return captions_of(_opened(what, settings, "--retrieval", "microworld:caption"), 500 if n is None else n)


def source_named(text: str, *, where: str, images: Path | None = None) -> Source:
    """The source that an argument names.

    Args:
        text: a file or folder of conversations, or ``KEY:VALUE[,NAME=VALUE...]``, a source as recipes name it.
        where: the argument, for errors.
        images: folder that image paths in a file start from.

    Raises:
        UsageError: neither of the two. DataError: unusable data.
    """
    from alula.data import open_file

    if Path(text).exists():
        return open_file(text, images=images)
    if images is not None:
        raise UsageError("--images is for files", where="--images")
    what, settings = _taken_apart(text, where)
    return _opened(what, settings, where, "microworld:visual")


def _taken_apart(text: str, where: str) -> tuple[str, dict[str, str]]:
    """What stands before the first comma, and the settings behind it."""
    what, *parts = text.split(",")
    settings = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{part!r} is no setting", where=where, remedy="write name=value")
        settings[name.strip()] = value.strip()
    return what, settings


def _opened(what: str, settings: Mapping[str, str], where: str, example: str) -> Source:
    """The source of ``KEY:VALUE`` with settings."""
    import yaml

    from alula.data import open_source
    from alula.data.specs import UndrawnSpec, validated

    key, colon, value = what.partition(":")
    if not colon:
        raise UsageError(f"there is no file {what!r}", where=where, remedy=f"a file, or a source such as {example}")
    spec = {key: value, **{name: yaml.safe_load(each) for name, each in settings.items()}}
    return open_source(validated(UndrawnSpec, spec, key=where))
