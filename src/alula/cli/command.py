"""The command line as it was typed, for records, reports and remedies."""

from __future__ import annotations

import shlex
import sys


def command_line(*options: str) -> str:
    """Return the command of this process as a shell takes it, ``options`` put before the verb."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m PACKAGE`
    module = "alula" if spec is None else spec.name.removesuffix(".__main__")
    program = ["alula"] if module == "alula" or "." in module else ["python", "-m", module]
    return shlex.join([*program, *options, *sys.argv[1:]])
