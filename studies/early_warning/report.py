"""The early-warning study to look at: verdict, figures, tables; all from the record."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from alula.evaluation.results import Estimate
from alula.reports.document import Cell, Document, Facts, Figure, FigureRow, Key, Section, Table
from alula.reports.figures import Line, Trail, lines, trails
from alula.reports.wording import MISSING, percent, probability
from studies.early_warning.record import KNOWN, MAIN, PROBES, TEXT, Judged, WarningRecord, Watched
from studies.ranking import Area
from studies.wording import coefficient, interval, judge, p_value

NAMES = {
    "attention_shift": "change of attention shift",
    "attention_moved": "attention that moved",
    "alignment": "change of alignment",
    "alignment_contrast": "change of alignment contrast",
    "text_lost": "text lost so far",
    "text_loss": "text loss so far",
    "rate": "learning rate alone",
}
_SAID = {
    "supported": "The probe warns: trainings whose attention shift changes more early end with less text",
    "opposite": "The probe is turned around here: where attention shift changes more early, more text is left",
    "open": "It is not shown here that an early change of attention shift tells how much text will be lost",
}


def verdict(record: WarningRecord) -> list[str]:
    """What the study found, in sentences made from its numbers."""
    count = len(record.runs)
    main = record.main
    if main is None or main.correlation is None or main.ranking is None:
        return ["Nothing can be said: too few trainings have a defined attention shift at every look."]
    found = judge(main.correlation, 1)
    said = [
        f"{_SAID[found]}. Over {main.runs} trainings, Pearson's correlation of the change at step {main.step} of "
        f"{record.runs[0].steps[-1]} with the share of text lost at the end is {coefficient(main.correlation.pearson)}."
    ]
    if main.ranking.auc is None:
        said.append(
            f"{record.failed} of {count} trainings ended below {percent(record.budget, 0)} of the base's text "
            "accuracy, so there is nothing to tell apart; take another budget."
        )
        return said
    said.append(
        f"{record.failed} of {count} trainings ended below {percent(record.budget, 0)} of the base's text accuracy; "
        "the probe at that step ranks them above the others with an area under the ROC curve of "
        f"{_area(main.ranking.auc)}."
    )
    said.append(_against(record, main))
    said += _ahead(record)
    return said


def _against(record: WarningRecord, main: Judged) -> str:
    """The best probe, text itself and the learning rate at the main look, side by side."""
    at = {signal: next(one for one in judged if one.look == main.look) for signal, judged in record.judged.items()}
    areas = {signal: one.ranking.auc for signal, one in at.items() if one.ranking and one.ranking.auc}
    parts = [f"{NAMES[signal]} {areas[signal].value:.2f}" for signal in (*PROBES, *TEXT, *KNOWN) if signal in areas]
    best = max((signal for signal in PROBES if signal in areas), key=lambda signal: areas[signal].value)
    gain = at[best].beyond_text
    sentence = f"At the same step the areas are: {'; '.join(parts)}."
    if gain is None:
        return sentence
    return sentence + f" The best probe here ({NAMES[best]}) stands {_beyond(gain)} text itself ({_signed(gain)})."


def _beyond(gain: Estimate) -> str:
    if gain.low > 0:
        return "above"
    if gain.high < 0:
        return "below"
    return "not told apart from"


def _ahead(record: WarningRecord) -> list[str]:
    """Who gives an alarm before text breaks its budget."""
    usable = {
        signal: lead for signal, lead in record.leads.items() if lead.early is not None and lead.false is not None
    }
    if not usable:
        return ["No lead can be stated: no training failed, or none held."]
    parts = []
    for signal, lead in usable.items():
        assert lead.early is not None
        assert lead.false is not None
        parts.append(f"{NAMES[signal]} {percent(lead.early.value, 0)} ({percent(lead.false.value, 0)} false alarms)")
    first = next(iter(usable.values()))
    return [
        f"Share of {first.failed} failed trainings with an alarm at a look before text broke its budget, thresholds "
        f"taken from other trainings: {'; '.join(parts)}."
    ]


def table(record: WarningRecord) -> TerminalTable:
    """Areas under the ROC curve by signal and look, for the terminal."""
    steps = [one.step for one in next(iter(record.judged.values()))]
    drawn = TerminalTable(
        title=f"trainings that will end below {percent(record.budget, 0)} of their text, ranked early: area under the "
        "ROC curve (0.5: chance), under it the 95 % interval and p",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    drawn.add_column("measured at step")
    for step in steps:
        drawn.add_column(str(step), justify="right")
    for signal, judged in record.judged.items():
        areas = [one.ranking.auc if one.ranking else None for one in judged]
        cells = [f"{a.value:.2f}\n[dim]{_bounds(a)}\n{_p(a)}[/dim]" if a else MISSING for a in areas]
        drawn.add_row(NAMES[signal], *cells, end_section=signal in (PROBES[-1], TEXT[-1]))
    return drawn


def figures(record: WarningRecord) -> dict[str, str]:
    """Inline SVG by name."""
    rates = sorted({run.rate for run in record.runs})
    signal, look = MAIN
    steps = record.runs[0].steps
    drawn = {}
    whole = {name: [value for value in values if value is not None] for name, values in record.areas.items()}
    shown = [name for name, values in whole.items() if len(values) == len(steps) > 1]
    if shown:
        drawn["areas"] = lines(
            steps,
            [Line(NAMES[name], number, whole[name], dashed=name not in PROBES) for number, name in enumerate(shown)],
            title="How well each signal, measured at a step, ranks the trainings that will lose their text",
            x_title="step of the measurement",
            y_title="area under the ROC curve",
        )
    points = [(run, run.signals[signal][look - 1]) for run in record.runs if len(run.steps) >= look]
    early = [
        Trail(run.title, rates.index(run.rate), [(value, run.retention)]) for run, value in points if value is not None
    ]
    if early:
        drawn["early-late"] = trails(
            early,
            title=f"{NAMES[signal].capitalize()} at step {steps[look - 1]} against text kept at the end",
            x_title=f"{NAMES[signal]} since the start",
            y_title="text accuracy at the end, share of the base's",
        )
    drawn["text"] = trails(
        [Trail(run.title, rates.index(run.rate), list(zip(run.steps, _kept(run), strict=True))) for run in record.runs],
        title="Text retention as the trainings ran",
        x_title="step",
        y_title="retention, by the retention monitor's own items",
    )
    return drawn


def _kept(run: Watched) -> list[float]:
    return [1 - lost for lost in run.lost]


def report(record: WarningRecord) -> Document:
    """The report as data."""
    drawn = {name: Figure(svg) for name, svg in figures(record).items()}
    keys = [Key(f"learning rate {rate:g}", n) for n, rate in enumerate(sorted({run.rate for run in record.runs}))]
    sections = [
        Section(
            "Early signals against the end",
            [
                "Each training is looked at every few steps while it runs. Probes count by how far they are from the "
                "training's own start, whatever the direction. The end is judged by other questions than the looks."
            ],
            [
                FigureRow([drawn[name] for name in ("early-late", "text") if name in drawn], keys),
                *([drawn["areas"]] if "areas" in drawn else []),
            ],
        ),
        Section(
            "How reliably",
            [
                "Intervals: 95 % bootstrap over trainings. p: over the ways to say which trainings failed (area, "
                "one-sided) or to re-pair signals with ends (correlation, two-sided). At equal rates: only trainings "
                "of one learning rate are compared, which asks whether a signal says more than the rate. Only "
                f"{NAMES[MAIN[0]]} at look {MAIN[1]} was chosen beforehand; the other p values are not corrected for "
                "their number."
            ],
            [_judged_table(record, look) for look in range(len(next(iter(record.judged.values()))))],
        ),
        Section(
            "How early",
            [
                "An alarm is a value above everything the other trainings that held their budget ever showed. "
                f"A training breaks its budget when the retention monitor's own text retention falls below "
                f"{percent(record.budget, 0)}."
            ],
            [_lead_table(record)],
        ),
        Section("What watching cost", [_cost(record)]),
        Section("Every training", [], [_runs_table(record)]),
        Section(
            "To repeat this",
            [],
            [
                Facts(
                    [
                        *((name.replace("_", " "), str(value)) for name, value in record.settings.items()),
                        *record.environment.items(),
                        ("made", record.created),
                    ],
                    record.command,
                )
            ],
        ),
    ]
    return Document(
        title="Do the probes tell early that text will be lost?",
        lead=verdict(record),
        sections=sections,
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _judged_table(record: WarningRecord, look: int) -> Table:
    rows = []
    for signal, judged in record.judged.items():
        one = judged[look]
        whole, equal = one.ranking, one.ranking_at_equal_rates
        correlations = (one.correlation, one.correlation_at_equal_rates)
        rows.append(
            [
                Cell(NAMES[signal], note="chosen beforehand" if (signal, one.look) == MAIN else ""),
                _area_cell(whole.auc if whole else None),
                _area_cell(equal.auc if equal else None),
                _area_cell(whole.precision if whole else None),
                Cell(MISSING) if one.beyond_text is None else Cell(_signed(one.beyond_text)),
                *(
                    Cell(MISSING)
                    if found is None or found.pearson is None
                    else Cell(
                        f"{found.pearson.value:+.2f}", note=f"{interval(found.pearson)}\n{p_value(found.pearson)}"
                    )
                    for found in correlations
                ),
            ]
        )
    step = next(iter(record.judged.values()))[look].step
    columns = [
        f"at step {step}", "ROC area", "at equal rates", "average precision", "ROC area beyond text lost so far",
        "correlation with text lost at the end", "at equal rates",
    ]  # fmt: skip
    share = record.failed / len(record.runs)
    return Table(columns, rows, f"Chance: ROC area 0.5, average precision {share:.2f}, correlation 0.")


def _lead_table(record: WarningRecord) -> Table:
    rows = [
        [
            Cell(NAMES[signal]),
            _share(lead.early, lead.failed),
            _share(lead.warned, lead.failed),
            Cell(MISSING) if lead.steps is None else Cell(f"{lead.steps.value:.0f}", note=_bounds(lead.steps, 0)),
            _share(lead.false, lead.held),
        ]
        for signal, lead in record.leads.items()
    ]
    columns = ["alarm by", "before the break", "by the break", "steps from alarm to break", "false alarms"]
    return Table(columns, rows)


def _runs_table(record: WarningRecord) -> Table:
    rates = sorted({run.rate for run in record.runs})
    signal, look = MAIN
    rows = []
    for run in sorted(record.runs, key=lambda run: run.retention):
        value = run.signals[signal][look - 1] if len(run.steps) >= look else None
        rows.append(
            [
                Cell(run.title, series=rates.index(run.rate)),
                Cell(MISSING if value is None else f"{value:.3f}"),
                Cell(percent(1 - run.lost[min(look, len(run.lost)) - 1])),
                Cell(percent(run.retention), note="failed" if run.retention < record.budget else ""),
            ]
        )
    step = record.runs[0].steps[min(look, len(record.runs[0].steps)) - 1]
    return Table(["training", f"{NAMES[signal]} at step {step}", f"text kept at step {step}", "at the end"], rows)


def _cost(record: WarningRecord) -> str:
    looks = len(record.runs[0].steps)
    shares = [run.retention_seconds / run.seconds for run in record.runs if run.seconds]
    share = sum(shares) / len(shares) if shares else 0.0
    return (
        f"{looks} looks, one every {record.runs[0].steps[0]} steps, took {percent(share)} of the trainings' time on "
        "average. The cost goes down as the distance between looks goes up."
    )


def _share(estimate: Estimate | None, n: int) -> Cell:
    if estimate is None:
        return Cell(MISSING)
    low, high = (MISSING if math.isnan(bound) else percent(bound, 0) for bound in (estimate.low, estimate.high))
    return Cell(percent(estimate.value, 0), note=f"{low} to {high}, n = {n}")


def _area_cell(area: Area | None) -> Cell:
    return Cell(MISSING) if area is None else Cell(f"{area.value:.2f}", note=f"{_bounds(area)}\n{_p(area)}")


def _area(area: Area) -> str:
    return f"{area.value:.2f} (95 % interval {_bounds(area)}, {_p(area)})"


def _p(area: Area) -> str:
    return probability(area.p) + (", exact" if area.exact else "")


def _bounds(estimate: Estimate, digits: int = 2) -> str:
    low, high = (MISSING if math.isnan(bound) else f"{bound:.{digits}f}" for bound in (estimate.low, estimate.high))
    return f"{low} to {high}"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f}, {interval(estimate)}"
