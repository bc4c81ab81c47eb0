"""Tables and lists of published files, with the line of everything that is wrong."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alula.errors import DataError

_LONGEST = 2**24
"""characters of a cell"""


@dataclass(frozen=True)
class Table:
    """A CSV file.

    Attributes:
        file: its path, for messages.
        stem: its name, for names of tasks.
        columns: names of those there are.
        lines: the cells of every row, and the line it begins in.
    """

    file: str
    stem: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[int, list[str]]]

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Line and cells by column of every row.

        Raises:
            DataError: a row has more or fewer cells than there are columns, or there is none.
        """
        for line, cells in self.lines:
            if len(cells) != len(self.columns):
                raise DataError(
                    f"has {len(cells)} cells, the file {len(self.columns)} columns ({', '.join(self.columns)})",
                    where=f"{self.file}:{line}",
                    remedy="put quotation marks around cells that hold commas or line breaks",
                )
            yield line, dict(zip(self.columns, cells, strict=True))
        if not self.lines:
            raise DataError("has columns and no row", where=self.file)

    def located(self) -> Iterator[tuple[str, dict[str, str]]]:
        """`rows` with where they stand, for messages."""
        return ((f"{self.file}:{line}", row) for line, row in self.rows())


def csv_lines(file: str, text: str) -> list[tuple[int, list[str]]]:
    """The cells of every row of a CSV text, and the line it begins in; empty lines are passed over.

    Raises:
        DataError: quotation marks that do not close, or what follows one (named by line).
    """
    before = csv.field_size_limit(_LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found, begins = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"is no row of CSV: {error}", where=f"{file}:{begins}", remedy="look at its quotation marks"
        ) from error
    finally:
        csv.field_size_limit(before)
    return found


def json_entries(file: str, text: str) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON list, each with the line it begins in.

    Raises:
        DataError: it is no list, not JSON (named by line), or empty.
    """
    decoder = json.JSONDecoder()

    def line(position: int) -> str:
        return f"{file}:{text.count(chr(10), 0, position) + 1}"

    def skip(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    at = skip(0)
    if text[at : at + 1] != "[":
        raise DataError("is no JSON list", where=line(at))
    at, number = skip(at + 1), 0
    while text[at : at + 1] != "]":
        try:
            entry, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"is not JSON: {error.msg}", where=line(error.pos)) from error
        yield f"{line(at)} (entry {number + 1})", entry
        number, at = number + 1, skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise DataError("is not JSON: the list does not go on, and does not end", where=line(at))
    if skip(at + 1) != len(text):
        raise DataError("is not JSON: something stands behind the list", where=line(at + 1))
    if not number:
        raise DataError("is an empty list", where=file)
