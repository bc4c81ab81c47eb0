"""The checkpoint layout of the released Wings weights: one bag of tensors for decoder, learners, projector and tower.

A directory of safetensors shards with an index (or one file), no config and no tokenizer. Names, for decoder layer i:

    model.layers.i.attn_pool.{q,k,v,o}_proj.{0,1}.weight      visual learner, factors down (r, d) and up (d, r)
    model.layers.i.attn_t_pool.{q,k,v,o}_proj.{0,1}.weight    textual learner
    model.layers.i.reweight_module.linear.{weight,bias}       router, (2, key positions) and (2); absent after stage 1
    model.mm_projector.{0,2}.{weight,bias}                    projector
    model.vision_tower.vision_tower.vision_model.*            SigLIP without its last block and pooling head
    everything else                                           the decoder, under its own transformers names
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import AdapterError
from alula.files import regular_files
from alula.grafts.base import Graft, check_keys, check_values
from alula.grafts.wings.config import LEARNERS, WingsConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TRAINED_TOKENS = 2048
"""The release was trained on inputs of at most this many tokens; the router's columns beyond are random."""

_LEARNER = re.compile(r"model\.layers\.(\d+)\.(attn_pool|attn_t_pool)\.([qkvo])_proj\.([01])\.weight")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.reweight_module\.linear\.(weight|bias)")
_TOWER, _PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
_FACTORS = ("down", "up")
_POOLS = {"visual": "attn_pool", "textual": "attn_t_pool"}


