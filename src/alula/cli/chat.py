"""``alula chat``: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from alula.bounds import MAX_SEED
from alula.cli.options import BankDirectory, Policies, Shots, Template


def register(app: typer.Typer) -> None:
    """Add ``chat``."""
    app.command()(chat)


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="A model or adapter directory, a hub id, or a name that a package brings, such as 'fledgling'."
        ),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy; above 0: sample.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="RNG seed for sampling.")] = 0,
    template: Template = None,
    policies: Policies = None,
    bank: BankDirectory = None,
    shots: Shots = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
) -> None:
    """Chat with a model in the terminal, with images, video and audio.

    Type a question, or /image (/video, /audio) PATH and then a question; /help lists the commands. Piped input: every
    line is a question or a command; standard output gets the answers alone.

    Exit code 0: all lines done; 1: one failed, or the model cannot be loaded; 2: wrong usage.
    """
    from alula.chat_template import TemplateSettings
    from alula.demonstrations import shots_in
    from alula.errors import UsageError
    from alula.hosts.decoding import Decoding
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.serving import Conversation, Terminal

    if shots is not None and bank is None:
        raise UsageError("shots are taken from a bank", where="--shots", remedy="add --bank DIRECTORY")
    decoding, settings = Decoding.at(temperature, seed), TemplateSettings.parse(template or ())
    with Console(stderr=True).status(f"loading {model}"):
        loaded = load_model(model, dtype=dtype_named(dtype), device=device_named(device), policies=policies)
    shown = [] if bank is None else shots_in(bank, *loaded, shots, seed=seed, template=settings)
    conversation = Conversation(*loaded, decoding, max_new_tokens=max_new_tokens, template=settings, shots=shown)
    conversation.instruct(system)
    terminal = Terminal(conversation)
    failures = terminal.run()
    if failures and not terminal.interactive:
        raise typer.Exit(1)
