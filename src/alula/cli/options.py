"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Template = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="What the chat template is told, such as enable_thinking=false; may be given several times.",
    ),
]
