"""The frozen tower's stand-in: same features, bounded memory, and the very tower back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    ViTImageProcessorPil,
)

from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.fingerprints import fingerprint_tensor
from alula.hosts import CustomTower, load_host
from alula.training import train
from alula.training.feature_cache import (
    FeatureStore,
    frozen_audio_tower,
    frozen_tower,
    tower_fingerprint,
)
from tests import zoo
from tests.hosts.custom_towers import Net, Pooled
from tests.training.conftest import MakeRecipe, rows

LIMITED = {"sources": [{"microworld": "visual", "limit": 5}]}


@pytest.fixture
def host(host_directory: Path) -> Any:
    return load_host(host_directory).model


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Calls:
    """Counts the images a module is given."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.images += len(args[0])


def features(host: Any, pixels: Tensor) -> Tensor:
    return torch.stack(list(host.model.get_image_features(pixels).pooler_output))


@pytest.mark.parametrize("layer", [-2, 1, [-3, -1]])
def test_cached_features_are_the_towers_and_each_image_passes_once(host: Any, layer: Any) -> None:
    host.config.vision_feature_layer = layer
    if isinstance(layer, list):
        host.model.multi_modal_projector = nn.Identity()
    pixels = images(3)
    expected = features(host, pixels)
    calls = Calls(host.model.vision_tower)
    with frozen_tower(host, FeatureStore(2**20)) as stand_in, torch.no_grad():
        first = features(host, pixels[[0, 1, 0, 2]])
        second = features(host, pixels[[2, 1]])
        assert stand_in is not None
        assert stand_in.dtype == torch.float32  # asks the tower
    assert calls.images == 3
    torch.testing.assert_close(first, expected[[0, 1, 0, 2]], rtol=1e-5, atol=1e-6)
    assert torch.equal(second, first[[3, 1]])


def test_a_features_bits_do_not_depend_on_its_company(host: Any) -> None:
    pixels = images(6)
    with frozen_tower(host, FeatureStore(2**20)), torch.no_grad():
        together = features(host, pixels)
    for order in ([5, 1], [3], [0, 2, 4]):
        with frozen_tower(host, FeatureStore(2**20)), torch.no_grad():
            assert torch.equal(features(host, pixels[order]), together[order])


def test_the_same_tower_is_back_and_never_in_the_registry(host: Any) -> None:
    tower = host.model.vision_tower.train()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with frozen_tower(host, FeatureStore(2**20)):
        assert Anatomy.of(host).tower is not tower
        assert not any("vision_tower" in name for name, _ in host.named_parameters())
        host.train()
        features(host, images(1))
        assert not tower.training
    assert host.model.vision_tower is tower
    assert tower.training
    assert not tower._forward_hooks
    after = host.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(RuntimeError, match="in the middle"), frozen_tower(host):
        raise RuntimeError("in the middle")
    assert host.model.vision_tower is tower


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    store = FeatureStore(memory_bytes=4 * 100 * 2)
    item = {"layer.-2": torch.zeros(100)}
    for key in ("a", "b"):
        store.put(key, item)
    assert store.get("a") is not None
    store.put("c", item)
    assert store.held_bytes == 800
    assert [store.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]
    store.put("huge", {"layer.-2": torch.zeros(1000)})
    assert store.get("huge") is None
    assert store.held_bytes == 800


def test_disk_keeps_what_memory_drops_and_damage_is_computed_again(host: Any, tmp_path: Path) -> None:
    pixels = images(3)
    for budget in (2**20, 0):
        with frozen_tower(host, FeatureStore(budget, tmp_path)), torch.no_grad():
            first = features(host, pixels)
    calls = Calls(host.model.vision_tower)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"torn")
    with frozen_tower(host, FeatureStore(2**20, tmp_path)), torch.no_grad():
        assert torch.equal(features(host, pixels), first)
    assert calls.images == 1


def _other_image(file: Path) -> None:
    last = max(file.parent.parent.rglob("*.safetensors"))
    file.write_bytes(last.read_bytes())


