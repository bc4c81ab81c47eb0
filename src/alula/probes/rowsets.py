"""Named sets of rows: which rows of a batch a probe looks at."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.rows import Kind, Role, RowMap

RowSet = Literal[
    "all", "text", "image", "video", "audio", "perceptual", "before", "between", "after", "seen", "last",
    "system", "user", "assistant",
]  # fmt: skip
"""Names of sets of valid rows.

By kind: "all", "text", "image", "video", "audio", "perceptual" (the last three together). Text by its place among the
sample's perceptual rows: "before" the first, "between" the first and the last, "after" the last, "seen" = between and
after; all text of a sample without perceptual rows is "before". "last": the sample's last row. By turn, where the
RowMap
knows roles: "system", "user", "assistant" (text rows only).
"""

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


def check(name: str, where: str) -> None:
    """Raise a UsageError unless `name` is a row set; `where` says which option it was given to."""
    if name not in get_args(RowSet):
        raise UsageError(f"{where} cannot be {name!r}", remedy=f"use one of: {', '.join(get_args(RowSet))}")


def select(rows: RowMap, name: str) -> Tensor:
    """(B, S) bool: the rows of the named set.

    Raises:
        UsageError: a set by role, and the RowMap knows no roles.
    """
    match name:
        case "all":
            return rows.valid
        case "text":
            return rows.is_text
        case "perceptual":
            return rows.is_perceptual
        case "image" | "video" | "audio":
            return rows.kind == Kind[name.upper()]
        case "before":
            return rows.is_text & ~_passed(rows)
        case "between":
            return rows.is_text & _passed(rows) & _ahead(rows)
        case "after":
            return rows.is_text & _passed(rows) & ~_ahead(rows)
        case "seen":
            return rows.is_text & _passed(rows)
        case "last":
            return rows.valid & (rows.position == rows.position.max(dim=1, keepdim=True).values)
        case _:
            return of_role(rows, _ROLES[name])


def of_role(rows: RowMap, role: Role) -> Tensor:
    """(B, S) bool: text rows of one role's turns.

    Raises:
        UsageError: the RowMap knows no roles.
    """
    if not bool((rows.role != Role.UNKNOWN).any()):
        raise UsageError(
            f"{role.name.lower()} rows were asked for, but nothing says which rows they are",
            remedy="pass row_map=RowMap.from_kinds(..., roles=...) to the model",
        )
    return rows.is_text & (rows.role == role)


def _passed(rows: RowMap) -> Tensor:
    """(B, S): a perceptual row stands at or before this one."""
    return rows.is_perceptual.cumsum(dim=1) > 0


def _ahead(rows: RowMap) -> Tensor:
    """(B, S): a perceptual row stands at or after this one."""
    return torch.flip(torch.flip(rows.is_perceptual, [1]).cumsum(dim=1), [1]) > 0
