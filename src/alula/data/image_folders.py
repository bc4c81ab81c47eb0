"""Folders of pictures with ``metadata.jsonl`` (``.csv``, ``.parquet``), as `datasets` calls an imagefolder: which file
holds the records, and what they are."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from alula.data.errors import Place
from alula.data.records import RecordFile
from alula.data.tables import load_table
from alula.errors import DataError, UsageError
from alula.files import absolute, regular, unreadable

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class MetadataTable:
    """Records of a ``metadata.csv`` or ``metadata.parquet``, as a `RecordFile` gives those of JSON.

    Raises:
        DataError: it cannot be read, or holds no records. UsageError: parquet without the extra ``data``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute(path)
        self._lines: list[int] | None = None
        if self.path.suffix == ".csv":
            self._rows, self._lines = _csv_rows(self.path)
        else:
            self._rows = load_table(self.path, None)
        if not len(self._rows):
            raise DataError("holds no records", where=str(path), remedy="check the path, and whether the file is whole")

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> Place:
        """Where record ``index`` stands: its line, or its row from 0."""
        if self._lines is None:
            return Place(str(self.path), index, unit="row")
        return Place(str(self.path), self._lines[index])

    def read(self, index: int) -> Any:
        """Record ``index``; values of CSV are texts."""
        return self._rows[index]


def records_of(path: str | os.PathLike[str]) -> RecordFile | MetadataTable:
    """The records of a file, by its name."""
    return MetadataTable(path) if Path(path).name in METADATA[1:] else RecordFile(path)


def _csv_rows(path: Path) -> tuple[list[dict[str, str]], list[int]]:
    rows, lines = [], []
    try:
        with regular(path).open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"has another number of values than the header's {len(reader.fieldnames or ())}",
                        where=f"{path}:{reader.line_num}",
                        remedy="put values that hold commas into quotes",
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"is no CSV in UTF-8: {error}", where=str(path)) from None
    except OSError as error:
        raise unreadable(error, path, DataError) from error
    return rows, lines


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with metadata in it, or in folders of splits."""
    return path.is_dir() and any(next(path.glob(pattern), None) for pattern in _patterns(*METADATA))


def metadata_of(path: Path, split: str | None) -> Path:
    """The metadata of one split; its folder is where the names in it start from.

    Args:
        path: the folder, with metadata in it, or in ``train`` and ``test``.
        split: which; None where there is only one.

    Raises:
        UsageError: no such split, one of several must be named, or two files or splits tell of the same pictures.
    """
    found: dict[Path, Path] = {}
    for file in (file for pattern in _patterns(*METADATA) for file in sorted(path.glob(pattern))):
        if (other := found.setdefault(file.parent, file)) != file:
            raise UsageError(
                f"has {other.name} and {file.name}; which is meant cannot be told",
                where=str(file.parent),
                remedy="keep one of them",
            )
    names = {"train" if folder == path else folder.name: file for folder, file in found.items()}
    if len(names) < len(found):
        raise UsageError(
            "has metadata of its own and in `train`; which pictures are meant cannot be told",
            where=str(path),
            remedy="give one of the two folders, or move the metadata beside the pictures of each split",
        )
    if split is None and len(names) == 1:
        return next(iter(names.values()))
    if split in names:
        return names[str(split)]
    raise UsageError(
        f"no split {split!r}" if split is not None else "holds several splits; name one",
        where=str(path),
        remedy=f"split: one of {', '.join(names)}",
    )


def _patterns(*names: str) -> list[str]:
    return [pattern for name in names for pattern in (name, f"*/{name}")]
