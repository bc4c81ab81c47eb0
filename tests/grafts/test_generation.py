"""Cached generation says what recomputing everything says, however the cache is filled, cropped, reordered and kept."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

import alula
from alula import TokenMap, WingsConfig
from alula.errors import AlulaError
from alula.probes import AttentionShift
from alula.seam import NAME, TokenCache
from alula.seam.cache import GraftCacheLayer
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, covering, grafted, prompt_tokens, run, token_map, wake

CACHE = cache_keyword()

TOKENS = 6
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 10},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}


def _generate(model: Any, host: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    with prompt_tokens(model, host, inputs):
        return model.generate(
            **inputs, max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True, **options
        )


class _Waits(TorchDispatchMode):
    """Counts where the host reads a number off the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


def _same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS), each=2))
def test_cached_equals_uncached(host: str, config: str, mode: str) -> None:
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, "3I2I2", "5", "I3")
    _same(
        _generate(model, host, inputs, use_cache=True, **MODES[mode]),
        _generate(model, host, inputs, use_cache=False, **MODES[mode]),
    )


@pytest.mark.parametrize(("host", "config"), covering(("llama", "gemma3", *zoo.HOSTS), list(CONFIGS), each=2))
def test_cached_steps_equal_one_pass_over_what_was_said(host: str, config: str) -> None:
    """Teacher-forced: the logits of every generated token from a single forward over prompt and answer."""
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, "3I2")
    generated = _generate(model, host, inputs, do_sample=False)
    whole = dict(inputs, input_ids=generated.sequences, attention_mask=torch.ones_like(generated.sequences))
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = (generated.sequences == zoo.IMAGE).long()
    logits = run(model, host, whole)[:, -TOKENS - 1 : -1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layouts", [("3I4",), ("3I4", "I2I1", "5"), ("5",)])
@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS), each=1))
def test_static_caches_equal_growing_ones(host: str, config: str, layouts: tuple[str, ...]) -> None:
    """Without padding, transformers builds the mask of a static cache's blank tail only if all layers let it."""
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, *layouts)
    _same(
        _generate(model, host, inputs, do_sample=False, cache_implementation="static"),
        _generate(model, host, inputs, do_sample=False),
    )


def test_steps_on_a_static_cache_are_not_waited_for() -> None:
    """Nor is a length believed that went on uncounted, as in a CUDA graph that is played again."""
    model, _ = grafted("llava-llama", "mass")
    inputs = zoo.batch("llava-llama", "3I4")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    step = {"input_ids": inputs["input_ids"][:, :1], CACHE: cache}
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        for _ in range(2):
            with _Waits() as waits:
                model(**step)
        assert waits.count == 0
        length = cache.get_seq_length()
        assert isinstance(length, torch.Tensor)
        with torch.autograd._unsafe_preserve_version_counter(length):
            length.add_(1)
        with pytest.raises(RuntimeError, match="behind alula's back"):
            model(**step)


@pytest.mark.parametrize("probed", [False, True])
def test_static_caches_under_a_probe(probed: bool) -> None:
    """A probe without a graft puts a layer on the cache too."""
    model = zoo.build("llava-qwen3")
    inputs = zoo.batch("llava-qwen3", "3I4")
    expected = _generate(model, "llava-qwen3", inputs, do_sample=False)
    with AttentionShift().on(model) if probed else nullcontext():
        _same(_generate(model, "llava-qwen3", inputs, do_sample=False, cache_implementation="static"), expected)


def test_static_caches_compiled_by_generate() -> None:
    """On a GPU `generate` compiles the whole model by itself where a cache is static; here the test does."""
    model, _ = grafted("llava-qwen3", "mass")
    inputs = zoo.batch("llava-qwen3", "3I4", "I2I1")
    expected = _generate(model, "llava-qwen3", inputs, do_sample=False)
    torch.compiler.reset()
    everywhere = CompileConfig(backend="eager", fullgraph=False, mode=None)
    everywhere._compile_all_devices = True
    compiled = _generate(
        model, "llava-qwen3", inputs, do_sample=False, cache_implementation="static", compile_config=everywhere
    )
    _same(compiled, expected)


