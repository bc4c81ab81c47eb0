"""How answers are drawn, for an evaluation as for a chat."""

from __future__ import annotations

import copy
import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field
from transformers import GenerationConfig

from alula.bounds import MAX_SEED, check_seed
from alula.errors import UsageError
from alula.hosts.host import tokenizer_of
from alula.hosts.stops import stop_ids


class Decoding(BaseModel):
    """How answers are generated; everything not named here is at its neutral value (no penalties).

    Args:
        do_sample: sample, rather than take the likeliest token each time.
        temperature: divides the logits while sampling.
        top_p: sample from the likeliest tokens that have this much probability together.
        num_beams: beams of the search.
        seed: RNG seed for sampling.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")

    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_beams: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @classmethod
    def at(cls, temperature: float, seed: int = 0) -> Self:
        """Sample at ``temperature``; 0 takes the likeliest token each time.

        Raises:
            UsageError: the temperature is negative or not finite, or the seed is out of bounds.
        """
        if temperature < 0:
            raise UsageError(f"{temperature} is negative", where="temperature", remedy="0 for greedy decoding")
        if not math.isfinite(temperature):
            raise UsageError(f"{temperature} is not a temperature", where="temperature", remedy="a finite number")
        check_seed(seed)
        return cls(do_sample=temperature > 0, temperature=temperature or 1.0, seed=seed)


def generation_config(
    model: Any, processor: Any, decoding: Decoding, max_new_tokens: int, *, model_defaults: bool = False
) -> GenerationConfig:
    """What ``model.generate`` is given.

    Args:
        model: the model that answers.
        processor: its processor or tokenizer.
        decoding: how answers are drawn.
        max_new_tokens: most tokens of an answer.
        model_defaults: keep what the checkpoint sets and ``decoding`` does not (penalties, and ``top_p`` and ``top_k``
            while sampling), as a user of this one model expects; otherwise nothing is left to it but its stop tokens,
            so that models are compared alike.
    """
    tokenizer = tokenizer_of(processor)
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), None)
    if not model_defaults:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            max_length=None,
            min_length=0,
            do_sample=decoding.do_sample,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=0 if decoding.do_sample else 50,  # 50 is the library's neutral value when not sampling
            num_beams=decoding.num_beams,
            repetition_penalty=1.0,
            length_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=stops or None,
            pad_token_id=pad,
            use_cache=True,
        )
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.eos_token_id = stops or None
    config.do_sample = decoding.do_sample
    asked = decoding.model_fields_set
    if "num_beams" in asked:
        config.num_beams = decoding.num_beams
    if not decoding.do_sample:  # what only sampling reads
        config.temperature = config.top_p = config.top_k = config.min_p = None
    else:
        config.temperature = decoding.temperature
        if "top_p" in asked:
            config.top_p = decoding.top_p
    if config.pad_token_id is None:
        config.pad_token_id = pad
    return config
