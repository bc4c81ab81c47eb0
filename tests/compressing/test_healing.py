"""The healing recipe on a pruned tiny host: zeros stay zeros beside an adapter, and are gone in one that is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import alula
from alula.anatomy import Anatomy
from alula.compress import WeightMask, WeightPruning, apply_mask, prune
from alula.errors import UsageError
from alula.hosts import save_host
from alula.training import load_recipe, train
from tests.hosts import tiny

RECIPE = Path(__file__).parents[2] / "recipes" / "heal.yaml"
WINGS = ("stages.heal.method=wings", "stages.heal.train={wings: 2.0e-3}")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WeightMask]:
    path = tmp_path_factory.mktemp("healing") / "pruned"
    host = alula.build_host(tiny.decoder("llama", seed=1), tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer())
    mask = prune(host.model, WeightPruning(method="magnitude", sparsity=0.5))
    save_host(host, path)
    return path, mask


def zeros(model: torch.nn.Module, mask: WeightMask) -> float:
    """The share of the weights that were pruned that are zero."""
    layers = Anatomy.of(model).layers
    kept = []
    for name in mask.shapes:
        _, index, path = name.split(".", 2)
        linear = layers[int(index)].get_submodule(path)
        weight = getattr(linear, "base_layer", linear).weight
        kept.append((weight[~mask.unpack(name)] == 0).double().mean())
    return float(torch.stack(kept).mean())


@pytest.mark.parametrize("changes", [(), WINGS], ids=["lora", "wings"])
def test_zeros_stay_zeros_until_merged(
    pruned: tuple[Path, WeightMask], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    path, mask = pruned
    before = alula.load_model(path).model.state_dict()
    quick = [f"host.path={path}", f"output_dir={tmp_path}", "stages.heal.steps=2", "stages.heal.batch_size=2"]
    result = train(load_recipe(RECIPE, [*changes, *quick]), quiet=True)
    model = alula.load_model(result.final).model
    assert zeros(model, mask) == 1
    assert len(model.state_dict()) > len(before)
    if changes:
        return
    moved = any(bool(value.any()) for name, value in model.state_dict().items() if "lora_B" in name)
    assert moved
    merged = model.merge_and_unload()
    assert zeros(merged, mask) < 0.01
    with pytest.raises(UsageError, match="other weights"):
        apply_mask(merged, mask)
    apply_mask(merged, mask, check_model=False)
    assert zeros(merged, mask) == 1
