"""Options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Variable for the chat template, such as enable_thinking=false; repeatable.",
    ),
]

ITEMS = ("--items", "-n")
"""How many questions, records or conversations are taken, in every command that takes some."""
EARLIER_ITEMS = (*ITEMS, "--n")
"""With the name that some commands had for it, which command lines that were written down go on with."""

Policies = Annotated[
    Path | None,
    typer.Option(
        "--policies",
        metavar="FILE",
        dir_okay=False,
        exists=True,
        help="Policies for the model, in a file that save_policies wrote. (default: those it was saved with)",
    ),
]

BankDirectory = Annotated[
    Path | None,
    typer.Option(
        "--bank",
        metavar="DIRECTORY",
        exists=True,
        file_okay=False,
        help="Put demonstrations of a bank that `alula bank` filled for this model before the questions.",
    ),
]

Shots = Annotated[
    int | None,
    typer.Option("--shots", min=1, help="How many demonstrations of the bank, drawn by --seed. (default: all)"),
]

_LONGEST = 120  # bytes of a directory's name; file systems take 255


def output_of(command: str, model: str) -> Path:
    """Where a command writes what it finds out about a model, unless told otherwise: a directory of the model's own, so
    that two models in a row do not meet in one.

    ``runs/digits/final`` has ``runs/COMMAND/digits-final``, ``org/model`` has ``runs/COMMAND/org-model``.
    """
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    told = parts[1:] if len(parts) > 1 and parts[0] == "runs" else parts
    name = re.sub(r"[^\w.-]+", "-", "-".join(told)).encode()[-_LONGEST:].decode(errors="ignore").strip(".-")
    return Path("runs", command, name or "model")
