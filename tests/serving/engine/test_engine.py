"""Answers of the engine: those of the model alone, whatever runs beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from alula.serving.engine import Delta, Engine, Finished, Request, Sampling
from tests.serving.engine.conftest import BLUE, RED, alone, asked

QUESTIONS = [
    asked("what do you see?", RED),
    asked("how many green triangles are there? be brief"),
    asked("first second third", RED, BLUE),
    asked("two words"),
]


@pytest.mark.parametrize("name", ["host", "host+wings", "host+experts", "host+lora"])
def test_streamed_is_alone_token_for_token(engine: Engine, parts: Path, name: str) -> None:
    handles = [engine.submit(Request(name, each, sampling=Sampling(max_tokens=12))) for each in QUESTIONS]
    for messages, handle in zip(QUESTIONS, handles, strict=True):
        events = list(handle)
        *deltas, end = events
        assert isinstance(end, Finished)
        assert [delta.index for delta in deltas if isinstance(delta, Delta)] == list(range(len(deltas)))
        tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids]
        assert tokens == alone(parts / name.rpartition("+")[2], messages)
        assert end.usage.completion_tokens == len(tokens)
