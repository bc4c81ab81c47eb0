"""Skipping, against the same sums put to 0 by hooks, with absent keys barred by masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM

import alula
from alula import TokenMap
from alula.anatomy import Anatomy
from alula.draws import mixed
from alula.errors import HostError, SeamError, UsageError
from alula.policies import ParallelAttention, Prune, Skip, Withdraw
from alula.probes import AttentionShift
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, prompt_tokens, run, token_map, true_positions, wake
from tests.policies.oracle import masked, silenced
from tests.policies.test_withdraw import HOSTS, LAYERS, LAYOUTS, WAYS, close, withdrawn

CASES = {
    "mlp": Skip(part="mlp", layers=(1, 3)),
    "attention": Skip(part="attention", layers=(1, 3)),
    "attention, own keys": Skip(part="attention", layers=(1, 2), keys="own"),
    "block": Skip(part="block", layers=(0, 2)),
    "block, own keys": Skip(part="block", layers=(0, 2), keys="own"),
    "mlp, all": Skip(part="mlp", layers=(2,), tokens="all"),
    "attention, all": Skip(part="attention", layers=(2,), tokens="all"),
    "block, all": Skip(part="block", layers=(1,), tokens="all"),
    "mlp, half": Skip(part="mlp", share=0.5),
    "mlp, first half": Skip(part="mlp", share=0.5, choice="first"),
    "block, a third drawn": Skip(part="block", layers=(1, 2), share=0.34, choice="random", seed=3),
    "attention, own keys, half of all": Skip(part="attention", layers=(1,), tokens="all", share=0.5, keys="own"),
}
WHOLE = ("block", "block, all", "block, a third drawn")
PER_FORWARD = "attention, own keys, half of all"
"""a share of all tokens is one of each forward's: a step of one token has none"""
LENT = {
    "attention": Skip(part="attention", layers=(2,), keys="lent"),
    "blocks in a row": Skip(part="block", layers=(1, 2), keys="lent"),
    "half of block": Skip(part="block", layers=(1, 3), keys="lent", share=0.5, choice="first"),
}


def skips(policy: Skip, ids: Tensor) -> Tensor:
    chosen = (ids == zoo.IMAGE) if policy.tokens == "image" else (ids != zoo.PAD)
    if policy.share == 1:
        return chosen
    left = torch.zeros_like(chosen)
    for sample, here in enumerate(chosen):
        among = here.nonzero()[:, 0].tolist()
        count = int(len(among) * policy.share)
        if policy.choice == "strided":
            assert policy.share == 0.5
            taken = among[1::2]
        elif policy.choice == "first":
            taken = among[:count]
        else:
            first = int((ids[sample] != zoo.PAD).nonzero()[0])
            taken = sorted(among, key=lambda place: -drawn(place - first, policy.seed or 0))[:count]
        left[sample, taken] = True
    return left


def drawn(place: int, seed: int) -> int:
    """A number that goes by a token's place in its sample."""
    number = ((place + 1) * 0x9E3779B1 + mixed(seed)) % 2**32
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) % 2**32
    return number ^ (number >> 16)


def oracle(model: Any, policy: Skip) -> ExitStack:
    stack, layers = ExitStack(), policy.layers or tuple(range(LAYERS))
    if policy.keys == "absent" and policy.part != "mlp":
        bars = masked(model, lambda layer, ids: ~skips(policy, ids) if layer in layers else ids > -1, puts_back=False)
        stack.enter_context(bars)
    stack.enter_context(silenced(model, policy.part, layers, lambda ids: skips(policy, ids)))
    return stack


def pairs() -> list[tuple[str, str]]:
    names = list(CASES)
    every = [(host, names[(i * 4 + j) % len(names)]) for i, host in enumerate(HOSTS) for j in range(5)]
    return [(host, case) for host, case in every if host != "opt" or case in WHOLE]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("host", "case"), pairs())
