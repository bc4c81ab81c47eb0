"""Build a host: a language model, a vision tower and a connector become one stock LLaVA model.

The result is ``LlavaForConditionalGeneration`` with ``LlavaProcessor``, fully described by its configuration:
nothing of alula is needed to load or run it. Videos, audio clips and connectors that LLaVA has no place
for make it a class of alula's own instead (:mod:`alula.hosts.multimodal`), and so does one encoder for all media
(:mod:`alula.hosts.universal`), by the same road. The language model's arithmetic is untouched, and that is checked, not
assumed: before a host is handed out, its text logits are compared bit for bit with those of the model it came from.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    ASTFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.hosts.audio_tower import AudioPart, audio_config, audio_part
from alula.hosts.configs import first_line
from alula.hosts.connectors import Connector, find_connector
from alula.hosts.custom import CustomTowerConfig
from alula.hosts.host import Host
from alula.hosts.multimodal import MEDIA as OWN_MEDIA
from alula.hosts.multimodal import (
    AlulaConfig,
    AlulaForConditionalGeneration,
    AlulaProcessor,
    Connectors,
    ConnectorShape,
)
from alula.hosts.multimodal.connectors import QUERIES
from alula.hosts.opening import automatic, remember
from alula.hosts.parts import (
    LanguagePart,
    Part,
    VisionPart,
    VisionSource,
    language_config,
    language_part,
    vision_config,
    vision_part,
    weightless,
)
from alula.hosts.placement import dtype_named
from alula.hosts.quiet import quiet_loading
from alula.hosts.templates import adapt, default_template
from alula.hosts.towers import TowerShape, family, shape
from alula.hosts.universal import UniversalConfig, UniversalForConditionalGeneration, UniversalProcessor
from alula.hosts.universal.planning import LAST, UniversalPlan
from alula.media import MEDIA

logger = logging.getLogger(__name__)

_DECODER, _TOWER, _PROJECTOR, _HEAD = (
    "model.language_model.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "lm_head.weight",
)
# LLaVA reads the last-but-one block: the last serves the tower's own training objective
PENULTIMATE = -2
_ROUND = 8
_AUDIO_TOWER = "model.audio_tower."
NUM_FRAMES = 8
_FRAME_SIDE = 2
CONNECTOR = "mlp2x_gelu"
UNIVERSAL = "universal"


def build_host(
    llm: Part,
    vision: VisionSource,
    connector: str = CONNECTOR,
    *,
    feature_layer: int | list[int] | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    image_token: str = "<image>",
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: BaseImageProcessor | None = None,
    audio: Part | None = None,
    video: bool = False,
    shared: bool = False,
    audio_stack: int | None = None,
    connector_options: Mapping[str, Any] | None = None,
    feature_extractor: Any = None,
    encoder: str | None = None,
    modalities: Sequence[str] | None = None,
    modality_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Host:
    """Assemble a host from parts: a stock LLaVA model, unless it is to do what LLaVA cannot.

    Videos, audio clips and the ``queries`` connector make it an
    :class:`alula.hosts.multimodal.AlulaForConditionalGeneration`, ``encoder="universal"`` a
    :class:`alula.hosts.universal.UniversalForConditionalGeneration`, whose vision tower reads every medium.

    Args:
        llm: causal language model: a hub id, a directory, "fledgling", a loaded model (copied, never changed), or a
            configuration (random weights).
        vision: vision tower (CLIP, SigLIP, DINOv2 families), in the same forms; or any other module of PyTorch that
            makes tokens of pixels, with its ``image_processor`` (see `alula.hosts.custom`).
        connector: "linear", "mlp2x_<activation>" (see :mod:`alula.hosts.connectors`) or "queries" (see
            :mod:`alula.hosts.multimodal.connectors`).
        feature_layer: index into the tower's ``hidden_states`` (0 = embeddings, -1 = last block), or several, whose
            tokens are concatenated along the width; None = the last block but one, or what there is.
        dtype: floating-point type of the whole host; None takes the language model's.
        seed: of the connector's weights, and of parts given as configurations.
        image_token: placeholder token; reused where the vocabulary has it, added otherwise. Name a reserved token here
            (``<|reserved_special_token_0|>``, ``<unused0>``) to keep the vocabulary's size.
        tokenizer: for an ``llm`` given as an object.
        image_processor: instead of the one beside the tower.
        audio: audio tower (AST, or a Whisper, whose encoder is taken), in the same forms; the host then takes audio
            clips at ``<audio>``.
        video: the host takes videos at ``<video>``: eight frames through the vision tower.
        shared: one connector for all media instead of one each.
        audio_stack: so many moments of a clip that follow one another go side by side into one token; None = 10 of
            Whisper's (0.2 seconds), 1 of others.
        connector_options: of "queries": num_queries, width, layers, heads, feedforward, up_width; of a universal
            encoder: experts, depth, heads, modality_tokens, feedforward, router (see `alula.hosts.universal.shapes`).
        feature_extractor: instead of the one beside the audio tower (for Whisper, one with a smaller ``chunk_length``
            makes the window so long); for a universal encoder an object or where to find it (default: of
            ``modality_options``' size).
        encoder: "universal": the tower (CLIP, SigLIP, DINOv2) serves all media, through OneLLM's projection module. The
            options below say how; ``connector``, ``feature_layer``, ``audio``, ``video`` and ``shared`` are then left
            alone.
        modalities: what a universal encoder reads: ``image`` and any of ``video``, ``audio``, ``points``, ``depth``,
            ``normals``, ``motion``, ``response``.
        modality_options: sizes by modality, see `alula.hosts.universal.shapes`.

    Returns:
        ``(model, processor)``; evaluation mode, on the language model's device.

    Raises:
        UsageError: unknown connector, a feature layer the tower does not have.
        HostError: a part that cannot be read or carried, or whose text logits a stock LLaVA model would change.
    """
    universal = _universal(encoder, connector, feature_layer, audio, video, shared, modalities, modality_options)
    _check_stack(audio_stack, audio)
    plan = None
    if universal:
        plan = UniversalPlan.of(modalities, connector_options, modality_options, feature_extractor)
        kind, recipe = None, None
    else:
        kind, recipe = _connector(connector, audio, video, shared, connector_options, feature_extractor)
    chosen = dtype_named(dtype)
    language = language_part(llm, tokenizer, chosen, seed)
    _refuse_altered_heads(language.model)
    tower = vision_part(vision, image_processor, chosen, seed)
    geometry = shape(tower.model.config, tower.image_processor)
    layers = _layers(feature_layer, tower.model.config)
    if plan is not None:
        plan.check(tower.model.config)
    elif geometry.patch_size is None:  # no square grid, which a stock LLaVA processor counts
        if video:
            raise HostError(
                f"the tower's {geometry.tokens} tokens are no square grid, over which frames are averaged",
                where="video",
                remedy="leave video out, or take a tower of square grids",
            )
        kind, recipe = None, recipe or ConnectorShape.named(connector)
    audio_tower = None if audio is None else audio_part(audio, feature_extractor, chosen, seed)

    tokens = {
        "image": image_token,
        **({"video": "<video>"} if video else {}),
        **({"audio": "<audio>"} if audio_tower else {}),
        **{medium: f"<{medium}>" for medium in (plan.sizes if plan else ()) if medium != "image"},
    }
    ids = {medium: _token_id(language.tokenizer, token) for medium, token in tokens.items()}
    image_id = ids["image"]
    text_config, text_state = _text_state(language.model, num_embeddings=max(ids.values()) + 1)
    vision_config, vision_state = _vision_state(tower.model)
    final = language.model.dtype
    if plan is not None:
        whole = plan.config(text_config, vision_config, ids)
        connectors = {_PROJECTOR + key: value for key, value in plan.connectors(whole, seed).state_dict().items()}
        model = _assemble(UniversalForConditionalGeneration, whole, {**text_state, **vision_state, **connectors}, final)
        return _finished(model, language, tower, plan.feature_extractor, geometry, tokens, ids)
    if recipe is not None:
        stack = audio_tower.stack(audio_stack) if audio_tower else 1
        own, more = _multimodal(
            recipe, text_config, vision_config, audio_tower, stack, ids, geometry, layers, shared, seed
        )
        model = _assemble(AlulaForConditionalGeneration, own, {**text_state, **vision_state, **more}, final)
        extractor = audio_tower.feature_extractor if audio_tower else ASTFeatureExtractor(num_mel_bins=32)
        return _finished(model, language, tower, extractor, geometry, tokens, ids)
    assert kind is not None
    config = LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=image_id,
        image_seq_length=geometry.tokens,
        vision_feature_select_strategy=geometry.select,
        vision_feature_layer=layers,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **kind.config,
    )
    state = {**text_state, **vision_state, **_projector_state(config, kind, seed)}
    model = _assemble(LlavaForConditionalGeneration, config, state, final)
    return _finished(model, language, tower, None, geometry, tokens, ids)


def foresee(
    llm: str,
    vision: str,
    connector: str,
    *,
    feature_layer: int | None,
    audio: str | None,
    video: bool,
    shared: bool,
    audio_stack: int | None,
    connector_options: Mapping[str, Any] | None,
    feature_extractor: Any,
    encoder: str | None,
    modalities: Sequence[str] | None,
    modality_options: Mapping[str, Mapping[str, Any]] | None,
) -> PreTrainedModel | None:
    """Refuse what `build_host` would refuse, as far as configurations tell, without loading anything.

    Returns:
        The language model without weights, or None where its class cannot be made so.

    Raises:
        UsageError, HostError: as `build_host`.
    """
    plan = None
    _check_stack(audio_stack, audio)
    if _universal(encoder, connector, feature_layer, audio, video, shared, modalities, modality_options):
        plan = UniversalPlan.of(modalities, connector_options, modality_options, feature_extractor)
    else:
        _connector(connector, audio, video, shared, connector_options, feature_extractor)
    _, language = language_config(llm)
    _, tower = vision_config(vision)
    if isinstance(tower, CustomTowerConfig):
        weightless(AutoModel, tower)  # whose class, or a package that it takes, may not be there
    if plan is not None:
        plan.check(tower)
    _layers(feature_layer, tower)
    if audio is not None:
        audio_config(audio)
    model = weightless(AutoModelForCausalLM, language)
    if model is not None:
        _refuse_altered_heads(model)
    return model


def _universal(
    encoder: str | None,
    connector: str,
    feature_layer: int | list[int] | None,
    audio: Part | None,
    video: bool,
    shared: bool,
    modalities: Sequence[str] | None,
    modality_options: Mapping[str, Mapping[str, Any]] | None,
) -> bool:
    """Whether one encoder is to serve all media.

    Raises:
        UsageError: another encoder, or an option that has no meaning with or without it.
    """
    if encoder is None:
        if modalities is not None or modality_options is not None:
            raise UsageError(
                "modalities and modality_options have no meaning without a universal encoder",
                remedy='pass encoder="universal", or video=True and audio= for towers of their own',
            )
        return False
    if encoder != UNIVERSAL:
        raise UsageError(f"no encoder is called {encoder!r}", where="encoder", remedy=f'"{UNIVERSAL}", or none')
    given = {
        "connector": connector != CONNECTOR,
        "feature_layer": feature_layer not in (None, LAST),
        "audio": audio is not None,
        "video": video,
        "shared": shared,
    }
    for name, is_given in given.items():
        if is_given:
            raise UsageError(
                "has no meaning with a universal encoder",
                where=name,
                remedy="leave it out; modalities says what the host takes, connector_options how it is made",
            )
    return True


def _check_stack(stack: int | None, audio: Part | None) -> None:
    if stack is not None and audio is None:
        raise UsageError("has no meaning without an audio tower", where="audio_stack", remedy="leave it out")


def _connector(
    connector: str,
    audio: Part | None,
    video: bool,
    shared: bool,
    options: Mapping[str, Any] | None,
    feature_extractor: Any,
) -> tuple[Connector | None, ConnectorShape | None]:
    """The connector of a stock LLaVA host, or else the shape of those of a host of alula's own class."""
    own_class = audio is not None or video or connector == QUERIES
    if not own_class and (shared or options or feature_extractor is not None):
        raise UsageError(
            "shared, connector_options and feature_extractor have no meaning for an image host with this connector",
            remedy="add video or audio, or use the connector 'queries'",
        )
    return (None, ConnectorShape.named(connector, options)) if own_class else (find_connector(connector), None)


def _finished(
    model: Any,
    language: LanguagePart,
    tower: VisionPart,
    feature_extractor: Any,
    geometry: TowerShape,
    tokens: Mapping[str, str],
    ids: Mapping[str, int],
) -> Host:
    """The host of an assembled model, after the proofs."""
    model.to(device=language.model.device)
    silent = {*ids.values(), *range(language.num_embeddings, model.config.text_config.vocab_size)}
    model.generation_config = _generation_config(language, sorted(silent))
    template = _template(language.tokenizer, tokens, model.generation_config)
    processor: ProcessorMixin
    if isinstance(model.config, UniversalConfig):
        processor = UniversalProcessor(
            tower.image_processor,
            feature_extractor,
            language.tokenizer,
            chat_template=template,
            tokens_per_item=model.config.tokens_per_item,
            sizes=model.config.sizes,
            placeholders=dict(tokens),
        )
    elif isinstance(model.config, AlulaConfig):
        processor = AlulaProcessor(
            tower.image_processor,
            feature_extractor,
            language.tokenizer,
            chat_template=template,
            tokens_per_item=model.config.tokens_per_item,
            num_frames=model.config.num_frames,
            **{f"{medium}_token": tokens.get(medium) for medium in OWN_MEDIA},
        )
    else:
        processor = LlavaProcessor(
            image_processor=tower.image_processor,
            tokenizer=language.tokenizer,
            patch_size=geometry.patch_size,
            vision_feature_select_strategy=geometry.select,
            chat_template=template,
            image_token=tokens["image"],
            num_additional_image_tokens=geometry.extra_positions,
        )
    host = Host(model, processor)
    _prove_text(host, language.model)
    try:
        Anatomy.of(model)
    except HostError as error:  # told here, not only when it is to be trained
        logger.warning(
            "transformers runs this host, and recipes of projector, full and lora train it; no graft, policy or probe "
            "goes on it: %s",
            error.message,
        )
    _prove_tokens(host, geometry)
    return host


def _multimodal(
    shape: ConnectorShape,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    audio_tower: AudioPart | None,
    stack: int,
    ids: Mapping[str, int],
    geometry: TowerShape,
    layers: int | list[int],
    shared: bool,
    seed: int,
) -> tuple[AlulaConfig, dict[str, torch.Tensor]]:
    """Configuration of a host of alula's own class, and the weights that LLaVA has not."""
    if shape.keeps_tokens:
        # every token would cost one in the decoder: a frame is pooled to 2 x 2, a moment of audio to one token
        moments = audio_tower.moments if audio_tower else 0
        tokens = {"image": geometry.tokens, "video": NUM_FRAMES * _FRAME_SIDE**2, "audio": moments // stack}
    else:
        tokens = dict.fromkeys(OWN_MEDIA, shape.num_queries)
    audio_config, state = None, {}
    if audio_tower is not None:
        audio_config = copy.deepcopy(audio_tower.model.config)
        state = {_AUDIO_TOWER + key: value for key, value in audio_tower.model.state_dict().items()}
    config = AlulaConfig(
        text_config=text_config,
        vision_config=vision_config,
        audio_config=audio_config,
        media=list(ids),
        tokens_per_item={medium: tokens[medium] for medium in ids},
        connector=shape.as_dict(),
        shared_connector=shared,
        vision_feature_layer=layers,
        vision_feature_select_strategy=geometry.select,
        num_frames=NUM_FRAMES,
        frame_side=_FRAME_SIDE if shape.keeps_tokens else 0,
        pool_audio=shape.keeps_tokens or stack > 1,
        audio_stack=stack,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **{f"{medium}_token_id": identity for medium, identity in ids.items()},
    )
    connectors = Connectors(config).float()
    connectors.initialise(seed)
    return config, {**state, **{_PROJECTOR + key: value for key, value in connectors.state_dict().items()}}


def _refuse_altered_heads(model: Any) -> None:
    """Refuse what the stock class would drop without a word between the last block and the logits."""
    config, name = model.config, type(model).__name__
    if type(config) not in MODEL_MAPPING or MODEL_MAPPING[type(config)] is not type(model.base_model):
        raise HostError(f"{name} does not have the decoder AutoModel builds from its configuration", where="llm")
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        raise HostError(
            f"{name} caps its final logits at {softcap}; the stock LLaVA class has no such cap and would change them",
            where="llm",
            remedy="use a model without final_logit_softcapping (Gemma-3 instead of Gemma-2)",
        )
    for key in ("logit_scale", "logits_scaling", "logits_scale"):
        if getattr(config, key, 1) not in (None, 1):
            raise HostError(
                f"{name} scales its logits ({key}={getattr(config, key)}); the stock LLaVA class does not", where="llm"
            )
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise HostError(
            f"{name} has no plain output layer (missing, or with a bias) as the stock LLaVA class has", where="llm"
        )
    width = config.hidden_size
    if head.weight.shape[1] != width or model.get_input_embeddings().weight.shape[1] != width:
        raise HostError(
            f"{name} embeds tokens {model.get_input_embeddings().weight.shape[1]} wide and works {width} wide; "
            "the stock LLaVA class has one width",
            where="llm",
        )


def _layers(asked: int | list[int] | None, config: PreTrainedConfig) -> int | list[int]:
    """Which of a tower's hidden states are read; a tower of one's own has one."""
    states = config.num_hidden_layers + 1
    layers = (PENULTIMATE if states > 1 else LAST) if asked is None else asked
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -states <= layer < states:
            raise UsageError(
                f"the tower has hidden states 0..{states - 1} (or -{states}..-1), not {layer}", where="feature_layer"
            )
    return layers


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Id of a placeholder, which is always split off whole; added to the tokenizer if it lacks it."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.get_vocab()[token])


def _text_state(model: Any, num_embeddings: int) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of the decoder under LLaVA's names, with at least ``num_embeddings`` embeddings.

    New embeddings are the mean of the old ones: the placeholder's input row is overwritten by the image, and as an
    output a mean row attracts next to no probability.
    """
    config = copy.deepcopy(model.config)
    state = dict(model.base_model.state_dict())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding.data_ptr() == head.data_ptr()
    (name,) = [key for key, value in state.items() if value.data_ptr() == embedding.data_ptr()]
    # LLaVA ties the head to `language_model.embed_tokens` and nowhere else
    config.tie_word_embeddings = tied and name == "embed_tokens.weight"
    if num_embeddings > embedding.shape[0]:
        # tensor cores want the logits' width a multiple of 16 bytes
        config.vocab_size = -(-num_embeddings // _ROUND) * _ROUND
    else:
        config.vocab_size = embedding.shape[0]
    state[name] = _grow(embedding.detach(), config.vocab_size)
    renamed = {_DECODER + key: value for key, value in state.items()}
    if not config.tie_word_embeddings:
        renamed[_HEAD] = _grow(head.detach(), config.vocab_size)
    return config, renamed


def _grow(weight: torch.Tensor, rows: int) -> torch.Tensor:
    if weight.shape[0] == rows:
        return weight
    mean = weight.float().mean(dim=0).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def _vision_state(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    kind = family(model.config)
    config = copy.deepcopy(model.config)
    for key, value in kind.trims:
        setattr(config, key, value)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(kind.unused or "\0")}
    return config, {_TOWER + key: value for key, value in state.items()}


def _projector_state(config: LlavaConfig, kind: Connector, seed: int) -> dict[str, torch.Tensor]:
    projector = LlavaMultiModalProjector(config).float()
    kind.initialise(projector, seed)
    return {_PROJECTOR + key: value for key, value in projector.state_dict().items()}


def _assemble(cls: Any, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The model from its configuration and weights by the road every saved host takes when it is loaded."""
    # the copies keep the user's own models out of the host's reach
    owned = {
        key: value.detach().to(dtype, copy=True) if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }
    with quiet_loading():
        loaded: Any = cls.from_pretrained(None, config=config, state_dict=owned, dtype=dtype, output_loading_info=True)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            where = type(config.get_text_config()).__name__
            raise HostError(f"{kind.replace('_', ' ')}: {sorted(info[kind])[:3]}", where=where)
    model.name_or_path = model.config.name_or_path = ""  # transformers writes "None", and cards and adapters quote it
    return model.eval()


def _generation_config(language: LanguagePart, silent: list[int]) -> GenerationConfig:
    """The language model's own, which never emits a placeholder (or a row beside it) and knows how to pad."""
    config = copy.deepcopy(language.model.generation_config)
    config._from_model_config = False  # or transformers would derive it anew from the LLaVA configuration
    tokenizer = language.tokenizer
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = [*(config.suppress_tokens or []), *silent]
    return config


def _template(tokenizer: PreTrainedTokenizerBase, placeholders: Mapping[str, str], generation: GenerationConfig) -> str:
    """The host's chat template, which is set on the tokenizer, too."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generate; the latter is what is saved
    ends = generation.eos_token_id
    ids = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.chat_template is None:
        tokenizer.chat_template, stop = default_template(tokenizer)
        if stop not in tokenizer.convert_ids_to_tokens(ids):
            generation.eos_token_id = ids = [*ids, tokenizer.get_vocab()[stop]]
    stops = sorted({token for token in [*tokenizer.convert_ids_to_tokens(ids), tokenizer.eos_token] if token})
    template = adapt(tokenizer, placeholders, stops)
    tokenizer.chat_template = template
    _leave_special_tokens_to_the_template(tokenizer)
    return template


def _leave_special_tokens_to_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a processor's chat prompts the tokenizer's own.

    A tokenizer's ``apply_chat_template`` takes the template for the whole truth; a processor's lets the tokenizer add
    its automatic tokens unless the prompt starts with BOS. Where a template does not, one BOS would be too many.
    """
    question = [{"role": "user", "content": "a"}]
    prompt: Any = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token):
        return

    def extra() -> int:
        return len(tokenizer(prompt).input_ids) - len(tokenizer(prompt, add_special_tokens=False).input_ids)

    if not extra():
        return
    remember(tokenizer, automatic(tokenizer))
    for option in ("add_bos_token", "add_eos_token"):
        setattr(tokenizer, option, False)
        tokenizer.init_kwargs[option] = False
    if extra():
        raise HostError(
            f"{type(tokenizer).__name__} adds special tokens that its chat template does not have",
            where="tokenizer",
            remedy="pass tokenizer= one that adds none, or a chat template that starts with its BOS",
        )
    logger.warning("the host's tokenizer adds no special tokens by itself any more: its chat template does not either")


@torch.no_grad()
def _prove_text(host: Host, llm: Any) -> None:
    """Compare host and language model bit for bit on text: the decoder's output, and the way from there to the logits.

    The logits themselves are compared through their two factors, because a matrix product may round differently when
    its matrix has more rows (on a GPU, where the shape picks the kernel; on CPUs it was never seen to).
    """
    head = llm.get_output_embeddings().weight
    size = head.shape[0]
    ids = torch.linspace(0, size - 1, 16, device=llm.device).long()[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    training = llm.training
    llm.eval()
    expected, logits = llm.base_model(**inputs).last_hidden_state, llm(**inputs).logits
    llm.train(training)
    model: Any = host.model
    try:
        got = model.model(**inputs).last_hidden_state
    except Exception as error:
        reason = f"does not run inside the stock LLaVA class ({first_line(error)})"
        raise HostError(f"{type(llm).__name__} {reason}", where="llm") from error
    if torch.equal(got, expected) and torch.equal(logits, torch.nn.functional.linear(expected, head)):
        if not torch.equal(model.lm_head.weight[:size], head):
            raise HostError("the output embeddings did not survive the move", where="llm")
        return
    decoder = dict(model.model.language_model.named_buffers())
    rounded = [name for name, value in llm.base_model.named_buffers() if value.dtype != decoder[name].dtype]
    if rounded:
        raise HostError(
            f"its buffer {rounded[0]!r} was cast with the weights (model.to or .half), which no saved model remembers",
            where="llm",
            remedy="load the model with dtype=..., or give its path",
        )
    raise HostError(
        f"{type(llm).__name__} computes its logits in a way that the stock LLaVA class does not know",
        where="llm",
        remedy="choose another language model",
    )


@torch.no_grad()
def _prove_tokens(host: Host, geometry: TowerShape) -> None:
    """Check that the towers emit as many tokens as the processor reserves."""
    model: Any = host.model
    processor: Any = host.processor
    blank = Image.new("RGB", (geometry.image_size, geometry.image_size))
    media: dict[str, tuple[str, Any]] = {"image": ("pixel_values", {"images": [blank]})}
    if getattr(processor, "video_token", None):
        media["video"] = ("pixel_values_videos", {"videos": [np.zeros((2, *blank.size, 3), np.uint8)]})
    if getattr(processor, "audio_token", None):
        media["audio"] = ("input_features", {"audio": [np.zeros(processor.feature_extractor.sampling_rate // 4)]})
    if isinstance(processor, UniversalProcessor):
        media |= {medium: (MEDIA[medium].inputs[0], {medium: [blank]}) for medium, blank in processor.blanks().items()}
    for medium, (key, given) in media.items():
        inputs = processor(text=[getattr(processor, f"{medium}_token")], return_tensors="pt", **given)
        read = getattr(model.base_model, f"get_{medium}_features")
        tokens = read(inputs[key].to(model.device, model.dtype), return_dict=True).pooler_output[0].shape[0]
        reserved = int((inputs["input_ids"] == getattr(model.config, f"{medium}_token_id")).sum())
        if tokens != reserved:
            where = "audio" if medium == "audio" else "vision"
            raise HostError(
                f"the tower emits {tokens} tokens per {medium}, the processor reserves {reserved}", where=where
            )
