"""A decoder with an image tower, an audio tower and connectors; LLaVA's shape with two media more.

Shapes: B samples, S tokens, N images (videos, audio clips) in the batch, F frames, T tokens of a tower, W their width,
D that of the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from alula.hosts.multimodal.configuration import AlulaConfig
from alula.hosts.multimodal.connectors import Connector, Connectors, Queries
from alula.hosts.multimodal.hearing import by_moment
from alula.media import MEDIA
from alula.seam.dialect import cache_keyword, cache_of, cache_of_output

_CACHE = cache_keyword()


class AlulaPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family of models."""

    config_class: Any = AlulaConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' functions leave alone what was loaded
        super()._init_weights(module)
        if isinstance(module, Queries):
            init.normal_(module.queries)
        elif isinstance(module, Connector) and module.times is not None:
            init.zeros_(module.times)


@dataclass
class AlulaModelOutputWithPast(BaseModelOutputWithPast):
    """A decoder's output."""


class AlulaModel(AlulaPreTrainedModel):
    """Everything but the language-model head."""

    def __init__(self, config: AlulaConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.audio_tower = None if config.audio_config is None else AutoModel.from_config(config.audio_config)
        self.multi_modal_projector: Any = Connectors(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # -- what the media become ------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, C, H, W) -> ``last_hidden_state``: (N, P, width) what the connector is given; ``pooler_output``: N
        tensors (tokens, D)."""
        seen = self._seen(pixel_values)
        tokens = self._connector("image")(seen, "vision")
        return BaseModelOutputWithPooling(last_hidden_state=seen, pooler_output=list(tokens))  # type: ignore[arg-type]

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, F, C, H, W) -> ``pooler_output``: N tensors (tokens, D)."""
        frames = pixel_values_videos.shape[1]
        if frames != self.config.num_frames:
            raise ValueError(f"videos of {frames} frames given, this host takes {self.config.num_frames}")
        seen = self._seen(pixel_values_videos.flatten(0, 1))
        side = self.config.frame_side
        if side:
            seen = _pooled(seen, side)
        tokens = self._connector("video")(seen.unflatten(0, (-1, frames)).flatten(1, 2), "vision", frames)
        return BaseModelOutputWithPooling(pooler_output=list(tokens))  # type: ignore[arg-type]

    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Spectrograms, (N, frames, bins) for AST and (N, bins, frames) for Whisper's encoder -> ``pooler_output``: N
        tensors (tokens, D)."""
        config = self.config.audio_config
        assert self.audio_tower is not None
        out = self.audio_tower(input_features, output_hidden_states=True, return_dict=True)
        features = out.hidden_states[self.config.audio_feature_layer]
        if self.config.pool_audio:
            features = by_moment(config, features)
        if (stack := self.config.audio_stack) > 1:
            features = features.unflatten(1, (-1, stack)).flatten(2)
        tokens = self._connector("audio")(features, "audio")
        return BaseModelOutputWithPooling(pooler_output=list(tokens))  # type: ignore[arg-type]

    def _connector(self, medium: str) -> Connector:
        if medium not in self.config.media:
            raise ValueError(f"this host takes {', '.join(self.config.media)}, not {medium}")
        return self.multi_modal_projector.of(medium)

    def _seen(self, pixel_values: Tensor) -> Tensor:
        """Images (N, C, H, W) -> tokens of the image tower (N, T, W), as LLaVA picks them."""
        out = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        layers = self.config.vision_feature_layer
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        picked = [out.hidden_states[layer][:, first:] for layer in ([layers] if isinstance(layers, int) else layers)]
        return torch.cat(picked, dim=-1)

    # -- forward --------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder over ids (B, S) with the media in the places of their placeholders.

        Args:
            pixel_values: images (N, C, H, W).
            pixel_values_videos: videos (N, F, C, H, W).
            input_features: audio clips, (N, frames, bins) or (N, bins, frames) as their tower takes them.
            mm_encoder_outputs: medium -> what ``get_<medium>_features`` returned, instead of its input.

        Raises:
            ValueError: neither or both of ids and embeddings; placeholders and rows that differ in number.
        """
        return self._decoded(
            {"image": pixel_values, "video": pixel_values_videos, "audio": input_features},
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **one_cache(cache, past_key_values),
            **kwargs,
        )

    def _read(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Raw media -> what ``get_<medium>_features`` makes of each."""
        read: dict[str, Any] = {medium: getattr(self, f"get_{medium}_features") for medium in given}
        return {medium: read[medium](value) for medium, value in given.items()}

    def _decoded(
        self,
        given: Mapping[str, Tensor | None],
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        **kwargs: Any,
    ) -> AlulaModelOutputWithPast:
        """The decoder over ids or embeddings, with media, raw or read beforehand, in their places.

        Args:
            kwargs: of the decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        outputs: dict[str, Any] = {name: out for name, out in (mm_encoder_outputs or {}).items() if out is not None}
        raw = {medium: value for medium, value in given.items() if value is not None}
        for medium in raw:
            if medium in outputs:
                raise ValueError(f"{MEDIA[medium].inputs[0]} and the features of the same medium were both given")
        outputs |= self._read(raw)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for medium, out in outputs.items():
            inputs_embeds = self._placed(medium, torch.cat(list(out.pooler_output)), input_ids, inputs_embeds)
        if self.training:
            inputs_embeds = inputs_embeds + self._idle(outputs).to(inputs_embeds)
        out = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return AlulaModelOutputWithPast(
            last_hidden_state=out.last_hidden_state,
            **{_CACHE: cache_of_output(out)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _placed(self, medium: str, tokens: Tensor, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        """``embeds`` (B, S, D) with ``tokens`` (all tokens of a medium, D) in the places of its placeholder."""
        token = getattr(self.config, f"{medium}_token_id")
        if input_ids is None:
            one = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            mask = (embeds == one).all(-1)
        else:
            mask = input_ids == token
        if int(mask.sum()) != len(tokens):
            raise ValueError(
                f"the prompts hold {int(mask.sum())} places for {medium} tokens, but there are {len(tokens)}"
            )
        return embeds.masked_scatter(mask[..., None], tokens.to(embeds))

    def _idle(self, outputs: Mapping[str, Any]) -> Tensor:
        """Zero, made of the parameters of connectors that this batch has no use for.

        So every connector takes part in every training step, on every process, whatever a batch holds.
        """
        used = {id(self.multi_modal_projector.of(medium)) for medium in outputs}
        idle = [
            parameter.sum()
            for connector in self.multi_modal_projector.values()
            if id(connector) not in used
            for parameter in connector.parameters()
            if parameter.requires_grad
        ]
        return torch.stack(idle).sum() * 0.0 if idle else torch.zeros((), device=self.device)


class AlulaForConditionalGeneration(AlulaPreTrainedModel, GenerationMixin):
    """A language model that takes text with images, videos and audio clips in it."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AlulaConfig) -> None:
        super().__init__(config)
        self.model = AlulaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """As of any model; media are repeated sample by sample, as the prompts that they stand in are.

        transformers repeats them item by item, so that the second of two clips would stand where the first does.
        """
        raw = {}
        if expand_size > 1 and input_ids is not None:
            for medium in self.config.media:
                for keyword in MEDIA[medium].inputs:
                    if isinstance(value := kwargs.get(keyword), Tensor):
                        raw[keyword] = value[self._repeated(medium, input_ids, expand_size)]
                        kwargs[keyword] = None
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        ids, expanded = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, {**expanded, **raw}

    def _repeated(self, medium: str, input_ids: Tensor, times: int) -> Tensor:
        """Indices of a medium's items, in order, where each sample of (B, S) ids stands so often in a row."""
        places = (input_ids == getattr(self.config, f"{medium}_token_id")).sum(dim=1)
        counts = (places // self.config.tokens_per_item[medium]).tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        own = [torch.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return torch.cat([items.repeat(times) for items in own]).to(input_ids.device)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :class:`AlulaModel`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As :meth:`AlulaModel.forward`; logits (B, S, V), and with ``labels`` (B, S) the loss."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            **one_cache(cache, past_key_values),
            **kwargs,
        )
        return self._scored(outputs, labels, logits_to_keep, **kwargs)

    def _scored(
        self, outputs: Any, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> LlavaCausalLMOutputWithPast:
        """The logits of what the decoder made, and the loss where there are labels."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: cache_of_output(outputs)},  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache under the name that the installed transformers takes it by; models of ours take both."""
    given = {"cache": cache, "past_key_values": past_key_values}
    return {_CACHE: cache_of(given, where="the model")}


def _pooled(tokens: Tensor, side: int) -> Tensor:
    """Tokens of square grids (N, T, W), extra tokens in front left out -> (N, side * side, W), averaged."""
    grid = int(tokens.shape[1] ** 0.5)
    patches = tokens[:, tokens.shape[1] - grid * grid :].transpose(1, 2).unflatten(2, (grid, grid))
    return F.adaptive_avg_pool2d(patches, side).flatten(2).transpose(1, 2)
