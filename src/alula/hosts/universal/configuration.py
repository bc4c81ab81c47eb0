"""Configuration of hosts with one encoder for all media."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from alula.hosts.multimodal.configuration import sub_config
from alula.hosts.universal.shapes import SHAPES, ProjectionShape, Shape, shape_of


class UniversalConfig(PreTrainedConfig):
    """A decoder, one vision transformer for all media, and OneLLM's projection module between them.

    Args:
        text_config, vision_config: of the decoder and the encoder.
        media: what the host takes, names of `alula.media`.
        sizes: sizes of each medium, see `alula.hosts.universal.shapes`.
        projection: sizes of the projection module, see `ProjectionShape`.
        tokens_per_item: tokens of the decoder that one item of each medium takes, its tags included.
        vision_feature_layer: -1, the encoder's last; its norm follows.
        kwargs: ``<medium>_token_id``, the placeholder of each medium, and what every configuration takes.
    """

    model_type = "alula_universal"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        media: list[str] | tuple[str, ...] = ("image",),
        sizes: dict[str, dict[str, Any]] | None = None,
        projection: dict[str, Any] | None = None,
        tokens_per_item: dict[str, int] | None = None,
        vision_feature_layer: int = -1,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config: Any = sub_config(text_config)
        self.vision_config: Any = sub_config(vision_config)
        self.media = list(media)
        for medium in SHAPES:
            setattr(self, f"{medium}_token_id", kwargs.pop(f"{medium}_token_id", None))
        self.sizes = {medium: dict(values) for medium, values in (sizes or {}).items()}
        self.projection = dict(projection or {})
        self.tokens_per_item = dict(tokens_per_item or {})
        self.vision_feature_layer = vision_feature_layer
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    def shape(self, medium: str) -> Shape:
        """The sizes of a medium."""
        return shape_of(medium, self.sizes.get(medium))

    @property
    def projection_shape(self) -> ProjectionShape:
        """The sizes of the projection module."""
        return ProjectionShape(**self.projection)
