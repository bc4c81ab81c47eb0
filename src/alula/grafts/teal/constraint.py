"""Which ids may come next: text alone, or items of a kind and length, one after the other or between words.

What was generated so far says all there is to know, so beams may be reordered and samples finish when they like.

Shapes: R rows (samples, or beams of them side by side), S tokens, V ids of the joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from alula.codes import JointVocabulary
from alula.errors import UsageError

NOTHING = -1
"""in a plan: no further item"""
_TEXT, _UNENDED = 0, 1


class CodeConstraint(LogitsProcessor):
    """Scores of ids that may not come next become minus infinity.

    Within an item its codes alone may come, as many as an item has, and then its end. Outside, text. Where other
    constraints (of repeated n-grams, of suppressed tokens) leave nothing of what may come, all of it may.

    Args:
        vocabulary: of text and codes.
        prompt: tokens of the prompt, padding included.
        plan: (B, n) int64: for each sample the numbers of the ranges to be generated, in order; `NOTHING` behind the
            last. None: text alone.
        interleaved: (B,) bool: items come when the model begins them, with words between; the answer cannot end before
            they all have. Otherwise they come at once, one after the other, and words behind them. None: for none.
        stops: ids that end an answer. `TealGraft` takes those among the inputs of `generation_extras`
            (``eos_token_id``, or ``generation_config``), otherwise those of the model's own generation settings; ids
            that `generate` alone is told are words to it, and end an interleaved answer before its items have come.

    Raises:
        UsageError: the plan names a range that is not there.
    """

    def __init__(
        self,
        vocabulary: JointVocabulary,
        prompt: int,
        plan: Tensor | None = None,
        interleaved: Tensor | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        kinds = len(vocabulary.ranges)
        if plan is not None and plan.numel() and not (int(plan.min()) >= NOTHING and int(plan.max()) < kinds):
            raise UsageError(
                f"items of the kinds {plan.tolist()}, where there are 0 to {kinds - 1}",
                where="generates",
                remedy=f"give numbers of {', '.join(vocabulary.names)}, in this order, and -1 for none",
            )
        self.vocabulary, self.prompt = vocabulary, prompt
        self.plan, self.interleaved = plan, interleaved
        self._window = max((each.length for each in vocabulary.ranges), default=0)
        self._stops = [*stops]
        self._build()
        self._schedule = self._scheduled() if plan is not None and interleaved is None else None

    def _build(self) -> None:
        vocabulary = self.vocabulary
        rows = [self._allowing((0, vocabulary.text)), self._allowing((0, vocabulary.text))]
        rows[_UNENDED][self._stops] = True
        first: list[list[int]] = []
        for each in vocabulary.ranges:
            mixed = rows[_UNENDED].clone()
            mixed[each.begin] = False
            step = each.size // each.streams
            rows += [self._allowing((each.begin, each.begin + 1)), mixed, self._allowing((each.end, each.end + 1))]
            first.append([len(rows) - 3, len(rows) - 2, len(rows) - 1, len(rows)])
            for stream in range(each.streams):
                start = each.first + stream * step
                rows.append(self._allowing((start, start + step)))
        self._table = torch.stack(rows)
        self._first = torch.tensor(first).view(-1, 4)  # rows of each range: begin, words or begin, end, first stream
        self._begins = torch.tensor([each.begin for each in vocabulary.ranges])
        self._tokens = torch.tensor([each.tokens for each in vocabulary.ranges])
        self._streams = torch.tensor([each.streams for each in vocabulary.ranges])
        self._number = torch.full((vocabulary.size,), -1)
        self._is_end = torch.zeros(vocabulary.size, dtype=torch.bool)
        for number, each in enumerate(vocabulary.ranges):
            self._number[each.begin] = number
            self._is_end[each.end] = True

    def _scheduled(self) -> Tensor:
        """(B, L) rows of the table from the first id on, where items come at once: nothing said changes that."""
        assert self.plan is not None
        first, schedules = self._first.tolist(), []
        for numbers in self.plan.tolist():
            states: list[int] = []
            for number in numbers:
                if number != NOTHING:
                    its, (begin, _, end, stream) = self.vocabulary.ranges[number], first[number]
                    states += [begin, *(stream + code % its.streams for code in range(its.tokens)), end]
            schedules.append(states)
        longest = max(map(len, schedules), default=0)
        return torch.tensor([states + [_TEXT] * (longest - len(states)) for states in schedules])

    def _allowing(self, ids: tuple[int, int]) -> Tensor:
        forbidden = torch.ones(self.vocabulary.size, dtype=torch.bool)
        forbidden[slice(*ids)] = False
        return forbidden

    def _to(self, device: torch.device) -> None:
        if self._table.device != device:
            for name, value in list(vars(self).items()):
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) scores of (R, S) ids so far, the prompt's included."""
        self._to(scores.device)
        if self.plan is None:
            return scores.masked_fill(self._table[_TEXT], -torch.inf)
        forbidden = self._table[self._states(input_ids[:, self.prompt :])]
        left = scores.masked_fill(forbidden, -torch.inf)
        is_stuck = left.amax(dim=-1, keepdim=True) == -torch.inf
        return torch.where(is_stuck & ~forbidden, 0, left)

    def _states(self, said: Tensor) -> Tensor:
        """(R,) which row of the table holds."""
        assert self.plan is not None
        count, length = said.shape
        beams = count // len(self.plan)
        if self._schedule is not None:
            if length >= self._schedule.shape[1]:
                return self._schedule.new_full((count,), _TEXT)
            states = self._schedule[:, length]
            return states if beams == 1 else states.repeat_interleave(beams)
        plan = self.plan if beams == 1 else self.plan.repeat_interleave(beams, dim=0)
        outside = self._outside(said, plan, beams)
        if length == 0:
            return outside
        window = said[:, -self._window :]
        number = self._number[window]
        places = torch.arange(1, window.shape[1] + 1, device=said.device)
        last = (places * (number >= 0)).amax(dim=1)  # of the begin, counted from 1; 0: none
        kind = number.gather(1, (last - 1).clamp_min(0)[:, None])[:, 0].clamp_min(0)
        since = window.shape[1] - last
        tokens = self._tokens[kind]
        within = self._first[kind, 3] + since % self._streams[kind]
        state = torch.where(since < tokens, within, self._first[kind, 2])
        return torch.where((last > 0) & (since <= tokens), state, outside)

    def _outside(self, said: Tensor, plan: Tensor, beams: int) -> Tensor:
        """(R,) where no item is under way."""
        done = self._is_end[said].sum(dim=1, keepdim=True)
        wanted = plan.gather(1, done.clamp_max(plan.shape[1] - 1))[:, 0]
        wanted = torch.where(done[:, 0] < plan.shape[1], wanted, NOTHING)
        begin = self._first[wanted.clamp_min(0), 0]
        if self.interleaved is not None:
            free = self.interleaved if beams == 1 else self.interleaved.repeat_interleave(beams)
            begin = begin + free.to(begin.dtype)  # the row of words or begin stands behind that of begin alone
        return torch.where(wanted >= 0, begin, _TEXT)
