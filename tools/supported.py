"""Which of transformers' own classes alula serves: a tiny random instance of each is built and put to every use.

    python tools/supported.py                  # every class; goes on where it stopped
    python tools/supported.py --only LlamaForCausalLM --only Qwen2VLForConditionalGeneration
    python tools/supported.py --again          # all of them anew, although they were run on this transformers
    python tools/supported.py --page           # only write docs/supported.md anew from what is recorded

Classes are those that transformers' tables name for causal language models, for images and text, for any media with
text, and for speech to text. Each is made small by one rule (`small`), with exceptions where the rule fails
(`EXCEPTIONS`), and tried in a process of its own, for a bounded time. Outcomes are recorded in
`benchmarks/results/supported.json`, and `docs/supported.md` is written from them: both are committed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

import alula
from alula.anatomy import Anatomy
from alula.errors import AlulaError
from alula.policies import Skip, Withdraw
from alula.probes import probe_names, registry
from alula.probes.lens import log_probabilities
from alula.seam import OutputOf, Phase, Point, find, install
from alula.seam.taps import taps
from alula.tokens import Modality, TokenMap

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "supported.json"
PAGE = ROOT / "docs" / "supported.md"

SECONDS = 60  # for one class
PARAMETERS = 130_000_000  # more than that is not small
VOCAB = 96
MEDIA_TOKENS = {Modality.IMAGE: 60, Modality.VIDEO: 59, Modality.AUDIO: 58}

TABLES = {
    "images and sounds": ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ"),
    "text": ("CAUSAL_LM",),
}


class HostFails(Exception):  # noqa: N818
    """The host itself, with nothing of alula on it, does not do this."""


class Wrong(Exception):  # noqa: N818
    """It ran, and what came out is not what it has to be."""


# -- what there is --------------------------------------------------------------------------------------------------


def classes() -> dict[str, tuple[str, str]]:
    """Every class of the tables: its name -> (table, type of its config)."""
    found: dict[str, tuple[str, str]] = {}
    for heading, tables in TABLES.items():
        for table in tables:
            for kind, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
                for name in (names,) if isinstance(names, str) else names:
                    found.setdefault(name, (heading, kind))
    return found


# -- making them small ----------------------------------------------------------------------------------------------

# names of settings -> their value in a tiny instance; the first pattern that matches the whole name
RULES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|text_vocab_size", VOCAB),
    (r"(hidden|embed|embedding|word_embed_proj|decoder_hidden|output|encoder_hidden|out_hidden|projection|d)_(size|dim)"
     r"|d_model|n_embd|dim|embed_dim|hidden_dim|hidden_size_per_layer_input|audio_hidden_size|output_dim"
     r"|projector_hidden_size|vision_output_dim|text_hidden_size|output_proj_dims|multi_modal_hidden_size", 32),
    (r".*(intermediate|ffn|inner|feed_forward|feedforward)_?(size|dim|hidden_size)|d_ff|n_inner|ffn_hidden_size"
     r"|.*_ffn_dim", 48),
    (r"moe_.*intermediate_size|.*expert_intermediate_size", 16),
    (r"num_key_value_heads|n_head_kv|num_kv_heads|multi_query_group_num", 2),
    (r"(num|n|encoder|decoder|text|vision)_?(attention)?_?heads?|num_attention_heads|n_head|encoder_attention_heads"
     r"|decoder_attention_heads|num_heads|attention_heads|n_heads", 4),
    (r"(num_hidden|n|encoder|decoder|num_encoder|num_decoder|num)_layers?|depth|n_layer|num_blocks", 2),
    (r"head_dim|attention_head_dim|kv_channels|global_head_dim", 16),
    (r"n_positions|n_ctx|max_(position_embeddings|source_positions|target_positions|seq_len)|seq_length", 256),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace|moe_num_shared_experts", 1),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 8),
    (r"sliding_window|window_size|attention_chunk_size", 16),
    (r"image_size", 16),
    (r"patch_size", 4),
    (r"num_mel_bins|feature_size", 8),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r"image_token_(id|index)|media_placeholder_token_id", MEDIA_TOKENS[Modality.IMAGE]),
    (r"video_token_(id|index)", MEDIA_TOKENS[Modality.VIDEO]),
    (r"audio_token_(id|index)", MEDIA_TOKENS[Modality.AUDIO]),
    (r"(?!.*num_).*_token_(id|index)", "other token"),
)  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """What published configs with multimodal RoPE say, and default ones do not."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], **more}}