@pytest.mark.parametrize("config", ["mass", "attention", "visual", "paper"])
@pytest.mark.parametrize("host", ["llama", "qwen3", "llava-llama", "llava-qwen3", "qwen2_5_vl"])
def test_prompt_lookup_equals_greedy(host: str, config: str) -> None:
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, "3I6")
    inputs["input_ids"][0, -3:] = inputs["input_ids"][0, -6:-3]  # something to look up
    looked_up = _generate(model, host, inputs, do_sample=False, prompt_lookup_num_tokens=3)
    _same(looked_up, _generate(model, host, inputs, do_sample=False))


@pytest.mark.parametrize("config", ["mass", "paper"])
@pytest.mark.parametrize("host", ["qwen3", "llava-llama"])
@pytest.mark.parametrize("assistant", ["own host", "text model", "itself"])
def test_assisted_decoding_equals_greedy(host: str, config: str, assistant: str) -> None:
    """A small model drafts, the grafted one checks and crops what it refuses."""
    model, _ = grafted(host, config)
    drafts = {"own host": host, "text model": host.removeprefix("llava-")}
    helper = zoo.build(drafts[assistant], seed=5) if assistant in drafts else copy.deepcopy(model)
    inputs = zoo.batch(host, "3I3")
    with prompt_tokens(helper, host, inputs):
        assisted = _generate(model, host, inputs, do_sample=False, assistant_model=helper)
    _same(assisted, _generate(model, host, inputs, do_sample=False))


CONTINUED = ("llama", "mistral", "qwen3", "gemma3", "opt", "llava-llama", "llava-qwen3", "llava-gemma3", "qwen2_5_vl")


@pytest.mark.parametrize("second", ["3", "1I2", "I"])
@pytest.mark.parametrize(("host", "config"), covering(CONTINUED, list(CONFIGS), each=2))
def test_a_second_turn_on_a_kept_cache(host: str, config: str, second: str) -> None:
    """The first turn's cache, answer included, then new text, perhaps with a new image: as if read at once."""
    model, _ = grafted(host, config)
    first = zoo.batch(host, "2I2")
    generated = _generate(model, host, first, do_sample=False)
    turn = zoo.batch(host, second, seed=5)
    ids = torch.cat([generated.sequences, turn["input_ids"]], dim=1)
    whole: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("pixel_values", "image_grid_thw"):
        parts = [part[name] for part in (first, turn) if name in part]
        if parts:
            whole[name] = torch.cat(parts)
    if host == "qwen2_5_vl":
        whole["mm_token_type_ids"] = (ids == zoo.IMAGE).long()
    expected = run(model, host, whole)

    cache = cache_of_output(generated)
    known = cache.get_seq_length()
    rest = {"input_ids": ids[:, known:], "attention_mask": whole["attention_mask"]}
    rest |= {name: turn[name] for name in ("pixel_values", "image_grid_thw") if name in turn}
    options: dict[str, Any] = {}
    if host == "qwen2_5_vl":
        rest["mm_token_type_ids"] = whole["mm_token_type_ids"][:, known:]
        grid = whole.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(
            ids, whole["mm_token_type_ids"], image_grid_thw=grid, attention_mask=whole["attention_mask"]
        )
        options["position_ids"] = positions[..., known:]
    if host in zoo.TEXT:
        options["token_map"] = token_map({"input_ids": rest["input_ids"]})
    continued = run(model, host, rest, **{CACHE: cache}, **options)
    torch.testing.assert_close(continued, expected[:, known:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("host", "config"), covering(("llava-llama", "llava-gemma3"), ["mass", "attention"], each=2))
def test_generate_goes_on_with_a_kept_cache(host: str, config: str) -> None:
    """The second turn through `generate` itself, with an image of its own."""
    model, _ = grafted(host, config)
    first, turn = zoo.batch(host, "2I2"), zoo.batch(host, "1I2", seed=5)
    cache = DynamicCache(config=model.config.get_text_config())
    generated = _generate(model, host, first, do_sample=False, **{CACHE: cache})
    ids = torch.cat([generated.sequences, turn["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    continued = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=turn["pixel_values"],
        **{CACHE: cache},
        max_new_tokens=TOKENS,
        do_sample=False,
    )
    pixels = torch.cat([first["pixel_values"], turn["pixel_values"]])
    afresh = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=TOKENS, do_sample=False
    )
    assert torch.equal(continued, afresh)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 9), (4, 8), (3, 7, 8)])
