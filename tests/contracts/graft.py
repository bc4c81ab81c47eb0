"""What every graft promises, whatever it computes. A graft that is registered and has no case here fails.

Cases are settings: a graft with several ways to compute brings several. Wings' own tests stand in `tests/grafts`.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import alula
from alula import WingsConfig
from alula.errors import AdapterError, UsageError
from alula.grafts import AimConfig, BrowseConfig, ExpertsConfig, Graft, GraftConfig, MKS2Config, TealConfig, register
from alula.grafts.registry import graft_types
from alula.grafts.teal import CodesSpec
from tests import zoo
from tests.contracts.toy_graft import ShiftConfig, ShiftGraft
from tests.grafts.common import prompt_tokens, run, true_positions, wake, with_ids

CASES: dict[str, GraftConfig] = {
    "wings": WingsConfig(rank=4, router="mass"),
    "wings, one layer": WingsConfig(rank=4, router="attention", router_tokens=96, layers=(-1,)),
    "experts, image": ExpertsConfig(rank=4, alpha=8),
    "experts, seen": ExpertsConfig(tokens="seen", rank=4),
    "experts, both": ExpertsConfig(tokens="both", rank=4, alpha=2),
    "experts, full": ExpertsConfig(rank=None, targets=("attention",), layers=(-1,)),
    "experts, both, full": ExpertsConfig(tokens="both", rank=None),
    "mks2, mix": MKS2Config(memory_width=6, rank=2),
    "mks2, mix, one layer": MKS2Config(memory_width=6, rank=2, lora="parallel", layers=(-1,)),
    "mks2, modality": MKS2Config(memory_width=6, rank=2, route="modality"),
    "aim": AimConfig(),
    "teal": TealConfig(
        codes={"image": CodesSpec(size=6, tokens=4, width=5), "audio": CodesSpec(size=4, tokens=3, width=2)}
    ),
    "browse": BrowseConfig(),
    "browse, bias": BrowseConfig(bias=True),
    "toy": ShiftConfig(),
    "toy, one layer": ShiftConfig(layers=(1,)),
}
REPLACING = {"mks2, mix", "mks2, mix, one layer", "mks2, modality"}
"""what stands in the place of a part of the host from the start: fresh, its host is another"""
IN_TEXT = {"mks2, mix", "mks2, mix, one layer"}
"""what speaks in text too; each keeps the host's bits there in a mode of its own (`tests/grafts/mks2`)"""
ON_REQUEST = {"aim", "teal"}
"""what acts in forwards that are given further inputs, or ids behind the host's, and in no others (`tests/grafts/aim`
and `tests/grafts/teal` give them)"""
HOSTS = ("olmo2", "qwen3_moe", "gpt_neox", "gpt2", "qwen3", "gemma3", "llava-llama", "llava-mistral", "qwen2_5_vl")
AHEAD = {"browse", "browse, bias"}
"""what encodes images knowing the whole prompt, by design, and so needs a connector"""
PAIRS = [
    (host, case)
    for i, host in enumerate(HOSTS)
    for j, case in enumerate(CASES)
    if (i + j) % 2 == 0
    and (case not in AHEAD or host.startswith("llava-"))
    and (host, case) != ("gpt2", "aim")  # which adds positions to embeddings
]

every_case = pytest.mark.parametrize("case", CASES)
every_pair = pytest.mark.parametrize(("host", "case"), PAIRS)


def settings(host: str, case: str) -> GraftConfig:
    """The case's settings as that host takes them."""
    config = CASES[case]
    if host == "qwen3_moe" and isinstance(config, ExpertsConfig):  # its MLPs are fused, and hold no linear module
        return config.model_copy(update={"targets": ("attention",)})
    if host == "qwen3_moe" and isinstance(config, MKS2Config):
        return config.model_copy(update={"lora": "parallel"})
    return config


def grafted(host: str, case: str, seed: int = 0) -> tuple[Any, Graft]:
    """A host with the case's graft on it, every part of which counts."""
    model = zoo.build(host, seed)
    return model, wake(alula.attach(model, settings(host, case)))


def test_every_registered_graft_has_a_case() -> None:
    assert {config.graft_type for config in CASES.values()} == set(graft_types())


def test_two_grafts_of_one_type_are_refused() -> None:
    register(ShiftConfig, ShiftGraft)  # the same once more is no other one

    class Other(ShiftGraft):
        pass

    with pytest.raises(UsageError, match="'toy_shift' already"):
        register(ShiftConfig, Other)


def test_settings_of_no_registered_graft_are_refused() -> None:
    class Unknown(ShiftConfig):
        graft_type = "unknown"

    model = zoo.build("llama")
    with pytest.raises(UsageError, match="no graft is registered"):
        alula.attach(model, Unknown())
    assert alula.grafts_of(model) == {}


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[1] not in REPLACING])
def test_fresh_it_changes_nothing(host: str, case: str) -> None:
    model, inputs = zoo.build(host), zoo.batch(host, "3I2", "5", "I1I2")
    before = run(model, host, inputs)
    alula.attach(model, settings(host, case))
    torch.testing.assert_close(run(model, host, inputs), before, atol=2e-5, rtol=1e-5)


@every_pair
def test_awake_it_counts_behind_images_and_text_alone_keeps_its_bits(host: str, case: str) -> None:
    model = zoo.build(host)
    images, text = zoo.batch(host, "3I2", "I3I"), zoo.batch(host, "6", "9")
    before = [run(model, host, inputs) for inputs in (images, text)]
    wake(alula.attach(model, settings(host, case)))
    after = [run(model, host, inputs) for inputs in (images, text)]
    assert bool((after[0] - before[0]).abs().max() > 1e-2) is (case not in ON_REQUEST)
    assert torch.equal(after[1], before[1]) is (case not in IN_TEXT)


