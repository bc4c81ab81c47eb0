"""Settings of AIM."""

from __future__ import annotations

from typing import ClassVar

from alula.grafts.base import GraftConfig
from alula.settings import Bool, Int


class AimConfig(GraftConfig):
    """AIM (Gao et al., AAAI 2025, arXiv 2406.07588): each demonstration is read alone, and what its words then hold
    goes through a map into one fused token per word token.

    Attributes:
        layer: the decoder layer whose output over the words is mapped, negative ones counted from the last; the last
            one's counts behind the final norm. The paper says "hidden states over the text"; which layer's is a choice.
        norm: a layer norm behind the linear, whose gain starts at the root mean square of token embeddings: states are
            many times longer. Whether the paper has one is unknown.
    """

    graft_type: ClassVar[str] = "aim"

    layer: Int = -1
    norm: Bool = True
