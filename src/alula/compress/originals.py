"""What weights were before they were changed, kept on disk: memory holds one model, not two."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from alula.errors import FilesError
from alula.files import telling

_PIECE = 1 << 18
"""weights that are copied at a time"""


class Originals:
    """Inside the block weights may be changed; if it ends with an error they are what they were, bit for bit.

    Raises:
        FilesError: no room for them in the directory for temporary files.
    """

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="alula-")
        self._kept: list[Tensor] = []
        return self

    def keep(self, weight: Tensor) -> None:
        """Note what a weight is now."""
        path = self._path(len(self._kept))
        with telling(path), path.open("wb") as stream:
            for piece in _pieces(weight):
                stream.write(piece.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        self._kept.append(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all weights back what they were."""
        for index, weight in reversed([*enumerate(self._kept)]):  # what was kept first was there first
            path = self._path(index)
            with telling(path), path.open("rb") as stream:
                for piece in _pieces(weight):
                    found = bytearray(stream.read(piece.nbytes))
                    if len(found) != piece.nbytes:
                        raise FilesError("weights that were put there are gone", where=str(path))
                    piece.copy_(torch.frombuffer(found, dtype=piece.dtype).view(piece.shape))

    def _path(self, index: int) -> Path:
        return Path(self._directory.name) / str(index)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.restore()
        finally:
            self._directory.cleanup()


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    """A weight in views of some rows each."""
    weight = weight.detach()
    rows = max(1, _PIECE * len(weight) // max(1, weight.numel()))
    return iter(weight.split(rows))
