"""PEFT's prompt learning (prefix tuning, prompt tuning, P-tuning) under `generate`.

PEFT puts its prompt in front where `generate` prepares the inputs of a step, and looks there for the cache by the name
it had before transformers 5.24. Since then it finds none: a prefix is dropped, and a prompt of embeddings is put in
again at every step. `PromptedModel` puts the prompt in itself, once, whatever the cache is called; `check_prompt` sees
whether the forward and `generate` of any such model agree.

Shapes: B samples, S new tokens, K all tokens so far, P tokens of the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftType
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from alula.anatomy import unwrap
from alula.errors import AdapterError, HostError
from alula.hosts.configs import first_line
from alula.hosts.multimodal import AlulaForConditionalGeneration
from alula.hosts.quiet import quiet_loading
from alula.seam.dialect import cache_keyword, cache_of, cache_of_output

_IN_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)  # a prompt of keys and values; others are embeddings
_STEPS = 2  # of `generate` in a check: the prefill, and one step behind a cache
_TOLERANCE = 0.05  # of the logits' norm; half precision rounds otherwise step by step, a lost prompt is far more
_REMEDY = "use method lora or wings"


class PromptedModel(PeftModelForCausalLM):
    """PEFT's model, whose `generate` starts from the same prompt as its forward, on text and image hosts alike.

    Inputs may be padded on the left; a cache may be left out, searched by beams, or kept from call to call.

    Raises:
        HostError: PEFT's prompts cannot be put in front of this host's inputs.
    """

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **options: Any) -> None:
        refuse_host(model.config, type(model))
        super().__init__(model, peft_config, adapter_name, **options)

    def prepare_inputs_for_generation(  # type: ignore[override]  # in PEFT's own class it is found by attribute
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the host takes for one step of `generate`: its own inputs, behind the prompt.

        Raises:
            AdapterError: a cache or mask that a prompt cannot be put in front of.
        """
        config: Any = self.active_peft_config
        added = config.num_virtual_tokens
        if kwargs.get("is_first_iteration") and next_sequence_length is not None:
            next_sequence_length += added  # tokens not in the cache yet, less those of the prompt, which is no input
        prepare: Any = self.base_model_prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)
        cache = cache_of(inputs, where="generate")
        ids, tokens, mask, positions = (
            inputs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        )
        given: Any = tokens if ids is None else ids
        batch_size = len(given)
        _refuse_fixed(cache, mask)
        if mask is not None:
            self._refuse_padded_window(mask, added)
            inputs["attention_mask"] = torch.cat([mask.new_ones(batch_size, added), mask], dim=1)
        if positions is not None:
            inputs["position_ids"] = positions + added
        kept = cache if inputs.get("use_cache", True) else None
        if kept is not None and kept.get_seq_length():
            return inputs
        if config.peft_type in _IN_CACHE:
            prefix: Any = self.get_prompt(batch_size, max_cache_len=-1)
            if kept is None:
                inputs[cache_keyword()] = prefix
            else:
                for index, layer in enumerate(prefix.layers):
                    kept.update(layer.keys, layer.values, index)
        else:
            if tokens is None:
                embed: Any = self.word_embeddings
                tokens = embed(ids)
            prompt = self.get_prompt(batch_size, task_ids=task_ids).to(tokens.dtype)
            inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, tokens], dim=1)}
            if positions is not None:
                first = torch.arange(added, device=positions.device).expand(len(positions), -1)
                inputs["position_ids"] = torch.cat([first, inputs["position_ids"]], dim=1)
        return inputs

    def _refuse_padded_window(self, mask: Tensor, added: int) -> None:
        """Refuse padding that would push the prompt out of a sliding window: it stands behind the prompt.

        Args:
            mask: (B, K), without the prompt.
        """
        window = _window(self.config)
        if window is not None and added + mask.shape[1] > window and not bool(mask.all()):
            raise AdapterError(
                f"the decoder's sliding window of {window} tokens does not take the {added} of the learned prompt and "
                f"a padded batch of {mask.shape[1]}: padding would stand in the prompt's place",
                where="generate",
                remedy="generate one sample at a time (batch size 1)",
            )


