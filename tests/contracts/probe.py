"""What every probe promises: it changes nothing, merges exactly, keeps what it saw, and forgets nothing it should
keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alula.errors import DataError, UsageError
from alula.probes import (
    Alignment,
    AttentionShift,
    Geometry,
    Overlap,
    Probe,
    VocabularyLens,
    load_probe,
    probe_names,
    watch,
)
from alula.seam import find
from tests import zoo
from tests.probes.models import LAYOUTS, batch, deep, double, singles

PROBES: dict[str, Any] = {
    "attention": AttentionShift,
    "attention per head": lambda: AttentionShift(heads="each"),
    "alignment": lambda: Alignment(sites=("stream", "mlp")),
    "alignment of tokens": lambda: Alignment(tokens="each"),
    "geometry": lambda: Geometry(sites=("stream", "attention"), offsets=(1, 2), sink_factor=1.5),
    "lens": lambda: VocabularyLens(tokens_per_kind=4, top=3),
    "overlap": Overlap,
    "geometry of tokens": lambda: Geometry(of="tokens", change="all_pairs"),
}


def test_every_registered_probe_has_a_case() -> None:
    assert {make().name for make in PROBES.values()} == set(probe_names())


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every number of a result's dict, by its path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{i}").items()}
    return {path: value}


DRAWN = ("/low", "/high", "/nulls/", "/projections/", "/examples/")
"""Numbers that depend on random draws over the kept samples, whose order follows the last bits of what was measured."""


def assert_same(a: Probe, b: Probe, *, drawn: bool = True, tolerance: float = 1e-9) -> None:
    one, other = (
        {key: value for key, value in leaves(probe.result().to_dict()).items() if drawn or not _is_drawn(key)}
        for probe in (a, b)
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = pytest.approx(other[key], rel=1e-9, abs=tolerance) if isinstance(value, float) else other[key]
        assert value == same, key


def _is_drawn(key: str) -> bool:
    return any(part in key for part in DRAWN)


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_host_is_untouched(name: str) -> None:
    model = zoo.build(name)
    config = model.config.get_text_config(decoder=True)
    inputs = batch(name, *LAYOUTS, side="right")
    plain = {k: v for k, v in inputs.items() if k != "token_map"}
    with torch.no_grad():
        before = model(**plain).logits  # the first forward of some towers installs hooks of transformers' own
        hooks, names = hooks_of(model), [n for n, _ in model.named_modules()]
        implementation = config._attn_implementation
        probes = [make() for make in PROBES.values()]
        with watch(model, probes):
            during = model(**inputs).logits
        after = model(**plain).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert find(model) is None
    assert (hooks_of(model), [n for n, _ in model.named_modules()]) == (hooks, names)
    assert config._attn_implementation == implementation
    for probe in probes:
        json.dumps(probe.result().to_dict(), allow_nan=False)


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_half_precision_hosts_are_measured(make: Any) -> None:
    full, half = make(), make()
    inputs = zoo.batch("llava-qwen3", *LAYOUTS)
    with torch.no_grad():
        with full.on(model := deep(sliding=False)):
            model(**inputs)
        with half.on(model := deep(sliding=False).bfloat16()):
            model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})
    one, other = leaves(full.result().to_dict()), leaves(half.result().to_dict())
    first = [key for key in one if key.endswith("/0/value") and "change" not in key and "knn" not in key]
    assert all(other[key] == pytest.approx(one[key], rel=0.1, abs=0.06) for key in first)


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_merged_parts_equal_the_whole(make: Any, tmp_path: Any) -> None:
    model = deep()
    batches = [zoo.batch("llava-qwen3", *LAYOUTS, seed=seed) for seed in range(3)]
    whole, parts = make(), [make() for _ in batches]
    with torch.no_grad(), whole.on(model):
        for inputs, part in zip(batches, parts, strict=True):
            with part.on(model):
                model(**inputs)
    reread = load_probe(parts[2].save(tmp_path / "part.safetensors"))
    assert type(reread) is type(parts[2])
    assert_same(parts[0].merge(reread).merge(parts[1]), whole)


def gather_in_process(rank: int, store: str, names: list[str]) -> None:
    """One of two processes: measure its own batch with every probe, gather, and leave the results in a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = deep(layers=2)
    probes = [PROBES[name]() for name in names]
    with torch.no_grad(), watch(model, probes):
        model(**zoo.batch("llava-qwen3", *LAYOUTS, seed=rank))
    for name, probe in zip(names, probes, strict=True):
        probe.gather().save(f"{store}-{name}-{rank}")
    torch.distributed.destroy_process_group()


