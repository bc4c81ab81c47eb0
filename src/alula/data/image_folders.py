"""Folders of pictures with ``metadata.jsonl``, as `datasets` calls an imagefolder: which file holds the records."""

from __future__ import annotations

from pathlib import Path

from alula.errors import DataError, UsageError

METADATA = "metadata.jsonl"
_OTHERS = ("metadata.csv", "metadata.parquet")


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with metadata in it, or in folders of splits."""
    return path.is_dir() and any(next(path.glob(pattern), None) for pattern in _patterns(METADATA, *_OTHERS))


def metadata_of(path: Path, split: str | None) -> Path:
    """The metadata of one split; its folder is where the names in it start from.

    Args:
        path: the folder, with ``metadata.jsonl`` in it, or in ``train`` and ``test``.
        split: which; None where there is only one.

    Raises:
        UsageError: no such split, one of several must be named, or two are called alike. DataError: metadata of another
            format.
    """
    found = {file.parent: file for pattern in _patterns(METADATA) for file in sorted(path.glob(pattern))}
    if not found:
        other = next(file for pattern in _patterns(*_OTHERS) for file in path.glob(pattern))
        raise DataError(
            "metadata of pictures are read as JSONL",
            where=str(other),
            remedy=f"write {METADATA}, one object per line with `file_name` and what is said of the picture",
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
