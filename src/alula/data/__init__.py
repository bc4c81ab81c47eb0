"""Data: one schema of samples, readers, mixtures that resume from a step count, and the way into a model's inputs.

    source = open_source({"llava": "train.json", "images": "coco"})
    mixture = Mixture([source, open_source({"jsonl": "text.jsonl"})], weights=[3, 1], seed=0)
    batch = Collator(processor, max_length=1024)([mixture[n] for n in range(8)])

See ``docs/usage/data.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.audio import AudioRef
from alula.data.errors import (
    AudioError,
    BadSampleError,
    DepthError,
    EmptyBatchError,
    ImageError,
    MotionError,
    NormalsError,
    Place,
    PlaceholderError,
    PointsError,
    RecordError,
    ResponseError,
    TooLongError,
    UnsupervisedError,
    VideoError,
)
from alula.data.images import ImageRef, to_rgb
from alula.data.mixture import Mixture, PositionBatches, Window, open_mixture
from alula.data.quarantine import Quarantine
from alula.data.samples import Sample, Source, message_text
from alula.data.senses import DepthRef, MotionRef, NormalsRef, PointsRef, ResponseRef
from alula.data.sources import (
    DatasetSource,
    FileSource,
    StreamSource,
    open_file,
    open_source,
    source_files,
)
from alula.data.specs import MixtureSpec, SourceSpec, TextReplaySpec
from alula.data.videos import VideoRef

if TYPE_CHECKING:
    from alula.data.collate import IGNORED, Collator

__all__ = [
    "Sample", "ImageRef", "VideoRef", "AudioRef",
    "PointsRef", "DepthRef", "NormalsRef", "MotionRef", "ResponseRef", "to_rgb", "message_text", "DEFAULT_MAX_PIXELS",
    "Source", "FileSource", "DatasetSource", "StreamSource", "open_source", "open_file", "source_files",
    "SourceSpec",
    "Mixture", "MixtureSpec", "TextReplaySpec", "Window", "PositionBatches", "open_mixture", "Quarantine",
    "Collator", "IGNORED",
    "BadSampleError", "RecordError", "PlaceholderError",
    "ImageError", "VideoError", "AudioError",
    "PointsError", "DepthError", "NormalsError", "MotionError", "ResponseError",
    "TooLongError", "UnsupervisedError", "EmptyBatchError", "Place",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # the collator needs torch and transformers, which checking a file does not
    if name in ("Collator", "IGNORED"):
        from alula.data import collate

        return getattr(collate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
