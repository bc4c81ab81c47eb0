"""The alignment study to look at: an answer, a figure and a table per question; all from the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Facts, Figure, FigureRow, Key, Section, Table
from alula.reports.figures import Line, Trail, lines, trails
from alula.reports.wording import MISSING, duration, listing, percent, probability
from studies.alignment.measure import OVERLAPS, SITES
from studies.alignment.plan import CONFIGURATIONS
from studies.alignment.record import HALLUCINATION, PREDICTORS, SKILLS, AlignmentRecord, RunRecord
from studies.association import Association
from studies.signs import SignTest
from studies.wording import LEVEL, coefficient, interval, judge, numbers, p_value

_MAIN, _MAIN_HALLUCINATION = "score", "pope_accuracy"
"""chosen before any model was trained; the others stand beside them"""
_NAMES = {
    "score": "IMA score, same layer",
    "score_input_prompt": "IMA score, input prompt",
    "contrast": "what a picture's own text adds",
    "visual": "visual questions right",
    "chair_recall": "things named in descriptions",
    "pope_accuracy": "POPE accuracy",
    "pope_f1": "POPE F1",
    "pope_accuracy, confusable": "POPE accuracy, confusable",
    "chair_i": "invented things (CHAIR-i)",
    "chair_s": "descriptions with one (CHAIR-s)",
}
_EXPECTED: dict[str, Literal[-1, 1]] = {
    **dict.fromkeys((*SKILLS, "pope_accuracy", "pope_f1", "pope_accuracy, confusable"), 1),
    **dict.fromkeys(("chair_i", "chair_s"), -1),
}
"""the sign of each correlation that the paper claims"""
_SITES = {
    "stream": "block input",
    "attention_norm": "after the first norm",
    "attention": "what attention adds",
    "mlp_norm": "after the second norm",
    "mlp": "what the MLP adds",
}
_OVERLAPS = {
    "iou": "image and text",
    "chance": "chance",
    "shared_magnitude": "shared magnitude only",
    "ceiling": "same kind, other samples",
}
_AMONG = {
    "all": "all trained models",
    "run": "within one training",
    "step": "at equal steps",
    "stratum": "within one configuration",
}
_WORD = {"supported": "as claimed", "opposite": "against the claim", "open": "not shown"}


def verdict(record: AlignmentRecord) -> list[str]:
    """The five answers, in sentences made from the numbers."""
    return [
        f"(a) {_differ(record)}",
        f"(b) {_weights(record)}",
        f"(c) {_inside(record)}",
        f"(d) {_proxy(record, 'visual', 'performance')}",
        f"(e) {_proxy(record, _MAIN_HALLUCINATION, 'hallucination')} {_also(record)}",
    ]


def table(record: AlignmentRecord) -> TerminalTable:
    """The correlations of the main score as a table for the terminal."""
    drawn = TerminalTable(
        title="IMA score (same layer) against skill and hallucination: Pearson's correlation, p",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("", "claimed", "all trained models", "configurations"):
        drawn.add_column(name, justify="right" if name else "left")
    for outcome, found in record.answers.proxies.get(_MAIN, {}).items():
        sign = "+" if _EXPECTED[outcome] > 0 else "-"
        drawn.add_row(_NAMES[outcome], sign, _brief(found[0]), _brief(record.answers.between[_MAIN][outcome]))
    return drawn


def figures(record: AlignmentRecord) -> dict[str, str]:
    """Inline SVG by name, one or more per question."""
    ends = [run.last.curves for run in record.runs]
    states = range(len(ends[0]["between"]))
    layers = range(1, len(ends[0]["iou"]) + 1)
    kinds = {"within_text": "within text", "within_image": "within images", "between": "between the two"}
    drawn = {
        "a-kinds": lines(
            list(states),
            [_line(ends, name, label, number) for number, (name, label) in enumerate(kinds.items())],
            title="Similarity of samples within and between kinds",
            x_title="state of the stream (0: what enters the decoder)",
            y_title="mean cosine",
        ),
        "b-weights": lines(
            list(layers),
            [_line(ends, name, _OVERLAPS[name], n, dashed=name != "iou") for n, name in enumerate(OVERLAPS)],
            title="Overlap of the weights that matter to images and to text",
            x_title="layer",
            y_title="intersection over union",
        ),
    }
    for what, title in (("aligned", "Alignment of images with text"), ("contrast", "What a picture's own text adds")):
        drawn[f"c-{what}"] = lines(
            list(layers),
            [
                _line([_cut(end, f"{what}/{site}", len(layers)) for end in ends], "cut", _SITES[site], number)
                for number, site in enumerate(SITES)
            ],
            title=f"{title}, in the stream and inside the blocks",
            x_title="layer",
            y_title="mean cosine",
        )
    for place, outcomes in (("d", ("visual", "chair_recall")), ("e", ("pope_accuracy", "chair_i"))):
        for outcome in outcomes:
            found = [_trail(run, outcome) for run in record.runs]
            if any(trail.points for trail in found):
                drawn[f"{place}-{outcome.replace('_', '-')}"] = trails(
                    found,
                    title=f"{_NAMES[_MAIN]} against {_NAMES[outcome]}",
                    x_title=_NAMES[_MAIN],
                    y_title=_NAMES[outcome],
                )
    return drawn


def report(record: AlignmentRecord) -> Document:
    """The report as data."""
    drawn = figures(record)
    said = verdict(record)
    band = "Lines: mean over trainings; bands: from the lowest to the highest of them."
    keys = [Key(one.label, number) for number, one in enumerate(CONFIGURATIONS) if one.name in _configurations(record)]
    joined = "Faint lines join the checkpoints of one training; the last one is drawn large."

    def row(place: str, caption: str, legend: Sequence[Key] = ()) -> FigureRow:
        return FigureRow([Figure(svg) for name, svg in drawn.items() if name.startswith(f"{place}-")], legend, caption)

    answers = record.answers
    sections = [
        Section("Do image tokens differ from text tokens?", said[:1], [row("a", band), _gaps(record)]),
        Section("Do both use the same weights?", said[1:2], [row("b", band), _tests(answers.weights, _OVERLAPS)]),
        Section(
            "Does alignment rise inside blocks?",
            said[2:3],
            [row("c", band), _tests(answers.inside, _SITES), _tests(answers.inside_contrast, _SITES)],
        ),
        Section("Does it go with skill?", said[3:4], [row("d", joined, keys), _associations(record, SKILLS)]),
        Section(
            "Does it go against hallucination?",
            said[4:],
            [row("e", joined, keys), _associations(record, HALLUCINATION)],
        ),
        Section("Every training", [], [_runs(record)]),
        _repeat(record),
    ]
    return Document(
        title="What does implicit alignment say?",
        lead=said,
        sections=sections,
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _differ(record: AlignmentRecord) -> str:
    found = [test for test in record.answers.differ if test is not None]
    if not found:
        return "Whether image tokens differ from text tokens is not defined here."
    apart = [test for test in found if _sign(test) == 1]
    least = min(found, key=lambda test: test.value)
    head = {
        len(found): "Image tokens and text tokens differ, and stay so: at every state",
        0: "That image tokens and text tokens differ is not shown: at no state is it beyond chance that",
    }.get(len(apart), f"Image tokens and text tokens differ in part: at {len(apart)} of {len(found)} states")
    nearer = record.answers.nearer
    moved = {1: "grows", -1: "shrinks", 0: "is not shown to change"}[_sign(nearer)]
    return (
        f"{head} samples are more alike within a kind than between kinds (the gap is at least {least.value:.2f} "
        f"in mean cosine; {_chance(least)}). From what enters to what leaves the decoder the gap {moved}"
        f"{f' by {abs(nearer.value):.2f} ({_chance(nearer)})' if nearer and _sign(nearer) else ''}."
    )


def _weights(record: AlignmentRecord) -> str:
    tests = record.answers.weights
    chance, shared, ceiling = (tests[name] for name in ("chance", "shared_magnitude", "ceiling"))
    if chance is None or shared is None:
        return "The overlap of weights is not defined here."
    more, beyond = ("more" if _sign(test) == 1 else "not more" for test in (chance, shared))
    said = (
        f"Images and text use the same weights {more} than by chance ({chance.value:+.2f} in intersection over union; "
        f"{_chance(chance)}), and {beyond} than large weights alone explain ({shared.value:+.3f}; {_chance(shared)})."
    )
    if ceiling is not None:
        said += f" Against the same kind on other samples it is {ceiling.value:+.2f} ({_chance(ceiling)})."
    return said


def _inside(record: AlignmentRecord) -> str:
    said = []
    for what, tests in (
        ("As kinds, images and text are", record.answers.inside),
        ("A picture and its own text are", record.answers.inside_contrast),
    ):
        sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for site, test in tests.items():
            if test is not None:
                sides[_sign(test)].append(f"{_SITES[site]} ({test.value:+.2f}; {_chance(test)})")
        words = {1: "closer than in the block's input", -1: "further apart", 0: "not shown to differ"}
        parts = [f"{words[side]} in {listing(found)}" for side, found in sides.items() if found]
        if parts:
            said.append(f"{what} {'; '.join(parts)}.")
    return " ".join(said) or "Alignment inside the blocks is not defined here."


def _proxy(record: AlignmentRecord, outcome: str, what: str) -> str:
    found = record.answers.proxies.get(_MAIN, {}).get(outcome)
    if not found:
        return f"Whether the IMA score goes with {what} is not defined here."
    whole, *others = found
    judged = judge(whole, _EXPECTED[outcome])
    head = {
        "supported": f"The IMA score goes with {what} as claimed",
        "opposite": f"The IMA score goes with {what} the other way round",
        "open": f"That the IMA score goes with {what} is not shown",
    }[judged]
    between = record.answers.between[_MAIN][outcome]
    parts = [f"{_AMONG[one.within]} {_brief(one)}" for one in others]
    return (
        f"{head}: against {_NAMES[outcome]} its correlation over {numbers(whole)} is {coefficient(whole.pearson)}; "
        f"{'; '.join(parts)}. Over the means of {between.models} configurations, Spearman's is "
        f"{coefficient(between.spearman)}."
    )


def _also(record: AlignmentRecord) -> str:
    """The other figures of hallucination, by judgement."""
    groups: dict[str, list[str]] = {}
    for outcome in HALLUCINATION:
        found = record.answers.proxies.get(_MAIN, {}).get(outcome)
        if found and outcome != _MAIN_HALLUCINATION:
            groups.setdefault(_WORD[judge(found[0], _EXPECTED[outcome])], []).append(_NAMES[outcome])
    return " ".join(f"{word.capitalize()} for {listing(names)}." for word, names in groups.items())


def _sign(test: SignTest | None) -> int:
    """1 or -1 where the test shows a sign, else 0."""
    if test is None or test.p >= LEVEL:
        return 0
    return 1 if test.value > 0 else -1


def _chance(test: SignTest) -> str:
    return f"{probability(test.p)}{', exact' if test.exact else ''}, {test.n} trainings"


def _brief(one: Association) -> str:
    return MISSING if one.pearson is None else f"{one.pearson.value:+.2f} ({p_value(one.pearson)})"


def _values(curves: dict[str, list[float | None]], name: str) -> np.ndarray:
    return np.array(curves[name], dtype=float)


def _line(
    ends: Sequence[dict[str, list[float | None]]], name: str, label: str, series: int, *, dashed: bool = False
) -> Line:
    table = np.array([_values(end, name) for end in ends])
    bands = list(zip(table.min(axis=0).tolist(), table.max(axis=0).tolist(), strict=True))
    return Line(label, series, table.mean(axis=0).tolist(), bands, dashed)


def _cut(curves: dict[str, list[float | None]], name: str, count: int) -> dict[str, list[float | None]]:
    """A site's curve over the blocks: the stream's is what each of them reads."""
    return {"cut": curves[name][:count]}


def _trail(run: RunRecord, outcome: str) -> Trail:
    pairs = [(model.figures[_MAIN], model.figures.get(outcome)) for model in run.trained]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    return Trail(f"{run.label}, seed {run.seed}", _series(run), points)


def _series(run: RunRecord) -> int:
    return next(number for number, one in enumerate(CONFIGURATIONS) if one.name == run.configuration)


def _configurations(record: AlignmentRecord) -> set[str]:
    return {run.configuration for run in record.runs}


def _gaps(record: AlignmentRecord) -> Table:
    rows = [[Cell(f"state {state}"), *_test_cells(test)] for state, test in enumerate(record.answers.differ)]
    rows.append([Cell("last minus first"), *_test_cells(record.answers.nearer)])
    return Table(["", "within minus between", "p", "trainings"], rows)


def _tests(tests: dict[str, SignTest | None], names: dict[str, str]) -> Table:
    rows = [[Cell(names[name]), *_test_cells(test)] for name, test in tests.items()]
    inside = "attention" in tests
    heading = "minus the block's input" if inside else "image and text minus this"
    return Table(["", heading, "p", "trainings"], rows)


def _test_cells(test: SignTest | None) -> list[Cell]:
    if test is None:
        return [Cell(MISSING)] * 3
    return [
        Cell(f"{test.value:+.3f}", note=interval(test), strong=_sign(test) != 0),
        Cell(probability(test.p), note="exact" if test.exact else ""),
        Cell(str(test.n)),
    ]


def _associations(record: AlignmentRecord, outcomes: Sequence[str]) -> Table:
    rows = []
    for predictor in PREDICTORS:
        for outcome in outcomes:
            found = record.answers.proxies.get(predictor, {}).get(outcome)
            if found:
                every = [*found, record.answers.between[predictor][outcome]]
                name = Cell(_NAMES[predictor], note=f"against {_NAMES[outcome]}")
                claim = Cell("+" if _EXPECTED[outcome] > 0 else "-")
                rows.append([name, claim, *(_association(one, _EXPECTED[outcome]) for one in every)])
    columns = ["Pearson's correlation", "claimed", *_AMONG.values(), "means of configurations"]
    return Table(columns, rows, "Bold: interval and p exclude no correlation.")


def _association(one: Association, expected: Literal[-1, 1]) -> Cell:
    found = one.pearson
    if found is None:
        return Cell(MISSING)
    hint = f"{numbers(one)}; Spearman {coefficient(one.spearman)}"
    note = f"{interval(found)}\n{p_value(found)}"
    return Cell(f"{found.value:+.2f}", note=note, hint=hint, strong=judge(one, expected) != "open")


def _runs(record: AlignmentRecord) -> Table:
    shares = ("visual", "chair_recall", "pope_accuracy", "chair_i")
    columns = ["training", "step", "IMA score", "with noise", "own text adds", *(_NAMES[name] for name in shares)]
    rows = []
    for run in record.runs:
        for step, model in run.models.items():
            plain = [model.figures.get(name) for name in ("score", "noise_score", "contrast")]
            rows.append(
                [
                    Cell(f"{run.label}, seed {run.seed}", series=_series(run)),
                    Cell(str(step) if step else "untrained"),
                    *(Cell(MISSING if value is None else f"{value:+.3f}") for value in plain),
                    *(Cell(percent(model.figures.get(name))) for name in shares),
                ]
            )
    return Table(columns, rows)


def _repeat(record: AlignmentRecord) -> Section:
    left = [f"Left out for {_NAMES[outcome]}: {listing(names)}." for outcome, names in record.answers.left_out.items()]
    rows = [
        *((name.replace("_", " "), str(value)) for name, value in record.settings.items()),
        ("whole study", duration(record.seconds)),
        *record.environment.items(),
        ("made", record.created),
    ]
    return Section("To repeat this", left, [Facts(rows, record.command)])
