"""How the decoder's own attention is read and biased, whichever implementation it runs.

What the decoder computes stays what it is, also where sums are asked for:

- "eager" hands out its weights, and a hook multiplies them. Nothing is exchanged (`answer_from_weights`).
- "sdpa" is exchanged for ``"alula"``, which *is* the stock SDPA path with one addition. Such sums are linear in the
  attention rows, so extra value columns give them exactly in the same fused pass: the caller names a value per key (an
  indicator of a set, a router's weight), the columns ride behind the real values, q and k are zero-padded to the
  widened value width (equal widths keep the fused kernels usable), and nobody materialises (S, S).
- "flex_attention" is exchanged for a function that calls it, and once more with columns in the place of values.

Biases are added to the logits by what either implementation has for it: eager's additive mask, the `position_bias` of
SDPA and flex attention. Where there are many queries, one that is alike for all heads and queries rides through SDPA in
further columns of q and k instead: nobody materialises (S, S), and causality stays a flag. Sums are those of the biased
attention.

Others are refused: their masks and kernels are not known here.

Shapes: B batch, H query heads, G key/value heads, Q query tokens, K key tokens, D head width, C extra values per key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from alula.anatomy import Anatomy, HostParts
from alula.errors import HostError, SeamError
from alula.seam import dialect
from alula.seam.frame import Frame
from alula.seam.requests import Request, Sums

ATTENTION = "alula"
EAGER = "eager"
_FLEX = "alula_flex_attention"
_OURS = {"sdpa": ATTENTION, "flex_attention": _FLEX}
_FEW_QUERIES = 8
_FURTHER = 8  # columns by which heads are widened for a bias: fused kernels take widths that are multiples of it
_WIDEST = 256  # head that they take
# options beside which stock SDPA, under a mask, computes what `_few_with_sums` writes out; any other rules it out
_PLAIN = frozenset(
    {
        "scaling",
        "is_causal",
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
    }
)


class Foreseen(Exception):  # noqa: N818
    """Attention was asked for its weights alone: the layer that it is in need not go on. It never leaves the seam."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    alula: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `sdpa_attention_forward` computes it, biased and with the sums as asked for through `alula`.

    Args:
        query: (B, H, Q, D); key, value: (B, G, K, D).
        attention_mask: None (causal when Q > 1), boolean (True = attend) or additive, broadcastable to (B, H, Q, K).
        alula: the `ForwardContext` of this call, when a seam is installed.

    Returns:
        (B, Q, H, D) output and None for the weights.
    """
    if isinstance(alula, Frame):
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return _framed(module, query, key, value, attention_mask, options, alula)
    if not _is_asked(module, alula):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    biased = _biased(module, alula, query, key, kwargs)
    options = {"scaling": scaling, "dropout": dropout, **biased}
    if biased.get(dialect.BIAS) is not None:
        options[dialect.BIAS] = biased[dialect.BIAS].to(query)
    if alula.requests.weights or alula.requests.heads or alula.foresight:
        _weigh(module, query, key, attention_mask, options, alula)
    if alula.foresight is not None:
        raise Foreseen
    apart, shared = _requested(module, alula, query.shape[2], key.shape[2]) if alula.requests.sums else ([], [])
    if not apart and not shared and biased.get(dialect.BIAS) is not None and _rides(biased[dialect.BIAS], query):
        columns = alula.once(_columns_of, biased[dialect.BIAS], scaling, query.dtype)
        return _with_bias(module, query, key, value, attention_mask, options, columns)
    if apart:
        _answer_apart(sdpa_attention_forward, module, query, key, attention_mask, options, alula, apart)
    if not shared:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    is_few, is_blank = _are_written_out(query, attention_mask, options), None
    if attention_mask is not None and attention_mask.dtype == torch.bool and not is_few:
        attention_mask, is_blank = alula.once(with_a_key, attention_mask)
    values = _key_values(shared, key.shape[2], value.dtype, alula, 0 if is_few else value.shape[-1])
    split = alula.split([request for request, _ in shared])
    if split is None:
        output, sums = _with_sums(
            module, query, key, value, attention_mask, key_values=values, options=options, is_few=is_few
        )
    else:
        wanted, others, back = split
        chosen = _samples(wanted, query, key, value, attention_mask)
        with_sums, sums = _with_sums(
            module,
            *chosen,
            key_values=values[wanted],
            options=_options_of(wanted, options, len(query)),
            is_few=is_few,
        )
        without, _ = sdpa_attention_forward(
            module,
            *_samples(others, query, key, value, attention_mask),
            **_options_of(others, options, len(query)),
        )
        output = torch.cat([with_sums, without])[back]
        sums = torch.cat([sums, sums.new_zeros(len(without), *sums.shape[1:])])[back]
    if is_blank is not None:
        output = output.masked_fill(is_blank, 0)
    _deliver(shared, sums, alula, module)
    return output, None


def _framed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    frame: Frame,
) -> tuple[Tensor, None]:
    """Attention inside of what is compiled."""
    asked = frame.asked
    if asked is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    scaling = query.shape[-1] ** -0.5 if options["scaling"] is None else options["scaling"]
    options = {**options, "scaling": scaling}
    given = mask if asked.mask is None else asked.mask
    columns = asked.columns.to(value.dtype)
    if asked.is_apart:
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        width, parts = query.shape[-1], []
        for padded, count in _as_values(columns, width):
            values = padded.expand(-1, key.shape[1], -1, -1)
            part, _ = sdpa_attention_forward(module, query, key, values, given, **{**options, "dropout": 0.0})
            parts.append(part[..., :count])
        sums = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    else:
        is_few = asked.is_few and _are_written_out(query, mask, options)
        columns = _columns(columns, columns.dtype, 0 if is_few else value.shape[-1])
        output, sums = _with_sums(module, query, key, value, given, key_values=columns, options=options, is_few=is_few)
        if asked.is_blank is not None:
            output = output.masked_fill(asked.is_blank, 0)
    start = 0
    for width in asked.widths:
        frame.sums.append(sums[..., start : start + width])
        start += width
    return output, None


def flex_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, alula: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What `flex_attention_forward` returns, biased and with the sums as asked for: see `attention_forward`."""
    if not _is_asked(module, alula):
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs = _biased(module, alula, query, key, kwargs)
    if kwargs.get(dialect.BIAS) is not None:  # its kernel asks it for every head and query
        kwargs[dialect.BIAS] = kwargs[dialect.BIAS].to(query).expand(*query.shape[:3], key.shape[2])
    output = flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    apart, shared = _requested(module, alula, query.shape[2], key.shape[2])

    def run(module: nn.Module, query: Tensor, key: Tensor, key_values: Tensor, mask: Any, **options: Any) -> Any:
        # laid out as the decoder's own values are, so that no kernel has to be compiled for them
        return flex_attention_forward(module, query, key, torch.empty_like(value).copy_(key_values), mask, **options)

    if apart:
        _answer_apart(run, module, query, key, attention_mask, kwargs, alula, apart)
    if shared:
        _deliver(shared, _sums_apart(run, module, query, key, attention_mask, kwargs, shared, alula), alula, module)
    return output


