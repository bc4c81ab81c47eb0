"""MKS2 against a loop over tokens of its equations, its three modes, how it starts, and what it stands beside."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache

import alula
from alula.errors import AdapterError, HostError, UsageError
from alula.grafts import ExpertsConfig, MKS2Config, WingsConfig
from alula.grafts.mks2.memory import MemoryRouter
from alula.probes import AttentionShift, watch
from alula.seam import find
from alula.seam.dialect import cache_keyword
from tests import zoo
from tests.grafts.common import run, token_map, true_positions, wake

CACHE = cache_keyword()
SMALL: dict[str, Any] = {"memory_width": 6, "rank": 2, "alpha": 3.0}
WAYS: dict[str, MKS2Config] = {
    "store": MKS2Config(mode="store", **SMALL),
    "store, beside": MKS2Config(mode="store", store="beside", activation="silu", **SMALL),
    "mix": MKS2Config(**SMALL),
    "mix, parallel": MKS2Config(lora="parallel", activation="relu", **SMALL),
    "modality": MKS2Config(route="modality", **SMALL),
    "modality, parallel": MKS2Config(route="modality", lora="parallel", **SMALL),
}
every_way = pytest.mark.parametrize("way", WAYS)
IMAGES = ("3I2", "5", "I1I2")
ACTIVATIONS: dict[str, Any] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


class ByToken(nn.Module):
    """The feed-forward half of a Llama layer under MKS2, one token at a time, from the equations (Sec. 1.2).

    Args:
        mlp: the host's.
        parts: of the graft in this layer, by the names of its state.
        is_media: (B, S) bool.
    """

    def __init__(self, mlp: Any, parts: dict[str, Tensor], config: MKS2Config, is_media: Tensor) -> None:
        super().__init__()
        self.mlp, self.parts, self.config, self.is_media = mlp, parts, config, is_media

    def product(self, name: str) -> Tensor:
        """(o, i) of an adapter; 0 where there is none."""
        if f"lora.{name}.up" not in self.parts:
            return torch.zeros((), dtype=torch.float64)
        return self.config.alpha / self.config.rank * self.parts[f"lora.{name}.up"] @ self.parts[f"lora.{name}.down"]

    def recalled(self, x: Tensor, *, adapted: bool) -> Tensor:
        p = self.parts
        inner, outer = p["memory.inner"], p["memory.outer"]
        if adapted:
            inner, outer = inner + self.product("memory_inner"), outer + self.product("memory_outer")
        found = outer @ ACTIVATIONS[self.config.activation](inner @ x + p["memory.inner_bias"]) + p["memory.outer_bias"]
        return found + (self.product("memory") @ x if adapted and "lora.memory.up" in p else 0)

    def text(self, x: Tensor, *, adapted: bool) -> Tensor:
        gate, up, down = (
            getattr(self.mlp, name).weight + (self.product(f"mlp__{name}") if adapted else 0)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        found = down @ (ACTIVATIONS["silu"](gate @ x) * (up @ x))
        return found + (self.product("mlp") @ x if adapted and "lora.mlp.up" in self.parts else 0)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = []
        for sample, media in zip(hidden, self.is_media, strict=True):
            for x, is_media in zip(sample, media.tolist(), strict=True):
                if self.config.mode == "store":
                    beside = self.text(x, adapted=False) if self.config.store == "beside" else 0
                    rows.append(self.recalled(x, adapted=False) + beside)
                elif self.config.route == "modality":
                    rows.append(self.recalled(x, adapted=True) if is_media else self.text(x, adapted=False))
                else:
                    odds = torch.exp(self.parts["router.weight"] @ x + self.parts["router.bias"])
                    memory, text = odds / odds.sum()
                    rows.append(memory * self.recalled(x, adapted=True) + text * self.text(x, adapted=True))
        return torch.stack(rows).view(hidden.shape)


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def by_token(model: Any, graft: Any, inputs: dict[str, Tensor]) -> None:
    """Put the loop in the place of every MLP, with the graft's weights."""
    for index, layer in enumerate(model.model.language_model.layers):
        parts = dict(graft.layers[index].named_parameters())
        layer.mlp = ByToken(layer.mlp, parts, graft.config, inputs["input_ids"] == zoo.IMAGE)


