"""A population of real trainings of a few steps, shared by the studies that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alula_fledgling.weights import ELSEWHERE
from studies.attention_shift import ShiftPlan, ShiftRecord, attention_shift


@pytest.fixture(scope="module", autouse=True)
def fledgling_in_use(shallow: None) -> None:
    """Studies are tested on three layers; a module that needs all six overrides this."""


@pytest.fixture(scope="session")
def population(tmp_path_factory: pytest.TempPathFactory, shallow_files: Path) -> tuple[ShiftPlan, ShiftRecord]:
    """Three trainings of the attention-shift study, two steps each, of which the second forgets the text."""
    output = tmp_path_factory.mktemp("shift") / "study"
    plan = ShiftPlan(output=output, texts=(0.0, 0.3, 0.5), rates=(3e-2,), items=2, samples=3, steps=0.009)
    with pytest.MonkeyPatch.context() as patch:  # it is made before what a module asks for
        patch.setenv(ELSEWHERE, str(shallow_files))
        return plan, attention_shift(plan, command="python -m studies attention-shift", workers=0, quiet=True)
