"""No token depends on later ones, its neighbors in the batch, or padding; images may stand anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import zoo
from tests.grafts.common import CONFIGS, covering, grafted, run, token_map, true_positions, with_ids

LAYOUTS = {
    "one": "3I4",
    "first": "I5",
    "last": "5I",
    "adjacent": "2II3",
    "apart": "2I3I2",
    "only": "I",
    "later turn": "9I2I1",
}


def _perturbed(host: str, inputs: dict[str, Any], cut: int, seed: int = 7) -> dict[str, Any]:
    """The inputs with every token after `cut` changed: other tokens, other pixels of images that start after it."""
    ids = inputs["input_ids"].clone()
    later = torch.arange(ids.shape[1]) > cut
    fixed = torch.isin(ids, torch.tensor([zoo.IMAGE, zoo.PAD, 57, 58]))
    fresh = torch.randint(0, 50, ids.shape, generator=torch.Generator().manual_seed(seed))
    changed = with_ids(inputs, torch.where(later & ~fixed, fresh, ids))
    if host in zoo.HOSTS and "pixel_values" in inputs:
        other = zoo.pixels(host, _images(inputs), seed)["pixel_values"]
        tokens = (ids == zoo.IMAGE).nonzero()[:, 1].view(-1, zoo.TOKENS_PER_IMAGE)
        starts_later = (tokens[:, 0] > cut).repeat_interleave(len(other) // len(tokens))
        shape = (-1,) + (1,) * (other.dim() - 1)
        changed["pixel_values"] = torch.where(starts_later.view(shape), other, inputs["pixel_values"])
    return changed


def _images(inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"] == zoo.IMAGE).sum()) // zoo.TOKENS_PER_IMAGE


@pytest.mark.parametrize("layout", ["2I3I2", "I5"])
@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS)))
def test_no_future_influence(host: str, config: str, layout: str) -> None:
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, layout)
    whole = run(model, host, inputs)
    length = inputs["input_ids"].shape[1]
    for cut in range(0, length - 1, 2):
        changed = run(model, host, _perturbed(host, inputs, cut))
        assert torch.equal(changed[:, : cut + 1], whole[:, : cut + 1]), f"token {cut} or before depends on a later one"
    assert not torch.allclose(changed[:, -1], whole[:, -1], atol=1e-4)


@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS), each=2))
def test_a_prefix_does_not_know_how_the_input_goes_on(host: str, config: str) -> None:
    """Longer inputs (with a further image) leave the logits of their beginning."""
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, "2I3I4")
    short = zoo.batch(host, "2I3")
    length = short["input_ids"].shape[1]
    if host in zoo.HOSTS:
        short["pixel_values"] = inputs["pixel_values"][: len(short["pixel_values"])]
    short["input_ids"] = inputs["input_ids"][:, :length]
    whole = run(model, host, inputs)[:, :length]
    torch.testing.assert_close(run(model, host, short), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("host", "config"), covering(zoo.ALL, list(CONFIGS)))
def test_batches_with_padding_equal_single_runs(host: str, config: str, side: str) -> None:
    """Image tokens, text tokens, padding on either side: every sample as if it were alone."""
    model, _ = grafted(host, config)
    layouts = ("3I4", "6", "I2I1", "2II")
    inputs = zoo.batch(host, *layouts, side=side)
    options = {} if host in ("qwen2_5_vl", "opt") else {"position_ids": true_positions(inputs)}
    together = run(model, host, inputs, **options)
    image = 0
    for sample, layout in enumerate(layouts):
        single = zoo.batch(host, layout, seed=sample)
        count = layout.count("I")
        if host in zoo.HOSTS and count:
            per = len(inputs["pixel_values"]) // _images(inputs)
            single["pixel_values"] = inputs["pixel_values"][image * per : (image + count) * per]
        image += count
        alone = run(model, host, single)[0]
        valid = inputs["attention_mask"][sample].bool()
        torch.testing.assert_close(together[sample][valid], alone, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("host", "config"), covering(("llava-llama", "llava-gemma3", "qwen2_5_vl", "gemma2"), ["mass", "paper"], 2)
)
def test_images_anywhere_are_heard(host: str, config: str, layout: str) -> None:
    """From its first token on each image changes what the model says, beyond what the host alone makes of it."""
    model, graft = grafted(host, config)
    inputs = zoo.batch(host, layout)
    seen = token_map(inputs).has_seen
    with graft.disabled():
        plain = run(model, host, inputs)
    difference = (run(model, host, inputs) - plain).abs().amax(dim=-1)
    assert (difference[seen] > 1e-4).all()
    assert torch.isfinite(difference).all()


def test_visual_learner_hears_each_image_from_its_place_on() -> None:
    """With the host's own attention cut off, what a token says depends on exactly the images at or before it."""
    model, _ = grafted("llava-llama", "visual")
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    inputs = zoo.batch("llava-llama", "2I2I2")
    whole = run(model, "llava-llama", inputs)
    pixels: Tensor = inputs["pixel_values"]
    for image, start in ((0, 2), (1, 8)):
        changed = {**inputs, "pixel_values": pixels.index_fill(0, torch.tensor([image]), 0.5)}
        difference = (run(model, "llava-llama", changed) - whole).abs().amax(dim=-1)[0]
        assert (difference[:start] == 0).all()
        assert (difference[start + zoo.TOKENS_PER_IMAGE :] > 1e-4).all()


def test_textual_learner_has_no_image_keys() -> None:
    model, _ = grafted("llava-llama", "textual")
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    inputs = zoo.batch("llava-llama", "2I2")
    whole = run(model, "llava-llama", inputs)
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    difference = (run(model, "llava-llama", changed) - whole).abs().amax(dim=-1)[0]
    assert (difference[[0, 1, 6, 7]] == 0).all()
    assert (difference[2:6] > 1e-4).all()


@pytest.mark.parametrize("host", ["llava-llama", "qwen2_5_vl"])
def test_a_batch_of_pads_only_beside_a_sample_is_finite(host: str) -> None:
    model, _ = grafted(host, "mass")
    inputs: dict[str, Any] = zoo.batch(host, "3I4", "1", side="left")
    assert torch.isfinite(run(model, host, inputs)[inputs["attention_mask"].bool()]).all()