def _is_asked(module: nn.Module, alula: Any) -> bool:
    """Whether anybody asks anything of an attention module's layer, in whatever forward."""
    if alula is None or (alula.foresight is None and not alula.requests.is_any):
        return False
    # vision towers of some hosts hand our keyword to attention modules that have no layer index
    layer = getattr(module, "layer_idx", None)
    return layer is not None and (alula.foresight is not None or alula.requests.is_any_of(layer))


@torch.no_grad()
def _weigh(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any], alula: Any
) -> None:
    """Give those who asked queries and keys, and the attention of a few queries, which is written out for these."""
    for asked in alula.requested_heads(module, query.shape[2], key.shape[2]):
        scaling = query.shape[-1] ** -0.5 if options["scaling"] is None else options["scaling"]
        asked.by.on_heads(alula.at(module.layer_idx), query, key[:, :, -query.shape[2] :], scaling)
    for request, rows in alula.requested_weights(module, query.shape[2], key.shape[2]):
        scaling, bias = options["scaling"], options.get(dialect.BIAS)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if mask is None and query.shape[2] > 1:  # causal
            keys = torch.arange(key.shape[2], device=rows.device)
            allowed = keys <= rows[:, None, :, None]
        else:
            allowed = None if mask is None else _rows(mask, rows)[..., : key.shape[2]]
        scores = _scores(_rows(query, rows), key, allowed, scaling)
        if bias is not None:
            scores = scores + _rows(bias, rows)
        view = alula.at(module.layer_idx)
        request.by.on_weights(view, view.spread_keys(_softmax(scores)))


