"""What is pruned, by which scores, and how much of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from alula.errors import UsageError
from alula.probes import token_sets
from alula.settings import Bool, Int, Number, Settings

Method = Literal["wanda", "magnitude", "sparsegpt"]
_MULTIPLE = 8
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
"""how many are kept of how many weights one behind the other in a row"""


class WeightPruning(Settings):
    """Which weights of a decoder's matrices become zero.

    What is pruned so is not faster: the matrices keep their sizes, and zeros are multiplied like other numbers. A
    pattern of 2:4 is fast where a GPU and a library make use of it; alula does not. `encode` makes it smaller on disk.

    Attributes:
        method: "wanda", |W_ij| times the norm of input channel j over the calibration tokens (Sun et al. 2023, arXiv
            2306.11695, as IMA uses it, 2405.16700); "magnitude", |W_ij|, which needs no data; "sparsegpt", the
            second-order rival, which updates the weights that stay (Frantar & Alistarh 2023, arXiv 2301.00774).
        sparsity: share that is pruned of each group of weights that are compared; rounded down to whole weights. None
            where `pattern` says it, or a mask to be matched.
        pattern: "2:4" or "4:8": of so many weights one behind the other in a row, half stay.
        per: which weights are compared: those of one "output" (a row of the matrix; the default of Wanda) or of the
            whole "matrix" (the default of magnitude). SparseGPT compares blocks of columns, and patterns their groups.
        targets: "attention" and "mlp", all linear modules there, or names of some, such as "down_proj".
        layers: decoder layers, negative ones counted from the last; None: all.
        tokens: whose inputs count, a name of `alula.probes.token_sets` such as "all", "image" or "text". Padding never
            does.
        skip_first: leave out each sample's first token, whose massive activations rule the norms of some channels.
        damping: of SparseGPT: this share of the mean of the Hessian's diagonal is added to it.
        block: of SparseGPT: columns that are pruned together.
    """

    method: Method = "wanda"
    sparsity: Number | None = Field(default=None, gt=0, lt=1)
    pattern: Literal["2:4", "4:8"] | None = None
    per: Literal["output", "matrix"] | None = None
    targets: tuple[str, ...] = Field(default=("attention", "mlp"), min_length=1)
    layers: tuple[Int, ...] | None = None
    tokens: str = "all"
    skip_first: Bool = False
    damping: Number | None = Field(default=None, gt=0)
    block: Int | None = Field(default=None, ge=1)

    @field_validator("tokens")
    @classmethod
    def _known(cls, tokens: str) -> str:
        return _known_tokens(tokens)

    @model_validator(mode="after")
    def _all_have_effect(self) -> WeightPruning:
        if self.pattern is not None and self.sparsity is not None:
            raise ValueError("pattern and sparsity both say how much is pruned; give one")
        if self.per is not None and (self.pattern is not None or self.method == "sparsegpt"):
            raise ValueError("per has no effect: patterns compare their groups, SparseGPT blocks of columns")
        if self.method != "sparsegpt" and (self.damping is not None or self.block is not None):
            raise ValueError("damping and block are settings of SparseGPT alone")
        if self.method == "magnitude" and (self.tokens != "all" or self.skip_first):
            raise ValueError("magnitude looks at no tokens")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether it goes by what the matrices are given."""
        return self.method != "magnitude"

    @property
    def by_matrix(self) -> bool:
        """Whether the weights of a whole matrix are compared."""
        return self.per == "matrix" or (self.per is None and self.method == "magnitude")


class Removal(Settings):
    """Which parts of a decoder are taken out. The same count in every layer, so that a config can say it.

    What pays on the clock, in memory and on disk alike, with any loader: matrices become smaller. It costs more skill
    than zeros of the same number do.

    Attributes:
        mlp: share of the channels of every MLP; rounded down so that those left are a multiple of `multiple_of`.
        heads: share of the attention heads of every layer; rounded down. Where several query heads share a key head
            (GQA) they leave together with it.
        blocks: how many whole decoder layers.
        method: by what parts are chosen: "wanda", or "magnitude" without data. The score of a channel or head is the
            sum of the scores of the weights that read it (the column of the matrix behind it, as Wanda-sp of arXiv
            2312.11983); that of a block the sum over the matrices that write to the stream, over the stream's norm
            there.
        tokens, skip_first: whose inputs count (see `WeightPruning`).
        multiple_of: what MLP widths are a multiple of; GPUs like 8 or 64 in half precision.
    """

    mlp: Number = Field(default=0.0, ge=0, lt=1)
    heads: Number = Field(default=0.0, ge=0, lt=1)
    blocks: Int = Field(default=0, ge=0)
    method: Literal["wanda", "magnitude"] = "wanda"
    tokens: str = "all"
    skip_first: Bool = False
    multiple_of: Int = Field(default=_MULTIPLE, ge=1)

    @field_validator("tokens")
    @classmethod
    def _known(cls, tokens: str) -> str:
        return _known_tokens(tokens)

    @model_validator(mode="after")
    def _all_have_effect(self) -> Removal:
        if not (self.mlp or self.heads or self.blocks):
            raise ValueError("nothing is to be removed; give mlp, heads or blocks")
        if not self.mlp and self.multiple_of != _MULTIPLE:
            raise ValueError("multiple_of is of MLP channels, and mlp removes none")
        if self.method == "magnitude" and (self.tokens != "all" or self.skip_first):
            raise ValueError("magnitude looks at no tokens")
        return self


def _known_tokens(tokens: str) -> str:
    try:
        token_sets.check(tokens, "tokens")
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.remedy}") from None
    return tokens
