"""Tables in the documentation tell what the committed records hold, also after these were measured anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from studies.alignment.record import AlignmentRecord
from studies.real import RealRecord, markdown

ROOT = Path(__file__).parents[2]
LAUNCHES = {
    "LoRA (PEFT, all linear layers)": "LoRA",
    "Wings, mass": "Wings (mass)",
    "Wings, attention": "Wings (attention)",
    'Wings, mass, `cache="keys"`': "Wings (keys kept)",
    "experts, image": "experts (image)",
    "experts, seen": "experts (seen)",
    "MKS2, mix": "MKS2 (mix)",
    'MKS2, mix, `lora="parallel"`': "MKS2 (parallel)",
    'MKS2, `route="modality"`': "MKS2 (modality)",
    "MKS2, store": "MKS2 (store)",
    "AIM, fused tokens in the prompt": "AIM",
    "highlight, shift alone": "highlight (shift)",
    "highlight, with guidance": "highlight (guidance)",
}
"""rows of the page on speed, and what they tell of"""
POLICIES = (
    ("prompt", "withdrawal in the middle"),
    ("prompt", "pruned to 50 % at layer 2"),
    ("prompt", "pruned to 25 % at layer 2"),
    ("prompt", "pruned to 11 % at layer 2"),
    ("prompt", "PyramidDrop"),
    ("prompt", "MLP skipped behind a quarter"),
    ("prompt", "every second block skipped"),
    ("prompt of tiles", "withdrawal in the middle"),
    ("prompt of tiles", "pruned to 11 % at layer 2"),
)
"""parts and policies of the record, in the order of the rows of the page on policies"""


def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the first table behind some words, without those that name the columns."""
    table = re.search(r"^\|---.*\n((?:\|.*\n)+)", text.partition(start)[2], re.M)
    assert table is not None
    return [[cell.strip(" *") for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def test_launches_of_grafts() -> None:
    counts, text = record("launches.json")["counts"]["7b"], page("results/speed.md")

    def more(name: str, workload: str) -> float:
        return counts[name][workload]["launches a layer"] - counts["host"][workload]["launches a layer"]

    told = {label: cells for label, *cells in rows(text, "\n## Launches\n")}
    assert told.keys() == LAUNCHES.keys()
    for label, cells in told.items():
        name = LAUNCHES[label]
        for workload, cell in zip(("prompt", "step", "training step"), cells, strict=True):
            assert cell == (f"{more(name, workload):g}" if workload in counts[name] else ""), (label, workload)
    said = re.search(r"launches (\d+) for a prompt and (\d+) for a step", text)
    assert said is not None
    assert [float(each) for each in said.groups()] == [
        more("Wings (mass)", workload) for workload in ("ragged prompt", "ragged step")
    ]


def test_launches_of_probes() -> None:
    counts = record("launches.json")["counts"]["probes"]
    plain, seam = (counts[name]["prompt"] for name in ("plain", "seam alone"))
    told = re.findall(r"^\| ([a-z ]+) \| \**(\d+)\** \| \**(\d+)\** \|$", page("methods/probes.md"), re.M)
    assert {name for name, _, _ in told} == counts.keys() - {"plain", "seam alone"}
    for name, layer, forward in told:
        own = counts[name]["prompt"]
        assert float(layer) == own["launches a layer"] - plain["launches a layer"], name
        assert float(forward) == own["launches a forward"] - seam["launches a forward"], name


def _measured(of: dict[str, Any], part: str) -> str:
    least = of["median" if part == "prompt of tiles" else "fastest"]
    return f"{least:.3f} ({of['low']:.3f} to {of['high']:.3f})"


def test_what_policies_save() -> None:
    found, text = record("policies.json"), page("methods/policies.md")
    told = [cells for cells in rows(text, "\n## What it saves\n") if cells[1]]
    for (part, name), (label, *cells) in zip(POLICIES, told, strict=True):
        own = found[part]["policies"][name]
        assert cells == [
            f"{own['counted']:.3f}",
            _measured(own["by hand"], part),
            _measured(own["measured"], part),
            f"{100 * own['share of the saving that arrives']:.0f} %",
            f"{100 * own['share of what is saved by hand']:.0f} %",
        ], label
    for name, begins in (
        ("withdrawal by masks alone", "Withdrawal by masks alone takes "),
        ("nothing asked", "nobody on it takes "),
    ):
        assert begins + _measured(found["prompt"]["others"][name], "prompt") in text


def test_what_choosing_costs() -> None:
    found = record("criteria.json")["criteria"]
    told = rows(page("methods/policies.md"), "What choosing itself costs")
    assert [cells[0] for cells in told] == list(found)
    for name, *cells in told:
        own = found[name]
        time = own["measured"]
        assert cells == [
            str(own["layer"]),
            f"{own['counted']:.3f}",
            f"{time['median']:.3f} ({time['low']:.3f} to {time['high']:.3f})",
            f"{100 * own['share of the saving that arrives']:.0f} %",
        ], name


def test_what_compiled_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compiled  # type: ignore[import-not-found]

    head, _, *lines = compiled.table(record("compiled.json")).splitlines()
    text = page("results/speed.md")
    assert head in text
    for line in lines:
        assert line in text


def test_real_weights() -> None:
    found = RealRecord.load(ROOT / "benchmarks/results/real.json")
    beside = AlignmentRecord.load(ROOT / "benchmarks/results/alignment.json")
    told = page("results/real.md").partition("\n## All figures\n")[2].partition("\n## ")[0]
    assert told.strip() == markdown(found, beside).strip()
    assert f"; {100 * sum(map(int, found.blind)) / len(found.blind):.0f} % of them are right without a look" in page(
        "results/real.md"
    )


def test_audits_of_real_weights() -> None:
    audits = record("real-audit.json").values()
    told = rows(page("results/real.md"), "\n## What `alula audit` says\n")
    assert told == [
        [each[0]["title"], *(f"{finding['status']}: {finding['figure']}" for finding in each)]
        for each in zip(*(audit["findings"] for audit in audits), strict=True)
    ]


def test_a_second_training_of_each_way() -> None:
    first, second = (RealRecord.load(ROOT / f"benchmarks/results/{name}.json") for name in ("real", "real-seed-1"))
    tables = markdown(second.joined(first, "real.json")).split("\n\n**")
    told = page("results/real.md").partition("\n## A second training\n")[2].partition("\n## ")[0]
    chosen = [table for table in tables if table.startswith(("Training by training", "What tells what"))]
    assert len(chosen) == 2
    for table in chosen:
        assert table.strip() in told


def test_training_beside_the_trainer() -> None:
    told = iter(rows(page("results/speed.md"), "\n## Training\n"))
    few, many = (record(name)["tasks"] for name in ("training-speed.json", "training-speed-32.json"))
    for task in ("align", "instruct"):
        for of, name, begins in (
            (few, "cache", f"{task}: feature cache"),
            (few, "cache, packing", f"{task}: feature cache, packing"),
            (few, "all", f"{task}: feature cache, packing, logits where something is learnt"),
            (many, "all", "the same, 32 a step"),
        ):
            own = of[task][name]
            shares = ("times_trainer", "times_trainer_counted", "times_trainer_first_pass", "memory_over_trainer")
            assert next(told) == [begins, *(f"{own[each]:.2f}" for each in shares), f"{own['loss_off']:.0e}"]
    assert next(told, None) is None


def _share(of: dict[str, Any]) -> str:
    return f"{100 * of['value']:.0f}% ({100 * of['low']:.0f} to {100 * of['high']:.0f})"


def test_speech() -> None:
    found = record("real-speech.json")
    told = rows(page("usage/real.md"), "**What came of it**")
    sides = [
        [found[f"{what} {how}"] for how in ("written", "ranked", "by whisper")] for what in ("prompts", "captions")
    ]

    def errors(of: dict[str, Any]) -> str:
        return f"{of['word_error_rate']:.2f} ({of['low']:.2f} to {of['high']:.2f})"

    for place, (written, ranked, whisper) in enumerate(sides, 1):
        assert [row[place] for row in told] == [
            errors(written),
            errors(written["shuffled"]),
            errors(whisper),
            f"{100 * written['exact']:.0f}%",
            f"{100 * written['words_written']:.0f}%; {100 * written['shuffled']['words_written']:.0f}%",
            "; ".join(f"{ranked[each]:.2f}" for each in ("nats", "nats_silence", "nats_shuffled")),
            _share(ranked["own_clip_beats_silence"]),
            _share(ranked["own_clip_beats_another"]),
            _share(ranked["right_is_likeliest"]),
            _share(ranked["right_gains_most"]),
        ]
