"""What a person sees while a run trains: on stderr, a bar with an ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from alula.progress import SECONDS_BETWEEN_LINES, clock
from alula.training.parts import PartTable


class Display:
    """Prints for the person; silent on all processes but the first, and when asked to be."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def notify(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def show_parts(self, title: str, table: PartTable) -> None:
        """The trainable-parameter table."""
        grid = Table(title=title, title_justify="left")
        for heading in ("part", "learning rate", "tensors", "parameters", "share", "with decay"):
            grid.add_column(heading, justify="left" if heading == "part" else "right")
        for row in table.rows:
            share = f"{row.parameters / table.total:.2%}"
            decay = f"{row.decayed:,}"
            grid.add_row(row.part, f"{row.learning_rate:g}", f"{row.tensors}", f"{row.parameters:,}", share, decay)
        grid.add_section()
        grid.add_row("trained", "", "", f"{table.trainable:,}", f"{table.trainable / table.total:.2%}", "")
        frozen = table.total - table.trainable
        grid.add_row("frozen", "", "", f"{frozen:,}", f"{frozen / table.total:.2%}", "")
        self.console.print(grid)

    def stage(self, name: str, *, steps: int, done: int) -> StageDisplay:
        return StageDisplay(self.console, name, steps=steps, done=done)


class StageDisplay:
    """Progress of one stage; a context manager. Call it with every metrics row."""

    def __init__(self, console: Console, name: str, *, steps: int, done: int) -> None:
        self.console, self.name, self.steps, self.done = console, name, steps, done
        self._bar: Progress | None = None
        self._begun = self._last_line = time.monotonic()
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[pace]} samples/s"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, loss="-", pace="-")

    def __enter__(self) -> StageDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        each = (now - self._begun) / max(step - self.done, 1)
        pace = f"{row['samples'] / step / max(each, 1e-9):.1f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{row['loss']:.4f}", pace=pace)
        elif step == self.steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = clock(each * (self.steps - step))
            self.console.print(
                f"{self.name}: step {step}/{self.steps}  loss {row['loss']:.4f}  {pace} samples/s  ETA {left}"
            )
