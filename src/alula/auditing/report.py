"""The audit as one HTML page: what each figure says for this model first, then the figure, its nulls and its source."""

from __future__ import annotations

from collections.abc import Sequence

from alula.auditing.export import findings
from alula.auditing.finding import Finding, Status
from alula.auditing.record import Audit
from alula.auditing.sections import SECTIONS
from alula.reports.document import Cell, Document, Facts, Section, Table, render
from alula.reports.wording import count, duration, listing

_SHADES = {Status.FINE: 0.55, Status.LOOK: -0.4, Status.ACT: -1.0, Status.OPEN: None}
_MEANING = {
    Status.FINE: "as one would wish",
    Status.LOOK: "worth a look",
    Status.ACT: "something is wrong",
    Status.OPEN: "the data does not decide",
}


def audit_report(audit: Audit) -> str:
    """Return the report of an audit as one self-contained HTML page."""
    found = findings(audit)
    sections = []
    for finding in found:
        section, result = SECTIONS[finding.section], audit.results[finding.section]
        words = [finding.says, _advice(finding), *section.notes(result)]
        sections.append(Section(finding.title, words, section.blocks(audit, result), list(section.links)))
    sections.append(Section("To repeat this", blocks=[_repeat(audit)]))
    return render(
        Document(
            title=f"Audit of {audit.title}",
            lead=_lead(audit, found),
            head=[_glance(found)],
            sections=sections,
            footer=f"alula, {audit.created}. Intervals: 95 %. Methods: docs/usage/audit.md and docs/methods/probes.md.",
        )
    )


def _advice(finding: Finding) -> str:
    return finding.do if finding.status is Status.FINE else f"What to do: {finding.do}"


def _lead(audit: Audit, found: Sequence[Finding]) -> list[str]:
    acting = [finding for finding in found if finding.status is Status.ACT]
    looking = [finding for finding in found if finding.status is Status.LOOK]
    if acting:
        first = acting[0].says
    elif looking:
        first = f"Nothing is wrong outright; {_questions(looking)} worth a look."
    elif all(finding.status is Status.OPEN for finding in found):
        first = "This data decides nothing yet: see below what to measure instead."
    else:
        first = "Nothing found that needs doing."
    what = f"{audit.model_class}, {count(audit.parameters)} parameters, {audit.layers} decoder layers"
    measured = f"measured on {audit.measured} conversations with images ({audit.data})" if audit.data else ""
    asked = [
        f"{section.questions.asked(audit.results[name])} put to it" + (f" and to {audit.base}" if audit.base else "")
        for name, section in SECTIONS.items()
        if section.questions is not None and name in audit.results
    ]
    done = listing([part for part in (measured, *asked) if part])
    passed = [
        f"{many} {kind}"
        for many, kind in ((audit.without_image, "without an image"), (audit.unusable, "unusable"))
        if many
    ]
    return [first, f"{what}; {done}." + (f" Passed over: {listing(passed)}." if passed else "")]


def _questions(found: Sequence[Finding]) -> str:
    return f"{len(found)} of its figures {'are' if len(found) > 1 else 'is'}"


def _glance(found: Sequence[Finding]) -> Table:
    rows = [
        [
            Cell(finding.title),
            Cell(str(finding.status), shade=_SHADES[finding.status], strong=True, hint=_MEANING[finding.status]),
            Cell(finding.figure),
            Cell(finding.against),
        ]
        for finding in found
    ]
    meaning = "; ".join(f"{status}: {text}" for status, text in _MEANING.items())
    return Table(["", "", "figure (95 % interval)", "held against"], rows, f"At a glance ({meaning}).", words=True)


def _repeat(audit: Audit) -> Facts:
    rows = [
        ("model", audit.model),
        ("base", audit.base or "none"),
        ("class", audit.model_class),
        ("precision", f"{audit.dtype} on {audit.device}"),
        ("samples", f"{audit.measured}, {audit.data}" if audit.data else "none"),
        ("seed", str(audit.facts["seed"])),
        *((f"template: {name}", str(value)) for name, value in audit.facts["template"].items()),
        ("time", duration(audit.seconds)),
    ]
    if audit.memory is not None:
        rows += [
            (
                "memory of the probes",
                f"{count(audit.memory.held)}B kept; at most {count(audit.memory.bound)}B, however many samples",
            ),
            *(
                (f"most used by the {place}", f"{count(value)}B, model and batches included")
                for place, value in audit.memory.peak.items()
            ),
        ]
    return Facts([*rows, *audit.environment.items()], audit.command)
