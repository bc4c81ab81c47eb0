"""The engine: requests in, answers out, many at once."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from alula.serving.engine import alone
from alula.serving.engine.answer import Answer
from alula.serving.engine.errors import QueueFull
from alula.serving.engine.events import Preview
from alula.serving.engine.handle import Handle
from alula.serving.engine.job import Job
from alula.serving.engine.looks import Looking, previews
from alula.serving.engine.prompts import Prepared, prepare
from alula.serving.engine.request import Limits, Request
from alula.serving.engine.resident import Resident, Served
from alula.serving.engine.residents import Residents
from alula.serving.engine.scheduler import Scheduler


class Engine:
    """Answers requests to several models over shared weights.

        with Engine() as engine:
            engine.load("base", "path/to/host")
            engine.load("base+wings", "path/to/adapter")
            for event in engine.submit(Request("base+wings", messages)):
                ...

    Args:
        limits: how much is let in.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._residents = Residents()
        self._scheduler = Scheduler(self.limits, lambda job: self._residents.left(job.resident))
        self._entering = 0  # requests that are being prepared
        self._counting = threading.Lock()

    # -- models -------------------------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        bank: str | os.PathLike[str] | None = None,
        shots: int | None = None,
    ) -> Served:
        """Load a model under a name: a base, or an adapter that shares the weights of its base.

        An adapter called ``base+anything`` is put on the loaded model called ``base``; any other on the loaded one it
        was trained on. Where that is not loaded, it is loaded too, under the part before the plus or its directory's
        name.

        Args:
            name: that requests give.
            path: a directory or hub id, as `alula.load_model` takes it.
            dtype, device: of a base; an adapter has its base's.
            bank: of an adapter of method aim: the directory of the demonstrations that stand before every conversation
                (`alula.demonstrations`).
            shots: so many of these, drawn by the seed 0; None: all.

        Raises:
            UsageError: the name is taken. AdapterError, HostError: as `load_model`. BankError: as `shots_in`.
        """
        where = None if bank is None else os.fspath(bank)
        return self._residents.load(name, os.fspath(path), dtype=dtype, device=device, bank=where, shots=shots).served

    def unload(self, name: str) -> None:
        """Let go of a model when its running requests are answered; new ones are refused at once.

        Raises:
            UnknownModel: none is loaded under that name. UsageError: adapters stand on it.
        """
        self._scheduler.forget(self._residents.unload(name))

    def models(self) -> list[Served]:
        """What is loaded."""
        return self._residents.served

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return self._scheduler.waiting + self._entering

    @property
    def running(self) -> int:
        """How many requests are computed now."""
        return self._scheduler.running

    @property
    def kept_bytes(self) -> int:
        """Bytes of finished requests' caches that are kept for turns that go on from them."""
        return self._scheduler.kept_bytes

    def preview(self, request: Request) -> Preview:
        """What a request will take, without computing it.

        Raises:
            UnknownModel, RequestError: as `submit`, and as the reader of its answer is told before the first token.
        """
        resident = self._residents.entered(request.model)
        try:
            prepared = prepare(resident, request, self.limits)
            alone.check(request, prepared)
            alone.rehearse(_computing(resident, prepared), request, prepared)
            return Preview(len(prepared.ids), previews(prepared, resident.anatomy, request.image_tokens))
        finally:
            self._residents.left(resident)

    def submit(self, request: Request, *, arrived: float | None = None) -> Handle:
        """Ask for an answer. Messages are rendered and images prepared in the thread that calls.

        Args:
            arrived: when the request came, by `time.monotonic`, which its deadline and seconds are counted from; None:
                now.

        Raises:
            QueueFull: too many requests wait, or too many of those that are computed one by one. UnknownModel: no such
                model. RequestError: the request is beyond the limits, or the model cannot take it. EngineClosed: the
                engine is closed.
        """
        submitted = time.monotonic() if arrived is None else arrived
        with self._counting:
            # what there is room for does not wait, or not for long
            if self.queued - self._scheduler.room >= self.limits.queue:
                raise QueueFull(f"{self.queued} requests wait already", remedy="try again later")
            self._entering += 1
        resident = None
        try:
            resident = self._residents.entered(request.model)
            job = self._job(resident, request, submitted)
            self._scheduler.put(job)
        except BaseException:
            if resident is not None:
                self._residents.left(resident)
            raise
        finally:
            with self._counting:
                self._entering -= 1
        return job.handle

    def _job(self, resident: Resident, request: Request, submitted: float) -> Job:
        prepared = prepare(resident, request, self.limits)
        alone.check(request, prepared)
        if request.highlight is None:  # only marks are read from pictures again, which are as large as they were sent
            prepared = replace(prepared, messages=None)
            request = replace(request, messages=None, prompt=prepared.ids, template=None)
        sampling, context = request.sampling, resident.served.context
        most = min(sampling.max_tokens or self.limits.answer_tokens, self.limits.answer_tokens)
        if context is not None:
            most = min(most, context - len(prepared.ids))
        deadlines = [each for each in (request.deadline, self.limits.deadline) if each is not None]
        computing = _computing(resident, prepared)
        looking = None
        if request.attention and not request.changes_forwards and computing.served.batched:
            watched = computing.watched
            if watched is not None:
                computing, looking = watched, Looking(prepared, resident.anatomy)
        media = previews(prepared, resident.anatomy, request.image_tokens)
        handle = Handle()
        answer = Answer(
            handle,
            prepared.ids,
            sampling,
            resident.defaults,
            resident.tokenizer,
            spelling=resident.spelling if sampling.logprobs else None,
            ends=resident.ends,
            most=most,
            image_tokens=(sum(each.kept for each in media), sum(each.tokens for each in media)),
            computed_by=computing.served.name,
            deadline=min(deadlines, default=None),
            submitted=submitted,
        )
        return Job(request, prepared, resident, computing, answer, handle, looking)

    def close(self) -> None:
        """End all answers here, by an `EngineClosed`, and the threads, once the forwards that they are in are over."""
        self._scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _computing(resident: Resident, prepared: Prepared) -> Resident:
    """The model that computes a request: without media the base itself, where an adapter leaves it as it is."""
    is_base = resident.served.exact_gate and not prepared.kinds
    return resident.base if is_base and resident.base is not None else resident
