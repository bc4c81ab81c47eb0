"""Where a host keeps its parts: decoder layers, attention, MLP, norms, embeddings, head, towers, projector.

The tables below are the only place that knows how transformers' model classes name their insides.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from alula.errors import HostError, UsageError
from alula.items import Host, Tokens, locate, shapes
from alula.media import MEDIA
from alula.tokens import UNKNOWN, Modality

NAME = "alula"
"""what alula puts into a host stands under this name: the seam in the host, containers of grafts in its layers, and the
keyword a `ForwardContext` travels as"""


@dataclass(frozen=True)
class _Family:
    """How one family of decoder layers names its parts (attribute paths below the layer).

    `attention_out` is the module whose output is added to the residual stream after attention: the attention itself in
    pre-norm layers, a norm behind it in "sandwich" layers. `mlp_out` likewise for the feed-forward half. None: a layer
    of this family has no such part.
    """

    layers: str = "layers"

    attention: str = "self_attn"
    beside: str | None = None  # what mixes tokens beside attention, by a running state
    attention_out: str = "self_attn"
    mlp: str | None = "mlp"
    mlp_out: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    more: tuple[str, ...] = ()
    final_norm: str | None = None  # None: one of `_FINAL_NORMS`

    def parts(self) -> list[str]:
        """Paths below a layer that have to be there."""
        names = (
            *(self.attention, self.attention_out, self.beside, self.mlp, self.mlp_out),
            *(self.attention_norm, self.mlp_norm, *self.more),
        )
        return [name for name in names if name is not None]


_FINAL_NORMS = ("norm", "final_layernorm", "embedding_norm")

_PRE_NORM = _Family()
_SANDWICH = _Family(
    attention_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mlp_norm="pre_feedforward_layernorm",
)
_POST_NORM = _Family(
    attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", attention_norm=None, mlp_norm=None
)
# GLM-4 calls the norms behind its halves after them, and the one in front of the MLP as a pre-norm decoder does
_NAMED_SANDWICH = _Family(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")
_APERTUS = _Family(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm")
_VAULT_GEMMA = _Family(mlp_norm="pre_feedforward_layernorm")
_PARALLEL = _Family(mlp_norm=None)  # one norm for both halves, which read the same (Cohere)
_LLAMA4 = _Family(mlp="feed_forward", mlp_out="feed_forward")
_LFM2 = _Family(
    mlp="feed_forward",
    mlp_out="feed_forward",
    attention_norm="operator_norm",
    mlp_norm="ffn_norm",
)
_FALCON_H1 = _Family(
    beside="mamba",
    mlp="feed_forward",
    mlp_out="feed_forward",
    mlp_norm="pre_ff_layernorm",
)
_GEMMA4_MOE = _Family(
    attention_out="post_attention_layernorm",
    mlp=None,  # it and the experts run side by side
    mlp_out="post_feedforward_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    more=(
        *("mlp", "router", "experts"),
        *("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"),
    ),
)
_GPT_NEOX = _Family(attention="attention", attention_out="attention", final_norm="final_layer_norm")
_GPT2 = _Family(
    layers="h", attention="attn", attention_out="attn", attention_norm="ln_1", mlp_norm="ln_2", final_norm="ln_f"
)
_OPT = _Family(
    attention_norm="self_attn_layer_norm",
    mlp=None,  # its two matrices stand in the layer itself
    mlp_out="fc2",
    mlp_norm="final_layer_norm",
    final_norm="final_layer_norm",
)

# told apart by what a layer consists of
_BY_PARTS = (
    *(_PRE_NORM, _SANDWICH, _POST_NORM, _NAMED_SANDWICH, _APERTUS, _VAULT_GEMMA, _PARALLEL),
    *(_LLAMA4, _LFM2, _FALCON_H1, _GEMMA4_MOE),
)

# decoder config.model_type -> family, of those whose layers are named otherwise or hold more than their parts
FAMILIES: Mapping[str, _Family] = {
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
    "opt": _OPT,
}

# decoders that stand inside of a whole causal model with a head -> as decoder config.model_type
_WHOLE_INSIDE = {"llama4_text"}

_NO_INTERFACE = "its attention does not go through transformers' attention interface, keywords and all"
_BY_CROSS_ATTENTION = "what it sees reaches its layers by cross-attention, not as tokens"

_Q_FORMER = "Q-Former that reads the image by cross-attention"
_NO_TOKENS = (
    "grafts, policies and all probes (none needs less) go by tokens that stand in the decoder: use a host that has its "
    "images there, such as LLaVA or Qwen-VL (docs/supported.md)"
)

# classes of layers whose parts have the names of a family and stand otherwise -> how
_DEVIATIONS = {
    "ChameleonSwinDecoderLayer": "its norms stand behind its halves under the names of those in front",
    "MiniMaxDecoderLayer": "its stream goes on from behind its norms",
}

# decoder config.model_type of those whose rotary tables hold each angle once and whose attention rotates halves
_ANGLES_ONCE = {"gpt_oss"}

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "dense"}
# numbers of a layer or its attention that are known beside its parts: a logit per head that no key has, which eager
# attention weighs in before it hands out the weights of the others (GPT-OSS); factors by which a layer multiplies what
# its halves add (Granite, Falcon-H1), or what leaves it (Gemma-4): points show what is there before
_KNOWN_NUMBERS = {
    *("sinks", "residual_multiplier", "residual_scale", "layer_scalar"),
    *("attention_in_multiplier", "ssm_out_multiplier", "attn_out_multiplier"),
}
_LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}  # of DeepSeek's latent attention


@dataclass(frozen=True)
class MlpNames:
    """Where the matrices of an MLP stand (paths below the layer), of families whose matrices are single ones.

    Attributes:
        up: that make its channels: their outputs are channels.
        down: that reads them.
        width: key of the decoder's config that says how many there are.
    """

    up: tuple[str, ...]
    down: str
    width: str = "intermediate_size"


_MLPS = (
    MlpNames(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    MlpNames(("mlp.up_proj",), "mlp.down_proj"),
    MlpNames(("mlp.c_fc",), "mlp.c_proj"),
    MlpNames(("mlp.fc1",), "mlp.fc2"),
    MlpNames(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    MlpNames(("fc1",), "fc2", "ffn_dim"),
)


@dataclass(frozen=True)
class HeadNames:
    """Where the matrices of attention heads stand (paths below the layer).

    Attributes:
        read: queries, keys and values, which are made of the stream.
        out: what the heads read is written to the stream by.
    """

    read: tuple[str, str, str]
    out: str


_OUTS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class _TowerFamily:
    """How a family of vision transformers names what stands around its blocks (paths below the tower)."""

    first: str | None  # class token, in front of the patches
    pre_norm: str | None
    post_norm: str
    encoder: str = "encoder"


# tower config.model_type -> family, of those that can be given tokens in the place of patches
_TOWER_FAMILIES: Mapping[str, _TowerFamily] = {
    "clip_vision_model": _TowerFamily("embeddings.class_embedding", "pre_layrnorm", "post_layernorm"),
    "siglip_vision_model": _TowerFamily(None, None, "post_layernorm"),
    "dinov2": _TowerFamily("embeddings.cls_token", None, "layernorm"),
}


@dataclass(frozen=True, eq=False)
class TowerParts:
    """What of a vision transformer reads tokens that are no patches of its own. Build it with `TowerParts.of(tower)`.

    Attributes:
        first: (w,) class token; None where there is none.
        pre_norm: before the blocks; None where there is none.
        encoder: the blocks, called with tokens (N, S, w).
        post_norm: behind the last block.
    """

    first: Tensor | None
    pre_norm: nn.Module | None
    encoder: nn.Module
    post_norm: nn.Module

    @classmethod
    def of(cls, tower: Any) -> TowerParts:
        """The parts of a tower.

        Raises:
            HostError: it is of another family.
        """
        has_class_token(tower.config)
        family = _TOWER_FAMILIES[tower.config.model_type]
        return cls(
            None if family.first is None else attrgetter(family.first)(tower).reshape(-1),
            None if family.pre_norm is None else attrgetter(family.pre_norm)(tower),
            attrgetter(family.encoder)(tower),
            attrgetter(family.post_norm)(tower),
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens (N, S, w), class token and positions included -> what the last block makes of them, normed."""
        encoder: Any = self.encoder
        entered = tokens if self.pre_norm is None else self.pre_norm(tokens)
        return self.post_norm(encoder(entered).last_hidden_state)


