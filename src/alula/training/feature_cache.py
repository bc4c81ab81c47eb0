"""Frozen towers: run without autograd, outside of any sharding, and at most once per image (frame, sound).

`frozen_tower(model, cache)` and `frozen_audio_tower(model, cache)` put a `FrozenTower` in the place of the image tower
or the audio tower for the time of a stage and the very same module back afterwards. The stand-in keeps the real tower
out of the module registry, so it has no parameters, is never sharded or saved, and stays in eval mode.

With a cache it looks every image up by the content of its pixels *after* preprocessing. That key already tells two
processor settings apart, needs nothing from the data pipeline, and cannot go stale; a directory on disk is additionally
keyed by the tower's weights. A file on disk says what it holds, for which image and tower, and a hash of the content:
one that is not what was written is computed again, with one warning.

On a cache miss an image goes through the tower alone. Matrix kernels round differently for different batch sizes, so
features computed in the company of whatever else missed at that moment would make a resumed run (cold cache) differ
from the uninterrupted one. Computed alone, they are the same bits whenever they are computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from alula.anatomy import HostParts
from alula.errors import HostError
from alula.files import atomic_file, regular
from alula.fingerprints import fingerprint_tensor
from alula.hosts.custom import CustomTower
from alula.hosts.multimodal import AlulaConfig
from alula.seam import NAME, PACKED, ForwardContext

logger = logging.getLogger(__name__)

Features = dict[str, Tensor]
# keywords that do not change the features: they say what to hand back, or describe the text that hosts pass on with it
_HARMLESS = {
    "return_dict", "output_hidden_states", "output_attentions", "use_cache", "mm_token_type_ids", "token_type_ids",
    "num_items_in_batch", "logits_to_keep", NAME, PACKED,
}  # fmt: skip


class FeatureStore:
    """Tower features of single images by key: bounded memory (least recently used goes first), optional disk.

    Args:
        memory_bytes: bound on the tensors kept in memory; one item above it is computed but not kept.
        directory: where every feature is also written, one file per image; unbounded, safe to share and to delete. Its
            name is part of what a file says of itself: the tower's `tower_fingerprint`.
    """

    def __init__(self, memory_bytes: int, directory: Path | None = None) -> None:
        self.memory_bytes, self.directory = memory_bytes, directory
        self.held_bytes = 0
        self.hits = self.misses = 0
        self._items: OrderedDict[str, Features] = OrderedDict()
        self._warned = False

    def get(self, key: str) -> Features | None:
        """The features under ``key`` (CPU tensors, not to be written to), or None."""
        found = self._items.get(key)
        if found is not None:
            self._items.move_to_end(key)
        elif self.directory is not None:
            found = self._read(key)
            if found is not None:
                self._hold(key, found)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, features: Features) -> None:
        """Keep ``features`` under ``key``, dropping the least recently used ones when memory is full."""
        self._hold(key, features)
        if self.directory is not None:
            with atomic_file(self._place(key)) as partial:
                save_file(features, partial, metadata=self._label(key, features))

    def _hold(self, key: str, features: Features) -> None:
        size = _bytes(features)
        if size > self.memory_bytes or key in self._items:
            return
        self._items[key] = features
        self.held_bytes += size
        while self.held_bytes > self.memory_bytes:
            _, dropped = self._items.popitem(last=False)
            self.held_bytes -= _bytes(dropped)

    def _place(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / key[:2] / f"{key}.safetensors"

    def _label(self, key: str, features: Features) -> dict[str, str]:
        """What a file says of itself: whose features it holds, and what they are."""
        assert self.directory is not None
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(features.items()):
            digest.update(f"{name}:{fingerprint_tensor(tensor)}".encode())
        return {"features": f"{self.directory.name}/{key}", "content": digest.hexdigest()}

    def _read(self, key: str) -> Features | None:
        """The features in a file; None where there is none, or where it is not what was written: computed again."""
        file = regular(self._place(key))
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                label = opened.metadata()
        except (OSError, SafetensorError):
            found, label = {}, None
        if label == self._label(key, found):
            return found
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is not what was written for its image and tower; it and others like it are computed again",
                file,
            )
        return None


class FrozenTower(nn.Module):
    """Stands in for a frozen tower; see the module's text.

    Args:
        tower: the real tower.
        layers: indices into its hidden states that the host reads; empty when it reads the last hidden state.
        store: the cache, or None to run the tower on every batch.
    """

    def __init__(self, tower: nn.Module, layers: Sequence[int], store: FeatureStore | None) -> None:
        super().__init__()
        self._outside = (tower,)  # a tuple hides it from the module registry
        self.layers, self.store = tuple(layers), store

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Pictures (N, C, H, W) or spectrograms (N, T, bins) -> the tower's output; with a cache, only what the host
        reads of it."""
        tower = self._outside[0]
        device = next(tower.parameters()).device
        if device != pixel_values.device:
            tower.to(pixel_values.device)
        with torch.no_grad():
            if self.store is None:
                return tower(pixel_values, **kwargs)
            own = self._own(pixel_values, kwargs)
            kind = pixel_values.device.type
            precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            changing = {name: value for name, value in own.items() if name not in _HARMLESS}
            context = repr((sorted(changing.items()), self.layers, precision))
            items = [self._features(image, own, context) for image in pixel_values]
            return self._assemble(items, pixel_values.device)

    def _own(self, pixel_values: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords that go with each image to the tower: those that are about images.

        Raises:
            HostError: the features may depend on more than an image and plain settings, so that they cannot be cached.
        """
        taken = inspect.signature(type(self._outside[0]).forward).parameters
        text = {name for name in _HARMLESS if isinstance(kwargs.get(name), Tensor | ForwardContext | Mapping)}
        own = {name: value for name, value in kwargs.items() if value is not None and name not in text - taken.keys()}
        unsupported = [name for name, value in own.items() if not _is_plain(value)]
        if pixel_values.ndim not in (3, 4):
            unsupported = [f"pixel values of {pixel_values.ndim} dimensions"]
        if unsupported:
            raise HostError(
                f"the host gives its tower {unsupported[0]}, on which features may depend beside the single image",
                where="feature_cache",
                remedy="leave feature_cache out for this host",
            )
        return own

    def _features(self, image: Tensor, kwargs: dict[str, Any], context: str) -> Features:
        """The features of one image (C, H, W) or sound (T, bins); ``context`` names keywords that may change them."""
        assert self.store is not None
        key = fingerprint_tensor(image, context)
        features = self.store.get(key)
        if features is None:
            output = self._outside[0](image[None], **kwargs)
            if self.layers:
                kept = {f"layer.{index}": output.hidden_states[index] for index in self.layers}
            else:
                kept = {"last": output.last_hidden_state}
            features = {name: tensor[0].cpu().contiguous() for name, tensor in kept.items()}
            self.store.put(key, features)
        return features

    def _assemble(self, items: list[Features], device: torch.device) -> BaseModelOutputWithPooling:
        def batch(name: str) -> Tensor:
            return torch.stack([item[name] for item in items]).to(device)

        if not self.layers:
            return BaseModelOutputWithPooling(last_hidden_state=batch("last"))
        depth = 1 + max(max(index, -index - 1) for index in self.layers)
        hidden: list[Tensor | None] = [None] * depth
        # read from the end and from the start: with only the wanted layers filled, both must find theirs
        if any(index >= 0 for index in self.layers) and any(index < 0 for index in self.layers):
            raise HostError("feature layers counted from both ends cannot be cached", where="vision_feature_layer")
        for index in self.layers:
            hidden[index] = batch(f"layer.{index}")
        return BaseModelOutputWithPooling(hidden_states=tuple(hidden))  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenTower:
        self._outside[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # hosts ask their tower for its dtype, config, patch size
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_outside":
                raise
            return getattr(self._outside[0], name)


@contextlib.contextmanager
def frozen_audio_tower(model: nn.Module, store: FeatureStore | None = None) -> Iterator[FrozenTower | None]:
    """As `frozen_tower`, of the audio tower of alula's own hosts.

    Yields None, changing nothing, for a model without one: stock classes (Qwen2-Audio, Gemma-3n) pass theirs other
    inputs, such as masks, which a stand-in does not know.
    """
    anatomy = HostParts.of(model)
    tower, config = anatomy.audio_tower, anatomy.host.config
    if tower is None or not isinstance(config, AlulaConfig):
        yield None
        return
    with _in_place_of(anatomy.backbone, tower, (config.audio_feature_layer,), store) as stand_in:
        yield stand_in


@contextlib.contextmanager
def frozen_tower(model: nn.Module, store: FeatureStore | None = None) -> Iterator[FrozenTower | None]:
    """Within the block ``model``'s tower is a `FrozenTower`; afterwards the same module is back, in its old mode.

    Yields None, changing nothing, for a model without a tower of its own.

    Raises:
        HostError: ``store`` is given but the model's tower cannot be cached (its output is not per image).
    """
    anatomy = HostParts.of(model)
    tower = anatomy.tower
    if tower is None or all(child is not tower for child in anatomy.backbone.children()):
        yield None
        return
    if store is not None and anatomy.projector is None:
        raise HostError(
            f"{type(anatomy.host).__name__} keeps its projector inside the tower, whose output is not per image",
            where="feature_cache",
            remedy="leave feature_cache out for this host",
        )
    with _in_place_of(anatomy.backbone, tower, _layers_read(anatomy.host.config), store) as stand_in:
        yield stand_in


@contextlib.contextmanager
def _in_place_of(
    backbone: nn.Module, tower: nn.Module, layers: Sequence[int], store: FeatureStore | None
) -> Iterator[FrozenTower]:
    name = next(name for name, child in backbone.named_children() if child is tower)
    training = tower.training
    stand_in = FrozenTower(tower.eval(), layers, store)
    setattr(backbone, name, stand_in)
    try:
        yield stand_in
    finally:
        setattr(backbone, name, tower.train(training))


def tower_fingerprint(tower: nn.Module) -> str:
    """Hash of a tower's class, weights and dtypes: the directory its features are kept under on disk."""
    kind = type(tower).__name__
    if isinstance(tower, CustomTower):  # modules of equal weights may do different things with them
        kind += repr((tower.config.source, sorted(tower.config.arguments.items())))
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name}:{fingerprint_tensor(tensor)}".encode())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether a keyword's value is fully said by its text."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | torch.dtype)


def _layers_read(config: Any) -> tuple[int, ...]:
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        return ()
    return (layers,) if isinstance(layers, int) else tuple(layers)


def _bytes(features: Features) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in features.values())
