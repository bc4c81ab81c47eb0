"""Where samples come from: files, Hugging Face datasets, the microworld; all indexed, none loaded whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alula import microworld
from alula.data.errors import BadSampleError, Place, RecordError
from alula.data.images import DEFAULT_MAX_PIXELS
from alula.data.records import RecordFile
from alula.data.samples import MEDIA, Sample, media_part
from alula.data.shapes import ImageFolder, from_conversations, from_messages
from alula.data.specs import DatasetSpec, DigitsSpec, JsonlSpec, LlavaSpec, MicroworldSpec, SourceSpec, validated
from alula.data.tables import load_table, table_files
from alula.errors import DataError, UsageError
from alula.microworld.digits import DIGIT_FAMILIES, DigitStream

Reader = Callable[..., Sample]
"""``from_messages`` or ``from_conversations``."""


class Source(Protocol):
    """Samples by index; picklable, readable from any worker.

    Attributes:
        name: what reports call it.
        size: number of samples, or None when it never ends.
    """

    name: str

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, its images undecoded. Raises ``BadSampleError`` when the record is unusable."""
        ...


class FileSource:
    """Records of a JSONL file or JSON array, read lazily by byte offset.

    Args:
        path: the file.
        reader: how to understand a record.
        images: folder relative image paths start from; default: the file's folder, then ``images`` in it.
        name: default: the file's name without suffix.
        limit: use only the first n records.

    Raises:
        DataError: the file is missing, empty or not parseable as a whole.
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
    ) -> None:
        self._records = RecordFile(path)
        self._reader = reader
        self._folder = ImageFolder(_roots(self._records.path.parent, images), max_pixels)
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
    Columns: ``messages`` with ``images`` (or ``image``), or ``conversations`` with ``image`` (or ``images``).

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
    ) -> None:
        self.path = Path(os.path.abspath(path))
        table = load_table(self.path, split)
        self._reader = _reader_of(set(table.column_names), str(path))
        # Arrow format hands out the stored structs: no Image feature decodes behind our back
        self._table = table.with_format("arrow")
        folder = self.path if self.path.is_dir() else self.path.parent
        self._folder = ImageFolder(_roots(folder, images), max_pixels)
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


class StreamSource:
    """Items of a stream by position; images are drawn when loaded.

    Args:
        stream: microworld items by index.
        name: what reports call it.
        size: number of items; None: endless.
    """

    def __init__(self, stream: Any, name: str, size: int | None) -> None:
        self._stream, self.name, self.size = stream, name, size

    def __getitem__(self, index: int) -> Sample:
        item = self._stream[index]
        messages = [{**message, "content": list(map(_lazy, message["content"]))} for message in item.messages]
        meta = {"family": item.family, "kind": item.kind, "split": item.split}
        place = Place(self.name, index, item.id, unit="item")
        return Sample(item.id, messages, source=self.name, meta=meta, place=place)


class DigitsSource(StreamSource):
    """Questions about real handwritten digits (`alula.microworld.digits`).

    Args:
        digits: a family of `DIGIT_FAMILIES`, or ``all``.
        split: ``train``, or ``test`` for held-out writers.
        seed: of the stream.
        limit: only the first n items; None: endless.
    """

    def __init__(
        self, digits: str, *, split: str = "train", seed: int = 0, name: str | None = None, limit: int | None = None
    ) -> None:
        families = DIGIT_FAMILIES if digits == "all" else (digits,)
        super().__init__(DigitStream(split, seed, families, limit), name or f"digits-{digits}", limit)  # type: ignore[arg-type]


class MicroworldSource(StreamSource):
    """Items of the procedural world, by position in its stream; images are drawn when loaded.

    Args:
        stream: a member of ``microworld.SOURCES``.
        split: ``train``, ``test`` or ``unseen``.
        seed: of the stream.
        families: only these.
        limit: only the first n items; None: endless.

    Raises:
        UsageError: an unknown stream, split or family, with the legal ones.
    """

    def __init__(
        self,
        stream: str,
        *,
        split: str = "train",
        seed: int = 0,
        families: Sequence[str] | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> None:
        items = microworld.source(stream, split=split, seed=seed, families=families, n=limit)  # type: ignore[arg-type]
        super().__init__(items, name or f"microworld-{stream}", limit)


def _lazy(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    return media_part(kind, MEDIA[kind].from_object(part[kind])) if kind in MEDIA else part


def open_source(
    spec: Mapping[str, Any] | SourceSpec, *, base: str | os.PathLike[str] = ".", key: str = "source"
) -> Source:
    """Open what a recipe calls a source.

    Args:
        spec: e.g. ``{"jsonl": "train.jsonl"}``, ``{"llava": "llava.json", "images": "coco"}``,
            ``{"dataset": "folder"}``, ``{"microworld": "visual", "split": "train", "seed": 0}``.
        base: folder that relative paths start from (a recipe's own).
        key: path of the spec in the recipe, for error messages.

    Raises:
        RecipeError: an unknown key or illegal value, with its path and what is legal.
        DataError: the data is not there or unreadable as a whole.
    """
    checked = validated(SourceSpec, spec, key=key) if isinstance(spec, Mapping) else spec
    if isinstance(checked, MicroworldSpec):
        return MicroworldSource(
            checked.microworld,
            split=checked.split,
            seed=checked.seed,
            families=checked.families,
            name=checked.name,
            limit=checked.limit,
        )
    if isinstance(checked, DigitsSpec):
        return DigitsSource(
            checked.digits, split=checked.split, seed=checked.seed, name=checked.name, limit=checked.limit
        )
    images = None if checked.images is None else Path(base, checked.images)
    options: dict[str, Any] = {
        "images": images,
        "max_pixels": checked.max_pixels,
        "name": checked.name,
        "limit": checked.limit,
    }
    if isinstance(checked, JsonlSpec):
        return FileSource(Path(base, checked.jsonl), from_messages, **options)
    if isinstance(checked, LlavaSpec):
        return FileSource(Path(base, checked.llava), from_conversations, **options)
    assert isinstance(checked, DatasetSpec)
    return DatasetSource(Path(base, checked.dataset), split=checked.split, **options)


def source_files(spec: SourceSpec, *, base: str | os.PathLike[str] = ".") -> list[Path]:
    """The files that hold the records of a source, without the media they name; none of a source that draws its own.

    Raises:
        UsageError, DataError: a dataset that is not there, or whose split must be named.
    """
    if isinstance(spec, DatasetSpec):
        return table_files(Path(base, spec.dataset), spec.split)
    if isinstance(spec, JsonlSpec | LlavaSpec):
        return [Path(base, spec.jsonl if isinstance(spec, JsonlSpec) else spec.llava)]
    return []


def open_file(
    path: str | os.PathLike[str],
    *,
    form: str = "auto",
    images: str | os.PathLike[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    split: str | None = None,
) -> FileSource | DatasetSource:
    """Open a file or folder whose kind is found out from what it holds.

    Args:
        form: ``auto``, ``jsonl``, ``llava`` or ``dataset``.

    Raises:
        UsageError: an unknown form, or an image folder that is not there.
        DataError: nothing readable, or its first record is of neither shape.
    """
    if form not in ("auto", "jsonl", "llava", "dataset"):
        raise UsageError(f"unknown format {form!r}", remedy="formats are auto, jsonl, llava, dataset")
    if images is not None and not os.path.isdir(images):
        raise UsageError("no such folder of images", where=str(images))
    if form == "dataset" or (form == "auto" and (os.path.isdir(path) or str(path).endswith(".parquet"))):
        return DatasetSource(path, split=split, images=images, max_pixels=max_pixels)
    reader = {"jsonl": from_messages, "llava": from_conversations}.get(form) or _sniff(RecordFile(path))
    return FileSource(path, reader, images=images, max_pixels=max_pixels)


def _sniff(records: RecordFile) -> Reader:
    for index in range(min(len(records), 100)):
        try:
            record = records.read(index)
        except RecordError:
            continue
        if isinstance(record, Mapping) and ("messages" in record or "conversations" in record):
            return _reader_of(set(record), str(records.path))
    raise DataError(
        "none of the first records has 'messages' or 'conversations'",
        where=str(records.path),
        remedy="say what the file is with --format jsonl or --format llava",
    )


def _reader_of(keys: set[str], where: str) -> Reader:
    if "messages" in keys:
        return from_messages
    if "conversations" in keys:
        return from_conversations
    raise DataError(f"needs a column 'messages' or 'conversations'; it has {', '.join(sorted(keys))}", where=where)


def _roots(beside: Path, images: str | os.PathLike[str] | None) -> tuple[str, ...]:
    if images is not None:
        return (os.path.abspath(images),)
    return (str(beside), str(beside / "images"))


def _read(reader: Reader, record: Any, folder: ImageFolder, name: str, place: Place) -> Sample:
    try:
        return reader(record, folder=folder, source=name, place=place)
    except BadSampleError as error:
        raise error.at(place) from None
