"""Where commands write what they find out about a model, unless told otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from alula.cli import app as cli
from alula.errors import UsageError

COMMANDS = {
    "audit": "alula.auditing.audit",
    "compress --sparsity 0.5": "alula.compressing.compress",
    "eval": "alula.evaluation.run_session",
    "speed": "alula.speed.measure",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/digits/final", "digits-final"),
        ("my-wings/", "my-wings"),
        ("org/model", "org-model"),
        ("../runs/one", "one"),
        ("runs", "runs"),
        ("/data/a model\n*", "data-a-model"),
        (".", "model"),
        ("x/" * 500 + "final", "x-" * 57 + "final"),
        ("runs/模型/final", "模型-final"),
        ("型" * 200 + "/x", "型" * 39 + "-x"),
    ],
)
def test_each_model_has_a_directory(monkeypatch: pytest.MonkeyPatch, command: str, model: str, name: str) -> None:
    asked: list[Path] = []

    def watched(*arguments: Any, **options: Any) -> None:
        asked.append(options["output"] if "output" in options else arguments[0].output)
        raise UsageError("stops here")

    monkeypatch.setattr(COMMANDS[command], watched)
    monkeypatch.setattr(sys, "argv", ["alula", *command.split(), model])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked == [Path("runs", command.split()[0], name)]
