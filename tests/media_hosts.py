"""Tiny random hosts of the families whose media take tokens by rules of their own, each with three media for two
samples.

What a test needs of a family is a model, the inputs that bring its media, and how many tokens the model's own towers
make of each medium: the answer that `alula.items` must find without running a tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from alula.tokens import Modality
from tests import zoo

IMAGE, VIDEO, AUDIO = zoo.IMAGE, 59, 58
BREAK, END = 56, 57


class Host(NamedTuple):
    model: Any
    kind: Modality
    inputs: dict[str, Tensor]  # of three media
    tokens: list[int]  # that the model's own towers make of each


def text(kind: str = "llama", **changed: Any) -> dict[str, Any]:
    base = {key: value for key, value in zoo._COMMON.items() if key != "bos_token_id"}
    return {"model_type": kind, **base, **({"head_dim": 8} if kind == "qwen3" else {}), **changed}


def clip(**changed: Any) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        **changed,
    }


def siglip() -> dict[str, Any]:
    return clip(model_type="siglip_vision_model")


def build(kind: str, **parts: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **parts)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# -- images -------------------------------------------------------------------------------------------------------

SIZES = torch.tensor([[8, 12], [12, 8], [4, 16]])  # of pixels; the last is one line of patches


def pixtral_tower() -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "head_dim": 8,
    }


def llava_pixtral() -> Host:
    model = build(
        "llava",
        vision_config=pixtral_tower(),
        text_config=text("mistral"),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return told(model, {"pixel_values": noise(3, 3, 16, 16), "image_sizes": SIZES})


def mistral3() -> Host:
    model = build("mistral3", vision_config=pixtral_tower(), text_config=text("mistral"), image_token_id=IMAGE)
    return told(model, {"pixel_values": noise(3, 3, 32, 32), "image_sizes": SIZES * 2})


def lighton_ocr() -> Host:
    model = build("lighton_ocr", vision_config=pixtral_tower(), text_config=text("qwen3"), image_token_id=IMAGE)
    return told(model, {"pixel_values": noise(3, 3, 32, 32), "image_sizes": SIZES * 2})


GRID = {"image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16]]}
ODD = torch.tensor([[8, 15], [20, 9], [7, 7]])  # of pixels; unpadding takes away tokens


def llava_next() -> Host:
    model = build("llava_next", vision_config=clip(), text_config=text(), image_token_id=IMAGE, **GRID)
    return told(model, {"pixel_values": noise(3, 5, 3, 8, 8), "image_sizes": ODD})


def llava_next_video() -> Host:
    model = build("llava_next_video", vision_config=clip(), text_config=text(), image_token_id=IMAGE, **GRID)
    return told(model, {"pixel_values": noise(3, 5, 3, 8, 8), "image_sizes": ODD})


def llava_next_video_films() -> Host:
    parts = {"vision_config": clip(), "text_config": text(), "image_token_id": IMAGE, "video_token_id": VIDEO}
    model = build("llava_next_video", **parts, **GRID)
    return told(model, {"pixel_values_videos": noise(3, 2, 3, 8, 8)}, Modality.VIDEO)


def llava_onevision() -> Host:
    model = build("llava_onevision", vision_config=siglip(), text_config=text("qwen2"), image_token_id=IMAGE, **GRID)
    return told(model, {"pixel_values": noise(3, 5, 3, 8, 8), "image_sizes": ODD})


def llava_onevision_many() -> Host:
    """As its processor gives samples of two images and of one: several images are not cut into tiles."""
    host = llava_onevision()
    return told(host.model, {**host.inputs, "batch_num_images": torch.tensor([2, 1])})


def llava_onevision_films() -> Host:
    parts = {"vision_config": siglip(), "text_config": text("qwen2"), "image_token_id": IMAGE, "video_token_id": VIDEO}
    return told(
        build("llava_onevision", **parts, **GRID), {"pixel_values_videos": noise(3, 2, 3, 8, 8)}, Modality.VIDEO
    )


def video_llava_films() -> Host:
    parts = {"vision_config": clip(), "text_config": text(), "image_token_id": IMAGE, "video_token_id": VIDEO}
    model = build("video_llava", **parts, video_seq_length=2 * 5)
    host = told(model, {"pixel_values_videos": noise(3, 2, 3, 8, 8)}, Modality.VIDEO)
    return host._replace(tokens=[10, 10, 10])  # its features come frame by frame


def vipllava() -> Host:
    model = build(
        "vipllava", vision_config=clip(), text_config=text(), image_token_id=IMAGE, vision_feature_layer=(-1, -2)
    )
    return told(model, {"pixel_values": noise(3, 3, 8, 8)})


def paligemma() -> Host:
    model = build(
        "paligemma",
        vision_config={**siglip(), "projection_dim": 32},
        text_config=text("gemma", head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return told(model, {"pixel_values": noise(3, 3, 8, 8)})


def qwen2_5_vl() -> Host:
    grid = torch.tensor([[1, 4, 4], [1, 2, 6], [1, 4, 2]])
    pixels = noise(int(grid.prod(-1).sum()), 96)
    return told(zoo.build("qwen2_5_vl"), {"pixel_values": pixels, "image_grid_thw": grid})


def qwen2_5_vl_films() -> Host:
    grid = torch.tensor([[2, 4, 4], [1, 2, 6], [3, 4, 2]])
    pixels = noise(int(grid.prod(-1).sum()), 96)
    return told(zoo.build("qwen2_5_vl"), {"pixel_values_videos": pixels, "video_grid_thw": grid}, Modality.VIDEO)


def video_llama_3() -> Host:
    tower = {**siglip(), "model_type": "video_llama_3_vision", "num_hidden_layers": 1}
    model = build("video_llama_3", vision_config=tower, text_config=text("qwen2"), image_token_id=IMAGE)
    grid = torch.tensor([[1, 4, 4], [1, 2, 6], [1, 4, 2]])
    pixels = noise(int(grid.prod(-1).sum()), 3 * 4 * 4)
    merges = torch.tensor([2, 1, 2])
    return told(model, {"pixel_values": pixels, "image_grid_thw": grid, "image_merge_sizes": merges})


def tile_tower(kind: str) -> dict[str, Any]:
    return {
        "model_type": f"{kind}_vision",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": (8, 8),
        "patch_size": (2, 2),
    }


def internvl() -> Host:
    model = build("internvl", vision_config=tile_tower("internvl"), text_config=text("qwen2"), image_token_id=IMAGE)
    return told(model, {"pixel_values": noise(3, 3, 8, 8)})


def ovis2() -> Host:
    tower = {**tile_tower("ovis2"), "model_type": "ovis2_vision_model", "image_size": 8, "patch_size": 2}
    tower |= {"vocab_size": 24, "num_attention_heads": 2}
    model = build(
        "ovis2",
        vision_config=tower,
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[51, 52, 53, 54, 55],
        vocab_size=zoo.VOCAB,
        hidden_size=32,
    )
    return told(model, {"pixel_values": noise(3, 3, 8, 8)})


# -- sounds -------------------------------------------------------------------------------------------------------

FRAMES = [20, 13, 31]


def frame_mask(width: int, frames: list[int] = FRAMES) -> Tensor:
    return (torch.arange(width)[None] < torch.tensor(frames)[:, None]).long()


def ears(kind: str, **changed: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_mel_bins": 6,
        "max_source_positions": 16,
        **changed,
    }


def qwen2_audio() -> Host:
    tower = ears("qwen2_audio_encoder", d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        tower.pop(name)
    model = build_audio("qwen2_audio", audio_config=tower, text_config=text("qwen2"), audio_token_id=AUDIO)
    inputs = {"input_features": noise(3, 6, 32), "feature_attention_mask": frame_mask(32)}
    _, tokens = model.model.audio_tower._get_feat_extract_output_lengths(inputs["feature_attention_mask"].sum(-1))
    return Host(model, Modality.AUDIO, inputs, tokens.tolist())


def audioflamingo3(kind: str = "audioflamingo3") -> Host:
    tower = ears("audioflamingo3_encoder")
    model = build_audio(kind, audio_config=tower, text_config=text("qwen2"), audio_token_id=AUDIO)
    return told_each(model, {"input_features": noise(3, 6, 32), "input_features_mask": frame_mask(32)})


def glmasr() -> Host:
    tower = ears("glmasr_encoder", max_position_embeddings=16, num_key_value_heads=2)
    model = build_audio("glmasr", audio_config=tower, text_config=text(), audio_token_id=AUDIO)
    return told_each(model, {"input_features": noise(3, 6, 32), "input_features_mask": frame_mask(32)})


def qwen3_asr() -> Host:
    tower = {
        "model_type": "qwen3_asr_encoder",
        "num_mel_bins": 8,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "d_model": 16,
        "n_window": 50,
        "n_window_infer": 200,
        "output_dim": 32,
        "downsample_hidden_size": 4,
    }
    model = build_audio("qwen3_asr", audio_config=tower, text_config=text("qwen3"), audio_token_id=AUDIO)
    mask = frame_mask(200, [120, 50, 200])
    return told_each(model, {"input_features": noise(3, 8, 200), "input_features_mask": mask})


def fun_asr_nano() -> Host:
    tower = {
        "model_type": "fun_asr_nano_encoder",
        "num_mel_bins": 4,
        "num_stacked_frames": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_timestamp_prediction_layers": 1,
        "fsmn_kernel_size": 3,
    }
    adaptor = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    adaptor["projector_hidden_size"] = 16
    parts = {"audio_config": tower, "adaptor_config": adaptor, "text_config": text("qwen3")}
    model = build_audio("fun_asr_nano", **parts, audio_token_id=AUDIO)
    frames = [4, 3, 6]
    return told_each(model, {"input_features": noise(3, 6, 8), "input_features_mask": frame_mask(6, frames)})


def voxtral() -> Host:
    model = build_audio(
        "voxtral", audio_config=ears("voxtral_encoder"), text_config=text(), audio_token_id=AUDIO, hidden_size=32
    )
    return told_each(model, {"input_features": noise(3, 6, 32)})


def omniasr() -> Host:
    tower = {
        "model_type": "omniasr_audio",
        "hidden_size": 16,
        "conv_dim": [8, 8],
        "conv_kernel": [4, 2],
        "conv_stride": [4, 2],
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "intermediate_size": 24,
    }
    model = build_audio("omniasr", audio_config=tower, text_config=text(), audio_token_id=AUDIO)
    mask = frame_mask(64, [40, 29, 64])
    host = told_each(model, {"input_values": noise(3, 1, 64), "padding_mask": mask})
    return host


def moss_transcribe_diarize() -> Host:
    """Its first sound is cut into two windows, which only the lengths of the raw sounds tell."""
    parts = {"audio_config": ears("whisper", d_model=16), "text_config": text("qwen3"), "audio_token_id": AUDIO}
    model = build_audio("moss_transcribe_diarize", **parts, audio_chunk_size=320, audio_merge_size=2)
    inputs = {"input_features": noise(4, 6, 32), "input_features_mask": frame_mask(32, [32, 13, 20, 31])}
    inputs["padding_mask"] = frame_mask(640, [450, 200, 310])
    with torch.no_grad():
        total = len(model.model.get_audio_features(**inputs).pooler_output)
    assert total == 8 + 4 + 5 + 8
    return Host(model, Modality.AUDIO, inputs, [8 + 4, 5, 8])


def build_audio(kind: str, **parts: Any) -> Any:
    config = AutoConfig.for_model(kind, **parts)
    torch.manual_seed(0)
    return getattr(transformers, type(config).__name__.replace("Config", "ForConditionalGeneration"))(config).eval()


# -- what the towers say ------------------------------------------------------------------------------------------


def told(model: Any, inputs: dict[str, Tensor], kind: Modality = Modality.IMAGE) -> Host:
    """The host with as many tokens per medium as its own features have."""
    backbone = getattr(model, "model", model)
    with torch.no_grad():
        features = getattr(backbone, f"get_{kind.name.lower()}_features")(**inputs, return_dict=True).pooler_output
    return Host(model, kind, inputs, [feature.shape[:-1].numel() for feature in features])


def told_each(model: Any, inputs: dict[str, Tensor]) -> Host:
    """As `told`, of hosts whose features come in one piece: each sound by itself."""
    with torch.no_grad():
        tokens = [
            len(model.model.get_audio_features(**{k: v[n : n + 1] for k, v in inputs.items()}).pooler_output)
            for n in range(3)
        ]
    return Host(model, Modality.AUDIO, inputs, tokens)


HOSTS: dict[str, Callable[[], Host]] = {
    made.__name__: made
    for made in (
        llava_pixtral, mistral3, lighton_ocr, llava_next, llava_next_video, llava_next_video_films, llava_onevision,
        llava_onevision_many, llava_onevision_films, video_llava_films, vipllava, paligemma, qwen2_5_vl,
        qwen2_5_vl_films, video_llama_3, internvl, ovis2, qwen2_audio, audioflamingo3, glmasr, qwen3_asr, fun_asr_nano,
        omniasr, moss_transcribe_diarize, voxtral,
    )
}  # fmt: skip
