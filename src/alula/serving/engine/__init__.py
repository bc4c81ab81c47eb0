"""Answers from models over shared weights, many at once. No HTTP in here: it is used from Python as from a server."""

from alula.serving.engine.engine import Engine
from alula.serving.engine.errors import EngineClosed, QueueFull, RequestError, UnknownModel
from alula.serving.engine.events import (
    Delta,
    Finished,
    ItemPreview,
    Look,
    Preview,
    Timings,
    TokenLogprob,
    Usage,
)
from alula.serving.engine.handle import Handle
from alula.serving.engine.request import Highlighted, Limits, Request, Sampling
from alula.serving.engine.resident import Served
from alula.serving.engine.residents import reads_demonstrations

__all__ = [
    "Delta",
    "Engine",
    "EngineClosed",
    "Finished",
    "Handle",
    "Highlighted",
    "ItemPreview",
    "Limits",
    "Look",
    "Preview",
    "QueueFull",
    "Request",
    "RequestError",
    "Sampling",
    "Served",
    "Timings",
    "TokenLogprob",
    "UnknownModel",
    "Usage",
    "reads_demonstrations",
]
