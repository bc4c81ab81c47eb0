"""Hosts for films and sounds: rows in their places, words untouched, saved and loaded by the Auto classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    ASTConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    CLIPVisionConfig,
)

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.grafts import WingsConfig, attach
from alula.hosts import Host, build_host, describe, load_host, save_host
from alula.hosts.multimodal import AlulaForConditionalGeneration, AlulaProcessor, ConnectorShape
from alula.hosts.multimodal.connectors import Connector, Queries
from alula.loading import load_model
from alula.tokens import Modality, TokenMap
from tests.hosts import tiny

EARS = ASTConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_mel_bins=32,
    max_length=64,
    patch_size=16,
    frequency_stride=16,
    time_stride=16,
)
EARS_FOR_MICROWORLD = ASTConfig(**{**EARS.to_dict(), "max_length": 128})
SMALL = {"num_queries": 3, "width": 16, "layers": 2, "heads": 2, "feedforward": 24}
OPTIONS = {"queries": SMALL}
ROWS = {
    "queries": {"image": 3, "video": 3, "audio": 3},
    "mlp2x_gelu": {"image": 16, "video": 32, "audio": 4},
    "linear": {"image": 16, "video": 32, "audio": 4},
}


def host(connector: str = "queries", *, family: str = "llama", shared: bool = False, **options) -> Host:
    return build_host(
        tiny.decoder(family, tied=family == "llama"),
        tiny.TOWERS["siglip"][0],
        connector,
        tokenizer=tiny.tokenizer(),
        **{"audio": EARS, "video": True, "connector_options": OPTIONS.get(connector), **options},
        shared=shared,
    )


@pytest.fixture(scope="module")
def queries() -> Host:
    return host()


def film(seed: int = 0, frames: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)


def sound(seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(8000)).astype(np.float32)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(film(seed, 1)[0])


def said(*parts) -> list[dict]:
    """A user turn; strings are text, (kind, value) are media."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], p[0]: p[1]} for p in parts]
    return [{"role": "user", "content": content}]


TURNS = [
    said(("video", film(1)), "what do you see?"),
    said("first", ("audio", sound(2)), "and", ("image", picture(3)), "left of", ("video", film(4)), "of lines?"),
    said("how many green triangles are there?"),
    said(("audio", sound(5)), ("audio", sound(6)), "two words"),
]


