"""Whether the requests of a model can be computed together.

What a model's settings say is read. The rest is tried when it is loaded: a few tokens of text go all ways that requests
go, and are held to `generate`. Classes count positions, mask padding and cache keys in ways of their own; what is not
seen to be computed alike is not assumed to be. Not tried are media, and windows of more tokens than `_WINDOWS`.

Shapes: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from alula.anatomy import Anatomy, unwrap
from alula.errors import HostError
from alula.hosts.configs import first_line
from alula.inputs import placed
from alula.policies import policies_of
from alula.seam import find, joining, needs_roles
from alula.serving.engine.alone import drawn_here
from alula.serving.engine.batch import Batch, Row
from alula.serving.engine.prefill import Prefill, together
from alula.serving.engine.prompts import Prepared, prepare
from alula.serving.engine.request import Limits, Request, Sampling
from alula.serving.engine.resident import Resident
from alula.serving.engine.sampling import Defaults, Sampler, draw
from alula.tokens import Role

_SHORT, _MIDDLE, _LONG = 4, 7, 12
_WINDOWS = {"cpu": 128}
_WINDOW = 1024
"""most tokens of a window that a prompt is to cross, on a CPU and elsewhere"""
_TOGETHER = "prompts of different lengths computed at once"
_WHOLE = "a prompt computed as a whole"
_PIECES = "a prompt computed in pieces"
_STEPS = "answers continued as one batch"
_BEHIND = "a prompt that goes on from what was kept of another"
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the logits' norm: sums of a batch round otherwise
_HALF = 0.05
_IDS = 64
_BY_LENGTH = ("dynamic", "longrope")
_OURS = (
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "suppress_tokens"),  # `Sampler`
    *("max_length", "max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "stop_strings"),
)
"""settings of generation that the engine knows"""
_IDLE = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"),  # of a search, which is another one
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("renormalize_logits", "decoder_start_token_id", "transformers_version", "_from_model_config"),
)
"""and those that change no token by themselves"""
_BY_GENERATE = (
    *("bad_words_ids", "sequence_bias", "no_repeat_ngram_size", "begin_suppress_tokens"),
    *("min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "exponential_decay_length_penalty"),
    *("guidance_scale", "remove_invalid_values"),
)
"""those that `generate` sees to before a token is drawn"""
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, (), [], {})


def why_alone(resident: Resident) -> str | None:
    """Why requests to a model are computed one by one; None: they are computed together."""
    model = resident.model
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "a learned prompt stands before every other, which `generate` puts there"
    if not joining.can_positions_be_given(model):
        return f"{type(unwrap(model)).__name__} takes no positions of each request's own"
    if policies_of(model):
        return f"a policy stands on it ({', '.join(policies_of(model))}), whose layers hold some tokens alone"
    seam = find(model)
    if seam is not None and seam.own_vocabulary is not None:
        return "it writes tokens of its own, which are told by the prompt"
    if by_length := Anatomy.of(unwrap(model)).rope_types.intersection(_BY_LENGTH):
        return f"its rotary angles go by how long a prompt is ({min(by_length)}), for all in a batch alike"
    asked = _asked(model)
    if left := [name for name in _BY_GENERATE if name in asked]:
        return f"its generation settings ask for {left[0]}, which `generate` does"
    return joining.why_apart(model) or _tried(resident)


def check_settings(model: Any) -> None:
    """Refuse a model whose generation settings ask for what nothing here does: answers would be other ones.

    Raises:
        HostError: with their names.
    """
    strange = {name: value for name, value in _asked(model).items() if name not in _BY_GENERATE}
    if strange:
        told = ", ".join(f"{name}={value!r}" for name, value in strange.items())
        raise HostError(
            f"its generation settings ask for {told}, which is not served",
            where="generation_config.json",
            remedy="serve a copy without it: its answers are then drawn token by token",
        )


def _asked(model: Any) -> dict[str, Any]:
    """Settings of generation that transformers knows, change something, and are not the engine's own."""
    config, known = getattr(model, "generation_config", None), vars(GenerationConfig())
    asked = {name: getattr(config, name, None) for name in known if name not in _OURS + _IDLE}
    return {name: value for name, value in asked.items() if value is True or value not in _NEUTRAL}


@torch.inference_mode()
def _tried(resident: Resident) -> str | None:
    """Why a model whose requests could be computed together had better not, as a trial says."""
    trial = _Trial(resident)
    try:
        trial.run()
        way = trial.first_unlike()
    except Exception as error:  # whatever a class does with what it is not made for
        return f"{trial.way} could not be tried ({first_line(error)})"
    return None if way is None else f"{way} did not come to what `generate` comes to"


@dataclass(eq=False)
class _Asked:
    """A prompt of the trial, and the tokens of its answer."""

    prepared: Prepared
    tokens: list[int] = field(default_factory=list)