_TILES = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]}
_VISION_ENDS = {"vision_start_token_id": 55, "vision_end_token_id": 54}

# type of config, of a whole or of a part -> settings beside the rule
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _mrope(2, 1, 1),
    "qwen2_5_vl_text": _mrope(2, 1, 1),
    "qwen2_5_omni_text": _mrope(2, 1, 1),
    "glm4v_text": _mrope(2, 1, 1),
    "glm_ocr_text": _mrope(2, 1, 1),
    "paddleocr_vl_text": _mrope(4, 2, 2),
    "glm4v_moe_text": {**_mrope(4, 2, 2, partial_rotary_factor=1.0), "head_dim": 16},
    # of the shape of 31B; that of E2B and E4B, whose layers are given embeddings of their own, is refused (NOTES)
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "hidden_size": 32,
        "attention_out_multiplier": 0.5,
        "ssm_out_multiplier": 2.0,
        "attention_in_multiplier": 1.5,
    },
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granite_docling_text": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "hunyuan_vl_text": _mrope(2, 2, 2, 2),
    "llama4_text": {"intermediate_size_mlp": 48},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "chameleon": {"vocabulary_map": {"<image>": MEDIA_TOKENS[Modality.IMAGE]}},
    "emu3": {"vocabulary_map": {"<image>": MEDIA_TOKENS[Modality.IMAGE]}},
    "idefics": {"cross_layer_interval": 1},
    "helium": {"head_dim": 8},
    "mistral4": {"head_dim": 16},
    "pixtral": {"head_dim": 8},
    "gemma3": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "qwen2_5_omni_thinker": _VISION_ENDS,
    "qwen3_omni_moe_thinker": _VISION_ENDS,
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
}


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class for a tiny instance."""
    given = config.to_dict()
    changed: dict[str, Any] = {}
    layers = next((given[name] for name in _LAYERS if isinstance(given.get(name), int)), 0)
    lists = {name: v for name, v in given.items() if isinstance(v, list) and len(v) == layers > 2}
    picks = _one_of_each([value for name, value in lists.items() if "layer" in name], layers) if lists else [0, 1]
    others = iter(range(57, 40, -1))
    for name, value in given.items():
        if name in lists:
            changed[name] = [value[pick] for pick in picks]
        elif name in _LAYERS and isinstance(value, int):
            changed[name] = len(picks)
        elif isinstance(value, int) and not isinstance(value, bool):
            rule = _rule(name)
            if rule is not None:
                changed[name] = next(others) if rule == "other token" else rule
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            changed[name] = _rule(name)
    if (
        given.get("num_attention_heads") is not None
        and given.get("num_key_value_heads") == given["num_attention_heads"]
    ):
        changed["num_key_value_heads"] = 4
    if "qk_rope_head_dim" in given and "head_dim" in given:  # of latent attention: the part that is rotated
        changed["head_dim"] = _rule("qk_rope_head_dim")
    if isinstance(given.get("rope_parameters"), dict):
        changed["rope_parameters"] = _small_rope(given["rope_parameters"], "head_dim" in given)
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            changed[name] = small(inner)
    return type(config)(**{**changed, **EXCEPTIONS.get(config.model_type, {})})


def _rule(name: str) -> Any:
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)


def _one_of_each(kinds: list[list[Any]], layers: int) -> list[int]:
    """The first layers in which every kind of layer stands once; at least two."""
    seen: dict[str, int] = {}
    for index in range(layers):
        seen.setdefault(repr([kind[index] for kind in kinds]), index)
    picks = sorted(seen.values())
    return picks if len(picks) > 1 else [picks[0], picks[0]]


def _small_rope(rope: dict[str, Any], wide: bool) -> dict[str, Any]:
    made = {k: _small_rope(v, wide) if isinstance(v, dict) else v for k, v in rope.items()}
    if "mrope_section" in made:
        made["mrope_section"] = [4, 2, 2] if wide else [2, 1, 1]
    return made


def build(name: str, kind: str) -> Any:
    """A tiny random instance of the class, in float32, ready to be asked.

    Raises:
        HostFails: it is not built so.
    """
    try:
        cls = getattr(transformers, name)
        config = small((getattr(cls, "config_class", None) or CONFIG_MAPPING[kind])())
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in cls(config).parameters())
        if count > PARAMETERS:
            raise HostFails(f"made small, it still has {count / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    except HostFails:
        raise
    except Exception as error:
        raise HostFails(_said(error)) from error
    if model.generation_config is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.float().eval()


# -- what they are asked --------------------------------------------------------------------------------------------


class Case:
    """One host and its prompts: text alone, and text around a medium.

    Attributes:
        medium: what the medium is; None: tokens of the text that a `token_map` calls an image.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.medium: Modality | None = None
        self.media: dict[str, Tensor] = {}
        self.token, self.tokens = 0, 4
        for modality, media in _media(model):
            try:
                self.tokens = _count(model, modality, media)
                self.medium, self.media, self.token = modality, media, MEDIA_TOKENS[modality]
                self._ask(self.prompt())
                break
            except Exception:  # another way of giving a medium is tried
                self.medium, self.media, self.tokens = None, {}, 4

    def _ask(self, inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return self.model(**inputs).logits

    def ask(self, inputs: dict[str, Any]) -> Tensor:
        """Logits (B, S, V)."""
        inputs = dict(inputs)
        if self.medium is None and find(self.model) is None:
            inputs.pop("token_map", None)
        return self._ask(inputs)

    def text(self) -> dict[str, Any]:
        ids = torch.randint(5, 40, (2, 11), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[1, :3], ids[1, :3] = 0, 0
        return self._typed({"input_ids": ids, "attention_mask": mask})

    def prompt(self, samples: tuple[int, ...] = (0, 1), *, padded: bool = True) -> dict[str, Any]:
        """Text, medium, text; the second sample is shorter. Without padding: of one sample."""
        generator = torch.Generator().manual_seed(4)
        words = torch.randint(5, 40, (2, 9), generator=generator).tolist()
        lengths = {0: 4, 1: 2}
        made = [words[n][: lengths[n]] + [self.token or 7] * self.tokens + words[n][4:9] for n in samples]
        width = max(map(len, made)) if padded else len(made[0])
        ids = torch.tensor([[0] * (width - len(each)) + each for each in made])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in made])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        inputs |= {key: torch.cat([value] * len(made)) for key, value in self.media.items()}
        if self.medium is None:
            kinds = torch.zeros_like(ids)
            for row, sample in enumerate(samples):
                first = width - len(made[row]) + lengths[sample]
                kinds[row, first : first + self.tokens] = int(Modality.IMAGE)
            inputs["token_map"] = TokenMap.from_modalities(kinds, mask)
        return self._typed(inputs)

    def longer(self, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
        """The same prompts with (B, N) tokens of text behind them."""
        more = torch.ones_like(ids)
        made = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
        made["attention_mask"] = torch.cat([inputs["attention_mask"], more], 1)
        if "token_map" in inputs:
            made["token_map"] = inputs["token_map"].append(TokenMap.text(*ids.shape))
        return self._typed(made)

    def _typed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        wanted = _keywords(self.model)
        here = (inputs["input_ids"] == self.token).long() * int(self.medium or 0) if self.token else None
        if here is not None and "mm_token_type_ids" in wanted:
            inputs["mm_token_type_ids"] = here
        if here is not None and "token_type_ids" in wanted and self.model.config.model_type.startswith("gemma3"):
            inputs["token_type_ids"] = here
        return inputs

    @contextmanager
    def generating(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What `generate` takes."""
        inputs = dict(inputs)
        tokens, seam = inputs.pop("token_map", None), find(self.model)
        with seam.given_tokens(tokens) if seam is not None and tokens is not None else nullcontext():
            yield inputs


def _keywords(model: Any) -> tuple[str, ...]:
    code = type(model).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return code.__code__.co_varnames[: code.__code__.co_argcount]


def _media(model: Any) -> Iterator[tuple[Modality, dict[str, Tensor]]]:
    """One medium in every way that classes of transformers take it."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config = model.config
    vision, audio = getattr(config, "vision_config", None), getattr(config, "audio_config", None)
    if vision is not None:
        side = getattr(vision, "image_size", None) or 16
        side = side[0] if isinstance(side, list | tuple) else side
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
        size = torch.tensor([[side, side]])
        plain = noise(1, channels, side, side)
        patch = getattr(vision, "patch_size", 4)
        patch = patch if isinstance(patch, int) else patch[0]
        flat = noise(16, channels * getattr(vision, "temporal_patch_size", 1) * patch * patch)
        grid = torch.tensor([[1, 4, 4]])
        for media in (
            {"pixel_values": plain},
            {"pixel_values": noise(1, 1, channels, side, side)},
            {"pixel_values": plain, "image_sizes": size},
            {"pixel_values": noise(1, 5, channels, side, side), "image_sizes": 2 * size},
            {"pixel_values": flat, "image_grid_thw": grid},
            {"pixel_values": flat, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2])},
        ):
            yield Modality.IMAGE, media
    if audio is not None:
        bins = getattr(audio, "num_mel_bins", None) or 8
        for frames in (2 * (getattr(audio, "max_source_positions", None) or 16), 32):
            for mask in ("feature_attention_mask", "input_features_mask", "attention_mask_of_none"):
                media = {"input_features": noise(1, bins, frames)}
                if mask != "attention_mask_of_none":
                    media[mask] = torch.ones(1, frames, dtype=torch.long)
                yield Modality.AUDIO, media


