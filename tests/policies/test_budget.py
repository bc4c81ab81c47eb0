"""A budget met in front of the first layer, whose own cache holds few: `generate` in all its ways, and kept caches."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from alula.errors import UsageError
from alula.policies import Budget, Withdraw
from alula.policies.endings import tell_ending
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import prompt_tokens, run
from tests.policies.oracle import masked
from tests.policies.test_caches import rest_of, step
from tests.policies.test_criteria import edited
from tests.policies.test_withdraw import HOSTS, LAYERS, LAYOUTS, WAYS, close

CACHE = cache_keyword()
POLICY = Budget.model_validate({"image_tokens": 2, "by": "grid"})


def gridded(layer: int, ids: Tensor) -> Tensor:
    """The first row of every image of two by two tokens, in all layers."""
    image = ids == zoo.IMAGE
    rank = torch.zeros_like(ids)
    for place in range(1, ids.shape[1]):
        rank[:, place] = torch.where(image[:, place] & image[:, place - 1], rank[:, place - 1] + 1, 0)
    return ~image | (rank % 4 < 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
def test_generation_equals_the_masked_oracle(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 5}
    with masked(model, gridded):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    for use_cache in (True, False):
        with POLICY.on(model), prompt_tokens(model, host, inputs):
            torch.manual_seed(0)
            ours = model.generate(**inputs, **options, use_cache=use_cache)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("way", ["prompt lookup", "a helper", "a copy under a policy of its own"])
@pytest.mark.parametrize("host", ["llama", "mistral", "gemma3", "llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_drafts_are_checked_and_cropped(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I6")
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, -6:-3]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    with masked(model, gridded):
        expected = model.generate(**inputs, **options, use_cache=False)
    helper = copy.deepcopy(model) if way.startswith("a copy") else zoo.build(host, seed=5)
    drafts = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": helper}
    with POLICY.on(model), prompt_tokens(model, host, inputs):
        if way.startswith("a copy"):
            with Withdraw(layer=2).on(helper), prompt_tokens(helper, host, inputs):
                ours = model.generate(**inputs, **options, **drafts)
        else:
            ours = model.generate(**inputs, **options, **drafts)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("host", ["llava-llama", "llava-mistral", "llava-gemma3", "gemma3_vl"])
def test_a_later_turn_with_an_image_on_a_kept_cache(host: str) -> None:
    model = zoo.build(host, layers=LAYERS)
    first, turn = zoo.batch(host, "2I2", "I3"), zoo.batch(host, "1I2", "I2", seed=5)
    whole = {
        name: torch.cat([first[name], turn[name]], dim=1)
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in first
    }
    pixels = [part["pixel_values"] for part in (first, turn)]
    whole["pixel_values"] = torch.stack([pixels[0][0], pixels[1][0], pixels[0][1], pixels[1][1]])
    known = first["input_ids"].shape[1]
    with masked(model, gridded):
        expected = run(model, host, whole, use_cache=False)
    with POLICY.on(model):
        cache: Any = cache_of_output(
            step(model, host, first["input_ids"], first["attention_mask"], None, **rest_of(first))
        )
        given = rest_of(turn) | ({"token_type_ids": whole["token_type_ids"]} if "token_type_ids" in whole else {})
        out = step(model, host, turn["input_ids"], whole["attention_mask"], cache, **given)
    stays = turn["attention_mask"].bool() & gridded(0, turn["input_ids"])
    close(out.logits[stays], expected[:, known:][stays])
    assert {layer.get_seq_length() for layer in cache.layers[:LAYERS]} == {whole["input_ids"].shape[1]}


@pytest.mark.parametrize("change", ["reordered", "repeated", "selected", "cropped to words", "cropped into the prompt"])
@pytest.mark.parametrize("host", ["llama", "mistral", "opt"])
def test_what_is_done_to_a_cache_is_done_to_what_it_knows(host: str, change: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I2", "5", "I4")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    samples = {"reordered": [2, 0, 1], "repeated": [0, 0, 1, 1, 2, 2], "selected": [2]}.get(change, [0, 1, 2])
    cut = 1 if change == "cropped into the prompt" else 0
    more = torch.tensor([[5, 7]]).expand(len(samples), -1)
    whole_ids = torch.cat([ids[samples][:, : ids.shape[1] - cut], more], dim=1)
    whole_mask = torch.cat([mask[samples][:, : ids.shape[1] - cut], torch.ones_like(more)], dim=1)
    with masked(model, gridded):
        whole = {"input_ids": whole_ids, "attention_mask": whole_mask}
        expected = run(model, host, whole, use_cache=False)[:, -2:]
    with POLICY.on(model):
        cache: Any = cache_of_output(step(model, host, ids, mask, None))
        if change == "reordered":
            cache.reorder_cache(torch.tensor(samples))
        elif change == "repeated":
            cache.batch_repeat_interleave(2)
        elif change == "selected":
            cache.batch_select_indices(torch.tensor(samples))
        elif cut and host != "mistral":
            cache.crop(-cut)
        elif cut:
            pytest.skip("what slid out of a window is gone")
        else:
            for layer in cache.layers[:LAYERS]:
                layer.activate_past_recording()
            step(model, host, torch.tensor([[9, 9]] * 3), torch.cat([mask, mask[:, :2] * 0 + 1], dim=1), cache)
            cache.crop(-2)
        found = step(model, host, more, whole_mask, cache).logits
    close(found, expected)


def test_a_label_behind_a_token_that_leaves_is_refused() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "I4I2")
    with POLICY.on(model), pytest.raises(UsageError, match="a label right behind a token of an image"):
        model(**inputs, labels=inputs["input_ids"].clone())
    labels = torch.where((inputs["input_ids"] == zoo.IMAGE).roll(1, dims=1), -100, inputs["input_ids"])
    with POLICY.on(model):
        assert bool(model(**inputs, labels=labels).loss.isfinite())


def test_a_prompt_that_ends_in_an_image_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I", "3I2")
    tell_ending.cache_clear()
    with POLICY.on(model), caplog.at_level(logging.WARNING):
        run(model, "llava-llama", zoo.batch("llava-llama", "3I2", "I4I2"))
        assert not caplog.messages
        run(model, "llava-llama", inputs)
    assert "ends in an image" in caplog.messages[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_training_under_a_pooled_budget_gives_gradients_of_every_pixel(host: str, *, checkpointing: bool) -> None:
    """Pooled at layer 1 and run by hand: the means enter, the others are barred."""
    inputs = zoo.batch(host, "3I2", "I4I2")
    ids = inputs["input_ids"]
    text = inputs["attention_mask"].bool() & (ids != zoo.IMAGE)
    gradients = []
    whole = torch.ones_like(ids, dtype=torch.bool)
    for ours in (False, True):
        model = zoo.build(host, layers=LAYERS)
        if ours and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if ours:
            with Budget(image_tokens=2, layer=1).on(model):
                model(**inputs, use_cache=False).logits[text].square().mean().backward()
        else:
            starts = [(s, p) for s, p in (ids == zoo.IMAGE).nonzero().tolist() if gridded(0, ids)[s, p]]

            def pool(hidden: Tensor, starts: Any = starts) -> Tensor:
                # two columns of a square: each token of its first row becomes the mean of itself and the one below
                rows = [hidden.unbind(dim=0)[s].unbind(dim=0) for s in range(len(hidden))]
                kept = set(map(tuple, starts))
                return torch.stack(
                    [
                        torch.stack([(row[p] + row[p + 2]) / 2 if (s, p) in kept else row[p] for p in range(len(row))])
                        for s, row in enumerate(rows)
                    ]
                )

            with masked(model, lambda at, now: gridded(at, now) if at else whole), edited(model, 1, pool):
                model(**inputs, use_cache=False).logits[text].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)