class _Trial:
    """Prompts on all ways that requests go: two short ones computed at once, a long one that joins them by pieces, and
    one that goes on from what is kept of the first, while the second has left.

    Attributes:
        way: the one they are on.
    """

    def __init__(self, resident: Resident) -> None:
        self.way = _TOGETHER
        self._resident, self._batch = resident, Batch(resident)
        self._ids = _ids(resident)
        self._told: list[tuple[str, _Asked, int, Tensor]] = []  # in order: the logits of a token of an answer

    def run(self) -> None:
        """Compute the prompts together."""
        in_pieces = self._resident.reads_in_pieces
        short, middle = self._asked(self._words(_SHORT)), self._asked(self._words(_MIDDLE, 3))
        if in_pieces:
            logits, cache = together(self._resident, [short.prepared, middle.prepared])
            self._join([short, middle], logits, cache)
        else:
            self.way = _WHOLE
            self._read(short)
            self._read(middle)
        self._step()
        self.way = _PIECES if in_pieces else _WHOLE
        count = _beyond_window(self._resident)
        self._read(self._asked(self._words(count, 5)), piece=1 + count // 2)
        self._step()
        self._batch.leave([row for row in self._batch.rows if row.job is middle])
        if in_pieces and joining.is_forkable(self._batch.cache):
            self.way = _BEHIND
            (row,) = (row for row in self._batch.rows if row.job is short)
            known = row.length - 1  # a turn leaves the way of the one before
            ids = [*short.prepared.ids, *short.tokens][:known]
            further = self._asked([*ids, *self._words(_SHORT, 7)])
            self._read(further, joining.forked(self._batch.cache_of(row), known), known)
        self._step()

    def first_unlike(self) -> str | None:
        """The first way on which something did not come to what it comes to alone."""
        wanted = {
            each: _generated(self._resident, each) for each in dict.fromkeys(asked for _, asked, _, _ in self._told)
        }
        tolerance = _TOLERANCE.get(next(self._resident.model.parameters()).dtype, _HALF)
        for way, asked, place, found in self._told:
            for one in wanted[asked][place : place + 1]:  # none behind a text that ends answers
                if not bool((found - one).norm() <= tolerance * one.norm()):
                    return way
        return None

    def _words(self, count: int, start: int = 0) -> list[int]:
        """Tokens in no order that comes again soon."""
        return [self._ids[(start + place * (place + 1) // 2) % len(self._ids)] for place in range(count)]

    def _asked(self, ids: list[int]) -> _Asked:
        prepared = prepare(self._resident, Request(self._resident.served.name, prompt=ids), Limits())
        if needs_roles(self._resident.model):
            prepared = replace(prepared, roles=[int(Role.USER)] * len(ids))
        return _Asked(prepared)

    def _read(self, asked: _Asked, cache: Any = None, known: int = 0, *, piece: int = Limits.prefill_tokens) -> None:
        """Have a prompt join by itself."""
        prefill, logits = Prefill(self._resident, asked.prepared, piece, cache, known), None
        while logits is None:
            logits = prefill.step()
        self._join([asked], logits[None], prefill.cache, prefill.shift)

    def _join(self, those: Sequence[_Asked], logits: Tensor, cache: Any, shift: int = 0) -> None:
        unended = Defaults(suppressed=tuple(self._resident.ends))  # an end would be one for `generate` too
        samplers = [Sampler(Sampling(temperature=0), unended, asked.prepared.ids) for asked in those]
        rows = []
        for asked, sampler, own, token in zip(those, samplers, logits, draw(samplers, logits)[1], strict=True):
            rows.append(Row(asked, sampler, len(asked.prepared.ids), shift, token))
            self._take(asked, own, token)
        self._batch.join(rows, [cache])

    def _step(self) -> None:
        self.way = _STEPS
        logits, tokens = self._batch.step()
        for row, own, token in zip(self._batch.rows, logits, tokens, strict=True):
            self._take(row.job, own, token)

    def _take(self, asked: _Asked, logits: Tensor, token: int) -> None:
        self._told.append((self.way, asked, len(asked.tokens), logits.float()))
        asked.tokens.append(token)


class _Only(LogitsProcessor):
    """Leaves `generate` the tokens of an answer that is there."""

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0
        return chosen


def _generated(resident: Resident, asked: _Asked) -> Tensor:
    """(tokens or fewer, V) the logits that `generate` has for the tokens of an answer."""
    model, prepared = resident.model, asked.prepared
    seam = find(model)
    asks = drawn_here(resident, len(asked.tokens))
    asks["generation_config"].output_logits = asks["generation_config"].return_dict_in_generate = True
    roles = None if prepared.roles is None else torch.tensor([prepared.roles])
    with nullcontext() if seam is None else seam.given_roles(roles):
        found = model.generate(
            **placed(prepared.inputs, next(model.parameters())),
            **asks,
            logits_processor=LogitsProcessorList([_Only(len(prepared.ids), asked.tokens)]),
        )
    return torch.cat(found.logits).float()


def _ids(resident: Resident) -> list[int]:
    """Some tokens of text."""
    host, tokenizer = unwrap(resident.model), resident.tokenizer
    marks = {*tokenizer.all_special_ids, *Anatomy.of(host).placeholders.values()}
    known = range(min(len(tokenizer), int(host.get_input_embeddings().weight.shape[0])))
    return list(itertools.islice((token for token in known if token not in marks), _IDS))


def _beyond_window(resident: Resident) -> int:
    """Tokens of a prompt that a window of its layers is shorter than, if that is not too many."""
    bound = _WINDOWS.get(resident.device.type, _WINDOW)
    windows = [int(getattr(each, "sliding_window", 0)) for each in joining.empty_cache(resident.model).layers]
    count = max(_LONG, *(window + 3 for window in windows if window <= bound))
    context = resident.served.context
    return count if context is None else min(count, context - 4)