@pytest.mark.parametrize(("host", "config"), covering(zoo.TEXT, list(CONFIGS), each=2))
def test_chunked_prefill(host: str, config: str, cuts: tuple[int, ...]) -> None:
    """The prompt in pieces, cut anywhere, also inside an image."""
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, "3I2I2", "9I2")
    tokens = token_map(inputs)
    whole = run(model, host, inputs)
    pieces, cache = [], None
    length = inputs["input_ids"].shape[1]
    for start, stop in zip((0, *cuts), (*cuts, length), strict=True):
        chunk = {"input_ids": inputs["input_ids"][:, start:stop], "attention_mask": inputs["attention_mask"][:, :stop]}
        kinds = type(tokens).from_modalities(tokens.modality[:, start:stop])
        with torch.no_grad():
            out = model(**chunk, token_map=kinds, **{CACHE: cache}, use_cache=True)
        pieces.append(out.logits)
        cache = cache_of_output(out)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[valid], whole[valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", ["mass", "attention"])
def test_chunked_prefill_of_an_image_host(config: str) -> None:
    model, _ = grafted("llava-llama", config)
    inputs = zoo.batch("llava-llama", "3I2I2")
    whole = run(model, "llava-llama", inputs)
    pieces, cache = [], None
    for start, stop, images in ((0, 2, []), (2, 7, [0]), (7, 8, []), (8, 15, [1])):
        chunk = {"input_ids": inputs["input_ids"][:, start:stop], "attention_mask": inputs["attention_mask"][:, :stop]}
        if images:
            chunk["pixel_values"] = inputs["pixel_values"][images]
        with torch.no_grad():
            out = model(**chunk, **{CACHE: cache}, use_cache=True)
        pieces.append(out.logits)
        cache = cache_of_output(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", ["mass", "attention", "paper", "constant", "visual"])
@pytest.mark.parametrize("host", ["llava-llama", "llava-qwen3"])
def test_padded_batches_in_a_static_cache(host: str, config: str, attention: str) -> None:
    """The mask that `generate` makes for it is not the tokenizer's: padding must be found in it."""
    model = zoo.build(host, 0)
    model.set_attn_implementation(attention)
    wake(alula.attach(model, CONFIGS[config]))
    inputs = zoo.batch(host, "3I2I2", "I3", "5")
    static = _generate(model, host, inputs, do_sample=False, cache_implementation="static")
    _same(static, _generate(model, host, inputs, do_sample=False))


def test_under_autocast_short_and_long_forwards_agree() -> None:
    model, _ = grafted("llava-llama", "mass")
    inputs = zoo.batch("llava-llama", "3I2", "I3")
    with torch.autocast("cpu", torch.bfloat16):
        generated = _generate(model, "llava-llama", inputs, do_sample=False)
        again = _generate(model, "llava-llama", inputs, do_sample=False, use_cache=False)
    torch.testing.assert_close(generated.logits[0], again.logits[0], atol=0.05, rtol=0.05)


# -- what is kept between steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "rank"), [("factors", 4), ("keys", 4), ("keys", 2)])
def test_what_a_layer_keeps_per_row(cache: str, rank: int) -> None:
    """Learner memory: the input tokens, shared by all layers, and per layer 2 r numbers, or a key and r; where r is at
    most a quarter of a head's width, a key and r per head."""
    model, graft = grafted("llava-llama", WingsConfig(rank=rank, cache=cache))
    inputs = zoo.batch("llava-llama", "3I2", "5")
    kept = cache_of_output(_generate(model, "llava-llama", inputs, num_beams=2, do_sample=False))
    length = inputs["input_ids"].shape[1] + TOKENS - 1
    tokens, shelf = TokenCache.of(kept), GraftCacheLayer.of(kept)["wings"]
    assert tokens is not None
    assert tokens.inputs.shape == (4, length, 32)
    assert shelf.keys.shape == ((4, 2, length, 4) if cache == "factors" else (4, 2 * 4, length, 8))
    assert shelf.values.shape == (4, 2 if rank == 4 else 2 * 4, length, graft.config.rank)


@pytest.mark.parametrize(("host", "config"), covering(("llava-llama", "llava-gemma3", "qwen3"), list(CONFIGS), each=3))
def test_text_first_and_an_image_on_the_kept_cache(host: str, config: str) -> None:
    """A graft that was inactive for a turn knows what it needs of that turn when it becomes active."""
    model, _ = grafted(host, config)
    first, turn = zoo.batch(host, "5"), zoo.batch(host, "1I2", seed=5)
    generated = _generate(model, host, first, do_sample=False)
    ids = torch.cat([generated.sequences, turn["input_ids"], torch.tensor([[7, 8, 9]])], dim=1)
    pixels = {name: turn[name] for name in ("pixel_values",) if name in turn}
    expected = run(model, host, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})
    cache, logits = cache_of_output(generated), []
    known = cache.get_seq_length()
    cuts = (known, ids.shape[1] - 3, ids.shape[1] - 2, ids.shape[1] - 1, ids.shape[1])
    for start, stop in itertools.pairwise(cuts):
        chunk: dict[str, Any] = {"input_ids": ids[:, start:stop]}
        options = {"token_map": token_map(chunk)} if host in zoo.TEXT else {}
        logits.append(run(model, host, chunk | (pixels if start == known else {}), **{CACHE: cache}, **options))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, known:], atol=1e-4, rtol=1e-4)
    assert GraftCacheLayer.of(cache)["wings"].get_seq_length() == ids.shape[1]


