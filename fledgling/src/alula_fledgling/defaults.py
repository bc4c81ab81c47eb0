"""What models made of the fledgling are asked and measured with when their user names nothing: the microworld."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alula.evaluation import ChoiceTask
from alula_fledgling.tasks import default_tasks, truthfulness
from alula_fledgling.weights import part_directory

# another seed than evaluation's, so that a model is not chosen by the questions it is judged by
_RETENTION_SEED = 41


class FledglingDefaults:
    """The microworld's questions, for models that speak the fledgling's words."""

    def knows(self, tokenizer: Any) -> bool:
        """Whether the vocabulary holds the fledgling's, token by token; a host adds tokens of its own."""
        vocabulary = tokenizer.get_vocab()
        return all(vocabulary.get(token) == index for token, index in _vocabulary().items())

    def tasks(self, takes: frozenset[str]) -> Sequence[str]:
        """Names of the microworld's tasks about what the model takes."""
        return default_tasks(takes)

    def retention(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Held-out text questions, and questions about images."""
        held_out = {"split": "test", "seed": _RETENTION_SEED}
        return {"microworld": "text", **held_out}, {"microworld": "visual", **held_out}

    def truthfulness(self, n: int | None, seed: int) -> Sequence[ChoiceTask]:
        """The microworld's own version of TruthfulQA and ETHICS."""
        return truthfulness(n, seed)

    def audited(self) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """Captions say all that is to be seen; dialogues have words on either side of their images."""
        sources = [{"microworld": name, "split": "test"} for name in ("caption", "dialogue")]
        return "captions and dialogues of the microworld", sources


DEFAULTS = FledglingDefaults()


@functools.cache
def _vocabulary() -> Mapping[str, int]:
    """The shipped tokenizer's own vocabulary, without tokens added to it."""
    file = part_directory("llm") / "tokenizer.json"
    vocabulary: Mapping[str, int] = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    return vocabulary
