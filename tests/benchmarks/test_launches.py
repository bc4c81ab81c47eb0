"""What grafts, policies and probes ask of a device is at most what is committed: counts are exact on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import launches  # type: ignore[import-not-found]

    return launches


@pytest.mark.parametrize("section", ["fledgling", "7b", "probes", "pictures"])
def test_no_count_is_above_the_committed_one(section: str, launches: Any) -> None:
    committed = json.loads(launches.RESULTS.read_text())["counts"]
    found = launches.count(section)
    assert not list(launches.above(found, committed))
    assert found.keys() == {section}
    assert found[section].keys() == committed[section].keys()


@pytest.mark.parametrize("name", ["Wings (mass)", "Wings (attention)", "Wings (keys kept)"])
@pytest.mark.parametrize("section", ["fledgling", "7b"])
def test_wings_keep_to_their_budgets(section: str, name: str, launches: Any) -> None:
    """Fewer launches than LoRA's in a prompt and in a step. Where images stand is read once, in front of the layers of
    a prompt; a step waits for nothing."""
    counts = json.loads(launches.RESULTS.read_text())["counts"][section]
    host, wings = counts["host"], counts[name]
    for workload, most in (("prompt", 45), ("step", 30), ("training step", 130)):
        more = {what: value - host[workload][what] for what, value in wings[workload].items()}
        assert more["launches a layer"] <= most
        assert more["copies a layer"] == more["copies a forward"] == more["waits a layer"] == 0
        assert more["waits a forward"] == (0 if workload == "step" else 1)
    for workload in ("ragged prompt", "ragged step"):
        assert wings[workload]["waits a forward"] - host[workload]["waits a forward"] == ("prompt" in workload)


@pytest.mark.parametrize("section", ["fledgling", "7b"])
def test_mks2_keeps_to_its_budgets(section: str, launches: Any) -> None:
    """A prompt and a step launch less than LoRA on all linears, a training step as much; nothing is copied, and a step
    waits for nothing. By modality a step of text launches nothing in a layer."""
    counts = json.loads(launches.RESULTS.read_text())["counts"][section]
    most = {"mix": (25, 80), "parallel": (16, 53), "modality": (10, 34), "store": (3, 3)}
    for name, (forward, training) in most.items():
        for workload, counted in counts[f"MKS2 ({name})"].items():
            more = {what: value - counts["host"][workload][what] for what, value in counted.items()}
            least = 0 if name == "modality" and "step" in workload else forward
            assert more["launches a layer"] <= (training if workload == "training step" else least), (name, workload)
            assert more["copies a layer"] == more["copies a forward"] == more["waits a layer"] == 0
            assert more["waits a forward"] == (0 if workload in ("step", "ragged step") else 1)


@pytest.mark.parametrize("section", ["fledgling", "7b"])
def test_fused_tokens_and_highlights_keep_to_their_budgets(section: str, launches: Any) -> None:
    """Fused tokens launch nothing in a layer, and a step of theirs waits for nothing. Guidance is a second pass of what
    a highlight alone asks. (Its waits are of weights on the CPU, which are read there and on no accelerator.)"""
    counts = json.loads(launches.RESULTS.read_text())["counts"][section]
    host, aim = counts["host"], counts["AIM"]
    for workload in host:
        assert aim[workload]["launches a layer"] == host[workload]["launches a layer"]
        waits = aim[workload]["waits a forward"] - host[workload]["waits a forward"]
        assert waits == (workload not in ("step", "ragged step"))
    shift, guided = (counts[name] for name in launches.HIGHLIGHTS)
    for workload, most in (("prompt", 6), ("step", 1)):
        assert shift[workload]["launches a layer"] - host[workload]["launches a layer"] <= most
        assert guided[workload]["launches a layer"] <= 2 * shift[workload]["launches a layer"]


def test_browsing_reads_once_more_and_adds_nothing_to_a_layer(launches: Any) -> None:
    counts = json.loads(launches.RESULTS.read_text())["counts"]["pictures"]
    plain, browse, told = (counts[name] for name in launches.ON_PICTURES)
    read = plain["prompt"]["launches a layer"]
    for workload in plain:
        more = {name: each[workload]["launches a layer"] - plain[workload]["launches a layer"]
                for name, each in (("browse", browse), ("told", told))}  # fmt: skip
        assert more["told"] == 0
        assert 0 < more["browse"] <= read if workload != "step" else more["browse"] == 0
    assert browse["step"]["waits a forward"] == plain["step"]["waits a forward"]


def _of_policies(launches: Any) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(policy, its counts by workload, the host's) at both shapes."""
    counts = json.loads(launches.RESULTS.read_text())["counts"]
    return [
        (name, counts[shape][name], counts[shape]["host"])
        for shape in ("fledgling", "7b")
        for name in launches.POLICIES
    ]


