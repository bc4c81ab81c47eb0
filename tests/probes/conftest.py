"""The host and the batch that the tests of this room measure, in float64."""

from __future__ import annotations

from typing import Any

import pytest

from tests import zoo
from tests.probes.models import deep, double


@pytest.fixture(scope="module")
def model() -> Any:
    """An image host of three blocks."""
    return deep(layers=3, sliding=False).double()


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A padded batch of the module's own `LAYOUTS`."""
    return double(zoo.batch("llava-qwen3", *request.module.LAYOUTS))
