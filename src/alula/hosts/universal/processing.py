"""Prompts with items of any medium to the inputs of a universal host.

A part of a message holds its item under the name of its medium: ``{"type": "points", "points": array}``. What it holds:

- ``points``: (N, 6) x, y, z, red, green, blue, colors in 0..1;
- ``depth``: (H, W) meters, 0 where unknown; ``normals``: (H, W, 3) unit vectors; beside either, under ``image``, the
  RGB picture of the same view, for hosts that take it;
- ``motion``: (samples, 6) acceleration in m/s^2 and angular rate in rad/s, at the host's rate;
- ``response``: (voxels,);
- ``image``, ``video``, ``audio``: as `AlulaProcessor` takes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.hosts.multimodal.processing import AlulaProcessor
from alula.hosts.universal.shapes import CHANNELS, SHAPES, Cloud, DepthFrames, Series, Vector, shape_of
from alula.media import MEDIA

OWN = tuple(medium for medium in SHAPES if MEDIA[medium].tower == "universal")
"""media that transformers' processors know nothing of"""

_BESIDE = "{}_images"  # keyword for the pictures beside maps


class UniversalProcessor(AlulaProcessor):
    """The processor of :class:`UniversalForConditionalGeneration`.

    Inputs beside ids, the items of all prompts in reading order: those of `AlulaProcessor`, ``point_values`` (N, P, 6),
    ``depth_values`` and ``normal_values`` (N, F, C, H, W), ``motion_values`` (N, samples, 6), ``response_values``
    (N, voxels).

    Args:
        image_processor: for pictures, and for the size, mean and deviation of maps.
        feature_extractor: for audio clips, as of `AlulaProcessor`.
        tokenizer: of the language model, with the placeholders.
        tokens_per_item: decoder tokens per item of each medium.
        sizes: sizes of each medium, see `alula.hosts.universal.shapes`.
        placeholders: placeholder of each medium that the host takes.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_item: dict[str, int] | None = None,
        sizes: dict[str, dict[str, Any]] | None = None,
        placeholders: dict[str, str] | None = None,
    ) -> None:
        self.placeholders = dict(placeholders or {})
        self.sizes = {medium: dict(values) for medium, values in (sizes or {}).items()}
        for medium in OWN:
            token = self.placeholders.get(medium)
            setattr(self, f"{medium}_token", token)
            identity = None if token is None else tokenizer.convert_tokens_to_ids(token)
            setattr(self, f"{medium}_token_id", identity)
        super().__init__(
            image_processor,
            feature_extractor,
            tokenizer,
            chat_template=chat_template,
            tokens_per_item=tokens_per_item,
            num_frames=self._shape("video").frames,
            **{f"{medium}_token": self.placeholders.get(medium) for medium in ("image", "video", "audio")},
        )

    @property
    def motion_rate(self) -> int | None:
        """Samples per second of the motion it takes; None where it takes none."""
        return self._shape("motion").rate if "motion" in self.placeholders else None

    @property
    def all_special_multimodal_tokens(self) -> list[str]:
        """The placeholders."""
        return list(self.placeholders.values())

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, *(MEDIA[medium].inputs[0] for medium in OWN)]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any processor; the items of all media are taken out of the messages."""
        found = _items(conversation)
        if found and kwargs.get("tokenize"):
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **found}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """Inputs for the model.

        Args:
            images, text, videos, audio: as of any processor.
            kwargs: ``points``, ``depth``, ``normals``, ``motion``, ``response``: lists of items in reading order;
                ``depth_images``, ``normals_images``: the pictures beside maps, None where there is none; and what any
                processor takes.

        Raises:
            ValueError: a medium or a size that the host does not take, values that are not finite, or another number of
                items than the text has placeholders for.
        """
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError(
                "this processor has no way to tell marked placeholders from others: hide them by alula.inputs"
            )
        for medium in OWN:
            if not isinstance(kwargs.get(medium, []), list | tuple | None):
                raise ValueError(f"{medium} is a list of {MEDIA[medium].plural}, one for each placeholder")
        given = {medium: kwargs.pop(medium) for medium in OWN if kwargs.get(medium)}
        beside = {medium: kwargs.pop(_BESIDE.format(medium), None) for medium in OWN}
        for medium in OWN:
            kwargs.pop(medium, None)
            self._check_count(medium, text, given.get(medium))
        alone = next((medium for medium in OWN if beside[medium] and medium not in given), None)
        if alone is not None:
            raise ValueError(f"{_BESIDE.format(alone)} are beside {MEDIA[alone].plural}, and there are none")
        made = {MEDIA[medium].inputs[0]: self._values(medium, items, beside[medium]) for medium, items in given.items()}
        out = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        out.update(made)
        return out

    def blanks(self) -> dict[str, np.ndarray]:
        """An item of each medium of our own that the host takes, of nothing but zeros."""
        zeros = {"depth": (1, 1), "normals": (1, 1, 3)}
        return {
            medium: np.zeros(zeros.get(medium) or self._shape(medium).size, np.float32)
            for medium in OWN
            if medium in self.placeholders
        }

    def get_text_with_replacements(  # type: ignore[override]  # the texts say all that is to be known
        self, text: list[str], *args: Any, **kwargs: Any
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Each placeholder as often as an item of its medium has tokens, and where that was done."""
        names = {token: medium for medium, token in self.placeholders.items()}
        written = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        offsets = []
        for number, sample in enumerate(text):
            found: list[dict[str, Any]] = []
            gained = 0
            for match in written.finditer(sample):
                replacement = self._placeholders(names[match[0]])
                start, end = match.span()
                found.append(
                    {
                        "type": names[match[0]],
                        "span": (start, end),
                        "new_span": (start + gained, start + gained + len(replacement)),
                        "text": match[0],
                        "replacement": replacement,
                    }
                )
                gained += len(replacement) - (end - start)
            text[number] = written.sub(lambda match: self._placeholders(names[match[0]]), sample)
            offsets.append(found)
        return text, offsets

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """The number of its medium for each token, 0 for text (`alula.media`)."""
        numbers = {getattr(self, f"{medium}_token_id"): MEDIA[medium].modality for medium in self.placeholders}
        return [[numbers.get(int(token), 0) for token in ids] for ids in input_ids]

    # -- media ----------------------------------------------------------------------------------------------------

    def _shape(self, medium: str) -> Any:
        return shape_of(medium, self.sizes.get(medium))

    def _check_count(self, medium: str, text: Any, items: Sequence[Any] | None) -> None:
        token = self.placeholders.get(medium)
        if items and token is None:
            self._refuse(medium)
        if token is None or text is None:
            return
        places = sum(sample.count(token) for sample in ([text] if isinstance(text, str) else text))
        if places != len(items or ()):
            raise ValueError(
                f"the text holds {places} {token}, but there are {len(items or ())} {MEDIA[medium].plural}"
            )

    def _values(self, medium: str, items: Sequence[Any], beside: Sequence[Any] | None) -> Tensor:
        shape = self._shape(medium)
        arrays = [_finite(medium, item) for item in items]
        match shape:
            case Cloud():
                return _stacked([_cloud(points, shape.points) for points in arrays])
            case Series():
                return _stacked([_motion(samples, shape) for samples in arrays])
            case Vector():
                return _stacked([_response(voxels, shape) for voxels in arrays])
        pictures = [*beside] if beside is not None else [None] * len(arrays)
        maps = [_depth(each, shape.most) if isinstance(shape, DepthFrames) else _normals(each) for each in arrays]
        return torch.stack(
            [self._frames(medium, each, picture, shape.frames) for each, picture in zip(maps, pictures, strict=True)]
        )

    def _frames(self, medium: str, shown: np.ndarray, picture: Any, frames: int) -> Tensor:
        """A map in 0..1 (H, W, 3), and the picture beside it -> pixels (F, C, H, W), the picture first as published.

        Without a picture the map stands in its place, too: the average over both is then the map's alone.
        """
        processor: Any = self.image_processor
        pixels = torch.from_numpy(_fitted(shown, processor))
        pixels = (pixels - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
        pixels = pixels.permute(2, 0, 1).float()
        if picture is None:
            return pixels.expand(frames, -1, -1, -1)
        if frames == 1:
            raise ValueError(
                f"a picture stands beside {MEDIA[medium].a}, but this model reads the map alone: leave it out, or "
                f"build the host with modality_options={{{medium!r}: {{'with_image': 1}}}}"
            )
        return torch.stack([processor([picture], return_tensors="pt")["pixel_values"][0].float(), pixels])


def _items(conversation: Any) -> dict[str, list[Any]]:
    """The items of media of our own in one conversation or several, by the processor's keywords."""
    chats = conversation if conversation and isinstance(conversation[0], list | tuple) else [conversation]
    parts = [
        part
        for chat in chats
        for message in chat
        if isinstance(content := message.get("content"), list | tuple)
        for part in content
        if isinstance(part, Mapping) and part.get("type") in OWN and part.get(part["type"]) is not None
    ]
    found: dict[str, list[Any]] = {}
    for part in parts:
        found.setdefault(part["type"], []).append(part[part["type"]])
        if part["type"] in ("depth", "normals"):
            found.setdefault(_BESIDE.format(part["type"]), []).append(part.get("image"))
    return found


def _finite(medium: str, item: Any) -> np.ndarray:
    array = np.asarray(item, dtype=np.float32)
    if not array.size:
        raise ValueError(f"{MEDIA[medium].a} is empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{MEDIA[medium].a} holds values that are not finite")
    return array


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _cloud(points: np.ndarray, count: int) -> np.ndarray:
    """So many of the points, in the unit sphere around their mean."""
    if points.ndim != 2 or points.shape[1] != CHANNELS:
        raise ValueError(f"a point cloud of size {points.shape} given: (points, x y z red green blue) is taken")
    if not 0 <= points[:, 3:].min() <= points[:, 3:].max() <= 1:
        raise ValueError("a point cloud holds colors that are not in 0..1")
    if len(points) > count:  # seeded, so that the same cloud is always the same
        points = points[np.sort(np.random.default_rng(0).choice(len(points), count, replace=False))]
    else:
        points = points[np.arange(count) % len(points)]
    places = points[:, :3] - points[:, :3].mean(axis=0)
    return np.concatenate([places / max(np.linalg.norm(places, axis=1).max(), 1e-6), points[:, 3:]], axis=1)


def _motion(samples: np.ndarray, shape: Series) -> np.ndarray:
    if samples.shape != shape.size:
        taken = f"{shape.samples} samples of {CHANNELS} values ({shape.samples / shape.rate:g} s at {shape.rate} Hz)"
        raise ValueError(
            f"a motion recording of size {samples.shape} given, this model takes {taken}: cut or resample it"
        )
    return samples


def _response(voxels: np.ndarray, shape: Vector) -> np.ndarray:
    if voxels.shape != shape.size:
        raise ValueError(f"a brain response of size {voxels.shape} given, this model takes {shape.voxels} voxels")
    return voxels


def _depth(meters: np.ndarray, most: float) -> np.ndarray:
    if meters.ndim != 2:
        raise ValueError(f"a depth map of size {meters.shape} given: (height, width) in meters is taken")
    if meters.min() < 0:
        raise ValueError(f"a depth map holds {meters.min():g} meters: 0 is unknown, and nothing is nearer")
    return np.repeat(np.minimum(meters / most, 1.0)[..., None], 3, axis=2)


def _normals(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 3 or vectors.shape[2] != 3:
        raise ValueError(f"a map of surface normals of size {vectors.shape} given: (height, width, x y z) is taken")
    if np.abs(vectors).max() > 1.001:
        raise ValueError("surface normals are unit vectors; these are longer")
    return (vectors + 1) / 2


def _fitted(shown: np.ndarray, processor: Any) -> np.ndarray:
    """A map (H, W, 3) on the square that an image processor makes of pictures, as it would lay it there.

    Values are taken from the nearest place and never mixed: between a thing and what is unknown behind it there is
    nothing.
    """
    height, width = shown.shape[:2]
    crop = processor.crop_size if getattr(processor, "do_center_crop", None) else None
    side = int((crop or processor.size)["height"])
    if crop is None:
        rows, columns = _nearest(height, side), _nearest(width, side)
    else:
        short = int(processor.size.get("shortest_edge") or min(processor.size["height"], processor.size["width"]))
        scale = short / min(height, width)
        high, wide = max(round(height * scale), side), max(round(width * scale), side)
        rows = _nearest(height, high)[(high - side) // 2 :][:side]
        columns = _nearest(width, wide)[(wide - side) // 2 :][:side]
    return np.ascontiguousarray(shown[rows][:, columns], dtype=np.float32)


def _nearest(given: int, wanted: int) -> np.ndarray:
    """Indices of ``wanted`` of ``given`` places: the one in the middle of each of so many equal stretches."""
    return ((np.arange(wanted) + 0.5) * given / wanted).astype(int)