def inputs(host: Host, turns: list, side: str = "left") -> dict:
    host.processor.tokenizer.padding_side = side
    return dict(
        host.processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("connector", ROWS)
def test_every_medium_takes_its_rows_and_changes_the_answer(connector: str, shared: bool) -> None:
    made = host(connector, shared=shared)
    assert isinstance(made.model, AlulaForConditionalGeneration)
    assert made.model.config.tokens_per_item == ROWS[connector]
    for kind, value, other in (
        ("image", picture(1), picture(2)),
        ("video", film(1), film(2)),
        ("audio", sound(1), sound(2)),
    ):
        batch, changed = (inputs(made, [said("a", (kind, v), "b?")]) for v in (value, other))
        token = getattr(made.model.config, f"{kind}_token_id")
        assert int((batch["input_ids"] == token).sum()) == ROWS[connector][kind]
        with torch.no_grad():
            one, two = made.model(**batch).logits, made.model(**changed).logits
        assert not torch.allclose(one[:, -1], two[:, -1])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_text_is_the_language_models_own(family: str) -> None:
    llm = tiny.decoder(family)
    made = build_host(
        llm,
        tiny.TOWERS["clip"][0],
        "queries",
        tokenizer=tiny.tokenizer(),
        audio=EARS,
        video=True,
        connector_options=SMALL,
    )
    ids = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        ours, theirs = made.model(ids, attention_mask=mask).logits, llm(ids, attention_mask=mask).logits
    assert torch.equal(ours[..., : theirs.shape[-1]], theirs)


def test_batches_and_padding_change_nothing(queries: Host) -> None:
    alone = [queries.model(**inputs(queries, [turn])).logits[0, -1] for turn in TURNS]
    for side in ("left", "right"):
        batch = inputs(queries, TURNS, side)
        logits = queries.model(**batch).logits
        last = batch["attention_mask"].cumsum(1).argmax(1)
        for number, expected in enumerate(alone):
            torch.testing.assert_close(logits[number, last[number]], expected, atol=2e-5, rtol=1e-4)
    queries.processor.tokenizer.padding_side = "left"


def test_generation_with_and_without_cache(queries: Host) -> None:
    batch = inputs(queries, TURNS)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = queries.model.generate(**batch, **options)
    assert torch.equal(cached, queries.model.generate(**batch, **options, use_cache=False))
    beams = queries.model.generate(**batch, **options, num_beams=2)
    assert beams.shape[0] == len(TURNS)
    first = queries.model.generate(
        **batch, max_new_tokens=1, num_beams=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    # two sounds of one prompt: each stays in its place in every beam
    expected = queries.model(**batch).logits[:, -1].repeat_interleave(2, dim=0)
    torch.testing.assert_close(first, expected, atol=2e-5, rtol=1e-4)
    new = cached[:, batch["input_ids"].shape[1] :]
    placeholders = {getattr(queries.model.config, f"{kind}_token_id") for kind in ROWS["queries"]}
    assert not placeholders & set(new.flatten().tolist())


def test_directories_of_earlier_versions_keep_their_tokens_per_item(queries: Host, tmp_path) -> None:
    save_host(queries, tmp_path / "host")
    for file, then in (("config.json", "rows_per_item"), ("processor_config.json", "rows")):
        facts = json.loads((tmp_path / "host" / file).read_text())
        facts[then] = facts.pop("tokens_per_item")
        (tmp_path / "host" / file).write_text(json.dumps(facts))
    loaded = load_host(tmp_path / "host")
    assert loaded.model.config.tokens_per_item == queries.model.config.tokens_per_item
    assert loaded.processor.tokens_per_item == queries.processor.tokens_per_item
    assert "rows_per_item" not in loaded.model.config.to_dict()


def test_saved_hosts_load_through_the_auto_classes(queries: Host, tmp_path) -> None:
    save_host(queries, tmp_path / "host")
    batch = inputs(queries, TURNS)
    for model, processor in (
        (
            AutoModelForImageTextToText.from_pretrained(tmp_path / "host"),
            AutoProcessor.from_pretrained(tmp_path / "host"),
        ),
        load_host(tmp_path / "host"),
        load_model(tmp_path / "host"),
    ):
        assert isinstance(processor, AlulaProcessor)
        again = inputs(Host(model, processor), TURNS)
        assert again.keys() == batch.keys()
        assert all(torch.equal(again[key], batch[key]) for key in batch)
        assert torch.equal(model.eval()(**again).logits, queries.model(**batch).logits)
    assert "tokens per image" in str(describe(load_host(tmp_path / "host")))


def test_order_of_frames_matters_and_equal_films_do_not_differ() -> None:
    for connector in ROWS:
        made = host(connector)
        frames = film(7)
        one, back, same = (
            made.model.model.get_video_features(
                inputs(made, [said(("video", shown), "?")])["pixel_values_videos"]
            ).pooler_output[0]
            for shown in (frames, frames[::-1].copy(), frames.copy())
        )
        assert torch.equal(one, same)
        assert not torch.allclose(one, back, atol=1e-3)


def test_films_of_any_length_become_eight_frames(queries: Host) -> None:
    short, long = film(1, 2), film(1, 80)
    made = inputs(queries, [said(("video", short), "?"), said(("video", long), "?")])["pixel_values_videos"]
    assert made.shape == (2, 8, 3, 32, 32)
    exact = inputs(queries, [said(("video", long[5::10]), "?")])["pixel_values_videos"]
    assert torch.equal(made[1], exact[0])
    assert torch.equal(made[0, 0], made[0, 3])
    assert not torch.equal(made[0, 3], made[0, 4])


def test_frames_and_pictures_pass_the_same_tower() -> None:
    """A film of one repeated picture, with the frames' vectors at zero, is the pictures' own rows over again."""
    made = host("linear", shared=True)
    made.model.config.frame_side = 0
    nn.init.zeros_(made.model.model.multi_modal_projector.of("video").times)
    batch = inputs(made, [said(("image", picture(1)), "?")])
    pixels = batch["pixel_values"]
    image = made.model.model.get_image_features(pixels).pooler_output[0]
    rows = made.model.model.get_video_features(pixels[None].expand(1, 8, -1, -1, -1)).pooler_output[0]
    torch.testing.assert_close(rows, image.repeat(8, 1))


def test_row_maps_know_kinds_and_items(queries: Host) -> None:
    batch = inputs(queries, TURNS)
    anatomy = Anatomy.of(queries.model)
    rows = TokenMap.from_input_ids(batch["input_ids"], anatomy.placeholders, batch["attention_mask"])
    counts = anatomy.tokens_per_item(batch, rows.modality)
    assert counts == [3, 3, 3, 3, 3, 3]
    rows = TokenMap.from_modalities(rows.modality, batch["attention_mask"], tokens_per_item=counts)
    assert [int(rows.item[n].max()) + 1 for n in range(4)] == [1, 3, 0, 2]
    assert [kind for kind in rows.modality[1].unique_consecutive().tolist() if kind > 0] == [
        Modality.AUDIO,
        Modality.IMAGE,
        Modality.VIDEO,
    ]
    assert set(rows.modality[3].tolist()) == {Modality.PADDING, Modality.TEXT, Modality.AUDIO}


def test_grafts_see_films_and_sounds_and_leave_words_alone() -> None:
    made = host()
    batch, text = inputs(made, TURNS), inputs(made, TURNS[2:3])
    before, words = made.model(**batch).logits, made.model(**text).logits
    graft = attach(made.model, WingsConfig(rank=4))
    torch.testing.assert_close(made.model(**batch).logits, before, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.3)
    moved = (made.model(**batch).logits - before).abs().amax((1, 2))
    assert (moved[[0, 1, 3]] > 1e-3).all()
    assert torch.equal(made.model(**text).logits, words)
    cached = made.model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, made.model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False))
    graft.detach()
    assert torch.equal(made.model(**batch).logits, before)