@pytest.mark.parametrize(("cache_of", "rank"), [("factors", 4), ("keys", 4), ("keys", 2)])
def test_what_was_not_kept_up_is_made_anew(cache_of: str, rank: int) -> None:
    """A step with the graft switched off leaves a gap; later steps must not read past it."""
    model, graft = grafted("llava-llama", WingsConfig(rank=rank, cache=cache_of))
    inputs = zoo.batch("llava-llama", "3I2")
    steps = torch.tensor([[5], [6], [7]])
    logits = []
    for forget in (False, True):
        with torch.no_grad():
            cache = cache_of_output(model(**inputs, use_cache=True))
            with graft.disabled():
                model(input_ids=steps[:1], **{CACHE: cache})
            assert GraftCacheLayer.of(cache) == {}
            for step in steps[1:]:
                out = model(input_ids=step[None], **{CACHE: cache})
                if forget:
                    for shelf in GraftCacheLayer.of(cache).values():
                        cache.layers.remove(shelf)
        logits.append(out.logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ["mass", "keys kept", "outputs kept"])
def test_steps_follow_a_cache_that_is_rearranged(config: str) -> None:
    """What is remembered of its tokens from step to step is that of other samples then."""
    model, _ = grafted("llava-llama", config)
    inputs = zoo.batch("llava-llama", "1I4", "4I1")
    swapped = torch.tensor([1, 0])
    prompt = {name: value[swapped] for name, value in inputs.items() if name != "pixel_values"}
    prompt["pixel_values"] = inputs["pixel_values"].flip(0)
    steps = torch.tensor([[5, 6, 7], [8, 9, 10]])
    logits = []
    for is_rearranged in (True, False):
        with torch.no_grad():
            cache = cache_of_output(model(**(inputs if is_rearranged else prompt), use_cache=True))
            for place in range(3):
                if is_rearranged and place == 2:
                    cache.batch_select_indices(swapped)
                ids = steps[:, place : place + 1]
                out = model(input_ids=ids[swapped] if not is_rearranged or place == 2 else ids, **{CACHE: cache})
        logits.append(out.logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [("factors", "keys"), ("keys", "factors"), ("keys", "keys")])
