"""A decoder with one vision transformer that reads every medium.

Shapes: B samples, S tokens, N items of a medium in the batch, F pictures of an item, L encoder tokens, w their width,
Q modality tokens, D the decoder's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from alula.anatomy import TowerParts, has_class_token
from alula.hosts.multimodal.modeling import (
    AlulaForConditionalGeneration,
    AlulaModel,
    AlulaPreTrainedModel,
    one_cache,
)
from alula.hosts.universal.configuration import UniversalConfig
from alula.hosts.universal.projection import ModalityConnector, UniversalConnectors
from alula.hosts.universal.shapes import PICTURES, DepthFrames, Frames, NormalFrames, Picture
from alula.hosts.universal.tokenizing import Tokenizer
from alula.media import MEDIA


class UniversalModel(AlulaModel):
    """Everything but the language-model head."""

    config_class = UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        AlulaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = UniversalConnectors(
            config.projection_shape,
            {medium: config.shape(medium) for medium in config.media},
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            first=has_class_token(config.vision_config),
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_connector(super()._init_weights, module)

    # -- what the media become ------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, C, H, W) -> ``last_hidden_state``: (N, L, w) what the projection module is given;
        ``pooler_output``: N tensors (Q + 2, D). So of every medium."""
        return self._read({"image": pixel_values})["image"]

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, F, C, H, W), as `get_image_features`."""
        return self._read({"video": pixel_values_videos})["video"]

    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Spectrograms (N, moments, bins), as `get_image_features`."""
        return self._read({"audio": input_features})["audio"]

    def get_points_features(self, point_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Points (N, P, 6), as `get_image_features`."""
        return self._read({"points": point_values})["points"]

    def get_depth_features(self, depth_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Depth as pixels (N, F, C, H, W), as `get_image_features`."""
        return self._read({"depth": depth_values})["depth"]

    def get_normals_features(self, normal_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Normals as pixels (N, F, C, H, W), as `get_image_features`."""
        return self._read({"normals": normal_values})["normals"]

    def get_motion_features(self, motion_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Motion (N, samples, 6), as `get_image_features`."""
        return self._read({"motion": motion_values})["motion"]

    def get_response_features(self, response_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Responses (N, voxels), as `get_image_features`."""
        return self._read({"response": response_values})["response"]

    def _read(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        for medium, values in given.items():
            self._check(medium, values)
        features = self._encoded(given)
        tokens = self.multi_modal_projector(features)
        return {
            medium: BaseModelOutputWithPooling(
                last_hidden_state=features[medium],
                pooler_output=list(tokens[medium]),  # type: ignore[arg-type]
            )
            for medium in given
        }

    def _encoded(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw values by medium -> encoder tokens (N, L, w); all pictures of a batch pass the encoder together."""
        pictures = {
            medium: values if values.dim() == 5 else values[:, None]  # (N, F, C, H, W)
            for medium, values in given.items()
            if medium in PICTURES
        }
        found = self._shown(pictures) if pictures else {}
        parts = TowerParts.of(self.vision_tower)
        for medium, values in given.items():
            if medium not in PICTURES:
                tokenizer = cast(Tokenizer, self.multi_modal_projector.of(medium).tokenizer)
                found[medium] = parts.read(tokenizer(values.to(tokenizer.positions.device), parts.first))
        return found

    def _shown(self, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures (N, F, C, H, W) by medium -> encoder tokens (N, L, w), averaged over the F pictures of an item."""
        flat = torch.cat([values.flatten(0, 1) for values in pictures.values()])
        out = self.vision_tower(flat, output_hidden_states=True, return_dict=True)
        tokens = TowerParts.of(self.vision_tower).post_norm(out.hidden_states[self.config.vision_feature_layer])
        split = tokens.split([values.shape[0] * values.shape[1] for values in pictures.values()])
        return {
            medium: own.unflatten(0, values.shape[:2]).mean(dim=1) if values.shape[1] > 1 else own
            for (medium, values), own in zip(pictures.items(), split, strict=True)
        }

    def _check(self, medium: str, values: Tensor) -> None:
        """Refuse values of another size than the host was built for.

        Raises:
            ValueError: the host does not take the medium, or not in this size.
        """
        config = self.config
        if medium not in config.media:
            raise ValueError(f"this host takes {', '.join(config.media)}, not {medium}")
        shape, size = config.shape(medium), tuple(values.shape)
        match shape:
            case Picture():
                wanted: tuple[str | int, ...] = ("items", "channels", "height", "width")
            case Frames() | DepthFrames() | NormalFrames():
                wanted = ("items", shape.frames, "channels", "height", "width")
            case _:
                wanted = ("items", *shape.size)
        if len(wanted) != len(size) or any(isinstance(w, int) and w != s for w, s in zip(wanted, size, strict=True)):
            told = ", ".join(map(str, wanted))
            raise ValueError(f"{MEDIA[medium].inputs[0]} of size {size} given, this host takes ({told})")

    # -- forward --------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        point_values: Tensor | None = None,
        depth_values: Tensor | None = None,
        normal_values: Tensor | None = None,
        motion_values: Tensor | None = None,
        response_values: Tensor | None = None,
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
            input_features: audio clips (N, moments, bins).
            point_values: point clouds (N, P, 6): x, y, z, red, green, blue.
            depth_values, normal_values: maps as pixels (N, F, C, H, W), F = 2 where a picture goes with each.
            motion_values: (N, samples, 6).
            response_values: (N, voxels).
            mm_encoder_outputs: medium -> what ``get_<medium>_features`` returned, instead of its input.

        Raises:
            ValueError: neither or both of ids and embeddings; placeholders and tokens that differ in number; a medium
                or a size that the host does not take.
        """
        return self._decoded(
            {
                "image": pixel_values,
                "video": pixel_values_videos,
                "audio": input_features,
                "points": point_values,
                "depth": depth_values,
                "normals": normal_values,
                "motion": motion_values,
                "response": response_values,
            },
            input_ids,
            inputs_embeds,
            mm_encoder_outputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **one_cache(cache, past_key_values),
            **kwargs,
        )

    def _idle(self, outputs: Mapping[str, Any]) -> Tensor:
        idle = [
            parameter.sum()
            for name, module in self.multi_modal_projector.items()
            if name not in outputs and (isinstance(module, ModalityConnector) or not outputs)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        return torch.stack(idle).sum() * 0.0 if idle else torch.zeros((), device=self.device)


class UniversalForConditionalGeneration(AlulaForConditionalGeneration):
    """A language model that takes text with items of any medium in it, read by one encoder."""

    config_class = UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        AlulaPreTrainedModel.__init__(self, config)
        self.model = UniversalModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_connector(super()._init_weights, module)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As of any model; media are handed over with the prompt alone, and with every step where there is no cache.

        transformers has a list of keywords for that, in which those of most media here do not stand.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            for medium in MEDIA.values():
                for keyword in medium.inputs:
                    inputs.pop(keyword, None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        point_values: Tensor | None = None,
        depth_values: Tensor | None = None,
        normal_values: Tensor | None = None,
        motion_values: Tensor | None = None,
        response_values: Tensor | None = None,
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
        """As :meth:`UniversalModel.forward`; logits (B, S, V), and with ``labels`` (B, S) the loss."""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            point_values=point_values,
            depth_values=depth_values,
            normal_values=normal_values,
            motion_values=motion_values,
            response_values=response_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            mm_token_type_ids=mm_token_type_ids,
            **one_cache(cache, past_key_values),
            **kwargs,
        )
        return self._scored(outputs, labels, logits_to_keep, **kwargs)


def init_connector(others: Any, module: nn.Module) -> None:
    """Weights of a module that no checkpoint filled; transformers' own functions leave alone what was loaded."""
    others(module)
    if isinstance(module, ModalityConnector):
        init.normal_(module.tokens, std=0.02)
        init.uniform_(module.start)
        init.uniform_(module.end)
    elif isinstance(module, Tokenizer):
        init.normal_(module.positions, std=0.02)
