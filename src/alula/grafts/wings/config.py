"""Settings of the Wings graft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from alula.grafts.base import GraftConfig, Layers
from alula.settings import Bool, Int, Number

Router = Literal["attention", "mass", "constant"]
Gate = Literal["exact", "paper"]
Query = Literal["post_attention", "block_input"]
Kept = Literal["factors", "keys"]
LEARNERS = ("visual", "textual")
# beyond these, a number is a slip: decoders are some ten thousand wide, and float32 ends at 3e38
_MOST_RANK, _MOST_TOKENS, _MOST_GAIN, _MOST_SPREAD = 2**16, 2**20, 10_000, 10

_PUBLISHED = {
    "router": "attention",
    "gate": "paper",
    "query": "post_attention",
    "normalize": False,
    "rope": True,
    "system_keys": True,
    "gain": 1.0,
    "cache": "factors",
}


class WingsConfig(GraftConfig):
    """How the learners are built, routed and gated.

    Attributes:
        rank: width of the low-rank factors (paper: 64 for a 4096-wide decoder).
        learners: which to have: "visual" (keys and values are perceptual tokens), "textual" (text tokens), or both.
        layers: decoder layers that get learners, negative ones counted from the last; None = all that have attention.
        router: how the two learners are weighed per token (sum 1): "attention" (paper Eq. 5: a learned weight per key
            position, summed with the main branch's attention, mean over heads), "mass" (share of each head's attention
            that lies on perceptual tokens; independent of length), "constant" (one learned pair per layer). A single
            learner has weight 1 and no router.
        gate: "exact": the learners are active only at tokens with a perceptual token at or before them, so a prompt
            without an image is the host's own computation, bit for bit; "paper": the textual learner is always on.
        query: "post_attention" (published code: the residual stream after attention) or "block_input" (paper, Eq. 4).
        normalize: bring queries and input tokens to unit root mean square before the learners see them. The paper and
            its code do not; without it, a decoder whose stream is far longer than its input tokens (trained ones:
            hundreds against ones) saturates the learners' softmax from the first step.
        rope: rotate learner queries and keys with the host's own RoPE angles.
        system_keys: whether system-prompt tokens (where roles are known) are keys of the textual learner.
        gain: factor on the routed sum.
        dropout: on the learners' attention weights, in training.
        router_tokens: number of key positions the "attention" router has weights for; longer inputs are refused.
        cache: what a KV cache holds for the learners, beside the input tokens. "factors": 2 rank numbers per token and
            layer, from which keys are made again in every step; "keys": the keys themselves in place of their
            factors, d + rank numbers per token and layer, which makes steps cheaper where memory is plenty (CPU); where
            rank is at most a quarter of a head's width, d + rank per head of the learners, of which steps read less.
            What is computed is the same.
        init_std: standard deviation of the projections down at the start; those up start at zero.
        compat: "published" computes what the released code computes, for released weights (see
            `alula.grafts.wings.published`). It fixes router="attention", gate="paper", query="post_attention",
            normalize=False, rope=True, system_keys=True and gain=1, whose published counterparts it has built in, and
            has nothing to keep in a cache.
        system_tokens: with compat, how many leading tokens (system prompt and the header of the user's turn) are no
            textual keys in samples with an image; the release has 14 (Qwen1.5).
    """

    graft_type: ClassVar[str] = "wings"
    free: ClassVar[tuple[str, ...]] = ("cache", "dropout")
    renamed: ClassVar[Mapping[str, str]] = {"router_rows": "router_tokens", "system_rows": "system_tokens"}
    renamed_weights: ClassVar[Mapping[str, str]] = {"a": "down", "b": "up"}

    rank: Int = Field(default=64, ge=1, le=_MOST_RANK)
    learners: tuple[str, ...] = LEARNERS
    layers: Layers = None
    router: Router = "mass"
    gate: Gate = "exact"
    query: Query = "post_attention"
    normalize: Bool = False
    rope: Bool = True
    system_keys: Bool = True
    gain: Number = Field(default=1.0, gt=0, le=_MOST_GAIN)  # at zero no gradient would ever reach the learners
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    router_tokens: Int = Field(default=4096, ge=1, le=_MOST_TOKENS)
    cache: Kept = "factors"
    init_std: Number = Field(default=0.02, gt=0, le=_MOST_SPREAD)  # as gain
    compat: Literal["published"] | None = None
    system_tokens: Int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _published(cls, values: Any) -> Any:
        """Set what the released code has built in."""
        if not isinstance(values, Mapping) or values.get("compat") != "published":
            return values
        for name, value in _PUBLISHED.items():
            # a default that was written out, as saved settings are, says nothing
            default = cls.model_fields[name].default
            given = values.get(name, value)
            if not any(given == legal and isinstance(given, type(legal)) for legal in (value, default)):
                raise ValueError(f"{name}={given!r} is not what the released code computes ({value!r})")
        return {**values, **_PUBLISHED}

    @field_validator("learners")
    @classmethod
    def _in_order(cls, learners: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in learners if name not in LEARNERS]
        if unknown:
            raise ValueError(f"there is no learner {unknown[0]!r}; use {' or '.join(map(repr, LEARNERS))}")
        if not learners:
            raise ValueError(f"at least one learner is needed: any of {', '.join(LEARNERS)}")
        twice = next((name for name in learners if learners.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is listed twice")
        # one order, whatever the order they were named in: the router's columns are visual, textual
        return tuple(sorted(learners, key=LEARNERS.index))

    @model_validator(mode="after")
    def _possible(self) -> WingsConfig:
        if self.compat is not None and self.learners not in (LEARNERS, ("visual",)):
            raise ValueError('the released code has both learners, or (stage 1) learners=("visual",)')
        return self

    @field_validator("system_tokens")
    @classmethod
    def _of_published(cls, system_tokens: int, others: ValidationInfo) -> int:
        if system_tokens and others.data.get("compat", "wrong itself") is None:
            raise ValueError('it is only for compat="published"')
        return system_tokens
