"""Vocabulary lens: what the unembedding reads in tokens of each kind, state by state (IMA, section 2.5).

Shapes: B samples of a batch, S tokens, M chosen tokens, V vocabulary, N states, R token slots, T top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.probes import token_sets
from alula.probes.registry import register
from alula.probes.states import GROUPS, TEXT, StateProbe, groups
from alula.seam import ForwardContext, LayerView
from alula.stats import DEFAULT, Array, Curve, Resampling, Result, means
from alula.tokens import TokenMap

_CHUNK = 64  # tokens unembedded at a time


@dataclass(frozen=True)
class KindLens(Result):
    """What tokens of one kind read as; sequences have one entry per state. Samples weigh alike, tokens alike within
    one.

    Attributes:
        samples: samples with tokens of this kind.
        tokens: tokens read.
        entropy: of the distribution over the vocabulary, in nats.
        change: KL divergence of a token at one state from the same token at the next read state, in nats (N - 1
            entries).
        top: the tokens that most often come first, as (token id, share).
    """

    samples: int
    rows: int
    entropy: Curve
    change: Curve
    top: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Divergence(Result):
    """How the distributions of two kinds differ at the same state, in nats; sequences have one entry per state.

    Attributes:
        all_pairs: mean KL over all pairs of a token of the first kind and a token of the second, of any samples.
        matched: the same over pairs from one sample.
        jensen_shannon: divergence of the two kinds' mean distributions, between 0 and log 2.
    """

    all_pairs: tuple[float, ...]
    matched: Curve
    jensen_shannon: tuple[float, ...]


@dataclass(frozen=True)
class Example(Result):
    """One kept sample's tokens of one kind: `rows[row][state]` are its top token ids, `shares` their probabilities."""

    kind: str
    positions: tuple[int, ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]

    def table(self, tokenizer: Any, states: Sequence[int]) -> str:
        """A logit-lens table a person can read: one line per token, one column per state, the first token and its
        share.

        Args:
            tokenizer: anything with `decode([id])`.
            states: of the result the example is part of.
        """
        cells = [["row", *(f"state {state}" for state in states)]]
        for position, tokens, shares in zip(self.positions, self.tokens, self.shares, strict=True):
            words = [repr(tokenizer.decode([t[0]]))[1:-1] for t in tokens]
            cells.append([str(position), *(f"{word} {100 * s[0]:.0f}%" for word, s in zip(words, shares, strict=True))])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells
        )


@dataclass(frozen=True)
class LensResult(Result):
    """What the unembedding reads.

    Attributes:
        states: of the stream that were read: 0 is the decoder's input, the last the output of its last block.
        vocabulary: V; the entropy of a uniform distribution is log V.
        kinds: by kind.
        divergence: by ordered pair, "image||text" being KL(image || text).
        examples: tokens of a few samples, to be read.
    """

    states: tuple[int, ...]
    vocabulary: int
    kinds: dict[str, KindLens]
    divergence: dict[str, Divergence]
    examples: tuple[Example, ...]
    continued_forwards: int
    settings: dict[str, Any]


