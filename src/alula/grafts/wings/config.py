"""Settings of the Wings graft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from alula.errors import UsageError
from alula.grafts.base import GraftConfig

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


@dataclass(frozen=True, kw_only=True)
class WingsConfig(GraftConfig):
    """How the learners are built, routed and gated.

    Attributes:
        rank: width of the low-rank factors (paper: 64 for a 4096-wide decoder).
        learners: which to have: "visual" (keys and values are perceptual tokens), "textual" (text tokens), or both.
        layers: decoder layers that get learners, negative ones counted from the last; None = all.
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
            factors, d + rank numbers per token and layer, which makes steps cheaper where memory is plenty (CPU). What
            is computed is the same.
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

    rank: int = 64
    learners: tuple[str, ...] = LEARNERS
    layers: tuple[int, ...] | None = None
    router: Router = "mass"
    gate: Gate = "exact"
    query: Query = "post_attention"
    normalize: bool = False
    rope: bool = True
    system_keys: bool = True
    gain: float = 1.0
    dropout: float = 0.0
    router_tokens: int = 4096
    cache: Kept = "factors"
    init_std: float = 0.02
    compat: Literal["published"] | None = None
    system_tokens: int = 0

    def __post_init__(self) -> None:
        self._settle("learners", str)
        self._settle("layers", int)
        # one order, whatever the order they were named in: the router's columns are visual, textual
        object.__setattr__(self, "learners", tuple(sorted(self.learners, key=lambda name: name != "visual")))
        if self.compat is not None:
            _choose("compat", self.compat, ("published",))
            for name, value in _PUBLISHED.items():
                given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if given not in (value, default):
                    raise UsageError(f"wings: {name}={given!r} is not what the released code computes ({value!r})")
                object.__setattr__(self, name, value)
            if self.learners not in (LEARNERS, ("visual",)):
                raise UsageError('wings: the released code has both learners, or (stage 1) learners=("visual",)')
        for name, options in (("router", Router), ("gate", Gate), ("query", Query), ("cache", Kept)):
            _choose(name, getattr(self, name), get_args(options))
        if not self.learners:
            raise UsageError("wings needs at least one learner", remedy=f"learners: any of {', '.join(LEARNERS)}")
        for learner in self.learners:
            _choose("learners", learner, LEARNERS)
            if self.learners.count(learner) > 1:
                raise UsageError(f"wings: learners lists {learner!r} twice")
        if self.layers == ():
            raise UsageError("wings: layers is empty", remedy="name some, or leave it out for all")
        for name in ("normalize", "rope", "system_keys"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"wings: {name} must be true or false, not {getattr(self, name)!r}")
        for name, most in (("rank", _MOST_RANK), ("router_tokens", _MOST_TOKENS)):
            if not _is(int, getattr(self, name)) or getattr(self, name) < 1:
                raise UsageError(f"wings: {name} must be a whole number above 0, not {getattr(self, name)!r}")
            if getattr(self, name) > most:
                raise UsageError(f"wings: {name} must be at most {most:,}")
        if not _is(int, self.system_tokens) or self.system_tokens < 0 or (self.system_tokens and self.compat is None):
            raise UsageError('wings: system_tokens is a number of tokens, and only for compat="published"')
        for name, most in (("gain", _MOST_GAIN), ("init_std", _MOST_SPREAD)):
            # at zero no gradient would ever reach the learners
            if not _is((int, float), getattr(self, name)) or not 0.0 < getattr(self, name) <= most:
                raise UsageError(
                    f"wings: {name} must be a number above 0 and at most {most:,}, not {getattr(self, name)!r}"
                )
        if not _is((int, float), self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"wings: dropout must lie in [0, 1), not {self.dropout!r}")

    def _settle(self, name: str, kind: type) -> None:
        """Turn a list into the tuple that hashes; refuse what is no sequence of ``kind``."""
        given = getattr(self, name)
        if given is None and name == "layers":
            return
        if not isinstance(given, (list, tuple)) or not all(type(each) is kind for each in given):
            raise UsageError(f"wings: {name} must be a list of {kind.__name__}, not {given!r}")
        object.__setattr__(self, name, tuple(given))


def _is(kinds: type | tuple[type, ...], value: Any) -> bool:
    """Whether ``value`` is a number of these kinds; true and false are none."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _choose(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UsageError(f"wings: {name} cannot be {value!r}", remedy=f"use one of: {', '.join(options)}")
