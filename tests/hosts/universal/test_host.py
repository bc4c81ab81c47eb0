"""A host with one encoder for all media: items in their places, words untouched, saved and loaded as any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from alula.anatomy import Anatomy, TowerParts
from alula.errors import AlulaError
from alula.grafts import WingsConfig, attach
from alula.hosts import Host, build_host, describe, load_host, save_host
from alula.hosts.universal import UniversalForConditionalGeneration, UniversalProcessor
from alula.loading import load_model
from alula.media import MEDIA
from alula.tokens import Modality, TokenMap
from tests.hosts import tiny
from tests.hosts.universal.making import ALL, TURNS, host, inputs, item, said

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def whole() -> Host:
    return host()


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@torch.no_grad()
def test_every_medium_takes_its_tokens_and_changes_the_answer(tower: str, whole: Host) -> None:
    made = whole if tower == "clip" else host(tower)
    model: Any = made.model
    assert isinstance(model, UniversalForConditionalGeneration)
    assert model.config.tokens_per_item == dict.fromkeys(ALL, 6)
    for medium in ALL:
        one, two = (inputs(made, [said("a", (medium, item(medium, seed)), "b?")]) for seed in (1, 2))
        assert int((one["input_ids"] == getattr(model.config, f"{medium}_token_id")).sum()) == 6
        assert one["mm_token_type_ids"].max() == MEDIA[medium].modality if "mm_token_type_ids" in one else True
        assert not torch.allclose(model(**one).logits[:, -1], model(**two).logits[:, -1])


@torch.no_grad()
def test_text_is_the_language_models_own() -> None:
    llm = tiny.decoder("qwen3")
    made = host("siglip", family="qwen3")
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = made.model(ids).logits, llm(ids).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)


@torch.no_grad()
def test_media_mixed_in_a_batch_are_as_alone(whole: Host) -> None:
    alone = [whole.model(**inputs(whole, [turn])).logits[0, -1] for turn in TURNS]
    for side in ("left", "right"):
        batch = inputs(whole, TURNS, side)
        last = batch["attention_mask"].cumsum(1).argmax(1)
        logits = whole.model(**batch).logits
        for number, expected in enumerate(alone):
            torch.testing.assert_close(logits[number, last[number]], expected, atol=2e-5, rtol=1e-4)


def test_cached_is_uncached_and_beams_keep_items_with_their_prompts(whole: Host) -> None:
    batch = inputs(whole, TURNS)
    cached = whole.model.generate(**batch, **GREEDY)
    assert torch.equal(cached, whole.model.generate(**batch, **GREEDY, use_cache=False))
    new = cached[:, batch["input_ids"].shape[1] :]
    assert not {getattr(whole.model.config, f"{m}_token_id") for m in ALL} & set(new.flatten().tolist())
    told = {"output_logits": True, "return_dict_in_generate": True}
    first = whole.model.generate(**batch, max_new_tokens=1, do_sample=False, num_beams=2, **told).logits[0]
    with torch.no_grad():
        expected = whole.model(**batch).logits[:, -1].repeat_interleave(2, dim=0)
    torch.testing.assert_close(first, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_of_every_step_are_those_without_a_cache(whole: Host) -> None:
    """The published cache is off by two from the second step on."""
    batch = inputs(whole, TURNS[:2])
    out = whole.model.generate(
        **batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    start = batch["input_ids"].shape[1]
    grown = {
        **{name: value for name, value in batch.items() if name not in ("mm_token_type_ids",)},
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], dim=1),
    }
    positions = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = whole.model(**grown, position_ids=positions).logits[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_saved_hosts_load_through_the_auto_classes(whole: Host, tmp_path) -> None:
    save_host(whole, tmp_path / "host")
    batch = inputs(whole, TURNS)
    expected = whole.model(**batch).logits
    for model, processor in (
        (
            AutoModelForImageTextToText.from_pretrained(tmp_path / "host"),
            AutoProcessor.from_pretrained(tmp_path / "host"),
        ),
        load_host(tmp_path / "host"),
        load_model(tmp_path / "host"),
    ):
        assert isinstance(processor, UniversalProcessor)
        again = inputs(Host(model, processor), TURNS)
        assert again.keys() == batch.keys()
        assert all(torch.equal(again[key], batch[key]) for key in batch)
        weights = model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())
        # weights mapped from a file lie otherwise in memory, and matrix kernels round by that
        torch.testing.assert_close(model.eval()(**again).logits, expected, atol=2e-5, rtol=1e-4)
    assert "tokens per" in str(describe(load_host(tmp_path / "host")))


@torch.no_grad()
def test_permuting_frames_changes_nothing(whole: Host) -> None:
    frames = inputs(whole, [said(("video", item("video")), "?")])["pixel_values_videos"]
    model: Any = whole.model.model
    one, back = (model.get_video_features(each).pooler_output[0] for each in (frames, frames.flip(1)))
    torch.testing.assert_close(one, back, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(
        one, model.get_video_features(frames[:, :1].expand_as(frames)).pooler_output[0], atol=1e-3
    )
    still = frames[:, :1].expand_as(frames)
    seen = model.get_video_features(still).last_hidden_state
    torch.testing.assert_close(seen, model.get_image_features(frames[:, 0]).last_hidden_state, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@torch.no_grad()
def test_tokens_pass_the_tower_as_its_own_patches_do(tower: str, whole: Host) -> None:
    made = whole if tower == "clip" else host(tower, ("image",))
    model: Any = made.model.model
    pixels = inputs(made, [said(("image", item("image")), "?")])["pixel_values"]
    parts = TowerParts.of(model.vision_tower)
    entered = model.vision_tower.embeddings(pixels)
    torch.testing.assert_close(
        parts.read(entered), model.get_image_features(pixels).last_hidden_state, atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_maps_with_their_picture_are_the_mean_of_both(whole: Host) -> None:
    model: Any = whole.model.model
    picture, depth = item("image", 3), item("depth", 4)
    turn = [{"role": "user", "content": [{"type": "depth", "depth": depth, "image": picture}]}]
    both = inputs(whole, [turn])["depth_values"]
    without = inputs(whole, [said(("depth", depth))])["depth_values"]
    assert both.shape == without.shape == (1, 2, 3, 32, 32)
    assert torch.equal(without[0, 0], without[0, 1])
    assert torch.equal(without[0, 1], both[0, 1])
    assert torch.equal(both[0, 0], inputs(whole, [said(("image", picture))])["pixel_values"][0])
    seen = [model.get_image_features(both[:, n]).last_hidden_state for n in (0, 1)]
    expected = (seen[0] + seen[1]) / 2
    torch.testing.assert_close(model.get_depth_features(both).last_hidden_state, expected, atol=1e-6, rtol=1e-5)
    beside = [{"role": "user", "content": [{"type": "normals", "normals": item("normals"), "image": picture}]}]
    with pytest.raises(ValueError, match="reads the map alone"):
        inputs(whole, [beside])


def test_depth_is_read_in_meters(whole: Host) -> None:
    flat = np.full((20, 20), 5.0, np.float32)
    flat[:10] = 0
    pixels = inputs(whole, [said(("depth", flat))])["depth_values"][0, 1]
    processor: Any = whole.processor.image_processor  # type: ignore[attr-defined]
    mean, deviation = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    shown = pixels * deviation + mean
    torch.testing.assert_close(shown[:, 20], torch.full((3, 32), 0.5))  # of ten meters
    torch.testing.assert_close(shown[:, 3], torch.zeros(3, 32))
    assert set(shown.round(decimals=4).flatten().tolist()) <= {0.0, -0.0, 0.5}  # nothing is mixed


def test_token_maps_know_media_and_items(whole: Host) -> None:
    batch = inputs(whole, TURNS)
    anatomy = Anatomy.of(whole.model)
    tokens = TokenMap.from_input_ids(batch["input_ids"], anatomy.placeholders, batch["attention_mask"])
    counts = anatomy.tokens_per_item(batch, tokens.modality)
    assert counts == [6] * 10
    tokens = TokenMap.from_modalities(tokens.modality, batch["attention_mask"], tokens_per_item=counts)
    assert [int(tokens.item[n].max()) + 1 for n in range(5)] == [1, 3, 0, 3, 3]
    assert [kind for kind in tokens.modality[4].unique_consecutive().tolist() if kind > 0] == [
        Modality.NORMALS,
        Modality.VIDEO,
        Modality.IMAGE,
    ]


def test_grafts_see_all_media_and_leave_words_alone() -> None:
    made = host("siglip", ("image", "points", "motion"))
    turns = [said(("points", item("points")), "a?"), said(("motion", item("motion")), "b?"), said("how many?")]
    batch, text = inputs(made, turns), inputs(made, turns[2:])
    with torch.no_grad():
        before, words = made.model(**batch).logits, made.model(**text).logits
    graft = attach(made.model, WingsConfig(rank=4))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.3)
        moved = (made.model(**batch).logits - before).abs().amax((1, 2))
        assert (moved[:2] > 1e-3).all()
        assert torch.equal(made.model(**text).logits, words)
    cached = made.model.generate(**batch, **GREEDY)
    assert torch.equal(cached, made.model.generate(**batch, **GREEDY, use_cache=False))
    graft.detach()
    with torch.no_grad():
        assert torch.equal(made.model(**batch).logits, before)


def test_every_part_takes_part_in_every_training_step(whole: Host) -> None:
    made = host("siglip", ("image", "audio", "response"))
    made.model.train()
    turns = [said(("audio", item("audio")), "?"), said(("image", item("image")), "?"), said("words")]
    for turn in turns:
        made.model.zero_grad()
        batch = inputs(made, [turn])
        made.model(**batch, labels=batch["input_ids"]).loss.backward()
        shown = {part["type"] for part in turn[0]["content"]} - {"text"}
        for name, module in made.model.model.multi_modal_projector.items():
            gradients = [parameter.grad for parameter in module.parameters()]
            assert all(gradient is not None for gradient in gradients)
            reached = any(bool(gradient.abs().max() > 0) for gradient in gradients if gradient is not None)
            assert reached == (name in shown or (name == "shared" and bool(shown)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "ears"}, "no encoder is called 'ears'"),
        ({"modalities": ["image"]}, "no meaning without a universal encoder"),
        ({"encoder": "universal", "modalities": ["image", "smell"]}, "reads no 'smell'"),
        ({"encoder": "universal", "modalities": ["audio"]}, "image is missing"),
        ({"encoder": "universal", "connector": "linear"}, "connector: has no meaning"),
        ({"encoder": "universal", "video": True}, "video: has no meaning"),
        ({"encoder": "universal", "connector_options": {"width": 8}}, "no option 'width'"),
        ({"encoder": "universal", "connector_options": {"router": "hard"}}, "no router is called 'hard'"),
        ({"encoder": "universal", "connector_options": {"heads": 5}}, "5 heads do not divide"),
        ({"encoder": "universal", "modality_options": {"motion": {"samples": 400}}}, "not among the modalities"),
        (
            {"encoder": "universal", "modalities": ["image", "motion"], "modality_options": {"motion": {"samples": 5}}},
            "longer than what it goes over",
        ),
        (
            {"encoder": "universal", "modalities": ["image", "points"], "modality_options": {"points": {"groups": 0}}},
            "at least 1, not 0",
        ),
        ({"encoder": "universal", "vision": tiny.TOWERS["dinov3"][0]}, "cannot be given other tokens"),
    ],
)
def test_impossible_hosts_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"vision": tiny.TOWERS["clip"][0], "connector_options": {"heads": 2}, **options}
    if "encoder" not in given or given["encoder"] != "universal":
        del given["connector_options"]
    with pytest.raises(AlulaError) as caught:
        build_host(tiny.decoder("llama"), tokenizer=tiny.tokenizer(), **given)
    assert message in f"{caught.value.where}: {caught.value.message}"


def test_wrong_items_are_named(whole: Host) -> None:
    for medium, wrong, message in (
        ("motion", np.zeros((2000, 6)), r"\(2000, 6\) given, this model takes 40 samples of 6 values \(2 s at 20 Hz\)"),
        ("response", np.zeros(7), "this model takes 20 voxels"),
        ("points", np.zeros((9, 3)), "x y z red green blue"),
        ("points", np.zeros((0, 6)), "a point cloud is empty"),
        ("points", np.full((9, 6), 200.0), "colors that are not in 0..1"),
        ("depth", np.full((4, 4), np.nan), "not finite"),
        ("depth", np.full((4, 4), -1.0), "0 is unknown"),
        ("depth", np.zeros((4, 4, 3)), r"\(height, width\) in meters"),
        ("normals", np.full((4, 4, 3), 2.0), "unit vectors"),
        ("normals", np.zeros((4, 4)), "x y z"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(whole, [said((medium, wrong), "?")])
    batch = inputs(whole, TURNS[3:4])
    with pytest.raises(ValueError, match=r"motion_values of size \(2, 39, 6\) given, this host takes \(items, 40, 6\)"):
        whole.model(**{**batch, "motion_values": batch["motion_values"][:, 1:]})
    with pytest.raises(ValueError, match="places for motion tokens"):
        whole.model(**{**batch, "motion_values": batch["motion_values"][:1]})
    with pytest.raises(ValueError, match="text holds 1 <points>, but there are 0 point clouds"):
        whole.processor(text=["<points>"])
    with pytest.raises(ValueError, match="points is a list of point clouds"):
        whole.processor(text=["<points>"], points=item("points"))
    assert "point_values" not in whole.processor(text=["a"], points=[])
    few = host("clip", ("image",))
    with pytest.raises(ValueError, match="takes image, not points"):
        few.processor(text=["a"], points=[item("points")])
    with pytest.raises(ValueError, match="this host takes image, not points"):
        few.model(batch["input_ids"], point_values=torch.zeros(1, 48, 6))
