"""Attaching and detaching: a fresh graft changes nothing, a detached one leaves nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import alula
from alula import WingsConfig
from alula.errors import HostError, UsageError
from alula.grafts import grafts_of
from alula.seam import find
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import ASKS_ATTENTION, CONFIGS, covering, grafted, run, wake

CACHE = cache_keyword()

LAYOUTS = ("3I2I4", "6")


def _hooks(model: nn.Module) -> dict[str, int]:
    return {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


def _facts(model: Any) -> tuple[Any, ...]:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [name for name, _ in model.named_modules()],
        _hooks(model),
        model.config._attn_implementation,
        model.config.get_text_config(decoder=True)._attn_implementation,
    )


@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS)))
def test_fresh_graft_equals_the_host(host: str, config: str) -> None:
    model = zoo.build(host)
    inputs = zoo.batch(host, *LAYOUTS)
    before = run(model, host, inputs)
    alula.attach(model, CONFIGS[config])
    after = run(model, host, inputs)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    if config not in ASKS_ATTENTION:
        assert torch.equal(after, before)


@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS)))
def test_detach_restores_the_host_bit_for_bit(host: str, config: str) -> None:
    model = zoo.build(host)
    inputs = zoo.batch(host, *LAYOUTS)
    logits = run(model, host, inputs)  # before the facts: transformers installs hooks of its own in the first forward
    before = _facts(model)
    wake(alula.attach(model, CONFIGS[config]))
    assert not torch.equal(run(model, host, inputs), logits)
    alula.detach(model)
    after = _facts(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert torch.equal(run(model, host, inputs), logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_gives_back_the_attention_implementation(implementation: str) -> None:
    model = zoo.build("llava-llama")
    model.set_attn_implementation({"text_config": implementation})
    alula.attach(model, CONFIGS["mass"])
    assert model.config.text_config._attn_implementation == {"eager": "eager", "sdpa": "alula"}[implementation]
    alula.detach(model)
    assert model.config.text_config._attn_implementation == implementation


def test_a_graft_detached_twice_leaves_the_next_of_its_name_alone() -> None:
    model = zoo.build("llama")
    first = alula.attach(model, WingsConfig(rank=2))
    first.detach()
    second = alula.attach(model, WingsConfig(rank=2))
    first.detach()
    assert grafts_of(model) == {"wings": second}
    second.detach()
    second.detach()
    assert find(model) is None


@pytest.mark.parametrize("host", ["qwen3", "llava-gemma3", "qwen2_5_vl"])
def test_disabled_is_the_host_bit_for_bit_and_comes_back(host: str) -> None:
    model = zoo.build(host)
    inputs = zoo.batch(host, *LAYOUTS)
    plain = run(model, host, inputs)
    graft = wake(alula.attach(model, CONFIGS["mass"]))
    speaking = run(model, host, inputs)
    with graft.disabled():
        assert torch.equal(run(model, host, inputs), plain)
    assert torch.equal(run(model, host, inputs), speaking)


@pytest.mark.parametrize("host", ["llama", "gemma3", "llava-qwen3"])
def test_two_grafts_under_two_names(host: str) -> None:
    model = zoo.build(host)
    inputs = zoo.batch(host, *LAYOUTS)
    plain = run(model, host, inputs)
    one = wake(alula.attach(model, CONFIGS["mass"], "one"), 1)
    alone = run(model, host, inputs)
    two = wake(alula.attach(model, CONFIGS["attention"], "two"), 2)
    both = run(model, host, inputs)
    assert not torch.allclose(both, alone, atol=1e-3)
    assert set(alula.grafts_of(model)) == {"one", "two"}
    with two.disabled():
        assert torch.equal(run(model, host, inputs), alone)
    with one.disabled(), two.disabled():
        assert torch.equal(run(model, host, inputs), plain)
    alula.detach(model, "two")
    assert torch.equal(run(model, host, inputs), alone)
    alula.detach(model, "one")
    assert torch.equal(run(model, host, inputs), plain)


def test_two_grafts_of_one_weight_add_up() -> None:
    """In one layer, two voices with the same weights say twice what one says."""
    host, config = "llava-llama", WingsConfig(rank=4, learners=("visual",), layers=(-1,), query="block_input")
    model = zoo.build(host)
    inputs = zoo.batch(host, "3I2")
    outputs: list[torch.Tensor] = []
    model.model.language_model.layers[-1].self_attn.register_forward_hook(lambda m, a, o: outputs.append(o[0]))

    def branch() -> torch.Tensor:
        # a hook registered before the graft's sees attention alone, one registered after it sees both
        out: list[torch.Tensor] = []
        handle = model.model.language_model.layers[-1].self_attn.register_forward_hook(lambda m, a, o: out.append(o[0]))
        run(model, host, inputs)
        handle.remove()
        return out[0]

    wake(alula.attach(model, config, "one"))
    single = branch() - outputs[-1]
    wake(alula.attach(model, config, "two"))
    double = branch() - outputs[-1]
    assert single.abs().max() > 1e-2
    torch.testing.assert_close(double, 2 * single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("host", "config"), [("llava-llama", "mass"), ("gemma2", "attention"), ("qwen2_5_vl", "paper")]
)
def test_deepcopy_owns_its_weights(host: str, config: str) -> None:
    model, graft = grafted(host, config)
    inputs = zoo.batch(host, *LAYOUTS)
    before = run(model, host, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, host, inputs), before)
    with torch.no_grad():
        for parameter in alula.grafts_of(twin)["wings"].parameters():
            parameter.zero_()
    assert torch.equal(run(model, host, inputs), before)
    torch.testing.assert_close(run(twin, host, inputs), run(zoo.build(host), host, inputs), atol=1e-5, rtol=0)
    alula.detach(model)
    torch.testing.assert_close(run(twin, host, inputs), run(model, host, inputs), atol=1e-5, rtol=0)
    assert alula.grafts_of(twin)["wings"].seam.anatomy.host is twin
    assert graft.seam.anatomy.host is model


@pytest.mark.parametrize("config", ["mass", "constant"])
def test_detached_from_a_copy_it_stays_on_the_original(config: str) -> None:
    model, _ = grafted("llava-llama", config)
    inputs = zoo.batch("llava-llama", *LAYOUTS)
    before, bare = run(model, "llava-llama", inputs), run(zoo.build("llava-llama"), "llava-llama", inputs)
    twin = copy.deepcopy(model)
    alula.detach(twin)
    assert torch.equal(run(model, "llava-llama", inputs), before)
    assert torch.equal(run(twin, "llava-llama", inputs), bare)


def test_two_models_side_by_side() -> None:
    inputs = zoo.batch("llava-llama", "3I2")
    first, _ = grafted("llava-llama", "mass", seed=0)
    second, _ = grafted("llava-llama", "mass", seed=1)
    alone = run(zoo.build("llava-llama", 1), "llava-llama", inputs)
    a, b = run(first, "llava-llama", inputs), run(second, "llava-llama", inputs)
    assert torch.equal(run(first, "llava-llama", inputs), a)
    alula.detach(second)
    assert torch.equal(run(second, "llava-llama", inputs), alone)
    assert torch.equal(run(first, "llava-llama", inputs), a)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("host", ["gemma2", "llava-gemma3"])
def test_an_error_inside_a_layer_keeps_nothing_alive(host: str) -> None:
    """Sandwich-norm layers hand something from attention to the norm behind it, which is not reached here."""

    def fail(*given: Any) -> None:
        raise RuntimeError("out of memory")

    model, graft = grafted(host, "mass")
    inputs = zoo.batch(host, "3I4")
    plain = run(model, host, inputs)
    handle = graft.seam.anatomy.attention_out(1).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, host, inputs)
    handle.remove()
    assert torch.equal(run(model, host, inputs), plain)
    handle = graft.seam.anatomy.attention_out(0).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, host, inputs)
    left = weakref.ref(model)
    del model, graft, handle
    gc.collect()
    assert left() is None


def test_parts_hold_every_parameter_once() -> None:
    for config in CONFIGS.values():
        model = zoo.build("llava-qwen3")
        graft = alula.attach(model, config)
        grouped = [id(p) for parameters in graft.parameters_by_part().values() for p in parameters]
        assert sorted(grouped) == sorted(id(p) for p in graft.parameters())
        assert set(graft.parameters_by_part()) <= {"wings.visual", "wings.textual", "wings.router"}


class TestRefusals:
    def test_a_name_is_taken_once(self) -> None:
        model, _ = grafted("llava-llama")
        with pytest.raises(UsageError, match="already in use"):
            alula.attach(model, CONFIGS["mass"])

    @pytest.mark.parametrize("name", ["keys", "pop", "forward", "training", "a b", "", 3])
    def test_what_cannot_be_a_name(self, name: Any) -> None:
        model = zoo.build("llama")
        facts = _facts(model)
        with pytest.raises(UsageError, match="cannot name a graft"):
            alula.attach(model, CONFIGS["mass"], name)
        assert _facts(model)[1:] == facts[1:]

    @pytest.mark.parametrize("layers", [(2,), (-3,), (0, 7)])
    def test_layers_the_host_lacks(self, layers: tuple[int, ...]) -> None:
        model = zoo.build("llama")
        facts = _facts(model)
        with pytest.raises(UsageError, match="does not exist"):
            alula.attach(model, WingsConfig(rank=2, layers=layers))
        assert _facts(model)[1:] == facts[1:]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"router": "softmax"},
            {"gate": "open"},
            {"query": "mlp"},
            {"learners": ()},
            {"learners": ("audio",)},
            {"rank": 0},
            {"dropout": 1.0},
            {"router_tokens": 0},
            {"gain": True},
            {"rope": 1},
            {"rank": True},
            {"rank": "8"},
            {"rank": 10**8},
            {"gain": "x"},
            {"gain": -1},
            {"gain": 0},
            {"gain": float("nan")},
            {"init_std": -3},
            {"init_std": 0},
            {"init_std": float("inf")},
            {"rope": "no"},
            {"layers": ()},
        ],
    )
    def test_settings_that_mean_nothing(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            WingsConfig(**wrong)

    def test_unknown_setting_names_its_neighbour(self) -> None:
        with pytest.raises(UsageError, match="did you mean `router`"):
            WingsConfig.from_dict({"routr": "mass"})

    def test_a_module_that_is_no_host(self) -> None:
        with pytest.raises(HostError):
            alula.attach(nn.Linear(2, 2), CONFIGS["mass"])

    def test_detaching_what_is_not_there(self) -> None:
        with pytest.raises(UsageError):
            alula.detach(zoo.build("llama"))

    def test_changed_attention_is_noticed(self) -> None:
        model, _ = grafted("llava-llama", "mass")
        model.set_attn_implementation({"text_config": "sdpa"})
        with pytest.raises(alula.errors.AlulaError, match="attention implementation"):
            run(model, "llava-llama", zoo.batch("llava-llama", "3I2"))

    def test_attention_that_cannot_be_read(self) -> None:
        """Where a router reads it; a constant one lets the host run what it likes."""
        AttentionInterface.register("of_somebody", sdpa_attention_forward)
        model = zoo.build("llava-llama")
        zoo.set_attention(model, "of_somebody")
        inputs = zoo.batch("llava-llama", "3I2")
        run(model, "llava-llama", inputs)
        facts = _facts(model)
        with pytest.raises(HostError, match="of_somebody"):
            alula.attach(model, CONFIGS["mass"])
        assert _facts(model)[1:] == facts[1:]
        alula.attach(model, CONFIGS["constant"])
        run(model, "llava-llama", inputs)

    def test_a_cache_from_before_the_graft(self) -> None:
        model = zoo.build("llava-llama")
        inputs = zoo.batch("llava-llama", "3I2")
        with torch.no_grad():
            cache = cache_of_output(model(**inputs, use_cache=True))
        alula.attach(model, CONFIGS["mass"])
        with pytest.raises(alula.errors.AlulaError, match="empty cache"), torch.no_grad():
            model(input_ids=torch.tensor([[1]]), **{CACHE: cache})


def test_learners_are_one_thing_in_any_order_and_any_sequence() -> None:
    config = WingsConfig(rank=4, learners=["textual", "visual"], layers=[-1])  # type: ignore[arg-type]
    assert config == WingsConfig(rank=4, layers=(-1,))
    inputs = zoo.batch("llava-llama", "3I2")
    model, _ = grafted("llava-llama", config)
    with torch.enable_grad():
        expected = model(**inputs).logits.detach()
    torch.testing.assert_close(run(model, "llava-llama", inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"layers": 1}, {"learners": "visual"}, {"learners": ("visual", "visual")}])
def test_what_is_no_list_of_learners_or_layers_is_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"wings\.l"):
        WingsConfig(**wrong)