def test_what_another_graft_of_the_name_left_is_not_read(before: str, after: str) -> None:
    """Also where shapes agree (rank = head width): the new graft makes anew what it needs."""
    rank = 8
    model, _ = grafted("llava-llama", WingsConfig(rank=rank, cache=before))
    inputs = zoo.batch("llava-llama", "3I2")
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
    alula.detach(model)
    wake(alula.attach(model, WingsConfig(rank=rank, cache=after)), seed=5)
    logits = []
    for forget in (False, True):
        mine = copy.deepcopy(cache)
        if forget:
            for shelf in GraftCacheLayer.of(mine).values():
                mine.layers.remove(shelf)
        with torch.no_grad():
            logits += [model(input_ids=torch.tensor([[5]]), **{CACHE: mine}).logits for _ in range(2)]
    torch.testing.assert_close(logits[:2], logits[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cache_of", "rank"), [("factors", 4), ("keys", 4), ("keys", 2)])
@pytest.mark.parametrize("layouts", [("3I2",), ("3I2", "I3")], ids=["alike", "ragged"])
def test_a_prompt_under_autocast_and_steps_without(cache_of: str, rank: int, layouts: tuple[str, ...]) -> None:
    model, _ = grafted("llava-llama", WingsConfig(rank=rank, cache=cache_of))
    inputs = zoo.batch("llava-llama", *layouts)
    step = torch.full((len(layouts), 1), 5)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=1)
    logits = []
    for enabled in (True, False):
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                cache = cache_of_output(model(**inputs, use_cache=True))
            logits.append(model(input_ids=step, attention_mask=mask, **{CACHE: cache}).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=0.05, rtol=0.05)


def test_two_grafts_keep_what_each_is_told() -> None:
    model, _ = grafted("llava-llama", WingsConfig(rank=4), name="one")
    wake(alula.attach(model, WingsConfig(rank=8, cache="keys", gate="paper"), "two"), seed=3)
    inputs = zoo.batch("llava-llama", "3I2", "5")
    _same(
        _generate(model, "llava-llama", inputs, do_sample=False),
        _generate(model, "llava-llama", inputs, do_sample=False, use_cache=False),
    )


def test_nothing_is_held_without_a_cache() -> None:
    model, graft = grafted("llava-llama", WingsConfig(rank=4, cache="keys"))
    held: list[int] = []
    model.model.language_model.layers[-1].register_forward_hook(
        lambda m, a, kw, out: held.append(sum(map(len, kw[NAME]._new.values()))), with_kwargs=True
    )
    inputs = zoo.batch("llava-llama", "3I6")
    with torch.no_grad():
        for use_cache in (False, True):
            model(**inputs, use_cache=use_cache)
    assert held[0] == 0
    assert held[1] >= 1
    assert graft.config.cache == "keys"


def test_a_cache_that_lost_step_is_refused() -> None:
    """A forward that fails half-way leaves layers of different lengths; going on would read the wrong tokens."""
    model, _ = grafted("llava-llama", "mass")
    inputs = zoo.batch("llava-llama", "3I2")
    step = torch.tensor([[5]])
    with torch.no_grad():
        cache = cache_of_output(model(**inputs, use_cache=True))
        expected = model(input_ids=step, **{CACHE: copy.deepcopy(cache)}).logits

        def fail(*_: Any) -> None:
            raise RuntimeError("half-way")

        handle = model.model.language_model.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            model(input_ids=step, **{CACHE: cache})
        handle.remove()
        with pytest.raises(AlulaError, match="what stands in 9 of them is known"):
            model(input_ids=step, **{CACHE: cache})
        for layer in cache.layers:
            layer.crop(-(layer.get_seq_length() - 9))
        torch.testing.assert_close(model(input_ids=step, **{CACHE: cache}).logits, expected)


def test_long_prompts_in_blocks_equal_short_steps() -> None:
    """More tokens than one block of queries: batches, padding and two images, against the same in many small pieces."""
    model, _ = grafted("llama", WingsConfig(rank=4, router="mass"))
    model.config.max_position_embeddings = 2048
    inputs = zoo.batch("llama", "300I200I30", "520")
    tokens = token_map(inputs)
    whole = run(model, "llama", inputs)
    pieces, cache, length = [], None, inputs["input_ids"].shape[1]
    assert length > 512
    for start in range(0, length, 100):
        stop = min(start + 100, length)
        chunk = {"input_ids": inputs["input_ids"][:, start:stop], "attention_mask": inputs["attention_mask"][:, :stop]}
        with torch.no_grad():
            out = model(**chunk, token_map=TokenMap.from_modalities(tokens.modality[:, start:stop]), **{CACHE: cache})
        pieces.append(out.logits)
        cache = cache_of_output(out)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[valid], whole[valid], atol=2e-4, rtol=1e-3)
