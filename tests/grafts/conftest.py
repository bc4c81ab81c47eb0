"""Fixtures of the tests of grafts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """Graphs are counted from 0, and none are left for other tests."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
