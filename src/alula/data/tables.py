"""Tables on disk, of which a source reads one split: what `save_to_disk` wrote, a parquet file, or a folder of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alula.errors import AlulaError, DataError, UsageError
from alula.files import check_path, read_json, regular

_MARKS = ("*.arrow", "state.json", "dataset_info.json", "dataset_dict.json", "**/*.parquet")
"""What tells a dataset's folder from any other."""

_DECLARING = ("README.md", ".huggingface.yaml")
"""Files of a folder that may say which file belongs to which split."""


def load_table(path: Path, split: str | None) -> Any:
    """The rows of ``path``, memory-mapped, as a `datasets.Dataset`.

    Args:
        split: which split; None where there is only one.

    Raises:
        UsageError: the extra ``data`` is not installed, there is no such split, or one of several must be named.
        DataError: there is nothing, or nothing readable; the message names the file and the innermost cause.
    """
    datasets = _library(path)
    try:
        files = _parquet_files(path, split)
        if not files:
            folder = _saved_folder(path, split)
            for file in (*folder.glob("*.arrow"), *folder.glob("*.json")):
                regular(file)
            return datasets.load_from_disk(str(folder))
        features = datasets.Features.from_arrow_schema(_common_schema(files))
        try:
            return datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train", features=features)
        except Exception:
            _refuse_damaged(files)
            raise
    except AlulaError:
        raise
    except Exception as error:  # datasets, pyarrow and the file system each raise their own
        raise DataError(f"cannot be read as a dataset: {_innermost(error)}", where=str(path)) from error


def table_files(path: Path, split: str | None) -> list[Path]:
    """The files that hold the rows that `load_table` reads.

    Raises:
        UsageError, DataError: as `load_table`.
    """
    _library(path)
    files = _parquet_files(path, split)
    if files:
        return files
    # maps and filters leave caches beside the data
    return sorted(file for file in _saved_folder(path, split).glob("*.arrow") if not file.name.startswith("cache-"))


def _library(path: Path) -> Any:
    if not path.exists():
        raise DataError("no such dataset", where=str(path), remedy=check_path(path))
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in _MARKS):
        raise DataError(
            "the folder holds no dataset: neither parquet files nor what save_to_disk writes",
            where=str(path),
            remedy="name the file itself where the records are JSON or JSONL",
        )
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "reading Hugging Face datasets needs the extra `data`",
            where=str(path),
            remedy="pip install 'alula[data]'",
        ) from None
    return datasets


# -- splits -----------------------------------------------------------------------------------------------------------


def _parquet_files(path: Path, split: str | None) -> list[Path]:
    """The parquet files of the split, none where there are no parquet files at all."""
    if not path.is_dir():
        if split is not None:
            raise UsageError(f"has no splits, so none called {split!r}", where=str(path), remedy="leave `split` out")
        return [regular(path)]
    files = sorted(map(regular, path.glob("**/*.parquet")))
    if not files:
        return []
    splits = _declared_splits(path, files)
    chosen = splits[_chosen(split, list(splits), path)]
    left = [file for file in files if file not in chosen]
    if split is None and left:
        only = next(iter(splits))
        raise UsageError(
            f"{len(left)} of {len(files)} parquet files belong to no split, such as {left[0].relative_to(path)}",
            where=str(path),
            remedy=f"`split: {only}` reads the others; or name the file alone",
        )
    return [file for file in files if file in chosen]


def _declared_splits(path: Path, files: Sequence[Path]) -> dict[str, set[Path]]:
    """The parquet files of each split, as `datasets` finds them by name or as the folder's README declares them."""
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        # asked about the names alone: pictures beside the tables would be taken for data, or for splits
        outline = Path(folder).resolve() / "outline"
        for file in files:
            empty = outline / file.relative_to(path)
            empty.parent.mkdir(parents=True, exist_ok=True)
            empty.touch()
        for name in _DECLARING:
            if (path / name).is_file():
                shutil.copyfile(path / name, outline / name)
        try:
            if datasets.get_dataset_default_config_name(str(outline)) is None:
                names = ", ".join(datasets.get_dataset_config_names(str(outline)))
                raise UsageError(
                    f"holds several datasets (configurations): {names}",
                    where=str(path),
                    remedy="name the folder or the file of one of them",
                )
            found = datasets.load_dataset_builder(str(outline)).config.data_files
        except AlulaError:
            raise
        except Exception as error:  # what a README declares is not there, or no YAML, or ...
            message = _innermost(error).replace(str(outline), str(path))
            raise DataError(f"its splits cannot be told: {message}", where=str(path)) from error
        return {
            str(name): {path / Path(file).relative_to(outline) for file in members} for name, members in found.items()
        }


def _saved_folder(path: Path, split: str | None) -> Path:
    """The folder of the split in what `save_to_disk` wrote."""
    several = path / "dataset_dict.json"
    if several.exists():
        return path / _chosen(split, list(read_json(several)["splits"]), path)
    if split is not None:
        raise UsageError(f"has no splits, so none called {split!r}", where=str(path), remedy="leave `split` out")
    return path


def _chosen(split: str | None, names: list[str], path: Path) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    raise UsageError(
        f"no split {split!r}" if split is not None else "holds several splits; name one",
        where=str(path),
        remedy=f"split: one of {', '.join(names)}",
    )


# -- columns ----------------------------------------------------------------------------------------------------------


def _common_schema(files: Sequence[Path]) -> Any:
    """Columns that the rows of all ``files`` fit in: where one holds nothing, others say of what type it is.

    Raises:
        DataError: a file is no parquet, or its types fit no others'.
    """
    import pyarrow
    from pyarrow import parquet

    common = pyarrow.schema([])
    for file in files:
        try:
            # without metadata: no Image feature may decode what is stored
            schema = parquet.read_schema(file).remove_metadata()
            common = pyarrow.unify_schemas([common, schema], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise DataError(f"cannot be read as a dataset: {_innermost(error)}", where=str(file)) from error
    return common


def _refuse_damaged(files: Sequence[Path]) -> None:
    """Raise a DataError about the first of ``files`` whose rows cannot be read."""
    from pyarrow import parquet

    for file in files:
        try:
            for _ in parquet.ParquetFile(file).iter_batches():
                pass
        except Exception as error:  # pyarrow's own, OSError, and what its codecs raise
            raise DataError(f"cannot be read as a dataset: {_innermost(error)}", where=str(file)) from error


def _innermost(error: BaseException) -> str:
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"