@dataclass(frozen=True)
class Release:
    """A released checkpoint on disk.

    Attributes:
        directory: where it lies.
        files: the shard that holds each tensor.
        shapes: of each tensor.
    """

    directory: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Release:
        """Read names and shapes, not the tensors.

        Raises:
            AdapterError: no checkpoint there, an index that does not fit its shards, a damaged shard.
        """
        path = Path(directory)
        listed = _listed(path)
        regular_files(path)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in sorted(set(listed.values()) if listed else {path / SINGLE}):
            for name, shape in _shapes(shard):
                if listed and listed.get(name) != shard:
                    raise AdapterError(f"{name} is not where {INDEX} says", where=str(shard), remedy=_AGAIN)
                files[name], shapes[name] = shard, shape
        lost = sorted(set(listed) - set(files))
        if lost:
            raise AdapterError(
                f"{len(lost)} tensors of {INDEX} are in no shard, the first {lost[0]!r}", where=str(path), remedy=_AGAIN
            )
        release = cls(path, files, shapes)
        if not any(_LEARNER.fullmatch(name) for name in files):
            raise AdapterError(
                "no Wings learners (model.layers.*.attn_pool.*) in this checkpoint",
                where=str(path),
                remedy="give the directory of the released Wings weights",
            )
        return release

    # -- what its names say ---------------------------------------------------------------------------------------

    @property
    def learners(self) -> tuple[str, ...]:
        """Both after stage 2; after stage 1 (no router) the textual ones are there and were never run."""
        return LEARNERS if any(_ROUTER.fullmatch(name) for name in self.files) else ("visual",)

    def config(self, *, system_tokens: int) -> WingsConfig:
        """The settings that reproduce this checkpoint's arithmetic.

        Args:
            system_tokens: tokens of system prompt and user header that were no textual keys (14 for Qwen1.5).
        """
        layers = sorted({int(match[1]) for name in self.files if (match := _LEARNER.fullmatch(name))})
        rank = self.shapes[f"model.layers.{layers[0]}.attn_pool.q_proj.0.weight"][0]
        widths = {self.shapes[name][1] for name in self.files if _ROUTER.fullmatch(name) and name.endswith("weight")}
        return WingsConfig(
            compat="published",
            rank=rank,
            learners=self.learners,
            layers=tuple(layers),
            router_tokens=min(TRAINED_TOKENS, *widths) if widths else TRAINED_TOKENS,
            system_tokens=system_tokens if self.learners == LEARNERS else 0,
        )

    # -- loading --------------------------------------------------------------------------------------------------

    def match(self, anatomy: Anatomy, graft: Graft, *, vocabulary: int) -> dict[str, Tensor]:
        """For every released name the tensor it fills, in a LLaVA host and the graft attached to it.

        The tower's last block and pooling head, which the release does not have and does not use, are left alone.

        Args:
            anatomy: of the host.
            graft: made with `config`.
            vocabulary: tokens of the LLM's embeddings; the host's may have more, for the placeholder.

        Raises:
            AdapterError: any tensor missing, unused or of another shape.
        """
        targets = self._targets(anatomy, graft, vocabulary)
        columns = graft.config.router_tokens
        held = {
            name: torch.empty(shape, device="meta")[..., : self._columns(name, columns)]
            for name, shape in self.shapes.items()
        }
        check_keys(targets, held, where=str(self.directory))
        return targets

    @torch.no_grad()
    def load(self, anatomy: Anatomy, graft: Graft, *, vocabulary: int) -> None:
        """Copy every tensor into its place; see `match`. Nothing is changed unless all names and shapes fit."""
        targets = self.match(anatomy, graft, vocabulary=vocabulary)
        columns = graft.config.router_tokens
        for shard in sorted(set(self.files.values())):
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  a safetensors handle is no mapping
                    given = tensors.get_tensor(name)[..., : self._columns(name, columns)]
                    check_values(targets, {name: given}, where=str(shard))
                    targets[name].copy_(given)

    @staticmethod
    def _columns(name: str, router_tokens: int) -> int | None:
        """How many of a tensor's columns count: a router's trained ones, all of any other."""
        return router_tokens if _ROUTER.fullmatch(name) and name.endswith("weight") else None

    def _targets(self, anatomy: Anatomy, graft: Graft, vocabulary: int) -> dict[str, Tensor]:
        """Released name -> the host's or graft's tensor it fills."""
        host: Any = anatomy.host
        found = {f"model.{key}": value for key, value in _own(anatomy.decoder).items()}
        if not host.config.text_config.tie_word_embeddings:
            found["lm_head.weight"] = anatomy.head.weight  # type: ignore[union-attr,assignment]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in found:
                found[name] = found[name][:vocabulary]  # tokens added for the placeholder are not the release's
        blocks = host.config.vision_config.num_hidden_layers
        for key, value in _own(anatomy.tower).items():
            key = key.removeprefix("vision_model.")
            if not key.startswith((f"encoder.layers.{blocks - 1}.", "head.")):
                found[f"{_TOWER}vision_model.{key}"] = value
        for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
            for part in ("weight", "bias"):
                found[f"{_PROJECTOR}{theirs}.{part}"] = getattr(getattr(anatomy.projector, ours), part)
        for key, value in graft.state_dict().items():
            name = _released_name(key)
            found[name] = value
            twin = name.replace(".attn_pool.", ".attn_t_pool.")
            if self.learners == ("visual",) and twin in self.shapes:
                # stage 1 carries textual learners it never ran: they must fit, and go nowhere
                found[twin] = torch.empty_like(value)
        return found


_AGAIN = "download the checkpoint again, complete"


def _released_name(key: str) -> str:
    """The released name of a graft's weight such as "layers.3.visual.q.down"."""
    _, layer, part, *rest = key.split(".")
    if part == "router":
        return f"model.layers.{layer}.reweight_module.linear.{rest[0]}"
    return f"model.layers.{layer}.{_POOLS[part]}.{rest[0]}_proj.{_FACTORS.index(rest[1])}.weight"


def _own(module: Any) -> dict[str, Tensor]:
    """A host module's weights without those of grafts inside it."""
    return {key: value for key, value in module.state_dict().items() if ".alula." not in key}


def _listed(path: Path) -> dict[str, Path]:
    """Tensor name -> shard as the index says; empty without an index."""
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise AdapterError(
                f"neither {INDEX} nor {SINGLE} there", where=str(path), remedy="give the directory of the checkpoint"
            )
        return {}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): path / str(shard) for name, shard in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"not a safetensors index: {error!r}", where=str(index), remedy=_AGAIN) from None
    absent = sorted({shard.name for shard in listed.values() if not shard.is_file()})
    if absent:
        raise AdapterError(f"the shard {absent[0]} is missing", where=str(path), remedy=_AGAIN)
    return listed


def _shapes(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise AdapterError(f"damaged weights: {error}", where=str(shard), remedy=_AGAIN) from None
