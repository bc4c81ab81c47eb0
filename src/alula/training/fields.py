"""What sections of a recipe are made of: one frozen, forbidding model, and numbers within bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alula.settings import Bool as Bool
from alula.settings import Int, Number, Settings

# beyond these, a number is a slip, or more than the machinery below counts to
MANY, WIDE, ITEMS = 2**31 - 1, 2**16, 1_000_000

Count = Annotated[Int, Field(ge=1, le=MANY)]
Size = Annotated[Int, Field(ge=1, le=WIDE)]
Seed = Annotated[Int, Field(ge=0, le=MANY)]
Rate = Annotated[Number, Field(gt=0, le=10)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class Section(Settings):
    """A section of a recipe."""
