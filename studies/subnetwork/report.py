"""The study of subnetworks to look at: a verdict, tables and figures; all from the record."""

from __future__ import annotations

from rich.table import Table as TerminalTable

from alula.reports.document import Cell, Document, Figure, FigureRow, Section, Table
from alula.reports.figures import Line, lines
from alula.reports.wording import MISSING, listing, percent
from studies.grids import Grid, written
from studies.pages import to_repeat
from studies.subnetwork.grids import DEAD, clear, named, share, told
from studies.subnetwork.grids import RULES as RULES_TOLD
from studies.subnetwork.kinds_report import kinds_figures, kinds_grids, kinds_verdict
from studies.subnetwork.plan import CALIBRATIONS, HEALINGS, LOOKED, RULES
from studies.subnetwork.record import SubnetworkRecord

_CALIBRATED = {
    "both": "both", "image": "image tokens", "words": "prompts of text", "padded": "both, padded as published",
    "magnitude": "magnitude", "random": "random",
}  # fmt: skip
_PAIRS = {
    "image, words": "image tokens and prompts of text",
    "image, other samples": "image tokens, and those of other samples",
    "words, other samples": "prompts of text, and others",
    "image, magnitude": "image tokens and magnitude",
    "words, magnitude": "prompts of text and magnitude",
    "both, padded": "both, and both padded as published",
}
_HEALED = {"visual": "questions about pictures", "both": "half pictures, half text"}
_LAYERS = {"iou": "image and text tokens", "shared_magnitude": "expected of shared magnitude", "chance": "chance",
           "ceiling": "the same kind, other samples", "beyond_magnitude": "without what magnitude keeps"}  # fmt: skip
_SKILLS = {"text": "text", "visual": "pictures"}

# -- tables -----------------------------------------------------------------------------------------------------------


def grids(record: SubnetworkRecord) -> list[Grid]:
    """Every table."""
    found = []
    if record.has("masks"):
        found += [_first(record), _calibrations(record), _pairs(record), _layers(record), _shared(record)]
    if record.has("healing"):
        found.append(_healing(record))
    return [*found, *(kinds_grids(record) if record.has("kinds") else [])]


def table(record: SubnetworkRecord) -> TerminalTable:
    """The first table, for the terminal."""
    return grids(record)[0].drawn()


def markdown(record: SubnetworkRecord) -> str:
    """All tables for docs."""
    return written(grids(record))


def _first(record: SubnetworkRecord) -> Grid:
    whole = [percent(float(record.right("none", "", skill).mean())) for skill in _SKILLS]
    rows = [["none", *whole, percent(1.0, 0), percent(1.0, 0), ""]]
    for sparsity in record.sparsities:
        name = named("both", sparsity)
        right = [percent(float(record.right("pruned", name, skill).mean())) for skill in _SKILLS]
        kept = [percent(record.kept("pruned", name, skill), 0) for skill in _SKILLS]
        rows.append([percent(sparsity, 0), *right, *kept, told(record.first("pruned", name))])
    columns = ["weights zero", "text right", "pictures right", "text kept", "pictures kept", "pictures less text"]
    return Grid("What dies first (Wanda on both)", columns, rows)


def _calibrations(record: SubnetworkRecord) -> Grid:
    rows = []
    for name in CALIBRATIONS:
        cells = [
            f"{percent(record.kept('pruned', named(name, sparsity), skill), 0)}"
            for sparsity in record.sparsities
            for skill in _SKILLS
        ]
        rows.append([_CALIBRATED[name], *cells])
    columns = [f"{percent(sparsity, 0)}: {word}" for sparsity in record.sparsities for word in _SKILLS.values()]
    return Grid("Kept, by what the mask was found by", ["found by", *columns], rows)


def _pairs(record: SubnetworkRecord) -> Grid:
    rows = [[label, share(record.pair(name))] for name, label in _PAIRS.items()]
    chance = record.over_seeds({seed: overlap.chance for seed, overlap in record.overlaps.items()})
    return Grid(
        "Weights kept by both, over those kept by either", ["masks", "shared"], [*rows, ["chance", share(chance)]]
    )


def _layers(record: SubnetworkRecord) -> Grid:
    values = {label: record.layers(name) for name, label in _LAYERS.items()}
    many = len(next(iter(values.values())))
    rows = [[label, *(f"{value:.2f}" for value in found)] for label, found in values.items()]
    return Grid("Overlap of image and text tokens in one prompt, by layer", ["", *map(str, range(many))], rows)