@every_pair
def test_detached_and_disabled_it_is_gone_bit_for_bit(host: str, case: str) -> None:
    model, inputs = zoo.build(host), zoo.batch(host, "3I2", "5")
    before, names = run(model, host, inputs), [name for name, _ in model.named_modules()]
    graft = wake(alula.attach(model, settings(host, case)))
    with graft.disabled():
        disabled = run(model, host, inputs)
    torch.testing.assert_close(disabled, before, atol=2e-5, rtol=1e-5)
    alula.detach(model)
    assert torch.equal(run(model, host, inputs), before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[1] not in AHEAD])
def test_no_token_depends_on_later_ones(host: str, case: str) -> None:
    model, _ = grafted(host, case)
    inputs = zoo.batch(host, "3I6")
    length = inputs["input_ids"].shape[1]
    whole = run(model, host, inputs)
    ids = inputs["input_ids"].clone()
    ids[:, length - 3 :] = (ids[:, length - 3 :] + 7) % 50
    other = run(model, host, with_ids(inputs, ids))
    torch.testing.assert_close(other[:, : length - 3], whole[:, : length - 3], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("host", "case"), [pair for pair in PAIRS if pair[0] != "qwen2_5_vl"])
def test_padding_and_neighbors_change_nothing(host: str, case: str) -> None:
    model, _ = grafted(host, case)
    layouts = ("3I2", "I7I1")
    both = zoo.batch(host, *layouts, side="left")
    together = run(model, host, both | {"position_ids": true_positions(both)})
    image = 0
    for sample, layout in enumerate(layouts):
        ids = both["input_ids"][sample : sample + 1][:, both["attention_mask"][sample].bool()]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in both:
            alone["pixel_values"] = both["pixel_values"][image : image + layout.count("I")]
        image += layout.count("I")
        expected = run(model, host, alone)[0]
        torch.testing.assert_close(together[sample, -len(expected) :], expected, atol=5e-5, rtol=1e-4)


@every_pair
def test_generating_with_a_cache_equals_without(host: str, case: str) -> None:
    model, _ = grafted(host, case)
    inputs = zoo.batch(host, "3I2", "5", "I4")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with prompt_tokens(model, host, inputs):
        cached = model.generate(**inputs, **options, output_logits=True)
        plain = model.generate(**inputs, **options, output_logits=True, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


@every_case
def test_saved_and_loaded_it_is_the_same_to_the_bit(case: str, tmp_path: Path) -> None:
    host = "llava-qwen3"
    model, graft = grafted(host, case)
    inputs = zoo.batch(host, "3I2", "5")
    alula.save_adapter(model, tmp_path / "adapter")
    again = zoo.build(host)
    loaded = alula.load_adapter(again, tmp_path / "adapter")
    assert loaded.config == graft.config
    assert type(loaded) is type(graft)
    assert torch.equal(run(again, host, inputs), run(model, host, inputs))
    with pytest.raises(AdapterError, match="other weights"):
        alula.load_adapter(zoo.build(host, 5), tmp_path / "adapter")


@pytest.mark.parametrize("case", [case for case in CASES if case not in ON_REQUEST])
def test_parts_hold_every_parameter_once_and_all_are_trained(case: str) -> None:
    model, graft = grafted("llava-llama", case)
    grouped = [parameter for group in graft.parameters_by_part().values() for parameter in group]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in graft.parameters()}
    model.requires_grad_(False)
    for parameter in grouped:
        parameter.requires_grad_(True)
    inputs = zoo.batch("llava-llama", "3I2", "I4")
    model(**inputs).logits.square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().sum()) for parameter in grouped)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ON_REQUEST])
def test_a_copy_owns_its_weights(case: str) -> None:
    model, _ = grafted("llava-llama", case)
    inputs = zoo.batch("llava-llama", "3I2")
    before, twin = run(model, "llava-llama", inputs), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in alula.grafts_of(twin)[CASES[case].graft_type].parameters():
            parameter.zero_()
    assert torch.equal(run(model, "llava-llama", inputs), before)
    assert not torch.equal(run(twin, "llava-llama", inputs), before)


@every_case
def test_half_precision_stays_half(case: str) -> None:
    model = zoo.build("llava-llama").to(torch.bfloat16)
    wake(alula.attach(model, CASES[case]))
    inputs = zoo.batch("llava-llama", "3I2")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    logits = run(model, "llava-llama", inputs)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@every_case
def test_two_threads_get_what_one_gets(case: str) -> None:
    model, graft = grafted("llava-llama", case)
    batches = [zoo.batch("llava-llama", *layouts) for layouts in (("3I2",), ("I4", "6"))]
    alone = [model.generate(**inputs, max_new_tokens=6, do_sample=False) for inputs in batches]
    with graft.disabled():
        bare = model.generate(**batches[0], max_new_tokens=6, do_sample=False)

    def ask(turn: int) -> torch.Tensor:
        if turn % 3 == 2:
            with graft.disabled():
                return model.generate(**batches[0], max_new_tokens=6, do_sample=False)
        return model.generate(**batches[turn % 3], max_new_tokens=6, do_sample=False)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, range(9)))
    for turn, answer in enumerate(answers):
        assert torch.equal(answer, bare if turn % 3 == 2 else alone[turn % 3])