def test_processes_gather_the_whole(tmp_path: Any) -> None:
    names, store = ["attention", "alignment", "geometry", "overlap"], str(tmp_path / "store")
    torch.multiprocessing.start_processes(gather_in_process, (store, names), nprocs=2, start_method="fork")
    model, wholes = deep(layers=2), [PROBES[name]() for name in names]
    with torch.no_grad(), watch(model, wholes):
        for seed in range(2):
            model(**zoo.batch("llava-qwen3", *LAYOUTS, seed=seed))
    for name, whole in zip(names, wholes, strict=True):
        for rank in range(2):
            gathered = type(whole).load(f"{store}-{name}-{rank}")
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(gathered.state_dict()[key], value, equal_nan=True)


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_padding_and_batching_change_nothing(make: Any) -> None:
    model = deep().double()
    together, alone = make(), make()
    inputs = double(zoo.batch("llava-qwen3", *LAYOUTS))
    with torch.no_grad():
        with together.on(model):
            model(**inputs)
        with alone.on(model):
            for sample in singles(inputs):
                model(**sample)
    assert_same(together, alone, drawn=False, tolerance=1e-5)


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_large_batches_are_measured_as_small_ones(make: Any) -> None:
    """What is held during a forward, to be computed together, has bounds: a large batch takes several goes."""
    model = deep(layers=4).double()
    together, apart = make(), make()
    inputs = double(zoo.batch("llava-qwen3", *(f"{3 + i % 4}I{60 + i % 3}" for i in range(24))))
    with torch.no_grad():
        with together.on(model):
            model(**inputs)
        with apart.on(model):
            for start in range(0, 24, 6):
                model(**{name: value[start : start + 6] for name, value in inputs.items()})
    assert_same(together, apart, drawn=False, tolerance=1e-5)


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_memory_does_not_grow_with_samples(make: Any) -> None:
    model, sizes = deep(layers=2), []
    probe = make()
    probe.keep = 5
    with torch.no_grad(), probe.on(model):
        for seed in range(8):
            model(**zoo.batch("llava-qwen3", "3I4I2", "2I5", "I4", seed=seed))
            sizes.append(sum(value.numel() for value in probe.state_dict().values()))
    assert len(set(sizes[2:])) == 1


@pytest.mark.parametrize("make", PROBES.values(), ids=PROBES)
def test_decoding_steps_are_not_samples(make: Any) -> None:
    model, prompt = deep(), zoo.batch("llava-qwen3", "3I4", "2I5")
    generating, once = make(), make()
    with generating.on(model):
        model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with once.on(model), torch.no_grad():
        model(**prompt)
    assert generating.continued_forwards == 3
    result, expected = generating.result().to_dict(), once.result().to_dict()
    assert result | {"continued_forwards": 0} == expected


def test_training_forwards_are_counted_once() -> None:
    model = deep().train()
    model.gradient_checkpointing_enable()
    probe = AttentionShift()
    with probe.on(model):
        output = model(**zoo.batch("llava-qwen3", "3I4", "2I5"))
        output.logits.sum().backward()
    assert probe.result().samples == 2


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, probe = deep(), AttentionShift()
    good = zoo.batch("llava-qwen3", "3I4")

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with torch.no_grad(), probe.on(model):
        handle = model.model.language_model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(**good)
        handle.remove()
        model(**good)
    assert probe.result().samples == 1


def test_nothing_measured_is_said() -> None:
    with pytest.raises(UsageError, match="no sample"):
        AttentionShift().result()


def test_only_like_merges_with_like(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="cannot take in"):
        AttentionShift().merge(AttentionShift(queries="after"))
    (tmp_path / "x").write_text("no")
    with pytest.raises(DataError, match="not a readable"):
        AttentionShift.load(tmp_path / "x")


def test_one_probe_once_per_model() -> None:
    model, probe = deep(layers=2), AttentionShift()
    with probe.on(model), pytest.raises(UsageError, match="already"), probe.on(model):
        pass


def test_settings_under_their_earlier_names_are_read(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    probe, model = Geometry(of="tokens"), deep(layers=2)
    with torch.no_grad(), probe.on(model):
        model(**zoo.batch("llava-qwen3", *LAYOUTS))
    file = probe.save(tmp_path / "probe.safetensors")
    settings = {**probe.settings, "of": "rows", "change": "same_row"}
    save_file(load_file(file), file, {"probe": "geometry", "settings": json.dumps(settings)})
    assert load_probe(file).settings == probe.settings
    assert "of=rows as tokens" in caplog.text
