"""What a discrete tokenizer is, and how one is kept: a directory of JSON and safetensors.

Shapes: N items, T codes of an item, d width of the codebook.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alula.errors import CodesError
from alula.files import atomic_directory, check_replaceable, read_json, recovered, regular, write_json

CONFIG_FILE, WEIGHTS_FILE = "codes_config.json", "codes_model.safetensors"
_PARTS = ("encoder", "model")
"""folders that `Codes.save_parts` writes"""
Kind = Literal["image", "audio"]
_KINDS: dict[str, type[CodeTokenizer]] = {}


class CodeTokenizer(nn.Module, abc.ABC):
    """Items of one kind to codes and back. Nothing of it is trained beside a language model.

    Attributes:
        kind: "image" (PIL images) or "audio" (mono waveforms, float (samples,), of `sampling_rate`).
        size: how many different codes there are; they are 0 to size - 1.
        tokens_per_item: codes of an item; of a sound that is shorter than the tokenizer's window, at most so many.
        sampling_rate: samples per second of sounds; None of images.
        samples: of a sound that has `tokens_per_item` codes, where that is known.
    """

    type_name: ClassVar[str]
    """what configs call it"""

    kind: Kind
    size: int
    tokens_per_item: int
    sampling_rate: int | None = None
    samples: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "type_name" in vars(cls):
            _KINDS[cls.type_name] = cls

    @abc.abstractmethod
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        """(T,) int64 of each item, without gradients.

        Raises:
            CodesError: an item that it cannot take.
        """

    @abc.abstractmethod
    def codebook(self) -> Tensor:
        """(size, d) float32: what each code stands for."""

    @abc.abstractmethod
    def decode(self, codes: Tensor) -> list[Any]:
        """Items of their codes, (N, tokens_per_item): PIL images, or float32 waveforms.

        Raises:
            CodesError: codes that are none of its own, or it has no way back from codes to items.
        """

    @property
    def width(self) -> int:
        """d."""
        return int(self.codebook().shape[1])

    @property
    def can_decode(self) -> bool:
        """Whether `decode` has a way back."""
        return True

    @abc.abstractmethod
    def to_config(self) -> dict[str, Any]:
        """What it takes to build it again beside its weights (JSON values)."""

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: dict[str, Any], directory: Path) -> CodeTokenizer:
        """Inverse of `to_config`, without weights; `directory` holds what `save_parts` wrote."""

    def save_parts(self, directory: Path) -> None:
        """Write what is beside config and weights, such as an encoder's own directory."""

    def own_weights(self) -> dict[str, Tensor]:
        """The tensors that go into its weights file."""
        return dict(self.state_dict())

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write it as a directory, complete or not at all; codes that are there are replaced.

        Raises:
            UsageError: the directory holds something else.
        """
        path = Path(directory)
        check_replaceable(path, what="codes", files=[CONFIG_FILE], folders=_PARTS)
        with atomic_directory(path) as partial:
            self.write(partial)
        return path

    def write(self, directory: Path) -> None:
        """Write its files into a directory that is there."""
        weights = {name: value.detach().contiguous().cpu() for name, value in self.own_weights().items()}
        save_file(weights, directory / WEIGHTS_FILE, {"format": "pt"})
        facts = {"codes_type": self.type_name, "fingerprint": self.fingerprint(), "config": self.to_config()}
        write_json(directory / CONFIG_FILE, facts)
        self.save_parts(directory)

    def fingerprint(self) -> str:
        """A hash of its settings and of all its weights, an encoder's and a decoder's among them.

        Under the same fingerprint the same items have the same codes, and the same codes mean the same.
        """
        found = hashlib.sha256(json.dumps([self.type_name, self.to_config()], sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            weights = value.detach().cpu()
            weights = weights.to(torch.float32) if weights.is_floating_point() else weights
            found.update(f"{name} {tuple(weights.shape)}".encode())
            found.update(weights.contiguous().numpy())
        return found.hexdigest()[:16]

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes, (N, tokens_per_item) int64.

        Raises:
            CodesError: another shape, or codes that are none of its own.
        """
        if codes.dim() != 2 or codes.shape[1] != self.tokens_per_item:
            raise CodesError(
                f"codes of the shape {tuple(codes.shape)}, where an item has {self.tokens_per_item}",
                where=f"{self.type_name} codes",
                remedy="give (items, tokens_per_item)",
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.size):
            raise CodesError(
                f"codes reach from {int(codes.min())} to {int(codes.max())}, and there are 0 to {self.size - 1}",
                where=f"{self.type_name} codes",
                remedy="take them off the joint vocabulary first (JointVocabulary.found)",
            )
        return codes.to(device=self.codebook().device, dtype=torch.int64)


def load_codes(directory: str | os.PathLike[str]) -> CodeTokenizer:
    """The tokenizer that `CodeTokenizer.save` wrote, in eval mode, strictly.

    Raises:
        CodesError: none there, one of an unknown type, a damaged one, or weights that are missing or not used.
    """
    path = recovered(directory)
    if not (path / CONFIG_FILE).is_file():
        raise CodesError(
            f"no {CONFIG_FILE} there", where=str(path), remedy="name a directory of codes (alula codes fit writes one)"
        )
    facts = read_json(path / CONFIG_FILE)
    facts = facts if isinstance(facts, dict) else {}
    kind, config = _KINDS.get(str(facts.get("codes_type"))), facts.get("config")
    if kind is None or not isinstance(config, dict):
        raise CodesError(
            f"not codes of a known type ({facts.get('codes_type')!r})",
            where=str(path / CONFIG_FILE),
            remedy=f"codes_type must be one of: {', '.join(sorted(_KINDS))}",
        )
    try:
        weights = load_file(regular(path / WEIGHTS_FILE))
    except (SafetensorError, FileNotFoundError) as error:
        raise CodesError(
            f"damaged or missing weights: {error}", where=str(path / WEIGHTS_FILE), remedy="copy the whole directory"
        ) from None
    try:
        made = kind.from_config(config, path)
        own = made.own_weights()
    except (KeyError, TypeError, ValueError) as error:
        raise CodesError(f"a setting is missing or wrong: {error}", where=str(path / CONFIG_FILE)) from None
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        raise CodesError(
            f"weights do not fit its config, the first {wrong[0]}", where=str(path), remedy="copy the whole directory"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])
    if facts.get("fingerprint") != made.fingerprint():
        raise CodesError(
            "it is not what was saved there", where=str(path), remedy="copy the whole directory, or save it again"
        )
    return made.eval().requires_grad_(False)