def _shared(record: SubnetworkRecord) -> Grid:
    rows = []
    for rule in RULES:
        kept = [percent(record.kept("shared", rule, skill), 0) for skill in _SKILLS]
        against = [
            MISSING if rule == "intersection" else told(record.against(("shared", rule), ("shared", "intersection"), s))
            for s in _SKILLS
        ]
        rows.append([RULES_TOLD[rule], percent(record.sparsity("shared", rule).value), *kept, *against])
    columns = ["one mask for four tasks", "weights zero", "text kept", "pictures kept"]
    return Grid("One subnetwork", [*columns, "text, against the first", "pictures, against the first"], rows)


def _healing(record: SubnetworkRecord) -> Grid:
    pruned = named("both", record.settings["healed"])
    places = {"not healed": ("pruned", pruned)} if pruned in next(iter(record.seeds.values())).pruned else {}
    for name in HEALINGS:
        places[f"{_HEALED[name]}: LoRA beside"] = ("beside", name)
        places[f"{_HEALED[name]}: merged, and pruned again"] = ("merged", name)
        if name in record.trained:
            places[f"{_HEALED[name]}: the same LoRA, nothing pruned"] = ("trained", name)
    rows = [[label, *(percent(record.kept(*place, skill), 0) for skill in _SKILLS)] for label, place in places.items()]
    return Grid(
        "Healing", [f"{percent(record.settings['healed'], 0)} zero, healed on", "text kept", "pictures kept"], rows
    )


# -- verdict ----------------------------------------------------------------------------------------------------------


def verdict(record: SubnetworkRecord) -> list[str]:
    """What the study found, question by question."""
    said = []
    if record.has("masks"):
        said += [_same(record), _use(record), _dying(record), _one(record), _padding(record)]
    if record.has("healing"):
        said.append(_forgetting(record))
    return [*said, *(kinds_verdict(record) if record.has("kinds") else [])]


def _same(record: SubnetworkRecord) -> str:
    between, chance = record.pair("image, words"), next(iter(record.overlaps.values())).chance
    own = [record.pair(name) for name in ("image, other samples", "words, other samples")]
    large = [record.pair(name) for name in ("image, magnitude", "words, magnitude")]
    lower = between.high < min(each.low for each in own)
    word = "not quite" if lower else "as far as can be told"
    return (
        f"Is the subnetwork of pictures that of words (IMA)? {word.capitalize()}: masks of image tokens and of prompts "
        f"of text share {share(between)} at {percent(LOOKED, 0)}, where chance is {percent(chance, 0)}, the same kind "
        f"on other samples {share(own[0])} and {share(own[1])}, and magnitude alone, which looks at nothing, shares "
        f"{share(large[0])} and {share(large[1])} with them."
    )


def _use(record: SubnetworkRecord) -> str:
    shared, expected = record.layers("iou"), record.layers("shared_magnitude")
    above = [one - other for one, other in zip(shared, expected, strict=True)]
    beyond = sum(record.layers("beyond_magnitude")) / len(shared)
    fell = [str(layer) for layer, value in enumerate(above) if value <= 0]
    where = f"; it is not in layers {listing(fell)}" if fell else ""
    return (
        f"How much of that is shared use? In one prompt the overlap is {100 * sum(above) / len(above):.1f} points "
        f"above what shared magnitude alone gives (mean over layers{where}); without the weights that magnitude keeps "
        f"it is {percent(beyond, 0)}."
    )


def _dying(record: SubnetworkRecord) -> str:
    lost = []
    for skill, word in _SKILLS.items():
        dead = [s for s in record.sparsities if record.kept("pruned", named("both", s), skill) < DEAD]
        lost.append(
            f"{word} at {percent(dead[0], 0)}" if dead else f"{word} not up to {percent(record.sparsities[-1], 0)}"
        )
    firsts = {s: record.first("pruned", named("both", s)) for s in record.sparsities}
    clearly = [f"{percent(s, 0)}: {told(found)}" for s, found in firsts.items() if clear(found)]
    if clearly:
        tail = f"What is kept of pictures less what is kept of text is told from 0 at {listing(clearly)}"
    else:
        tail = "At no sparsity is more kept of one than of the other, as far as intervals tell"
    return f"Which dies first? Half is lost of {listing(lost)} (Wanda on both). {tail}."


def _one(record: SubnetworkRecord) -> str:
    subnet = ("shared", "intersection")
    kept = listing([f"{percent(record.kept(*subnet, skill), 0)} of {word}" for skill, word in _SKILLS.items()])
    said = []
    for rule in ("pooled", "magnitude", "random"):
        found = listing([f"{told(record.against(subnet, ('shared', rule), s))} of {w}" for s, w in _SKILLS.items()])
        said.append(f"{RULES_TOLD[rule]}: {found}")
    return (
        "Does one subnetwork serve all tasks (alpha-SubNet)? Kept by the masks of four streams (captions, questions "
        f"about pictures, dialogues, text) at {percent(LOOKED, 0)} each, "
        f"{percent(record.sparsity(*subnet).value)} is zero and it keeps {kept}. Against its rivals: "
        f"{'; '.join(said)}."
    )


