"""Caches that hold some tokens of a layer: whatever is done to them, what follows is as computed afresh."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from alula import TokenMap
from alula.errors import UsageError
from alula.policies import Budget, Policy, Prune, Skip, Stand, Withdraw
from alula.seam import Work
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import prompt_tokens, run, token_map, true_positions
from tests.policies.oracle import masked
from tests.policies.test_withdraw import LAYERS, close, withdrawn

CACHE = cache_keyword()
TEXT_HOSTS = ("llama", "mistral", "gemma2", "gemma3", "opt", "gpt2")
POLICY = Withdraw(layer=1)


def expected_of(model: Any, host: str, inputs: dict[str, Tensor]) -> Tensor:
    with masked(model, withdrawn(1)):
        return run(model, host, inputs, use_cache=False)


@torch.no_grad()
def step(model: Any, host: str, ids: Tensor, mask: Tensor, cache: Any, **given: Any) -> Any:
    """One forward of some tokens behind a cache."""
    told = {"token_map": token_map({"input_ids": ids, "attention_mask": mask[:, -ids.shape[1] :]})}
    options = told if host in zoo.TEXT else {}
    return model(input_ids=ids, attention_mask=mask, **given, **options, **{CACHE: cache}, use_cache=True)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 9), (4, 8), (3, 7, 8)])
@pytest.mark.parametrize("host", TEXT_HOSTS)
def test_a_prompt_in_pieces(host: str, cuts: tuple[int, ...]) -> None:
    """Cut anywhere, also inside an image, also so that a piece is all image; ragged."""
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I2I2", "9I2", "I6I1")
    ids, mask, length = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    expected, pieces, cache = expected_of(model, host, inputs), [], None
    with POLICY.on(model):
        for start, stop in zip((0, *cuts), (*cuts, length), strict=True):
            out = step(model, host, ids[:, start:stop], mask[:, :stop], cache)
            cache = cache_of_output(out)
            pieces.append(out.logits)
    valid = mask.bool()
    close(torch.cat(pieces, dim=1)[valid], expected[valid])


@pytest.mark.parametrize("host", ["llama", "gemma3"])
def test_a_prompt_in_pieces_at_dense_positions(host: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I2I2", "9I2", "I6I1")
    ids, mask, length = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1]
    places, pieces, cache = true_positions(inputs), [], None
    with Withdraw(layer=1, positions="dense").on(model):
        expected = run(model, host, inputs, position_ids=places)
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, length)):
            given = {"position_ids": places[:, start:stop]}
            out = step(model, host, ids[:, start:stop], mask[:, :stop], cache, **given)
            cache = cache_of_output(out)
            pieces.append(out.logits)
    valid = mask.bool()
    close(torch.cat(pieces, dim=1)[valid], expected[valid])


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
    expected = expected_of(model, host, whole)
    with POLICY.on(model):
        cache = cache_of_output(step(model, host, first["input_ids"], first["attention_mask"], None, **rest_of(first)))
        given = rest_of(turn) | ({"token_type_ids": whole["token_type_ids"]} if "token_type_ids" in whole else {})
        out = step(model, host, turn["input_ids"], whole["attention_mask"], cache, **given)
    valid = turn["attention_mask"].bool()
    close(out.logits[valid], expected[:, known:][valid])


def test_a_later_turn_with_an_image_under_multimodal_positions() -> None:
    host = "qwen2_5_vl"
    model, first, turn = zoo.build(host, layers=LAYERS), zoo.batch(host, "2I2"), zoo.batch(host, "1I2", seed=5)
    whole = {
        name: torch.cat([first[name], turn[name]], dim=1)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    whole |= {name: torch.cat([first[name], turn[name]]) for name in ("pixel_values", "image_grid_thw")}
    known = first["input_ids"].shape[1]
    places, _ = model.model.get_rope_index(
        whole["input_ids"],
        whole["mm_token_type_ids"],
        image_grid_thw=whole["image_grid_thw"],
        attention_mask=whole["attention_mask"],
    )
    expected = expected_of(model, host, whole)
    with POLICY.on(model):
        cache = cache_of_output(step(model, host, first["input_ids"], first["attention_mask"], None, **rest_of(first)))
        given = rest_of(turn) | {"position_ids": places[..., known:]}
        out = step(model, host, turn["input_ids"], whole["attention_mask"], cache, **given)
    close(out.logits, expected[:, known:])


def rest_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("change", ["reordered", "repeated", "selected", "cropped to words", "cropped into the prompt"])
@pytest.mark.parametrize("host", ["llama", "opt", "qwen3"])
def test_what_is_done_to_a_cache_is_done_to_what_it_knows(host: str, change: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I2", "5", "I4")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    samples = {"reordered": [2, 0, 1], "repeated": [0, 0, 1, 1, 2, 2], "selected": [2]}.get(change, [0, 1, 2])
    cut = 4 if change == "cropped into the prompt" else 0
    more = torch.tensor([[5, 7]]).expand(len(samples), -1)
    whole_ids = torch.cat([ids[samples][:, : ids.shape[1] - cut], more], dim=1)
    whole_mask = torch.cat([mask[samples][:, : ids.shape[1] - cut], torch.ones_like(more)], dim=1)
    expected = expected_of(model, host, {"input_ids": whole_ids, "attention_mask": whole_mask})[:, -2:]
    with POLICY.on(model):
        cache: Any = cache_of_output(step(model, host, ids, mask, None))
        if change == "reordered":
            cache.reorder_cache(torch.tensor(samples))
        elif change == "repeated":
            cache.batch_repeat_interleave(2)
        elif change == "selected":
            cache.batch_select_indices(torch.tensor(samples))
        elif cut:
            cache.crop(-cut)
        else:
            step(model, host, torch.tensor([[9, 9]] * 3), torch.cat([mask, mask[:, :2] * 0 + 1], dim=1), cache)
            cache.crop(-2)
        found = step(model, host, more, whole_mask, cache).logits
    close(found, expected)


@pytest.mark.parametrize("case", ["withdraw", "prune", "skip", "own keys"])
@pytest.mark.parametrize("host", ["llama", "mistral", "gemma3"])
def test_a_cache_that_was_reset_begins_anew(host: str, case: str) -> None:
    """Also with another number of samples."""
    model, cache = zoo.build(host, layers=LAYERS), None
    with NEIGHBORS[case].on(model):
        for layouts in (("3I2", "5"), ("I4I2",), ("3I2", "I3", "2I6")):
            inputs = zoo.batch(host, *layouts)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            more = torch.full((len(layouts), 1), 7)
            whole = torch.cat([mask, torch.ones_like(more)], dim=1)
            found = []
            for used in (None, cache):
                out = step(model, host, ids, mask, used)
                found += [out.logits, step(model, host, more, whole, cache_of_output(out)).logits]
            cache = cache_of_output(out)
            for afresh, again in zip(found[:2], found[2:], strict=True):
                assert torch.equal(afresh, again)
            cache.reset()


ASSISTED = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "a helper": {}, "a copy under a policy of its own": {}}


@pytest.mark.parametrize("way", ASSISTED)
@pytest.mark.parametrize("host", ["llama", "mistral", "gemma3", "llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_drafts_are_checked_and_cropped(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I6")
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, -6:-3]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    with masked(model, withdrawn(1)):
        expected = model.generate(**inputs, **options, use_cache=False)
    helper = copy.deepcopy(model) if way.startswith("a copy") else zoo.build(host, seed=5)
    drafts = ASSISTED[way] or {"assistant_model": helper}
    with POLICY.on(model), prompt_tokens(model, host, inputs):
        if way.startswith("a copy"):
            with Withdraw(layer=2).on(helper), prompt_tokens(helper, host, inputs):
                ours = model.generate(**inputs, **options, **drafts)
        else:
            ours = model.generate(**inputs, **options, **drafts)
    assert torch.equal(ours, expected)


def test_generate_reads_a_long_prompt_in_chunks() -> None:
    model, inputs = zoo.build("llama", layers=LAYERS), zoo.batch("llama", "3I2I2")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    with masked(model, withdrawn(1)):
        expected = model.generate(**inputs, **options, use_cache=False)
    model.config.image_token_id = zoo.IMAGE  # its chunks say by themselves what is an image in them
    with POLICY.on(model):
        ours = model.generate(**inputs, **options, prefill_chunk_size=5)
    assert torch.equal(ours, expected)


def test_the_cache_holds_what_is_left_and_reports_all() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2I2")
    with POLICY.on(model), torch.no_grad():
        cache: Any = cache_of_output(model(**inputs, use_cache=True))
    assert [layer.keys.shape[-2] for layer in cache.layers[:LAYERS]] == [15, 7, 7, 7]
    assert [layer.get_seq_length() for layer in cache.layers[:LAYERS]] == [15] * LAYERS
    assert len({id(layer.slots) for layer in cache.layers[1:LAYERS]}) == 1


def test_behind_the_policy_its_cache_is_refused_and_under_it_goes_on() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2")
    more = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad():
        with POLICY.on(model):
            cache: Any = cache_of_output(model(**inputs, use_cache=True))
        with pytest.raises(UsageError, match="5 of 9"):
            model(**more, **{CACHE: copy.deepcopy(cache)})
        with POLICY.on(model):
            model(**more, **{CACHE: cache})


@pytest.mark.parametrize("kind", ["static", "quantized"])
def test_caches_without_room_for_some_are_refused(kind: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2")
    cache: Any = StaticCache(model.config.get_text_config(), 32)
    if kind == "quantized":
        cache = DynamicCache(config=model.config.get_text_config())
        cache.layers[1].__class__ = type("QuantizedLayer", (type(cache.layers[1]),), {})
    with POLICY.on(model), torch.no_grad(), pytest.raises(UsageError, match="use a cache that grows"):
        model(**inputs, **{CACHE: cache})


NEIGHBORS: dict[str, Policy] = {
    "withdraw": POLICY,
    "prune": Prune(stages=[(1, 0.5)]),
    "skip": Skip(part="mlp"),
    "own keys": Skip(part="block", layers=(1, 2), keys="own"),
}


@pytest.mark.parametrize("case", NEIGHBORS)
@pytest.mark.parametrize("host", ["llava-llama", "llava-mistral", "llava-gemma3"])
def test_a_neighbor_of_text_alone_stays_what_it_is_up_to_rounding(host: str, case: str) -> None:
    """As the host's own numbers do between two batches: their sums are of other lengths. Alone it keeps its bits."""
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I2I2I9I", "17")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    plain, said = run(model, host, inputs), model.generate(**inputs, **options)
    with NEIGHBORS[case].on(model):
        ours = run(model, host, inputs)
        assert torch.equal(model.generate(**inputs, **options)[1], said[1])
    assert (ours - plain)[0].abs().max() > 1e-3
    torch.testing.assert_close(ours[1, -17:], plain[1, -17:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        Prune(stages=[(1, 0.5)]),
        Skip(part="block", keys="own"),
        Budget.model_validate({"image_tokens": 2, "by": "grid"}),
        Budget(image_tokens=2),
        Prune.model_validate({"stages": ((1, 0.5),), "criterion": "duplicates"}),
        Prune.model_validate({"stages": ((1, "knee"), (2, 0.25)), "criterion": "instruction_attention"}),
        Prune.model_validate({"stages": ((0, 0.5),), "criterion": "tower_attention", "merge": "contextual"}),
        Prune.model_validate(
            {"stages": ((0, 0.5), (1, 0.25)), "criterion": {"name": "last_query_attention", "of_layer": "itself"}}
        ),
    ],
    ids=["withdraw", "prune", "skip", "grid", "pooling", "duplicates", "knee", "tower", "itself"],
)
def test_no_forward_is_kept_alive(policy: Policy) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "5")
    seen: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        with policy.on(model), torch.no_grad():
            handle = model.model.language_model.layers[0].register_forward_pre_hook(
                lambda layer, args, kwargs: seen.append(weakref.ref(kwargs["alula"])), with_kwargs=True
            )
            cache: Any = cache_of_output(model(**inputs, use_cache=True))
            model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache})
            handle.remove()
        assert [each() for each in seen] == [None, None]
    finally:
        gc.enable()