def refuse_host(config: Any, kind: type[nn.Module]) -> None:
    """Refuse hosts whose positions or token types PEFT would compute without its prompt, or drop.

    Args:
        config: the host's.
        kind: its class.

    Raises:
        HostError: naming the class and the reason.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if any(isinstance(each, Mapping) and "mrope_section" in each for each in (rope, *rope.values())):
        raise HostError(
            f"{kind.__name__} counts positions in three directions (M-RoPE), and PEFT has no positions for a learned "
            "prompt in front of them",
            remedy=_REMEDY,
        )
    types = [name for name in inspect.signature(kind.forward).parameters if name.endswith("token_type_ids")]
    if text is not config and types and not issubclass(kind, AlulaForConditionalGeneration):  # which does without
        raise HostError(
            f"{kind.__name__} sees by `{types[0]}` which tokens are an image, and PEFT has none for a learned prompt",
            remedy=_REMEDY,
        )


def check_prompt(model: PeftModel, *, where: str) -> None:
    """Ask a model with a learned prompt three tokens, by its forward and by `generate`, whose cache must hold it once.

    Args:
        model: in eval mode.
        where: the adapter, for the error.

    Raises:
        AdapterError: the prompt is left out or put in twice, or the two answer differently. HostError: see
            `refuse_host`.
    """
    config: Any = model.active_peft_config
    host = unwrap(model)
    refuse_host(host.config, type(host))
    ids = _plain_tokens(host)
    steps: dict[str, Any] = {"max_new_tokens": _STEPS, "min_new_tokens": _STEPS, "max_length": None, "num_beams": 1}
    try:
        with torch.no_grad(), quiet_loading():
            said = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **steps,
            )
            seen = said.sequences[:, :-1]
            whole = model(input_ids=seen, attention_mask=torch.ones_like(seen), use_cache=True)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"{type(host).__name__} does not run behind its learned prompt: {first_line(error)}",
            where=where,
            remedy=_REMEDY,
        ) from error
    expected = seen.shape[1] + config.num_virtual_tokens
    for name, output in (("generate", said), ("forward", whole)):
        cache = cache_of_output(output)
        tokens = 0 if cache is None else int(cache.get_seq_length())
        if tokens != expected:
            raise AdapterError(
                f"{name} leaves {tokens} tokens in its cache, and {config.num_virtual_tokens} of the prompt with "
                f"{seen.shape[1]} tokens are {expected}: the prompt is lost or repeated",
                where=where,
                remedy="load the adapter by alula.load_model, which puts the prompt in itself",
            )
    stepwise, at_once = torch.stack(said.logits, dim=1).float(), whole.logits[:, -_STEPS:].float()
    apart = float((stepwise - at_once).norm() / at_once.norm())
    if not apart < _TOLERANCE:
        raise AdapterError(
            f"generate and forward differ by {apart:.0%} behind the learned prompt",
            where=where,
            remedy="load the adapter by alula.load_model; if it was, use method lora or wings",
        )


def refuse_lost_prompt(model: nn.Module) -> None:
    """Check a model whose prompt PEFT puts in, handed over by somebody else; others are let through unseen.

    Raises:
        AdapterError, HostError: as `check_prompt`.
    """
    if isinstance(model, PromptedModel) or not isinstance(model, PeftModel):
        return
    if model.active_peft_config.is_prompt_learning:
        check_prompt(model, where=type(model).__name__)


def _refuse_fixed(cache: Any, mask: Any) -> None:
    """Refuse caches of a fixed size: their masks are made before the prompt is put in."""
    if not isinstance(cache, DynamicCache | None) or (mask is not None and getattr(mask, "ndim", None) != 2):
        raise AdapterError(
            f"a learned prompt cannot be put in front of a {type(cache).__name__} and its ready masks",
            where="generate",
            remedy="leave `cache_implementation` out, or hand over a DynamicCache and a mask (B, K)",
        )


def _window(config: Any) -> int | None:
    """Width of the decoder's sliding window, where any layer has one."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    return getattr(text, "sliding_window", None) if types is None or "sliding_attention" in types else None


def _plain_tokens(host: Any) -> Tensor:
    """(1, 3) tokens without a meaning of their own: the first that no entry of the configs names."""
    text = host.config.get_text_config(decoder=True)
    named = {
        token
        for config in (host.config, text)
        for key, value in config.to_dict().items()
        if key.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
    }
    plain = [token for token in range(text.vocab_size) if token not in named][:3]
    return torch.tensor([plain], device=host.get_input_embeddings().weight.device)
