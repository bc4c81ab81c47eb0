"""A loaded model as lm-evaluation-harness wants it; imported only where the extra ``eval`` is installed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria

from alula.evaluation.generation import generation_config
from alula.evaluation.results import Decoding


class HarnessModel(HFLM):
    """A causal LLM or an image host asked in words alone, adapters and all, exactly as it is in memory.

    Args:
        tokenizer: of the model; the harness changes a copy (padding).
        processor: where the chat template comes from if the tokenizer has none.
        batch_size: requests at a time, fixed.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any, batch_size: int) -> None:
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = getattr(processor, "chat_template", None)
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate under neutral defaults and the task's own settings; the checkpoint's defaults do not leak in."""
        config = generation_config(self.model, self.tokenizer, Decoding(), max_length - context.shape[1])
        if not generation_kwargs.get("do_sample"):
            generation_kwargs.pop("temperature", None)  # the harness writes greedy as temperature 0
        inputs = config.update(**generation_kwargs)  # what is no setting is an input
        return self.model.generate(
            input_ids=context,
            generation_config=config,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            **inputs,
        )
