"""Whether the requests of a model can be computed together.

What a model's settings say is read. The rest is tried when it is loaded: two prompts of different lengths are continued
as one batch, and held to each computed alone. Classes count positions, mask padding and cache keys in ways of their
own; what is not seen to be computed alike is not assumed to be.

Shapes: V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from alula.anatomy import Anatomy, unwrap
from alula.errors import HostError
from alula.hosts.configs import first_line
from alula.policies import policies_of
from alula.seam import find, joining
from alula.seam.dialect import cache_keyword, logits_of

_LENGTHS = (7, 4)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the logits' norm: sums of a batch round otherwise
_HALF = 0.05
_TRIED = 8
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


def why_alone(model: Any, tokenizer: Any) -> str | None:
    """Why requests to a model are computed one by one; None: they are computed together."""
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
    return joining.why_apart(model) or _tried(model, tokenizer)


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
def is_alike(model: Any, ids: list[int]) -> bool:
    """Whether a model answers prompts of text in a batch as it does alone.

    Args:
        model: a host whose caches can be joined.
        ids: tokens to try it with, at least eight.
    """
    host = unwrap(model)
    device, name = next(host.parameters()).device, cache_keyword()
    tokens = torch.tensor(ids, device=device)
    wanted, caches = [], []
    for length in _LENGTHS:
        prompt, cache = tokens[None, :length], joining.empty_cache(model)
        host(input_ids=prompt, **{name: cache}, use_cache=True)
        caches.append(cache)
        wanted.append(_last(host, input_ids=tokens[None, : length + 1], use_cache=False))
    longest = max(_LENGTHS)
    places = torch.arange(longest + 1, device=device)
    lengths = torch.tensor(_LENGTHS, device=device)
    positions, sections = lengths[:, None], joining.position_sections(model)
    found = _last(
        host,
        input_ids=tokens[lengths][:, None],
        attention_mask=(places >= longest - lengths[:, None]).to(torch.int64),
        position_ids=positions if sections is None else positions.expand(sections, *positions.shape),
        use_cache=True,
        **{name: joining.joined(caches)},
    )
    alone = torch.cat(wanted)
    tolerance = _TOLERANCE.get(next(host.parameters()).dtype, _HALF)
    return bool(((found - alone).norm(dim=-1) <= tolerance * alone.norm(dim=-1)).all())


def _tried(model: Any, tokenizer: Any) -> str | None:
    """Why a model whose requests could be computed together had better not, as a trial says."""
    marks = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in marks][:_TRIED]
    try:
        alike = is_alike(model, ids)
    except Exception as error:  # whatever a class does with what it is not made for
        return f"two prompts could not be continued as one batch ({first_line(error)})"
    return None if alike else "two prompts continued as one batch did not come to what each comes to alone"


def _last(host: Any, **given: Any) -> Tensor:
    """(B, V) the logits behind the last tokens."""
    return logits_of(host(**given), where=type(host).__name__)[:, -1].float()
