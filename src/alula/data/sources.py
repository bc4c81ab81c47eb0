"""Where samples come from: files, Hugging Face datasets, streams; all indexed, none loaded whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.coco import CocoSource, is_coco
from alula.data.dialects import REMEDY, from_metadata, from_record, readable, renamed
from alula.data.errors import BadSampleError, Place, RecordError
from alula.data.image_folders import MetadataTable, is_image_folder, metadata_of, records_of
from alula.data.keys import names_of
from alula.data.records import RecordFile
from alula.data.registry import SourceKind, register
from alula.data.samples import BROWSED, Sample, Source, check_turns, lazy, worded
from alula.data.shapes import ImageFolder, from_conversations
from alula.data.specs import (
    CocoSpec,
    DatasetSpec,
    FileSpec,
    JsonlSpec,
    LlavaSpec,
    MediaSpec,
    RecordsSpec,
    SourceSpec,
    WebdatasetSpec,
    validated,
)
from alula.data.tables import load_table, table_files
from alula.data.webdataset import TarSource, shards_of
from alula.errors import DataError, UsageError, quoted
from alula.files import absolute

Reading = Mapping[str, Mapping[str, Any]]
"""medium -> option -> value (`alula.data.media.MediaRef.options`)"""

Reader = Callable[..., Sample]
"""``from_record``, or ``from_conversations`` where nothing else is meant."""

FORMS = ("auto", "jsonl", "llava", "dataset", "coco", "webdataset")
"""What `open_file` may be told that a file is."""


_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")


class FileSource:
    """Records of a JSONL file or JSON array, read lazily by byte offset.

    Args:
        path: the file.
        reader: how to understand a record.
        images: folder relative image paths start from; default: the file's folder, then ``images`` in it.
        name: default: the file's name without suffix.
        limit: use only the first n records.
        columns: alula's name of a column -> its name in the file.
        reading: how media are read where records do not say it.

    Raises:
        DataError: the file is missing, empty or not parseable as a whole.
        UsageError: a column that no record seems to have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reader: Reader,
        *,
        images: str | os.PathLike[str] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        name: str | None = None,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        reading: Reading | None = None,
    ) -> None:
        self._records = records_of(path)
        self._reader = _with_columns(reader, columns)
        if columns:
            _refuse_unknown(columns, _first_keys(self._records), str(path))
        self._folder = ImageFolder(_roots(self._records.path.parent, images), max_pixels, dict(reading or {}))
        self.name = name or self._records.path.stem
        self.size: int = min(len(self._records), limit or len(self._records))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        record = self._records.read(index)
        return _read(self._reader, record, self._folder, self.name, self.place(index))

    def place(self, index: int) -> Place:
        """Where record ``index`` stands."""
        return self._records.place(index)


