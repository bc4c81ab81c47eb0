"""Microworld items as files in the two formats people keep such data in."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alula.errors import UsageError
from alula.files import atomic_directory
from alula_fledgling.microworld.films import FRAME_MS, FilmClip
from alula_fledgling.microworld.items import Item
from alula_fledgling.microworld.reliefs import Cloud, DepthMap
from alula_fledgling.microworld.rides import Recording
from alula_fledgling.microworld.sounds import SoundClip


def export_jsonl(items: Iterable[Item], directory: str | os.PathLike[str]) -> Path:
    """Write chat messages, one JSON object a line, with their media as files beside them.

    The folder holds ``data.jsonl`` (keys ``id``, ``family``, ``split``, ``messages``; a part of media names its file
    relative to the folder) and, where there are any, ``images/`` (PNG), ``films/`` (lossless animated WebP),
    ``sounds/`` (16-bit WAV), ``clouds/`` (PLY), ``depth/`` (16-bit PNG in millimeters), ``motion/`` (CSV),
    ``normals/`` and ``responses/`` (NPY). Nothing is found under ``directory`` before all of it is written.

    Returns:
        The path of ``data.jsonl``.
    """
    with atomic_directory(directory) as folder, (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        for item in items:
            lines.write(json.dumps(_record(item, folder)) + "\n")
    return Path(directory) / "data.jsonl"


def _record(item: Item, folder: Path) -> dict[str, Any]:
    """One JSONL record; its media are written on the way."""
    written = 0
    messages = []
    for message in item.messages:
        content = []
        for part in message["content"]:
            medium = part["type"]
            if medium != "text":
                held = [key for key in (medium, "image") if key in part]  # beside a map its picture
                part = {"type": medium, **_OPTIONS.get(medium, {}), **{key: part[key] for key in held}}
                for key in dict.fromkeys(held):
                    place, suffix, save = _FILES[key]
                    name = f"{place}/{item.id}-{written}.{suffix}"
                    written += 1
                    (folder / place).mkdir(exist_ok=True)
                    save(part[key], folder / name)
                    part[key] = name
            content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"id": item.id, "family": item.family, "split": item.split, "messages": messages}


def _save_image(image: Any, path: Path) -> None:
    image.load().save(path)


def save_film(clip: FilmClip, path: Path) -> None:
    """Write a film as an animated WebP that gives back every pixel."""
    first, *others = map(Image.fromarray, clip.load())
    first.save(path, save_all=True, append_images=others, duration=FRAME_MS, loop=0, lossless=True, exact=True)


def save_sound(clip: SoundClip, path: Path) -> None:
    """Write a sound as 16-bit mono WAV."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.rate)
        file.writeframes(clip.load().astype("<i2").tobytes())


def save_cloud(clip: Cloud, path: Path) -> None:
    """Write points as binary PLY, colors in 8 bits."""
    points = clip.load()
    kinds = [*((axis, "<f4") for axis in "xyz"), *((name, "u1") for name in ("red", "green", "blue"))]
    rows = np.empty(len(points), kinds)
    for number, (name, _) in enumerate(kinds):
        rows[name] = points[:, number] if number < 3 else np.rint(points[:, number] * 255)
    told = [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in kinds]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *told, "end_header"]
    path.write_bytes("".join(f"{line}\n" for line in head).encode() + rows.tobytes())


def save_depth(clip: DepthMap, path: Path) -> None:
    """Write depth as 16-bit PNG, in millimeters."""
    Image.fromarray(np.rint(clip.load() * 1000).astype(np.uint16)).save(path)


def save_recording(clip: Recording, path: Path) -> None:
    """Write motion as CSV whose first line says the units."""
    names = ["t (s)", *(f"a{axis} (m/s^2)" for axis in "xyz"), *(f"g{axis} (rad/s)" for axis in "xyz")]
    rows = (f"{number / clip.rate!r},{','.join(map(str, row))}" for number, row in enumerate(clip.load()))
    path.write_text("\n".join([",".join(names), *rows]) + "\n", encoding="utf-8")


def _save_array(clip: Any, path: Path) -> None:
    np.save(path, clip.load())


_OPTIONS = {"depth": {"unit": "mm"}}
"""Medium -> what its files leave open, which stands in the part"""

_FILES: dict[str, tuple[str, str, Callable[[Any, Path], None]]] = {
    "image": ("images", "png", _save_image),
    "video": ("films", "webp", save_film),
    "audio": ("sounds", "wav", save_sound),
    "points": ("clouds", "ply", save_cloud),
    "depth": ("depth", "png", save_depth),
    "normals": ("normals", "npy", _save_array),
    "motion": ("motion", "csv", save_recording),
    "response": ("responses", "npy", _save_array),
}
"""Medium -> folder, suffix, and how it is written."""


def export_llava(items: Iterable[Item], directory: str | os.PathLike[str]) -> Path:
    """Write the LLaVA conversation format with PNG files beside it.

    The folder holds ``data.json`` (a list of ``id``, ``image``, ``conversations``; ``image`` is a file name relative to
    ``images/``, a list of them where a dialogue has several, and absent where it has none) and ``images/``. Nothing is
    found under ``directory`` before all of it is written.

    Returns:
        The path of ``data.json``.

    Raises:
        UsageError: an item with a film or a sound.
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
                    if part["type"] != "image":
                        raise UsageError(
                            f"the LLaVA format has no place for {part['type']} (item {item.id})",
                            remedy="export as jsonl",
                        )
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