def test_prefill_equals_the_oracle(host: str, case: str, side: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS, side=side)
    with oracle(model, CASES[case]):
        expected = run(model, host, inputs, use_cache=False)
    with CASES[case].on(model):
        ours = run(model, host, inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])
    assert (ours - run(model, host, inputs))[valid].abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [case for case in CASES if case != PER_FORWARD])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3"])
def test_generation_equals_the_oracle(host: str, case: str, way: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options = {**WAYS[way], "max_new_tokens": 4}
    with oracle(model, CASES[case]):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options, use_cache=False)
    with CASES[case].on(model), prompt_tokens(model, host, inputs):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **options)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_under_eager_attention_it_is_the_same(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    with CASES[case].on(model):
        expected = run(model, "llava-llama", inputs)
    zoo.set_attention(model, "eager")
    with CASES[case].on(model):
        ours = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_oracles_also_through_checkpointed_layers(case: str) -> None:
    inputs = zoo.batch("llava-llama", *LAYOUTS)
    valid, gradients = inputs["attention_mask"].bool(), []
    for how in ("oracle", "policy", "checkpointed"):
        model = zoo.build("llava-llama", layers=LAYERS)
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with oracle(model, CASES[case]) if how == "oracle" else CASES[case].on(model):
            model(**inputs, use_cache=False).logits[valid].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for found in gradients[1:]:
        for name, expected in gradients[0].items():
            ours = found.get(name, torch.zeros_like(expected))
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["mlp", "attention", "attention, own keys", "block", "block, own keys"])
def test_grafts_and_policies_go_together(case: str, attention: str) -> None:
    """Wings adds to all tokens that a layer has, as the oracle's does, so the two agree on those of text."""
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    zoo.set_attention(model, attention)
    with Withdraw(layer=3).on(model):
        wake(alula.attach(model, CONFIGS["mass"]))
        with CASES[case].on(model):
            within = run(model, "llava-llama", inputs)
        with AttentionShift().on(model), CASES[case].on(model):
            measured = run(model, "llava-llama", inputs)
    with CASES[case].on(model), Withdraw(layer=3).on(model):
        around = run(model, "llava-llama", inputs)
    assert torch.equal(within, around)
    assert torch.equal(measured, within)


@pytest.mark.parametrize("case", ["mlp", "attention", "attention, own keys", "block", "block, own keys", "mlp, half"])
@pytest.mark.parametrize("host", ["llava-llama", "llava-gemma3", "qwen2_5_vl"])
def test_a_token_does_what_all_policies_let_it(host: str, case: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    with oracle(model, CASES[case]), masked(model, withdrawn(2)):
        expected = run(model, host, inputs, use_cache=False)
        said = model.generate(**inputs, **options, use_cache=False)
    for one, other in ((CASES[case], Withdraw(layer=2)), (Withdraw(layer=2), CASES[case])):
        with one.on(model), other.on(model):
            close(run(model, host, inputs)[text], expected[text])
            assert torch.equal(model.generate(**inputs, **options), said)


@pytest.mark.parametrize(("case", "calls"), [("mlp, all", 0), ("mlp", 3 * 6), ("mlp, half", None)])
def test_what_is_skipped_is_not_computed(case: str, calls: int | None) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    seen: list[int] = []
    anatomy = Anatomy.of(model)

    def count(module: nn.Module, args: Any) -> None:
        seen.append(args[0].shape[:2].numel())

    layer = (CASES[case].layers or (0,))[0]
    anatomy.mlp(layer).down_proj.register_forward_pre_hook(count)
    with CASES[case].on(model):
        run(model, "llava-llama", inputs)
    longest = inputs["input_ids"].shape[1]
    assert sum(seen) == (calls if calls is not None else 3 * 10)
    assert longest == 14


@pytest.mark.parametrize(("case", "held"), [("attention", [14, 10, 14, 10]), ("block, own keys", [14] * 4)])
def test_a_cache_lacks_what_left_no_key(case: str, held: list[int]) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "8I2")
    with CASES[case].on(model), torch.no_grad():
        cache: Any = cache_of_output(model(**inputs, use_cache=True))
    assert [layer.keys.shape[-2] for layer in cache.layers[:LAYERS]] == held
    if 10 not in held:  # nothing is missing: it goes on without the policy
        model(input_ids=torch.tensor([[5]]), **{cache_keyword(): cache})