def has_class_token(config: Any) -> bool:
    """Whether a vision transformer of this configuration has a class token in front.

    Raises:
        HostError: its family cannot be given tokens in the place of patches.
    """
    family = _TOWER_FAMILIES.get(config.model_type)
    if family is None:
        raise HostError(
            f"{config.model_type!r} cannot be given other tokens than patches of images",
            where="vision",
            remedy=f"use one of: {', '.join(_TOWER_FAMILIES)}",
        )
    return family.first is not None


_DECODERS = ("language_model", "text_model")
_TOWERS = ("vision_tower", "visual", "vision_model")
_PROJECTORS = ("multi_modal_projector",)


@dataclass(frozen=True, eq=False)
class HostParts:
    """The parts of any host, whatever its decoder is made of: what training all of it asks for. Build it with
    `HostParts.of(model)`.

    Attributes:
        host: the model with the language-model head, unwrapped from PEFT.
        backbone: the module below the head that takes `input_ids` (for a multimodal host the part that merges images).
        decoder: the text decoder, which owns the layers.
        config: the decoder's config.
        layers: the decoder layers.
        embeddings, head: the decoder's ends (`head` is None for a headless model).
        tower, projector: of an image host, else None.
        audio_tower: of a host that hears, else None.
        placeholders: token id per perceptual modality of this host.
    """

    host: Any
    backbone: Any
    decoder: Any
    config: Any
    layers: Sequence[nn.Module]
    embeddings: nn.Module
    head: nn.Module | None
    tower: nn.Module | None
    audio_tower: nn.Module | None
    projector: nn.Module | None
    placeholders: Mapping[Modality, int]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Find the parts of `model`, a stock transformers model (PEFT wrappers are looked through).

        Raises:
            HostError: it is none, or what it sees does not stand as tokens in its decoder.
        """
        host: Any = unwrap(model)
        config = getattr(host, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise HostError(f"{type(model).__name__} is not a transformers model", remedy="pass a PreTrainedModel")
        text_config = config.get_text_config(decoder=True)
        backbone = getattr(host, host.base_model_prefix, host)
        inner: Any = _first(backbone, _DECODERS)
        decoder: Any = backbone if inner is None else inner
        if text_config.model_type in _WHOLE_INSIDE and isinstance(getattr(decoder, "lm_head", None), nn.Module):
            decoder = decoder.model
        decoder = getattr(decoder, "decoder", decoder)
        if inner is None:
            backbone = decoder  # OPTForCausalLM calls its decoder, not the model around it
        elsewhere = _sees_elsewhere(config, decoder)
        if elsewhere is not None:
            raise _not_supported(host, text_config, elsewhere, remedy=_NO_TOKENS)
        stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
        return cls(
            host=host,
            backbone=backbone,
            decoder=decoder,
            config=text_config,
            layers=list(max(stacks, key=len, default=())),
            embeddings=decoder.get_input_embeddings(),
            head=host.get_output_embeddings(),
            tower=_first(backbone, _TOWERS),
            audio_tower=_first(backbone, ("audio_tower",)),
            projector=_first(backbone, _PROJECTORS),
            placeholders=_placeholders(config),
        )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, which may differ from that of the embeddings (OPT-350m)."""
        return self.config.hidden_size


