"""k-means over the frames of an encoder: centroids from a stream, and the exactly nearest of them.

Shapes: F frames, K centroids, d their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from alula.codes.base import CodeTokenizer
from alula.codes.drawing import Painter
from alula.codes.features import EncoderFeatures
from alula.errors import CodesError

_PRODUCTS = 2**20
"""numbers of a block of distances: 4 MiB in float32, which stay near the processor"""
_AGAIN = 2**22
"""numbers of a block of differences in float64"""


def fit_centroids(frames: Iterable[Tensor], count: int, *, seed: int, passes: int = 1) -> Tensor:
    """(K, d) float32 centroids by mini-batch k-means with k-means++ (scikit-learn's), in memory of one chunk.

    Args:
        frames: chunks of (F, d). The first one with at least K frames starts the centroids. To be gone through several
            times it has to be a sequence.
        count: K.
        seed: of the start and of what is reassigned.
        passes: how often the chunks are gone through.

    Raises:
        CodesError: fewer frames than centroids, frames that are not finite, or a generator for several passes.
    """
    if passes > 1 and iter(frames) is frames:
        raise CodesError(
            f"frames that can be gone through once, and {passes} passes",
            where="k-means",
            remedy="give a list, or an object whose __iter__ begins anew",
        )
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only here needed

    fitted = MiniBatchKMeans(count, init="k-means++", n_init=1, random_state=seed, batch_size=1024)
    waiting: list[np.ndarray] = []
    started = False
    for _ in range(passes):
        for chunk in frames:
            values = chunk.detach().cpu().to(torch.float32).numpy()
            if not np.isfinite(values).all():
                raise CodesError("frames that are NaN or infinite", where="k-means", remedy="look at the encoder")
            waiting.append(values)
            if sum(map(len, waiting)) >= count:
                fitted.partial_fit(np.concatenate(waiting))
                waiting, started = [], True
    if not started:
        raise CodesError(
            f"{sum(map(len, waiting))} frames for {count} centroids",
            where="k-means",
            remedy="give more items, or ask for fewer centroids",
        )
    if waiting:  # what is left of the stream counts as well
        rest = np.concatenate(waiting)
        fitted.partial_fit(rest)
    return torch.from_numpy(np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32))


@torch.no_grad()
def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """(F,) int64 the nearest centroid of each frame by Euclidean distance, of several equally near the first.

    Distances come from one matrix product per block, |c|^2 - 2 x.c in float32. Frames whose two nearest are closer
    together than rounding tells apart, a few in a thousand, are measured again by differences in float64, so that the
    answer is that of a loop over the centroids in float64.

    Args:
        frames: (F, d), of any floating-point type.
        centroids: (K, d).
    """
    book = centroids.to(torch.float32)
    squares = book.square().sum(dim=1)
    count, width = book.shape
    found = torch.empty(len(frames), dtype=torch.int64, device=frames.device)
    # twice the error of a product of `width` terms, generously
    slack = 8 * (width**0.5 + 2) * torch.finfo(torch.float32).eps
    longest = squares.max()
    for start in range(0, len(frames), max(1, _PRODUCTS // count)):
        block = frames[start : start + max(1, _PRODUCTS // count)].to(torch.float32)
        scores = torch.addmm(squares, block, book.mT, alpha=-2)
        if count == 1:
            found[start : start + len(block)] = 0
            continue
        best, codes = scores.min(dim=1)
        limit = best + slack * (torch.linalg.vector_norm(block, dim=1).square() + longest)
        scores.scatter_(1, codes[:, None], torch.inf)
        again = (scores.amin(dim=1) <= limit).nonzero()[:, 0]
        if len(again):
            near = (scores[again] <= limit[again, None]).scatter_(1, codes[again, None], True)
            codes[again] = _measured(frames[start + again], centroids, near)
        found[start : start + len(block)] = codes
    return found


def _measured(frames: Tensor, centroids: Tensor, near: Tensor) -> Tensor:
    """(F,) the nearest by differences in float64, among (F, K) candidates."""
    row, code = near.nonzero(as_tuple=True)
    far = torch.full(near.shape, torch.inf, dtype=torch.float64, device=frames.device)
    for start in range(0, len(row), max(1, _AGAIN // frames.shape[1])):
        part = slice(start, start + max(1, _AGAIN // frames.shape[1]))
        gap = frames[row[part]].to(torch.float64) - centroids[code[part]].to(torch.float64)
        far[row[part], code[part]] = gap.square().sum(dim=1)
    best = far.amin(dim=1, keepdim=True)
    return (far == best).to(torch.int8).argmax(dim=1)  # of equal ones the first


class KMeansCodes(CodeTokenizer):
    """The nearest of K centroids for every frame of an encoder's layer.

    Decoding needs a `Painter`, which learns to draw pictures of centroids; sounds have none.

    Args:
        features: the encoder.
        centroids: (K, d).
        tokens_per_item: frames of an item (of a sound: at most).
        painter: draws pictures, or None.
    """

    type_name: ClassVar[str] = "k-means"

    def __init__(
        self, features: EncoderFeatures, centroids: Tensor, tokens_per_item: int, painter: Painter | None = None
    ) -> None:
        super().__init__()
        self.features, self.painter = features, painter
        self.register_buffer("centroids", centroids.to(torch.float32).clone())
        self.kind, self.sampling_rate = features.kind, features.sampling_rate
        self.size, self.tokens_per_item = len(centroids), tokens_per_item

    @classmethod
    def fit(
        cls, features: EncoderFeatures, items: Sequence[Any], size: int, *, seed: int, chunk: int = 64, passes: int = 1
    ) -> KMeansCodes:
        """Centroids of what the encoder makes of `items`, a chunk of items at a time.

        Raises:
            CodesError: fewer frames than centroids.
        """
        longest = 0

        class Chunks:
            def __iter__(self) -> Any:
                nonlocal longest
                for start in range(0, len(items), chunk):
                    frames = features(items[start : start + chunk])
                    longest = max(longest, *map(len, frames))
                    yield torch.cat(frames)

        centroids = fit_centroids(Chunks(), size, seed=seed, passes=passes)
        return cls(features, centroids, longest)

    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        frames = self.features(items)
        if not frames:
            return []
        every = torch.cat(frames)
        if not bool(every.isfinite().all()):
            raise CodesError(
                "frames that are NaN or infinite have no nearest centroid",
                where="k-means codes",
                remedy="look at the items, and load the encoder in float32 (float16 overflows)",
            )
        codes = nearest(every, self.get_buffer("centroids"))
        found = list(codes.split([len(each) for each in frames]))
        too_long = next((len(each) for each in found if len(each) > self.tokens_per_item), None)
        if too_long is not None:
            raise CodesError(
                f"an item of {too_long} frames, and the longest that was fitted had {self.tokens_per_item}",
                where="k-means codes",
                remedy="cut the sound, or fit on longer ones",
            )
        return found

    def codebook(self) -> Tensor:
        return self.get_buffer("centroids")

    @property
    def can_decode(self) -> bool:
        return self.painter is not None

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Any]:
        codes = self.check_codes(codes)
        if self.painter is None:
            raise CodesError(
                "centroids say nothing of pixels or samples",
                where="k-means codes",
                remedy="train a painter (alula.codes.training.train_painter), or generate with VQ codes",
            )
        return self.painter.pictures(self.codebook()[codes])

    def own_weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("features.")}

    def save_parts(self, directory: Path) -> None:
        self.features.save(directory / "encoder")

    def to_config(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "width": self.width,
            "tokens_per_item": self.tokens_per_item,
            "encoder": {"layer": self.features.layer, "kind": self.features.kind},
            "painter": None if self.painter is None else self.painter.to_config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], directory: Path) -> KMeansCodes:
        features = EncoderFeatures.load(directory / "encoder", config["encoder"])
        painter = None if config["painter"] is None else Painter(**config["painter"])
        return cls(features, torch.zeros(config["size"], config["width"]), config["tokens_per_item"], painter)
