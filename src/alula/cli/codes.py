"""``alula codes``: discrete tokenizers of images and sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``codes fit``."""
    codes = typer.Typer(name="codes", help="Discrete tokenizers of images and sounds.", no_args_is_help=True)
    codes.callback()(_codes)
    codes.command()(fit)
    app.add_typer(codes)


def _codes() -> None:
    """Discrete tokenizers of images and sounds."""


def fit(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A recipe of codes (YAML).")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe. Repeatable.")
    ] = None,
) -> None:
    """Fit centroids, or train a VQ autoencoder, and write it as a directory of codes."""
    from rich.console import Console

    from alula.training.codes import fit_codes, load_codes_recipe

    console = Console(stderr=True, highlight=False)
    last = 0.0

    def told(step: int, loss: float) -> None:
        nonlocal last
        last = loss
        if (step + 1) % 100 == 0:
            console.print(f"[dim]step {step + 1}: error {loss:.4f}[/dim]")

    found = load_codes_recipe(recipe, override or ())
    made = fit_codes(found, told=told)
    error = f", error {last:.4f}" if last else ""
    Console(highlight=False).print(
        f"{made.size} codes of {made.kind}, {made.tokens_per_item} an item{error}: {found.output_dir}"
    )