@every_way
def test_it_computes_the_equations_and_their_gradients(way: str) -> None:
    inputs = in_double(zoo.batch("llava-llama", *IMAGES, side="right"))
    valid = inputs["attention_mask"].bool()

    def computed(by: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        model = zoo.build("llava-llama").double().train()
        graft = wake(alula.attach(model, WAYS[way]))
        if by == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if by == "loop":
            alula.detach(model)
            by_token(model, graft, inputs)
        logits = model(**inputs, use_cache=False).logits[valid]
        logits.square().sum().backward()
        return logits.detach(), {name: parameter.grad for name, parameter in graft.named_parameters()}

    expected, slopes = computed("loop")
    for by in ("graft", "checkpointing"):
        logits, gradients = computed(by)
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
        for name, slope in slopes.items():
            assert (gradients[name] is None) == (slope is None), name
            if slope is not None:
                torch.testing.assert_close(gradients[name], slope, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("host", ["llava-llama", "olmo2", "gemma3", "gpt2", "gpt_neox", "qwen2_5_vl"])
def test_in_mode_text_it_is_the_host_to_the_bit(host: str) -> None:
    model, inputs = zoo.build(host), zoo.batch(host, "3I2", "6")
    before = run(model, host, inputs)
    graft = wake(alula.attach(model, MKS2Config(mode="text", **SMALL)))
    assert torch.equal(run(model, host, inputs), before)
    with graft.using("mix"):  # type: ignore[attr-defined]
        assert not torch.equal(run(model, host, inputs), before)
    alula.detach(model)
    graft = wake(alula.attach(model, MKS2Config(**SMALL)))
    mixed = run(model, host, inputs)
    with graft.using("text"):  # type: ignore[attr-defined]
        assert torch.equal(run(model, host, inputs), before)
    assert torch.equal(run(model, host, inputs), mixed)


def test_by_modality_text_is_the_hosts_to_the_bit_beside_images_and_in_steps() -> None:
    host = "llava-llama"
    model = zoo.build(host)
    inputs = zoo.batch(host, "4I2", "7")
    before = run(model, host, inputs)
    wake(alula.attach(model, WAYS["modality"]))
    after = run(model, host, inputs)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :4], before[0, :4])
    assert not torch.equal(after[0, 4:], before[0, 4:])
    model.train()  # where the memory is computed for all tokens, so that its gradients are there
    assert torch.equal(model(**zoo.batch(host, "7")).logits, model.eval()(**zoo.batch(host, "7")).logits)


@pytest.mark.parametrize(("start", "share"), [("text", 1 / (1 + math.exp(8))), ("neutral", 0.5)])
def test_the_router_starts_as_it_is_told(start: Any, share: float) -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2", "5")
    before = run(model, "llava-llama", inputs)
    graft = alula.attach(model, MKS2Config(router_start=start, **SMALL))
    after = run(model, "llava-llama", inputs)
    moved = float((after - before).abs().max())
    assert 0 < moved < 0.02 if start == "text" else moved > 0.1
    weights = graft.layers[0].router(torch.randn(2, 3, 32))  # type: ignore[operator]
    torch.testing.assert_close(weights, torch.tensor([share, 1 - share]).expand(2, 3, 2), atol=1e-7, rtol=1e-4)
    if start == "text":
        assert weights[..., 1].min() > 0.9996
    alula.detach(model)
    for layer in model.model.language_model.layers:  # a fresh memory holds nothing: what is left is the MLP's share
        layer.mlp.down_proj.weight.data *= 1 - share
    torch.testing.assert_close(run(model, "llava-llama", inputs), after, atol=1e-5, rtol=1e-4)