@dataclass(frozen=True, eq=False)
class Anatomy(HostParts):
    """The parts of one host, and of its decoder's layers. Build it with `Anatomy.of(model)`.

    Attributes:
        final_norm: behind the decoder's last layer.
        family: how a layer names its parts.
        attended: indices of the layers that have attention; the others of a hybrid decoder have a running state or a
            convolution in its place.
        has_angles_in_pairs: the decoder's rotary tables hold each angle twice side by side, not in two equal halves.
        turns_neighbors: attention rotates neighboring channels, not halves, however its tables stand (GLM).
        passes_keywords: layers hand on to attention the keywords they are given.
    """

    final_norm: nn.Module | None
    family: _Family
    attended: tuple[int, ...]
    has_angles_in_pairs: bool = False
    turns_neighbors: bool = False
    passes_keywords: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Find the parts of `model`, a stock transformers model (PEFT wrappers are looked through).

        Raises:
            HostError: the class is not one alula knows, naming it and the families that are known.
        """
        parts = HostParts.of(model)
        host, decoder, model_type = parts.host, parts.decoder, parts.config.model_type
        family = FAMILIES.get(model_type)
        layers = getattr(decoder, "layers" if family is None else family.layers, None)
        if family is None:
            family = _family_of(layers)
        oddity = _oddity(decoder, layers, family, is_listed=model_type in FAMILIES)
        if oddity is not None:
            raise _not_supported(
                *(host, parts.config, oddity),
                remedy=_NO_TOKENS
                if _BY_CROSS_ATTENTION in oddity
                else "use a decoder with layers like those of Llama, Gemma-3, OLMo-2 or GLM-4, or one of these "
                f"types: {', '.join(sorted(FAMILIES))}; docs/supported.md lists what is served",
            )
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise HostError(f"no decoder layers were found in {type(host).__name__}")
        attended = tuple(
            index for index, layer in enumerate(layers) if model_type in FAMILIES or _stand_in(layer, family) is None
        )
        missing = sorted({path for path in family.parts() for index in attended if not _has(layers[index], path)})
        if missing:
            raise HostError(
                f"{type(layers[0]).__name__} (decoder type {model_type!r}) lacks {', '.join(missing)}, by which alula "
                "knows its parts",
                remedy="use a release of transformers that alula was tested with (docs/results/versions.md)",
            )
        return cls(
            **{**vars(parts), "layers": list(layers)},
            final_norm=_final_norm(decoder, family),
            family=family,
            attended=attended,
            has_angles_in_pairs=model_type not in FAMILIES and _layout_of(decoder) == "pairs",
            turns_neighbors=model_type not in FAMILIES
            and _turns_neighbors(decoder, _part(layers[attended[0]], family.attention)),
            passes_keywords=all(_passes_keywords_on(type(layers[index]).forward) for index in attended),
        )

    # -- geometry -------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """HostError where it differs from layer to layer."""
        return self._alike("key heads", lambda config: getattr(config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        """HostError where it differs from layer to layer (`head_dims`)."""
        return self._alike("channels per head", self._head_dim)

    @cached_property
    def head_dims(self) -> tuple[int, ...]:
        """Width of a head, by layer: Gemma-4's are wider where all tokens are attended to."""
        by_layer = self._by_layer()
        return tuple(self._head_dim(self.config if by_layer is None else by_layer[i]) for i in range(self.num_layers))

    def _head_dim(self, config: Any) -> int:
        return getattr(config, "head_dim", None) or self.hidden_size // self.num_heads

    def _by_layer(self) -> Any:
        """The decoder's config as it is for each layer; None where it is the same for all."""
        return getattr(self.config, "per_layer_config", None)

    def _alike(self, what: str, number: Callable[[Any], int]) -> int:
        by_layer = self._by_layer()
        if by_layer is None:
            return number(self.config)
        found = sorted({number(by_layer[index]) for index in range(self.num_layers)})
        if len(found) > 1:
            raise HostError(
                f"the layers of {type(self.decoder).__name__} have different numbers of {what}: "
                f"{', '.join(map(str, found))}",
                remedy="use a host whose layers are alike",
            )
        return found[0]

    def layer_type(self, index: int) -> str:
        """The layer's type as its config names it, e.g. "full_attention", "sliding_attention", "linear_attention"."""
        return self._layer_types[index] if self._layer_types else "full_attention"

    @cached_property
    def _layer_types(self) -> tuple[str, ...]:
        """Asked in every layer of every forward, and a config takes long to answer."""
        return tuple(getattr(self.config, "layer_types", None) or ())

    def layer_indices(self, layers: Sequence[int] | None = None) -> list[int]:
        """Indices of the named decoder layers, in the order given; negative ones count from the last, None means all.

        Raises:
            UsageError: a layer that the decoder does not have.
        """
        count = self.num_layers
        if layers is None:
            return list(range(count))
        for layer in layers:
            if not -count <= layer < count:
                raise UsageError(f"layer {layer} does not exist", remedy=f"the decoder has layers 0 to {count - 1}")
        return [layer % count for layer in layers]

    def rope_at(self, index: int, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """What a layer takes for (B, S) positions of text, by the host's own rotary embedding: (cos, sin), or both as
        one complex table.

        `check_rope` says whether they can be had.

        Args:
            hidden: of their dtype and on their device.
        """
        rotary: Any = self.decoder.rotary_emb
        kind = {"layer_type": self.layer_type(index)} if _goes_by_kind(type(rotary).forward) else {}
        return rotary(hidden, _in_three(self.decoder, positions), **kind)

    @property
    def rope_types(self) -> set[str]:
        """How its rotary angles are scaled, as transformers names it, over all kinds of its layers."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        kinds = [parameters, *(each for each in parameters.values() if isinstance(each, Mapping))]
        return {str(each["rope_type"]) for each in kinds if each.get("rope_type") is not None}

    def check_rope(self) -> None:
        """Refuse a decoder whose tokens cannot be given other positions in some of its layers.

        Raises:
            HostError: positions are learned and added before the first layer; or its angles depend on how long the
                longest prompt so far was.
        """
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is None:
            raise HostError(
                f"{type(self.decoder).__name__} has no rotary embedding: positions are added before its first layer",
                remedy="leave positions as they are",
            )
        if any("dynamic" in kind for kind in self.rope_types):
            raise HostError(
                "the rotary angles of this decoder go by the longest prompt so far (dynamic scaling): asked for other "
                "positions they would change",
                remedy="leave positions as they are",
            )

    # -- parts of a layer -----------------------------------------------------------------------------------------

    def attention(self, index: int) -> nn.Module:
        """The layer's self-attention module; HostError where a hybrid decoder has something else in its place."""
        self._check_attended(index)
        return _part(self.layers[index], self.family.attention)

    def attention_out(self, index: int) -> nn.Module:
        """The module whose output joins the residual stream after attention; HostError as `attention`."""
        self._check_attended(index)
        return _part(self.layers[index], self.family.attention_out)

    @property
    def mixers(self) -> set[str]:
        """What mixes tokens in layers in the place of attention, or beside it, by path below the layer."""
        standing = {_stand_in(layer, self.family) for i, layer in enumerate(self.layers) if i not in self.attended}
        return {name for name in (*standing, self.family.beside) if name is not None}

    def _check_attended(self, index: int) -> None:
        if index not in self.attended:
            raise HostError(
                f"decoder layer {index} has no attention: {_stand_in(self.layers[index], self.family)} stands in its "
                "place",
                remedy=f"name layers that have it: layers={','.join(map(str, self.attended))}",
            )

    def check_tokens_apart(self, index: int) -> None:
        """Refuse a layer through which tokens cannot be sent without the others.

        Raises:
            HostError: a running state or a convolution goes over all tokens in it.
        """
        self._check_attended(index)
        if self.family.beside is not None:
            raise HostError(
                f"decoder layer {index} has {self.family.beside} beside its attention, whose state goes over all "
                "tokens: none can be taken out",
                remedy="use a host whose layers mix tokens by attention alone",
            )

    def mlp(self, index: int) -> nn.Module:
        """The layer's feed-forward module; HostError where its matrices stand in the layer itself (OPT)."""
        if self.family.mlp is None:
            raise HostError(
                f"{type(self.layers[index]).__name__} has no MLP module whose input could be read",
                remedy='take "mlp_norm", or "mlp" for what the feed-forward half adds',
            )
        return _part(self.layers[index], self.family.mlp)

    def mlp_out(self, index: int) -> nn.Module:
        """The module whose output joins the residual stream after the feed-forward half."""
        return _part(self.layers[index], self.family.mlp_out)

    def attention_norm(self, index: int) -> nn.Module:
        """The norm in front of attention; HostError where the family has none."""
        return self._norm(index, self.family.attention_norm, "attention")

    def mlp_norm(self, index: int) -> nn.Module:
        """The norm in front of the feed-forward half; HostError where the family has none."""
        return self._norm(index, self.family.mlp_norm, "the MLP")

    def mlp_names(self, linear: Collection[str]) -> MlpNames | None:
        """Where the MLP's matrices stand in every layer alike; None where they are not single ones that are known.

        Args:
            linear: paths of the linear modules that every layer has.
        """
        found = (each for each in _MLPS if {*each.up, each.down} <= {*linear} and hasattr(self.config, each.width))
        return next(found, None)

    def head_names(self, linear: Collection[str]) -> HeadNames:
        """Where the matrices of heads stand, or would: not all of these paths need be among `linear`."""
        at = self.family.attention
        out = next((name for name in _OUTS if f"{at}.{name}" in linear), _OUTS[0])
        return HeadNames((f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj"), f"{at}.{out}")

    def _norm(self, index: int, path: str | None, half: str) -> nn.Module:
        if path is None:
            raise HostError(
                f"{type(self.layers[index]).__name__} has no norm of its own in front of {half}",
                remedy='look at other points, such as "block_input" or "attention"',
            )
        return _part(self.layers[index], path)

    def logits(self, made: Tensor) -> Tensor:
        """(.., V) the host's logits, of what its head made: some classes scale them (Cohere, Granite, Falcon-H1) or cap
        them (Gemma-2), others with the same decoder leave them as they are (Gemma-3's with images)."""
        read, config = _globals_of(type(self.host).forward), self.config
        for name in ("logit_scale", "lm_head_multiplier"):
            if name in read:
                made = made * (getattr(config, name, None) or 1.0)
        if "logits_scaling" in read:
            made = made / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None) if "final_logit_softcapping" in read else None
        return made if cap is None else cap * torch.tanh(made / cap)

    @property
    def has_planes(self) -> bool:
        """Whether positions of images have height and width (M-RoPE)."""
        return "mrope_section" in (getattr(self.config, "rope_parameters", None) or {})

    # -- the tower ----------------------------------------------------------------------------------------------------

    def tower_layer(self) -> nn.Module:
        """The tower's layer that the host takes its features from; HostError where there is none that is known."""
        tower: Any = self.tower
        count = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
        lists = () if count is None else (each for each in tower.modules() if isinstance(each, nn.ModuleList))
        layers = next((each for each in lists if len(each) == count), None)
        if layers is None:
            raise HostError(
                f"{type(self.host).__name__} has no vision tower whose layers are known",
                remedy="choose by what the decoder is given",
            )
        feature = getattr(self.host.config, "vision_feature_layer", -1)  # of hidden states: those put in come first
        feature = feature if isinstance(feature, int) else feature[-1]
        return layers[feature if feature < 0 else feature - 1]

    @property
    def image_connector(self) -> nn.Module:
        """What takes the features of images from the tower to the decoder; HostError where there is none of its own, or
        other media go through it as well."""
        projector: Any = self.projector
        of = getattr(projector, "of", None)  # of a host with connectors by medium
        if projector is None or "shared" in getattr(projector, "_modules", ()):
            raise HostError(
                f"{type(self.host).__name__} has no connector between vision tower and decoder that only images go "
                "through, where their features could be read",
                remedy="do without (mks2.retrieval: null), or take a host whose connector stands outside of its tower",
            )
        return projector if of is None else of("image")

    @property
    def feature_size(self) -> int:
        """Width of the features that `image_connector` is given."""
        layers = getattr(self.host.config, "vision_feature_layer", None)
        return int(self.host.config.vision_config.hidden_size) * (
            len(layers) if isinstance(layers, list | tuple) else 1
        )

    @property
    def tower_heads(self) -> int:
        """Of its attention."""
        tower: Any = self.tower
        return int(getattr(getattr(tower, "config", None), "num_attention_heads", 1))

    @property
    def rotates(self) -> bool:
        """Whether the decoder rotates positions into queries and keys."""
        return getattr(self.decoder, "rotary_emb", None) is not None

    # -- rotary positions -----------------------------------------------------------------------------------------

    def rope(self, position_embeddings: tuple[Tensor, Tensor] | Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The host's (cos, sin) for a layer as (B or 1, S, R), R <= head_dim the rotated width; None without RoPE.

        Multimodal RoPE (Qwen2-VL) hands (3, B, S, R) to its layers and picks time, height and width by sections inside
        attention; here the same sections are picked beforehand. Tables whose angles stand in pairs (GLM-4V rotates
        neighbors, not halves), once (GPT-OSS) or as complex numbers (Llama-4) come in halves here: who brings queries
        and keys of its own rotates by halves everywhere.
        """
        if position_embeddings is None:
            return None
        if isinstance(position_embeddings, Tensor):
            cos, sin = (torch.cat([part, part], dim=-1) for part in torch.view_as_real(position_embeddings).unbind(-1))
            return cos, sin
        cos, sin = position_embeddings
        if self.config.model_type in _ANGLES_ONCE:
            cos, sin = (torch.cat([table, table], dim=-1) for table in (cos, sin))
            return cos, sin
        if cos.dim() == 4:
            sections = self.config.rope_parameters["mrope_section"] * 2
            cos, sin = (
                torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1)
                for table in (cos, sin)
            )
        if self.has_angles_in_pairs:
            cos, sin = (table[..., ::2].repeat(*[1] * (table.dim() - 1), 2) for table in (cos, sin))
        return cos, sin

    # -- items ----------------------------------------------------------------------------------------------------

    def items(
        self, inputs: Mapping[str, Any], modalities: Tokens, input_ids: Tokens | None = None
    ) -> tuple[Tokens, Tokens]:
        """Modality and item of every token of a forward, see `alula.items`. All arrays are int64, on the host.

        Args:
            inputs: of the forward.
            modalities: (B, S) values of `Modality`, as placeholders or `mm_token_type_ids` tell them.
            input_ids: (B, S) of the forward, where it has any.

        Returns:
            modalities (B, S), in which the tokens that end an image's lines are image tokens too, and items (B, S), -1
            for text and padding, `tokens.UNKNOWN` where they cannot be told apart.
        """
        host = Host(self.backbone, self.host.config)
        return locate(host, inputs, modalities, self.placeholders, input_ids)

    def shapes(self, inputs: Mapping[str, Any]) -> dict[Modality, list[tuple[int, int]]]:
        """Rows and columns of tokens of every medium of a forward in order, by modality, where the host is told them.

        Args:
            inputs: of the forward; those named in `items.SHAPES` are enough.
        """
        return shapes(Host(self.backbone, self.host.config), inputs)

    def tokens_per_item(self, inputs: Mapping[str, Any], modalities: Tensor) -> list[int] | None:
        """How many tokens each item of a forward's inputs takes, in batch order; None where it cannot be known.

        Args:
            inputs: of the forward.
            modalities: (B, S) values of `Modality`.
        """
        ids = inputs.get("input_ids")
        _, items = self.items(
            inputs, modalities.to(torch.int64).cpu().numpy(), None if ids is None else ids.to(torch.int64).cpu().numpy()
        )
        if not (items >= 0).any() or (items == UNKNOWN).any():
            return None
        return [int(n) for sample in items for n in np.bincount(sample[sample >= 0])]


def _final_norm(decoder: nn.Module, family: _Family) -> nn.Module | None:
    return _first(decoder, _FINAL_NORMS if family.final_norm is None else (family.final_norm,))


def _family_of(layers: Any) -> _Family:
    """The family whose parts some layer consists of; the pre-norm one where it is none's."""
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        found = _parts_of(layer)
        family = next((family for family in _BY_PARTS if set(family.parts()) == found), None)
        if family is not None:
            return family
    return _PRE_NORM


def _parts_of(layer: nn.Module) -> set[str]:
    return {name for name, part in layer.named_children() if not isinstance(part, nn.Dropout | nn.Identity)} - {NAME}


def _class_of(layer: nn.Module) -> str:
    return type(layer).__name__


def _stand_in(layer: nn.Module, family: _Family) -> str | None:
    """What a layer of a hybrid decoder has in the place of attention (a running state, a convolution); None where it
    has attention."""
    if _has(layer, family.attention):
        attention = _part(layer, family.attention)
        return None if _asks_the_interface(type(attention).forward) else family.attention
    others = _parts_of(layer) - set(family.parts())
    return ", ".join(sorted(others)) or "nothing"


def _not_supported(host: Any, config: Any, reason: str, *, remedy: str) -> HostError:
    """The refusal of a host, whose decoder has this configuration."""
    told = f"{type(host).__name__} (decoder type {config.model_type!r}) is not supported: {reason}"
    return HostError(told, remedy=remedy)


def _sees_elsewhere(config: Any, decoder: Any) -> str | None:
    """Why what a host sees does not stand as tokens in its decoder, so that no training goes by them; None where it
    does."""
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder and a decoder: {_BY_CROSS_ATTENTION}"
    if hasattr(config, "qformer_config") and isinstance(getattr(decoder, "lm_head", None), nn.Module):
        return f"{_whole(decoder)}, behind a {_Q_FORMER}"
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    if any("cross" in name for layer in layers for name in _parts_of(layer)):
        return f"its layers have cross-attention: {_BY_CROSS_ATTENTION}"
    others = _lists_beside(decoder, layers)
    if any("cross" in name for name in others):
        return f"its decoder has {', '.join(others)} beside its layers: {_BY_CROSS_ATTENTION}"
    return None


def _whole(decoder: nn.Module) -> str:
    return f"its decoder is a whole {type(decoder).__name__} with a head of its own"


def _lists_beside(decoder: nn.Module, layers: nn.ModuleList) -> list[str]:
    """Names of a decoder's other lists of modules."""
    lists = [name for name, part in decoder.named_children() if isinstance(part, nn.ModuleList)]
    return [name for name in lists if getattr(decoder, name) is not layers]


def _oddity(decoder: Any, layers: Any, family: _Family, *, is_listed: bool) -> str | None:
    """What of a decoder is otherwise than in those of its family, so that nothing would be known of its parts.

    Args:
        is_listed: its family goes by its type (`FAMILIES`), not by what its layers consist of.
    """
    if isinstance(getattr(decoder, "lm_head", None), nn.Module):
        return _whole(decoder)
    if is_listed:
        return None
    is_declared = getattr(decoder, "_supports_attention_backend", False)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "it has no list of layers" if is_declared else _NO_INTERFACE
    if any("encoder_attn" in _parts_of(layer) for layer in layers):
        return f"its layers have cross-attention: {_BY_CROSS_ATTENTION}"
    others = _lists_beside(decoder, layers)
    if others:
        return f"its decoder has {', '.join(others)} beside its layers"
    deviation = next((_DEVIATIONS[kind] for kind in map(_class_of, layers) if kind in _DEVIATIONS), None)
    if deviation is not None:
        return deviation
    wanted = set(family.parts())
    attended = [index for index, layer in enumerate(layers) if _stand_in(layer, family) is None]
    if any(_has(layer, family.attention) for layer in layers) and not (attended and _makes_masks(decoder)):
        return _NO_INTERFACE
    for index, layer in enumerate(layers):
        parts = _parts_of(layer)
        if attended and index not in attended and len(parts) == len(wanted) and parts | {family.attention} >= wanted:
            continue  # a hybrid's
        if parts != wanted:
            return f"layer {index} consists of {', '.join(sorted(parts))}"
        attention = _part(layer, family.attention)
        own = [name for module in (layer, attention) for name, _ in module.named_parameters(recurse=False)]
        own += [name for name, _ in layer.named_buffers(recurse=False)]
        own += [name for name, value in vars(layer).items() if isinstance(value, float) and value not in (0.0, 1.0)]
        own += [name for name, _ in attention.named_children() if not _usual_in_attention(name)]
        own = [name for name in own if name not in _KNOWN_NUMBERS]
        if own:
            return f"layer {index} has {', '.join(sorted(own))} beside its norms and projections"
        if not _passes_keywords_on(type(layer).forward) and not _passes_keywords_on(type(attention).forward):
            return f"layer {index} does not pass on to its attention the keywords it is given"
    if _final_norm(decoder, family) is None:
        return f"it has no norm behind its layers that is called {' or '.join(_FINAL_NORMS)}"
    if getattr(decoder.config, "num_kv_shared_layers", None):
        return "its last layers attend to the keys of earlier ones, and of a prompt are given its last token alone"
    try:
        layout = _layout_of(decoder)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        return f"its rotary angles are computed in a way of their own ({type(error).__name__}: {error})"
    return "its rotary angles come neither in two equal halves nor in pairs" if layout is None else None


def _globals_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names that a function looks up outside of it, those of attributes among them."""
    return inspect.unwrap(forward).__code__.co_names


@cache
def _asks_the_interface(forward: Callable[..., Any]) -> bool:
    """Whether an attention asks transformers for the function it attends by, and hands it the keywords it is given."""
    return "ALL_ATTENTION_FUNCTIONS" in _globals_of(forward) and _passes_keywords_on(forward)


def _makes_masks(decoder: Any) -> bool:
    """Whether a decoder has transformers make its masks as the attention function wants them."""
    if getattr(decoder, "_supports_attention_backend", False):
        return True
    return any(name.startswith("create_") and "mask" in name for name in _globals_of(type(decoder).forward))


@cache
def _passes_keywords_on(forward: Callable[..., Any]) -> bool:
    """Whether a layer's forward does anything with further keywords: Nemotron's takes them and drops them."""
    forward = inspect.unwrap(forward)
    kinds = inspect.signature(forward).parameters.values()
    name = next((each.name for each in kinds if each.kind is inspect.Parameter.VAR_KEYWORD), None)
    loads = [step.argval for step in dis.get_instructions(forward) if step.opname.startswith("LOAD_FAST")]
    return any(name == load or (isinstance(load, tuple) and name in load) for load in loads)


_Layout = Literal["halves", "pairs", "once", "complex"]
_found: WeakKeyDictionary[nn.Module, _Layout | None] = WeakKeyDictionary()  # by rotary embedding: the device is read


def _layout_of(decoder: Any) -> _Layout | None:
    """How its rotary tables hold each angle; None where they are of a kind that is not known.

    Raises:
        Exception: whatever `_tables` does.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary in _found:
        return _found[rotary]
    tables = _tables(decoder)
    layout: _Layout | None = None
    if any(table.is_complex() for table in tables):
        layout = "complex"
    elif decoder.config.model_type in _ANGLES_ONCE:
        layout = "once"
    elif _in_halves(tables):
        layout = "halves"
    elif _in_pairs(tables):
        layout = "pairs"
    if tables:
        _found[rotary] = layout
    return layout


def _turns_neighbors(decoder: Any, attention: nn.Module) -> bool:
    """Whether attention rotates neighboring channels: as its own module's function says, else as its tables stand."""
    forward = inspect.unwrap(type(attention).forward)
    rotate = getattr(forward, "__globals__", {}).get("rotate_half")
    if rotate is None:
        return _layout_of(decoder) in ("pairs", "complex")
    return rotate(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0]


def _tables(decoder: Any) -> list[Tensor]:
    """What a decoder's rotary embedding makes of three positions, (..., 3, R) each; none without it or its weights.

    Raises:
        Exception: of any kind, from a rotary embedding that is not called as others are.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    weight = next(decoder.parameters())
    if rotary is None or weight.is_meta:
        return []
    places = _in_three(decoder, torch.arange(3, device=weight.device)[None])
    kinds: list[dict[str, str]] = [{}]
    if _goes_by_kind(type(rotary).forward):
        kinds = [{"layer_type": kind} for kind in sorted(set(decoder.config.layer_types))]
    made = [rotary(weight.new_zeros(1, 3, 1), places, **kind) for kind in kinds]
    return [table for each in made for table in ((each,) if isinstance(each, Tensor) else each)]


def _in_three(decoder: Any, places: Tensor) -> Tensor:
    """(B, S) positions of text as the decoder's rotary embedding takes them: multimodal RoPE wants time, height and
    width, HunYuan's four."""
    sections = (getattr(decoder.config, "rope_parameters", None) or {}).get("mrope_section")
    return places if sections is None else places.expand(len(sections), *places.shape)


@cache
def _goes_by_kind(forward: Callable[..., Any]) -> bool:
    """Whether a rotary embedding has angles per kind of layer (Gemma-3)."""
    return "layer_type" in inspect.signature(forward).parameters


def _in_halves(tables: Sequence[Tensor]) -> bool:
    """Whether the second half of the rotary angles repeats the first (Llama)."""
    return all(torch.equal(*table.chunk(2, dim=-1)) for table in tables)


def _in_pairs(tables: Sequence[Tensor]) -> bool:
    """Whether each rotary angle stands twice side by side (Cohere, GLM-4V)."""
    return all(torch.equal(table[..., ::2], table[..., 1::2]) for table in tables)


def _usual_in_attention(name: str) -> bool:
    return name in _PROJECTIONS | _LATENT or "norm" in name or name == "rotary_emb"


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT and data-parallel wrappers; a plain model is returned as it is."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module) and not hasattr(model, "config"):
            model = model.module
        else:
            return model


def _part(layer: nn.Module, path: str) -> nn.Module:
    part: nn.Module = attrgetter(path)(layer)  # `get_submodule` takes five times as long
    return part


def _has(layer: nn.Module, path: str) -> bool:
    try:
        return isinstance(attrgetter(path)(layer), nn.Module)
    except AttributeError:
        return False


def _first(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((getattr(parent, name) for name in names if isinstance(getattr(parent, name, None), nn.Module)), None)


def _placeholders(config: Any) -> dict[Modality, int]:
    found = {Modality.of(name): getattr(config, f"{medium.token}_id", None) for name, medium in MEDIA.items()}
    return {modality: token for modality, token in found.items() if token is not None}
