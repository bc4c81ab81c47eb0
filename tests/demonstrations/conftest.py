"""A tiny LLaVA with a map that counts, and demonstrations of every length."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from PIL import Image

import alula
from alula import AimConfig
from alula.demonstrations import Demonstration
from tests.evaluation import conftest
from tests.grafts.common import wake
from tests.steering import conftest as steering

tokenizer, spaced = conftest.tokenizer, conftest.processor
stock = conftest.host
processor = steering.processor
WORDS = (("color?", "red"), ("what is the shape?", "a circle"), ("a?", "b"), ("how many things are there in it?", "3"))


@pytest.fixture(scope="module")
def model(stock: Any) -> Any:
    """The host with an AIM graft."""
    host = copy.deepcopy(stock)
    wake(alula.attach(host, AimConfig()))
    return host


@pytest.fixture(scope="session")
def demonstrations() -> list[Demonstration]:
    return [demonstration(seed, *words) for seed, words in enumerate(WORDS)]


def demonstration(seed: int, question: str, answer: str) -> Demonstration:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Demonstration(Image.fromarray(pixels), question, answer)


def asked(seed: int = 9, question: str = "and this one?", *, shown: bool = True) -> list[dict[str, Any]]:
    """A conversation of one question."""
    picture = demonstration(seed, "q", "a").picture
    content = [{"type": "image", "image": picture}] if shown else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
