"""Named sets of rows: which rows of a batch a probe looks at."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from alula.errors import UsageError
from alula.media import MEDIA
from alula.tokens import Modality, Role, TokenMap

TokenSet = Literal[
    "all", "text", "image", "video", "audio", "points", "depth", "normals", "motion", "response", "perceptual",
    "before", "between", "after", "seen", "last", "system", "user", "assistant",
]  # fmt: skip
"""Names of sets of valid tokens.

By kind: "all", "text", each medium, "perceptual" (all media together). Text by its place among the sample's perceptual
tokens: "before" the first, "between" the first and the last, "after" the last, "seen" = between and after; all text of
a sample without perceptual tokens is "before". "last": the sample's last token. By turn, where the TokenMap knows
roles: "system", "user", "assistant" (text tokens only).
"""

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}


def check(name: str, where: str) -> None:
    """Raise a UsageError unless `name` is a token set; `where` says which option it was given to."""
    if name not in get_args(TokenSet) and name not in MEDIA:
        raise UsageError(f"{where} cannot be {name!r}", remedy=f"use one of: {', '.join(get_args(TokenSet))}")


def by_role(name: str) -> bool:
    """Whether a set is one of turns, which a TokenMap has to know the roles for."""
    return name in _ROLES


def select(tokens: TokenMap, name: str) -> Tensor:
    """(B, S) bool: the tokens of the named set.

    Raises:
        UsageError: a set by role, and the TokenMap knows no roles.
    """
    match name:
        case "all":
            return tokens.valid
        case "text":
            return tokens.is_text
        case "perceptual":
            return tokens.is_perceptual
        case "before":
            return tokens.is_text & ~_passed(tokens)
        case "between":
            return tokens.is_text & _passed(tokens) & _ahead(tokens)
        case "after":
            return tokens.is_text & _passed(tokens) & ~_ahead(tokens)
        case "seen":
            return tokens.is_text & _passed(tokens)
        case "last":
            return tokens.valid & (tokens.position == tokens.position.max(dim=1, keepdim=True).values)
        case _ if name in MEDIA:
            return tokens.modality == int(Modality.of(name))
        case _:
            return of_role(tokens, _ROLES[name])


def of_role(tokens: TokenMap, role: Role) -> Tensor:
    """(B, S) bool: text tokens of one role's turns.

    Raises:
        UsageError: the TokenMap knows no roles.
    """
    if not bool((tokens.role != Role.UNKNOWN).any()):
        raise UsageError(
            f"{role.name.lower()} tokens were asked for, but nothing says which tokens they are",
            remedy="give the model token_roles, as Collator(processor, roles=True) makes them",
        )
    return tokens.is_text & (tokens.role == role)


def _passed(tokens: TokenMap) -> Tensor:
    """(B, S): a perceptual token stands at or before this one."""
    return tokens.is_perceptual.cumsum(dim=1) > 0


def _ahead(tokens: TokenMap) -> Tensor:
    """(B, S): a perceptual token stands at or after this one."""
    return torch.flip(torch.flip(tokens.is_perceptual, [1]).cumsum(dim=1), [1]) > 0
