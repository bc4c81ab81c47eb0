"""Tiny random models of transformers' real classes that code items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    DacConfig,
    DacModel,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    HubertModel,
    JanusVQVAE,
    JanusVQVAEConfig,
    MimiConfig,
    MimiModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from alula.codes import EncoderFeatures

WIDTHS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def clip(layer: int = -1) -> EncoderFeatures:
    """Nine patches and a class token in front."""
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**WIDTHS, image_size=12, patch_size=4, projection_dim=8))
    size = {"height": 12, "width": 12}
    return EncoderFeatures(model, CLIPImageProcessorPil(size=size, crop_size=size), layer)


def ast() -> EncoderFeatures:
    torch.manual_seed(0)
    model = ASTModel(
        ASTConfig(**WIDTHS, max_length=16, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)
    )
    return EncoderFeatures(model, ASTFeatureExtractor(num_mel_bins=16, max_length=16))


def whisper() -> EncoderFeatures:
    """Two frames of a window of a tenth of a second for each 20 ms."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = WhisperModel(
        WhisperConfig(**layers, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=50,
                      num_mel_bins=16, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                      decoder_start_token_id=1)
    )  # fmt: skip
    return EncoderFeatures(model, WhisperFeatureExtractor(feature_size=16, chunk_length=1), 1)


def hubert() -> EncoderFeatures:
    torch.manual_seed(0)
    model = HubertModel(
        HubertConfig(**WIDTHS, conv_dim=(8, 8), conv_kernel=(10, 4), conv_stride=(5, 4), num_feat_extract_layers=2,
                     num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    )  # fmt: skip
    return EncoderFeatures(model, Wav2Vec2FeatureExtractor(return_attention_mask=True))


_PICTURES: dict[str, Any] = {"embed_dim": 8, "num_embeddings": 11, "base_channels": 32, "num_res_blocks": 1}


def chameleon() -> Any:
    return ChameleonVQVAE(ChameleonVQVAEConfig(**_PICTURES, latent_channels=8, resolution=8, channel_multiplier=[1, 1]))


def emu3() -> Any:
    return Emu3VQVAE(
        Emu3VQVAEConfig(codebook_size=11, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
                        num_res_blocks=1, attn_resolutions=[], hidden_size=32, num_attention_heads=1,
                        temporal_downsample_factor=2)
    )  # fmt: skip


def janus() -> Any:
    return JanusVQVAE(
        JanusVQVAEConfig(**_PICTURES, latent_channels=8, channel_multiplier=[1, 1], num_patches=4, projection_dim=8)
    )


def encodec() -> Any:
    model = EncodecModel(
        EncodecConfig(target_bandwidths=[4.0, 8.0], sampling_rate=8000, hidden_size=8, codebook_dim=8,
                      codebook_size=16, num_filters=4, num_residual_layers=1, upsampling_ratios=[4, 2],
                      num_lstm_layers=1)
    )  # fmt: skip
    for layer in model.quantizer.layers:  # fresh ones are all zero
        layer.codebook.embed.normal_()
    return model


def dac() -> Any:
    return DacModel(
        DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=2,
                  codebook_size=16, codebook_dim=4, hidden_size=16)
    )  # fmt: skip


def mimi() -> Any:
    model = MimiModel(
        MimiConfig(hidden_size=16, num_filters=4, num_residual_layers=1, upsampling_ratios=[4, 2], codebook_size=16,
                   codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=3,
                   num_semantic_quantizers=1, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                   intermediate_size=16, head_dim=8, upsample_groups=16, frame_rate=1500, sampling_rate=24000)
    )  # fmt: skip
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    return model


SHIPPED: dict[str, tuple[Callable[[], Any], int, int]] = {
    "chameleon": (chameleon, 8, 1),
    "emu3": (emu3, 8, 1),
    "janus": (janus, 8, 1),
    "encodec": (encodec, 64, 2),
    "dac": (dac, 64, 2),
    "mimi": (mimi, 64, 2),
}
"""how to make one, its extent, its codebooks"""
