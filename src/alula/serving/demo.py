"""What `alula serve --demo` shows: a small host that a package brings in parts, adapters of it, and what to ask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoProcessor

from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.evaluation import TaskItem, defaults_for, named_tasks
from alula.hosts import build_host, names, save_host

DEMO = "demo"
"""part of a model (the entry point group ``alula.models``) whose directory holds a connector and adapters"""
CONNECTOR, ADAPTER = "connector.safetensors", "adapter_config.json"
_QUESTIONS, _SEED = 32, 7
_EACH = 3
"""questions of a task that are offered, of one family each"""


@dataclass(frozen=True)
class Sample:
    """Something to ask.

    Attributes:
        title: of it, short.
        text: the question.
        images: PIL images that go with it.
    """

    title: str
    text: str
    images: Sequence[Any] = ()


def put_together(name: str, folder: Path) -> list[tuple[str, Path]]:
    """The demo of a model that a package brings: (name, directory) of a host and of the adapters on it.

    Args:
        name: of the model, such as ``fledgling``.
        folder: in which the host is written; it takes less than a second.

    Raises:
        HostError: the package is not installed, or brings no demo.
    """
    shipped = Path(names.resolve(name, DEMO))
    if not (shipped / CONNECTOR).is_file():
        raise HostError(f"{name!r} brings no demo", remedy="name a model instead: alula serve MODEL")
    host = build_host(name, name)
    connector = Anatomy.of(host.model).projector
    assert connector is not None
    connector.load_state_dict(load_file(shipped / CONNECTOR))
    save_host(host, folder / name)
    adapters = sorted(each.parent for each in shipped.glob(f"*/{ADAPTER}"))
    return [(name, folder / name), *((f"{name}+{each.name}", each) for each in adapters)]


@functools.cache
def samples(directory: Path) -> Sequence[Sample]:
    """What a model can be asked: held-out questions that come with it (`alula.evaluation.Defaults`).

    Args:
        directory: of the model.
    """
    processor = AutoProcessor.from_pretrained(directory)
    known = defaults_for(processor)
    if known is None:
        return []
    found: dict[str, TaskItem] = {}
    for task in named_tasks(known.tasks(frozenset({"image"})), n=_QUESTIONS, seed=_SEED):
        own: dict[str, TaskItem] = {}
        for item in task.items():
            if len(item.messages) == 1 and item.family not in found:
                own.setdefault(item.family, item)
        found |= dict(list(own.items())[:_EACH])
    return [_sample(item) for item in found.values()]


def _sample(item: TaskItem) -> Sample:
    content = item.messages[0]["content"]
    return Sample(
        item.family.replace("_", " "),
        " ".join(part["text"] for part in content if part["type"] == "text"),
        [part["image"].load() for part in content if part["type"] == "image"],
    )
