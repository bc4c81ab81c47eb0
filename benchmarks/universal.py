"""One encoder for all media beside a tower for each, at equally many decoder tokens: time, side by side.

    python benchmarks/universal.py                       # writes benchmarks/results/universal-speed.json
    python benchmarks/universal.py --sizes fledgling     # one of the sizes
    python benchmarks/universal.py --shrink --rounds 1 --output x.json   # the same code on little, anywhere

Contenders have the same decoder, the same vision tower and as many decoder tokens per item; each sample holds a
picture, a film of eight frames, a sound and 64 tokens of text.

- towers: `hosts/multimodal`: vision tower, spectrogram tower (AST) of the same width and depth, and a `queries`
  connector per medium, of its published sizes.
- towers, lean: the same with connectors as wide and deep as one expert.
- universal, one expert; universal, three experts: `hosts/universal`: the vision tower for all, and the projection
  module, whose experts are a third as deep as the tower, as published, or (fledgling) half as deep.

Every contender runs once per round, in thread time; ratios are to `towers`, within rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ASTConfig, CLIPVisionConfig, Qwen3Config

from alula.files import write_json
from alula.hosts.multimodal import AlulaConfig, AlulaForConditionalGeneration, ConnectorShape
from alula.hosts.universal import ProjectionShape, UniversalConfig, UniversalForConditionalGeneration, shape_of
from alula.hosts.universal.shapes import plain
from alula.training.environment import readable_environment
from policies import ratio, timed

_MEDIA = ("image", "video", "audio")
_BASE, _TEXT, _FRAMES = "towers", 64, 8
_PLACES = dict(zip(_MEDIA, (5, 6, 7), strict=True))


@dataclass(frozen=True)
class Size:
    """Shapes of decoder, towers and projection.

    Attributes:
        tokens: decoder tokens of an item.
        sound: bins and moments of a spectrogram; kernel and stride of its patches.
    """

    decoder: dict[str, int]
    tower: dict[str, int]
    depth: int
    heads: int
    feedforward: int
    tokens: int
    sound: tuple[int, int, int, int]
    batch: int


SIZES = {
    "fledgling": Size(
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
        {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
         "image_size": 40, "patch_size": 8},
        depth=2, heads=4, feedforward=256, tokens=18, sound=(64, 128, 16, 16), batch=8,
    ),
    "small": Size(
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
         "image_size": 112, "patch_size": 14},
        depth=2, heads=6, feedforward=0, tokens=32, sound=(128, 256, 16, 16), batch=2,
    ),
}  # fmt: skip
_SHRUNK = Size(
    {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
     "patch_size": 8},
    depth=1, heads=2, feedforward=16, tokens=4, sound=(16, 32, 8, 8), batch=1,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--sizes", choices=tuple(SIZES), action="append", help="default: all")
    parser.add_argument("--shrink", action="store_true", help="tiny models: checks this script only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "universal-speed.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.sizes or SIZES:
        size = _SHRUNK if options.shrink else SIZES[name]
        found[name] = measured(size, options.device, getattr(torch, options.dtype), options.rounds)
    record = {
        "command": " ".join(["python", "benchmarks/universal.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "sizes": found,
    }
    write_json(options.output, record)


def measured(size: Size, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """By what is run: every contender's time in that of separate towers."""
    batch, found = inputs(size, device, dtype), {}
    hosts = {
        _BASE: towers(size, lean=False),
        "towers, lean": towers(size, lean=True),
        "universal, one expert": universal(size, 1),
        "universal, three experts": universal(size, 3),
    }
    for host in hosts.values():
        host.to(device=device, dtype=dtype)
    for work, make in WORK.items():
        run = {name: make(host, batch) for name, host in hosts.items()}
        seconds = timed(run, device, rounds)
        found[work] = {name: ratio(seconds, name, _BASE) for name in hosts if name != _BASE}
        print(f"  {work:22} " + ", ".join(f"{n} {r['median']:.2f}" for n, r in found[work].items()), file=sys.stderr)
    return {"parameters": {name: sum(p.numel() for p in host.parameters()) for name, host in hosts.items()}, **found}


