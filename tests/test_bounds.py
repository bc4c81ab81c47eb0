"""Numbers that no random generator or memory takes are refused in a sentence, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alula import auditing
from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli import app as cli
from alula.errors import UsageError
from alula.evaluation import HarnessTasks
from alula_fledgling.quickstart import Plan as QuickstartPlan
from alula_fledgling.tasks import chair, native_tasks, pope
from studies.__main__ import commands as studies
from studies.wings import WingsPlan

HUGE = 10**12


def audit_plan(**options: Any) -> auditing.Plan:
    return auditing.Plan(output=Path("out"), model="m", **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: native_tasks(n=HUGE),
        lambda: native_tasks(["interleaved"], n=HUGE),
        lambda: native_tasks(seed=-1),
        lambda: native_tasks(seed=2**70),
        lambda: pope(n=10 * HUGE),
        lambda: chair(n=HUGE),
        lambda: chair(seed=-1),
        lambda: HarnessTasks(["t"], n=HUGE),
        lambda: HarnessTasks(["t"], seed=-1),
        lambda: audit_plan(samples=HUGE),
        lambda: audit_plan(items=0),
        lambda: audit_plan(seed=-1),
        lambda: audit_plan(seed=MAX_SEED + 1),
        lambda: QuickstartPlan(Path("out"), seeds=(0, -1)),
        lambda: QuickstartPlan(Path("out"), steps=float("nan")),
        lambda: WingsPlan(Path("out"), seeds=(2**40,)),
        lambda: WingsPlan(Path("out"), steps=float("inf")),
    ],
)
def test_numbers_out_of_bounds_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


def test_the_bounds_themselves_are_taken() -> None:
    assert native_tasks(n=MAX_ITEMS, seed=MAX_SEED)  # nothing is made before it is asked for
    assert audit_plan(samples=MAX_ITEMS, seed=MAX_SEED)


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "m", "--items", str(HUGE)],
        ["eval", "m", "--seed", "-1"],
        ["audit", "m", "--samples", str(HUGE)],
        ["audit", "m", "--seed", str(2**70)],
        ["chat", "m", "--seed", "-1"],
        ["data", "export", "text", "out", "-n", str(HUGE)],
        ["quickstart", "--items", str(HUGE)],
        ["wings", "--items", str(HUGE)],
        ["fledgling", "raise", "--seed", str(2**70)],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_the_command_line_says_so_with_exit_code_2(arguments: list[str]) -> None:
    app = studies() if arguments[0] == "wings" else cli._registered()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Invalid value for" in result.stderr