def test_every_connector_takes_part_in_every_training_step() -> None:
    made = host()
    made.model.train()
    for turn in TURNS:
        made.model.zero_grad()
        batch = inputs(made, [turn])
        made.model(**batch, labels=batch["input_ids"]).loss.backward()
        shown = {part["type"] for part in turn[0]["content"]}
        for medium, connector in made.model.model.multi_modal_projector.items():
            gradients = [parameter.grad for parameter in connector.parameters()]
            assert all(gradient is not None for gradient in gradients)
            assert any(gradient.abs().max() > 0 for gradient in gradients) == (medium in shown)


# -- the connector of IMA, against PyTorch's own transformer encoder --------------------------------------------------


def test_queries_are_self_attention_over_rows_and_queries() -> None:
    shape = ConnectorShape("queries", num_queries=10, width=64, layers=5, heads=8, feedforward=48)
    connector = Connector(shape, {"vision": 24}, 0, 40)
    connector.initialise(3)
    trunk = connector.trunk
    assert isinstance(trunk, Queries)
    reference = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 8, 48, dropout=0.0, activation="relu", batch_first=True, norm_first=True),
        5,
        norm=None,
        enable_nested_tensor=False,
    ).train()
    for ours, theirs in zip(trunk.layers, reference.layers, strict=True):
        theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = ours.qkv.weight, ours.qkv.bias
        for a, b in (
            (ours.out, theirs.self_attn.out_proj),
            (ours.up, theirs.linear1),
            (ours.down, theirs.linear2),
            (ours.norm_1, theirs.norm1),
            (ours.norm_2, theirs.norm2),
        ):
            b.load_state_dict(a.state_dict())
    rows = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([connector.entries["vision"](rows), trunk.queries.expand(2, -1, -1)], dim=1)
    expected = trunk.project(trunk.up(reference(joined)[:, -10:]))
    torch.testing.assert_close(connector(rows, "vision"), expected, atol=1e-5, rtol=1e-4)