@pytest.mark.parametrize("case", ["attention, all", "block, all"])
def test_attention_that_nobody_has_cannot_be_read(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    layers = CASES[case].layers or ()
    told = f"has no token attend in decoder layer {layers[0]}"
    with CASES[case].on(model), AttentionShift().on(model), pytest.raises(SeamError, match=told):
        run(model, "llava-llama", inputs)
    with CASES[case].on(model), Prune(stages=[(layers[0] + 1, 0.5)]).on(model), pytest.raises(SeamError, match=told):
        run(model, "llava-llama", inputs)
    wake(alula.attach(model, CONFIGS["mass"]))
    with CASES[case].on(model):
        if case == "block, all":  # what the graft would add there goes with the layer
            run(model, "llava-llama", inputs)
            return
        with pytest.raises(SeamError, match=told):
            run(model, "llava-llama", inputs)


@contextmanager
def lending(model: Any, policy: Skip) -> Iterator[None]:
    """What is skipped put to 0, and keys and values of who skips replaced by those of the layer before, as these were
    left there."""
    anatomy, layers = Anatomy.of(model), policy.layers or ()
    seen: dict[tuple[int, str], Tensor] = {}
    ids: list[Tensor] = []

    def note(host: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids[:] = [kwargs["input_ids"]]

    def lend(layer: int, name: str, output: Tensor) -> Tensor:
        if layer in layers:
            output = torch.where(skips(policy, ids[0])[..., None], seen[layer - 1, name], output)
        seen[layer, name] = output
        return output

    def hook(layer: int, name: str) -> Any:
        return lambda module, args, output: lend(layer, name, output)

    handles = [model.register_forward_pre_hook(note, with_kwargs=True)]
    for layer in range(LAYERS):
        for name in ("k_proj", "v_proj"):
            module = anatomy.attention(layer).get_submodule(name)
            handles.append(module.register_forward_hook(hook(layer, name)))
    try:
        with silenced(model, policy.part, layers, lambda now: skips(policy, now)):
            yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("way", [*WAYS, "drafted"])
@pytest.mark.parametrize("case", LENT)
@pytest.mark.parametrize("host", ["llama", "llava-llama", "qwen2_5_vl"])
def test_lent_keys_are_those_of_the_layer_before(host: str, case: str, way: str) -> None:
    layouts = ("3I6",) if way == "drafted" else LAYOUTS
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *layouts)
    options: dict[str, Any] = {**WAYS.get(way, WAYS["greedy"]), "max_new_tokens": 4}
    drafts = {"prompt_lookup_num_tokens": 2} if way == "drafted" else {}
    valid = inputs["attention_mask"].bool()
    plain = run(model, host, inputs)
    with lending(model, LENT[case]):
        expected = run(model, host, inputs, use_cache=False)
        torch.manual_seed(0)
        said = model.generate(**inputs, **options, use_cache=False)
    with LENT[case].on(model), prompt_tokens(model, host, inputs):
        ours = run(model, host, inputs, use_cache=True)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **options, **drafts), said)
    close(ours[valid], expected[valid])
    assert (ours - plain)[valid].abs().max() > 1e-3


def test_lent_keys_go_with_withdrawal() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != zoo.IMAGE)
    with lending(model, LENT["blocks in a row"]), masked(model, withdrawn(2)):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    for one, other in ((LENT["blocks in a row"], Withdraw(layer=2)), (Withdraw(layer=2), LENT["blocks in a row"])):
        with one.on(model), other.on(model):
            close(run(model, "llava-llama", inputs, use_cache=True)[text], expected[text])


