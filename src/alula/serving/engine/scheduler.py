"""One thread that computes: prompts a piece at a time, and a step of every batch, in turn.

What cannot be computed together goes to a second thread, one after another, beside it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from alula.seam.joining import is_forkable, kind, sample_bytes
from alula.serving.engine import alone
from alula.serving.engine.batch import Batch, Row
from alula.serving.engine.errors import EngineClosed, QueueFull, RequestError
from alula.serving.engine.job import Job
from alula.serving.engine.prefill import Prefill, fits, goes_in_pieces, start_of_rest, together
from alula.serving.engine.prefixes import Prefixes
from alula.serving.engine.request import Limits
from alula.serving.engine.resident import Resident
from alula.serving.engine.sampling import draw

_log = logging.getLogger(__name__)
_SWEEP = 0.05
"""seconds after which those that wait are looked at again, cancelled or late, while nothing is computed here"""


class Scheduler:
    """Computes jobs.

    Args:
        limits: how many at once, and what is kept of prefixes.
        on_end: called with each job when its answer is over.
    """

    def __init__(self, limits: Limits, on_end: Callable[[Job], None]) -> None:
        self._limits, self._on_end = limits, on_end
        self._piece = limits.prefill_tokens
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._gone: deque[Resident] = deque()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="alula-alone")
        self._together: set[Job] = set()
        self._alone: set[Job] = set()
        self._turns: dict[str, int] = {}  # by name of a model, when one of its requests was computed alone last
        self._prefilling: deque[tuple[Job, Prefill]] = deque()
        self._batches: list[Batch] = []
        self._in_hand: list[Job] = []  # of which a fault would find no trace elsewhere
        self._prefixes = Prefixes(limits.prefix_tokens, limits.prefix_bytes)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are computed now."""
        return len(self._together) + len(self._alone)

    @property
    def kept_bytes(self) -> int:
        """What is kept of finished ones for further turns."""
        return self._prefixes.bytes

    @property
    def room(self) -> int:
        """How many more may be computed together."""
        return max(0, self._limits.running - len(self._together))

    def put(self, job: Job) -> None:
        """Have a job computed.

        Raises:
            EngineClosed: it is closed. QueueFull: too many wait to be computed alone.
        """
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            if job.is_alone and sum(each.is_alone for each in self._waiting) >= self._most_alone:
                raise QueueFull(
                    f"{self._most_alone} requests that are computed one by one wait already", remedy="try again later"
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="alula-engine", daemon=True)
                self._thread.start()
            self._waiting.append(job)
            self._changed.notify_all()

    def forget(self, resident: Resident) -> None:
        """Let go of what a model left; it has no jobs any more."""
        with self._changed:
            self._turns.pop(resident.served.name, None)
            if self._thread is None:  # nothing was ever computed
                return
            self._gone.extend(resident.trees)
            self._changed.notify_all()

    def close(self) -> None:
        """End all jobs by an `EngineClosed`, and the threads, once the forwards that they are in are over."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for job in list(self._alone):
            job.answer.interrupt(_closed())
        if self._thread is not None:
            self._thread.join()
        self._beside.shutdown()

    # -- the thread ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loop(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # no request is known to be at fault: those that are on their way end
                self._fail_running(error)
            self._in_hand = []
        closed = _closed()
        self._fail_running(closed)
        left, self._waiting = list(self._waiting), deque()
        for job in left:
            self._fail(job, closed)

    def _turn(self) -> None:
        self._sweep()
        self._admit()
        self._prefill()
        for batch in list(self._batches):
            self._step(batch)

    def _fail_running(self, error: Exception) -> None:
        jobs = [*self._in_hand, *(job for job, _ in self._prefilling)]
        jobs += [row.job for batch in self._batches for row in batch.rows]
        self._prefilling, self._batches = deque(), []
        for job in jobs:
            self._fail(job, error)

    def _wait(self) -> bool:
        """Wait for something to do; False: it is closed."""
        with self._changed:
            while not (self._is_closed or self._can_begin or self._gone or self._prefilling or self._batches):
                self._changed.wait(_SWEEP if self._waiting else None)
                if self._waiting:
                    break
            while self._gone:
                self._prefixes.forget(self._gone.popleft())
            return not self._is_closed

    @property
    def _can_begin(self) -> bool:
        """Whether something waits that there is room for."""
        return any(self._has_room(job) for job in self._waiting)

    def _has_room(self, job: Job) -> bool:
        """Whether a job may begin: one beside, and as many as may be computed together."""
        return not self._alone if job.is_alone else self.room > 0

    @property
    def _most_alone(self) -> int:
        """How many that are computed one by one may wait: they leave the others room."""
        return max(1, self._limits.queue // 2)

    def _sweep(self) -> None:
        """End what waits, or whose prompt is on its way, and is cancelled or late."""
        with self._changed:
            late = [job for job in self._waiting if job.answer.overdue()]
            if late:
                self._waiting = deque(job for job in self._waiting if job not in late)
        begun = [job for job, _ in self._prefilling if job.answer.overdue()]
        if begun:
            self._prefilling = deque(pair for pair in self._prefilling if pair[0] not in begun)
        for job in [*late, *begun]:
            job.answer.end(job.answer.overdue() or "cancelled")
            self._end(job)

    def _admit(self) -> None:
        """Begin what there is room for. Models whose requests are computed alone have their turns."""
        waiting = list(self._waiting)
        alone = [job for job in waiting if job.is_alone]
        waiting = [job for job in waiting if not job.is_alone]
        for job in [*sorted(alone, key=lambda job: self._turns.get(job.request.model, -1)), *waiting]:
            if not self._has_room(job):
                continue
            self._take(job)
            if job.is_alone:
                self._turns[job.request.model] = 1 + max(self._turns.values(), default=-1)
                self._alone.add(job)
                self._beside.submit(self._run_alone, job)
                continue
            self._together.add(job)
            job.answer.begin()
            try:
                self._prefilling.append((job, self._begun(job)))
            except Exception as error:
                self._fail(job, error)

    def _take(self, job: Job) -> None:
        with self._changed:
            self._waiting.remove(job)

    def _begun(self, job: Job) -> Prefill:
        """The way of a job's prompt into a cache, behind what is known of it."""
        resident, prepared = job.computing, job.prepared
        if not goes_in_pieces(resident, prepared):
            return Prefill(resident, prepared, self._piece)
        cache, known = self._prefixes.found(resident, prepared.keys)
        known = start_of_rest(prepared, known)
        if cache is None or not known:
            return Prefill(resident, prepared, self._piece)
        job.answer.cached = known
        return Prefill(resident, prepared, self._piece, self._prefixes.taken(cache, known), known)

    def _prefill(self) -> None:
        """Compute pieces of prompts, in turn, and have those that are done join the batches."""
        spent = 0
        while self._prefilling and spent < self._piece:
            group = self._group()
            self._in_hand = [job for job, _ in group]
            spent += len(group) * max(prefill.next_count for _, prefill in group)
            if len(group) == 1 or not self._prefill_together(group):
                for job, prefill in group:
                    self._prefill_piece(job, prefill)

    def _group(self) -> list[tuple[Job, Prefill]]:
        """The next prompts: one, or several short ones that are computed at once."""
        group, left = [self._prefilling.popleft()], deque[tuple[Job, Prefill]]()
        first, prefill = group[0]
        while prefill.is_whole and self._prefilling:
            job, other = self._prefilling.popleft()
            told = [each.prepared for each, _ in group]
            is_alike = other.is_whole and job.computing is first.computing
            (group if is_alike and fits(job.prepared, told, self._piece) else left).append((job, other))
        self._prefilling.extendleft(reversed(left))
        return group

    def _prefill_together(self, group: list[tuple[Job, Prefill]]) -> bool:
        """False: it failed, and whose fault it is is not known."""
        try:
            logits, cache = together(group[0][0].computing, [job.prepared for job, _ in group])
            read = _read(group[0][0].computing)
            _, tokens = draw([job.answer.sampler for job, _ in group], logits)
        except Exception as error:
            _log.warning("%d prompts failed together, and are computed one by one: %s", len(group), error)
            return False
        batch, over = Batch(group[0][0].computing), []
        for place, ((job, _), token) in enumerate(zip(group, tokens, strict=True)):
            job.prepared = job.prepared.without_media()
            row = Row(job, job.answer.sampler, len(job.prepared.ids), 0, token)
            batch.rows.append(row)
            if self._is_over(job, logits[place], token, _own(read, place, row.length)):
                over.append(row)
        rows, batch.rows = batch.rows, []
        batch.join(rows, [cache])
        self._release(batch, over)
        if batch.rows:
            self._batches.append(batch)
            self._gather(batch.resident)
        return True

    def _prefill_piece(self, job: Job, prefill: Prefill) -> None:
        try:
            logits = prefill.step()
            if logits is None:
                self._prefilling.append((job, prefill))
                return
            read = _read(job.computing)
            _, (token,) = draw([job.answer.sampler], logits[None])
            batch = Batch(job.computing)
            batch.join([Row(job, job.answer.sampler, prefill.done, prefill.shift, token)], [prefill.cache])
        except Exception as error:
            self._fail(job, error)
            return
        job.prepared = job.prepared.without_media()
        if self._is_over(job, logits, token, _own(read, 0, prefill.done)):
            self._release(batch, batch.rows)
        else:
            self._batches.append(batch)
            self._gather(batch.resident)

    def _is_over(self, job: Job, logits: Tensor, token: int, read: Sequence[float] | None) -> bool:
        """Have an answer take a token; return whether that was its last.

        Args:
            read: shares of its attention, from the first token of the prompt on; None: they were not read.
        """
        try:
            job.answer.weigh(logits, token)
            looks = None if job.looking is None or read is None else job.looking.looks(read)
            return job.answer.take(token, looks)
        except Exception as error:  # a token that cannot be told is nobody else's
            job.answer.fail(error)
            return True

    def _release(self, batch: Batch, over: list[Row]) -> None:
        """Have answers that are over leave their batch."""
        if not over:
            return
        for row in over:
            self._keep(batch, row)
            self._end(row.job)
        try:
            batch.leave(over)
        except Exception as error:  # out of memory, at the least: what runs elsewhere goes on
            self._lose(batch, [row for row in batch.rows if row not in over], error)

    def _step(self, batch: Batch) -> None:
        try:
            logits, tokens = batch.step()
            read = _read(batch.resident)
        except Exception as error:
            self._batches.remove(batch)
            self._mend(batch, error)
            return
        told = enumerate(zip(list(batch.rows), logits, tokens, strict=True))
        over = [
            row
            for place, (row, here, token) in told
            if self._is_over(row.job, here, token, _own(read, place, row.length))
        ]
        self._release(batch, over)
        if not batch.rows:
            self._batches.remove(batch)

    def _mend(self, batch: Batch, error: Exception) -> None:
        """After a step that failed: find whose fault it is, one by one, and let the others go on."""
        rows = list(batch.rows)
        if len(rows) == 1:
            self._lose(batch, rows, error)
            return
        _log.warning("a step of %d answers failed, and is done one by one: %s", len(rows), error)
        try:
            singles = batch.split()
        except Exception as further:
            self._lose(batch, rows, further)
            return
        self._batches += singles
        for single in singles:
            self._step(single)
        self._gather(batch.resident)

    def _lose(self, batch: Batch, rows: list[Row], error: Exception) -> None:
        """End answers by an error, and let go of their batch."""
        batch.rows, batch.cache = [], None
        for row in rows:
            self._fail(row.job, error)

    def _gather(self, resident: Resident) -> None:
        """Put batches of one kind together."""
        own = [batch for batch in self._batches if batch.resident is resident]
        self._batches = [batch for batch in self._batches if batch.resident is not resident]
        for batch in own:
            wanted = kind(batch.cache)
            fitting = (each for each in self._batches if each.resident is resident and kind(each.cache) == wanted)
            into = next(fitting, None) if wanted is not None else None
            if into is None or not self._joined(into, batch):
                self._batches.append(batch)

    def _joined(self, into: Batch, batch: Batch) -> bool:
        """Whether a batch could be put into another; it stays by itself where there is no memory for both as one."""
        try:
            into.join(batch.rows, [batch.cache])
        except Exception as error:
            _log.warning("%d answers stay apart from %d: %s", len(batch.rows), len(into.rows), error)
            return False
        return True

    def _keep(self, batch: Batch, row: Row) -> None:
        """Keep what was computed for a row, for turns that go on from there."""
        prepared = row.job.prepared
        if not (goes_in_pieces(batch.resident, prepared) and is_forkable(batch.cache)):
            return
        keys, size = [*prepared.keys, *row.job.answer.tokens][: row.length], sample_bytes(batch.cache, row.length)
        try:
            self._prefixes.keep(batch.resident, keys, size, lambda: batch.cache_of(row))
        except Exception as error:  # the answer is there, and the others are on their way
            _log.warning("nothing is kept of an answer of %s: %s", batch.resident.served.name, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, EngineClosed):
            _log.warning("a request to %s failed: %s", job.request.model, error, exc_info=error)
        if job.answer.reason is None:
            job.answer.fail(error)
        self._end(job)

    def _end(self, job: Job) -> None:
        """Let go of a job, once."""
        if not job.is_over:
            job.is_over = True
            self._together.discard(job)
            self._on_end(job)

    # -- beside it ----------------------------------------------------------------------------------------------------

    def _run_alone(self, job: Job) -> None:
        try:
            if self._is_closed:
                raise _closed()
            job.answer.begin()
            reason = job.answer.overdue()
            if reason is None:
                alone.run(job.computing, job.request, job.prepared, job.answer)
            else:
                job.answer.end(reason)
        except (RequestError, EngineClosed) as error:  # theirs who asked or who closed: nothing for the log
            job.answer.fail(error)
        except Exception as error:
            _log.warning("a request to %s failed: %s", job.request.model, error, exc_info=error)
            job.answer.fail(error)
        finally:
            with self._changed:
                self._alone.discard(job)
                self._changed.notify_all()
            self._end(job)


def _read(resident: Resident) -> list[list[float]]:
    """Where the last tokens of the forward before looked, where that is read; nothing is left of it."""
    return [] if resident.gaze is None else resident.gaze.taken()


def _own(read: list[list[float]], place: int, length: int) -> list[float] | None:
    """Of a row of a batch, whose tokens stand on the right."""
    return read[place][-length:] if read else None


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed before this answer was there")
