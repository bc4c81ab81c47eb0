"""The tiny LLaVA of the evaluation tests, with a tokenizer that decodes texts as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import decoders

from tests.evaluation import conftest
from tests.evaluation.conftest import host, tokenizer

__all__ = ["host", "tokenizer"]
spaced = conftest.processor


@pytest.fixture(scope="session")
def processor(spaced: Any) -> Any:
    made = copy.deepcopy(spaced)
    made.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return made