def test_published_size_and_start() -> None:
    """Some 7.36 million parameters for d_enc = 1024 and D = 4096 (methods page, section 1.1)."""
    with torch.device("meta"):
        connector = Connector(ConnectorShape("queries"), {"vision": 1024}, 0, 4096)
    assert sum(parameter.numel() for parameter in connector.parameters()) == pytest.approx(7.36e6, rel=0.01)
    small = Connector(ConnectorShape("queries", width=64, num_queries=400), {"vision": 24}, 8, 40)
    small.initialise(0)
    assert float(small.trunk.queries.detach().std()) == pytest.approx(1.0, abs=0.03)
    again = Connector(ConnectorShape("queries", width=64, num_queries=400), {"vision": 24}, 8, 40)
    again.initialise(0)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_queries_serve_images_alone() -> None:
    made = host(audio=None, video=False)
    assert made.model.config.tokens_per_item == {"image": 3}
    assert made.processor.video_token is None
    with pytest.raises(ValueError, match="takes image, not audio"):
        made.processor(text=["<audio>"], audio=[sound()])
    assert isinstance(host("mlp2x_gelu", audio=None, video=False, connector_options=None).model.config.model_type, str)


def test_stock_hosts_stay_stock() -> None:
    plain = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    assert type(plain.model).__name__ == "LlavaForConditionalGeneration"


def test_class_tokens_are_left_out_of_frames() -> None:
    made = build_host(
        tiny.decoder("llama"),
        tiny.TOWERS["dinov2_with_registers"][0],
        "mlp2x_gelu",
        tokenizer=tiny.tokenizer(),
        video=True,
    )
    assert made.model.config.tokens_per_item == {"image": 19, "video": 32}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"connector_options": {"queries": 8}}, UsageError, "has no option 'queries'"),
        ({"connector": "mlp2x_gelu", "connector_options": SMALL}, UsageError, "has no option"),
        ({"connector_options": {"width": 30, "heads": 4}}, UsageError, "do not divide"),
        ({"connector": "mlp3x_gelu"}, UsageError, "3 linear layers"),
        ({"audio": CLIPVisionConfig()}, HostError, "not an audio tower"),
        ({"audio": ClapAudioConfig()}, HostError, "'clap_audio_model' is not a.*marks a random short"),
        ({"audio": ClapConfig()}, HostError, "'clap' is not an audio tower.*marks a random short"),
        ({"feature_extractor": ClapFeatureExtractor()}, HostError, "its feature extractor gives none"),
        ({"connector": "mlp2x_gelu", "audio": None, "video": False, "connector_options": None, "shared": True},
         UsageError, "no meaning for an image host"),
    ],
)  # fmt: skip
def test_impossible_hosts_are_refused(options: dict, error: type, message: str) -> None:
    shared = options.pop("shared", False)
    with pytest.raises(error, match=message):
        host(**options, shared=shared)


def test_wrong_inputs_are_named(queries: Host) -> None:
    with pytest.raises(ValueError, match=r"lasts 2\.00 seconds, this model takes 0\.64"):
        inputs(queries, [said(("audio", np.zeros(32000, np.float32)), "?")])
    batch = inputs(queries, TURNS[:1])
    with pytest.raises(ValueError, match="places for video tokens"):
        queries.model(batch["input_ids"][:, 8:], pixel_values_videos=batch["pixel_values_videos"])
    with pytest.raises(ValueError, match="videos of 5 frames given, this host takes 8"):
        queries.model(batch["input_ids"], pixel_values_videos=batch["pixel_values_videos"][:, :5])
