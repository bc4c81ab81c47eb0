"""Configuration of hosts for more than images."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

MEDIA = ("image", "video", "audio")


def sub_config(value: Any) -> PreTrainedConfig | None:
    """A configuration inside another, given as such or as plain values."""
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    return AutoConfig.for_model(**value)


class AlulaConfig(PreTrainedConfig):
    """LLaVA's configuration with videos, audio clips, and connectors of alula's own.

    Args:
        text_config, vision_config: of the decoder and the image tower.
        audio_config: of the audio tower (AST, Whisper's encoder); None for a host without an audio tower.
        media: what the host takes, of ``image``, ``video``, ``audio``.
        image_token_id, video_token_id, audio_token_id: placeholders; None for a medium that is not taken.
        tokens_per_item: tokens of the decoder that one item of each medium takes.
        connector: how the connectors are made, see :class:`alula.hosts.multimodal.connectors.ConnectorShape`.
        shared_connector: one connector for all media instead of one each.
        vision_feature_layer, vision_feature_select_strategy: as in LLaVA.
        audio_feature_layer: index into the audio tower's hidden states.
        num_frames: frames of a video.
        frame_side: each frame is pooled to so many tokens squared before the connector; 0: no pooling.
        pool_audio: the tokens of one moment (all frequencies) are averaged before the connector.
        audio_stack: so many moments that follow one another go side by side into one token.
    """

    model_type = "alula"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "audio_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        audio_config: Any = None,
        media: list[str] | tuple[str, ...] = ("image",),
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        audio_token_id: int | None = None,
        tokens_per_item: dict[str, int] | None = None,
        connector: dict[str, Any] | None = None,
        shared_connector: bool = False,
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str = "full",
        audio_feature_layer: int = -1,
        num_frames: int = 8,
        frame_side: int = 0,
        pool_audio: bool = False,
        audio_stack: int = 1,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config: Any = sub_config(text_config)
        self.vision_config: Any = sub_config(vision_config)
        self.audio_config: Any = sub_config(audio_config)
        self.media = list(media)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.audio_token_id = audio_token_id
        # what directories of earlier versions call rows_per_item
        self.tokens_per_item = dict(tokens_per_item or kwargs.pop("rows_per_item", None) or {})
        self.connector = dict(connector or {})
        self.shared_connector = shared_connector
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.audio_feature_layer = audio_feature_layer
        self.num_frames = num_frames
        self.frame_side = frame_side
        self.pool_audio = pool_audio
        self.audio_stack = audio_stack
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
