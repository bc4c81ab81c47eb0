"""Pruning by attention, against the weights that eager attention hands out and keys barred by masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.policies import Prune, Withdraw
from alula.seam import taps
from alula.seam.dialect import cache_of_output
from tests import zoo
from tests.grafts.common import prompt_tokens, run, true_positions
from tests.policies.oracle import Left, masked
from tests.policies.test_withdraw import HOSTS, LAYERS, LAYOUTS, WAYS, close

STAGES = {"one": ((1, 0.5),), "two": ((1, 0.75), (3, 0.25))}


def ranked(
    model: Any,
    inputs: dict[str, Tensor],
    stages: tuple[tuple[int, float], ...],
    criterion: str = "last_query_attention",
    of_layer: str = "before",
) -> Left:
    """What is left by layer: each stage reads eager weights of a forward in which the stages before hold."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    kept: dict[int, Tensor] = {}

    def left(layer: int, now: Tensor) -> Tensor:
        stays = torch.ones_like(now, dtype=torch.bool)
        for first, of_prompt in kept.items():
            if layer >= first:
                beams = len(now) // len(of_prompt)
                stays[:, : of_prompt.shape[1]] &= of_prompt.repeat_interleave(beams, dim=0)
        return stays

    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    zoo.set_attention(model, "eager")
    for layer, share in stages:
        with masked(model, left), torch.no_grad():
            weights = model(**inputs, use_cache=False, output_attentions=True).attentions[
                layer - (of_layer == "before")
            ]
        stays = ids != zoo.IMAGE
        for sample in range(len(ids)):
            image = (ids[sample] == zoo.IMAGE).nonzero()[:, 0]
            text = (valid[sample] & (ids[sample] != zoo.IMAGE)).nonzero()[:, 0].tolist()
            asks = [int((valid[sample] & left(layer - 1, ids)[sample]).nonzero().max())]
            if criterion == "instruction_attention" and len(image):
                asks = [place for place in text if place > int(image[0])] or text or asks
            there = image[left(layer - 1, ids)[sample, image]]
            if len(image):
                count = max(1, int(share * len(image) + 0.5))
                scores = weights[sample][:, asks][..., there].double().mean(dim=(0, 1))
                # behind a window all are 0: of equal ones the first stays
                stays[sample, there[scores.argsort(descending=True, stable=True)[:count]]] = True
        kept[layer] = stays
    zoo.set_attention(model, implementation)
    return left


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("host", HOSTS)
def test_prefill_equals_the_masked_oracle(host: str, stages: str, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    left = ranked(model, inputs, STAGES[stages])
    with masked(model, left):
        expected = run(model, host, inputs, use_cache=False)
    with Prune(stages=STAGES[stages]).on(model):
        ours = run(model, host, inputs)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])


OTHERS = [("last_query_attention", "itself"), ("instruction_attention", "before"), ("instruction_attention", "itself")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("criterion", "of_layer"), OTHERS)
@pytest.mark.parametrize("host", HOSTS)
def test_other_attention_equals_the_masked_oracle(host: str, criterion: str, of_layer: str, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    settings: Any = {"name": criterion, "of_layer": of_layer}
    if host == "gemma2" and of_layer == "itself":  # it runs eager attention
        with pytest.raises(HostError, match="does not show"), Prune(stages=STAGES["two"], criterion=settings).on(model):
            pass
        return
    left = ranked(model, inputs, STAGES["two"], criterion, of_layer)
    with masked(model, left):
        expected = run(model, host, inputs, use_cache=False)
    with Prune(stages=STAGES["two"], criterion=settings).on(model):
        ours = run(model, host, inputs)
        uncached = run(model, host, inputs, use_cache=False)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])
    close(uncached[stays], expected[stays])


def test_the_first_layer_can_rank_by_itself() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    stages, settings = ((0, 0.5), (2, 0.25)), {"name": "last_query_attention", "of_layer": "itself"}
    left = ranked(model, inputs, stages, of_layer="itself")
    with masked(model, left):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    with Prune(stages=stages, criterion=settings).on(model):  # type: ignore[arg-type]
        ours = run(model, "llava-llama", inputs)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])


def test_what_is_run_to_be_ranked_is_not_seen_by_others() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    settings: Any = {"name": "last_query_attention", "of_layer": "itself"}
    seen: list[str] = []
    with (
        Prune(stages=((1, 0.5),), criterion=settings).on(model),
        taps(model, ["attention_norm", "attention"], lambda event: seen.append(f"{event.point} {event.layer}")),
    ):
        run(model, "llava-llama", inputs)
    assert sorted(seen) == sorted(f"{point} {layer}" for point in ("attention_norm", "attention") for layer in range(4))


