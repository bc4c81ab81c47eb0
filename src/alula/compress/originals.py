"""What weights were before they were changed, kept on disk: memory holds one model, not two."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alula.files import telling


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
        with telling(path):
            save_file({"weight": weight.detach().cpu().contiguous()}, path)
        self._kept.append(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all weights back what they were."""
        for index, weight in reversed([*enumerate(self._kept)]):  # what was kept first was there first
            weight.copy_(load_file(self._path(index))["weight"])

    def _path(self, index: int) -> Path:
        return Path(self._directory.name) / f"{index}.safetensors"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is not None:
                self.restore()
        finally:
            self._directory.cleanup()
