"""Learned prompts of PEFT under `generate`: there, once, whatever the transformers of the day calls its cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor
from transformers import DynamicCache

import alula
from alula.errors import AdapterError, HostError
from alula.evaluation import evaluate
from alula.hosts.prompted import PromptedModel, check_prompt
from alula.seam.dialect import cache_keyword
from alula.serving import Conversation
from alula_fledgling.tasks import native_tasks
from tests import zoo

KINDS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=16),
}
NEW = 4
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def learned(base: Any, kind: str, cls: type[PeftModelForCausalLM] = PromptedModel) -> Any:
    """`base` behind a random prompt that is long against its rows."""
    model = cls(base, KINDS[kind]()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return model


def one_forward(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(B, NEW, V) logits of each sample's generated tokens, from one forward of its own, without padding or cache."""
    found = []
    for sample in range(len(tokens)):
        kept = torch.cat([inputs["attention_mask"][sample], torch.ones(NEW, dtype=torch.long)]).bool()
        row = tokens[sample][kept][None]
        media = {key: value[sample : sample + 1] for key, value in inputs.items() if key == "pixel_values"}
        found.append(model(input_ids=row, attention_mask=torch.ones_like(row), **media).logits[0, -NEW - 1 : -1])
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt", "llava-qwen3"])
def test_generate_starts_from_the_prompt_the_forward_has(name: str, kind: str) -> None:
    """Padded batches, images, caches given, chunked and left out; beams with a cache as without."""
    base = zoo.build(name)
    model = learned(base, kind)
    check_prompt(model, where=name)
    inputs = zoo.batch(name, *(("1I1", "I1") if name in zoo.HOSTS else ("5", "3")))
    chosen = None
    for options in (
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {cache_keyword(): DynamicCache(config=base.config)},
    ):
        said = model.generate(**inputs, **GREEDY, **options)
        expected = one_forward(model, inputs, said.sequences)
        torch.testing.assert_close(torch.stack(said.logits, dim=1), expected, rtol=1e-4, atol=1e-4)
        chosen = said.sequences
    assert not torch.equal(base.generate(**inputs, max_new_tokens=NEW, do_sample=False), chosen)
    beams = [
        model.generate(**inputs, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_cache_kept_over_two_turns_holds_the_prompt_once(kind: str) -> None:
    model = learned(zoo.build("llava-llama"), kind)
    kept = {cache_keyword(): DynamicCache(config=model.config)}
    first = model.generate(**zoo.batch("llava-llama", "2I2"), **kept, **GREEDY).sequences
    ids = torch.cat([first, torch.tensor([[4, 5, 6]])], dim=1)
    second = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kept, **GREEDY)
    whole = zoo.batch("llava-llama", "2I2") | {"input_ids": second.sequences}
    whole["attention_mask"] = torch.ones_like(second.sequences)
    expected = model(**whole).logits[:, -NEW - 1 : -1]
    torch.testing.assert_close(torch.stack(second.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_that_would_stand_in_the_prompts_place_is_refused() -> None:
    """Behind a window of 6 rows: a prompt of 3, then padding, then the sample."""
    model = learned(zoo.build("mistral"), "prefix")
    alone = zoo.batch("mistral", "8")
    said = model.generate(**alone, **GREEDY)
    expected = one_forward(model, alone, said.sequences)
    torch.testing.assert_close(torch.stack(said.logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match=r"sliding window of 6 .*\n.*batch size 1"):
        model.generate(**zoo.batch("mistral", "8", "3"), **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_fixed_caches_are_refused(kind: str) -> None:
    model = learned(zoo.build("llama"), kind)
    with pytest.raises(AdapterError, match=r"in front of a StaticCache.*\n.*cache_implementation"):
        model.generate(**zoo.batch("llama", "5"), max_new_tokens=2, cache_implementation="static")


def test_hosts_a_prompt_cannot_stand_in_front_of_are_refused() -> None:
    with pytest.raises(HostError, match=r"Qwen2_5_VL.*M-RoPE"):
        learned(zoo.build("qwen2_5_vl"), "prefix")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_or_repeated_prompt_is_seen(kind: str) -> None:
    """PEFT's own class: either it is right with this transformers, or the check says that it is not."""
    model = learned(zoo.build("llama"), kind, PeftModelForCausalLM)
    inputs = zoo.batch("llama", "5")
    said = model.generate(**inputs, **GREEDY)
    right = torch.allclose(torch.stack(said.logits, dim=1), one_forward(model, inputs, said.sequences), atol=1e-4)
    if right:
        check_prompt(model, where="here")
    else:
        with pytest.raises(AdapterError, match=r"here: .*(lost or repeated|differ by|does not run)"):
            check_prompt(model, where="here")


class _Forgetful(PeftModelForCausalLM):
    """Drops the prompt, as PEFT's own class does where the cache is called otherwise."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_with_a_prompt_load_checked(tmp_path: Path, dtype: torch.dtype) -> None:
    """Those of others too, and in half precision, where a step behind a cache rounds otherwise."""
    base, _ = alula.load_model("fledgling")
    model = learned(base, "prompt", PeftModelForCausalLM)
    model.peft_config["default"].base_model_name_or_path = "fledgling"
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = alula.load_model(tmp_path / "adapter", dtype=dtype).model
    assert isinstance(loaded, PromptedModel)
    assert loaded.dtype == dtype


def test_evaluation_and_chat_take_no_model_that_loses_its_prompt() -> None:
    base, tokenizer = alula.load_model("fledgling")
    model = learned(base, "prefix", _Forgetful)
    with pytest.raises(AdapterError, match=r"lost or repeated.*\n.*alula.load_model"):
        evaluate(model, tokenizer, native_tasks(["text_bare"], n=2, seed=0))
    with pytest.raises(AdapterError, match="lost or repeated"):
        Conversation(model, tokenizer)