def test_keys_that_cannot_be_lent_are_refused() -> None:
    def asked(host: str, policy: Skip, **options: Any) -> None:
        model = zoo.build(host, layers=LAYERS)
        with policy.on(model):
            run(model, host, zoo.batch(host, "3I2"), **options)

    with pytest.raises(UsageError, match="layer 0 has no layer before it"):
        asked("llama", Skip(part="block", layers=(0,), keys="lent"))
    with pytest.raises(UsageError, match="pass use_cache=True"):
        asked("llama", Skip(part="block", layers=(1,), keys="lent"), use_cache=False)
    with pytest.raises(HostError, match="turns keys by other angles"):
        asked("gemma3", Skip(part="block", layers=(1,), keys="lent"))
    with pytest.raises(HostError, match="lets go of some before they can be read"):
        asked("mistral", Skip(part="block", layers=(1,), keys="lent"))
    absent = Skip(part="block", layers=(1,)).on(model := zoo.build("llama", layers=LAYERS))
    lent = Skip(part="block", layers=(2,), keys="lent").on(model)
    with absent, lent, pytest.raises(SeamError, match="has none there"):
        run(model, "llama", zoo.batch("llama", "3I2"))


def test_those_of_the_largest_norm_skip() -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    seen: dict[str, Tensor] = {}
    anatomy, policy = Anatomy.of(model), Skip(part="mlp", layers=(1, 3), share=0.5, choice="norm")
    image = inputs["input_ids"] == zoo.IMAGE

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["norm"] = (args[0] if args else kwargs["hidden_states"]).norm(dim=-1)

    handle = anatomy.layers[1].register_forward_pre_hook(note, with_kwargs=True)
    run(model, "llava-llama", inputs)
    handle.remove()
    largest = torch.zeros_like(image)
    for sample, norms in enumerate(seen["norm"].masked_fill(~image, -1)):
        largest[sample, norms.argsort(descending=True)[: int(image[sample].sum()) // 2]] = True
    with silenced(model, "mlp", (1, 3), lambda ids: largest):
        expected = run(model, "llava-llama", inputs, use_cache=False)
    with policy.on(model):
        ours = run(model, "llava-llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])


@pytest.mark.parametrize("part", ["mlp", "attention", "block"])
def test_steps_alone_skip_and_run_nothing_of_it(part: Any) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)
    anatomy, policy = Anatomy.of(model), Skip(part=part, layers=(2,), tokens="all", when="steps")
    prompt, calls = run(model, "llava-llama", inputs), []
    inside = anatomy.attention(2).q_proj if part == "attention" else anatomy.mlp(2).down_proj
    inside.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    with policy.on(model):
        assert torch.equal(run(model, "llava-llama", inputs), prompt)
        calls.clear()
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert calls == [inputs["input_ids"].shape[1]]
    left = inputs["input_ids"].shape[1]
    cached = _step_by_step(model, inputs, part, 4)
    assert torch.equal(said[:, left:], cached)


@torch.no_grad()
def test_a_step_of_embeddings_is_one() -> None:
    model, inputs, calls = zoo.build("llama", layers=LAYERS), zoo.batch("llama", "3I2"), []
    Anatomy.of(model).mlp(2).register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    with Skip(part="block", layers=(2,), tokens="all", when="steps").on(model):
        cache = cache_of_output(model(**inputs, token_map=token_map(inputs), use_cache=True))
        model(inputs_embeds=torch.randn(1, 1, 32), token_map=TokenMap.text(1, 1), **{cache_keyword(): cache})
    assert calls == [9]


@torch.no_grad()
def _step_by_step(model: Any, inputs: dict[str, Tensor], part: str, steps: int) -> Tensor:
    """Greedy words, in whose steps what a part of layer 2 adds is put to 0. Nobody reads the keys it leaves."""
    anatomy, words = Anatomy.of(model), []
    output = model(**inputs, position_ids=true_positions(inputs), use_cache=True)
    modules = {"attention": [anatomy.attention(2)], "mlp": [anatomy.mlp(2)]}

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for module in modules.get(part) or modules["attention"] + modules["mlp"]:
        module.register_forward_hook(nothing)
    mask = inputs["attention_mask"]
    barred = torch.tensor(model.generation_config.suppress_tokens)
    for _ in range(steps):
        words.append(output.logits[:, -1].index_fill(1, barred, -torch.inf).argmax(dim=-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        places = mask.cumsum(dim=1)[:, -1:] - 1
        given = {"attention_mask": mask, "position_ids": places, cache_keyword(): cache_of_output(output)}
        output = model(input_ids=words[-1], **given)
    return torch.cat(words, dim=1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"part": "block", "when": "steps"}, "images come in prompts alone"),
        ({"part": "block", "tokens": "all", "when": "steps", "share": 0.5}, "a step is one token"),
        ({"part": "mlp", "choice": "first"}, "there is no choice"),
        ({"part": "mlp", "share": 0.5, "seed": 1}, 'goes with choice="random"'),
        ({"part": "block", "keys": "lent", "tokens": "all"}, "nobody reads keys"),
        ({"part": "mlp", "keys": "own"}, "leave keys anyway"),
        ({"part": "block", "keys": "own", "tokens": "all"}, "nobody reads keys"),
        ({"part": "mlp", "share": 0.0}, "larger than 0"),
        ({"part": "mlp", "layers": ()}, "names none"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Skip(**settings)


def test_layers_and_parts_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        Skip(part="mlp", layers=(9,)).on(zoo.build("llava-llama")).__enter__()
    with pytest.raises(HostError, match="has no MLP module"):
        Skip(part="mlp").on(zoo.build("opt")).__enter__()


def parallel() -> Any:
    """A decoder whose attention and MLP read the same norm (Cohere)."""
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=zoo.PAD, eos_token_id=zoo.EOS, bos_token_id=None,
    )  # fmt: skip
    model = CohereForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


@pytest.mark.parametrize("case", CASES)
def test_layers_whose_halves_stand_side_by_side(case: str) -> None:
    model, inputs = parallel(), zoo.batch("llama", *LAYOUTS)
    with oracle(model, CASES[case]):
        expected = run(model, "llama", inputs, use_cache=False)
    with CASES[case].on(model):
        ours = run(model, "llama", inputs)
    valid = inputs["attention_mask"].bool()
    close(ours[valid], expected[valid])
    with pytest.raises(HostError, match="given what its attention is given already"), ParallelAttention().on(model):
        pass


@pytest.mark.parametrize("host", ["llama", "qwen3_moe", "gemma3", "olmo2", "llava-llama", "qwen2_5_vl"])
def test_an_mlp_given_what_attention_is_given(host: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    anatomy, seen = Anatomy.of(model), {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["given"] = args[0] if args else kwargs["hidden_states"]

    def give(module: nn.Module, args: Any) -> Any:
        image = (inputs["input_ids"] == zoo.IMAGE)[..., None]
        return (torch.where(image, seen["given"], args[0]),)

    handles = [anatomy.attention(layer).register_forward_pre_hook(note, with_kwargs=True) for layer in (1, 3)]
    handles += [anatomy.mlp(layer).register_forward_pre_hook(give) for layer in (1, 3)]
    expected = run(model, host, inputs)
    for handle in handles:
        handle.remove()
    plain = run(model, host, inputs)
    with ParallelAttention(layers=(1, 3)).on(model):
        close(run(model, host, inputs), expected)
    assert (expected - plain).abs().max() > 1e-3
    with pytest.raises(HostError, match="no MLP module"), ParallelAttention().on(zoo.build("opt")):
        pass


@pytest.mark.parametrize("choice", ["first", "strided", "random"])
def test_a_share_is_rounded_down_as_written(choice: Any) -> None:
    """0.29 of 100 tokens are 29, also where floating point has their product at 28.999..."""
    model, ids = zoo.build("llama"), torch.arange(100)[None] % 50
    logits = []
    for share in (0.29, 0.2901):
        with Skip(part="mlp", tokens="all", share=share, choice=choice).on(model), torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
