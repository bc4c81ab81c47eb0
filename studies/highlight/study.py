"""Running the study of highlights: every lent model under every arm."""

from __future__ import annotations

from functools import partial

from alula.files import read_json
from alula.jobs import Job, run_in
from studies.examples import Shown
from studies.highlight.measure import measure, show
from studies.highlight.plan import HighlightPlan
from studies.highlight.record import HighlightRecord
from studies.records import origin


def highlight(plan: HighlightPlan, *, command: str, workers: int | None = None, quiet: bool = False) -> HighlightRecord:
    """Ask every model the same questions under every arm; seeds that were measured before are not asked again.

    Args:
        command: the line that repeats this, for the record.
        workers: processes side by side; by default one per core.
        quiet: draw no progress.

    Returns:
        The record, also written to ``plan.output / "outcome.json"``.

    Raises:
        UsageError: the output directory holds something else.
    """
    jobs = [
        Job(
            title=f"pointed at, seed {seed}",
            call=measure,
            arguments=(plan, seed),
            size=1,
            done=partial(_measured, plan, seed),
        )
        for seed in plan.seeds
    ]
    jobs.append(Job(title="questions to look at", call=show, arguments=(plan,), size=1, done=plan.shown.is_file))
    seconds = run_in(plan.output, plan.facts, "study", jobs, label="highlight", workers=workers, quiet=quiet)
    record = HighlightRecord(
        **origin(command, seconds),
        settings={**plan.facts, "seeds": list(plan.seeds)},
        seeds={seed: read_json(plan.measured(seed)) for seed in plan.seeds},
        shown=tuple(Shown.model_validate(each) for each in read_json(plan.shown)),
    )
    record.save(plan.output / "outcome.json")
    return record


def _measured(plan: HighlightPlan, seed: int) -> int:
    return int(plan.measured(seed).is_file())
