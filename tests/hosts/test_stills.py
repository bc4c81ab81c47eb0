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
from tokenizers import AddedToken
from transformers.utils import is_torchvision_available

import alula
from alula.data import Collator
from alula.data.samples import Sample
from alula.errors import AlulaError, HostError
from alula.hosts import load_host, save_host
from tests import zoo
from tests.auditing.conftest import QWEN_TEMPLATE
from tests.hosts import tiny

pytestmark = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")

VIDEOS = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4, "merge_size": 2, "min_frames": 4}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-VL as its makers save it: image and video settings in files of their own."""
    path = tmp_path_factory.mktemp(request.param)
    signs = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    signs |= {f"vision_{end}": f"<|vision_{end}|>" for end in ("start", "end")}
    tokenizer = tiny.tokenizer(None, extra_special_tokens=signs)
    tokenizer.add_tokens([AddedToken(f"<|vision_{end}|>", special=True) for end in ("start", "end")])
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(path)
    bounds = {"shortest_edge": 256, "longest_edge": 4096}
    hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=bounds).save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    model = zoo.build(request.param)
    model.resize_token_embeddings(len(tokenizer))
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{name.removesuffix('_pad')}_token_id"
        setattr(model.config, key, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    model.save_pretrained(path)
    return path


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
