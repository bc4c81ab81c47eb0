"""Four kinds of tokens to look at: tables, verdicts and a figure; all from the record."""

from __future__ import annotations

from alula.reports.figures import Line, lines
from alula.reports.wording import MISSING, listing, percent
from studies.grids import Grid
from studies.subnetwork.grids import DEAD, RULES, clear, named, share, told
from studies.subnetwork.plan import KINDS, LOOKED, MATCHED
from studies.subnetwork.plan import RULES as ALL
from studies.subnetwork.record import SubnetworkRecord

_WORDS = {"image": "pictures", "video": "films", "audio": "sounds", "text": "text"}
_SHARED, _OWN = "kinds.shared", "kinds.own"


def kinds_grids(record: SubnetworkRecord) -> list[Grid]:
    """Every table of four kinds."""
    return [_sparsities(record), _rules(record), _own(record), _pairs(record)]


def _sparsities(record: SubnetworkRecord) -> Grid:
    whole = [percent(float(record.whole(_SHARED, kind).mean())) for kind in KINDS]
    guess = [percent(_guessed(record, kind)) for kind in KINDS]
    rows = [["right, nothing zero", "", *whole], ["right, by guessing", "", *guess]]
    for sparsity in record.sparsities:
        for rule in MATCHED:
            name = named(rule, sparsity)
            kept = [percent(record.kept(_SHARED, name, kind), 0) for kind in KINDS]
            rows.append(
                [f"{percent(sparsity, 0)}: {RULES[rule]}", percent(record.sparsity(_SHARED, name).value), *kept]
            )
    return Grid("Four kinds: kept, by one mask for all", ["each kind's mask", "weights zero", *_WORDS.values()], rows)


def _rules(record: SubnetworkRecord) -> Grid:
    first, rows = named("intersection", LOOKED), []
    for rule in ALL:
        name = named(rule, LOOKED)
        against = [
            MISSING if name == first else told(record.against((_SHARED, name), (_SHARED, first), kind))
            for kind in KINDS
        ]
        rows.append([RULES[rule], percent(record.sparsity(_SHARED, name).value), *against])
    title = f"Four kinds: right answers less the alpha-SubNet's, at {percent(LOOKED, 0)}"
    return Grid(title, ["one mask for four kinds", "weights zero", *_WORDS.values()], rows)


def _own(record: SubnetworkRecord) -> Grid:
    rows = [[_WORDS[found], *(percent(record.kept(_OWN, found, kind), 0) for kind in KINDS)] for found in KINDS]
    title = f"Four kinds: kept, by the mask of one kind's prompts at {percent(LOOKED, 0)}"
    return Grid(title, ["mask of", *_WORDS.values()], rows)


def _pairs(record: SubnetworkRecord) -> Grid:
    figures = ("applied", "iou", "shared_magnitude", "ceiling", "beyond_magnitude")
    rows = []
    for pair in _names(record):
        label = " and ".join(_WORDS[kind] for kind in pair.split(", "))
        rows.append([label, *(share(record.of_kinds(pair, figure)) for figure in figures)])
    seeds = record.kinds.items()
    for group, words in (("others", "other samples"), ("magnitude", "magnitude")):
        for kind in KINDS:
            found = record.over_seeds({seed: getattr(each, group)[kind] for seed, each in seeds})
            rows.append([f"{_WORDS[kind]} and {words}", share(found), *[""] * 4])
    chance = record.of_kinds(_names(record)[0], "chance")
    rows.append(["chance", percent(chance.value), percent(chance.value), "", "", ""])
    columns = [
        "masks of tokens of", "as applied", "unpruned model", "expected of shared magnitude",
        "the same kind, other samples", "without what magnitude keeps",
    ]  # fmt: skip
    return Grid(f"Four kinds: what masks of their tokens share, at {percent(LOOKED, 0)}", columns, rows)


# -- verdicts ---------------------------------------------------------------------------------------------------------


def kinds_verdict(record: SubnetworkRecord) -> list[str]:
    """What was found of four kinds."""
    return [_same(record), _one(record), _dying(record)]


