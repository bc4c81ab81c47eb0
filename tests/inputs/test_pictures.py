"""The short way of pictures gives the processor's own bits, and is taken where it is known to."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from alula.inputs.pictures import Pictures

SIZES = [(64, 48), (48, 64), (31, 77), (40, 40), (17, 16), (16, 90), (33, 32), (1, 5), (120, 32), (57, 111)]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "crop of another shape": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 33, "width": 27}),
    "crop beyond the picture": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 24}),
    "siglip": SiglipImageProcessorPil(size={"height": 30, "width": 36}),
    "bilinear": SiglipImageProcessorPil(size={"height": 30, "width": 36}, resample=2),
    "other values": SiglipImageProcessorPil(
        size={"height": 30, "width": 30}, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.5, 0.7], rescale_factor=1 / 200
    ),
}


def _pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def _chats(images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
        for image in images
    ]


@pytest.mark.parametrize("name", PROCESSORS)
def test_values_are_the_processors_own(name: str) -> None:
    processor, images = PROCESSORS[name], _pictures(SIZES)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    for pictures in (short := Pictures(processor), pickle.loads(pickle.dumps(short))):
        found = pictures.resized(_chats(images))
        assert found is not None
        told, options = found
        resized = [message["content"][0]["image"] for chat in told for message in chat]
        made = processor(resized, return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(pictures.finished(made), expected)


@pytest.mark.parametrize(
    "processor",
    [
        None,
        Qwen2VLImageProcessorPil(),
        LlavaNextImageProcessorPil(),
        SiglipImageProcessorPil(do_rescale=False),
        SiglipImageProcessorPil(do_normalize=False),
    ],
    ids=str,
)
def test_others_are_left_alone(processor: Any) -> None:
    assert Pictures(processor).resized(_chats(_pictures([(40, 40)]))) is None


def test_what_is_no_picture_in_rgb_is_left_alone() -> None:
    pictures = Pictures(PROCESSORS["siglip"])
    assert pictures.resized(_chats([image.convert("L") for image in _pictures([(40, 40)])])) is None
    assert pictures.resized([[{"role": "user", "content": [{"type": "text", "text": "?"}]}]]) is None
    clip = {"type": "video", "video": np.zeros((2, 40, 40, 3), np.uint8)}
    assert pictures.resized([[{"role": "user", "content": [clip, {"type": "text", "text": "?"}]}]]) is None