def test_the_router_is_float32_in_half_precision_and_under_autocast() -> None:
    torch.manual_seed(0)
    config = MKS2Config(router_start="neutral")
    router, x = MemoryRouter(8, config, torch.zeros(1, dtype=torch.bfloat16)), torch.randn(1, 5, 8).bfloat16()
    with torch.no_grad():
        router.weight.normal_(std=2.0)
        expected = torch.softmax(x.double() @ router.weight.double().T, dim=-1)
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                weights = router(x)
            assert weights.dtype == torch.float32
            torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 5))


def test_a_fresh_store_leaves_attention_alone_and_beside_the_mlp_it_changes_nothing() -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2", "5")
    before = run(model, "llava-llama", inputs)
    alula.attach(model, MKS2Config(mode="store", store="beside", **SMALL))
    assert torch.equal(run(model, "llava-llama", inputs), before)
    alula.detach(model)
    alula.attach(model, MKS2Config(mode="store", **SMALL))
    fresh = run(model, "llava-llama", inputs)
    alula.detach(model)
    for layer in model.model.language_model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(run(model, "llava-llama", inputs), fresh, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("way", ["store", "mix"])
def test_steps_behind_a_cache_and_neighbors_change_nothing(way: str) -> None:
    host = "llava-llama"
    model = zoo.build(host)
    wake(alula.attach(model, WAYS[way]))
    inputs = zoo.batch(host, "3I2", "I4")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **options, output_logits=True)
    plain = model.generate(**inputs, **options, output_logits=True, use_cache=False)
    for ours, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    together = run(model, host, {**inputs, "position_ids": true_positions(inputs)})
    alone = run(model, host, {**zoo.batch(host, "3I2"), "pixel_values": inputs["pixel_values"][:1]})
    torch.testing.assert_close(together[0, -alone.shape[1] :], alone[0], atol=2e-5, rtol=1e-4)


def test_it_stands_beside_wings_lora_experts_and_probes() -> None:
    """On one host, whatever came first; off again, each leaves the others as they were."""
    host, inputs = "llava-llama", zoo.batch("llava-llama", "3I2", "5")
    settings = {"wings": WingsConfig(rank=4), "experts": ExpertsConfig(rank=2), "mks2": WAYS["mix"]}

    def built(order: list[str]) -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(zoo.build(host), config).eval()
        for name in order:
            wake(alula.attach(model, settings[name]))
        return model

    model = built(["wings", "experts", "mks2"])
    with watch(model, [AttentionShift()]):
        ours = run(model, host, inputs)
    torch.testing.assert_close(run(built(["mks2", "experts", "wings"]), host, inputs), ours, atol=1e-5, rtol=1e-4)
    without = run(built(["wings", "experts"]), host, inputs)
    assert not torch.allclose(without, ours)
    with alula.grafts_of(model)["mks2"].using("text"):  # type: ignore[attr-defined]
        assert torch.equal(run(model, host, inputs), without)
    alula.detach(model, "mks2")
    assert torch.equal(run(model, host, inputs), without)


def test_who_adapts_all_linears_does_not_find_its_own() -> None:
    model = zoo.build("llama")
    graft = alula.attach(model, WAYS["mix"])
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert not any("base_layer" in name for name, _ in graft.named_parameters())


def test_layers_are_compiled_with_it() -> None:
    """A graph for prompts and one for steps, of all layers and lengths; gradients have one of their own."""
    torch.compiler.reset()
    counters.clear()
    model = zoo.build("llama")
    wake(alula.attach(model, WAYS["mix"]))
    twin = copy.deepcopy(model)
    alula.compile_layers(twin, backend="eager")
    for layout in ("3I20", "9I31"):
        inputs, found = zoo.batch("llama", layout), []
        for each in (twin, model):
            cache = DynamicCache()
            with torch.no_grad():
                prompt = each(**inputs, token_map=token_map(inputs), **{CACHE: cache}).logits
                step = each(input_ids=torch.tensor([[7]]), **{CACHE: cache}).logits
            each.zero_grad()
            each(**inputs, token_map=token_map(inputs)).logits.square().sum().backward()
            slopes = {name: p.grad for name, p in each.named_parameters() if ".alula." in name}
            found.append((prompt, step, slopes))
        torch.testing.assert_close(found[0], found[1], atol=5e-4, rtol=2e-3)
    assert counters["stats"]["unique_graphs"] <= 3 * (2 if torch.__version__.startswith("2.7.") else 1)
    torch.compiler.reset()


