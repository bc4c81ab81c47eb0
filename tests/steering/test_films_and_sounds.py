"""Frames of films and seconds of sounds: what is changed there is what their tokens are found to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alula.anatomy import Anatomy
from alula.steering import Box, Frames, Prompt, Seconds, Whole
from alula.steering.patches import edges_of_sound
from tests import media_hosts, zoo
from tests.hosts import tiny
from tests.hosts.test_multimodal import host, inputs, said
from tests.steering.test_regions import local


def film(frames: int = 16) -> np.ndarray:
    return np.full((frames, 32, 32, 3), 120, dtype=np.uint8)


def sound(seconds: float = 0.5) -> np.ndarray:
    return (0.3 * np.random.default_rng(0).standard_normal(int(16000 * seconds))).astype(np.float32)


def test_frames_of_a_film() -> None:
    """Of sixteen frames the host takes eight, each of four tokens."""
    made = host("mlp2x_gelu")
    model, first = local(made.model), film()
    second = first.copy()
    second[6:10, 16:, :16] = 250
    chats = [said(("video", each), "what is it?") for each in (first, second)]
    told = [inputs(made, [chat]) for chat in chats]
    with torch.no_grad():
        before, after = (
            torch.cat(list(model.model.get_video_features(each["pixel_values_videos"]).pooler_output)) for each in told
        )
    changed = (after - before).abs().amax(dim=-1) > 1e-4
    prompt = Prompt(model, made.processor, told[0], chats[0])
    marks = prompt.marks(regions=[Frames(6, 10, inside=Box(0, 16, 16, 32))])[0]
    holds = told[0]["input_ids"][0] == prompt.placeholders["video"]
    assert not marks[~holds].any()
    assert torch.equal(marks[holds] > 0, changed)
    assert 0 < changed.sum() < len(changed) / 8
    assert prompt.marks(regions=[Frames(6, 10)]).sum() == len(changed) / 4
    assert prompt.marks(regions=[Whole("video")]).sum() == len(changed)


def test_films_of_qwen() -> None:
    """Two frames to a step, four patches to a token; the second film of two, in the second sample of two."""
    model = local(zoo.build("qwen2_5_vl"))
    vision = model.config.vision_config
    grid = torch.tensor([[2, 4, 4], [1, 4, 4], [3, 4, 6]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    # rows of patches of the last film: steps, then blocks of two by two. Step 1, the upper left two blocks
    last = other[-72:].view(3, 2, 3, 4, 96)
    last[1, 0, :2] += 1.0
    with torch.no_grad():
        one, two = (model.model.get_video_features(each, grid).pooler_output[-1] for each in (pixels, other))
    changed = (one - two).abs().amax(dim=-1) > 1e-4
    films = [
        [np.zeros((4, 16, 16, 3), np.uint8)],
        [np.zeros((2, 16, 16, 3), np.uint8), np.zeros((5, 32, 48, 3), np.uint8)],
    ]
    chats = [[{"role": "user", "content": [{"type": "video", "video": each} for each in mine]}] for mine in films]
    rows = [[1, 57, *[59] * 8, 58, *[2] * 13], [57, *[59] * 4, 58, 57, *[59] * 18, 58]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [zoo.PAD] * (width - len(row)) for row in rows])
    given = {"input_ids": ids, "attention_mask": (ids != zoo.PAD).long(), "video_grid_thw": grid}
    given |= {"pixel_values_videos": pixels, "mm_token_type_ids": 2 * (ids == 59)}
    assert vision.temporal_patch_size == vision.spatial_merge_size == 2
    prompt = Prompt(model, tiny.tokenizer(), given, chats)
    marks = prompt.marks(regions=[[Whole("video")], [Frames(2, 4, film=1, inside=Box(0, 0, 32, 16))]])
    assert torch.equal(marks[1][ids[1] == 59][4:] > 0, changed)
    assert not marks[1][ids[1] == 59][:4].any()
    assert marks[0].sum() == 8
    assert changed.sum() == 2


def test_seconds_of_a_sound() -> None:
    """A spectrogram transformer: moments of all frequencies."""
    made = host("mlp2x_gelu")
    chat = said(("audio", sound()), "what is it?")
    told = inputs(made, [chat])
    model = local_ears(made.model)
    other = told["input_features"].clone()
    lasts = made.model.config.audio_config.max_length / 100
    columns = round(0.2 * 100)
    other[:, :columns] += 3.0
    with torch.no_grad():
        before, after = (
            model.model.get_audio_features(each).pooler_output[0] for each in (told["input_features"], other)
        )
    changed = (after - before).abs().amax(dim=-1) > 1e-4
    prompt = Prompt(model, made.processor, told, chat)
    holds = told["input_ids"][0] == prompt.placeholders["audio"]
    marks = prompt.marks(regions=[Seconds(0, 0.2, share=1e-6)])[0]
    assert lasts > 0.2
    assert not marks[~holds].any()
    assert torch.equal(marks[holds] > 0, changed)
    assert changed.tolist() == [True, True, False, False]


def local_ears(model: Any) -> Any:
    for name, module in model.model.audio_tower.named_modules():
        if name.endswith(("attention.output.dense", "o_proj", "out_proj")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def heard(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(tokens, d) of one sound."""
    if not hasattr(model.model, "get_audio_features"):
        return model.model.audio_tower(inputs["input_features"]).last_hidden_state[0]
    found = model.model.get_audio_features(**inputs).pooler_output
    return (found if isinstance(found, Tensor) else torch.cat(list(found))).flatten(0, -2)


@pytest.mark.parametrize(("kind", "step"), [("qwen2_audio", 0.04), ("audioflamingo3", 0.04), ("voxtral", 0.08)])
def test_strides_of_whisper_like_towers(kind: str, step: float) -> None:
    """Frames are of 10 ms: a frame that is changed reaches the tokens whose seconds hold it, and their neighbors (the
    convolutions look one frame further)."""
    made = media_hosts.HOSTS[kind]()
    model = made.model
    for name, module in model.model.audio_tower.named_modules():
        if name.endswith("out_proj"):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    given = {name: value[-1:] for name, value in made.inputs.items()}
    other = dict(given)
    other["input_features"] = given["input_features"].clone()
    other["input_features"][..., 12:16] += 3.0  # 0.12 to 0.16 seconds
    with torch.no_grad():
        one, two = (heard(model, each) for each in (given, other))
    changed = ((one - two).abs().amax(dim=-1).flatten() > 1e-5).nonzero()[:, 0].tolist()
    edges = edges_of_sound(Anatomy.of(model), len(one) * step, len(one))
    inside = [place for place, (start, stop) in enumerate(edges) if start < 0.16 and stop > 0.12]
    assert set(inside) <= set(changed) <= {place + k for place in inside for k in (-1, 0, 1)}
