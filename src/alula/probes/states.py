"""Probes of hidden states: which points of the decoder they tap, and how the taps reach them."""

from __future__ import annotations

import abc
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from alula.errors import SeamError, UsageError
from alula.media import MEDIA
from alula.probes import token_sets
from alula.probes.base import Probe
from alula.seam import LayerView, Seam, TapEvent, taps
from alula.tokens import Modality, TokenMap

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
        hidden = event.hidden.detach()
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        view = event.forward.at(event.layer)
        self.read(view, notes, site, event.layer if index is None else index, view.spread(hidden))

    @abc.abstractmethod
    def read(self, view: LayerView, notes: dict[Any, Any], site: str, state: int, hidden: Tensor) -> None:
        """Note what is needed of one state.

        Args:
            hidden: (B, S, d) in float32 or float64, of all tokens of the forward; 0 at those that `view` lacks.
        """


def groups(tokens: TokenMap, text: str, *, skip_first: bool) -> dict[str, Tensor]:
    """(B, S) bool tokens of the text group and of each perceptual kind, for the groups the batch has tokens of.

    Args:
        text: the token set that stands for text.
        skip_first: leave out each sample's first token, the usual attention sink.
    """
    sets = {TEXT: token_sets.select(tokens, text)}
    sets |= {name: tokens.modality == int(Modality.of(name)) for name in GROUPS[1:]}
    if skip_first:
        sets = {name: chosen & (tokens.position != 0) for name, chosen in sets.items()}
    return {name: chosen for name, chosen in sets.items() if bool(chosen.any())}


def standing(chosen: Tensor, view: LayerView, what: str) -> Tensor:
    """(B, S) bool: those of the chosen tokens that stand in a layer.

    Args:
        what: what they are, for the error.

    Raises:
        SeamError: a sample has such tokens and none of them is left.
    """
    if view.present is None:
        return chosen
    left = chosen & view.present.to(chosen.device)
    if bool((chosen.any(dim=1) & ~left.any(dim=1)).any()):
        raise SeamError(
            f"a sample has no {what} left in decoder layer {view.layer}, where they are measured",
            remedy="measure without the hook that takes tokens out",
        )
    return left


def unit(x: Tensor) -> Tensor:
    """Vectors (..., d) scaled to length 1; zero vectors stay zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