@register
@dataclass(eq=False, kw_only=True)
class VocabularyLens(StateProbe):
    """Reads tokens of the residual stream through the host's final norm and head, as if each state were the last.

    Tokens of different kinds are compared over all pairs, by means of distributions and of log-probabilities: mean
    KL(p || q) over pairs is - mean entropy of p - <mean p, mean log q>. Sums take 3 * kinds * states * V * 8 bytes
    (150,000 tokens, 9 states, 2 kinds: 65 MB).

    Attributes:
        states: of the stream to read, negative ones counted from the last; nine evenly spaced ones when None.
        text: the token set taken for text.
        tokens_per_kind: tokens read per sample and kind, evenly spaced.
        skip_first: leave out a sample's first token, the usual attention sink.
        top: tokens kept per token of an example.
        examples: samples kept to be read.
    """

    name: ClassVar[str] = "vocabulary_lens"

    states: tuple[int, ...] | None = None
    text: str = "text"
    tokens_per_kind: int = 4
    skip_first: bool = True
    top: int = 5
    examples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        token_sets.check(self.text, "text")
        if self.sites != ("stream",):
            raise UsageError("the lens reads the stream", remedy='leave sites at ("stream",)')
        if min(self.tokens_per_kind, self.top, self.examples) < 1:
            raise UsageError("tokens_per_kind, top and examples must be at least 1")

    def capacity(self, name: str) -> int:
        return self.examples if name == "examples" else self.keep

    def token_sets(self) -> tuple[str, ...]:
        return (self.text,)

    # -- listening ------------------------------------------------------------------------------------------------

    def read(self, view: LayerView, notes: dict[Any, Any], site: str, state: int, hidden: Tensor) -> None:
        anatomy = view.ctx.anatomy
        if "tokens" not in notes:
            notes["tokens"] = self._choose(view.ctx.tokens)
            notes["states"] = self._read_states(anatomy.num_layers + 1)
        sample, token, _, _ = notes["tokens"]
        if state not in notes["states"] or not len(sample):
            return
        if view.present is not None and not bool(view.present.cpu()[sample, token].all()):
            raise SeamError(
                f"some of the tokens that are read are not left in decoder layer {view.layer}",
                remedy="measure without the hook that takes tokens out, or read other states",
            )
        rows = hidden[sample.to(hidden.device), token.to(hidden.device)].to(_dtype_of(anatomy))
        log_q = torch.cat([log_probabilities(anatomy, part) for part in rows.split(_CHUNK)])  # (M, V)
        q = log_q.exp()
        previous = notes.get("previous")
        notes["read", state] = {
            "q": self._per_sample(notes, q),
            "log_q": self._per_sample(notes, log_q),
            "entropy": _cross_entropy(q, log_q),
            "top": torch.topk(q, min(self.top, q.shape[-1]), dim=-1),
        }
        if previous is not None:
            held_q, held_log_q = (x.to(q.device) for x in previous)
            notes["read", state]["change"] = _cross_entropy(held_q, log_q) - _cross_entropy(held_q, held_log_q)
        notes["previous"] = (q, log_q)

    def _choose(self, tokens: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(M,) sample, token, kind (index into GROUPS) and slot of the tokens to read."""
        picks = []
        for kind, chosen in groups(tokens, self.text, skip_first=self.skip_first).items():
            for number, places in enumerate(chosen.cpu()):
                where = places.nonzero()[:, 0].tolist()
                count = min(len(where), self.tokens_per_kind)
                picks += [(number, where[i * len(where) // count], GROUPS.index(kind), i) for i in range(count)]
        sample, token, group, slot = torch.tensor(picks, dtype=torch.int64).reshape(-1, 4).unbind(dim=1)
        return sample, token, group, slot

    def _per_sample(self, notes: dict[Any, Any], values: Tensor) -> Tensor:
        """(B * kinds present, V) means over each sample's tokens of a kind, in the order of `_cells`."""
        if "cells" not in notes:
            notes["cells"] = _cells(notes["tokens"])
        cell, count = notes["cells"][0].to(values.device), notes["cells"][1].to(values)
        sums = values.new_zeros(len(count), values.shape[-1]).index_add_(0, cell, values)
        return sums / count[:, None]

    def _read_states(self, count: int) -> list[int]:
        if self.states is None:
            return sorted({round(i * (count - 1) / 8) for i in range(9)})
        if any(not -count <= state < count for state in self.states):
            raise UsageError(f"the stream has states 0 to {count - 1}, not {self.states}")
        return sorted({state % count for state in self.states})

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        sample, _, kind, _ = notes["tokens"]
        if not len(sample):
            return
        states = notes["states"]
        self.tally.raise_peak("stream", forward.anatomy.num_layers + 1)
        read = [notes["read", state] for state in states]
        cell, count = _cells(notes["tokens"])
        first = torch.zeros_like(count).scatter_reduce(0, cell, torch.arange(len(cell)), "amin", include_self=False)
        owner, kinds = sample[first], kind[first]  # of each cell
        q, log_q = (torch.stack([r[name] for r in read], dim=1).double().cpu() for name in ("q", "log_q"))
        entropy = _mean(torch.stack([r["entropy"] for r in read], dim=1).double().cpu(), cell, count)  # (cells, N)
        changes = [r["change"] for r in read[1:]]
        change = torch.stack(changes, dim=1).double().cpu() if changes else torch.zeros(len(cell), 0).double()
        change = _mean(change, cell, count)
        firsts = torch.stack([r["top"].indices[:, 0] for r in read], dim=1).cpu()  # (M, N)
        for k in kinds.unique().tolist():
            mine, name = kinds == k, GROUPS[k]
            self.tally.add(f"samples/{name}", int(mine.sum()))
            self.tally.add(f"rows/{name}", int(count[mine].sum()))
            for key, values in (("q", q), ("log_q", log_q), ("entropy", entropy), ("change", change)):
                self.tally.add(f"{key}/{name}", values[mine].sum(dim=0))
            weight = (1 / count[cell].double()) * (kind == k)
            hits = torch.stack(
                [torch.bincount(firsts[:, i], weights=weight, minlength=q.shape[-1]) for i in range(len(states))]
            )
            self.tally.add(f"first/{name}", hits)
            self.reservoir(f"summary/{name}").offer({"entropy": entropy[mine].float(), "change": change[mine].float()})
        self._add_pairs(owner, kinds, q, log_q, entropy)
        self._add_examples(forward.tokens, notes)

    def _add_pairs(self, owner: Tensor, kinds: Tensor, q: Tensor, log_q: Tensor, entropy: Tensor) -> None:
        """Add the divergence between kinds within each sample."""
        for k in kinds.unique().tolist():
            if GROUPS[k] == TEXT:
                continue
            for a, b in ((k, GROUPS.index(TEXT)), (GROUPS.index(TEXT), k)):
                same = (kinds == a)[:, None] & (kinds == b) & (owner[:, None] == owner)
                x, y = same.nonzero(as_tuple=True)
                if len(x):
                    kl = -entropy[x] - (q[x] * log_q[y]).nan_to_num(neginf=-math.inf).sum(dim=-1)
                    key = f"{GROUPS[a]}||{GROUPS[b]}"
                    self.tally.add(f"both/{key}", len(x))
                    self.tally.add(f"matched/{key}", kl.sum(dim=0))
                    self.reservoir(f"pair/{key}").offer({"kl": kl.float()})

    def _add_examples(self, tokens: TokenMap, notes: dict[Any, Any]) -> None:
        """Offer each sample's tokens, with their top tokens, to be kept as an example."""
        sample, token, kind, slot = notes["tokens"]
        tops = [notes["read", state]["top"] for state in notes["states"]]
        shape = (tokens.shape[0], len(GROUPS), self.tokens_per_kind)
        ids = torch.full((*shape, len(tops), tops[0].indices.shape[-1]), -1, dtype=torch.int32)
        shares = torch.zeros(ids.shape)
        positions = torch.full(shape, -1, dtype=torch.int32)
        ids[sample, kind, slot] = torch.stack([t.indices for t in tops], dim=1).int().cpu()
        shares[sample, kind, slot] = torch.stack([t.values for t in tops], dim=1).float().cpu()
        positions[sample, kind, slot] = tokens.position.cpu()[sample, token].int()
        used = (positions >= 0).flatten(1).any(dim=1)
        entries = {"tokens": ids[used], "shares": shares[used], "positions": positions[used]}
        self.reservoir("examples").offer(entries)

    # -- answering ------------------------------------------------------------------------------------------------

    def result(self, how: Resampling = DEFAULT) -> LensResult:
        kinds = [kind for kind in GROUPS if self.tally.count(f"samples/{kind}")]
        if not kinds:
            raise UsageError("no sample was measured", remedy="run the model inside `with probe.on(model):`")
        keys = [key for a in kinds for b in kinds if self.tally.count(f"both/{(key := f'{a}||{b}')}")]
        return LensResult(
            states=tuple(self._read_states(int(self.tally.peaks["stream"]))),
            vocabulary=self.tally.sums[f"q/{kinds[0]}"].shape[-1],
            kinds={kind: self._kind(kind, how) for kind in kinds},
            divergence={key: self._divergence(key, how) for key in keys},
            examples=self._examples(),
            continued_forwards=self.continued_forwards,
            settings=self.settings,
        )

    def _kind(self, kind: str, how: Resampling) -> KindLens:
        samples, kept = self.tally.count(f"samples/{kind}"), self.reservoir(f"summary/{kind}")
        weights = how.weights(len(kept), samples)

        def curve(name: str) -> Curve:
            exact = self.tally.sums[f"{name}/{kind}"].numpy() / samples
            return how.curve(means(weights, kept.entries[name].double().numpy()), exact)

        share = self.tally.sums[f"first/{kind}"] / samples
        hits = torch.topk(share, min(self.top, share.shape[-1]), dim=-1)
        return KindLens(
            samples=samples,
            rows=self.tally.count(f"rows/{kind}"),
            entropy=curve("entropy"),
            change=curve("change"),
            top=tuple(
                tuple((t, s) for t, s in zip(ids, shares, strict=True) if s > 0)
                for ids, shares in zip(hits.indices.tolist(), hits.values.tolist(), strict=True)
            ),
        )

    def _divergence(self, key: str, how: Resampling) -> Divergence:
        a, b = key.split("||")
        sums, n_a, n_b = self.tally.sums, self.tally.count(f"samples/{a}"), self.tally.count(f"samples/{b}")
        q_a, q_b = sums[f"q/{a}"].numpy() / n_a, sums[f"q/{b}"].numpy() / n_b
        with np.errstate(invalid="ignore"):
            crossed = np.where(q_a > 0, q_a * sums[f"log_q/{b}"].numpy() / n_b, 0).sum(axis=-1)
        both, kept = self.tally.count(f"both/{key}"), self.reservoir(f"pair/{key}")
        replicates = means(how.weights(len(kept), both), kept.entries["kl"].double().numpy())
        middle = (q_a + q_b) / 2
        return Divergence(
            all_pairs=tuple((-sums[f"entropy/{a}"].numpy() / n_a - crossed).tolist()),
            matched=how.curve(replicates, sums[f"matched/{key}"].numpy() / both),
            jensen_shannon=tuple((_entropy(middle) - (_entropy(q_a) + _entropy(q_b)) / 2).tolist()),
        )

    def _examples(self) -> tuple[Example, ...]:
        entries = self.reservoir("examples").entries
        found = []
        for tokens, shares, positions in zip(*(entries[n] for n in ("tokens", "shares", "positions")), strict=True):
            for kind, name in enumerate(GROUPS):
                used = positions[kind] >= 0
                if bool(used.any()):
                    found.append(
                        Example(
                            kind=name,
                            positions=tuple(positions[kind][used].tolist()),
                            tokens=_tuples(tokens[kind][used].tolist()),
                            shares=_tuples(shares[kind][used].tolist()),
                        )
                    )
        return tuple(found)


def log_probabilities(anatomy: Anatomy, rows: Tensor) -> Tensor:
    """(M, V) log-probabilities, at least float32, that the host's final norm and head give tokens (M, d) of the stream.

    Raises:
        HostError: a host without a head, or one with a projection between norm and head.
    """
    head, norm = anatomy.head, anatomy.final_norm
    if head is None or head.get_parameter("weight").shape[-1] != rows.shape[-1]:
        raise HostError(
            f"{type(anatomy.host).__name__} has no head that reads its {rows.shape[-1]}-wide stream",
            remedy="use a model with a language-model head of the stream's width",
        )
    logits = head(rows if norm is None else norm(rows))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # transformers scales (Cohere, Granite) and caps logits in the text model's own class; the multimodal classes leave
    # the head bare
    if anatomy.host.config is anatomy.config:
        logits = logits * (getattr(anatomy.config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(anatomy.config, "logits_scaling", None) or 1.0)
        cap = getattr(anatomy.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, dim=-1)


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """(M,) mean of -log p under q, distributions over V; a token of probability 0 under q adds nothing."""
    found = -torch.linalg.vecdot(q, log_p)
    # 0 * -inf is NaN, which a vocabulary with masked tokens would give
    return -(q * log_p.masked_fill(q == 0, 0.0)).sum(dim=-1) if bool(found.isnan().any()) else found


def _dtype_of(anatomy: Anatomy) -> torch.dtype:
    return next(anatomy.head.parameters()).dtype if anatomy.head is not None else torch.float32


def _cells(rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(M,) number of the (sample, kind) cell a token belongs to, and (cells,) tokens per cell."""
    sample, _, kind, _ = rows
    _, cell, count = torch.unique(sample * len(GROUPS) + kind, return_inverse=True, return_counts=True)
    return cell, count


def _mean(values: Tensor, cell: Tensor, count: Tensor) -> Tensor:
    """(cells, N) means of (M, N) over the tokens of each cell."""
    return values.new_zeros(len(count), values.shape[1]).index_add_(0, cell, values) / count[:, None]


def _entropy(q: Array) -> Array:
    """(...,) entropy of distributions (..., V), in nats."""
    return -(q * np.log(np.where(q > 0, q, 1))).sum(axis=-1)


def _tuples(nested: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(item) if isinstance(item, list) else item for item in nested)
