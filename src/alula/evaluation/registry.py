"""Tasks that go by a name alone: the entry point group ``alula.tasks``.

An entry is a function of the keywords ``n`` (about how many questions) and ``seed`` that returns a `Task`. It takes
``history`` too where earlier answers may be the model's own.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Sequence

from alula import plugins
from alula.bounds import check_count
from alula.data.interleave import History
from alula.errors import UsageError
from alula.evaluation.items import Task

_TASKS: plugins.Registry[Callable[..., Task]] = plugins.Registry("alula.tasks", "task")


def register(name: str, make: Callable[..., Task]) -> None:
    """Make a task known by a name, as an entry point would.

    Raises:
        UsageError: another task has that name.
    """
    _TASKS.register(name, make)


def task_names() -> tuple[str, ...]:
    """Names of the tasks that were registered or that installed packages bring."""
    return _TASKS.names()


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are no task's.

    Raises:
        UsageError: no installed package brings one of them.
    """
    legal = task_names()
    for name in names:
        if name not in legal:
            others = ", ".join((*legal, "data:FILE", "lm_eval:NAME", "pope:FILE", "chair:FILE", "pope_questions:FILE"))
            close = difflib.get_close_matches(name, legal, n=1) or ([f"data:{name}"] if os.path.isfile(name) else [])
            raise UsageError(
                f"there is no task {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
                where="--task",
                remedy=plugins.remedy(_TASKS.group, name)
                or f"name one of: {others}; a task of lm-evaluation-harness is written lm_eval:{name}",
            )


def named_tasks(
    names: Sequence[str], *, n: int | None = None, seed: int = 0, history: History | None = None
) -> list[Task]:
    """The named tasks.

    Args:
        n: about how many questions each asks; by default as many as the task itself says.
        seed: draws the questions.
        history: earlier answers as written (``"gold"``) or the model's own (``"generated"``), for tasks that have some.

    Raises:
        UsageError: a name that no installed package brings, a package that does not load, or a number out of bounds.
    """
    check_names(names)
    if n is not None:
        check_count(n, "the number of items")
    tasks = []
    for name in names:
        make = _TASKS.get(name)
        assert make is not None
        options = {"n": n, "history": history if "history" in inspect.signature(make).parameters else None}
        tasks.append(make(seed=seed, **{key: value for key, value in options.items() if value is not None}))
    return tasks
