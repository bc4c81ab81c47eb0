"""Random access to the records of a JSON file without holding them: one object per line, or one array of objects.

Only three integers per record stay in memory (numpy arrays, so forked workers share them), and the record is read
and parsed when asked for.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from alula.data.errors import Place, RecordError
from alula.errors import DataError
from alula.files import absolute, regular, unreadable

_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"


class RecordFile:
    """A JSONL file or a JSON array, indexed by byte offset; picklable, safe to read from any process or thread.

    Raises:
        DataError: the file is missing or unreadable, holds no record, or is a JSON array that does not parse.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute(path)
        try:
            status = regular(self.path).stat()
            with open(self.path, "rb") as stream:
                head = stream.read(4096).removeprefix(_BOM).lstrip()
            spans = _array_spans(self.path) if head.startswith(b"[") else _line_spans(self.path)
        except OSError as error:
            raise unreadable(error, path, DataError) from error
        if not spans:
            raise DataError("holds no records", where=str(path), remedy="check the path, and whether the file is whole")
        self._version = (status.st_size, status.st_mtime_ns)
        self._spans = np.array(spans).reshape(
            -1, 3
        )  # (num_records, 3) int64: first byte, length in bytes, 1-based line

    def __len__(self) -> int:
        return len(self._spans)

    def place(self, index: int) -> Place:
        """Where record ``index`` stands."""
        return Place(str(self.path), int(self._spans[index, 2]))

    def read(self, index: int) -> Any:
        """Parse record ``index``.

        Raises:
            RecordError: it is not valid UTF-8 or JSON, or the file has changed since it was indexed.
        """
        start, length, _ = (int(value) for value in self._spans[index])
        with open(self.path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) != self._version:
                raise DataError("changed while it was being read", where=str(self.path), remedy="start again")
            stream.seek(start)
            raw = stream.read(length)
        try:
            return json.loads(raw)
        except UnicodeDecodeError as error:
            raise RecordError(f"not valid UTF-8: {error}", place=self.place(index)) from None
        except json.JSONDecodeError as error:
            raise RecordError(
                f"not valid JSON: {error}", place=self.place(index), remedy="one complete JSON object per line"
            ) from None
        except RecursionError:
            raise RecordError("nested too deeply to be read", place=self.place(index)) from None
        except ValueError:
            raise RecordError(
                f"a number of more than {sys.get_int_max_str_digits():,} digits",
                place=self.place(index),
                remedy="write it as text, or leave it out",
            ) from None


def _line_spans(path: Path) -> array[int]:
    spans, start = array("q"), 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            skip = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if line[skip:].strip():
                spans.extend((start + skip, len(line) - skip, number))
            start += len(line)
    return spans


def _array_spans(path: Path) -> array[int]:
    try:
        raw = path.read_bytes()
        byte = len(_BOM) if raw.startswith(_BOM) else 0
        text = raw[byte:].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not valid UTF-8: {error}", where=str(path)) from None
    del raw
    decoder = json.JSONDecoder(parse_int=len)  # numbers too long to be read are reported record by record
    spans, line, seen = array("q"), 1, 0
    at = _skip(text, text.index("[") + 1)
    while not text.startswith("]", at):
        try:
            _, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"the JSON array does not parse: {error}",
                where=f"{path}:{line}",
                remedy="mend the record that starts there; the file may be cut off",
            ) from None
        before, record = text[seen:at], text[at:end]
        byte, line = byte + len(before.encode()), line + before.count("\n")
        spans.extend((byte, len(record.encode()), line))
        byte, line, seen = byte + spans[-2], line + record.count("\n"), end
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise DataError("the JSON array is cut off or lacks a comma", where=f"{path}:{line}")
    return spans


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at
