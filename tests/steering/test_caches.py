"""Highlights while generating: caches, later turns, beams, samples, drafts; beside policies, grafts and probes."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula import WingsConfig
from alula.errors import SeamError, UsageError
from alula.policies import Withdraw
from alula.seam import generation_extras, install
from alula.seam import marked as seam_marked
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.steering import Shift
from tests import zoo
from tests.steering import oracle
from tests.steering.test_highlight import GUIDANCE, STRENGTH, given, marked

CACHE = cache_keyword()
OPTIONS: dict[str, Any] = {"strength": STRENGTH, "guidance": GUIDANCE}


def generated(model: Any, inputs: dict[str, Tensor], marks: Tensor, steps: int = 6, **options: Any) -> Tensor:
    """(B, steps) of what is generated under a highlight."""
    with alula.highlight(model, **OPTIONS), generation_extras(model, given(inputs, marks)) as extras:
        return model.generate(**extras, **{"max_new_tokens": steps, "do_sample": False, **options})[:, -steps:]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llava-qwen3", "qwen2_5_vl", "gemma3_vl"])
def test_greedy_equals_two_branches_without_caches(name: str) -> None:
    layouts = ("9", "5") if name in zoo.TEXT else ("3I4", "2I1")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    marks = marked(inputs, (1, 5), (5, 7))
    expected = oracle.greedy(model, inputs, marks, 6, strength=STRENGTH, guidance=GUIDANCE)
    assert torch.equal(generated(model, inputs, marks), expected)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1},
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    """Each gives what the plain one does. Drafts are cropped, in both runs' caches."""
    model = zoo.build("qwen3")
    inputs = zoo.batch("qwen3", "9") if "prompt_lookup_num_tokens" in options else zoo.batch("qwen3", "9", "5")
    marks = marked(inputs, *[(1, 5), (5, 7)][: len(inputs["input_ids"])])
    expected = generated(model, inputs, marks)
    assert torch.equal(generated(model, inputs, marks, **options), expected)