def _same(record: SubnetworkRecord) -> str:
    pairs = {pair: record.of_kinds(pair, "applied") for pair in _names(record)}
    least, most = (pick(pairs, key=lambda pair: pairs[pair].value) for pick in (min, max))
    others = [
        record.over_seeds({seed: each.others[kind] for seed, each in record.kinds.items()}).value for kind in KINDS
    ]
    above = {
        pair: 100 * (record.of_kinds(pair, "iou").value - record.of_kinds(pair, "shared_magnitude").value)
        for pair in pairs
    }
    low, high = min(above, key=lambda pair: above[pair]), max(above, key=lambda pair: above[pair])
    return (
        "Do pictures, films, sounds and text use the same weights? Masks of their tokens share from "
        f"{share(pairs[least])} ({_pair(least)}) to {share(pairs[most])} ({_pair(most)}) at {percent(LOOKED, 0)}; "
        f"other samples of the same kind share {percent(min(others))} to {percent(max(others))}, chance "
        f"{percent(record.of_kinds(least, 'chance').value, 0)}. Above what shared magnitude alone gives are "
        f"{above[low]:.1f} points ({_pair(low)}) to {above[high]:.1f} ({_pair(high)})."
    )


def _one(record: SubnetworkRecord) -> str:
    subnet = (_SHARED, named("intersection", LOOKED))
    kept = listing([f"{percent(record.kept(*subnet, kind), 0)} of {word}" for kind, word in _WORDS.items()])
    said = []
    for rule in ("pooled", "magnitude", "random"):
        found = {kind: record.against(subnet, (_SHARED, named(rule, LOOKED)), kind) for kind in KINDS}
        parts = [f"{told(each)} of {_WORDS[kind]}" for kind, each in found.items() if clear(each)]
        said.append(f"{RULES[rule]}: {listing(parts) if parts else 'no difference shown of any kind'}")
    return (
        f"Does one subnetwork serve pictures, films, sounds and text? Kept by the masks of all four at "
        f"{percent(LOOKED, 0)} each, {percent(record.sparsity(*subnet).value)} is zero, and it keeps {kept}. Right "
        f"answers less those of its rivals: {'; '.join(said)}."
    )


def _dying(record: SubnetworkRecord) -> str:
    said = []
    for sparsity in record.sparsities:
        name = named("pooled", sparsity)
        kept = {kind: record.kept(_SHARED, name, kind) for kind in KINDS}
        worst, best = min(kept, key=lambda kind: kept[kind]), max(kept, key=lambda kind: kept[kind])
        apart = record.first(_SHARED, name, best, worst)
        if clear(apart):
            said.append(
                f"at {percent(record.sparsity(_SHARED, name).value)} {_WORDS[worst]} ({percent(kept[worst], 0)} kept, "
                f"{_WORDS[best]} {percent(kept[best], 0)}: {told(apart)})"
            )
    above: list[str] = []
    gone: dict[str, str] = {}
    for sparsity in record.sparsities:
        name = named("pooled", sparsity)
        known = {word: _known(record, name, kind) for kind, word in _WORDS.items()}
        zero = percent(record.sparsity(_SHARED, name).value)
        above.append(f"at {zero} {listing([f'{percent(share, 0)} of {word}' for word, share in known.items()])}")
        for word, left in known.items():
            if left < DEAD:
                gone.setdefault(word, zero)
    first = f"The least is kept of, told from the most, {'; '.join(said)}." if said else "No kind is told from another."
    lost = (
        f"half of it is lost of {listing([f'{word} at {at}' for word, at in gone.items()])}" if gone else "of none half"
    )
    return (
        f"Which kind dies first (one mask on all data)? {first} Of what is known above guessing is kept "
        f"{'; '.join(above)}: {lost}."
    )


def _known(record: SubnetworkRecord, name: str, kind: str) -> float:
    """What is kept of right answers above those of guessing."""
    guess = _guessed(record, kind)
    whole, left = (float(marks.mean()) for marks in (record.whole(_SHARED, kind), record.right(_SHARED, name, kind)))
    return (left - guess) / (whole - guess) if whole > guess else float("nan")


def _guessed(record: SubnetworkRecord, kind: str) -> float:
    return record.over_seeds({seed: each.guessed[kind] for seed, each in record.kinds.items()}).value


def kinds_figures(record: SubnetworkRecord) -> dict[str, str]:
    """Inline SVG by name."""
    names = [named("pooled", sparsity) for sparsity in record.sparsities]
    xs = [0.0, *(record.sparsity(_SHARED, name).value for name in names)]
    found = [
        Line(word, series, [1.0, *(record.kept(_SHARED, name, kind) for name in names)])
        for series, (kind, word) in enumerate(_WORDS.items())
    ]
    drawn = lines(
        xs, found, title="kept of four kinds", x_title="weights that are zero", y_title="of right answers",
        y_format=lambda share: percent(share, 0),
    )  # fmt: skip
    return {"kept-kinds": drawn}


def _names(record: SubnetworkRecord) -> list[str]:
    return [*next(iter(record.kinds.values())).pairs]


def _pair(pair: str) -> str:
    return " and ".join(_WORDS[kind] for kind in pair.split(", "))