def test_compiled_the_layer_ranks_by_itself_too() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    settings: Any = {"name": "last_query_attention", "of_layer": "itself"}
    with Prune(stages=STAGES["two"], criterion=settings).on(model):
        expected = run(model, "llava-llama", inputs)
        torch._dynamo.reset()
        Anatomy.of(model).decoder.compile(backend="eager")
        close(run(model, "llava-llama", inputs), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", [host for host in HOSTS if host not in ("qwen2", "phi3", "olmo2", "gpt_neox")])
def test_generation_equals_the_masked_oracle(host: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 4}
    places = {"position_ids": true_positions(inputs)} if host == "gpt2" else {}  # as `generate` counts them
    with masked(model, ranked(model, inputs | places, STAGES["two"])):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with Prune(stages=STAGES["two"]).on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


def test_what_withdrawal_leaves_is_what_both_leave() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    left = ranked(model, inputs, STAGES["one"])
    with masked(model, lambda layer, ids: left(layer, ids) & ((ids != zoo.IMAGE) | (layer < 2))):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    for policies in (
        (Prune(stages=STAGES["one"]), Withdraw(layer=2)),
        (Withdraw(layer=2), Prune(stages=STAGES["one"])),
    ):
        with policies[0].on(model), policies[1].on(model):
            close(run(model, "llava-llama", inputs)[text], expected[text])


def test_under_eager_attention_the_same_tokens_stay() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    with Prune(stages=STAGES["two"]).on(model):
        expected = run(model, "llava-llama", inputs)
    zoo.set_attention(model, "eager")
    with Prune(stages=STAGES["two"]).on(model):
        ours = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([], "one layer at least"),
        ([(2, 0.5), (1, 0.25)], "each larger than the one before"),
        ([(1, 0.5), (2, 0.5)], "each smaller than the one before"),
        ([(1, 1.0)], "between 0 and 1"),
        ([(1, 0.0)], "between 0 and 1"),
    ],
)
def test_stages_that_mean_nothing_are_refused(stages: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Prune(stages=stages)


@pytest.mark.parametrize("layer", [0, LAYERS])
def test_a_stage_outside_the_decoder_is_refused(layer: int) -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    with pytest.raises(UsageError, match="give layers of 1 to 3"), Prune(stages=[(layer, 0.5)]).on(model):
        pass


def test_attention_that_cannot_be_read_is_refused() -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    zoo.set_attention(model, "flex_attention")
    with pytest.raises(HostError, match="set_attn_implementation"), Prune(stages=[(1, 0.5)]).on(model):
        pass


@pytest.mark.parametrize(("criterion", "of_layer"), [("last_query_attention", "before"), *OTHERS])
@pytest.mark.parametrize("seed", [0, 2])
def test_where_the_end_of_a_piece_is_gone_the_last_token_left_ranks(criterion: str, of_layer: str, seed: int) -> None:
    """As pieces of a prompt end in images, whose last token the first stage may take out."""
    host = "llava-llama"
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, "I", "5I", "3I4", seed=seed)
    stages = ((1, 0.5), (3, 0.25))
    left = ranked(model, inputs, stages, criterion, of_layer)
    assert not left(1, inputs["input_ids"])[:2, -1].all()
    with masked(model, left):
        expected = run(model, host, inputs, use_cache=False)
    policy = Prune(stages=stages, criterion={"name": criterion, "of_layer": of_layer})  # type: ignore[arg-type]
    with policy.on(model):
        ours = run(model, host, inputs)
        model.generate(**zoo.batch(host, "3I4I2", seed=seed), max_new_tokens=2, prefill_chunk_size=4)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])


@pytest.mark.parametrize("seed", [0, 2])
def test_attention_without_positions_is_that_of_the_last_token_left(seed: int) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "I", "5I", seed=seed)
    criterion: Any = {"name": "rope_free_attention", "stride": None}
    with Prune(stages=((1, 0.5), (3, 0.25)), criterion=criterion).on(model), torch.no_grad():
        cache: Any = cache_of_output(model(**inputs, use_cache=True))
    assert [layer.keys.shape[-2] for layer in cache.layers[:LAYERS]] == [9, 7, 7, 6]
