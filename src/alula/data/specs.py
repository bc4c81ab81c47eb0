"""How sources and mixtures are written in recipes; what is wrong with one is named with the path of its key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError

from alula.data.images import DEFAULT_MAX_PIXELS, HARD_MAX_PIXELS
from alula.errors import RecipeError
from alula.settings import Int, Number, Settings, problems

KINDS = ("jsonl", "llava", "dataset", "microworld", "digits")


class _Spec(Settings):
    name: str | None = Field(None, description="what reports call the source; default: made from its path")
    weight: Number = Field(1.0, gt=0, allow_inf_nan=False, description="share of the mixture, relative to the others")


class _FileSpec(_Spec):
    images: Path | None = Field(None, description="folder relative image paths start from; default: beside the file")
    max_pixels: Int = Field(DEFAULT_MAX_PIXELS, gt=0, le=HARD_MAX_PIXELS, description="largest image accepted")
    limit: Int | None = Field(None, gt=0, description="use only the first n records")


class JsonlSpec(_FileSpec):
    """``{"messages": [...], "images": [...]}`` records, one per line (or one JSON array)."""

    jsonl: Path


class LlavaSpec(_FileSpec):
    """LLaVA / ShareGPT conversations, one JSON array (or one record per line)."""

    llava: Path


class DatasetSpec(_FileSpec):
    """A Hugging Face dataset saved with ``save_to_disk``, or parquet (a file, or a folder of them)."""

    dataset: Path
    split: str | None = Field(None, description="which split, where there are several")


class MicroworldSpec(_Spec):
    """Items of the procedural world; endless unless ``limit`` is given."""

    microworld: Literal["text", "visual", "caption", "dialogue", "film", "film_caption", "sound", "sound_caption"]
    split: Literal["train", "test", "unseen"] = "train"
    seed: Int = 0
    families: list[str] | None = Field(None, description="only these families of skill")
    limit: Int | None = Field(None, gt=0, description="draw only n different items")


class DigitsSpec(_Spec):
    """Questions about real handwritten digits (`alula.microworld.digits`); endless unless ``limit`` is given."""

    digits: Literal["all", "read", "row", "larger", "sum"] = Field(description="what is asked")
    split: Literal["train", "test"] = Field("train", description="test: held-out writers")
    seed: Int = 0
    limit: Int | None = Field(None, gt=0, description="draw only n different items")


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return next((kind for kind in KINDS if kind in value), None)
    return next((kind for kind in KINDS if hasattr(value, kind)), None)


SourceSpec = Annotated[
    Annotated[JsonlSpec, Tag("jsonl")]
    | Annotated[LlavaSpec, Tag("llava")]
    | Annotated[DatasetSpec, Tag("dataset")]
    | Annotated[MicroworldSpec, Tag("microworld")]
    | Annotated[DigitsSpec, Tag("digits")],
    Discriminator(
        _kind,
        custom_error_type="source_kind",
        custom_error_message=f"a source needs one of the keys {', '.join(KINDS)}",
    ),
]
"""One source; its first key says which kind. Embed it in recipe models."""


class TextReplaySpec(Settings):
    """Text-only samples mixed in so that the decoder keeps its words."""

    ratio: Number = Field(ge=0, lt=1, description="fraction of all samples that are text-only")
    sources: list[SourceSpec] = Field(min_length=1)


class MixtureSpec(Settings):
    """Weighted sources, and the share of text replay as one number."""

    sources: list[SourceSpec] = Field(min_length=1)
    text_replay: TextReplaySpec | None = None
    seed: Int = 0


def validated(kind: Any, value: Any, *, key: str) -> Any:
    """Validate ``value`` as ``kind`` (``SourceSpec``, ``MixtureSpec``).

    Raises:
        RecipeError: the first thing wrong, with the path of its key below ``key`` and the legal keys or values.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        found = problems(error, kind, value)
    first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    path = key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first.loc)
    raise RecipeError(first.what + more, where=path, remedy=first.remedy)