def _count(model: Any, modality: Modality, media: dict[str, Tensor]) -> int:
    """How many tokens the model's own tower makes of one medium."""
    backbone = getattr(model, "model", model)
    with torch.no_grad():
        made = getattr(backbone, f"get_{modality.name.lower()}_features")(**media, return_dict=True).pooler_output
    made = torch.cat([each.flatten(0, -2) for each in made]) if isinstance(made, list | tuple) else made
    return made.shape[:-1].numel()


# -- the uses -------------------------------------------------------------------------------------------------------


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * max(1.0, float(one.abs().max())), rtol=1e-3)


def _wake(graft: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return graft


def _alone(case: Case) -> tuple[Tensor, Tensor]:
    """Logits of the samples of the prompt, in the batch and alone."""
    whole, alone = case.ask(case.prompt()), case.ask(case.prompt((1,), padded=False))
    return whole[1:, -alone.shape[1] :], alone


def _graft(case: Case, config: Any) -> None:
    model = case.model
    text, prompt = case.ask(case.text()), case.ask(case.prompt())
    pads = _near(*_alone(case))
    graft = alula.attach(model, config)
    if not _near(case.ask(case.prompt()), prompt):
        raise Wrong("a fresh graft changes answers")
    _wake(graft)
    if not torch.equal(case.ask(case.text()), text):
        raise Wrong("text alone changes")
    if _near(case.ask(case.prompt()), prompt):
        raise Wrong("behind an image nothing of it is heard")
    if pads and not _near(*_alone(case)):
        raise Wrong("a sample's answer depends on the padding beside it")
    alula.detach(model)
    if not (torch.equal(case.ask(case.text()), text) and torch.equal(case.ask(case.prompt()), prompt)):
        raise Wrong("detached, the host does not answer as before")


def parts(case: Case) -> None:
    """What leaves a layer is what came in and what its parts added, each by the layer's own factor: they are those that
    act. Of a hybrid decoder in the layers that have attention."""
    anatomy, seen = Anatomy.of(case.model), dict[tuple[int, str], Tensor]()
    ends = [Point.BLOCK_INPUT, Point.BLOCK_OUTPUT]
    with ExitStack() as stack:
        seam = install(case.model, "parts")
        stack.callback(seam.release, "parts")
        for layer in anatomy.attended:
            added = [Point.ATTENTION, Point.MLP]
            beside = [] if anatomy.family.beside is None else [OutputOf(anatomy.family.beside)]
            for point in (*ends, *added, *beside):
                keep = partial(_keep, seen, layer, str(point))
                stack.callback(seam.on(point, layer, keep, phase=Phase.READ, owner="parts").remove)
        case.ask(case.prompt())
    for layer in anatomy.attended:
        module: Any = anatomy.layers[layer]
        by = {"attention": "attn_out_multiplier", "output of mamba": "ssm_out_multiplier"}
        each = getattr(module, "residual_multiplier", getattr(module, "residual_scale", 1.0))
        total = inside = seen.pop((layer, "block_input"))
        out = seen.pop((layer, "block_output"))
        for (of, name), hidden in seen.items():
            if of == layer:
                total = total + getattr(module, by.get(name, ""), each) * hidden.view_as(inside)
        if not _near(total * getattr(module, "layer_scalar", 1.0), out):
            raise Wrong(f"layer {layer} adds to the stream what was not found in it")


def _keep(
    seen: dict[tuple[int, str], Tensor], layer: int, name: str, view: Any, hidden: Tensor, *given: Tensor
) -> None:
    seen[layer, name] = hidden


def wings(case: Case) -> None:
    _graft(case, alula.WingsConfig(rank=4))


def experts(case: Case) -> None:
    _graft(case, alula.ExpertsConfig(rank=4))


def _generated(case: Case, prompt: dict[str, Any]) -> None:
    """Cached decoding says what the whole forward says."""
    with case.generating(prompt) as inputs:
        made = case.model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=[0, 1, 2, *range(40, VOCAB)],
            output_logits=True,
            return_dict_in_generate=True,
        )
    new = made.sequences[:, -4:]
    whole = case.ask(case.longer(prompt, new))[:, -5:-1]
    if not _near(torch.stack(made.logits, dim=1), whole):
        raise Wrong("cached decoding differs from the whole forward")


