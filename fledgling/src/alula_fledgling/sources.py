"""Sources that draw their samples: the microworld, and questions about real handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from alula.data.registry import SourceKind
from alula.data.sources import StreamSource
from alula.data.specs import SourceSpec
from alula.settings import Int
from alula_fledgling import microworld
from alula_fledgling.microworld.digits import DIGIT_FAMILIES, DigitStream


class MicroworldSpec(SourceSpec):
    """Items of the procedural world; endless unless ``limit`` is given."""

    microworld: Literal[
        "text", "visual", "caption", "dialogue", "episode", "pictures", "pictures_caption", "film", "film_caption",
        "sound", "sound_caption",
        "named", "named_caption", "named_blind", "named_shuffled", "named_told",
        "points", "points_caption", "depth", "depth_caption", "depth_pictured", "normals", "normals_caption",
        "normals_pictured", "motion", "motion_caption", "response", "response_caption",
    ]  # fmt: skip
    split: Literal["train", "test", "unseen"] = "train"
    seed: Int = 0
    families: list[str] | None = Field(None, description="only these families of skill")
    limit: Int | None = Field(None, gt=0, description="draw only n different items")


class DigitsSpec(SourceSpec):
    """Questions about handwritten digits (`alula_fledgling.microworld.digits`); endless unless ``limit`` is given."""

    digits: Literal["all", "read", "row", "larger", "sum"] = Field(description="what is asked")
    split: Literal["train", "test"] = Field("train", description="test: held-out writers")
    seed: Int = 0
    limit: Int | None = Field(None, gt=0, description="draw only n different items")


class DigitsSource(StreamSource):
    """Questions about real handwritten digits (`alula_fledgling.microworld.digits`).

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


MICROWORLD = SourceKind(
    "microworld",
    MicroworldSpec,
    lambda spec, base: MicroworldSource(
        spec.microworld, split=spec.split, seed=spec.seed, families=spec.families, name=spec.name, limit=spec.limit
    ),
)
DIGITS = SourceKind(
    "digits",
    DigitsSpec,
    lambda spec, base: DigitsSource(spec.digits, split=spec.split, seed=spec.seed, name=spec.name, limit=spec.limit),
)
