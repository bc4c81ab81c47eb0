"""What a user asked a universal host to be, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import ASTFeatureExtractor, PreTrainedConfig

from alula.anatomy import has_class_token
from alula.errors import UsageError
from alula.hosts.audio_tower import feature_extractor_of
from alula.hosts.universal.configuration import UniversalConfig
from alula.hosts.universal.projection import UniversalConnectors
from alula.hosts.universal.shapes import SHAPES, ProjectionShape, Shape, plain, shape_of

LAST = -1
"""the layer whose features are read: the encoder's last, with its norm"""


@dataclass(frozen=True)
class UniversalPlan:
    """The media, sizes and feature extractor of a universal host.

    Attributes:
        projection: sizes of the projection module.
        sizes: of each medium, in the order of `alula.media`.
        feature_extractor: for audio clips; where no audio is taken, one that is never called.
    """

    projection: ProjectionShape
    sizes: Mapping[str, Shape]
    feature_extractor: Any

    @classmethod
    def of(
        cls,
        modalities: Sequence[str] | None,
        connector_options: Mapping[str, Any] | None,
        modality_options: Mapping[str, Mapping[str, Any]] | None,
        feature_extractor: Any,
    ) -> UniversalPlan:
        """The plan of what was asked.

        Raises:
            UsageError: an unknown medium, option or value, or an option that would have no effect.
            HostError: no feature extractor where one is named.
        """
        media, options = _media(modalities), {name: dict(each) for name, each in (modality_options or {}).items()}
        for name in options:
            if name not in media:
                raise UsageError(
                    f"{name!r} is not among the modalities {', '.join(media)}",
                    where="modality_options",
                    remedy="name it in modalities, too",
                )
        extractor = _extractor(feature_extractor, media, options)
        if "audio" in media:
            options["audio"] = {
                **options.get("audio", {}),
                "bins": extractor.num_mel_bins,
                "moments": extractor.max_length,
            }
        return cls(
            _projection(connector_options), {name: shape_of(name, options.get(name)) for name in media}, extractor
        )

    def check(self, tower: PreTrainedConfig) -> None:
        """Refuse an encoder that does not go with it.

        Raises:
            HostError: of a family that reads nothing but patches. UsageError: heads that do not divide its width.
        """
        has_class_token(tower)
        if tower.hidden_size % self.projection.heads:
            raise UsageError(
                f"{self.projection.heads} heads do not divide the encoder's width of {tower.hidden_size}",
                where="connector_options",
            )

    def config(self, text: PreTrainedConfig, vision: PreTrainedConfig, ids: Mapping[str, int]) -> UniversalConfig:
        """The host's configuration."""
        return UniversalConfig(
            text_config=text,
            vision_config=vision,
            media=list(self.sizes),
            sizes={name: plain(shape) for name, shape in self.sizes.items()},
            projection=plain(self.projection),
            tokens_per_item=dict.fromkeys(self.sizes, self.projection.tokens),
            vision_feature_layer=LAST,
            tie_word_embeddings=text.tie_word_embeddings,
            **{f"{medium}_token_id": identity for medium, identity in ids.items()},
        )

    def connectors(self, config: UniversalConfig, seed: int) -> UniversalConnectors:
        """Fresh connectors."""
        made = UniversalConnectors(
            self.projection,
            self.sizes,
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            first=has_class_token(config.vision_config),
        ).float()
        made.initialise(seed)
        return made


def _media(modalities: Sequence[str] | None) -> tuple[str, ...]:
    asked = ("image",) if modalities is None else tuple(modalities)
    for name in asked:
        if name not in SHAPES:
            raise UsageError(
                f"a universal encoder reads no {name!r}", where="modalities", remedy=f"of: {', '.join(SHAPES)}"
            )
    if len({*asked}) < len(asked):
        raise UsageError("a modality is named twice", where="modalities")
    if "image" not in asked:
        raise UsageError("image is missing, the encoder's own medium", where="modalities", remedy="name it, too")
    return tuple(name for name in SHAPES if name in asked)


def _projection(options: Mapping[str, Any] | None) -> ProjectionShape:
    known = [field.name for field in fields(ProjectionShape)]
    for name in options or {}:
        if name not in known:
            raise UsageError(
                f"a universal encoder has no option {name!r}",
                where="connector_options",
                remedy=f"legal: {', '.join(known)}",
            )
    return ProjectionShape(**(options or {}))


def _extractor(given: Any, media: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> Any:
    sizes = {name: value for name, value in options.get("audio", {}).items() if name in ("bins", "moments")}
    if "audio" not in media and given is None:
        return ASTFeatureExtractor(num_mel_bins=32)
    if given is None:
        shape = shape_of("audio", sizes)
        return ASTFeatureExtractor(num_mel_bins=shape.bins, max_length=shape.moments)  # type: ignore[union-attr]
    if "audio" not in media:
        raise UsageError("has no effect: audio is not among the modalities", where="feature_extractor")
    if sizes:
        raise UsageError(
            "the feature extractor says how many bins and moments there are", where="modality_options.audio"
        )
    return feature_extractor_of(given)
