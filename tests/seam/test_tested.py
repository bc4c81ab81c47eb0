"""A release newer than the newest one tested is told of once, by the command that checks it."""

from __future__ import annotations

import logging

import pytest

import alula
from alula.probes import Geometry, watch
from alula.seam import tested
from tests import zoo


@pytest.mark.parametrize(
    ("installed", "newer"),
    [
        ("5.24.0", False),
        ("5.24", False),
        ("5.23.7", False),
        ("5.24.0rc1", False),
        ("5.24.0.dev0", False),
        ("5.24.0+cu128", False),
        ("5.24.1", True),
        ("5.25.0.dev0", True),
        ("5.100.0", True),  # as text it would come before
        ("6.0.0a1", True),
    ],
)
def test_which_releases_are_newer(installed: str, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tested.TESTED, "transformers", "5.24.0")
    assert (tested.newer_than_tested("transformers", installed) == installed) is newer


@pytest.mark.parametrize("ahead", [("transformers",), ("transformers", "peft"), ()])
def test_one_warning_per_process(
    ahead: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in tested.TESTED:
        monkeypatch.setitem(tested.TESTED, name, "0.1.0" if name in ahead else "999.0")
    tested.tell_untested.cache_clear()
    with caplog.at_level(logging.WARNING, logger="alula"):
        for name in ("llama", "llava-qwen3"):
            model = zoo.build(name)
            with watch(model, [Geometry()]):
                alula.attach(model, alula.WingsConfig(rank=4))
    told = [record.getMessage() for record in caplog.records if "newer than" in record.getMessage()]
    assert len(told) == bool(ahead)
    assert all("make test-versions" in message and name in message for message in told for name in ahead)
    assert not any(name in message for message in told for name in set(tested.TESTED) - set(ahead))
