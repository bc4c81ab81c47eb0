"""Vocabulary lens: what the unembedding reads in tokens of each kind, state by state (IMA, section 2.5).

Shapes: B samples of a batch, S tokens, K kinds, T tokens read of each, M tokens, V vocabulary, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.probes import token_sets
from alula.probes.registry import register
from alula.probes.states import GROUPS, TEXT, StateProbe, groups, room, wide
from alula.seam import ForwardContext, LayerView
from alula.seam.view import gather
from alula.stats import DEFAULT, Array, Curve, Resampling, Result, means


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
        """A logit-lens table a person can read: one line per token of its kind, one column per state, the
        first token and its share.

        Args:
            tokenizer: anything with `decode([id])`.
            states: of the result the example is part of.
        """
        cells = [[f"{self.kind} token", *(f"state {state}" for state in states)]]
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
    (150,000 tokens, 9 states, 2 kinds: 65 MB). During a forward the states of the tokens that are read are held; at its
    end head and norm read all of them at once, or of as many samples as take 256 MiB (on a CPU 1 MiB) to read.

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
        if "chosen" not in notes:
            notes["chosen"] = self._choose(view.ctx)
            notes["states"] = self._read_states(view.ctx.anatomy.num_layers + 1)
        if state not in notes["states"]:
            return
        chosen: _Chosen = notes["chosen"]
        if view.present is not None and bool((chosen.live & ~chosen.pick(view.present)).any()):
            raise SeamError(
                f"some of the tokens that are read are not left in decoder layer {view.layer}",
                remedy="measure without the hook that takes tokens out, or read other states",
            )
        notes["rows", state] = chosen.pick(hidden)

    def _choose(self, forward: ForwardContext) -> _Chosen:
        """The tokens to read: of n tokens of a kind, the i n / T th for all i < T; all of fewer than T."""
        sets = groups(forward, self.text, skip_first=self.skip_first)
        found = torch.stack([*sets.values()], dim=1).cumsum(dim=-1)  # (B, K, S) how many stand here or before
        count, slots = found[..., -1:], self.tokens_per_kind
        slot, some = torch.arange(slots, device=found.device), count.clamp(min=1)
        ordinal = torch.where(count < slots, slot % some, slot * count // slots)  # (B, K, T)
        # of fewer than T, those in front are read more than once and weigh as much less
        times = torch.where(count < slots, (slots - 1 - ordinal) // some + 1, 1)
        return _Chosen(
            kinds=tuple(sets),
            index=torch.searchsorted(found, ordinal + 1).clamp(max=found.shape[-1] - 1),
            live=slot < count,
            weight=(count > 0) / (times * some.clamp(max=slots)).double(),
        )

    def _read_states(self, count: int) -> list[int]:
        if self.states is None:
            return sorted({round(i * (count - 1) / 8) for i in range(9)})
        if any(not -count <= state < count for state in self.states):
            raise UsageError(f"the stream has states 0 to {count - 1}, not {self.states}")
        return sorted({state % count for state in self.states})

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        anatomy, chosen, states = forward.anatomy, notes["chosen"], notes["states"]
        self.tally.raise_peak("stream", anatomy.num_layers + 1)
        head = head_of(anatomy, notes["rows", states[0]].shape[-1]).get_parameter("weight")
        rows = torch.stack([notes["rows", state].to(head.device, head.dtype) for state in states])  # (N, B, K, T, d)
        of_sample = rows[:, 0].numel() // rows.shape[-1] * head.shape[0] * wide(head.dtype).itemsize
        # what is read of a token at all states is compared, so it is samples that are taken some at a time
        some = max(1, room(rows.device) // of_sample)
        for first in range(0, rows.shape[1], some):
            samples = slice(first, first + some)
            self._add(anatomy, rows[:, samples], chosen.of(samples), forward.tokens.position[samples])

    def _add(self, anatomy: Anatomy, rows: Tensor, chosen: _Chosen, position: Tensor) -> None:
        """Add some samples.

        Args:
            rows: (N, B, K, T, d) the states of the chosen tokens.
            position: (B, S) of all tokens.
        """
        log_q = log_probabilities(anatomy, rows.flatten(0, 3)).view(*rows.shape[:4], -1)  # (N, B, K, T, V)
        # 0 * -inf is NaN, which a vocabulary with masked tokens would give
        log_q.clamp_(min=torch.finfo(log_q.dtype).min)
        q = log_q.exp()
        weight, here = chosen.weight.to(q.device), chosen.here.to(q.device)  # (B, K, T), (B, K)
        entropy = _cross_entropy(q, log_q)  # (N, B, K, T)
        change = (_cross_entropy(q[:-1], log_q[1:]) - entropy[:-1]).double()
        top = torch.topk(q, min(self.top, q.shape[-1]), dim=-1)
        # means over a sample's tokens of a kind, (N, B, K, V) and (N, B, K)
        q, log_q = ((weight[:, :, None].to(x) @ x)[..., 0, :].double() for x in (q, log_q))
        entropy, change = ((x.double() * weight).sum(dim=-1) for x in (entropy, change))
        hits = q.new_zeros(len(q), q.shape[2], q.shape[-1])
        firsts = top.indices[..., 0].transpose(1, 2).flatten(2)  # (N, K, B * T)
        hits.scatter_add_(2, firsts, weight.transpose(0, 1).flatten(1).expand_as(firsts))
        samples, tokens = here.sum(dim=0), chosen.live.sum(dim=(0, 2))
        totals = {
            **{
                name: x.sum(dim=1) for name, x in (("q", q), ("log_q", log_q), ("entropy", entropy), ("change", change))
            },
            "first": hits,
        }
        for k, kind in enumerate(chosen.kinds):
            self.tally.add(f"samples/{kind}", samples[k])
            self.tally.add(f"rows/{kind}", tokens[k])
            for name, total in totals.items():
                self.tally.add(f"{name}/{kind}", total[:, k])
            summary = {"entropy": entropy[:, :, k], "change": change[:, :, k]}
            summary = {name: values.transpose(0, 1).float().contiguous() for name, values in summary.items()}
            self.reservoir(f"summary/{kind}").offer(summary, here[:, k])
        self._add_pairs(chosen.kinds, here, q, log_q, entropy)
        self._add_examples(chosen, top, position)

    def _add_pairs(self, kinds: tuple[str, ...], here: Tensor, q: Tensor, log_q: Tensor, entropy: Tensor) -> None:
        """Add the divergence between kinds within each sample."""
        text = kinds.index(TEXT)
        for k in range(len(kinds)):
            if k == text:
                continue
            both = here[:, k] & here[:, text]
            for a, b in ((k, text), (text, k)):
                kl = (-entropy[:, :, a] - (q[:, :, a] * log_q[:, :, b]).sum(dim=-1)).masked_fill(~both, 0)  # (N, B)
                key = f"{kinds[a]}||{kinds[b]}"
                self.tally.add(f"both/{key}", both.sum())
                self.tally.add(f"matched/{key}", kl.sum(dim=1))
                self.reservoir(f"pair/{key}").offer({"kl": kl.t().float().contiguous()}, both)

    def _add_examples(self, chosen: _Chosen, top: Any, position: Tensor) -> None:
        """Offer each sample's tokens, with their top tokens, to be kept as an example."""
        dead = ~chosen.live.to(top.indices.device)
        entries = {
            "tokens": top.indices.movedim(0, 3).int().masked_fill(dead[..., None, None], -1),
            "shares": top.values.movedim(0, 3).float().masked_fill(dead[..., None, None], 0),
            "positions": position.gather(1, chosen.index.flatten(1)).view_as(chosen.index).int().to(dead.device),
        }
        entries["positions"] = entries["positions"].masked_fill(dead, -1)
        places = [GROUPS.index(kind) for kind in chosen.kinds]
        for name, values in entries.items():
            every = values.new_full((len(values), len(GROUPS), *values.shape[2:]), 0 if name == "shares" else -1)
            for k, place in enumerate(places):
                every[:, place] = values[:, k]
            entries[name] = every
        self.reservoir("examples").offer(entries, chosen.here.any(dim=1))

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
            for kind, name in enumerate(GROUPS[: len(positions)]):  # earlier files have places for fewer media
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


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The tokens that are read.

    Attributes:
        kinds: K names.
        index: (B, K, T) of them among the forward's tokens. Of fewer than T, some are there more than once.
        live: (B, K, T) bool: the token is there for the first time.
        weight: (B, K, T) float64, its share in the mean over its sample's tokens of its kind.
    """

    kinds: tuple[str, ...]
    index: Tensor
    live: Tensor
    weight: Tensor

    @property
    def here(self) -> Tensor:
        """(B, K) bool: the sample has tokens of the kind."""
        return self.live[..., 0]

    def pick(self, values: Tensor) -> Tensor:
        """(B, K, T, ..) from the (B, S, ..) of all tokens."""
        return gather(values, self.index.flatten(1)).view(*self.index.shape, *values.shape[2:])

    def of(self, samples: slice) -> _Chosen:
        """Those of some samples."""
        return _Chosen(self.kinds, self.index[samples], self.live[samples], self.weight[samples])


def head_of(anatomy: Anatomy, width: int) -> nn.Module:
    """The host's head.

    Raises:
        HostError: a host without a head, or one with a projection between norm and head.
    """
    head = anatomy.head
    if head is None or head.get_parameter("weight").shape[-1] != width:
        raise HostError(
            f"{type(anatomy.host).__name__} has no head that reads its {width}-wide stream",
            remedy="use a model with a language-model head of the stream's width",
        )
    return head


def log_probabilities(anatomy: Anatomy, rows: Tensor) -> Tensor:
    """(M, V) log-probabilities, at least float32, that the host's final norm and head give tokens (M, d) of the stream.

    Raises:
        HostError: a host without a head, or one with a projection between norm and head.
    """
    head, norm = head_of(anatomy, rows.shape[-1]), anatomy.final_norm
    logits = head(rows if norm is None else norm(rows))
    return torch.log_softmax(anatomy.logits(logits.to(wide(logits.dtype))), dim=-1)


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """(...,) mean of -log p under q, distributions (..., V)."""
    return -torch.linalg.vecdot(q, log_p)


def _entropy(q: Array) -> Array:
    """(...,) entropy of distributions (..., V), in nats."""
    return -(q * np.log(np.where(q > 0, q, 1))).sum(axis=-1)


def _tuples(nested: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(item) if isinstance(item, list) else item for item in nested)
