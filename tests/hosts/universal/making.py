"""Tiny universal hosts, and items of every medium for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from alula.hosts import Host, build_host
from alula.media import MEDIA
from tests.hosts import tiny

ALL = tuple(MEDIA)
PROJECTION = {"experts": 3, "depth": 2, "heads": 2, "modality_tokens": 4, "feedforward": 32}
SIZES: dict[str, dict[str, Any]] = {
    "video": {"frames": 3},
    "audio": {"bins": 32, "moments": 64},
    "points": {"points": 48, "groups": 6, "neighbors": 4},
    "depth": {"with_image": 1},
    "motion": {"samples": 40, "rate": 20},
    "response": {"voxels": 20, "parts": 3},
}


def host(tower: str = "clip", modalities: tuple[str, ...] = ALL, family: str = "llama", **options: Any) -> Host:
    return build_host(
        tiny.decoder(family, tied=family == "llama"),
        tiny.TOWERS[tower][0],
        tokenizer=tiny.tokenizer(),
        encoder="universal",
        modalities=modalities,
        connector_options={**PROJECTION, **options},
        modality_options={name: SIZES[name] for name in modalities if name in SIZES},
    )


def item(medium: str, seed: int = 0) -> Any:
    """An item as its reader hands it over."""
    draw = np.random.default_rng(seed)
    match medium:
        case "image":
            return Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        case "video":
            return draw.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
        case "audio":
            return (0.3 * draw.standard_normal(8000)).astype(np.float32)
        case "points":
            return np.concatenate([draw.normal(size=(60, 3)), draw.random((60, 3))], axis=1).astype(np.float32)
        case "depth":
            return draw.uniform(0.5, 9, (24, 30)).astype(np.float32)
        case "normals":
            made = draw.normal(size=(24, 30, 3))
            return (made / np.linalg.norm(made, axis=-1, keepdims=True)).astype(np.float32)
        case "motion":
            return draw.normal(size=(40, 6)).astype(np.float32)
        case "response":
            return draw.normal(size=20).astype(np.float32)
    raise ValueError(medium)


def said(*parts: Any) -> list[dict[str, Any]]:
    """A user turn; strings are text, (medium, item) are media."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], p[0]: p[1]} for p in parts]
    return [{"role": "user", "content": content}]


def inputs(host: Host, turns: list[Any], side: str = "left") -> dict[str, Any]:
    tokenizer: Any = host.processor.tokenizer  # type: ignore[attr-defined]
    tokenizer.padding_side = side
    made: Any = host.processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )  # fmt: skip
    tokenizer.padding_side = "left"
    return dict(made)


TURNS = [
    said(("points", item("points", 1)), "what do you see?"),
    said("first", ("audio", item("audio", 2)), "and", ("depth", item("depth", 3)), ("image", item("image", 4)), "of?"),
    said("how many green triangles are there?"),
    said(("motion", item("motion", 5)), ("motion", item("motion", 6)), ("response", item("response", 7)), "two words"),
    said(("normals", item("normals", 8)), ("video", item("video", 9)), ("image", item("image", 10)), "answer"),
]
"""Five prompts: media of all kinds mixed, several of one, none."""
