"""What the seam does not know it refuses: never a number computed from a past that nobody saw."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModel

import alula
from alula.errors import AlulaError, SeamError, UsageError
from alula.probes import AttentionShift
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, grafted, wake

CACHE = cache_keyword()
STEP = torch.tensor([[5]])

# -- names of transformers' that change again --------------------------------------------------------------------


class RenamedModel(LlavaModel):
    """A LLaVA of some later transformers, whose models take their cache as `memory`."""

    def forward(self, input_ids: Any = None, *, memory: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: memory[0] if isinstance(memory, list) else memory}, **kwargs)


class RenamedHost(LlavaForConditionalGeneration):
    """The same with its head. `boxed`: not even the type of what is handed on is known."""

    boxed = False

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        cache = kwargs.pop(CACHE, None)
        out = self.model(input_ids, memory=[cache] if self.boxed else cache, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(out[0]), **{CACHE: cache_of_output(out)})


def _rename_in_layers(host: Any, *, boxed: bool) -> None:
    """Have decoder layers take `memory` too."""

    def rename(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.pop(CACHE, None)
        return args, {**kwargs, "memory": [cache] if boxed else cache}

    for layer in host.model.language_model.layers:
        layer.register_forward_pre_hook(rename, with_kwargs=True)
        forward = layer.forward

        def restored(*args: Any, memory: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            return _forward(*args, **{CACHE: memory[0] if isinstance(memory, list) else memory}, **kwargs)

        layer.forward = restored


def _two_forwards(host: Any) -> None:
    out = host(**zoo.batch("llava-qwen3", "2I3"), use_cache=True)
    host(input_ids=STEP, **{CACHE: cache_of_output(out)})


@pytest.mark.parametrize("config", ["mass", "constant"])
@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("where", ["model", "layers", "both"])
def test_a_renamed_cache_is_an_error_and_no_wrong_answer(where: str, boxed: bool, config: str) -> None:
    host = zoo.build("llava-qwen3")
    if where != "layers":
        host.__class__, host.model.__class__ = RenamedHost, RenamedModel
        host.boxed = boxed
    if where != "model":
        _rename_in_layers(host, boxed=boxed)

    with torch.no_grad():
        _two_forwards(host)  # the host knows its own names
        wake(alula.attach(host, CONFIGS[config]))
        with pytest.raises(SeamError, match=r"cache|keys"):
            _two_forwards(host)


def test_a_renamed_cache_is_an_error_under_a_probe() -> None:
    host = zoo.build("llava-qwen3")
    host.__class__, host.model.__class__ = RenamedHost, RenamedModel
    host.boxed = True
    probe = AttentionShift()
    with torch.no_grad(), probe.on(host), pytest.raises(SeamError, match="another cache"):
        _two_forwards(host)


@pytest.mark.parametrize("names", [("cache", "past_key_values"), ("past_key_values", "cache")])
def test_the_cache_counts_under_either_name_and_beside_a_none(names: tuple[str, str]) -> None:
    """transformers itself prefers the newer name, even where it holds None."""
    model, _ = grafted("llava-qwen3", "mass")
    with torch.no_grad():
        cache = cache_of_output(model(**zoo.batch("llava-qwen3", "2I3"), use_cache=True))
        expected = model(input_ids=STEP, **{CACHE: copy.deepcopy(cache)}).logits
        both = model(input_ids=STEP, **{names[0]: copy.deepcopy(cache), names[1]: None}).logits
        assert torch.equal(both, expected)
        with pytest.raises(UsageError, match="two caches"):
            model(input_ids=STEP, **{names[0]: cache, names[1]: DynamicCache()})


def test_a_mask_of_tokens_that_no_cache_holds_is_refused() -> None:
    model, _ = grafted("llava-qwen3", "constant")
    with torch.no_grad(), pytest.raises(UsageError, match="attention_mask speaks of 9 tokens, and there are 0"):
        model(input_ids=STEP, attention_mask=torch.ones(1, 9))


def test_what_is_given_by_position_is_read() -> None:
    model, _ = grafted("llava-qwen3", "mass")
    inputs = zoo.batch("llava-qwen3", "2I3", "I1")
    with torch.no_grad():
        named = model.model(**inputs)[0]
        placed = model.model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])[0]
    assert torch.equal(named, placed)


# -- classes that keep positions on the model --------------------------------------------------------------------


def test_image_tokens_are_not_counted_like_text() -> None:
    model, _ = grafted("qwen2_5_vl", "mass")
    inputs = zoo.batch("qwen2_5_vl", "2I3")
    del inputs["mm_token_type_ids"]
    with torch.no_grad(), pytest.raises(UsageError, match="without mm_token_type_ids"):
        model(**inputs)


def test_positions_left_behind_do_not_shift_embeddings() -> None:
    model, _ = grafted("qwen2_5_vl", "mass")
    text = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    tokens = alula.TokenMap.text(1, 3)
    with torch.no_grad():
        expected = model(inputs_embeds=text, token_map=tokens).logits
        model(**zoo.batch("qwen2_5_vl", "2I3"))
        with pytest.raises(UsageError, match="would shift the positions"):
            model(inputs_embeds=text, token_map=tokens)
        model.model.rope_deltas = None
        assert torch.equal(model(inputs_embeds=text, token_map=tokens).logits, expected)


def test_a_cache_from_which_samples_were_taken_does_not_go_on_anyhow() -> None:
    model, _ = grafted("qwen2_5_vl", "mass")
    with torch.no_grad():
        cache = cache_of_output(model(**zoo.batch("qwen2_5_vl", "2I3", "1I4"), use_cache=True))
        cache.batch_select_indices(torch.tensor([1]))
        model(**zoo.batch("qwen2_5_vl", "1I2I1"))
        with pytest.raises(SeamError, match="has read another prompt"):
            model(input_ids=STEP, position_ids=torch.full((3, 1, 1), 50), **{CACHE: cache})


def test_a_cache_does_not_go_on_with_the_positions_of_another_prompt() -> None:
    """These classes keep the offset of one prompt on the model; two prompts read in turn get each other's."""
    model, _ = grafted("qwen2_5_vl", "mass")
    ones, others = zoo.batch("qwen2_5_vl", "2I3"), zoo.batch("qwen2_5_vl", "1I2I1")
    with torch.no_grad():
        cache = cache_of_output(model(**ones, use_cache=True))
        expected = model(input_ids=STEP, **{CACHE: copy.deepcopy(cache)}).logits
        positions = torch.full((3, 1, 1), ones["input_ids"].shape[1]) + model.model.rope_deltas
        model(**others)
        with pytest.raises(SeamError, match="has read another prompt"):
            model(input_ids=STEP, **{CACHE: copy.deepcopy(cache)})
        with pytest.raises(SeamError, match="has read another prompt"):
            model(input_ids=STEP, position_ids=positions - 1, **{CACHE: copy.deepcopy(cache)})
        given = model(input_ids=STEP, position_ids=positions, **{CACHE: copy.deepcopy(cache)}).logits
    torch.testing.assert_close(given, expected)


