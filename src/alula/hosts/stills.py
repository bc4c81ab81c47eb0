"""Processors with a part for videos where torchvision, which every such part of transformers needs, is not installed.

transformers loads none of it then, images neither. Here the processor's own class is loaded without that part: images
and text go through the same code as ever, a video is an error that says what is missing, and what the directory says
of videos is written again when the processor is saved.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import cached_file, is_torchvision_available

from alula.errors import HostError
from alula.files import read_json, write_json

_PART = "video_processor"
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_WHOLE = "processor_config.json"


def kind_with_videos(where: str) -> type | None:
    """The class of the processor in a directory or under a hub id, where it has a part for videos; else None."""
    said = next(
        (name for file in (_WHOLE, *_FILES) if (name := (_json(where, file) or {}).get("processor_class"))), None
    )
    kind: Any = processor_class_from_name(said) if isinstance(said, str) else None
    if kind is None and _json(where, "config.json") is not None:  # an adapter's directory has none
        kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(where)), None)
    return kind if kind is not None and _PART in kind.get_attributes() else None


def read_with_videos(kind: type, where: str) -> Any:
    """The processor of a directory or hub id: images through PIL, videos where torchvision is installed."""
    if not is_torchvision_available():
        processor = _still(kind).from_pretrained(where, backend="pil")
        processor.said_of_videos = _said_of_videos(where)
        return processor
    processor = AutoProcessor.from_pretrained(where)  # no part for videos has a backend in PIL
    processor.image_processor = AutoImageProcessor.from_pretrained(where, backend="pil")
    return processor


class _Still:
    """What a processor without its part for videos does otherwise."""

    said_of_videos: dict[str, Any] | None = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != _PART]  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("videos") is not None:
            raise HostError(
                f"videos go through torchvision in {type(self).__name__}, and it is not installed",
                where="videos",
                remedy="pip install torchvision; images need none",
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        file = Path(save_directory) / _WHOLE
        if self.said_of_videos is not None and file.is_file():
            write_json(file, {**read_json(file), _PART: self.said_of_videos})
        return saved

    def __reduce__(self) -> Any:
        # the class is made at run time, under the name of the processor's own
        return _made, (type(self).__mro__[2],), dict(vars(self))


@functools.cache
def _still(kind: type) -> Any:
    return type(kind.__name__, (_Still, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _made(kind: type) -> Any:
    made = _still(kind)
    return made.__new__(made)


def _said_of_videos(where: str) -> dict[str, Any] | None:
    """What a directory says of its part for videos, in any of the places where transformers looks for it."""
    whole = _json(where, _WHOLE) or {}
    if isinstance(whole.get(_PART), dict):
        return dict(whole[_PART])
    for name in _FILES:
        if said := _json(where, name):
            return {key: value for key, value in said.items() if not key.startswith(("image_processor", "processor"))}
    return None


def _json(where: str, name: str) -> dict[str, Any] | None:
    file = cached_file(where, name, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None