@pytest.mark.parametrize("name", ["qwen3", "llava-mistral"])
def test_beams(name: str) -> None:
    """Cached beams, whose two caches are reordered together, equal beams without caches."""
    layouts = ("9", "5") if name in zoo.TEXT else ("3I4", "2I1")
    model, inputs = zoo.build(name), zoo.batch(name, *layouts)
    marks = marked(inputs, (1, 5), (5, 7))
    beams = {"num_beams": 3, "length_penalty": 0.0}
    expected = generated(model, inputs, marks, use_cache=False, **beams)
    assert torch.equal(generated(model, inputs, marks, **beams), expected)
    assert not torch.equal(expected, generated(model, inputs, marks))


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"num_beams": 2}], ids=str)
def test_a_sample_is_one_token_for_both_runs(options: dict[str, Any]) -> None:
    """What is drawn does not depend on caches, so both runs were told of the same tokens."""
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks, found = marked(inputs, (1, 5), (5, 7)), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generated(model, inputs, marks, use_cache=use_cache, do_sample=True, temperature=1.5, **options))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_later_turn_may_highlight_something_else() -> None:
    """Cached tokens stay what they were when they were read; from then on attention follows the new highlight."""
    model, first = zoo.build("qwen3"), zoo.batch("qwen3", "9", "6")
    more = torch.tensor([[3, 4, 5], [6, 7, 8]])
    marks = marked(first, (1, 5), (4, 6))
    whole, later = oracle.extended(first, torch.zeros_like(marks), more)
    later[0, 9:11] = 1
    later[1, 4:6] = -1  # what was highlighted before is turned away from

    def turns(prompt: Tensor | None, *, guided: tuple[bool, bool] = (True, True)) -> Tensor:
        with alula.highlight(model, strength=STRENGTH, guidance=GUIDANCE if guided[0] else 1):
            output = model(**first, use_cache=True, **({} if prompt is None else {"highlighted": prompt}))
        after = {"input_ids": more, "attention_mask": whole["attention_mask"], CACHE: cache_of_output(output)}
        with alula.highlight(model, strength=STRENGTH, guidance=GUIDANCE if guided[1] else 1):
            return model(**given(after, later)).logits

    unlike, without, middle = turns(marks), turns(None), turns(marks, guided=(False, True))
    # nothing highlighted in the first turn, and later marks of new tokens alone: as if read at once
    later[1] = 0
    with alula.highlight(model, **OPTIONS):
        alike = model(**given(whole, later)).logits[:, -3:]
    torch.testing.assert_close(turns(None), alike, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(unlike[1], without[1], atol=1e-2)
    assert not torch.allclose(unlike, middle, atol=1e-3)


@torch.no_grad()
def test_a_kept_cache_is_cropped_with_its_second_half() -> None:
    model, inputs = zoo.build("llama"), zoo.batch("llama", "9")
    marks = marked(inputs, (1, 5))
    with alula.highlight(model, **OPTIONS):
        cache = cache_of_output(model(**given(inputs, marks)))
        assert cache is not None
        for _ in range(2):
            whole, known = oracle.extended(inputs, marks, torch.tensor([[3, 4]]))
            after = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": whole["attention_mask"], CACHE: cache}
            found = model(**given(after, known)).logits
            cache.crop(-2)
        expected = model(**given(whole, known)).logits[:, -2:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_threads_and_copies() -> None:
    """Two threads go through one model, one of them highlighted; a copy of the model is not."""
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks, plain = marked(inputs, (1, 5), (5, 7)), model(**inputs).logits
    found: dict[str, list[Tensor]] = {"one": [], "other": []}
    with alula.highlight(model, **OPTIONS):
        expected, other = model(**given(inputs, marks)).logits, copy.deepcopy(model)
        assert torch.equal(other(**inputs).logits, plain)

        def run() -> None:
            with torch.no_grad():
                found["other"] += [model(**inputs).logits for _ in range(10)]

        thread = threading.Thread(target=run)
        thread.start()
        found["one"] = [model(**given(inputs, marks)).logits for _ in range(10)]
        thread.join()
    assert all(torch.equal(each, expected) for each in found["one"])
    assert all(torch.equal(each, plain) for each in found["other"])


def test_beside_policies_and_grafts() -> None:
    """Withdrawn image tokens take their highlight with them; a fresh graft adds nothing."""
    model, inputs = zoo.build("llava-qwen3"), zoo.batch("llava-qwen3", "3I4", "2I1")
    marks = marked(inputs, (3, 9), (6, 8))
    with Withdraw(layer=1).on(model):
        cached, without = generated(model, inputs, marks), generated(model, inputs, marks, use_cache=False)
    assert torch.equal(cached, without)
    expected = generated(model, inputs, marks)
    alula.attach(model, WingsConfig(rank=4))
    assert torch.equal(generated(model, inputs, marks), expected)


@torch.no_grad()
def test_readings_are_of_first_runs() -> None:
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9")
    seam, seen = install(model, "reader"), []
    seam.at_end(lambda ctx: seen.append(ctx.tokens.shape), mark="reader")
    with alula.highlight(model, **OPTIONS), seam_marked("reader"):
        model(**given(inputs, marked(inputs, (1, 5))))
    assert len(seen) == 1


@torch.no_grad()
def test_the_probability_form_is_for_one_token() -> None:
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks = marked(inputs, (1, 5), (5, 7))
    one, other = oracle.branches(model, inputs, marks, strength=STRENGTH)
    with alula.highlight(model, **OPTIONS, by=Shift(probability=True)):
        found = model(**given(inputs, marks)).logits[:, -1]
        with generation_extras(model, given(inputs, marks)) as extras:
            assert model.generate(**extras, max_new_tokens=1, do_sample=False).shape[1] == 10
            with pytest.raises(UsageError, match="one token can be read"):
                model.generate(**extras, max_new_tokens=2, do_sample=False)
    expected = GUIDANCE * one.exp() - (GUIDANCE - 1) * other.exp()
    torch.testing.assert_close(found, expected[:, -1], atol=1e-4, rtol=1e-3)


def test_refusals() -> None:
    model, inputs = zoo.build("qwen3"), zoo.batch("qwen3", "9", "5")
    marks = marked(inputs, (1, 5), (5, 7))
    with pytest.raises(UsageError, match="no second run"), alula.highlight(model, guidance=1, by=Shift(margin=1)):
        pass
    with pytest.raises(UsageError, match="do nothing"), alula.highlight(model, strength=0, guidance=1):
        pass
    with pytest.raises(UsageError, match="strength is a finite number"), alula.highlight(model, strength=math.nan):
        pass
    with pytest.raises(UsageError, match="there is none"), alula.highlight(model, spans=["a"]):
        pass
    with alula.highlight(model):
        with pytest.raises(UsageError, match="a loss was asked for"):
            model(**given(inputs, marks), labels=inputs["input_ids"])
        with pytest.raises(SeamError, match="called past its host"):
            model.model(**given(inputs, marks))
        with pytest.raises(UsageError, match=r"\(samples, tokens\)"):
            model(**given(inputs, marks[..., None]))
        with pytest.raises(UsageError, match="of 3 samples"):
            model(**given(inputs, torch.ones(3, 9)))
        with alula.highlight(model), pytest.raises(UsageError, match="two contrasts"):
            model(**given(inputs, marks))
