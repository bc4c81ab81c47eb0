"""transformers' dialect: every name of its own whose spelling depends on the version, once.

Whatever the seam takes from transformers by name is read through here, and what was read is checked against what was
found by type: a name that changes again is an error that says so, never a cache that nobody saw.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache as once
from typing import Any, NamedTuple

import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from alula.errors import SeamError, UsageError


class Spelling(NamedTuple):
    """One name of a thing, the first version that has it, and the file of transformers it was seen in."""

    name: str
    since: str
    seen: str


# The cache of a forward: the keyword that hands it to models, decoders, layers and attention, and the field of their
# outputs that gives it back. Newest first; transformers translates the older name until 5.40, with a warning.
CACHE_NAMES = (
    Spelling("cache", "5.24.0", "models/llama/modeling_llama.py, utils/generic.py"),
    Spelling("past_key_values", "5.0.0", "models/llama/modeling_llama.py"),
    Spelling("layer_past", "5.0.0", "models/gpt_neox/modeling_gpt_neox.py, whose layers alone call it so"),
)

_KNOWN = tuple(spelling.name for spelling in CACHE_NAMES)  # asked often in every forward

# keywords of decoder layers and of what is in them
HIDDEN, ROPE, POSITIONS, MASK = "hidden_states", "position_embeddings", "position_ids", "attention_mask"

# the keyword under which attention functions take what is added to their logits
BIAS = "position_bias"

REMEDY = "pin the newest transformers of docs/results/versions.md; `make test-versions` checks another"


@once
def cache_keyword() -> str:
    """The name under which the installed transformers hands a cache to models, e.g. ``model(**{cache_keyword(): c})``.

    Raises:
        SeamError: it uses a name this table does not know.
    """
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for spelling in CACHE_NAMES:
        if spelling.name in known:
            return spelling.name
    raise SeamError(
        f"transformers {transformers.__version__} hands caches to models under a name alula does not know",
        remedy=REMEDY,
    )


def cache_of(named: Mapping[str, Any], *, where: str) -> Cache | None:
    """The cache among keyword arguments, or None.

    Args:
        named: keyword arguments by name.
        where: whose they are, for the error.

    Raises:
        UsageError: two caches under two of its names. SeamError: a cache under a name that is none of its.
    """
    for name, value in named.items():
        if isinstance(value, Cache) and name not in _KNOWN:
            raise SeamError(
                f"{where} was handed its cache as {name!r} by transformers {transformers.__version__}; alula knows "
                f"it as {' or '.join(_KNOWN)}, and would not see what was cached",
                remedy=REMEDY,
            )
    given = None
    for name in _KNOWN:
        one = named.get(name)
        if one is not None and given is not None and one is not given:
            raise UsageError(
                f"{where} was handed two caches, as {' and as '.join(_KNOWN)}", remedy=f"pass {_KNOWN[0]} alone"
            )
        given = one if given is None else given
    return given


def settled(named: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Keyword arguments in which the cache stands once, under the name the installed transformers uses.

    transformers itself prefers the newer name wherever both stand, even where it holds None and the older a cache.

    Raises:
        UsageError, SeamError: as `cache_of`.
    """
    given = cache_of(named, where=where)
    names = [name for name in _KNOWN if name in named]
    if len(names) < 2:
        return dict(named)
    return {key: value for key, value in named.items() if key not in names} | {cache_keyword(): given}


def cache_in(args: Iterable[Any]) -> Cache | None:
    """The cache among positional arguments, as GPT-2 hands it to its layers; None where there is none."""
    return next((value for value in args if isinstance(value, Cache)), None)


def cache_of_output(output: Any) -> Cache | None:
    """The cache a model gave back, in a `ModelOutput` or a tuple; None where it gave none."""
    if not isinstance(output, Mapping):
        return cache_in(output if isinstance(output, tuple) else ())
    held = dict(output.items())  # transformers' own look-up warns of each older name that is asked for
    for name in _KNOWN:
        if isinstance(given := held.get(name), Cache):
            return given
    return cache_in(held.values())


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, where: str) -> Tensor:
    """The hidden states that a decoder layer, its attention, its MLP or a norm was given.

    Raises:
        SeamError: under a name this table does not know.
    """
    if args:
        return args[0]
    if HIDDEN not in kwargs:
        raise SeamError(
            f"{where} was given no {HIDDEN} by transformers {transformers.__version__}, but {', '.join(kwargs)}",
            remedy=REMEDY,
        )
    return kwargs[HIDDEN]


def with_hidden(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other hidden states."""
    return ((hidden, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, HIDDEN: hidden})


def hidden_of_output(output: Any) -> Tensor:
    """The hidden states among what a decoder layer, its attention, its MLP or a norm returned."""
    return output[0] if isinstance(output, tuple) else output


def output_with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def logits_of(output: Any, *, where: str) -> Tensor:
    """The logits that a host gave.

    Raises:
        SeamError: it gave none under a name this table knows.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise SeamError(f"{where} gave no logits of (batch, tokens, vocabulary)", remedy=REMEDY)
    return logits


def output_with_logits(output: Any, logits: Tensor) -> Any:
    """The same output of a host with other logits."""
    if isinstance(output, tuple):
        return (logits, *output[1:])
    output.logits = logits
    return output


def rope_of(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | Tensor | None:
    """The (cos, sin) a decoder layer was given, both as one complex table (Llama-4), or None."""
    return kwargs.get(ROPE)


def positions_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The position ids a decoder layer was given, or None."""
    return kwargs.get(POSITIONS)


def named_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder layer by name, whether they came so or by position."""
    return {**dict(zip(names, args)), **kwargs}  # noqa: B905 (torch 2.7 cannot compile its keyword)


def with_positions(named: Mapping[str, Any], pick: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
    """The arguments of a decoder layer with other positions.

    Args:
        named: arguments by name.
        pick: given a table, and how many dimensions it has of which the first two are (B or 1, S); gives one like it.
            Multimodal RoPE has one more in front: time, height and width.
    """
    taken = dict(named)
    rope, positions = rope_of(named), positions_of(named)
    if rope is not None:
        taken[ROPE] = pick(rope, 3) if isinstance(rope, Tensor) else tuple(pick(table, 3) for table in rope)
    if positions is not None:
        taken[POSITIONS] = pick(positions, 2)
    return taken


def with_rope(named: Mapping[str, Any], rope: tuple[Tensor, Tensor] | Tensor, positions: Tensor) -> dict[str, Any]:
    """The arguments of a decoder layer with the tables and the (B, S) positions of others."""
    taken = {**named, ROPE: rope}
    before = positions_of(named)
    if before is not None:
        taken[POSITIONS] = positions if before.dim() == 2 else positions.expand(len(before), -1, -1)
    return taken


def positional_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes by position."""
    return _positional_names(type(module).forward)


@once
def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