def _flipped_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _saved_anew(change: Callable[[Tensor], Tensor], name: str | None = None) -> Callable[[Path], None]:
    """The file written anew, its label kept, with other tensors."""

    def write(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({name or key: change(value) for key, value in load_file(file).items()}, file, metadata=metadata)

    return write


TAMPERED = {
    "zeros": _saved_anew(torch.zeros_like),
    "another dtype": _saved_anew(lambda value: value.to(torch.bfloat16)),
    "another shape": _saved_anew(lambda value: value[:1].clone()),
    "another name": _saved_anew(lambda value: value, "layer.7"),
    "another image's": _other_image,
    "a flipped bit": _flipped_bit,
    "without a label": lambda file: save_file(load_file(file), file),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_features_on_disk_are_not_trusted(host: Any, tmp_path: Path, how: str, caplog: Any) -> None:
    pixels = images(3)
    with frozen_tower(host, FeatureStore(2**20, tmp_path)), torch.no_grad():
        first = features(host, pixels)
    for file in sorted(tmp_path.rglob("*.safetensors"))[:2]:
        TAMPERED[how](file)
    calls = Calls(host.model.vision_tower)
    with frozen_tower(host, FeatureStore(2**20, tmp_path)), torch.no_grad():
        assert torch.equal(features(host, pixels), first)
    assert calls.images == 2
    assert caplog.text.count("is not what was written for its image and tower") == 1
    caplog.clear()
    with frozen_tower(host, FeatureStore(2**20, tmp_path)), torch.no_grad():
        assert torch.equal(features(host, pixels), first), "and what was computed again is there"
    assert not caplog.text


def test_features_of_another_tower_are_not_taken(host: Any, tmp_path: Path) -> None:
    pixels = images(1)
    with frozen_tower(host, FeatureStore(2**20, tmp_path / "one")), torch.no_grad():
        features(host, pixels)
    (tmp_path / "one").rename(tmp_path / "two")
    calls = Calls(host.model.vision_tower)
    with frozen_tower(host, FeatureStore(2**20, tmp_path / "two")), torch.no_grad():
        features(host, pixels)
    assert calls.images == 1


def test_what_describes_the_text_does_not_keep_features_from_being_found(host: Any) -> None:
    store = FeatureStore(2**20)
    with frozen_tower(host, store) as stand_in, torch.no_grad():
        assert stand_in is not None
        for step in range(2):
            stand_in(images(2), output_hidden_states=True, mm_token_type_ids=torch.full((2, 4 + step), step))
    assert (store.hits, store.misses) == (2, 2)


def test_keywords_that_features_may_depend_on_are_refused_by_name(host: Any) -> None:
    with frozen_tower(host, FeatureStore(2**20)) as stand_in:
        assert stand_in is not None
        with pytest.raises(HostError, match=r"(?s)gives its tower image_sizes.*leave feature_cache out"):
            stand_in(images(2), image_sizes=torch.tensor([[32, 32], [32, 32]]))
        with pytest.raises(HostError, match="pixel values of 5 dimensions"):
            stand_in(images(2)[None])


def test_fingerprints_tell_content_shape_and_weights_apart(host: Any) -> None:
    one = torch.arange(4.0)
    assert fingerprint_tensor(one) == fingerprint_tensor(one.clone())
    others = [one.reshape(2, 2), one.to(torch.bfloat16), one + 1]
    assert len({fingerprint_tensor(tensor) for tensor in (one, *others)}) == 4
    tower = host.model.vision_tower
    before = tower_fingerprint(tower)
    next(tower.parameters()).data.add_(1e-3)
    assert tower_fingerprint(tower) != before


def test_towers_of_equal_weights_that_do_different_things_share_no_directory() -> None:
    squares = ViTImageProcessorPil(size={"height": 32, "width": 32})
    torch.manual_seed(0)
    net, pooled = Net().eval(), Pooled().eval()
    pooled.load_state_dict(net.state_dict())
    one, same, other = (tower_fingerprint(CustomTower.of(module, squares)) for module in (net, net, pooled))
    assert one == same
    assert one != other


def test_a_host_whose_projector_is_in_its_tower_cannot_be_cached() -> None:
    model = zoo.build("qwen2_5_vl")
    with pytest.raises(HostError, match="keeps its projector inside the tower"), frozen_tower(model, FeatureStore(1)):
        pass


def test_ears_of_stock_hosts_stay_in_their_place() -> None:
    ears = Qwen2AudioEncoderConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8
    )
    text = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=ears, text_config=text))
    tower = Anatomy.of(model).audio_tower
    with frozen_audio_tower(model) as stand_in:
        assert stand_in is None
        assert Anatomy.of(model).audio_tower is tower is not None


@pytest.mark.parametrize("method", ["projector", "wings"])
def test_a_cached_run_is_the_uncached_run(recipe: MakeRecipe, method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": method,
        "train": {"wings": 1e-2, "projector": 1e-2} if method == "wings" else {"projector": 1e-2},
        "data": LIMITED,
        "steps": 5,
    }
    plain = train(recipe(**options), quiet=True)
    run = {"output_dir": f"{plain.directory}-cached"}
    cache = {"memory_mb": 1, "disk": str(tmp_path / "features")}
    cached = train(recipe(run=run, feature_cache=cache, **options), quiet=True)
    for left, right in zip(rows(plain.directory), rows(cached.directory), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 5  # twenty samples, five images


def test_what_the_host_reads_and_in_what_precision_is_part_of_the_name(host: Any, tmp_path: Path) -> None:
    pixels = images(2)
    host.config.vision_feature_layer = -2
    with frozen_tower(host, FeatureStore(2**20, tmp_path)), torch.autocast("cpu", torch.bfloat16):
        rounded = features(host, pixels)
    with frozen_tower(host, FeatureStore(2**20, tmp_path)):
        exact = features(host, pixels)
    assert torch.equal(exact, features(host, pixels))
    assert not torch.equal(exact, rounded)
    host.config.vision_feature_layer = -1
    with frozen_tower(host, FeatureStore(2**20, tmp_path)):
        last = features(host, pixels)
    assert torch.equal(last, features(host, pixels))
