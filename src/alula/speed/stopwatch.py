"""One batch of prompts through ``generate``: how long it takes, what it computes, what its cache holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.evaluation import generation
from alula.inputs import Rendered
from alula.seam.dialect import cache_of_output


@dataclass(frozen=True)
class Clock:
    """How time is taken.

    Attributes:
        name: for records.
        now: seconds.
    """

    name: str
    now: Callable[[], float]

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """On a CPU with one thread processor seconds, which other work does not count into; else seconds by the wall
        clock, on an accelerator once it has done what it was given."""
        if device.type != "cpu":
            return cls("seconds, the accelerator waited for", _waited)
        if torch.get_num_threads() == 1:
            return cls("processor seconds of one thread", time.thread_time)
        return cls(f"seconds by the wall clock, {torch.get_num_threads()} threads", time.perf_counter)


def _waited() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


class _FirstToken(StoppingCriteria):
    """Reads something when the first token is there, and stops nothing."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.found: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self.found is None:
            self.found = self.read()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def unending(config: GenerationConfig, tokens: int) -> GenerationConfig:
    """The configuration that generates just so many tokens: none of them ends an answer."""
    made = copy.deepcopy(config)
    # not eos_token_id=None, in the place of which generate() takes the model's own
    made.max_new_tokens = made.min_new_tokens = tokens
    made.min_length = None  # the other way to ask for the same: two of them are warned of
    return made


@torch.no_grad()
def timed(model: Any, prompts: Sequence[Rendered], config: GenerationConfig, clock: Clock) -> tuple[float, float]:
    """Seconds until the first token of a batch, and of each further one.

    Args:
        config: generates two tokens at least, and ends at none.
    """
    with generation.put(model, prompts, config) as given:
        first = _FirstToken(clock.now)
        began = clock.now()
        model.generate(**given, generation_config=config, stopping_criteria=StoppingCriteriaList([first]))
        ended = clock.now()
    assert first.found is not None
    return first.found - began, (ended - first.found) / (config.max_new_tokens - 1)


@dataclass(frozen=True)
class Counted:
    """What one prompt takes.

    Attributes:
        operations: floating-point operations of matrix products in the prompt, towers included; `in_towers` of them
            in towers, `in_step` in one step behind it.
        cache_bytes: held by the cache behind the prompt.
        keys: per decoder layer, how many tokens it holds keys of.
    """

    operations: int
    in_towers: int
    in_step: int
    cache_bytes: int
    keys: tuple[int, ...]


@torch.no_grad()
def counted(model: Any, prompt: Rendered, config: GenerationConfig) -> Counted:
    """Count what is computed for one prompt and a step behind it.

    Raises:
        HostError: the model gives no cache back.
    """
    anatomy = Anatomy.of(model)
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    first = _FirstToken(counter.get_total_flops)
    one, two = unending(config, 1), unending(config, 2)
    one.return_dict_in_generate = True
    with generation.put(model, [prompt], one) as given:
        cache = cache_of_output(model.generate(**given, generation_config=one))
        with _counting_towers(anatomy, counter) as in_towers, counter:
            model.generate(**given, generation_config=two, stopping_criteria=StoppingCriteriaList([first]))
    assert first.found is not None
    if cache is None:
        raise HostError("the model gives no cache back, whose keys could be counted", where=type(anatomy.host).__name__)
    keys = [getattr(layer, "keys", None) for layer in cache.layers[: anatomy.num_layers]]
    return Counted(
        operations=int(first.found),
        in_towers=sum(in_towers),
        in_step=int(counter.get_total_flops() - first.found),
        cache_bytes=_held(cache),
        keys=tuple(int(each.shape[-2]) for each in keys if isinstance(each, Tensor)),
    )


@contextmanager
def _counting_towers(anatomy: Anatomy, counter: FlopCounterMode) -> Iterator[list[int]]:
    """A list that receives what each run of a tower computes inside the block."""
    found: list[int] = []
    begun: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        begun.append(counter.get_total_flops())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        found.append(counter.get_total_flops() - begun.pop())

    towers = [each for each in (anatomy.tower, anatomy.audio_tower) if each is not None]
    handles = [each.register_forward_pre_hook(enter) for each in towers]
    handles += [each.register_forward_hook(leave) for each in towers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _held(cache: Any) -> int:
    """Bytes of all that a cache keeps, each piece of memory once."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for each in value.values() if isinstance(value, dict) else (value,):
                if isinstance(each, Tensor):
                    storage = each.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""the one kernel of attention that torch's counter does not know"""
