"""Settings of TEAL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from alula.codes import CodeTokenizer
from alula.grafts.base import GraftConfig, Layers
from alula.settings import Bool, Int, Settings


class CodesSpec(Settings):
    """One kind of codes.

    Attributes:
        size: how many codes.
        tokens: codes of an item.
        width: of its codebook, and so of its embeddings.
        streams: codebooks that take turns within an item, each with as many of the codes.
    """

    size: Int = Field(ge=1, le=2**24)
    tokens: Int = Field(ge=1, le=2**20)
    width: Int = Field(ge=1, le=2**16)
    streams: Int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _shared(self) -> CodesSpec:
        if self.size % self.streams:
            raise ValueError(f"size: {self.size} codes are not as many of each of {self.streams} codebooks (streams)")
        return self


def _named(codes: dict[str, CodesSpec]) -> dict[str, CodesSpec]:
    if not codes:
        raise ValueError("it is empty; name at least one kind of codes")
    wrong = next((name for name in codes if not name.isidentifier()), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is no name: take letters, digits and underscores")
    return codes


class TealConfig(GraftConfig):
    """Which codes there are, and what of the decoder is opened for them.

    Attributes:
        codes: by the name of their range, in the order of their ids.
        tied: codes are told by the matrix they are embedded with.
        bias_norm: scale and bias behind every linear of the layers, and gains behind the norms in front of attention
            and MLP: ``s * (Wx + b)``, the LLaMA-Adapter V2 kind. They start as nothing.
        reach: where these work. "codes": from the first code of a sample on, so that text before it, and all of a
            sample without codes, is the host's own, bit for bit. "all": everywhere, as published.
        layers: decoder layers that have them, negative ones counted from the last; None: all.
    """

    graft_type: ClassVar[str] = "teal"

    codes: Annotated[dict[str, CodesSpec], AfterValidator(_named)]
    tied: Bool = False
    bias_norm: Bool = True
    reach: Literal["codes", "all"] = "codes"
    layers: Layers = None

    @classmethod
    def of(cls, codes: Mapping[str, CodeTokenizer], **settings: Any) -> TealConfig:
        """For tokenizers, by the name of their range, in order."""
        specs = {
            name: CodesSpec(
                size=each.size, tokens=each.tokens_per_item, width=each.width, streams=getattr(each, "codebooks", 1)
            )
            for name, each in codes.items()
        }
        return cls(codes=specs, **settings)
