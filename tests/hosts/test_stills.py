"""Processors with a part for videos, where torchvision is not installed: images go through, videos are told why not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.utils import is_torchvision_available

import alula
from alula.data import Collator
from alula.data.samples import Sample
from alula.errors import AlulaError, HostError
from alula.hosts import load_host, save_host
from tests.hosts.qwen import VIDEOS, written

pytestmark = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp(request.param), request.param)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def batch(processor: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return dict(Collator(processor)([Sample("a", [{"role": "user", "content": content}, answer])]))


def test_images_go_through_and_videos_are_told_why_not(directory: Path) -> None:
    host = load_host(directory)
    given = batch(host.processor)
    expected = hf.Qwen2VLImageProcessorPil.from_pretrained(directory)(images=[picture()], return_tensors="pt")
    assert torch.equal(given["pixel_values"], expected["pixel_values"])
    given.pop("labels")
    with torch.no_grad():
        logits = host.model(**given).logits
    assert logits.isfinite().all()
    assert type(alula.load_model(directory).processor).__name__ == type(host.processor).__name__
    with pytest.raises(HostError, match="videos go through torchvision"):
        host.processor(text=["<|video_pad|>"], videos=[np.zeros((4, 32, 32, 3), np.uint8)])
    film = {"role": "user", "content": [{"type": "video", "video": np.zeros((4, 32, 32, 3), np.uint8)}]}
    with pytest.raises(AlulaError, match="torchvision"):
        Collator(host.processor)(
            [Sample("b", [film, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}])]
        )


def test_what_is_said_of_videos_is_saved_again(directory: Path, tmp_path: Path) -> None:
    host = load_host(directory)
    save_host(host, tmp_path / "host")
    said = json.loads((tmp_path / "host" / "processor_config.json").read_text())
    assert said["video_processor"] == VIDEOS
    assert said["processor_class"] == type(host.processor).__name__
    again = load_host(tmp_path / "host")
    assert again.processor.said_of_videos == VIDEOS
    assert torch.equal(batch(again.processor)["pixel_values"], batch(host.processor)["pixel_values"])


def test_it_goes_to_other_processes(directory: Path) -> None:
    processor = load_host(directory).processor
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert type(other) is type(processor)
        assert torch.equal(batch(other)["pixel_values"], batch(processor)["pixel_values"])
        assert other.said_of_videos == VIDEOS
