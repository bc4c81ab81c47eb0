"""Answers by plain ``model.generate``: left-padded batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from alula.demonstrations.few_shot import fused_inputs
from alula.errors import EvaluationError
from alula.grafts.aim import FUSED, FUSED_AT
from alula.hosts import thoughts
from alula.hosts.decoding import Decoding, generation_config
from alula.hosts.host import tokenizer_of
from alula.inputs import Rendered, placed
from alula.seam import find, generation_extras, text_logits
from alula.tokens import Role

_PADDING = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
"""per-row tensors and what their padding holds (None: the pad token)"""


@dataclass(frozen=True)
class Answer:
    """What a model said, special tokens removed.

    Attributes:
        text: the answer, without the thought before it.
        truncated: it did not stop by itself.
        thought: what was thought aloud before it.
        unfinished: it ended inside the thought, so there is no answer.
        ids: every token that was said, thought included, before the one that ended it.
    """

    text: str
    truncated: bool
    thought: str = ""
    unfinished: bool = False
    ids: tuple[int, ...] = ()


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return index lists of at most ``batch_size``, similar lengths together, longest first, ties in order.

    Longest first makes a run that does not fit in memory fail at its start.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collate(prompts: Sequence[Rendered], pad_id: int) -> dict[str, torch.Tensor]:
    """Return the prompts as one left-padded batch: rows (B, S); media tensors concatenated along their first axis.

    Raises:
        EvaluationError: media tensors of the prompts cannot be joined (a processor whose image size varies).
    """
    width = max(prompt.length for prompt in prompts)
    batch: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for prompt in prompts for key in prompt.inputs if key not in (FUSED, FUSED_AT)):
        if key in _PADDING:
            fill = pad_id if _PADDING[key] is None else _PADDING[key]
            rows = []
            for prompt in prompts:
                row = prompt.inputs.get(key)
                if row is None:  # some processors add token types only where there is an image
                    row = torch.zeros_like(prompt.inputs["input_ids"])
                rows.append(torch.nn.functional.pad(row, (width - row.shape[1], 0), value=fill))
            batch[key] = torch.cat(rows)
        else:
            try:
                batch[key] = torch.cat([prompt.inputs[key] for prompt in prompts if key in prompt.inputs])
            except RuntimeError as error:
                raise EvaluationError(
                    f"the {key!r} of several prompts do not fit into one batch: {error}",
                    remedy="evaluate with batch size 1",
                ) from error
    return {**batch, **fused_inputs(prompts, width)}


def neutral_config(model: Any, processor: Any, decoding: Decoding, max_new_tokens: int) -> GenerationConfig:
    """`alula.hosts.decoding.generation_config` without the checkpoint's own defaults.

    Raises:
        EvaluationError: nothing says where an answer ends.
    """
    config = generation_config(model, processor, decoding, max_new_tokens)
    if not config.eos_token_id:
        raise EvaluationError(
            "neither the model's generation config nor the tokenizer names an end-of-turn token",
            remedy="set model.generation_config.eos_token_id",
        )
    return config


@contextmanager
def put(model: Any, prompts: Sequence[Rendered], config: GenerationConfig) -> Iterator[dict[str, Any]]:
    """Yield what ``model.generate`` is given inside the block for the prompts, as one batch on the model's device."""
    inputs = placed(collate(prompts, config.pad_token_id), next(model.parameters()))
    width = inputs["input_ids"].shape[1]
    with _given_roles(model, prompts, width), generation_extras(model, inputs) as given:
        yield given


@torch.no_grad()
def answer(
    model: Any, processor: Any, prompts: Sequence[Rendered], config: GenerationConfig, seed: int
) -> list[Answer]:
    """Generate one answer per prompt. ``seed`` matters only when sampling."""
    tokenizer = tokenizer_of(processor)
    with put(model, prompts, config) as given:
        width = given["input_ids"].shape[1]
        output = _generated(model, given, config, seed, given["input_ids"].device)
    new_tokens = output[:, width:].tolist()
    stops = set(config.eos_token_id)
    return [
        _read(tokenizer, row, stops, opened=thoughts.opened(tokenizer, prompt.inputs["input_ids"][0].tolist()))
        for prompt, row in zip(prompts, new_tokens, strict=True)
    ]


@torch.no_grad()
def likelihood(model: Any, processor: Any, prompt: Rendered, said: torch.Tensor) -> float:
    """Sum of log-probabilities, in nats, of tokens ``said`` (S,) one by one behind a prompt, as if they had been
    generated: what goes by prompts and by steps (policies) takes part."""
    config = neutral_config(model, processor, Decoding(), len(said))
    with put(model, [prompt], config) as given:
        width, brought = given["input_ids"].shape[1], given.pop("logits_processor", ())
        output = model.generate(
            **given,
            generation_config=config,
            logits_processor=LogitsProcessorList([*brought, _Told(said, width)]),
            output_logits=True,
            return_dict_in_generate=True,
        )
    scores = text_logits(model, torch.cat(output.logits)).float()  # (S, V)
    return -float(torch.nn.functional.cross_entropy(scores, said, reduction="sum"))


class _Told(LogitsProcessor):
    """Leaves nothing to say but what it was told.

    Args:
        said: (S,) the tokens.
        width: tokens of the prompt.
    """

    def __init__(self, said: torch.Tensor, width: int) -> None:
        self.said, self.width = said, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        told = torch.full_like(scores, -torch.inf)
        told[:, self.said[input_ids.shape[1] - self.width]] = 0
        return told


def _generated(model: Any, inputs: dict[str, Any], config: GenerationConfig, seed: int, device: torch.device) -> Any:
    if not config.do_sample:
        return model.generate(**inputs, generation_config=config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return model.generate(**inputs, generation_config=config)


def _given_roles(model: Any, prompts: Sequence[Rendered], width: int) -> AbstractContextManager[None]:
    """Tells what is attached to the model whose turn a prompt's tokens belong to, where it asks."""
    seam = find(model)
    known = [prompt.roles for prompt in prompts if prompt.roles is not None]
    if seam is None or len(known) < len(prompts):
        return nullcontext()
    rows = [[int(Role.UNKNOWN)] * (width - len(roles)) + list(roles) for roles in known]
    return seam.given_roles(torch.tensor(rows))


def _read(tokenizer: Any, row: list[int], stops: set[int], *, opened: bool) -> Answer:
    end = next((index for index, token in enumerate(row) if token in stops), None)
    said = thoughts.said(tokenizer, row[:end], opened=opened)
    return Answer(
        text=said.answer,
        truncated=end is None,
        thought=said.thought,
        unfinished=not said.finished,
        ids=tuple(row[:end]),
    )
