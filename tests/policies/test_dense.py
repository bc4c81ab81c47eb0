"""Positions counted anew behind pruning: as if what left had never been there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from alula import TokenMap
from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.policies import Budget, Prune
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import prompt_tokens, run
from tests.policies.oracle import masked
from tests.policies.test_budget import gridded
from tests.policies.test_withdraw import LAYERS, LAYOUTS, WAYS, close

CACHE = cache_keyword()
HOSTS = (
    "llama",
    "qwen3",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt_neox",
    "llava-llama",
    "llava-qwen3",
    "llava-gemma3",
    "gemma3_vl",
)


def policy(layer: int = 0) -> Budget:
    return Budget.model_validate({"image_tokens": 2, "by": "grid", "layer": layer, "positions": "dense"})


@contextmanager
def renumbered(model: Any, first: int) -> Iterator[None]:
    """From a layer on, positions that count what is left; to be run without a cache."""
    anatomy, seen = Anatomy.of(model), {}

    def note(host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        ids = kwargs["input_ids"]
        seen["left"] = gridded(0, ids) & (torch.ones_like(ids) if mask is None else mask).bool()

    def count(index: int) -> Any:
        kind = getattr(anatomy.config, "layer_types", None) if "gemma3" in anatomy.config.model_type else None

        def renumber(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            places = (seen["left"].cumsum(dim=1) - 1).clamp(min=0)
            told = {} if kind is None else {"layer_type": kind[index]}
            rotary: Any = anatomy.decoder.rotary_emb
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "position_embeddings": rotary(hidden, places, **told)}

        return renumber

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    for index in range(first, LAYERS):
        handles.append(anatomy.layers[index].register_forward_pre_hook(count(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("host", HOSTS)
def test_prefill_equals_the_masked_oracle(host: str, first: int, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    with renumbered(model, first), masked(model, lambda at, ids: gridded(at, ids) | (at < first)):
        expected = run(model, host, inputs, use_cache=False)
    with policy(first).on(model):
        ours = run(model, host, inputs)
    stays = inputs["attention_mask"].bool() & gridded(0, inputs["input_ids"])
    close(ours[stays], expected[stays])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
def test_generation_equals_the_masked_oracle(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 5}
    with renumbered(model, 1), masked(model, lambda at, ids: gridded(at, ids) | (at < 1)):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with policy(1).on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


@torch.no_grad()
def test_before_the_decoder_it_is_the_shorter_prompt() -> None:
    """As pruning is published that happens on the embeddings: prompt, steps, and text in a later turn."""
    model = zoo.build("llama", layers=LAYERS)
    embeds, more = torch.randn(1, 46, 32), torch.randn(1, 7, 32)
    kinds = torch.zeros(1, 46, dtype=torch.int64)
    kinds[:, 3:39] = 1
    with Prune.model_validate({"stages": ((0, 0.25),), "criterion": "max_min_diversity", "positions": "dense"}).on(
        model
    ):
        output = model(inputs_embeds=embeds, token_map=TokenMap.from_modalities(kinds), use_cache=True)
        cache: Any = cache_of_output(output)
        left = cache.layers[0].slots.places[0]
        ours = [output.logits[:, left]]
        for part in (more[:, :1], more[:, 1:2], more[:, 2:]):
            told = TokenMap.text(1, part.shape[1])
            ours.append(model(inputs_embeds=part, token_map=told, **{CACHE: cache}).logits)
    expected = model(inputs_embeds=torch.cat([embeds[:, left], more], dim=1)).logits
    assert len(left) == 19
    close(torch.cat(ours, dim=1), expected)


def test_text_alone_keeps_its_bits() -> None:
    model, inputs = zoo.build("llama", layers=LAYERS), zoo.batch("llama", "7", "4")
    bare = run(model, "llama", inputs)
    with policy().on(model):
        assert torch.equal(run(model, "llama", inputs), bare)


def test_what_cannot_be_counted_is_refused() -> None:
    for host, told in (("opt", "has no rotary"), ("qwen2_5_vl", "by height and width")):
        with pytest.raises(HostError, match=told), policy().on(zoo.build(host)):
            pass
    model, inputs = zoo.build("mistral", layers=LAYERS), zoo.batch("mistral", *LAYOUTS)
    with (
        policy().on(model),
        prompt_tokens(model, "mistral", inputs),
        pytest.raises(HostError, match="of a window alone"),
    ):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(UsageError, match="for one stage"):
        Prune(stages=((1, 0.5), (2, 0.25)), criterion="rope_free_attention", positions="dense")  # type: ignore[arg-type]
