"""A population of real trainings of a few steps, shared by the studies that read it."""

from __future__ import annotations

import pytest

from studies.attention_shift import ShiftPlan, ShiftRecord, attention_shift


@pytest.fixture(scope="session")
def population(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShiftPlan, ShiftRecord]:
    """Three trainings of the attention-shift study, two steps each, of which the second forgets the text."""
    output = tmp_path_factory.mktemp("shift") / "study"
    plan = ShiftPlan(output=output, texts=(0.0, 0.3, 0.5), rates=(3e-2,), items=2, samples=3, steps=0.009)
    return plan, attention_shift(plan, command="python -m studies attention-shift", workers=0, quiet=True)