def test_a_stored_memory_is_loaded_for_mixing(tmp_path: Path) -> None:
    model, inputs = zoo.build("llava-llama"), zoo.batch("llava-llama", "3I2")
    graft = wake(alula.attach(model, WAYS["store"]))
    alula.save_adapter(model, tmp_path / "stored")
    with graft.using("mix"):  # type: ignore[attr-defined]
        expected = run(model, "llava-llama", inputs)
    again = zoo.build("llava-llama")
    loaded = alula.load_adapter(again, tmp_path / "stored", mode="mix")
    assert loaded.config.mode == "mix"
    assert torch.equal(run(again, "llava-llama", inputs), expected)
    smaller = alula.attach(zoo.build("llava-llama"), MKS2Config(**{**SMALL, "memory_width": 5}))
    with pytest.raises(AdapterError, match=r"layers\.0\..* has shape"):
        smaller.load_state_dict(graft.state_dict())


def test_the_published_size() -> None:
    """402.8 M weights in Llama-2-7B's 32 layers, of three eighths of 4096 within."""
    width = MKS2Config().width(4096)
    assert width == 1536
    assert 32 * (2 * 4096 * width + 4096 + width) == pytest.approx(402.8e6, rel=1e-3)
    model = zoo.build("llama")
    graft = alula.attach(model, MKS2Config())
    groups = {part: sum(p.numel() for p in each) for part, each in graft.parameters_by_part().items()}
    memory, adapters = 2 * 32 * 12 + 32 + 12, 2 * (12 + 32) + 3 * (32 + 48)
    assert groups == {"mks2.memory": 2 * memory, "mks2.lora": 2 * 16 * adapters, "mks2.router": 2 * (2 * 32 + 2)}


@pytest.mark.parametrize(
    ("host", "settings", "error", "said"),
    [
        ("opt", {}, HostError, "has no MLP module"),
        ("qwen3_moe", {}, UsageError, "mks2.lora: the MLP of decoder layer 0 holds no linear module"),
        ("llama", {"layers": (5,)}, UsageError, "layer 5 does not exist"),
    ],
)
def test_hosts_it_does_not_fit_are_left_as_they_were(host: str, settings: Any, error: Any, said: str) -> None:
    model = zoo.build(host)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=said):
        alula.attach(model, MKS2Config(**settings))
    assert [name for name, _ in model.named_modules()] == names
    assert find(model) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "recall"}, "mks2.mode"),
        ({"memory_width": 0}, "mks2.memory_width"),
        ({"layers": ()}, "mks2.layers: it is empty"),
        ({"route": "modality", "router_start": "neutral"}, "has no router"),
        ({"activation": "tanh"}, "mks2.activation"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        MKS2Config(**settings)
    assert said in str(caught.value)


def test_modes_are_named_and_one_at_a_time() -> None:
    model = zoo.build("llama")
    graft: Any = alula.attach(model, WAYS["mix"])
    with pytest.raises(UsageError, match="there is no mode 'recall'"), graft.using("recall"):
        pass
    with (
        graft.using("store"),
        graft.using("store"),
        pytest.raises(UsageError, match="inside a block"),
        graft.using("text"),
    ):
        pass
    inputs = zoo.batch("llama", "3I2")
    plain = run(model, "llama", inputs)
    with graft.disabled(), graft.using("store"):
        assert not torch.equal(run(model, "llama", inputs), plain)
    assert token_map(inputs).is_perceptual.any()
