"""Microworld items as files in the two formats people keep such data in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alula.files import atomic_directory
from alula.microworld.items import Item


def export_jsonl(items: Iterable[Item], directory: str | os.PathLike[str]) -> Path:
    """Write chat messages, one JSON object a line, with PNG files beside them.

    The folder holds ``data.jsonl`` (keys ``id``, ``family``, ``split``, ``messages``; an image part names its file
    relative to the folder) and ``images/``. Nothing is found under ``directory`` before all of it is written.

    Returns:
        The path of ``data.jsonl``.
    """
    with atomic_directory(directory) as folder:
        (folder / "images").mkdir()
        with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
            for item in items:
                lines.write(json.dumps(_record(item, folder)) + "\n")
    return Path(directory) / "data.jsonl"


def _record(item: Item, folder: Path) -> dict[str, Any]:
    """One JSONL record; its pictures are written on the way."""
    images = 0
    messages = []
    for message in item.messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                name = f"images/{item.id}-{images}.png"
                images += 1
                part["image"].load().save(folder / name)
                part = {"type": "image", "image": name}
            content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"id": item.id, "family": item.family, "split": item.split, "messages": messages}


def export_llava(items: Iterable[Item], directory: str | os.PathLike[str]) -> Path:
    """Write the LLaVA conversation format with PNG files beside it.

    The folder holds ``data.json`` (a list of ``id``, ``image``, ``conversations``; ``image`` is a file name relative to
    ``images/``, a list of them where a dialogue has several, and absent where it has none) and ``images/``. Nothing is
    found under ``directory`` before all of it is written.

    Returns:
        The path of ``data.json``.
    """
    records = []
    with atomic_directory(directory) as folder:
        (folder / "images").mkdir()
        for item in items:
            names: list[str] = []
            conversations = []
            for message in item.messages:
                lines = []
                for part in message["content"]:
                    if part["type"] == "text":
                        lines.append(part["text"])
                        continue
                    names.append(f"{item.id}-{len(names)}.png")
                    part["image"].load().save(folder / "images" / names[-1])
                    lines.append("<image>")
                conversations.append(
                    {"from": "human" if message["role"] == "user" else "gpt", "value": "\n".join(lines)}
                )
            record: dict[str, Any] = {"id": item.id, "conversations": conversations}
            if names:
                record["image"] = names[0] if len(names) == 1 else names
            records.append(record)
        (folder / "data.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return Path(directory) / "data.json"
