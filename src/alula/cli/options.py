"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Variable for the chat template, such as enable_thinking=false; repeatable.",
    ),
]
