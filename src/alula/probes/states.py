"""Probes of hidden states: which points of the decoder they tap, and how the taps reach them."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from alula.errors import SeamError, UsageError
from alula.media import MEDIA
from alula.probes import token_sets
from alula.probes.base import Probe
from alula.seam import ForwardContext, LayerView, Seam, TapEvent, taps
from alula.tokens import Modality

Site = Literal["stream", "attention_norm", "attention", "mlp_norm", "mlp"]
"""Where states are read. "stream": the residual stream, L + 1 states: the input of every block and the (un-normed)
output of the last. The others have one state per block: the output of a norm, or what attention (grafts included)
and the MLP add to the stream."""

TEXT = "text"
GROUPS = (TEXT, *MEDIA)  # of the media known when the probes are imported: saved probes count by place in it


@dataclass(eq=False, kw_only=True)
class StateProbe(Probe):
    """A probe of hidden states.

    Attributes:
        sites: what to tap, names of `Site`.
    """

    sites: tuple[str, ...] = ("stream",)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [site for site in self.sites if site not in get_args(Site)]
        if unknown or not self.sites:
            raise UsageError(
                f"sites cannot be {self.sites!r}", remedy=f"name one or more of: {', '.join(get_args(Site))}"
            )

    def watch(self, seam: Seam, stack: ExitStack) -> None:
        host, last = seam.anatomy.host, seam.anatomy.num_layers
        inner = [site for site in self.sites if site != "stream"]
        if "stream" in self.sites:
            stack.enter_context(taps(host, ["block_input"], partial(self._tapped, "stream")))
            stack.enter_context(taps(host, ["block_output"], partial(self._tapped, "stream", index=last), layers=[-1]))
        for site in inner:
            stack.enter_context(taps(host, [cast(Any, site)], partial(self._tapped, site)))

    @torch.no_grad()
    def _tapped(self, site: str, event: TapEvent, index: int | None = None) -> None:
        notes = self.notes(event.forward)
        if notes is None:
            return
        view = event.forward.at(event.layer)
        self.read(view, notes, site, event.layer if index is None else index, view.spread(event.hidden.detach()))

    @abc.abstractmethod
    def read(self, view: LayerView, notes: dict[Any, Any], site: str, state: int, hidden: Tensor) -> None:
        """Note what is needed of one state.

        Args:
            hidden: (B, S, d) of all tokens of the forward, the host's own; 0 at those that `view` lacks.
        """


def room(device: torch.device) -> int:
    """Bytes that what is computed in one go may take. An accelerator is kept busy by few operators on much; a CPU by
    what its caches hold."""
    return 1 << 20 if device.type == "cpu" else 1 << 28


def groups(forward: ForwardContext, text: str, *, skip_first: bool) -> dict[str, Tensor]:
    """(B, S) bool tokens of the text group, of which there may be none, and of each perceptual kind in the batch.

    Args:
        text: the token set that stands for text.
        skip_first: leave out each sample's first token, the usual attention sink.
    """
    tokens = forward.tokens
    sets = {TEXT: token_sets.select(tokens, text)}
    found = {*np.unique(forward.known().modality).tolist()}
    sets |= {name: token_sets.select(tokens, name) for name in GROUPS[1:] if int(Modality.of(name)) in found}
    return {name: chosen & (tokens.position != 0) for name, chosen in sets.items()} if skip_first else sets


def refuse_lost(chosen: Mapping[str, Tensor], present: Tensor, layers: Sequence[int]) -> None:
    """Raise a SeamError where a sample has tokens of a set and none of them is left in a layer they are measured in.

    Args:
        chosen: (B, S) bool, by what they are.
        present: (n, B, S) bool, the tokens that are left.
        layers: the n decoder layers.
    """
    every = torch.stack([*chosen.values()]).to(present.device)  # (G, B, S)
    lost = (every.any(dim=-1) & ~(every & present[:, None]).any(dim=-1)).any(dim=-1)  # (n, G)
    for state, group in lost.nonzero().tolist():
        raise SeamError(
            f"a sample has no {list(chosen)[group]} left in decoder layer {layers[state]}, where they are measured",
            remedy="measure without the hook that takes tokens out",
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states of another are measured in: float32 or float64."""
    return torch.promote_types(dtype, torch.float32)


def unit(x: Tensor) -> Tensor:
    """Vectors (..., d) scaled to length 1; zero vectors stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
