"""Settings of MKS2."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from alula.grafts.base import GraftConfig, Layers
from alula.settings import Int, Number

Mode = Literal["text", "store", "mix"]
Activation = Literal["gelu", "silu", "relu"]
# beyond these, a number is a slip
_MOST_WIDTH, _MOST_ALPHA, _MOST_SPREAD = 2**20, 2**16, 10


class MKS2Config(GraftConfig):
    """How large the memory is, what speaks, and how memory and MLP are mixed.

    Attributes:
        mode: what the feed-forward half of a layer is. "text": the host's MLP, bit for bit. "store": the memory (stage
            1). "mix": memory and MLP, each with its low-rank adapters, weighed per token (stage 2 and use). A graft has
            the weights of all three, so an adapter that was trained in one is loaded in another.
        store: in mode "store" the memory stands "instead" of the MLP, as the paper draws it, or "beside" it.
        memory_width: inner width of the memory; None: three eighths of the decoder's.
        activation: between the memory's two linears.
        route: "softmax": a router weighs memory and MLP for every token (the paper). "modality": tokens of images,
            videos and audio have the memory and text tokens the MLP, which then has no adapter, so that text is the
            host's own, bit for bit.
        router_start: "text": the MLP has a weight of 0.9997 at the start, so that the host answers nearly as before;
            "neutral": both have one half.
        lora: adapters of the memory and of the MLP: a low-rank pair on each of their "linears", or one "parallel" to
            each of the two as a whole (as the paper's figure has it).
        rank: of the adapters.
        alpha: the low-rank product is scaled by ``alpha / rank``.
        dropout: on what the adapters are given, in training.
        layers: decoder layers with a memory, negative ones counted from the last; None: all.
        retrieval: width of the space in which captions and images are compared; None: they are not, and there are no
            weights for it.
        init_std: standard deviation of the memory's first linear at the start; the second starts at zero.
    """

    graft_type: ClassVar[str] = "mks2"
    free: ClassVar[tuple[str, ...]] = ("mode", "store", "dropout")

    mode: Mode = "mix"
    store: Literal["instead", "beside"] = "instead"
    memory_width: Int | None = Field(default=None, ge=1, le=_MOST_WIDTH)
    activation: Activation = "gelu"
    route: Literal["softmax", "modality"] = "softmax"
    router_start: Literal["text", "neutral"] = "text"
    lora: Literal["linears", "parallel"] = "linears"
    rank: Int = Field(default=16, ge=1, le=2**16)
    alpha: Number = Field(default=32.0, gt=0, le=_MOST_ALPHA)
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    layers: Layers = None
    retrieval: Int | None = Field(default=None, ge=1, le=2**16)
    init_std: Number = Field(default=0.02, gt=0, le=_MOST_SPREAD)  # at zero no gradient would reach the memory

    @property
    def scale(self) -> float:
        """Factor on the low-rank products."""
        return self.alpha / self.rank

    def width(self, hidden_size: int) -> int:
        """Inner width of the memory in a decoder of that width."""
        return max(1, 3 * hidden_size // 8) if self.memory_width is None else self.memory_width

    @model_validator(mode="after")
    def _effective(self) -> MKS2Config:
        if self.route == "modality" and self.router_start != "text":
            raise ValueError('route="modality" has no router: leave router_start out')
        return self