class DatasetSource:
    """A Hugging Face dataset on disk: a ``save_to_disk`` folder, a parquet file or a folder of parquet files.

    Rows stay memory-mapped; image columns (``Image``, lists of it, bytes, paths) are taken as stored, undecoded.
    Columns: ``messages`` with ``images`` (or ``image``), ``conversations`` with ``image`` (or ``images``), or those of
    `alula.data.dialects`.

    Raises:
        UsageError: the extra ``data`` is not installed, or a split must be named.
        DataError: there is no such dataset, or it has neither column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: str | None = None,
        images: str | os.PathLike[str] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        name: str | None = None,
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.path = absolute(path)
        table = load_table(self.path, split)
        named = dict(columns or {})
        _refuse_unknown(named, set(table.column_names), str(path))
        _refuse_unreadable({*table.column_names, *named}, str(path))
        self._reader = _with_columns(from_record, named)
        # Arrow format hands out the stored structs: no Image feature decodes behind our back
        self._table = table.with_format("arrow")
        folder = self.path if self.path.is_dir() else self.path.parent
        self._folder = ImageFolder(_roots(folder, images), max_pixels, dict(reading or {}))
        self.name = name or self.path.stem
        self.size: int = min(len(table), limit or len(table))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return _read(self._reader, self._table[index].to_pylist()[0], self._folder, self.name, self.place(index))

    def place(self, index: int) -> Place:
        """Where row ``index`` stands."""
        return Place(str(self.path), index, unit="row")


FileLike = FileSource | DatasetSource | CocoSource | TarSource
"""What `open_file` opens."""


class StreamSource:
    """Items of a stream by position; images are drawn when loaded.

    Args:
        stream: items by index, with ``id``, ``messages``, ``family``, ``kind`` and ``split``; with ``browsed``, the
            conversation that is read before they are answered, where that is another one.
        name: what reports call it.
        size: number of items; None: endless.
    """

    def __init__(self, stream: Any, name: str, size: int | None) -> None:
        self._stream, self.name, self.size = stream, name, size

    def __getitem__(self, index: int) -> Sample:
        item = self._stream[index]
        messages, browsed = _lazily(item.messages), _lazily(getattr(item, "browsed", ()))
        meta = {"family": item.family, "kind": item.kind, "split": item.split}
        if browsed:
            meta[BROWSED] = browsed
        place = Place(self.name, index, item.id, unit="item")
        return Sample(item.id, messages, source=self.name, meta=meta, place=place)


class Wordings:
    """The same conversations without their media: the words alone, turn by turn as they were.

    A model reads the same tokens as of the source itself, less those that stand for media; words that nothing but a
    medium kept apart are kept apart by a space.

    Args:
        source: of conversations with media or without.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, source.name

    @property
    def size(self) -> int | None:
        """As many as the source has."""
        return self.source.size

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` in words.

        Raises:
            RecordError: a turn holds nothing but media.
        """
        sample = self.source[index]
        messages = _worded(sample.messages)
        check_turns(messages, sample.place or Place(self.name, index, sample.id, unit="item"))
        browsed = sample.meta.get(BROWSED)
        meta = {**sample.meta, BROWSED: _worded(browsed)} if browsed else sample.meta
        return replace(sample, messages=messages, meta=meta)


def _worded(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": worded(message["content"])} for message in messages]


def _lazily(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": list(map(lazy, message["content"]))} for message in messages]


def open_source(
    spec: Mapping[str, Any] | SourceSpec, *, base: str | os.PathLike[str] = ".", key: str | None = None
) -> Source:
    """Open what a recipe calls a source.

    Args:
        spec: e.g. ``{"jsonl": "train.jsonl"}``, ``{"llava": "llava.json", "images": "coco"}``,
            ``{"dataset": "folder"}``, or a kind that an installed package brings, such as
            ``{"microworld": "visual", "split": "train", "seed": 0}``.
        base: folder that relative paths start from (a recipe's own).
        key: path of the spec in the recipe, for error messages.

    Raises:
        RecipeError: an unknown key or illegal value, with its path and what is legal.
        DataError: the data is not there or unreadable as a whole.
    """
    if isinstance(spec, str | os.PathLike):
        raise UsageError(
            f"{os.fspath(spec)!r} does not say what kind of source it is",
            where=key or "source",
            remedy=f'{{"jsonl": {os.fspath(spec)!r}}} or another kind; or open_file, which finds it out',
        )
    checked = validated(SourceSpec, spec, key=key or "source") if isinstance(spec, Mapping) else spec
    try:
        source = checked.kind().open(checked, Path(base))
    except DataError as error:
        if key is None or isinstance(error, BadSampleError):  # which says of itself where it stands
            raise
        where = f"{key}: {error.where}" if error.where else key
        raise DataError(error.message, where=where, remedy=error.remedy) from error
    return Wordings(source) if checked.text_only else source


def source_files(spec: SourceSpec, *, base: str | os.PathLike[str] = ".") -> list[Path]:
    """The files that hold the records of a source, without the media they name; none of a source that draws its own.

    Raises:
        UsageError, DataError: a dataset that is not there, or whose split must be named.
    """
    return spec.kind().files(spec, Path(base))


def _file_options(spec: Any, base: Path) -> dict[str, Any]:
    images = None if spec.images is None else base / spec.images
    return {"images": images, **_options(spec)}


def _options(spec: FileSpec) -> dict[str, Any]:
    more: dict[str, Any] = {"columns": spec.columns} if isinstance(spec, RecordsSpec) else {}
    more |= {"reading": spec.reading} if isinstance(spec, MediaSpec) else {}
    return {"max_pixels": spec.max_pixels, "name": spec.name, "limit": spec.limit, **more}


def _open_dataset(spec: DatasetSpec, base: Path) -> FileSource | DatasetSource:
    return _dataset(base / spec.dataset, spec.split, **_file_options(spec, base))


def _dataset(path: Path, split: str | None, **options: Any) -> FileSource | DatasetSource:
    if not is_image_folder(absolute(path)):
        return DatasetSource(path, split=split, **options)
    return FileSource(metadata_of(path, split), from_metadata, **{**options, "name": options.get("name") or path.name})


register(
    SourceKind(
        "jsonl",
        JsonlSpec,
        lambda spec, base: FileSource(base / spec.jsonl, from_record, **_file_options(spec, base)),
        lambda spec, base: [base / spec.jsonl],
    )
)
register(
    SourceKind(
        "llava",
        LlavaSpec,
        lambda spec, base: FileSource(base / spec.llava, from_conversations, **_file_options(spec, base)),
        lambda spec, base: [base / spec.llava],
    )
)
register(
    SourceKind(
        "dataset",
        DatasetSpec,
        _open_dataset,
        lambda spec, base: _dataset_files(base / spec.dataset, spec.split),
    )
)
register(
    SourceKind(
        "coco",
        CocoSpec,
        lambda spec, base: CocoSource(
            base / spec.coco,
            answers=None if spec.answers is None else base / spec.answers,
            **_file_options(spec, base),
        ),
        lambda spec, base: [base / file for file in (spec.coco, spec.answers) if file is not None],
    )
)
register(
    SourceKind(
        "webdataset",
        WebdatasetSpec,
        lambda spec, base: TarSource(base / spec.webdataset, **_options(spec)),
        lambda spec, base: shards_of(base / spec.webdataset),
    )
)


def _dataset_files(path: Path, split: str | None) -> list[Path]:
    return [metadata_of(path, split)] if is_image_folder(path) else table_files(path, split)


def open_file(
    path: str | os.PathLike[str],
    *,
    form: str = "auto",
    images: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    answers: str | os.PathLike[str] | None = None,
    reading: Reading | None = None,
) -> FileLike:
    """Open a file or folder whose kind is found out from what it holds.

    Args:
        form: a name of `FORMS`.
        columns: alula's name of a column -> its name in the file.
        answers: the annotations that answer the questions of a VQA file.
        reading: how media are read where records do not say it: medium -> option -> value.

    Raises:
        UsageError: an unknown form, an image folder that is not there, or a setting that the form does not have.
        DataError: nothing readable, or its first record is of neither shape.
    """
    if form not in FORMS:
        raise UsageError(f"unknown format {form!r}", remedy=f"formats are {', '.join(FORMS)}")
    if images is not None and not os.path.isdir(images):
        raise UsageError("no such folder of images", where=str(images))
    form = _form_of(Path(path), set(columns or {})) if form == "auto" else form
    for option, given, takes in (
        ("split", split, ("dataset",)),
        ("columns", columns, ("jsonl", "llava", "dataset", "webdataset")),
        ("reading", reading, ("jsonl", "dataset", "webdataset")),
        ("images", images, ("jsonl", "llava", "dataset", "coco")),
        ("answers", answers, ("coco",)),
    ):
        if given and form not in takes:
            raise UsageError(f"{option} is without effect on {form}", where=str(path), remedy="leave it out")
    options: dict[str, Any] = {"max_pixels": max_pixels, "columns": columns, "reading": reading}
    match form:
        case "dataset":
            return _dataset(Path(path), split, images=images, **options)
        case "coco":
            return CocoSource(path, answers=answers, images=images, max_pixels=max_pixels)
        case "webdataset":
            return TarSource(path, **options)
    reader = from_record if form == "jsonl" else from_conversations
    return FileSource(path, reader, images=images, **options)


def _form_of(path: Path, columns: set[str]) -> str:
    if path.is_file() and path.suffix.lower() in (*_PICTURES, ".wav", ".mp4"):
        raise UsageError(
            "is a picture, film or sound, no file of records",
            where=str(path),
            remedy='name a file whose records hold it, such as a line of JSONL: {"messages": [{"role": "user", '
            f'"content": [{{"type": "image", "image": "{path.name}"}}, ...]}}, ...]}}',
        )
    if path.suffix == ".tar" or (path.is_dir() and next(path.glob("*.tar"), None) is not None):
        return "webdataset"
    return "dataset" if path.is_dir() or path.suffix == ".parquet" else _sniff(RecordFile(path), columns)


def _sniff(records: RecordFile, columns: set[str]) -> str:
    unread: RecordError | None = None
    for index in range(min(len(records), 100)):
        try:
            record = records.read(index)
        except RecordError as error:
            unread = unread or error.at(records.place(index))
            continue
        if not isinstance(record, Mapping):
            continue
        keys = columns | {*record}
        if "messages" in keys or readable(keys):
            return "jsonl"
        if "conversations" in keys:
            return "llava"
        if is_coco(record):
            return "coco"
    if unread is not None:
        if _is_coco_in_lines(records.path):
            return "coco"
        raise unread
    raise DataError(
        f"none of the first records has a shape that is read; {_has(_first_keys(records))}",
        where=str(records.path),
        remedy=REMEDY,
    )


def _is_coco_in_lines(path: Path) -> bool:
    """Whether a file is one of COCO's, written over several lines."""
    try:
        return is_coco(json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        return False


def _refuse_unreadable(keys: set[str], where: str) -> None:
    if not (keys & {"messages", "conversations"} or readable(keys)):
        raise DataError(f"has columns of no shape that is read; {_has(keys)}", where=where, remedy=REMEDY)


def _refuse_unknown(columns: Mapping[str, str], keys: set[str], where: str) -> None:
    for name, column in columns.items():
        if column not in keys:
            raise UsageError(f"columns.{name}: there is no column {quoted(column)}; {_has(keys)}", where=where)


def _has(keys: set[str]) -> str:
    return f"it has {names_of(sorted(keys))}" if keys else "it has none"


def _first_keys(records: RecordFile | MetadataTable) -> set[str]:
    keys: set[str] = set()
    for index in range(min(len(records), 100)):
        try:
            record = records.read(index)
        except RecordError:
            continue
        keys |= {*record} if isinstance(record, Mapping) else set()
    return keys


def _with_columns(reader: Reader, columns: Mapping[str, str] | None) -> Reader:
    return partial(_renaming, reader, dict(columns)) if columns else reader


def _renaming(reader: Reader, columns: Mapping[str, str], record: Any, **options: Any) -> Sample:
    return reader(renamed(record, columns) if isinstance(record, Mapping) else record, **options)


def _roots(beside: Path, images: str | os.PathLike[str] | None) -> tuple[str, ...]:
    if images is not None:
        return (os.path.abspath(images),)
    return (str(beside), str(beside / "images"))


def _read(reader: Reader, record: Any, folder: ImageFolder, name: str, place: Place) -> Sample:
    try:
        return reader(record, folder=folder, source=name, place=place)
    except BadSampleError as error:
        raise error.at(place) from None
