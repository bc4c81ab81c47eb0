"""Numbers computed by the authors' published code (tests/golden), on a tiny LLaMA with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alula import TokenMap
from alula.policies import ParallelAttention, Policy, Prune, Skip, Withdraw, layer_contributions
from alula.policies.criteria.candidates import Candidates, Layout
from alula.policies.criteria.conditional_dpp import spanning, stretched
from alula.policies.criteria.duplicates import far_from
from alula.policies.criteria.max_min_diversity import far_apart
from alula.policies.criteria.merging import evenly, joined
from alula.seam import find
from alula.seam.dialect import cache_keyword, cache_of_output

GOLDEN = Path(__file__).parents[1] / "golden"


def recorded(name: str) -> tuple[Any, dict[str, Any], dict[str, Tensor], TokenMap]:
    """The model, the facts and the numbers of a recording, and which of its tokens are an image."""
    facts, numbers = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    model: Any = LlamaForCausalLM(LlamaConfig(**facts["config"])).eval()
    weights = {key.removeprefix("model_state/"): value for key, value in numbers.items() if "model_state/" in key}
    model.load_state_dict(weights)
    modalities = torch.zeros(numbers["inputs_embeds"].shape[:2], dtype=torch.int64)
    start, stop = facts["layout"]["image"]
    modalities[:, start:stop] = 1
    return model, facts, numbers, TokenMap.from_modalities(modalities)


@torch.no_grad()
def test_withdrawal() -> None:
    model, facts, numbers, tokens = recorded("withdraw")
    embeds, left = numbers["inputs_embeds"], numbers["logits_rows"]
    cos, sin = model.model.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    hidden = embeds
    for index, layer in enumerate(model.model.layers):  # as it is published: what leaves is cut off
        if index == facts["layer"]:
            hidden, cos, sin = hidden[:, left], cos[:, left], sin[:, left]
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
    with Withdraw(layer=facts["layer"]).on(model):
        output = model(inputs_embeds=embeds, token_map=tokens)
    assert torch.equal(output.logits[:, left], model.lm_head(model.model.norm(hidden)))
    torch.testing.assert_close(output.logits[:, left], numbers["prefill_logits"], atol=1e-5, rtol=1e-5)
    cache: Any = cache_of_output(output)
    assert [layer.keys.shape[-2] for layer in cache.layers[:8]] == [620] * 5 + [44] * 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_withdrawal_while_generating(*, use_cache: bool) -> None:
    model, facts, numbers, tokens = recorded("withdraw")
    seam_options = {"max_new_tokens": facts["new_tokens"], "do_sample": False, "use_cache": use_cache}
    with Withdraw(layer=facts["layer"]).on(model):
        seam = find(model)
        assert seam is not None
        with seam.given_tokens(tokens):
            said = model.generate(inputs_embeds=numbers["inputs_embeds"], **seam_options)
    assert torch.equal(said, numbers["greedy_tokens"])


@torch.no_grad()
def test_pruning_by_the_last_tokens_attention() -> None:
    model, facts, numbers, tokens = recorded("prune")
    embeds = numbers["inputs_embeds"]
    with Prune(stages=[(facts["layer"], facts["keep_ratio"])]).on(model):
        output = model(inputs_embeds=embeds, token_map=tokens)
        cache: Any = cache_of_output(output)
        seam = find(model)
        assert seam is not None
        with seam.given_tokens(tokens):
            said = model.generate(inputs_embeds=embeds, max_new_tokens=facts["new_tokens"], do_sample=False)
    held = cache.layers[facts["layer"]].slots.places[0]
    assert torch.equal(held[tokens.is_perceptual[0, held]], numbers["kept_columns"])
    torch.testing.assert_close(output.logits[:, held], numbers["prefill_logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(said, numbers["greedy_tokens"])
    assert [layer.keys.shape[-2] for layer in cache.layers[:8]] == [620] * 3 + [332] * 5


def weighed(config: dict[str, Any], numbers: dict[str, Tensor]) -> Any:
    """A Llama with the weights of a recording."""
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    weights = {key.removeprefix("weights/"): value.float() for key, value in numbers.items() if "weights/" in key}
    model.load_state_dict(weights)
    return model


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def candidates(groups: int, tokens: int, wanted: int) -> Candidates:
    """One image of so many tokens in each of as many prompts, of which so many are wanted."""
    kinds = torch.ones(groups, tokens + 1, dtype=torch.int64)
    kinds[:, -1] = 0
    tokens = TokenMap.from_modalities(kinds)
    return Candidates.of(tokens, Layout.of(tokens), per="image").wanting((wanted,) * groups)


def places(chosen: Tensor) -> Tensor:
    """(U, K) of the tokens that stay."""
    return torch.stack([each.nonzero()[:, 0] for each in chosen])


DIVERSE = json.loads((GOLDEN / "divprune.json").read_text())["geometry"]


@torch.no_grad()
@pytest.mark.parametrize("case", DIVERSE)
def test_diversity(case: str) -> None:
    numbers, shape = load_file(GOLDEN / "divprune.safetensors"), DIVERSE[case]
    features = numbers[f"{case}/in.features"]
    there = candidates(1, shape["N"], shape["keep"])
    chosen = far_apart(numbers[f"{case}/out.distance"][None], there)
    assert torch.equal(places(chosen)[0], numbers[f"{case}/out.kept"])
    # and under the policy, in front of the first layer
    heads = 1 if shape["D"] == 10 else 2
    config = LlamaConfig(
        vocab_size=8, hidden_size=shape["D"], intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads
    )
    model: Any = LlamaForCausalLM(config).eval()
    embeds = torch.cat([features, features[:1]])[None]
    kinds = torch.tensor([[1] * shape["N"] + [0]])
    stages = ((0, shape["keep"] / shape["N"]),)
    with Prune.model_validate({"stages": stages, "criterion": "max_min_diversity"}).on(model):
        output = model(inputs_embeds=embeds, token_map=TokenMap.from_modalities(kinds), use_cache=True)
    cache: Any = cache_of_output(output)
    assert torch.equal(cache.layers[0].slots.places[0, :-1], numbers[f"{case}/out.kept"])


CONDITIONAL = json.loads((GOLDEN / "cdpruner.json").read_text())["geometry"]


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_dpp(case: str) -> None:
    numbers, shape = load_file(GOLDEN / "cdpruner.safetensors"), CONDITIONAL[case]
    there = candidates(shape["B"], shape["N"], shape["keep"])
    chosen = spanning(numbers[f"{case}/out.kernel"], there)
    assert torch.equal(places(chosen), numbers[f"{case}/out.kept"])
    image, text = (numbers[f"{case}/in.{name}_embeds"] for name in ("image", "text"))
    normed = [torch.nn.functional.normalize(each, dim=-1) for each in (image, text)]
    unlike = -(normed[0] @ normed[1].T).mean(dim=-1)
    relevance = stretched(unlike, there.real)
    if shape["B"] == 1:
        torch.testing.assert_close(relevance, numbers[f"{case}/out.relevance"], atol=1e-6, rtol=1e-5)
    else:  # the published code stretches the images of a call together: here none changes another's
        together = stretched(unlike.view(1, -1), there.real.view(1, -1)).view_as(unlike)
        torch.testing.assert_close(together, numbers[f"{case}/out.relevance"], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(relevance, together)
    features = torch.nn.functional.normalize(numbers[f"{case}/in.features"] @ numbers[f"{case}/w.projector"].T, dim=-1)
    weight = numbers[f"{case}/out.relevance"]
    kernel = weight[:, :, None] * (features @ features.mT) * weight[:, None]
    torch.testing.assert_close(kernel, numbers[f"{case}/out.kernel"], atol=1e-6, rtol=1e-5)


def test_a_kernel_that_is_spanned_gives_as_many_as_are_wanted() -> None:
    """As published, residual variances of zero gave nan, and fewer tokens than were asked for."""
    features = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    there = candidates(1, 40, 16)
    assert int(spanning(features @ features.mT, there).sum()) == 16
    assert int(far_apart(torch.zeros(1, 40, 40), there).sum()) == 16


DUPLICATES = json.loads((GOLDEN / "dart.json").read_text())["geometry"]


@pytest.mark.parametrize("case", DUPLICATES)
def test_duplicates(case: str) -> None:
    numbers, shape = load_file(GOLDEN / "dart.safetensors"), DUPLICATES[case]
    start, stop = shape["system"], shape["system"] + shape["image"]
    states, norms = numbers[f"{case}/in.states"][0], numbers[f"{case}/in.keys"].abs().sum(dim=(1, 3))[0]
    pivots, real = numbers[f"{case}/out.pivots"], torch.ones(1, shape["image"], dtype=torch.bool)
    image = norms[start:stop].topk(shape["pivot_image"]).indices
    text = norms[stop:].topk(shape["pivot_text"]).indices
    assert set(pivots.tolist()) == {*(image + start).tolist(), *(text + stop).tolist()}
    normed = torch.nn.functional.normalize(states, dim=-1)
    similarity = normed[pivots] @ normed[start:stop].T  # visited as they were by the published code
    taken = torch.zeros_like(real).index_fill(1, image, True)
    each = torch.full((1, len(pivots)), shape["per_pivot"])
    chosen = far_from(similarity[None], taken, each, real)
    assert torch.equal(places(chosen)[0] + start, numbers[f"{case}/out.kept"])


def llama(facts: dict[str, Any], numbers: dict[str, Tensor]) -> Any:
    """The tiny Llama of a recording with that geometry."""
    shape = facts["geometry"]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        rms_norm_eps=shape["rms_eps"],
        rope_theta=shape["rope_theta"],
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("model/w."): v.float() for k, v in numbers.items() if "model/w." in k})
    return model


def mapped(length: int, start: int, image: int) -> TokenMap:
    kinds = torch.zeros(1, length, dtype=torch.int64)
    kinds[:, start : start + image] = 1
    return TokenMap.from_modalities(kinds)


@torch.no_grad()
@pytest.mark.parametrize("case", ["feather", "fastv_no_rope"])
def test_attention_without_rope(case: str) -> None:
    """In both stages, to the logits of prompt and steps."""
    facts, numbers = json.loads((GOLDEN / "feather.json").read_text()), load_file(GOLDEN / "feather.safetensors")
    model, embeds, rows = llama(facts, numbers), numbers["model/in.embeds"], numbers["model/in.image_rows"]
    layers = facts["settings"][case]["layers"]
    stages = [(layer, len(numbers[f"{case}/out.kept{i}"]) / len(rows)) for i, layer in enumerate(layers)]
    criterion = {"name": "rope_free_attention", "stride": 3 if case == "feather" else None}
    with Prune.model_validate({"stages": stages, "criterion": criterion}).on(model):
        output = model(inputs_embeds=embeds, token_map=mapped(embeds.shape[1], int(rows[0]), len(rows)))
        cache: Any = cache_of_output(output)
        held = [cache.layers[layer].slots.places[0] for layer in layers]
        for i, places in enumerate(held):
            left = places[(places >= rows[0]) & (places <= rows[-1])] - rows[0]
            assert torch.equal(left, numbers[f"{case}/out.kept{i}"])
        close(output.logits[:, held[-1]], numbers[f"{case}/out.prefill_logits"])
        for step, token in enumerate(numbers["model/in.next_ids"].T):
            output = model(input_ids=token[None], **{cache_keyword(): cache_of_output(output)})
            close(output.logits[:, 0], numbers[f"{case}/out.decode_logits"][:, step])


@torch.no_grad()
def test_the_layers_own_ranking() -> None:
    """PyramidDrop in all of its stages, to the logits of prompt and steps, and its ragged ranking."""
    name, settings = "pyramiddrop", {"name": "last_query_attention", "of_layer": "itself"}
    facts, numbers = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    shape, model = facts["geometry"], llama(facts, numbers)
    stages = list(zip(shape["layer_list"], shape["ratios"], strict=True))
    whole = Prune.model_validate({"stages": stages, "criterion": settings, "positions": "dense"})
    with whole.on(model):
        tokens = mapped(36, shape["system_rows"], shape["image_rows"])
        output = model(inputs_embeds=numbers["model/in.embeds"], token_map=tokens)
        cache: Any = cache_of_output(output)
        held = [cache.layers[layer].slots.places[0] for layer, _ in stages]
        for stage, places in enumerate(held):
            assert torch.equal(places, numbers[f"model/out.stage{stage}_kept"])
        close(output.logits[:, held[-1]], numbers["model/out.prefill_logits"])
        for step, token in enumerate(numbers["model/in.next_ids"].T):
            output = model(input_ids=token[None], **{cache_keyword(): cache_of_output(output)})
            close(output.logits[:, 0], numbers["model/out.decode_logits"][:, step])
    policy = Prune.model_validate({"stages": ((2, 0.5),), "criterion": settings})

    features, mask = numbers["rank_ragged/in.features"], numbers["rank_ragged/in.mask"]
    kinds = torch.where(mask, 0, -1)
    for sample, (start, length) in enumerate(
        zip(*(numbers[f"rank_ragged/in.image_{x}"] for x in ("start", "len")), strict=True)
    ):
        kinds[sample, start : start + length] = 1 if length else kinds[sample, start : start + length]
    handle = model.model.layers[2].register_forward_pre_hook(lambda layer, args: (features, *args[1:]))
    with policy.on(model):
        tokens = TokenMap.from_modalities(kinds, mask)
        output = model(inputs_embeds=features, attention_mask=mask.long(), token_map=tokens)
    handle.remove()
    slots = cache_of_output(output).layers[2].slots  # type: ignore[union-attr]
    for sample, rows in enumerate(numbers["rank_ragged/out.rows"]):
        places = slots.places[sample] if slots.real is None else slots.places[sample][slots.real[sample]]
        assert torch.equal(places, rows[rows >= 0])


MERGED = json.loads((GOLDEN / "visionzip.json").read_text())["geometry"]


@pytest.mark.parametrize("case", ["selection", "uneven_step"])
def test_merging(case: str) -> None:
    """VisionZip's tokens, beside the class token's."""
    numbers, shape = load_file(GOLDEN / "visionzip.safetensors"), MERGED[case]
    attention, hidden, metric = (
        numbers[f"{case}/in.{name}"][..., 1:, :]
        if name != "cls_attention"
        else numbers[f"{case}/in.{name}"].sum(dim=1)[:, 1:]
        for name in ("cls_attention", "hidden", "metric")
    )
    batch, count = attention.shape
    there = candidates(batch, count, shape["dominant"])
    stays = there.top(attention)
    assert torch.equal(places(stays) + 1, numbers[f"{case}/out.indices"][:, 1:].sort(dim=1).values)
    targets = evenly(there, stays, [shape["contextual"]] * batch)
    assert torch.equal(places(targets) + 1, numbers[f"{case}/out.contextual_targets"])
    into = joined(metric, there, ~stays & ~targets, targets)
    text = torch.zeros(batch, 1, hidden.shape[2])
    new = there.merged(torch.cat([hidden, text], dim=1), into, is_added=True)[:, :-1]
    expected, kept = numbers[f"{case}/out.tokens"][:, 1:], shape["dominant"]
    for sample in range(batch):
        close(new[sample][stays[sample]], expected[sample, :kept])
        close(new[sample][targets[sample]], expected[sample, kept:])


SKIPPED = json.loads((GOLDEN / "skip.json").read_text())


PARTS: dict[str, Any] = {"ffn": "mlp", "block": "block"}


def published_layers(settings: dict[str, Any], count: int) -> tuple[int, ...]:
    """Both ends are left out; several intervals hold for equal segments of the depth."""
    intervals = settings["skip_interval"]
    intervals = intervals if isinstance(intervals, list) else [intervals]
    inside = range(settings["start_layer"] + 1, settings["end_layer"])
    return tuple(layer for layer in inside if layer % intervals[layer * len(intervals) // count] == 0)


def published_policy(settings: dict[str, Any], count: int) -> Policy:
    mode, layers = settings["skip_mode"], published_layers(settings, count)
    if "parrallel" in mode:
        return ParallelAttention(layers=layers, tokens="all")
    part = next(PARTS[name] for name in PARTS if name in mode)
    when: Any = "prompts" if "only" in mode else "always" if "context" in mode else "steps"
    keys: Any = "lent" if when == "prompts" and part == "block" else "absent"
    return Skip(part=part, layers=layers, tokens="all", when=when, keys=keys)


@torch.no_grad()
@pytest.mark.parametrize("case", SKIPPED["cases"])
def test_skipping(case: str) -> None:
    numbers, settings = load_file(GOLDEN / "skip.safetensors"), SKIPPED["cases"][case]
    model = weighed(SKIPPED["config"], numbers)
    policy, embeds, mask = published_policy(settings, 8), numbers["embeds"], numbers["mask"]
    if isinstance(policy, Skip) and "prompts" not in policy.when:  # what is skipped in steps is told by a step
        rows = numbers[f"{case}/ffn_rows"][-1]
        assert policy.layers == tuple((rows == 0).nonzero()[:, 0].tolist())
    batch, length = mask.shape
    tokens = TokenMap.from_modalities(torch.zeros_like(mask), mask)
    places = torch.arange(length + numbers["next_ids"].shape[1]).expand(batch, -1)
    with policy.on(model):
        given = {"attention_mask": mask, "position_ids": places[:, :length], "token_map": tokens}
        output = model(inputs_embeds=embeds, **given, use_cache=True)
        close(output.logits[mask.bool()], numbers[f"{case}/prefill_logits"][mask.bool()])
        if f"{case}/cached_keys" in numbers:
            cache: Any = cache_of_output(output)
            for layer, expected in zip(cache.layers[:8], numbers[f"{case}/cached_keys"], strict=True):
                close(layer.keys.transpose(1, 2)[mask.bool()], expected.transpose(1, 2)[mask.bool()])
        for step, ids in enumerate(numbers["next_ids"].T):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = {"attention_mask": mask, "position_ids": places[:, length + step, None]}
            output = model(input_ids=ids[:, None], **given, **{cache_keyword(): cache_of_output(output)})
            close(output.logits[:, 0], numbers[f"{case}/decode_logits"][:, step])


def test_a_range_is_the_published_interval() -> None:
    numbers = load_file(GOLDEN / "skip.safetensors")
    for (interval, start, end), count in zip(
        numbers["counts/interval_start_end"].tolist(), numbers["counts/skipped"].tolist(), strict=True
    ):
        layers = range(interval * (start // interval + 1), end, interval)
        assert len(layers) == count
        assert tuple(layers) == published_layers(
            {"skip_interval": interval, "start_layer": start, "end_layer": end}, 32
        )


@torch.no_grad()
def test_frozen_layers() -> None:
    numbers, facts = load_file(GOLDEN / "shortv.safetensors"), json.loads((GOLDEN / "shortv.json").read_text())
    model = weighed(facts["config"], numbers)
    embeds = numbers["frozen/embeds"].float()
    modalities = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    modalities[:, slice(*facts["layout"]["image"])] = 1
    tokens, text = TokenMap.from_modalities(modalities), facts["layout"]["image"][1]
    with Skip(part="block", layers=facts["frozen_layers"], keys="own").on(model):
        output = model(inputs_embeds=embeds, token_map=tokens, use_cache=True)
        close(output.logits[:, text:], numbers["frozen/prefill_logits"])
        for step, ids in enumerate(numbers["frozen/next_ids"].T):
            output = model(input_ids=ids[:, None], **{cache_keyword(): cache_of_output(output)})
            close(output.logits[:, 0], numbers["frozen/decode_logits"][:, step])


def test_layer_contributions() -> None:
    numbers, facts = load_file(GOLDEN / "shortv.safetensors"), json.loads((GOLDEN / "shortv.json").read_text())
    model = weighed(facts["config"], numbers)
    prompts = []
    for embeds in numbers["frozen/embeds"].float():
        modalities = torch.zeros(1, len(embeds), dtype=torch.int64)
        modalities[:, slice(*facts["layout"]["image"])] = 1
        prompts.append({"inputs_embeds": embeds[None], "token_map": TokenMap.from_modalities(modalities)})
    found = layer_contributions(model, prompts)
    close(torch.tensor(found.scores, dtype=torch.float64), numbers["lc/scores"])
    close(torch.tensor(list(found.mean().values()), dtype=torch.float64), numbers["lc/mean"])
    assert found.ranked() == numbers["lc/order"].tolist()
