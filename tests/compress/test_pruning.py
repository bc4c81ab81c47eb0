"""Pruning of weights against loops over weights in float64, its invariances, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from alula.compress import WeightMask, WeightPruning, apply_mask, find_mask, prune
from alula.errors import DataError, HostError, UsageError
from alula.policies import Policy, Prune, Skip, Withdraw
from alula.seam import find
from tests import zoo
from tests.compress.common import captured, chosen, decoder_of, doubled, layouts, linears, same, samples, state

HALF = WeightPruning(sparsity=0.5)


def batch(name: str, side: str = "left") -> dict[str, Tensor]:
    return zoo.batch(name, *layouts(name), side=side)


def naive_wanda(model: Any, inputs: list[dict[str, Tensor]], tokens: str, sparsity: float) -> dict[str, Tensor]:
    """Prune a copy block by block, weight by weight."""
    model, kept = copy.deepcopy(model), {}
    for index, matrices in linears(decoder_of(model)).items():
        squares: dict[str, Tensor] = {path: torch.zeros(m.in_features).double() for path, m in matrices.items()}
        for sample in inputs:
            counts = chosen(sample, tokens)
            for path, x in captured(model, matrices, sample).items():
                for token, count in zip(x, counts, strict=True):
                    squares[path] += token.double() ** 2 * count
        for path, matrix in matrices.items():
            mask = torch.ones_like(matrix.weight, dtype=torch.bool)
            for row, weights in enumerate(matrix.weight.detach().double()):
                scores = [abs(float(w)) * float(s) ** 0.5 for w, s in zip(weights, squares[path], strict=True)]
                order = sorted(range(len(scores)), key=scores.__getitem__)
                mask[row, order[: int(len(scores) * sparsity)]] = False
            matrix.weight.data[~mask] = 0
            kept[f"layers.{index}.{path}"] = mask
    return kept


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llava-llama", "all"), ("llava-llama", "image"), ("qwen2_5_vl", "text"), ("gemma2", "all"), ("opt", "all")],
)
def test_wanda_is_what_loops_find(name: str, tokens: str) -> None:
    model, inputs = zoo.build(name).double(), [doubled(sample) for sample in samples(name)]
    expected = naive_wanda(model, inputs, tokens, 0.4)
    # gemma2 in float64 gives padding in front no numbers, and then none to anybody
    padded = doubled(batch(name, "right" if name == "gemma2" else "left"))
    mask = prune(model, WeightPruning(sparsity=0.4, tokens=tokens), [padded])
    assert set(mask.shapes) == set(expected)
    for name_of, kept in expected.items():
        assert torch.equal(mask.unpack(name_of), kept), name_of
    for index, matrices in linears(decoder_of(model)).items():
        for path, matrix in matrices.items():
            assert torch.equal(matrix.weight != 0, expected[f"layers.{index}.{path}"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_batches_padding_and_order_do_not_count(method: Any) -> None:
    name = "llava-qwen3"
    model, settings = zoo.build(name).double(), WeightPruning(method=method, sparsity=0.5)
    one_by_one = [doubled(sample) for sample in samples(name)]
    masks = [
        find_mask(model, settings, given)
        for given in (
            [doubled(batch(name, "left"))],
            [doubled(batch(name, "right"))],
            one_by_one,
            one_by_one[::-1],
        )
    ]
    assert [(masks[0] ^ mask).density for mask in masks[1:]] == [0, 0, 0]


@pytest.mark.parametrize(
    "policy",
    [
        Withdraw(layer=1),
        Prune(stages=((1, 0.5),), criterion="max_min_diversity"),  # type: ignore[arg-type]
        Skip(part="mlp", layers=(1,)),
        Skip(part="block", layers=(1,), keys="own"),
    ],
)
def test_under_a_policy_the_tokens_that_are_there_count(policy: Policy) -> None:
    """Not those that fill up a sample which has fewer: they are image tokens, where padding stands on the right."""
    name = "llava-qwen3"
    model = zoo.build(name).double()
    ragged, alone = [doubled(batch(name, "right"))], [doubled(sample) for sample in samples(name)]
    with policy.on(model):
        masks = [find_mask(model, HALF, given) for given in (ragged, alone)]
        if not isinstance(policy, Prune):
            with pytest.raises(UsageError, match=r"layers\.1\..* is given no token of 'image'"):
                find_mask(model, WeightPruning(sparsity=0.5, tokens="image"), alone)
    assert (masks[0] ^ masks[1]).density == 0


def test_what_padding_holds_does_not_count() -> None:
    """Not a number in the embeddings of padding is nobody's input."""
    model, inputs = zoo.build("llama"), zoo.batch("llama", "9", "5", side="right")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    clean = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    broken = {**clean, "inputs_embeds": embeds.masked_fill(inputs["attention_mask"][..., None] == 0, 1e4)}
    assert (find_mask(model, HALF, [clean]) ^ find_mask(model, HALF, [broken])).density == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Scores are those of the weights and inputs as they are, computed in float32."""
    name = "llava-llama"
    model = zoo.build(name).to(dtype)
    expected = naive_wanda(model, [{**s, **_to(s, dtype)} for s in samples(name)], "all", 0.5)
    mask = prune(model, HALF, samples(name))
    total = sum(each.numel() for each in expected.values())
    differing = sum(int((mask.unpack(n) != each).sum()) for n, each in expected.items())
    assert differing / total < 0.002
    assert next(model.parameters()).dtype == dtype


def _to(sample: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in sample.items() if value.is_floating_point()}


def naive_second_order(w: Tensor, x: Tensor, sparsity: float, block: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column, with the inverse of what is left of the Hessian taken anew each time."""
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    w, kept = w.clone(), torch.ones_like(w, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    for j in range(w.shape[1]):
        if j % block == 0:
            end = min(j + block, w.shape[1])
            losses = torch.stack([w[:, c] ** 2 / inverses[c][0, 0] for c in range(j, end)], dim=1)
            order = losses.flatten().argsort()[: int(losses.numel() * sparsity)]
            kept[:, j:end] = torch.ones(losses.numel(), dtype=torch.bool).index_fill(0, order, False).view_as(losses)
        error = torch.where(kept[:, j], 0, w[:, j])
        w[:, j:] -= torch.outer(error / inverses[j][0, 0], inverses[j][0])
    return w * kept, kept


@pytest.mark.parametrize("block", [5, 64])
def test_second_order_is_optimal_brain_surgery(block: int) -> None:
    model, inputs = zoo.build("llama").double(), samples("llama")
    layer = linears(decoder_of(model))[0]
    before = {path: matrix.weight.detach().clone() for path, matrix in layer.items()}
    given = [captured(model, layer, sample) for sample in inputs]
    settings = WeightPruning(method="sparsegpt", sparsity=0.4, layers=(0,), block=block)
    mask = prune(model, settings, inputs)
    for path, matrix in layer.items():
        expected, kept = naive_second_order(before[path], torch.cat([each[path] for each in given]), 0.4, block)
        assert torch.equal(mask.unpack(f"layers.0.{path}"), kept)
        torch.testing.assert_close(matrix.weight.detach(), expected, atol=1e-8, rtol=1e-8)


def test_second_order_drops_channels_that_no_token_uses() -> None:
    """And the mask says so."""
    model = zoo.build("llama")
    layer = linears(decoder_of(model))[0]
    with torch.no_grad():
        layer["mlp.up_proj"].weight[:40] = 0  # of 48
    settings = WeightPruning(method="sparsegpt", sparsity=0.3, layers=(0,), targets=("down_proj",))
    mask = prune(model, settings, samples("llama"))
    assert torch.equal(layer["mlp.down_proj"].weight != 0, mask.unpack("layers.0.mlp.down_proj"))
    assert mask.sparsity == pytest.approx(40 / 48)


@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_second_order_loses_less_than_wanda(path: str) -> None:
    """Of what a matrix gives for the calibration tokens, at the same sparsity."""
    inputs, losses = [zoo.batch("llama", "40", seed=seed) for seed in range(6)], {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = zoo.build("llama")
        matrix = linears(decoder_of(model))[0][path]
        x = torch.cat([captured(model, {path: matrix}, sample)[path] for sample in inputs])
        before = matrix.weight.detach().clone()
        settings: Any = {"method": method, "sparsity": 0.5, "layers": (0,), "targets": (path,)}
        prune(model, WeightPruning(**settings), None if method == "magnitude" else inputs)
        losses[method] = float((x @ (matrix.weight.detach() - before).T).norm())
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns(method: Any, pattern: Any, kept: int, group: int) -> None:
    model = zoo.build("llama")
    settings = WeightPruning(method=method, pattern=pattern)
    mask = prune(model, settings, None if method == "magnitude" else samples("llama"))
    for index, matrices in linears(decoder_of(model)).items():
        for path, matrix in matrices.items():
            assert (matrix.weight.view(-1, group) != 0).sum(dim=1).tolist() == [kept] * (matrix.weight.numel() // group)
            assert torch.equal(matrix.weight != 0, mask.unpack(f"layers.{index}.{path}"))


def test_magnitude_of_whole_matrices() -> None:
    model = zoo.build("llama")
    weight = linears(decoder_of(model))[1]["mlp.up_proj"].weight.detach().clone()
    mask = prune(model, WeightPruning(method="magnitude", sparsity=0.3))
    order = weight.abs().flatten().argsort()[: int(weight.numel() * 0.3)]
    expected = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, order, False).view_as(weight)
    assert torch.equal(mask.unpack("layers.1.mlp.up_proj"), expected)


def test_targets_and_layers() -> None:
    model, before = zoo.build("llava-llama"), state(zoo.build("llava-llama"))
    mask = prune(
        model, WeightPruning(sparsity=0.5, targets=("down_proj", "attention"), layers=(-1,)), samples("llava-llama")
    )
    paths = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    assert set(mask.shapes) == {f"layers.1.{path}" for path in paths}
    changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert changed == {f"model.language_model.layers.1.{path}.weight" for path in paths}
    assert mask.made["settings"]["targets"] == ["down_proj", "attention"]
    assert mask.made["data"]["samples"] == 4
    assert mask.made["data"]["tokens"] == sum(int(each["attention_mask"].sum()) for each in samples("llava-llama"))


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_finding_a_mask_changes_nothing(method: Any) -> None:
    model = zoo.build("llava-llama")
    model.train()
    before, modes = state(model), [module.training for module in model.modules()]
    mask = find_mask(
        model, WeightPruning(method=method, sparsity=0.5), None if method == "magnitude" else samples("llava-llama")
    )
    assert same(before, state(model))
    assert find(model) is None
    assert [module.training for module in model.modules()] == modes
    pruned = copy.deepcopy(model)
    apply_mask(pruned, mask)
    for index, matrices in linears(decoder_of(pruned)).items():
        for path, matrix in matrices.items():
            assert torch.equal(matrix.weight != 0, mask.unpack(f"layers.{index}.{path}"))


def test_like_another_mask() -> None:
    """Exactly as many weights of each matrix, and as evenly over its outputs as can be."""
    model, inputs = zoo.build("llama"), samples("llama")
    one = find_mask(model, HALF, inputs[:2])
    both = one & find_mask(model, HALF, inputs[2:])
    pooled = find_mask(model, WeightPruning(), inputs, like=both)
    for name in both.shapes:
        assert pooled.count(name) == both.count(name)
        rows = pooled.unpack(name).sum(dim=1)
        assert int(rows.max() - rows.min()) <= 1
    assert pooled.sparsity == both.sparsity > 0.5


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and not function.is_view and "_" not in function._schema.name[-1:]:
                storage = each.untyped_storage()
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return output

    @property
    def now(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


@pytest.mark.parametrize(
    ("method", "of_layer"),
    [
        ("wanda", 8 * (3 * 32 + 48)),  # q, k and v share theirs, gate and up too
        ("sparsegpt", 4 * (3 * 32**2 + 48**2)),
    ],
)
def test_memory_is_that_of_one_layer(method: Any, of_layer: int) -> None:
    """Above the model there are the sums of one layer, and what belongs to one batch or one matrix."""
    between: list[int] = []

    class Watched:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for sample in inputs:
                yield sample
                between.append(live.now)

    inputs, peaks = samples("llama")[:2], {}
    for layers in (2, 4):
        model = zoo.build("llama", layers=layers)
        with Live() as live:
            prune(model, WeightPruning(method=method, sparsity=0.1), Watched())  # type: ignore[arg-type]
        peaks[layers] = live.peak
    assert max(between) <= of_layer + 512  # and which tokens were chosen last
    assert max(between) >= of_layer  # all of it was counted
    assert peaks[4] == peaks[2]  # not more where there are more layers


def test_second_order_works_in_the_memory_of_its_sums() -> None:
    """Where sums are what is large (here those of one matrix, 256 x 256), nothing is as large beside them."""
    config = zoo.build("llama").config
    config.intermediate_size = 256
    model, inputs = LlamaForCausalLM(config), [zoo.batch("llama", "6", seed=seed) for seed in range(2)]
    settings = WeightPruning(method="sparsegpt", sparsity=0.5, targets=("down_proj",), layers=(0,), block=16)
    with Live() as live:
        prune(model, settings, inputs)
    of_matrix = 4 * 256**2
    assert of_matrix < live.peak < 1.5 * of_matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_pruned_some_rows_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many makes no difference."""
    model = zoo.build("llama").to(dtype)
    whole = find_mask(model, HALF, samples("llama"))
    before = state(model)
    for module in ("pruning", "originals"):
        monkeypatch.setattr(f"alula.compress.{module}._PIECE", 100)
    assert (find_mask(model, HALF, samples("llama")) ^ whole).density == 0
    assert same(before, state(model))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_model_as_it_was() -> None:
    """Numbers that are not finite turn up in the last layer alone, when others have been pruned."""
    model, inputs = zoo.build("llama", layers=4), samples("llama")
    with torch.no_grad():
        decoder_of(model).layers[3].input_layernorm.weight[5] = float("nan")
    before = state(model)
    with pytest.raises(DataError, match=r"batch 0 gives layers\.3\.self_attn\.q_proj numbers that are not finite"):
        prune(model, HALF, inputs)
    after = state(model)
    assert all(torch.equal(value.nan_to_num(9), after[key].nan_to_num(9)) for key, value in before.items())
    assert find(model) is None


def test_numbers_that_are_not_finite() -> None:
    model, inputs = zoo.build("llava-llama"), samples("llava-llama")
    inputs[2]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 2 gives"):
        find_mask(model, HALF, inputs)
    with torch.no_grad():
        decoder_of(model).layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.up_proj has weights that are not finite"):
        prune(model, WeightPruning(method="magnitude", sparsity=0.5))


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"sparsity": 0.01}, "given", "prunes nothing of"),
        ({}, "given", "nothing says how much"),
        ({"sparsity": 0.5}, None, "needs calibration data"),
        ({"method": "magnitude", "sparsity": 0.5}, "given", "looks at no data"),
        ({"sparsity": 0.5}, [], "no calibration data"),
        ({"sparsity": 0.5}, iter([{}]), "only once"),
        ({"sparsity": 0.5, "tokens": "image"}, "given", "has a token of 'image'"),
        ({"sparsity": 0.5, "targets": ("fc1",)}, "given", "names no linear module"),
        ({"sparsity": 0.5, "layers": (2,)}, "given", "layer 2 does not exist"),
    ],
)
def test_calls_that_mean_nothing(settings: Any, batches: Any, message: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(UsageError, match=message):
        prune(model, WeightPruning(**settings), samples("llama") if batches == "given" else batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one"),
        ({"pattern": "2:4", "per": "matrix"}, "per has no effect"),
        ({"sparsity": 0.5, "block": 4}, "SparseGPT alone"),
        ({"method": "magnitude", "sparsity": 0.5, "tokens": "text"}, "no tokens"),
        ({"sparsity": 0.5, "tokens": "words"}, "cannot be 'words'"),
        ({"sparsity": 0.5, "targets": ()}, "targets"),
    ],
)
def test_settings_without_effect(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightPruning(**settings)


def test_data_that_change_between_passes() -> None:
    class Shuffled:
        drawn = 0

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            self.drawn += 1
            return iter([zoo.batch("llama", "6", seed=self.drawn)])

    with pytest.raises(DataError, match="changed from one pass to the next"):
        prune(zoo.build("llama"), HALF, Shuffled())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch 0 is a list"):
        prune(zoo.build("llama"), HALF, [[1, 2]])  # type: ignore[list-item]


def test_matrices_that_cannot_be_pruned() -> None:
    with pytest.raises(HostError, match=r"layers\.0\.mlp\.experts is a .*Experts"):
        prune(zoo.build("qwen3_moe"), HALF, samples("qwen3_moe"))
    kept = prune(zoo.build("qwen3_moe"), WeightPruning(sparsity=0.5, targets=("attention",)), samples("qwen3_moe"))
    assert all(".self_attn." in name for name in kept.shapes)
    with pytest.raises(HostError, match="Conv1D"):
        prune(zoo.build("gpt2"), HALF, samples("gpt2"))

    shared = zoo.build("llama")
    layers = decoder_of(shared).layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(HostError, match="is the same tensor as"):
        prune(shared, HALF, samples("llama"))

    adapted = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HostError, match=r"layers\.0\.self_attn\.q_proj is inside an adapter"):
        prune(adapted, HALF, samples("llama"))

    class Linear8bit(nn.Linear):
        """As quantizers make them."""

    quantized = zoo.build("llama")
    decoder_of(quantized).layers[1].mlp.up_proj.__class__ = Linear8bit
    with pytest.raises(HostError, match=r"layers\.1\.mlp\.up_proj is a Linear8bit"):
        prune(quantized, HALF, samples("llama"))

    config = zoo.build("llama").config
    config.intermediate_size = 44
    with pytest.raises(UsageError, match="a pattern of 4:8 does not divide"):
        prune(LlamaForCausalLM(config), WeightPruning(pattern="4:8"), samples("llama"))


def test_masks_of_another_model() -> None:
    model, mask = zoo.build("llama"), find_mask(zoo.build("llama"), HALF, samples("llama"))
    before = state(model)
    with pytest.raises(UsageError, match="made on a model with other weights"):
        apply_mask(zoo.build("llama", seed=1), mask)
    apply_mask(zoo.build("llama", seed=1), mask, check_model=False)
    with pytest.raises(UsageError, match=r"has no layers\.2\."):
        apply_mask(model, find_mask(zoo.build("llama", layers=4), HALF, samples("llama")), check_model=False)
    with pytest.raises(UsageError, match="names no linear module"):
        apply_mask(zoo.build("opt"), mask, check_model=False)
    with pytest.raises(UsageError, match="is 64 x 32, here it is 32 x 32"):
        apply_mask(model, find_mask(zoo.build("qwen3"), HALF, samples("llama")), check_model=False)
    with pytest.raises(UsageError, match=r"has no mlp\.up_proj"):
        apply_mask(model, WeightMask.random({"mlp.up_proj": (48, 32)}, 0.5))
    with pytest.raises(UsageError, match="of other matrices than are pruned"):
        find_mask(model, WeightPruning(layers=(0,)), samples("llama"), like=mask)
    assert same(before, state(model))
