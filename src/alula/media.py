"""The kinds of media a model may take, in one table: what each is called, and the keywords it travels by.

Images, videos and audio clips are read by many models; points, depth, normals, motion and responses by hosts with a
universal encoder. Whatever knows of them reads it here. The table is open: a medium that is registered is known to
token maps, item tables, sets of tokens, inputs and probes alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from alula.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One kind of media.

    Args:
        name: type of a content part, and the key its value has there.
        modality: number of its tokens in a `TokenMap`, as in transformers' ``mm_token_type_ids``; above 0.
        inputs: keywords of a model's forward that bring it; the first is the one alula's own hosts take.
        tower: which tower reads it: "vision", "audio", or "universal" for what a host needs a universal encoder for.
        a: the noun for one of it.
        plural: the noun for several.
    """

    name: str
    modality: int
    inputs: tuple[str, ...]
    tower: str
    a: str
    plural: str

    @property
    def token(self) -> str:
        """Name of the attribute by which processors know its placeholder."""
        return f"{self.name}_token"


class Media(Mapping[str, Medium]):
    """Media by name, in the order of their numbers.

    Attributes:
        keywords: of a forward that bring any of them.
    """

    def __init__(self, *media: Medium) -> None:
        self._media: dict[str, Medium] = {}
        self.keywords: frozenset[str] = frozenset()
        for medium in media:
            self.register(medium)

    def register(self, medium: Medium) -> None:
        """Add a medium.

        Raises:
            UsageError: its name, its number or one of its keywords is taken, or the number is not above 0.
        """
        for known in self._media.values():
            shared = {known.name, known.modality, *known.inputs} & {medium.name, medium.modality, *medium.inputs}
            if shared:
                raise UsageError(f"{min(map(str, shared))} is taken by {known.name}", where=f"medium {medium.name!r}")
        if medium.modality < 1:
            raise UsageError(f"{medium.modality} is not above 0", where=f"medium {medium.name!r}: modality")
        self._media[medium.name] = medium
        self.keywords = self.keywords.union(medium.inputs)

    def numbered(self, modality: int) -> Medium | None:
        """The medium of that number, or None."""
        return next((medium for medium in self._media.values() if medium.modality == modality), None)

    def __getitem__(self, name: str) -> Medium:
        return self._media[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._media)

    def __len__(self) -> int:
        return len(self._media)


def _universal(name: str, modality: int, keyword: str, a: str, plural: str) -> Medium:
    return Medium(name=name, modality=modality, inputs=(keyword,), tower="universal", a=a, plural=plural)


MEDIA = Media(
    Medium(
        name="image",
        modality=1,
        inputs=(
            "pixel_values",
            "pixel_values_images",
            "pixel_values_local",
            "high_res_pixel_values",
            "image_patches",
        ),
        tower="vision",
        a="an image",
        plural="images",
    ),
    Medium(name="video", modality=2, inputs=("pixel_values_videos",), tower="vision", a="a video", plural="videos"),
    Medium(
        name="audio",
        modality=3,
        inputs=("input_features", "input_values"),
        tower="audio",
        a="audio",
        plural="audio clips",
    ),
    _universal("points", 4, "point_values", "a point cloud", "point clouds"),
    _universal("depth", 5, "depth_values", "a depth map", "depth maps"),
    _universal("normals", 6, "normal_values", "a map of surface normals", "maps of surface normals"),
    _universal("motion", 7, "motion_values", "a motion recording", "motion recordings"),
    _universal("response", 8, "response_values", "a brain response", "brain responses"),
)
