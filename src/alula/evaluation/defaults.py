"""What a model is asked when its user names nothing: the entry point group ``alula.defaults``.

A model that was made on data of its own (as the fledgling was on the microworld) may come with questions about them,
brought by the package that brings the model. Any other model is asked what its user names, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alula.evaluation.likelihood import ChoiceTask
from alula.plugins import Registry


class Defaults(Protocol):
    """The questions that come with a model."""

    def knows(self, tokenizer: Any) -> bool:
        """Whether a model with this tokenizer was made on what the questions are about."""
        ...

    def tasks(self, takes: frozenset[str]) -> Sequence[str]:
        """Names of the tasks that `alula eval` asks, by the media the model takes (`alula.media`).

        An audit asks those of them that are called ``text_bare`` and ``text_after_image``.
        """
        ...

    def retention(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Sources of text questions and of samples with images, to measure retention by in training."""
        ...

    def truthfulness(self, n: int | None, seed: int) -> Sequence[ChoiceTask]:
        """Tasks of truthfulness and ethics, scored by likelihood, of about ``n`` questions each; none where there are
        none."""
        ...

    def audited(self) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """What an audit's conversations with images are called, and their sources, to which it adds its seed."""
        ...


_DEFAULTS: Registry[Defaults] = Registry("alula.defaults", "set of questions for models")


def register(name: str, defaults: Defaults) -> None:
    """Make questions known by a name of their own, as an entry point would; those registered go first.

    Raises:
        UsageError: others have that name.
    """
    _DEFAULTS.register(name, defaults)


def defaults_for(processor: Any) -> Defaults | None:
    """The questions that come with the model of ``processor``; None where there are none.

    Args:
        processor: a multimodal processor, or a tokenizer.

    Raises:
        UsageError: a package that brings some does not load.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = (_DEFAULTS.get(name) for name in _DEFAULTS.names())
    return next((each for each in found if each is not None and each.knows(tokenizer)), None)
