"""What a run ran on: versions, machine, commit, command."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from alula._version import __version__
from alula.files import read_json, write_json

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")


def describe_environment(processes: int, seeds: dict[str, int]) -> dict[str, Any]:
    """Everything about this session that can change a result and is not in the recipe."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seeds": seeds,
        "processes": processes,
        "versions": {
            "alula": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "git": _git(Path(__file__).parents[1]),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def readable_environment() -> dict[str, str]:
    """Versions, commit and machine as texts, for records that people read."""
    facts = describe_environment(processes=1, seeds={})
    machine, git = facts["machine"], facts["git"]
    return {
        **{name: str(version) for name, version in facts["versions"].items()},
        "commit": "not a checkout" if git is None else f"{git['commit']}{' with changes' if git['changed'] else ''}",
        "machine": f"{machine['platform']}, {machine['cores']} cores",
        "accelerators": ", ".join(machine["accelerators"]) or "none",
    }


def append_session(path: Path, session: dict[str, Any]) -> None:
    """Add ``session`` to the sessions on file."""
    sessions = read_json(path)["sessions"] if path.exists() else []
    write_json(path, {"sessions": [*sessions, session]})


@functools.cache  # what was imported stays what it was, whatever becomes of the checkout
def _git(directory: Path) -> dict[str, Any] | None:
    """Commit of the checkout alula runs from, and whether it was changed; None for an installed package."""

    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
