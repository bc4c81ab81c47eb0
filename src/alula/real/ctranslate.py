"""Whisper out of a CTranslate2 file, as transformers' weights.

The file: version, name of the specification, its revision, number of tensors; of each its name, rank, sizes, type,
number of bytes and bytes; then aliases. All numbers are little-endian, names are closed by a zero byte that their
length counts.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alula.errors import HostError

_VERSION, _SPECIFICATION, _REVISION = 6, "WhisperSpec", 3
_TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_REMEDY = "take the version of the package that alula knows"


class _Reader:
    def __init__(self, content: bytes, where: str) -> None:
        self.content, self.where, self.at = content, where, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack("<" + kind, self.bytes(struct.calcsize(kind)))
        return int(value)

    def bytes(self, count: int) -> bytes:
        taken = self.content[self.at : self.at + count]
        if len(taken) < count:
            raise HostError(f"ends at byte {len(self.content)}, within a tensor", where=self.where, remedy=_REMEDY)
        self.at += count
        return taken

    def text(self) -> str:
        return self.bytes(self.number("H"))[:-1].decode()


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Name -> tensor, as the file has them.

    Raises:
        HostError: it is cut off, or of another version or specification.
    """
    reader = _Reader(file.read_bytes(), str(file))
    version = reader.number("I")
    if version != _VERSION:
        raise HostError(f"is of version {version} of its format, not {_VERSION}", where=str(file), remedy=_REMEDY)
    said = reader.text(), reader.number("I")
    if said != (_SPECIFICATION, _REVISION):
        raise HostError(f"holds a {said[0]}, revision {said[1]}, no Whisper", where=str(file), remedy=_REMEDY)
    found = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        sizes = [reader.number("I") for _ in range(reader.number("B"))]
        kind = _TYPES[reader.number("B")]
        found[name] = np.frombuffer(reader.bytes(reader.number("I")), kind).reshape(sizes)
    return found


def whisper_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a ``WhisperForConditionalGeneration``, float32; of queries, keys and values, which lie in one
    matrix, three are made, and keys' biases, which are zero, left out."""
    state: dict[str, Tensor] = {}
    for name, value in tensors(file).items():
        if value.ndim == 0 or "alignment" in name:
            continue
        tensor = torch.from_numpy(value.astype(np.float32))
        side, _, rest = name.partition("/")
        for key, part in _renamed(rest, tensor):
            state[f"model.{side}.{key}"] = part
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


_PLAIN = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
_NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
_ATTENTIONS = {"self_attention": "self_attn", "attention": "encoder_attn"}
# what of queries, keys and values each of the linears of an attention holds
_HELD = {
    ("self_attention", 0): ("q_proj", "k_proj", "v_proj"),
    ("self_attention", 1): ("out_proj",),
    ("attention", 0): ("q_proj",),
    ("attention", 1): ("k_proj", "v_proj"),
    ("attention", 2): ("out_proj",),
}


def _renamed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name in _PLAIN:
        return [(_PLAIN[name], tensor)]
    if name.startswith("conv"):
        return [(name.replace("/", "."), tensor)]
    match = re.fullmatch(r"layer_(\d+)/(self_attention|attention|ffn)/(layer_norm|linear_(\d))/(\w+)", name)
    if match is None:
        raise HostError(f"the tensor {name!r} has no place in a Whisper", remedy=_REMEDY)
    layer, block, what, number, kind = match.groups()
    before = f"layers.{layer}."
    if what == "layer_norm":
        return [(f"{before}{_NORMS[block]}.{'weight' if kind == 'gamma' else 'bias'}", tensor)]
    if block == "ffn":
        return [(f"{before}fc{int(number) + 1}.{kind}", tensor)]
    names = _HELD[block, int(number)]
    parts = list(zip(names, tensor.chunk(len(names)), strict=True))
    if kind == "bias" and any(each == "k_proj" and part.any() for each, part in parts):
        raise HostError(f"{name!r} gives keys a bias, which Whisper has none of", remedy=_REMEDY)
    return [
        (f"{before}{_ATTENTIONS[block]}.{each}.{kind}", part.contiguous())
        for each, part in parts
        if not (each == "k_proj" and kind == "bias")
    ]
