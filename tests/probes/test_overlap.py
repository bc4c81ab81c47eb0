"""Overlap of Wanda masks against scores and sets taken weight by weight in float64, and the algebra of packed masks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import alula
from alula.errors import DataError, HostError, UsageError
from alula.probes import Overlap, WeightMask
from alula.seam import find
from alula.weights import keep_highest
from tests import zoo
from tests.probes.models import deep, singles

LAYOUTS = ("3I4I2", "2I5", "1I6", "7")


@pytest.fixture(scope="module")
def probe(model: Any, inputs: dict[str, Any]) -> Overlap:
    probe = Overlap(sparsity=0.4)
    with probe.on(model), torch.no_grad():
        model(**inputs)
    return probe


@pytest.fixture(scope="module")
def squares(model: Any, inputs: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """{stream: {matrix: (in,)}} sums of squared inputs over each stream's tokens but the first of a sample."""
    matrices = {
        f"layers.{i}.{name}": module
        for i, layer in enumerate(model.model.language_model.layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = {s: {n: np.zeros(m.in_features) for n, m in matrices.items()} for s in ("image", "text", "all")}
    for sample in singles(inputs):
        seen: dict[str, np.ndarray] = {}
        handles = [
            m.register_forward_pre_hook(lambda _, args, n=n, to=seen: to.__setitem__(n, args[0][0].numpy()))
            for n, m in matrices.items()
        ]
        with torch.no_grad():
            model(**sample)
        for handle in handles:
            handle.remove()
        for i, token in enumerate(sample["input_ids"][0].tolist()):
            for name, x in seen.items():
                if i:
                    found["image" if token == zoo.IMAGE else "text"][name] += x[i] ** 2
                    found["all"][name] += x[i] ** 2
    return found


def keep(weight: np.ndarray, squares: np.ndarray, sparsity: float) -> set[tuple[int, int]]:
    """Weights that survive token-wise pruning, one by one."""
    kept = set()
    for i, row in enumerate(weight):
        order = sorted(range(len(row)), key=lambda j: abs(row[j]) * np.sqrt(squares[j]))
        kept |= {(i, j) for j in order[int(len(row) * sparsity) :]}
    return kept


def test_overlap_equals_sets_of_weights(model: Any, probe: Overlap, squares: Any) -> None:
    result = probe.result()
    assert result.tokens == {"image": 16, "text": 26, "all": 42}
    assert set(result.pairs) == {"image-text", "image-all", "text-all"}
    for name in (
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.o_proj",
        "layers.0.mlp.up_proj",
        "layers.1.mlp.down_proj",
    ):
        weight = model.model.language_model.get_parameter(f"{name}.weight").detach().numpy()
        masks = {stream: keep(weight, sums[name], 0.4) for stream, sums in squares.items()}
        large = keep(weight, np.ones(weight.shape[1]), 0.4)
        for stream, mask in masks.items():
            assert {tuple(at) for at in probe.mask(stream).unpack(name).nonzero().tolist()} == mask
        for a, b in combinations(squares, 2):
            measured = result.pairs[f"{a}-{b}"].matrices[name]
            assert measured.iou == pytest.approx(len(masks[a] & masks[b]) / len(masks[a] | masks[b]))
            a_only, b_only = masks[a] - large, masks[b] - large
            either = len(a_only | b_only)
            assert measured.beyond_magnitude == pytest.approx(len(a_only & b_only) / either)
    layer = result.pairs["image-text"].layers[1]
    of_layer = [m.iou for n, m in result.pairs["image-text"].matrices.items() if n.startswith("layers.1.")]
    assert len(of_layer) == 7
    assert layer.iou == pytest.approx(np.mean(of_layer))


def test_chance_is_what_random_masks_reach(probe: Overlap) -> None:
    shapes = probe.mask("all").shapes
    random = [WeightMask.random(shapes, 0.4, seed=seed) for seed in range(6)]
    for name, measured in probe.result().pairs["image-text"].matrices.items():
        reached = np.mean([a.iou(b)[name] for a, b in combinations(random, 2)])
        assert measured.chance == pytest.approx(reached, abs=0.02)


def test_shared_magnitude_is_a_higher_bar_than_chance(probe: Overlap) -> None:
    layers = probe.result().pairs["image-text"].layers
    assert all(layer.chance < layer.shared_magnitude < 1 for layer in layers)
    assert all(layer.shared_magnitude - 0.05 < layer.iou for layer in layers)


def test_streams_that_use_weights_alike_reach_the_ceiling() -> None:
    torch.manual_seed(0)
    model = deep(layers=1, sliding=False)
    probe = Overlap(streams=("text", "all"))
    with probe.on(model), torch.no_grad():
        for seed in range(4):
            model(**zoo.batch("llava-qwen3", "30", "28", seed=seed))
    overlap = probe.result().pairs["text-all"].layers[0]
    assert overlap.iou == 1.0
    assert overlap.shared_magnitude < overlap.ceiling < 1.0


def test_streams_without_rows_are_left_out(model: Any) -> None:
    probe = Overlap()
    with probe.on(model), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    result = probe.result()
    assert result.tokens == {"image": 0, "text": 3, "all": 3}
    assert set(result.pairs) == {"text-all"}
    with pytest.raises(UsageError, match="no token of 'image'"):
        probe.mask("image")
    with pytest.raises(UsageError, match="was not measured"):
        probe.mask("audio")


def test_a_reread_probe_asks_for_its_model(probe: Overlap, model: Any, tmp_path: Any) -> None:
    again = Overlap.load(probe.save(tmp_path / "overlap.safetensors"))
    with pytest.raises(UsageError, match="no model"):
        again.result()
    assert again.result(model=model) == probe.result()


def test_grafts_and_adapters_are_looked_past(probe: Overlap, inputs: dict[str, Any]) -> None:
    model = deep(layers=3, sliding=False).double()
    alula.attach(model, alula.WingsConfig(rank=2))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(model, config)
    dressed = Overlap(sparsity=0.4)
    with dressed.on(wrapped), torch.no_grad():
        wrapped(**inputs)
    bare, again = probe.mask("image"), dressed.mask("image")
    assert again.shapes == bare.shapes
    assert all(np.array_equal(again.bits[name], bits) for name, bits in bare.bits.items())


@pytest.mark.parametrize("name", [name for name in zoo.TEXT if name not in ("gpt2", "qwen3_moe")])
def test_every_matrix_of_every_decoder_is_measured(name: str) -> None:
    model = zoo.build(name)
    probe = Overlap(streams=("all",), skip_first=False)
    with probe.on(model), torch.no_grad():
        model(**zoo.batch(name, "6", "3"))
    blocks = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    mask = probe.mask("all")
    assert sorted(mask.shapes.values()) == sorted((m.out_features, m.in_features) for m in blocks)
    assert probe.result().tokens == {"all": 9}


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return tuple({"a": torch.rand(5, 13) > 0.5, "b": torch.rand(3, 8) > 0.3} for _ in range(2))  # type: ignore[return-value]


def test_masks_are_sets(pair: Any) -> None:
    x, y = pair
    mask_x, mask_y = WeightMask.of(x), WeightMask.of(y)
    for name in x:
        for mask, expected in [
            (mask_x, x[name]),
            (mask_x & mask_y, x[name] & y[name]),
            (mask_x | mask_y, x[name] | y[name]),
            (mask_x - mask_y, x[name] & ~y[name]),
            (~mask_x, ~x[name]),
            (~~mask_x, x[name]),
        ]:
            assert torch.equal(mask.unpack(name), expected)
            assert mask.count(name) == int(expected.sum())
        iou = float((x[name] & y[name]).sum() / (x[name] | y[name]).sum())
        assert mask_x.iou(mask_y)[name] == pytest.approx(iou)
    assert mask_x.density == pytest.approx(float(sum(m.sum() for m in x.values())) / 89)
    assert np.isnan((mask_x - mask_x).iou(mask_x - mask_x)["a"])
    with pytest.raises(UsageError, match="different matrices"):
        mask_x & WeightMask.of({"a": x["a"]})


def test_masks_survive_a_file(pair: Any, tmp_path: Any) -> None:
    mask = WeightMask.of(pair[0])
    file = mask.save(tmp_path / "mask.safetensors")
    assert file.stat().st_size < 500
    assert mask.iou(WeightMask.load(file)) == {"a": 1.0, "b": 1.0}
    file.write_bytes(b"no")
    with pytest.raises(DataError, match="not a mask"):
        WeightMask.load(file)


def test_equal_scores_are_pruned_in_order() -> None:
    assert keep_highest(torch.tensor([[1.0, 1, 1, 1], [0, 2, 0, 1]]), 0.5).tolist() == [
        [False, False, True, True],
        [False, True, False, True],
    ]
    torch.manual_seed(0)
    scores = torch.randint(0, 6, (50, 20)).float()
    pruned = torch.sort(scores, dim=1, stable=True).indices[:, :7]
    for dtype in (torch.float32, torch.bfloat16):
        kept = keep_highest(scores.to(dtype), 0.35)
        assert torch.equal(kept, torch.ones_like(kept).scatter_(1, pruned, False))
    assert keep_highest(scores, 0.0).all()
    with pytest.raises(UsageError, match="sparsity"):
        keep_highest(torch.ones(2, 2), 1.0)


def test_random_masks_keep_the_same_number_in_every_row() -> None:
    mask = WeightMask.random({"a": (6, 10)}, 0.3)
    assert mask.unpack("a").sum(dim=1).tolist() == [7] * 6


@pytest.mark.parametrize("option", [{"streams": ("words",)}, {"sparsity": 1.0}, {"permutations": 0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Overlap(**option)


@pytest.mark.parametrize(("name", "told"), [("gpt2", "Conv1D"), ("qwen3_moe", "Experts")])
def test_matrices_that_are_no_linear_layers_are_refused_not_left_out(name: str, told: str) -> None:
    model = zoo.build(name)
    with pytest.raises(HostError, match=told), Overlap().on(model):
        pass
    assert find(model) is None
