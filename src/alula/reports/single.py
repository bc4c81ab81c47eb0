"""The report of one model's answers, with nothing to compare them with."""

from __future__ import annotations

from collections.abc import Sequence

from alula.evaluation import ItemResult, RunResult, TaskResult
from alula.reports.document import Block, Browser, Cell, Document, Exchange, Facts, Section, Table, render
from alula.reports.ratios import run_sections
from alula.reports.wording import bounds, duration, listing, percent
from alula.stats import wilson

_SHOWN = 24


def run_report(run: RunResult, *, command: str = "") -> str:
    """Return the HTML report of one run: scores by task and skill, and wrong answers to read."""
    tasks = list(run.tasks.values())
    # where a task has one family, its row of the scores has said it
    skills = [by_skill(task) for task in tasks if len(task.families) > 1]
    sections = [
        Section(
            "Scores",
            [
                "Right answers, with Wilson's 95 % interval under each share.",
                *(f"Note: {task.title}: {note}." for task in run.tasks.values() for note in task.notes),
            ],
            [scores(tasks)],
        ),
        *([Section("By skill", blocks=skills)] if skills else []),
        *run_sections(run),
        Section("Wrong answers", blocks=[wrong_answers(tasks)]),
        Section("To repeat this", blocks=[_facts(run, command)]),
    ]
    lead = [
        f"{run.model} answered {sum(len(t.items) for t in run.tasks.values()):,} questions: "
        + listing([f"{percent(task.accuracy)} right in {task.title}" for task in run.tasks.values()])
        + "."
    ]
    return render(Document(title=f"Evaluation of {run.model}", lead=lead, sections=sections))


def scores(tasks: Sequence[TaskResult]) -> Table:
    """A row per task: how many items, how many right."""
    rows = []
    for task in tasks:
        share = wilson(sum(item.score for item in task.items), len(task.items))
        right = Cell(percent(share.value), note=bounds(share), strong=True)
        rows.append([Cell(task.title), Cell(str(len(task.items))), right])
    return Table(["", "items", "right"], rows)


def by_skill(task: TaskResult) -> Table:
    """Right answers of a task by family."""
    cells = [Cell("right")]
    for family in task.families:
        items = [item for item in task.items if item.family == family]
        share = wilson(sum(item.score for item in items), len(items))
        hint = f"{bounds(share)} %, {len(items)} items"
        cells.append(Cell(percent(share.value, 0), shade=0.9 * share.value, hint=hint))
    names = [family.replace("_", " ") for family in task.families]
    return Table(["", *names], [cells], task.title.capitalize(), heat=True)


def wrong_answers(tasks: Sequence[TaskResult]) -> Browser:
    """Wrong answers to leaf through, of all families in turn."""
    groups, exchanges = [], []
    for task in tasks:
        wrong = [item for item in task.items if item.score < 1]
        if not wrong:
            continue
        shown = _spread(wrong, task.families)
        remark = f"{len(wrong)} of {len(task.items)}" + (f"; {len(shown)} shown" if len(shown) < len(wrong) else "")
        groups.append((task.name, task.title, remark))
        exchanges += [
            Exchange(task.name, item.family.replace("_", " "), "wrong", item.prompt, item.gold, None, item.answer)
            for item in shown
        ]
    return Browser(groups, exchanges)


def _spread(items: list[ItemResult], families: list[str]) -> list[ItemResult]:
    """Take items of all families in turn."""
    ranked = {family: [item for item in items if item.family == family] for family in families}
    order = sorted((rank, place, item.id) for place, f in enumerate(families) for rank, item in enumerate(ranked[f]))
    by_id = {item.id: item for item in items}
    return [by_id[name] for _, _, name in order[:_SHOWN]]


def _facts(run: RunResult, command: str) -> Block:
    state = run.conditions
    rows = [
        ("model", run.model),
        ("weights", run.fingerprint[:16]),
        ("whole run", duration(run.seconds)),
        ("batch size", str(state.batch_size)),
        ("precision", f"{state.dtype} on {state.device}"),
        ("attention", ", ".join(f"{part} {name}" for part, name in state.backend.items())),
        *(("policy", told) for told in state.policies_in_words),
        *((f"template: {name}", str(value)) for name, value in state.template.items()),
        *state.versions.items(),
    ]
    return Facts(rows, command)