def _rows(of: Tensor, rows: Tensor) -> Tensor:
    """(B, H, n, ..) of the queries at (B, n), from (B or 1, H, Q or 1, ..) of all."""
    if of.shape[2] == 1:
        return of
    of = of.expand(len(rows), *of.shape[1:])
    return of.gather(2, rows[:, None, :, None].expand(-1, of.shape[1], -1, of.shape[3]))


def answer_from_weights(module: nn.Module, weights: Tensor | None, alula: Any) -> None:
    """Give readers their sums from the (B, H, Q, K) weights that eager attention hands out.

    Raises:
        SeamError: there are none. HostError: weights of which some were dropped out although a reader wants them whole.
    """
    where = f"{type(module).__name__} of layer {module.layer_idx}"
    if weights is None:
        raise SeamError("eager attention handed out no weights", where=where, remedy=_SDPA)
    with torch.no_grad():
        for request, rows in alula.requested_weights(module, *weights.shape[2:]):
            view = alula.at(module.layer_idx)
            request.by.on_weights(view, view.spread_keys(_rows(weights, rows)))
    apart, shared = _requested(module, alula, *weights.shape[2:])
    if apart and module.training and alula.anatomy.config.attention_dropout:
        raise HostError(
            "attention weights are dropped out at random, and eager attention hands out no others",
            where=where,
            remedy=f"measure in eval mode; or {_SDPA}",
        )
    for requested, with_gradients in ((apart, False), (shared, True)):
        if requested:
            with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
                values = _key_values(requested, weights.shape[-1], weights.dtype, alula)
                sums = weights.flatten(1, 2) @ values  # (B, H * Q, C)
                sums = sums.view(*weights.shape[:3], -1).transpose(1, 2)
            _deliver(requested, sums, alula, module)


def mask_with_bias(attention: nn.Module, kwargs: dict[str, Any], alula: Any, like: Tensor) -> dict[str, Any]:
    """The arguments of an eager attention module, whose mask is added to its logits, with what is asked to be added.

    Args:
        like: (B, Q, d) what it is given.

    Raises:
        HostError: the decoder runs an implementation that cannot be biased, set since the bias was asked for.
    """
    name = alula.implementation
    if name in _OURS.values():
        return kwargs  # the function it calls knows
    if name != EAGER:
        raise HostError(
            f"the decoder runs the attention implementation {name!r}, set after a bias was asked for",
            remedy="leave the model's attention implementation alone while its attention is biased",
        )
    mask = kwargs.get(dialect.MASK)
    view = alula.at(attention.layer_idx)
    known = alula.all_tokens.shape[1] if view.key_index is None else view.key_index.shape[1]
    keys = known if mask is None else mask.shape[-1]
    bias = alula.key_bias(attention, like.shape[1], keys)
    if bias is None:
        return kwargs
    if dialect.MASK not in kwargs:
        raise SeamError(f"{type(attention).__name__} was given no {dialect.MASK} by name", remedy=dialect.REMEDY)
    bias = align(bias, keys, dim=-1).to(like)
    return {**kwargs, dialect.MASK: bias if mask is None else mask + bias}


