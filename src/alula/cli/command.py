"""The command line as it was typed, for records, reports and remedies."""

from __future__ import annotations

import shlex
import sys


def command_line(*options: str) -> str:
    """Return the command of this process as a shell takes it, ``options`` put before the verb."""
    return shlex.join(["alula", *options, *sys.argv[1:]])