def _padding(record: SubnetworkRecord) -> str:
    changed = record.over_seeds({seed: overlap.changed_by_padding for seed, overlap in record.overlaps.items()})
    changes = []
    for sparsity in record.sparsities:
        pair = ("pruned", named("padded", sparsity)), ("pruned", named("both", sparsity))
        for skill, word in _SKILLS.items():
            found = record.against(*pair, skill)
            if clear(found):
                changes.append(f"{word} at {percent(sparsity, 0)} {told(found)}")
    cost = (
        f"it makes a difference of {listing(changes)}"
        if changes
        else "no difference in answers is shown at any sparsity"
    )
    return (
        f"What does the published code's padding do? {share(changed)} of the decoder's weights are kept by only one "
        f"of the two masks at {percent(LOOKED, 0)}; {cost}."
    )


def _forgetting(record: SubnetworkRecord) -> str:
    said = []
    for name in HEALINGS:
        beside = listing([f"{percent(record.kept('beside', name, s), 0)} of {w}" for s, w in _SKILLS.items()])
        merged = listing([f"{percent(record.kept('merged', name, s), 0)} of {w}" for s, w in _SKILLS.items()])
        said.append(f"on {_HEALED[name]} LoRA beside the model keeps {beside}; merged under the mask again, {merged}")
    apart = record.against(("beside", "both"), ("beside", "visual"), "text")
    control = []
    for name in record.trained:
        parts = [f"{percent(record.kept('trained', name, s), 0)} of {w}" for s, w in _SKILLS.items()]
        short = [f"{told(record.against(('beside', name), ('trained', name), s))} of {w}" for s, w in _SKILLS.items()]
        control.append(f"on {_HEALED[name]} {listing(parts)} (the healed model less this one: {listing(short)})")
    without = f" The same training of the model that was not pruned keeps {'; '.join(control)}." if control else ""
    return (
        f"What does healing forget? Of {percent(record.settings['healed'], 0)} zeros, healed {'; '.join(said)}. Text "
        f"among the healing data makes {told(apart)} of text.{without}"
    )


# -- pages ------------------------------------------------------------------------------------------------------------


def figures(record: SubnetworkRecord) -> dict[str, str]:
    """Inline SVG by name."""
    return {**(_kept(record) if record.has("masks") else {}), **(kinds_figures(record) if record.has("kinds") else {})}


def _kept(record: SubnetworkRecord) -> dict[str, str]:
    xs = [0.0, *record.sparsities]
    drawn = {}
    for skill, word in _SKILLS.items():
        found = [
            Line(
                _CALIBRATED[name],
                series,
                [1.0, *(record.kept("pruned", named(name, sparsity), skill) for sparsity in record.sparsities)],
            )
            for series, name in enumerate(CALIBRATIONS)
        ]
        drawn[f"kept-{skill}"] = lines(
            xs,
            found,
            title=f"{word} kept",
            x_title="weights that are zero",
            y_title="of right answers",
            y_format=_whole,
        )
    return drawn


def report(record: SubnetworkRecord) -> Document:
    """The report as data."""
    captions = {
        "kept-text": "Right answers about text.",
        "kept-visual": "Right answers about pictures.",
        "kept-kinds": "Models of four kinds, one mask on the data of all.",
    }
    drawn = [Figure(svg, captions[name]) for name, svg in figures(record).items()]
    sections = [Section("Kept", blocks=[FigureRow(drawn)])] if drawn else []
    for grid in grids(record):
        rows = [[Cell(row[0]), *map(_cell, row[1:])] for row in grid.rows]
        sections.append(Section(grid.title, blocks=[Table(list(grid.columns), rows)]))
    repeated = to_repeat(
        record,
        record.seeds,
        ("questions", f"{record.settings['items']} per skill"),
        ("calibrated on", f"{record.settings['samples']} samples of each stream"),
    )
    return Document(
        title="One subnetwork?",
        lead=verdict(record),
        sections=[*sections, repeated],
        footer=f"alula, {record.created}. Every figure is drawn from the result file alone.",
    )


def _cell(text: str) -> Cell:
    """A figure, with its interval below."""
    value, _, interval = text.partition(" (")
    return Cell(value, note=interval.removesuffix(")"))


def _whole(share: float) -> str:
    return percent(share, 0)