def _biased(module: nn.Module, alula: Any, query: Tensor, key: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an attention function, with what is asked to be added to its logits, in the dtype it came in."""
    if not alula.requests.biases:
        return options
    bias = alula.key_bias(module, query.shape[2], key.shape[2])
    if bias is None:
        return options
    bias, given = align(bias, key.shape[2], dim=-1).to(query.device), options.get(dialect.BIAS)
    return {**options, dialect.BIAS: bias if given is None else given + bias}


def _rides(bias: Tensor, query: Tensor) -> bool:
    """Whether a bias goes through attention in further columns of q and k."""
    is_alike = bias.shape[1] == bias.shape[2] == 1
    return is_alike and query.shape[2] > 1 and query.shape[-1] + _FURTHER <= _WIDEST


def _with_bias(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    columns: tuple[Tensor, Tensor],
) -> tuple[Tensor, None]:
    """What stock SDPA gives under a bias per key, by a wider product: scaling * [q, 1] . [k, bias / scaling].

    Args:
        columns: see `_columns_of`.
    """
    ones, of_keys = columns
    query, key, widened = (
        torch.cat([each, further.expand(len(each), each.shape[1], each.shape[2], -1)], dim=-1)
        for each, further in ((query, ones), (key, of_keys), (value, of_keys))  # what comes of the last is dropped
    )
    output, _ = sdpa_attention_forward(module, query, key, widened, mask, **{**options, dialect.BIAS: None})
    return output[..., : value.shape[-1]].contiguous(), None


def _columns_of(bias: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a (B or 1, 1, 1, K) bias adds to q, (1, 1, 1, 8), and to k, (B or 1, 1, K, 8).

    A number in half precision takes two columns: the second holds what the first rounds off. One that is infinite, or
    is once it is divided, bars a key: it becomes the lowest there is, for what is infinite minus itself is no number.
    """
    most = torch.finfo(dtype).max
    exact = bias.transpose(-1, -2).to(torch.promote_types(dtype, torch.float32)) / scaling
    first = exact.clamp(-most, most).to(dtype)
    rest = (exact - first.to(exact)).masked_fill(exact.isinf(), 0).clamp(-most, most)
    both = [first, rest.to(dtype)]
    of_keys = F.pad(torch.cat(both, dim=-1), (0, _FURTHER - 2))
    ones = of_keys.new_zeros(1, 1, 1, _FURTHER)
    ones[..., :2] = 1
    return ones, of_keys


Requested = list[tuple[Request[Sums], Tensor]]


def _requested(module: nn.Module, alula: Any, queries: int, keys: int) -> tuple[Requested, Requested]:
    """Who wants which sums in this layer: those who want them from a separate pass, and the others."""
    apart: Requested = []
    shared: Requested = []
    for request, values in alula.requested_sums(module, queries, keys):
        (apart if request.by.separate_pass else shared).append((request, values))
    return apart, shared


def _key_values(requested: Requested, keys: int, dtype: torch.dtype, alula: Any, beside: int = 0) -> Tensor:
    """(B, keys, all values), filled up with 0 so that the columns `beside` them and they are a multiple of 8."""
    if len(requested) == 1:  # the same for many layers, most often
        return align(alula.once(_columns, requested[0][1], dtype, beside), keys, dim=1)
    return _columns(torch.cat([align(values, keys, dim=1) for _, values in requested], dim=-1), dtype, beside)


def _columns(values: Tensor, dtype: torch.dtype, beside: int) -> Tensor:
    missing = -(beside + values.shape[-1]) % 8 if beside else 0
    values = values.to(dtype)
    return F.pad(values, (0, missing)) if missing else values


@torch.no_grad()
def _answer_apart(
    run: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    options: dict[str, Any],
    alula: Any,
    requested: Requested,
) -> None:
    """Give readers their sums from passes of their own."""
    sums = _sums_apart(run, module, query, key, mask, {**options, "dropout": 0.0}, requested, alula)
    _deliver(requested, sums, alula, module)


def _as_values(columns: Tensor, width: int) -> list[tuple[Tensor, int]]:
    """(B, 1, K, width) values of attention made of (B, K, C) columns, as many at a time as a head is wide, and how many
    each of them holds."""
    parts = columns.split(width, dim=-1)
    return [(F.pad(part, (0, width - part.shape[-1]))[:, None], part.shape[-1]) for part in parts]


def _sums_apart(
    run: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    options: dict[str, Any],
    requested: Requested,
    alula: Any,
) -> Tensor:
    """(B, Q, H, all columns) from passes whose values are nothing but key_values, as many at a time as a head is wide:
    a kernel that can compute the decoder's heads can compute these."""
    columns, width = _key_values(requested, key.shape[2], query.dtype, alula).to(query.device), query.shape[-1]
    values = alula.once(_as_values, columns, width) if len(requested) == 1 else _as_values(columns, width)
    sums = []
    for padded, count in values:
        output, _ = run(module, query, key, padded.expand(-1, key.shape[1], -1, -1), mask, **options)
        sums.append(output[..., :count])
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)


