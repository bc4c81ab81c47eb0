"""How far long work is, on stderr: a bar on a terminal; elsewhere, as down a pipe, a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
_WIDE = 40
"""characters of what is being done; more would push the numbers off a narrow terminal"""


class Lines:
    """Lines at most every so many seconds, for where no bar is drawn.

    Args:
        total: steps in all; None: not known.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        self.console, self.total = console, total
        self._begun = self._last = time.monotonic()
        self._told: tuple[str, int] | None = None

    def tell(self, label: str, done: int, *, last: bool = False) -> None:
        """Say how far it is, if it is time to; ``last``: in any case, unless that was said."""
        now = time.monotonic()
        if self._told == (label, done) if last else now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last, self._told = now, (label, done)
        spent = now - self._begun
        of = "" if self.total is None else f"/{self.total}"
        ahead = 0.0 if self.total is None or not done else spent * (self.total - done) / done
        left = f", {clock(ahead)} left" if ahead else ""
        self.console.print(
            f"{label}: {done}{of} in {clock(spent)}{left}", highlight=False, markup=False, soft_wrap=True
        )


class Bar:
    """Progress that may be shown nowhere.

    Args:
        progress: where a bar is drawn; None: nowhere.
        lines: where lines are written in its place; None: nowhere.
        total: steps until it is full.
    """

    def __init__(self, progress: Progress | None, total: int, lines: Lines | None = None) -> None:
        self.progress, self.lines, self.total, self.done, self.label = progress, lines, total, 0, ""
        self.id = progress.add_task("", total=total) if progress else None

    def advance(self, label: str, count: int) -> None:
        """Say what is being done and that ``count`` more steps are."""
        self.done, self.label = self.done + count, label
        if self.progress is not None and self.id is not None:
            self.progress.update(self.id, description=shortened(label), advance=count)
        if self.lines is not None:
            self.lines.tell(label, self.done)


@contextlib.contextmanager
def bar(total: int, shown: bool) -> Iterator[Bar]:
    """Show progress on stderr inside the block, if ``shown``: a bar with the time left, or lines and how it ended."""
    if not shown:
        yield Bar(None, total)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(console, total)
        told = Bar(None, total, lines)
        yield told
        if told.label:
            lines.tell(told.label, told.done, last=True)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total)


def shortened(label: str) -> str:
    """The end of a long label, which says more than its beginning: of paths and what is asked of a model."""
    return label if len(label) <= _WIDE else f"\N{HORIZONTAL ELLIPSIS}{label[1 - _WIDE :]}"


def clock(seconds: float) -> str:
    """``3723`` -> ``"1:02:03"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
