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

from alula.anatomy import unwrap
from alula.hosts.configs import first_line
from alula.policies import policies_of
from alula.seam import find, joining
from alula.seam.dialect import cache_keyword, logits_of

_LENGTHS = (7, 4)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the logits' norm: sums of a batch round otherwise
_HALF = 0.05
_TRIED = 8
_LEFT_TO_GENERATE = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "typical_p",
)
"""settings of generation that `Sampler` does not know"""
_NEUTRAL: tuple[Any, ...] = (None, 0, 0.0, 1, 1.0, (), [])


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
    config = getattr(model, "generation_config", None)
    asked = [name for name in _LEFT_TO_GENERATE if getattr(config, name, None) not in _NEUTRAL]
    if asked:
        return f"its generation settings ask for {asked[0]}, which `generate` does"
    return joining.why_apart(model) or _tried(model, tokenizer)


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
