"""How sources and mixtures are written in recipes; what is wrong with one is named with the path of its key."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from alula import plugins
from alula.bounds import DEFAULT_MAX_PIXELS, HARD_MAX_PIXELS
from alula.data.dialects import COLUMNS
from alula.data.registry import SOURCES, SourceKind
from alula.data.shapes import check_reading
from alula.errors import RecipeError, UsageError
from alula.settings import Int, Number, Settings, refusal


class SourceSpec(Settings):
    """One source. The key of its kind says which (`alula.data.registry`), and which other keys there are.

    Fields declared as `SourceSpec` take any kind, as a mapping or as the spec itself.
    """

    name: str | None = Field(None, description="what reports call the source; default: made from its path")
    weight: Number = Field(1.0, gt=0, allow_inf_nan=False, description="share of the mixture, relative to the others")
    text_only: bool = Field(
        False, strict=True, description="the words of its conversations alone: pictures, films and sounds are taken out"
    )

    DRAWING: ClassVar[tuple[str, ...]] = ("weight",)
    """keys that say how a mixture draws from the source"""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if cls.__base__ is not Settings:  # one kind's own
            return handler(source)
        return core_schema.no_info_plain_validator_function(lambda value: _of_its_kind(value))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        if cls.__base__ is not Settings:
            return handler(schema)
        for key in SOURCES.names():
            SOURCES.get(key)
        return handler(_union(SOURCES.loaded())[1].core_schema)

    @classmethod
    def alternatives(cls) -> Any:
        """What a value of a field of this type may be, as one annotation of specs."""
        return _union(SOURCES.loaded())[0] if cls.__base__ is Settings else cls

    def kind(self) -> SourceKind:
        """The kind of this source."""
        return next(kind for kind in SOURCES.loaded() if kind.spec is type(self))


def _undrawn(spec: SourceSpec) -> SourceSpec:
    for key in spec.DRAWING:
        if getattr(spec, key) != type(spec).model_fields[key].default:  # as a run writes its recipe down, it is there
            raise ValueError(f"{key}: the first samples of the source are read; nothing is drawn")
    return spec


UndrawnSpec = Annotated[SourceSpec, AfterValidator(_undrawn)]
"""One source that is read from its first sample on: what says how to draw from it is refused."""


class FileSpec(SourceSpec):
    """A source that is read from files."""

    max_pixels: Int = Field(DEFAULT_MAX_PIXELS, gt=0, le=HARD_MAX_PIXELS, description="largest image accepted")
    limit: Int | None = Field(None, gt=0, description="use only the first n records")
    runs: Int = Field(1, gt=0, description="draw n records that stand in a row together: questions about one picture")

    DRAWING: ClassVar[tuple[str, ...]] = ("weight", "runs")


class RecordsSpec(FileSpec):
    """Files of records, whose columns may be called otherwise than alula calls them."""

    columns: dict[str, str] = Field(default_factory=dict, description="what alula calls a column -> its name there")

    @field_validator("columns")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is no column that is read; those are {', '.join(COLUMNS)}")
        return value


class MediaSpec(RecordsSpec):
    """Records that may hold media of any kind."""

    reading: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="how media are read where records do not say it: {depth: {unit: mm}}"
    )

    @field_validator("reading")
    @classmethod
    def _readable(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        try:
            check_reading(value)
        except UsageError as error:
            raise ValueError(f"{error.where}: {error.message} ({error.remedy})") from None
        return value


class ImagesSpec(SourceSpec):
    """A source whose media are files beside its own."""

    images: Path | None = Field(None, description="folder relative image paths start from; default: beside the file")


class JsonlSpec(MediaSpec, ImagesSpec):
    """Records, one per line (or one JSON array): ``{"messages": [...], "images": [...]}`` or another shape."""

    jsonl: Path


class LlavaSpec(RecordsSpec, ImagesSpec):
    """LLaVA / ShareGPT conversations, one JSON array (or one record per line)."""

    llava: Path


class DatasetSpec(MediaSpec, ImagesSpec):
    """A Hugging Face dataset: saved with ``save_to_disk``, parquet (a file, or a folder of them), or an imagefolder."""

    dataset: Path
    split: str | None = Field(None, description="which split, where there are several")


class CocoSpec(FileSpec, ImagesSpec):
    """Captions as COCO publishes them, or the questions of VQA with the file of their answers."""

    coco: Path
    answers: Path | None = Field(None, description="the annotations that answer the questions of a VQA file")


class WebdatasetSpec(MediaSpec):
    """Tar files whose members are pictures, texts and JSON: one file, a folder of them, ``train-{000..009}.tar``."""

    webdataset: Path


def _of_its_kind(value: Any) -> SourceSpec:
    if isinstance(value, Mapping):
        keys = SOURCES.names()
        found = next((key for key in keys if key in value), None)
        if found is None:
            missing = next((key for key in value if plugins.remedy(SOURCES.group, str(key))), None)
            if missing is not None:
                remedy = plugins.remedy(SOURCES.group, missing)
                raise ValueError(f"`{missing}` comes with a package that is not installed: {remedy}")
            raise PydanticCustomError("source_kind", f"a source needs one of the keys {', '.join(keys)}")
        SOURCES.get(found)  # loaded now, if another package brings it
    spec: SourceSpec = _union(SOURCES.loaded())[1].validate_python(value)
    return spec


@functools.cache
def _union(kinds: tuple[SourceKind, ...]) -> tuple[Any, TypeAdapter[Any]]:
    """The specs of these kinds as one annotation, told apart by key, and what validates it."""

    def key_of(value: Any) -> str | None:
        has = value.__contains__ if isinstance(value, Mapping) else functools.partial(hasattr, value)
        return next((kind.key for kind in kinds if has(kind.key)), None)

    tagged = tuple(Annotated[kind.spec, Tag(kind.key)] for kind in kinds)
    wanted = f"a source needs one of the keys {', '.join(kind.key for kind in kinds)}"
    how = Discriminator(key_of, custom_error_type="source_kind", custom_error_message=wanted)
    union = Annotated[Union[tagged], how]  # type: ignore[valid-type]  # noqa: UP007
    return union, TypeAdapter(union)


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
        told = refusal(error, kind, value, where=lambda path: ".".join(filter(None, (key, path))))
        raise RecipeError(told.message, where=told.where, remedy=told.remedy) from None
