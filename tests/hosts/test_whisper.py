"""Whisper's encoder as an ear: its own numbers, moments side by side, a window as short as one likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)

from alula.errors import HostError, UsageError
from alula.hosts import Host, build_host, save_host
from alula.steering import Prompt, Seconds
from alula.training.feature_cache import frozen_audio_tower
from tests.hosts import tiny

CONFIG = WhisperConfig(
    vocab_size=50,
    num_mel_bins=8,
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=24,
    max_source_positions=100,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
SOUND = (0.3 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32)


def extractor(seconds: int = 2) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=8, chunk_length=seconds)


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(CONFIG).eval()


def built(whisper: PreTrainedModel, connector: str = "mlp2x_gelu", **options) -> Host:
    options = {"feature_extractor": extractor(), **options}
    return build_host(
        tiny.decoder("llama"), tiny.TOWERS["siglip"][0], connector, tokenizer=tiny.tokenizer(), audio=whisper, **options
    )


def inputs(host: Host, *sounds: np.ndarray):
    return host.processor(text=["<audio> what is it?"] * len(sounds), audio=list(sounds), return_tensors="pt")


def test_tokens_are_the_connectors_of_the_encoders_states_side_by_side(
    whisper: WhisperForConditionalGeneration,
) -> None:
    host = built(whisper)
    given = inputs(host, SOUND, SOUND[:4000])
    expected = whisper.model.encoder(
        extractor()([SOUND, SOUND[:4000]], sampling_rate=16000, return_tensors="pt")["input_features"]
    )
    tower = host.model.model.audio_tower
    assert torch.equal(tower(given["input_features"]).last_hidden_state, expected.last_hidden_state)
    found = host.model.model.get_audio_features(given["input_features"]).pooler_output
    connector = host.model.model.multi_modal_projector.of("audio")
    for clip, tokens in enumerate(found):
        assert len(tokens) == 10
        for place in range(10):
            states = expected.last_hidden_state[clip, 10 * place : 10 * place + 10]
            torch.testing.assert_close(tokens[place], connector(states.reshape(1, 1, -1), "audio")[0, 0])
    assert (given["input_ids"] == host.model.config.audio_token_id).sum().item() == 20


@pytest.mark.parametrize(
    ("stack", "connector", "tokens"), [(4, "linear", 25), (1, "linear", 100), (None, "queries", 10)]
)
def test_how_many_tokens(
    whisper: WhisperForConditionalGeneration, stack: int | None, connector: str, tokens: int, tmp_path: Path
) -> None:
    host = built(whisper, connector, audio_stack=stack)
    given = inputs(host, SOUND)
    assert (given["input_ids"] == host.model.config.audio_token_id).sum().item() == tokens
    expected = host.model(**given).logits
    save_host(host, tmp_path / "host")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "host").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "host", backend="pil")
    assert torch.equal(model(**inputs(Host(model, processor), SOUND)).logits, expected)
    out = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == given["input_ids"].shape[1] + 2


def test_a_shorter_window_keeps_the_first_positions(whisper: WhisperForConditionalGeneration) -> None:
    host = built(whisper, feature_extractor=extractor(1))
    given = inputs(host, SOUND)
    assert given["input_features"].shape == (1, 8, 100)
    short = WhisperForConditionalGeneration(WhisperConfig(**{**CONFIG.to_dict(), "max_source_positions": 50})).eval()
    state = whisper.state_dict()
    state["model.encoder.embed_positions.weight"] = state["model.encoder.embed_positions.weight"][:50]
    short.load_state_dict(state)
    expected = short.model.encoder(given["input_features"]).last_hidden_state
    assert torch.equal(host.model.model.audio_tower(given["input_features"]).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"lasts 1\.50 seconds, this model takes 1\.00"):
        inputs(host, np.zeros(24000, np.float32))
    assert whisper.model.encoder.embed_positions.weight.shape[0] == 100


def test_from_a_directory_and_its_own_extractor(whisper: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    whisper.save_pretrained(tmp_path)
    extractor().save_pretrained(tmp_path)
    host = built(str(tmp_path), feature_extractor=None)
    given = inputs(host, SOUND)
    expected = whisper.model.encoder(given["input_features"]).last_hidden_state
    assert torch.equal(host.model.model.audio_tower(given["input_features"]).last_hidden_state, expected)


def test_of_a_classifier_the_encoder_is_taken_and_a_decoder_alone_is_refused() -> None:
    """Neither may end as an encoder of random weights."""
    torch.manual_seed(1)
    classifier = WhisperForAudioClassification(CONFIG).eval()
    host = built(classifier)
    given = inputs(host, SOUND)
    expected = classifier.encoder(given["input_features"]).last_hidden_state
    assert torch.equal(host.model.model.audio_tower(given["input_features"]).last_hidden_state, expected)
    with pytest.raises(HostError, match="no encoder of Whisper's build"):
        built(WhisperForCausalLM(CONFIG))


def test_a_frozen_ear_gives_the_same(whisper: WhisperForConditionalGeneration) -> None:
    host = built(whisper)
    given = inputs(host, SOUND)
    expected = host.model(**given).logits
    with frozen_audio_tower(host.model):
        assert torch.equal(host.model(**given).logits, expected)


def test_seconds_of_a_sound_are_known(whisper: WhisperForConditionalGeneration) -> None:
    host = built(whisper)
    given = inputs(host, SOUND)
    said = [{"role": "user", "content": [{"type": "audio", "audio": SOUND}, {"type": "text", "text": "what is it?"}]}]
    marks = Prompt(host.model, host.processor, given, said).marks(regions=[Seconds(0.4, 0.8)])[0]
    holds = given["input_ids"][0] == host.model.config.audio_token_id
    assert torch.equal(marks[holds].nonzero()[:, 0], torch.tensor([2, 3]))


def test_what_does_not_fit_is_refused(whisper: WhisperForConditionalGeneration) -> None:
    with pytest.raises(HostError, match="3 does not divide the 100 moments"):
        built(whisper, audio_stack=3)
    with pytest.raises(HostError, match="window is 4 seconds, the tower's 2"):
        built(whisper, feature_extractor=extractor(4))
    with pytest.raises(HostError, match="feature_size 8"):
        built(whisper, feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=2))
    with pytest.raises(HostError, match="hop_length 160"):
        built(whisper, feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=2, hop_length=320))
    with pytest.raises(UsageError, match="without an audio tower"):
        build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer(), audio_stack=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sound_with_samples_that_are_no_numbers_is_refused(
    whisper: WhisperForConditionalGeneration, value: float
) -> None:
    """One such sample makes every feature NaN, and the model says something all the same."""
    broken = SOUND.copy()
    broken[7] = value
    with pytest.raises(ValueError, match="no finite numbers"):
        inputs(built(whisper), SOUND, broken)