def _deliver(requested: Requested, sums: Tensor, alula: Any, module: nn.Module) -> None:
    """Hand every reader its share of (B, Q, H, all columns)."""
    start, view = 0, alula.at(module.layer_idx)
    if len(requested) == 1 and requested[0][1].shape[-1] == sums.shape[-1]:
        requested[0][0].by.on_sums(view, sums)
        return
    for request, wanted in requested:
        request.by.on_sums(view, sums[..., start : start + wanted.shape[-1]])
        start += wanted.shape[-1]


def are_few(queries: int, mask: Any) -> bool:
    """Whether queries are so few that their attention may be written out, which knows of no causal order but that of
    a mask."""
    return queries <= _FEW_QUERIES and (queries == 1 or mask is not None)


def _are_written_out(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether queries are so few, and attention so plain, that `_few_with_sums` computes it."""
    if not are_few(query.shape[2], mask) or options["dropout"]:
        return False
    for name, value in options.items():  # noqa: SIM110 - in every layer of every step, and `all` takes twice as long
        if value is not None and name not in _PLAIN and name != "dropout":
            return False
    return True


def _with_sums(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    key_values: Tensor,
    options: dict[str, Any],
    is_few: bool,
) -> tuple[Tensor, Tensor]:
    """(B, Q, H, D) output of attention and (B, Q, H, C) sums of the (B, K, C) key_values; D + C is a multiple of 8 but
    for the few queries whose attention is written out."""
    if is_few:
        return _few_with_sums(query, key, value, mask, key_values=key_values, scaling=options["scaling"])
    width, padding = value.shape[-1], key_values.shape[-1]
    widened = torch.cat([value, key_values[:, None].expand(-1, value.shape[1], -1, -1)], dim=-1)
    if not _takes_wide_values(query):
        query, key = F.pad(query, (0, padding)), F.pad(key, (0, padding))
    output, _ = sdpa_attention_forward(module, query, key, widened, mask, **options)
    output, sums = output.split([width, padding], dim=-1)
    return output.contiguous(), sums


def with_a_key(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean mask in which a query that may attend to nothing, which is padding, attends to all, and (B, Q, 1, 1)
    bool which these are: other kernels give them 0, and cuDNN's, the default on recent accelerators, gives numbers
    and gradients that are none."""
    is_blank = ~mask.any(dim=-1, keepdim=True)
    return mask | is_blank, is_blank.transpose(1, 2)


def _takes_wide_values(query: Tensor) -> bool:
    """Whether a fused kernel takes values wider than keys as they are, which else are filled up to be as wide: cuDNN's
    does on the accelerators it is chosen on, in half precision."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and is_half and torch.cuda.get_device_capability(query.device) >= (9, 0)


def _few_with_sums(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, key_values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`_with_sums` for few queries, whose weights are cheaper to write out than keys and values are to widen."""
    (batch, heads, queries, _), (_, groups, keys, _) = query.shape, key.shape
    weights = torch.softmax(_scores(query, key, mask, scaling), dim=-1)
    of_groups = value.reshape(batch * groups, keys, -1)
    output = torch.bmm(weights.view(batch * groups, -1, keys), of_groups).view(batch, heads, queries, -1)
    sums = torch.bmm(weights.view(batch, -1, keys), key_values)
    return output.transpose(1, 2).contiguous(), sums.view(batch, heads, queries, -1).transpose(1, 2)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(B, H, Q, K) logits of attention, those of barred keys as low as can be."""
    (batch, heads, queries, width), (_, groups, count, _) = query.shape, key.shape
    grouped = query.reshape(batch * groups, -1, width)
    keys = key.reshape(batch * groups, count, width).transpose(1, 2)
    scores = torch.baddbmm(query.new_empty(()), grouped, keys, beta=0, alpha=scaling).view(batch, heads, queries, -1)
    if mask is None:
        return scores
    keys = mask[..., : scores.shape[-1]]
    barred = scores.masked_fill(~keys, torch.finfo(scores.dtype).min) if keys.dtype == torch.bool else None
    return scores + keys if barred is None else barred


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _samples(pick: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The chosen samples of each tensor; what is None or broadcast over samples stays as it is."""
    return [t if t is None or len(t) == 1 else t.index_select(0, pick) for t in tensors]


def _options_of(pick: Tensor, options: dict[str, Any], batch: int) -> dict[str, Any]:
    """Attention's options for the chosen samples: a bias per sample is picked as its sample is."""
    return {
        name: value.index_select(0, pick)
        if isinstance(value, Tensor) and value.ndim and len(value) == batch and name not in _PLAIN
        else value
        for name, value in options.items()
    }


def align(values: Tensor, keys: int, *, dim: int) -> Tensor:
    """Fit a dimension of known keys to those attention holds: a sliding cache keeps the last, a static one has a blank
    tail."""
    have = values.shape[dim]
    if have == keys:
        return values  # no view of it: what is made of these values is made once, for this very tensor
    if have > keys:
        return values.narrow(dim, have - keys, keys)
    return F.pad(values, (0, 0) * (values.dim() - 1 - dim % values.dim()) + (0, keys - have))


AttentionInterface.register(ATTENTION, attention_forward)
AttentionInterface.register(_FLEX, flex_forward)
# without its own entry, transformers would hand decoders a mask of None and padding would be ignored
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionMaskInterface.register(_FLEX, flex_attention_mask)

_SDPA = 'run the decoder with SDPA: model.set_attn_implementation("sdpa")'


def open_attention(anatomy: Anatomy) -> str:
    """Let the decoder's attention be asked for sums, and return the name of its implementation, for `close_attention`.

    Raises:
        HostError: it runs an implementation that alula cannot ask, or did not take the one that can be.
    """
    name = anatomy.config._attn_implementation
    if name in _OURS.values():  # two models of one config object, the other of which is asked already
        return name
    if name != EAGER and name not in _OURS:
        raise HostError(
            f"the decoder runs the attention implementation {name!r}, whose attention alula cannot read",
            remedy=f"{_SDPA}; it may also run {', '.join(map(repr, (EAGER, *_OURS)))}",
        )
    set_attention(anatomy, _OURS.get(name, name))
    return name


def stock_attention(name: str) -> str:
    """The implementation that computes what ``name`` does, where that is one of alula's; else ``name``."""
    return next((stock for stock, ours in _OURS.items() if ours == name), name)


def close_attention(anatomy: Anatomy, name: str) -> None:
    """Undo `open_attention`, unless the implementation was changed since."""
    if anatomy.config._attn_implementation == _OURS.get(name):
        set_attention(anatomy, name)


def set_attention(anatomy: HostParts, name: str) -> None:
    """Set the decoder's attention implementation; the towers keep theirs."""
    if anatomy.config._attn_implementation != name:
        host: Any = anatomy.host
        composite = host.config is not anatomy.config
        host.set_attn_implementation({"text_config": name} if composite else name)
        if anatomy.config._attn_implementation != name:
            raise HostError(f"{type(host).__name__} refused the attention implementation {name!r}")