# -- images whose tokens see one another -------------------------------------------------------------------------


def test_an_image_in_a_later_turn_is_seen_as_a_whole_or_refused() -> None:
    model = zoo.build("gemma3_vl")
    ids = torch.tensor([zoo.prompt("2I3I2")])
    types = (ids == zoo.IMAGE).long()
    pixels = zoo.pixels("gemma3_vl", 2)["pixel_values"]
    cut = 2 + zoo.TOKENS_PER_IMAGE + 2
    wake(alula.attach(model, CONFIGS["mass"]))
    with torch.no_grad():
        whole = model(input_ids=ids, token_type_ids=types, pixel_values=pixels).logits
        first = model(input_ids=ids[:, :cut], token_type_ids=types[:, :cut], pixel_values=pixels[:1], use_cache=True)
        cache, rest = cache_of_output(first), {"input_ids": ids[:, cut:], "pixel_values": pixels[1:]}
        for given in ({}, {"token_type_ids": types[:, cut:]}):
            with pytest.raises(UsageError, match=f"token_type_ids of all {ids.shape[1]} tokens"):
                model(**rest, **given, **{CACHE: copy.deepcopy(cache)})
        second = model(**rest, token_type_ids=types, **{CACHE: cache}).logits
    torch.testing.assert_close(second, whole[:, cut:], atol=1e-4, rtol=1e-4)


# -- caches that are cropped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-qwen3", "llava-gemma3"])
def test_a_crop_is_followed_or_the_next_step_refuses(name: str) -> None:
    """A cache layer with a window cannot be cropped unless it was told to record; some layers are cropped by then."""
    model, _ = grafted(name, "mass")
    inputs = zoo.batch(name, "2I9")
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
        expected = model(input_ids=STEP, **{CACHE: copy.deepcopy(cache)}).logits
        cropped = cache_of_output(model(input_ids=torch.tensor([[7, 8]]), **{CACHE: copy.deepcopy(cache)}))
        with pytest.raises((ValueError, RuntimeError)):
            cropped.crop(3)  # positive counts are a thing of the past
        if name == "llava-qwen3":
            cropped.crop(-2)
            torch.testing.assert_close(model(input_ids=STEP, **{CACHE: cropped}).logits, expected)
            return
        with pytest.raises(RuntimeError):
            cropped.crop(-2)
        for layer in list(cropped.layers)[2:]:
            layer.crop(-2)  # what a caller may do who takes the error for one of these layers
        with pytest.raises(AlulaError, match="is known"):
            model(input_ids=STEP, **{CACHE: cropped})