def test_policies_keep_to_their_budget_in_a_packed_layer(launches: Any) -> None:
    """At most 12 operators a layer beyond the host's own, those of a training step's backward included, and nothing is
    copied or waited for in one."""
    for name, own, host in _of_policies(launches):
        assert own.keys() == host.keys()
        for workload, counted in own.items():
            more = {what: value - host[workload][what] for what, value in counted.items()}
            assert more["launches a layer"] <= 12, (name, workload)
            assert more["copies a layer"] == more["waits a layer"] == 0, (name, workload)


def test_steps_under_policies_wait_for_nothing(launches: Any) -> None:
    for name, own, host in _of_policies(launches):
        for workload in ("step", "ragged step"):
            for what in ("copies a forward", "waits a forward"):
                assert own[workload][what] == host[workload][what], (name, workload)


def test_prompts_under_policies_wait_twice_at_most(launches: Any) -> None:
    """For what tokens are, and for which image each is of. Each later stage waits once more, to see that the token
    whose attention it goes by is there."""
    for name, own, host in _of_policies(launches):
        for workload in ("prompt", "ragged prompt"):
            later = len(launches.STAGES) - 1 if name in ("Prune in stages", "PyramidDrop") else 0
            assert own[workload]["waits a forward"] - host[workload]["waits a forward"] <= 2 + later, (name, workload)
        # each stage of a training step looks at who leaves and at labels besides, to refuse those behind who leaves
        more = own["training step"]["waits a forward"] - host["training step"]["waits a forward"]
        assert more <= 2 + later + 2 * (1 + later), name


def test_all_probes_together_keep_to_their_budget(launches: Any) -> None:
    """At most 25 launches a layer, none in a step; what they measure is copied and waited for when it is read."""
    counts = json.loads(launches.RESULTS.read_text())["counts"]["probes"]
    for workload in ("prompt", "step", "training step"):
        plain, seam, probes = (counts[name][workload] for name in ("plain", launches.SEAM, "all five"))
        assert probes["launches a layer"] - plain["launches a layer"] <= (0 if workload == "step" else 25)
        for what in ("copies", "waits"):
            assert probes[f"{what} a layer"] == 0
            assert probes[f"{what} a forward"] == seam[f"{what} a forward"]


def test_where_media_stand_is_read_once(launches: Any) -> None:
    """One wait of the seam beside the host's own; which item each token belongs to is sent without one."""
    counts = json.loads(launches.RESULTS.read_text())["counts"]["probes"]
    plain, seam = (counts[name]["prompt"] for name in ("plain", launches.SEAM))
    assert seam["waits a forward"] - plain["waits a forward"] == 1
    assert seam["copies a forward"] - plain["copies a forward"] == 1


def test_what_is_above_is_named(launches: Any) -> None:
    assert list(launches.above({"a": {"b": 3, "c": 1}}, {"a": {"b": 2, "c": 1}})) == ["a, b: 3, committed 2"]
    assert list(launches.above({"a": {"d": 0}}, {"a": {}})) == ["a, d: not committed"]


def test_a_meter_counts_kernels_copies_and_waits(launches: Any) -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 3, 4)
    with torch.no_grad(), launches.Meter() as meter:
        linear(x).view(6, 4).t()  # one kernel, two views
    assert meter.counts.launches == {"addmm": 1}
    assert (meter.counts.copies, meter.counts.waits) == (0, 0)
    with launches.Meter() as meter:
        rows = x[0] + torch.tensor([1.0, 2.0, 3.0, 4.0])
        if (rows > 0).any():
            rows[rows > 0].tolist()
    assert meter.counts.copies == 1
    assert meter.counts.waits == 3  # a truth value, a boolean index, numbers
    x.requires_grad_()
    with launches.Meter() as meter:
        linear(x).sum().backward()
    assert meter.counts.launches["mm"] == 2
