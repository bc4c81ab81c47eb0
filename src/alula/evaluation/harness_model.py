"""A loaded model as lm-evaluation-harness wants it; imported only where the extra ``eval`` is installed."""

from __future__ import annotations

import copy
import math
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria

from alula.chat_template import TemplateSettings
from alula.errors import EvaluationError
from alula.evaluation.conditions import refuse_steps
from alula.evaluation.generation import neutral_config
from alula.evaluation.plain_text import PlainText
from alula.hosts import thoughts
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.seam import generation_extras, text_logits

_BOUNDLESS = 2**31
"""context of a model that names none; the harness would take 2,048 and cut what is longer"""


class HarnessModel(HFLM):
    """A causal LLM or an image host asked in words alone, adapters and all, exactly as it is in memory.

    Every text becomes ids in one place, `tok_encode`, one text at a time: the harness' own way looks at the first text
    of a batch only, and leaves to each model's tokenizer what two models must be asked alike.

    Args:
        tokenizer: of the model; the harness changes a copy (padding).
        processor: where the chat template comes from if the tokenizer has none.
        batch_size: requests at a time, fixed.
        template: variables for the chat template beside the messages.
        opening: the tokens that go before every text that does not start with them, see `alula.hosts.opening`.

    Raises:
        UsageError: the chat template does not read a setting.
        EvaluationError: the vocabulary lacks a token of ``opening``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: Any,
        batch_size: int,
        *,
        template: TemplateSettings,
        opening: Sequence[str],
    ) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = getattr(processor, "chat_template", None)
        self._text = PlainText(tokenizer, opening)
        self.opening = self._text.opening
        self._asked: dict[Any, array[int]] = {}
        self._too_long: dict[Any, int] = {}
        self._awaited: deque[str] = deque()  # prompts whose answers come next, in order
        self._thoughts: dict[str, thoughts.Said] = {}
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context_length(model) or _BOUNDLESS,
            chat_template_args=template.keywords(tokenizer),
        )

    def asked(self, arguments: Sequence[Any]) -> array[int]:
        """Return the ids that the texts of one request came to, as the model was given them."""
        return self._asked[_key(arguments)]

    def too_long(self, arguments: Sequence[Any]) -> int | None:
        """Return the tokens of one request that did not fit into the context, whose answer means nothing."""
        return self._too_long.get(_key(arguments))

    def thought(self, arguments: Sequence[Any]) -> thoughts.Said | None:
        """Return what the model thought aloud and what it said then, where it thought before it answered a prompt."""
        return self._thoughts.get(_key(arguments))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, behind the opening unless ``add_special_tokens`` is False.

        Raises:
            EvaluationError: the text itself starts with BOS twice.
        """
        ids = self._text.ids(string, opened=add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask of prompts to be answered, padded on the left; one that is too long is cut and noted."""
        rows = [self.tok_encode(string) for string in strings]
        for string, row in zip(strings, rows, strict=True):
            self._asked[string] = array("q", row)
            if left_truncate_len and len(row) > left_truncate_len:
                self._too_long[string] = len(row)
        self._awaited.extend(strings)
        rows = [row[-left_truncate_len:] if left_truncate_len else row for row in rows]
        width = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Return the text of an answer without the thought before it; any other tokens are decoded as they are."""
        if self._awaited and skip_special_tokens:
            prompt = self._awaited.popleft()
            said = thoughts.said(self.tokenizer, tokens, opened=thoughts.opened(self.tokenizer, self._asked[prompt]))
            if said.thought or not said.finished:
                self._thoughts[prompt] = said
                return said.answer
        text: str = super().tok_decode(tokens, skip_special_tokens)
        return text

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As the harness does it, the ids kept."""
        self._asked.update({request.args[0]: array("q", self.tok_encode(request.args[0])) for request in requests})
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """As the harness does it, the ids kept; a model that computes no numbers is not scored by them.

        A text that is too long is noted, and a token of it put in its place.
        """
        refuse_steps(self.model)
        fitting = []
        for texts, context, ending in requests:
            size = len(context) + len(ending)
            if texts is not None:  # None: a window of a text of any length
                self._asked[texts] = array("q", context + ending)
                if size > self.max_length + 1:  # the last token is no input
                    self._too_long[texts] = size
                    context, ending = context[:1], ending[:1]
            fitting.append((texts, context, ending))
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(fitting, disable_tqdm, **options)
        for (texts, _, _), (likelihood, _) in zip(requests, found, strict=True):
            if math.isnan(likelihood):
                raise EvaluationError(
                    f"the model's log-likelihood of a text is not a number: {str(texts)[:80]}",
                    where=type(self.model).__name__,
                    remedy="look for weights that are NaN, or load it with another dtype (float16 overflows)",
                )
        return found

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Logits of text alone, by which it is weighed."""
        return text_logits(self.model, super()._model_call(inps, *args, **options))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate under neutral defaults and the task's own settings; the checkpoint's defaults do not leak in."""
        config = neutral_config(self.model, self.tokenizer, Decoding(), max_length - context.shape[1])
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)  # the harness writes greedy as temperature 0
        inputs = config.update(**generation_kwargs)  # what is not a setting is an input
        with generation_extras(self.model, {"input_ids": context, **inputs}) as given:
            return self.model.generate(
                generation_config=config,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
                **given,
            )


def _key(arguments: Sequence[Any]) -> Any:
    """What tells the texts of a request from others: a text and its ending, or a prompt alone."""
    return tuple(arguments) if len(arguments) > 1 and isinstance(arguments[1], str) else arguments[0]
