"""The progress bar of long work: what is being done, how far it is, and how long it will take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A progress bar that may be absent.

    Args:
        progress: where it is drawn; None: nowhere.
        total: steps until it is full.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.id = progress.add_task("", total=total) if progress else None

    def advance(self, label: str, count: int) -> None:
        """Say what is being done and that ``count`` more steps are."""
        if self.progress is not None and self.id is not None:
            self.progress.update(self.id, description=label, advance=count)


@contextlib.contextmanager
def bar(total: int, shown: bool) -> Iterator[Bar]:
    """Draw a bar with the time left on stderr inside the block, if ``shown``."""
    if not shown:
        yield Bar(None, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, total)
