"""build_host: any decoder with any tower, its words untouched, in stock classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from alula.errors import HostError, UsageError
from alula.hosts import Host, build_host, describe, save_host
from alula.seam.dialect import cache_keyword
from tests.hosts import tiny

RED, BLUE = Image.new("RGB", (50, 40), (255, 0, 0)), Image.new("RGB", (30, 70), (0, 0, 255))


def built(family: str = "qwen3", tower: str = "siglip", connector: str = "mlp2x_gelu", **options: object) -> Host:
    llm = tiny.decoder(family, **{key: options.pop(key) for key in ("tied", "vocab") if key in options})
    return build_host(llm, tiny.TOWERS[tower][0], connector, tokenizer=tiny.tokenizer(), **options)


def ids_and_padding(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (3, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, :13] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [None, 400], ids=["resized", "spare rows"])
@pytest.mark.parametrize("family", tiny.DECODERS)
@torch.no_grad()
def test_text_logits_are_the_llms_bit_for_bit(family: str, vocab: int | None, tied: bool) -> None:
    llm = tiny.decoder(family, tied=tied, vocab=vocab)
    before = copy.deepcopy(llm.state_dict())
    host = build_host(llm, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    inputs = ids_and_padding(len(tiny.tokenizer()))
    expected, got = llm(**inputs).logits, host.model(**inputs).logits
    size = llm.config.vocab_size
    assert torch.equal(got[..., :size], expected)
    assert got.shape[-1] == (vocab or 328)  # 320 tokens and the placeholder, rounded up to eights
    assert expected.std() > 0.1  # logits that differ, or equality would be cheap
    assert all(torch.equal(value, before[key]) for key, value in llm.state_dict().items())


@pytest.mark.parametrize("family", tiny.DECODERS)
@torch.no_grad()
def test_saved_host_loads_with_plain_auto_classes(family: str, tmp_path) -> None:
    host = built(family, tied=True)
    save_host(host, tmp_path / "host")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "host")
    processor = AutoProcessor.from_pretrained(tmp_path / "host", backend="pil")
    assert type(model) is hf.LlavaForConditionalGeneration
    assert type(processor) is hf.LlavaProcessor
    image = {"type": "image", "image": RED}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "what?"}, {**image, "image": BLUE}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    again = host.processor.apply_chat_template(chat, **options)
    assert all(torch.equal(inputs[key], again[key]) for key in again)
    assert torch.equal(model(**inputs).logits, host.model(**inputs).logits)
    written = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, host.model)]
    assert torch.equal(*written)
    assert model.generation_config.to_dict() == host.model.generation_config.to_dict()


@pytest.mark.parametrize("name", tiny.TOWERS)
@torch.no_grad()
def test_towers_and_their_rows(name: str) -> None:
    config, rows = tiny.TOWERS[name]
    host = built(tower=name, feature_layer=-1)
    assert describe(host).tokens_per_image == host.model.config.image_seq_length == rows
    inputs = host.processor(images=[RED, BLUE], text=["<image> and <image>"], return_tensors="pt")
    assert int((inputs["input_ids"] == host.model.config.image_token_id).sum()) == 2 * rows
    # the projector's input, computed from the tower alone
    features = host.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    features = features[:, 1:] if name != "siglip" else features
    assert features.shape == (2, rows, config.hidden_size)
    got = list(host.model(**inputs).image_hidden_states)  # one tensor of all rows, or since 5.24 one per image
    expected = host.model.model.multi_modal_projector(features)
    torch.testing.assert_close(torch.cat(got).reshape(expected.shape), expected)


@torch.no_grad()
def test_a_batch_mixes_text_and_images() -> None:
    host = built("llama")
    texts = ["what do you see?", "<image> what?", "<image> left of <image>"]
    batch = host.processor(images=[RED, BLUE, RED], text=texts, padding=True, return_tensors="pt")
    logits = host.model(**batch).logits[:, -1]
    for position, (text, images) in enumerate(zip(texts, [None, [RED], [BLUE, RED]], strict=True)):
        alone = host.processor(images=images, text=[text], return_tensors="pt")
        torch.testing.assert_close(host.model(**alone).logits[0, -1], logits[position], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits[1], logits[2])


@torch.no_grad()
def test_greedy_text_is_the_llms() -> None:
    llm = tiny.decoder("qwen3")
    host = build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer())
    inputs = tiny.tokenizer()("what do you see", return_tensors="pt", return_token_type_ids=False)
    texts = [model.generate(**inputs, max_new_tokens=24, do_sample=False) for model in (llm, host.model)]
    assert torch.equal(*texts)


@torch.no_grad()
def test_linear_connector_starts_as_one_matrix() -> None:
    projector = built(connector="linear").model.model.multi_modal_projector
    rows = torch.randn(5, projector.linear_1.in_features)
    assert torch.equal(projector(rows), projector.linear_1(rows))
    twice, zero = projector(2 * rows), projector(torch.zeros_like(rows))
    torch.testing.assert_close(twice - zero, 2 * (projector(rows) - zero))


def test_seed_decides_the_connector_in_every_dtype() -> None:
    def weights(**options: object) -> torch.Tensor:
        return built(**options).model.model.multi_modal_projector.linear_1.weight

    assert torch.equal(weights(seed=3), weights(seed=3))
    assert not torch.equal(weights(seed=3), weights(seed=4))
    assert torch.equal(weights(seed=3).bfloat16(), weights(seed=3, dtype="bfloat16"))
    bound = weights().shape[1] ** -0.5
    assert bound * 0.9 < weights().abs().max() <= bound


def test_several_feature_layers_widen_the_connector() -> None:
    host = built(tower="clip", feature_layer=[-2, 1])
    width = tiny.TOWERS["clip"][0].hidden_size
    assert host.model.model.multi_modal_projector.linear_1.in_features == 2 * width
    host.model(**host.processor(images=[RED], text=["<image>"], return_tensors="pt"))


def test_whole_host_takes_one_dtype() -> None:
    host = built(dtype=torch.bfloat16)
    assert {p.dtype for p in host.model.parameters()} == {torch.bfloat16}
    assert host.model.config.dtype == torch.bfloat16


def test_generation_settings_come_along() -> None:
    llm = tiny.decoder("llama")
    llm.generation_config.eos_token_id, llm.generation_config.temperature = [4, 2], 0.3
    host = build_host(llm, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    carried = host.model.generation_config
    assert (carried.eos_token_id, carried.temperature) == ([4, 2], 0.3)
    assert carried.suppress_tokens == list(range(320, 328))  # the placeholder and the rows that round it up
    assert host.model.config.image_token_id == 320


def test_an_existing_token_is_reused() -> None:
    tokenizer = tiny.tokenizer()
    host = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tokenizer, image_token="<s>")
    assert host.model.config.image_token_id == 1
    assert len(host.processor.tokenizer) == len(tokenizer) == host.model.config.text_config.vocab_size


def test_the_users_objects_stay_as_they_were() -> None:
    llm, tokenizer = tiny.decoder("llama").train(), tiny.tokenizer()
    host = build_host(llm, tiny.TOWERS["siglip"][0], tokenizer=tokenizer)
    assert llm.training
    assert "<image>" not in tokenizer.get_vocab()
    assert tokenizer.padding_side == "right"
    with torch.no_grad():
        host.model.model.language_model.norm.weight.zero_()
    assert llm.model.norm.weight.abs().sum() > 0


def test_directories_and_two_armed_towers(tmp_path) -> None:
    tiny.decoder("mistral").save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    text = {key: tiny.SMALL_TOWER[key] for key in list(tiny.SMALL_TOWER)[:4]}
    for kind in ("CLIP", "Siglip"):
        config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=dict(tiny.SMALL_TOWER))
        model = getattr(hf, f"{kind}Model")(config)
        model.save_pretrained(tmp_path / kind)
        getattr(hf, f"{kind}ImageProcessorPil")().save_pretrained(tmp_path / kind)  # 224 px; the tower wants 32
        host = build_host(str(tmp_path / "llm"), tmp_path / kind)
        tower = host.model.model.vision_tower.state_dict()
        assert all(torch.equal(value, model.vision_model.state_dict()[key]) for key, value in tower.items())
        assert describe(host).image_size == 32


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.Gemma2Config(**tiny.GROUPED, head_dim=16, vocab_size=320), "caps its final logits"),
        (hf.CohereConfig(**tiny.GROUPED, vocab_size=320), "scales its logits"),
        (hf.PhiConfig(**tiny.WIDE, vocab_size=320), "no plain output layer"),
        (hf.OPTConfig(**tiny.WIDE, ffn_dim=48, word_embed_proj_dim=16, vocab_size=320), "one width"),
    ],
    ids=["gemma2", "cohere", "phi", "opt-350m"],
)
def test_decoders_that_llava_would_change_are_refused(config: hf.PreTrainedConfig, reason: str) -> None:
    with pytest.raises(HostError, match=reason):
        build_host(config, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())


def test_a_state_space_decoder_is_carried_where_transformers_hands_it_its_state() -> None:
    """Since 5.24 what LLaVA passes on has the name that Mamba takes; before, it does not run inside."""
    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=320, initializer_range=0.3)
    if cache_keyword() != "cache":
        with pytest.raises(HostError, match="does not run inside"):
            build_host(config, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
        return
    model, processor = build_host(config, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    inputs = processor(text="<image> what do you see?", images=Image.new("RGB", (32, 32)), return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        said = [model.generate(**inputs, **options, use_cache=kept) for kept in (True, False)]
    assert torch.equal(*said)


@pytest.mark.parametrize(
    ("connector", "reason"),
    [
        ("mlp3x_gelu", "use 'mlp2x_gelu' or 'linear'"),
        ("mlp2x_glue", "gelu_pytorch_tanh"),
        ("resampler", "mlp2x_<activation>"),
    ],
)
def test_connectors_that_llava_cannot_hold_are_refused(connector: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        built(connector=connector)


def test_other_wrong_calls_name_the_remedy(tmp_path) -> None:
    with pytest.raises(UsageError, match="the tower has hidden states"):
        built(feature_layer=7)
    with pytest.raises(UsageError, match="pass tokenizer="):
        build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0])
    with pytest.raises(HostError, match="no such directory"):
        build_host(tmp_path / "nowhere", tiny.TOWERS["siglip"][0])
    with pytest.raises(HostError, match="one of: clip_vision_model"):
        build_host(tiny.decoder("llama"), hf.ResNetConfig(), tokenizer=tiny.tokenizer())
    with pytest.raises(UsageError, match="floating-point"):
        built(dtype="int8")


def test_a_model_cast_together_with_its_rotary_frequencies_is_refused() -> None:
    with pytest.raises(HostError, match=r"inv_freq.* was cast with the weights[\s\S]*dtype="):
        build_host(tiny.decoder("llama").bfloat16(), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