def generate(case: Case) -> None:
    prompt = _decodable(case)
    _wake(alula.attach(case.model, alula.WingsConfig(rank=4)))
    _generated(case, prompt)


def _decodable(case: Case) -> dict[str, Any]:
    """The prompt from which the host itself decodes as without a cache: padded, or, failing that, one without padding.

    Hosts of absolute positions count padding in a forward, and not in `generate`.
    """
    try:
        _generated(case, case.prompt())
        return case.prompt()
    except Exception:  # whatever it is, the next try tells
        pass
    try:
        _generated(case, case.prompt((0,), padded=False))
    except Exception as error:
        raise HostFails(_said(error)) from error
    return case.prompt((0,), padded=False)


def train(case: Case) -> None:
    graft = _wake(alula.attach(case.model.train(), alula.WingsConfig(rank=4)))
    case.model.requires_grad_(False)
    for parameter in graft.parameters():
        parameter.requires_grad_(True)
    logits = case.model(**case.prompt()).logits
    logits[:, -3:].logsumexp(-1).mean().backward()
    missing = [name for name, p in graft.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    if missing:
        raise Wrong(f"no finite gradient reaches {missing[0]}")


def probes(case: Case) -> None:
    last: list[Tensor] = []
    with taps(case.model, ["block_output"], lambda event: last.append(event.hidden)):
        before = case.ask(case.prompt())
    with torch.no_grad():
        read = log_probabilities(Anatomy.of(case.model), last[-1].flatten(0, -2)).view_as(before)
    if not _near(read, before.log_softmax(-1)):
        raise Wrong("behind the last layer the vocabulary lens reads other words than the host says")
    refused: list[str] = []
    for name in probe_names():
        probe = registry._PROBES.get(name)()
        try:
            with probe.on(case.model):
                during = case.ask(case.prompt())
            if not torch.equal(during, before):
                raise Wrong(f"{name} changes what the host computes")
        except AlulaError as error:
            refused.append(f"{name}: {error.message}")
    if len(refused) == len(probe_names()):
        raise AlulaError(refused[0].split(": ", 1)[1])
    if refused:
        raise AlulaError("; ".join(refused))


def policies(case: Case) -> None:
    text, prompt = case.ask(case.text()), case.ask(case.prompt())
    decodable = _decodable(case)
    for policy in (Withdraw(layer=1), Skip(part="mlp", layers=(1,)), Skip(part="attention", layers=(-1,))):
        name = policy.policy_type
        with policy.on(case.model):
            if not torch.equal(case.ask(case.text()), text):
                raise Wrong(f"under {name} text alone changes")
            if _near(case.ask(case.prompt()), prompt):
                raise Wrong(f"{name} changes nothing")
            _generated(case, decodable)


CHECKS: dict[str, Callable[[Case], None]] = {
    each.__name__: each for each in (parts, wings, experts, generate, train, probes, policies)
}
USES = tuple(CHECKS)


def examine(name: str, kind: str) -> dict[str, str]:
    """What became of each use of one class: "works", or "refused: ...", "fails: ...", "host: ..."."""
    try:
        model = build(name, kind)
    except HostFails as error:
        return {"built": f"no: {error}"}
    row = {"built": "yes"}
    try:
        Anatomy.of(model)
    except AlulaError as error:
        return {**row, "anatomy": f"refused: {_said(error)}"}
    except Exception as error:
        return {**row, "anatomy": f"fails: {_said(error)}"}
    row["anatomy"] = "works"
    try:
        case = Case(model)
        case.ask(case.text())
        case.ask(case.prompt())
    except Exception as error:
        return {**row, "forward": f"host: {_said(error)}"}
    row["medium"] = "tokens named" if case.medium is None else case.medium.name.lower()
    for use, check in CHECKS.items():
        row[use] = _outcome(check, case if use == "parts" else Case(build(name, kind)))
    return row


def _outcome(check: Callable[[Case], None], case: Case) -> str:
    try:
        check(case)
    except AlulaError as error:
        return f"refused: {_said(error)}"
    except HostFails as error:
        return f"host: {error}"
    except Wrong as error:
        return f"fails: {error}"
    except Exception as error:
        return f"fails: {_said(error)}"
    return "works"


def _said(error: Exception) -> str:
    text = error.message if isinstance(error, AlulaError) else f"{type(error).__name__}: {error}"
    return re.sub(r"0x[0-9a-f]+", "0x...", " ".join(text.split()))[:300]


# -- running --------------------------------------------------------------------------------------------------------


def tried(name: str, kind: str, seconds: int = SECONDS) -> dict[str, str]:
    """`examine` in a process of its own, which a crash or the clock may end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.alarm(seconds)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with os.fdopen(writing, "w") as pipe:
            json.dump(examine(name, kind), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return {"built": f"no: not done in {seconds} s" if ended == signal.SIGALRM else f"no: the process died ({status})"}


# -- the page -------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Supported classes

Made by `python tools/supported.py`, which builds a tiny random instance of every class that transformers {version}
names for causal language models, for images or sounds with text, and for speech to text, and puts it to every use. Do
not edit by hand.

| use | what was checked |
|---|---|
| parts | what leaves a layer is what came in and what its two halves were seen to add |
| wings, experts | fresh, a graft changes nothing; awake, it is heard behind a medium, and text alone keeps its bits |
| (both) | padding changes nothing; detached, the host answers bit for bit as before |
| generate | with Wings on, cached decoding gives the logits of the whole forward |
| train | a finite gradient reaches every weight of the graft |
| probes | all built-in probes watch a forward and change no bit; the vocabulary lens ends in the host's own logits |
| policies | withdrawal, skipped MLP, skipped attention: cached and uncached alike, and text keeps its bits |

*medium*: "image" or "audio" where the class's own tower made the tokens; "named" where it does not take a medium in a
way that the tool knows, or takes none, and a `token_map` called some tokens of the text an image.

"refused": an error says so with this reason. "fails" would be a defect of alula. "host": the class itself, with nothing
of alula on it, does not do it when it is this small. Weights are random: that a class works here says that its
structure is read rightly, not that a graft learns well on it.

Hybrids are tried in the layers that have attention. Gemma-4 is tried as 31B is built; E2B and E4B, whose layers are
given embeddings of their own and share keys, are refused. Where what is seen reaches the decoder by cross-attention, no
probe works: each reads tokens that stand in the decoder, and none needs less.
"""


def page(record: dict[str, Any]) -> str:
    """docs/supported.md."""
    rows = record["classes"]
    lines = [INTRODUCTION.format(version=record["transformers"])]
    lines += ["| | " + " | ".join(GROUPS) + " |", "|---" * (len(GROUPS) + 1) + "|"]
    for heading in TABLES:
        mine = [_group(row) for row in rows.values() if row["table"] == heading]
        lines.append(f"| {heading} | " + " | ".join(str(mine.count(group)) for group in GROUPS) + " |")
    for heading in TABLES:
        mine = {name: row for name, row in sorted(rows.items()) if row["table"] == heading}
        served = {name: row for name, row in mine.items() if _group(row) in GROUPS[:2]}
        lines += ["", f"## {heading.capitalize()}", ""]
        lines += ["| class | medium | " + " | ".join(USES) + " |", "|---" * (len(USES) + 2) + "|"]
        notes: list[str] = []
        for name, row in served.items():
            cells = [_cell(name, use, row[use], notes) for use in USES]
            lines.append(f"| {name} | {row['medium'].replace('tokens ', '')} | " + " | ".join(cells) + " |")
        if notes:
            lines += ["", *notes]
        for group, title in (("refused", "Refused"), ("not tried", "Not built, or not run by itself, when made small")):
            left = {name: _why(row) for name, row in mine.items() if _group(row) == group}
            if left:
                lines += [
                    "",
                    f"### {heading.capitalize()}: {title[0].lower() + title[1:]}",
                    "",
                    "| class | why |",
                    "|---|---|",
                ]
                lines += [f"| {name} | {_escaped(why)} |" for name, why in left.items()]
    return "\n".join(lines) + "\n"


GROUPS = ("all uses", "some uses", "refused", "not tried")


def _group(row: dict[str, str]) -> str:
    if row["built"] != "yes" or "forward" in row:
        return "not tried"
    if row["anatomy"] != "works":
        return "refused"
    return "all uses" if all(row[use] == "works" for use in USES) else "some uses"


def _why(row: dict[str, str]) -> str:
    text = row.get("forward") or (row["anatomy"] if row["built"] == "yes" else row["built"])
    return re.sub(r"^(no|host|refused): ", "", text)


def _cell(name: str, use: str, said: str, notes: list[str]) -> str:
    if said == "works":
        return "yes"
    kind, reason = said.split(": ", 1)
    notes.append(f"- {name}, {use}: {kind}: {_escaped(reason)}")
    return f"**{kind}**" if kind == "fails" else kind


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")  # messages cut short leave one backtick


def write(record: dict[str, Any]) -> None:
    """Save the record and the page."""
    record["classes"] = dict(sorted(record["classes"].items()))
    for path, text in ((RECORD, json.dumps(record, indent=1) + "\n"), (PAGE, page(record))):
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="CLASS", help="run these classes, again")
    parser.add_argument("--again", action="store_true", help="run classes that are recorded, too")
    parser.add_argument("--page", action="store_true", help="write the page from the record and stop")
    options = parser.parse_args()
    known = classes()
    if unknown := sorted(set(options.only) - set(known)):
        parser.error(f"transformers {transformers.__version__} names no class {unknown[0]!r} in its tables")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if options.page:
        write(record)
        return
    if record.get("transformers") != transformers.__version__ or (options.again and not options.only):
        record = {"transformers": transformers.__version__, "torch": torch.__version__, "classes": {}}
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    todo = options.only or [name for name in known if name not in record["classes"]]
    for name in todo:
        began = time.monotonic()
        table, kind = known[name]
        row = {"table": table, "type": kind, **tried(name, kind)}
        record["classes"][name] = row
        write(record)
        print(f"{name}: {_group(row)} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"written: {PAGE.relative_to(ROOT)}, {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
