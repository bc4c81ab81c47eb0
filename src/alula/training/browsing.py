"""What method browse puts beside a batch: conditions of whole conversations, or what they are read from.

Shapes: B samples, D the decoder's width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alula.chat_template import TemplateSettings, template_of
from alula.data import Collator
from alula.data.conditions import Conditions, write_conditions
from alula.data.dropping import dropped
from alula.data.samples import BROWSED, Sample, Source
from alula.draws import mixed
from alula.errors import UsageError
from alula.evaluation.conditions import fingerprint
from alula.grafts import read_conditions
from alula.grafts.browse.reading import prompt_ends
from alula.hosts.context import context_length
from alula.progress import bar
from alula.tokens import CONDITIONS, PROMPT_ENDS

_TOLD = "told"
_BITS = 2**64
_ZERO, _WAY = range(2)


def prompt_of(sample: Sample) -> Sample:
    """What is read before a sample is answered: its conversation up to the first answer that is learnt, or the one that
    its record names for it."""
    messages = sample.meta.get(BROWSED) or sample.messages
    learnt = (n for n, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True))
    return replace(sample, messages=messages[: next(learnt, len(messages))])


class Browsing:
    """Says what is read, what is told, and what is left out; see `alula.data.collate.Beside`.

    Every choice is a function of the seed and the sample's position.

    Args:
        prompts: makes batches of prompts.
        ways: of leaving out context, names of `alula.data.dropping.WAYS`; none: nothing is left out.
        zero: share of samples that are told nothing.
        conditions: those computed before; None: the model reads.
        seed: of the choices.
    """

    def __init__(
        self, prompts: Collator, *, ways: Sequence[str], zero: float, conditions: Conditions | None, seed: int
    ) -> None:
        self.prompts, self.ways, self.zero = prompts, tuple(ways), zero
        self.conditions, self.seed = conditions, seed

    def shown(self, sample: Sample) -> Sample:
        """The sample without the context that is left out."""
        if not self.ways or not self._is_told(sample):  # who is told nothing has to see all
            return sample
        return dropped(sample, self.ways, mixed(self.seed, _WAY, sample.position or 0))

    def beside(self, samples: Sequence[Sample], batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Conditions; or prompts to read them from, and which are told; or, where every sample is read as it stands,
        where its prompt ends."""
        told = torch.tensor([[float(self._is_told(sample))] for sample in samples])
        prompts = [prompt_of(sample) for sample in samples]
        if self.conditions is not None:
            return {CONDITIONS: self.conditions.of(prompts) * told}
        if self.ways or not bool(told.all()) or any(BROWSED in sample.meta for sample in samples):
            return {BROWSED: {**self.prompts(prompts), _TOLD: told}}
        return {PROMPT_ENDS: prompt_ends(batch["attention_mask"].bool(), batch["labels"])}

    def _is_told(self, sample: Sample) -> bool:
        return mixed(self.seed, _ZERO, sample.position or 0) >= self.zero * _BITS


def settle(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Put conditions in the place of the prompts they are to be read from, in what a model is about to be given."""
    if BROWSED not in inputs:
        return
    prompts = dict(inputs.pop(BROWSED))
    told: Tensor = prompts.pop(_TOLD)
    inputs[CONDITIONS] = read_conditions(model, prompts) * told


def browse_data(
    model: nn.Module,
    processor: Any,
    source: Source,
    file: str | os.PathLike[str],
    *,
    n: int | None = None,
    name: str = "",
    template: TemplateSettings | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Path:
    """Read the prompts of a source by a frozen model, and write their conditions; see `alula.data.conditions`.

    Args:
        model: any decoder host; with an adapter of browse-and-concentrate, images are as without it.
        source: conversations; what is read of each is what training reads (`prompt_of`).
        file: made; a call that was interrupted goes on.
        n: conversations; None: all.
        name: of the model, for people.
        template: variables for its chat template beside the messages.
        batch_size: prompts at a time.
        progress: draw a bar on stderr.

    Raises:
        UsageError: the source never ends, and `n` is not given. DataError: an unusable sample.
    """
    sizes = [size for size in (n, source.size) if size is not None]
    if not sizes:
        raise UsageError(
            "this source never ends", where=source.name, remedy="say how many to read (--items, or limit=)"
        )
    model.eval()
    device = next(model.parameters()).device
    collate = Collator(processor, train=False, template=template, context=context_length(model))
    made = {
        "browser": fingerprint(model),
        "name": name,
        "chat_template": hashlib.sha256(str(template_of(processor)).encode()).hexdigest(),
        "template": json.dumps((template or TemplateSettings()).recorded(processor), sort_keys=True),
    }

    def read(prompts: Sequence[Sample]) -> Tensor:
        inputs = collate(prompts)
        return read_conditions(model, {key: value.to(device) for key, value in inputs.items()}).float()

    prompts = (prompt_of(source[index]) for index in range(min(sizes)))
    done = 0
    with bar(min(sizes), progress) as drawn:

        def advance(count: int) -> None:
            nonlocal done
            drawn.advance("browsed", count - done)
            done = count

        return write_conditions(prompts, read, file, made, batch_size=batch_size, on_batch=advance)
