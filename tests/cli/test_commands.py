"""Every command that the documentation and the recipes name is one that the command line takes, option by option."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from alula.auditing import SECTIONS
from alula.cli import app as cli
from alula.cli.tasks import TaskString
from alula.evaluation import HALLUCINATION
from alula.training import load_recipe
from alula_fledgling.tasks import NATIVE
from studies.__main__ import commands as studies

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PROGRAMS = ("alula", "studies")
LAUNCHERS = ("python", "torchrun", "accelerate")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _lines(page: Path) -> Iterator[tuple[str, bool]]:
    """Everything on a page that may hold commands, and whether it is meant to be typed as it stands."""
    text = page.read_text().replace("\\\n", " ")
    if page.suffix == ".yaml":
        comments = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        yield from ((line, True) for line in comments.splitlines())
        text = comments
    for block in _FENCED.findall(text):
        yield from ((line.removeprefix("$ "), True) for line in block.splitlines()[1:-1])
    for span in re.findall(r"`([^`]+)`", _FENCED.sub("", text)):
        yield " ".join(span.split()), False


def _commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """What a line has alula do: the module it starts and its arguments, in every command of the pipe."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # prose, with an apostrophe
        return
    while words:
        end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>")), len(words))
        command, words = words[:end], words[end + 1 :]
        if command[:1] == ["alula"]:
            yield "alula", command[1:]
        elif command and command[0] in LAUNCHERS and "-m" in command[:-1]:
            module, *arguments = command[command.index("-m") + 1 :]
            if module.split(".")[0] in PROGRAMS:
                yield module, arguments


NAMED = [
    pytest.param(module, arguments, whole, id=f"{page.relative_to(ROOT)}: {' '.join(arguments)}")
    for page in (*PAGES, *RECIPES)
    for line, whole in _lines(page)
    for module, arguments in _commands(line)
    if "..." not in arguments
]


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    alula = cli._registered()
    return {name: typer.main.get_command(app) for name, app in (("alula", alula), ("studies", studies()))}


@pytest.mark.parametrize(("module", "arguments", "whole"), NAMED)
def test_a_command_that_is_named_parses(
    programs: dict[str, Any], module: str, arguments: list[str], whole: bool
) -> None:
    assert module in PROGRAMS
    # the reader's own files; and what prose leaves out that names a verb or an option by itself
    forgiven = ["does not exist", *([] if whole else ["Missing", "requires an argument", "Usage:"])]
    command, name, context = programs[module], module, None
    try:
        while True:
            context = command.make_context(name, list(arguments), parent=context)
            arguments = [*context._protected_args, *context.args]
            if not arguments:
                break
            name, command, arguments = command.resolve_command(context, arguments)
    except Exception as error:
        is_help = isinstance(error, typer.Exit) and error.exit_code == 0
        if not is_help and not any(reason in str(error) for reason in forgiven):
            raise


def test_commands_are_found_where_they_stand() -> None:
    found = {param.id.split(": ")[0] for param in NAMED}
    assert {
        "README.md",
        "docs/usage/training.md",
        "docs/usage/chat.md",
        "recipes/wings-7b.yaml",
        "benchmarks/README.md",
    } <= found
    assert len(NAMED) > 80


@pytest.mark.parametrize("module", ["alula", "alula.cli.app"])
def test_the_command_line_can_be_started_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["alula"])


@pytest.mark.parametrize(("module", "arguments", "whole"), NAMED)
def test_what_a_named_command_is_given_is_valid(module: str, arguments: list[str], whole: bool) -> None:
    """Task strings are tasks, recipes load with their changes, sections and methods exist: nothing is run for it."""
    if not whole:
        return
    given: dict[str, list[str]] = {}
    for name, value in itertools.pairwise(arguments):
        if name.startswith("--"):
            given.setdefault(name, []).append(value)
    if arguments[:1] == ["eval"]:
        for task in map(TaskString.parse, given.get("--task", [])):
            assert task.family or task.what in (*NATIVE, *HALLUCINATION)
    if arguments[:1] == ["train"]:
        for recipe in (word for word in arguments if word.startswith("recipes/")):
            load_recipe(ROOT / recipe, given.get("--set", []))
    if arguments[:1] == ["audit"]:
        for sections in given.get("--sections", []):
            assert set(sections.split(",")) <= set(SECTIONS)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_targets_that_are_named_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line, _ in _lines(page):
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, line
        if found := re.match(r"python ([\w/]+\.py)", line):
            assert (ROOT / found[1]).is_file(), line


@pytest.mark.parametrize("recipe", ["digits", "film-and-sound", "single-task"])
def test_recipes_that_need_nothing_of_the_users_can_run(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["alula", "train", "--check", str(ROOT / "recipes" / f"{recipe}.yaml")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "the recipe is fine" in capsys.readouterr().out


def test_every_verb_says_what_it_does(
    programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in programs["alula"].commands:
        monkeypatch.setattr(sys, "argv", ["alula", verb, "--help"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert verb in capsys.readouterr().out


def test_an_option_is_spelled_the_same_in_every_command(programs: dict[str, Any]) -> None:
    """One name for one thing; what some commands called it before is no further spelling to be learnt."""
    spelled: dict[str, set[tuple[str, ...]]] = {}
    found = list(_options(programs["alula"], "alula"))
    assert len(found) > 100
    for _, names in found:
        for name in names:
            spelled.setdefault(name, set()).add(tuple(each for each in names if each != "--n"))
    assert not {name: ways for name, ways in spelled.items() if name != "--n" and len(ways) > 1}
    with_n = [command for command, names in found if "--n" in names]
    assert with_n == ["alula eval", "alula bank", "alula browse"]


def _options(command: Any, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every option of a command and of those below it: the command, and how the option is spelled."""
    for name, below in getattr(command, "commands", {}).items():
        yield from _options(below, f"{path} {name}")
    for each in command.params:
        if any(name.startswith("-") for name in each.opts):
            yield path, (*each.opts, *each.secondary_opts)