def towers(size: Size, *, lean: bool) -> Any:
    """A host with a tower for pictures and one for sounds, and connectors of published sizes or of an expert's."""
    bins, moments, kernel, stride = size.sound
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ears = ASTConfig(
        **{name: size.tower[name] for name in names}, num_mel_bins=bins, max_length=moments, patch_size=kernel,
        frequency_stride=stride, time_stride=stride,
    )  # fmt: skip
    width = size.tower["hidden_size"]
    wide = ProjectionShape(feedforward=size.feedforward).feedforward_of(width)
    queries = ConnectorShape("queries", size.tokens)
    if lean:
        queries = ConnectorShape("queries", size.tokens, width, size.depth, size.heads, wide)
    config = AlulaConfig(
        text_config=_decoder(size), vision_config=CLIPVisionConfig(**size.tower), audio_config=ears,
        media=list(_MEDIA), tokens_per_item=dict.fromkeys(_MEDIA, size.tokens),
        connector=queries.as_dict(), vision_feature_layer=-1,
        num_frames=_FRAMES, **{f"{medium}_token_id": place for medium, place in _PLACES.items()},
    )  # fmt: skip
    return AlulaForConditionalGeneration(config)


def universal(size: Size, experts: int) -> Any:
    """A host whose one tower reads all."""
    bins, moments, kernel, stride = size.sound
    sizes = {
        "audio": {"bins": bins, "moments": moments, "kernel": kernel, "stride": stride},
        "video": {"frames": _FRAMES},
    }
    shape = ProjectionShape(experts, size.depth, size.heads, size.tokens - 2, size.feedforward)
    config = UniversalConfig(
        text_config=_decoder(size), vision_config=CLIPVisionConfig(**size.tower), media=list(_MEDIA),
        sizes={medium: plain(shape_of(medium, sizes.get(medium))) for medium in _MEDIA}, projection=plain(shape),
        tokens_per_item=dict.fromkeys(_MEDIA, size.tokens),
        **{f"{medium}_token_id": place for medium, place in _PLACES.items()},
    )  # fmt: skip
    return UniversalForConditionalGeneration(config)


def inputs(size: Size, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch of samples with an item of each medium."""
    draw = torch.Generator().manual_seed(0)
    side = size.tower["image_size"]
    text = torch.randint(10, 100, (size.batch, _TEXT), generator=draw)
    places = torch.cat([torch.full((size.batch, size.tokens), place) for place in _PLACES.values()], dim=1)
    raw = {
        "pixel_values": torch.randn(size.batch, 3, side, side, generator=draw),
        "pixel_values_videos": torch.randn(size.batch, _FRAMES, 3, side, side, generator=draw),
        "input_features": torch.randn(size.batch, size.sound[1], size.sound[0], generator=draw),
    }
    ids = torch.cat([places, text], dim=1)
    return {"input_ids": ids.to(device), **{name: value.to(device, dtype) for name, value in raw.items()}}


def prefill(host: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A prompt with its media, read."""

    def go() -> None:
        host.eval()
        with torch.inference_mode():
            host(**batch, logits_to_keep=1)

    return go


def training(part: str) -> Callable[[Any, dict[str, torch.Tensor]], Callable[[], None]]:
    """A step of training, forward and backward, of one part alone."""

    def make(host: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
        def go() -> None:
            host.train()
            for name, parameter in host.named_parameters():
                parameter.requires_grad_(name.startswith(part))
            host(**batch, labels=batch["input_ids"]).loss.backward()
            host.zero_grad()

        return go

    return make


WORK = {
    "prefill": prefill,
    "step, aligning": training("model.multi_modal_projector"),
    "step, instructing": training("model.language_model"),
}
"""what is run: a prompt read; a step that trains connectors (tokenizers among them), or the decoder alone"""


def _decoder(size: Size) -> Qwen3Config:
    return Qwen3Config(**size.decoder, num_key_value_heads=2, head_dim=64, vocab_size=1024, tie_word_embeddings=True)


if __name__ == "__main__":
    main()
