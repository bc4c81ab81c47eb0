"""The tiny processor of the data tests."""

from tests.data.conftest import processor, tokenizer

__all__ = ["processor", "tokenizer"]