def test_eager_attention_is_barred_alike() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "5", "I4I2")
    with POLICY.on(model):
        expected = run(model, "llava-llama", inputs)
    zoo.set_attention(model, "eager")
    with POLICY.on(model):
        ours = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])


def test_two_policies_leave_what_both_leave() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "I4I2")
    with Withdraw(layer=1).on(model):
        alone = run(model, "llava-llama", inputs)
        with Withdraw(layer=2).on(model):
            assert torch.equal(run(model, "llava-llama", inputs), alone)


class _EveryThird(Policy):
    """Of text every third token has no work from layer 2 on, in steps as in prompts. It says of no forward that it
    rests."""

    policy_type: ClassVar[str] = "every_third_in_tests"

    def place(self, stand: Stand) -> None:
        for layer in range(2, stand.anatomy.num_layers):
            stand.work(layer, self)

    def work(self, view: Any, hidden: Tensor) -> Work:
        return view.ctx.once(_but_every_third, view.ctx.tokens)


def _but_every_third(tokens: TokenMap) -> Work:
    return Work.of(~tokens.is_text | (tokens.position % 3 != 0))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3"])
def test_steps_where_nobody_or_somebody_takes_out_their_token(host: str, together: bool) -> None:
    """One sample without a padding mask: a layer of fewer keys may be run as the host's own."""
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "3I4")
    del inputs["attention_mask"]
    ids, rest = inputs.pop("input_ids"), inputs
    more = torch.randint(5, 40, (1, 7), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([ids, more], dim=1)

    def left(layer: int, ids: Tensor) -> Tensor:
        here = withdrawn(1)(layer, ids)
        third = torch.arange(ids.shape[1]).expand_as(ids) % 3 == 0
        return here & ~(third & withdrawn(0)(0, ids)) if together and layer >= 2 else here

    given = dict(rest)
    if "token_type_ids" in given:
        given["token_type_ids"] = torch.nn.functional.pad(given["token_type_ids"], (0, 7))
    with masked(model, left), torch.no_grad():
        expected = model(input_ids=whole, **given, use_cache=False).logits
    with POLICY.on(model), _EveryThird().on(model) if together else nullcontext(), torch.no_grad():
        out = model(input_ids=ids, **rest)
        for place in range(ids.shape[1], whole.shape[1]):
            out = model(input_ids=whole[:, place : place + 1], **{CACHE: cache_of_output(out)})
            close(out.logits[:, -1], expected[:, place])
