"""Probes where plain hooks take image tokens out of later layers: right for those that are left, or refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alula import policies
from alula.errors import SeamError, UsageError
from alula.probes import Alignment, AttentionShift, Geometry, Overlap, VocabularyLens
from alula.weights import linears
from tests import zoo
from tests.compress.common import LAYOUTS, samples
from tests.seam.test_view import FIRST, HOST, LAYERS, Withdraw, batch, deep

ALL_IMAGES, HALF = "all images", "half of the image"


def left_of(ids: Tensor, which: str) -> Tensor:
    """(B, S) bool: what stays in the later layers; of half an image the first and third token."""
    image = ids == zoo.IMAGE
    if which == ALL_IMAGES:
        return ~image
    return ~image | (image & (image.cumsum(dim=1) % 2 == 1))


def withdrawn(which: str, *, probe_first: bool, probe: Any) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The host after `probe` has measured a batch, that batch, and per layer the (B, M) tokens in it."""
    inputs, model = batch(), deep()
    ids = inputs["input_ids"]
    left = left_of(ids, which)
    if not probe_first:
        withdrawal = Withdraw(model, ids, left)
    with torch.no_grad(), probe.on(model):
        if probe_first:
            withdrawal = Withdraw(model, ids, left)
        model(**inputs)
    every = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return model, inputs, [every if layer < FIRST else withdrawal.keep for layer in range(LAYERS)]


def inputs_of(model: Any, modules: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hidden states that modules are given, by name, taken with plain hooks behind those that withdraw."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach().double()

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def stream(model: Any, inputs: dict[str, Tensor], places: list[Tensor]) -> list[list[dict[int, np.ndarray]]]:
    """By state and sample, the stream's tokens by their place in the prompt."""
    language = model.model.language_model
    modules = {str(i): layer for i, layer in enumerate(language.layers)} | {str(LAYERS): language.norm}
    seen = inputs_of(model, modules, inputs)
    found = []
    for state in range(LAYERS + 1):
        index = places[min(state, LAYERS - 1)]
        found.append(
            [
                {int(place): hidden.numpy() for place, hidden in zip(here, tokens, strict=True)}
                for here, tokens in zip(index, seen[str(state)], strict=True)
            ]
        )
    return found


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize("which", [ALL_IMAGES, HALF])
def test_overlap_counts_the_tokens_that_are_left(which: str, *, probe_first: bool) -> None:
    probe = Overlap(skip_first=False)
    model, inputs, places = withdrawn(which, probe_first=probe_first, probe=probe)
    ids = inputs["input_ids"]
    modules = {
        f"layers.{i}.{name}": matrix
        for i, layer in enumerate(model.model.language_model.layers)
        for name, matrix in linears(layer)
    }
    seen = inputs_of(model, modules, inputs)
    for name, x in seen.items():
        index = places[int(name.split(".")[1])]
        of_image = ids.gather(1, index) == zoo.IMAGE
        for stream_index, chosen in enumerate((of_image, ~of_image, torch.ones_like(of_image))):
            expected = x[chosen].square().sum(dim=0)
            measured = probe.tally.sums[f"squares/{name}"].sum(dim=0)[stream_index]
            torch.testing.assert_close(measured, expected, atol=1e-6, rtol=1e-5)
    result = probe.result()
    gone = which == ALL_IMAGES
    for pair in ("image-text", "image-all"):
        layers = result.pairs[pair].layers
        assert [bool(np.isnan(layer.iou)) for layer in layers] == [gone and i >= FIRST for i in range(LAYERS)]
    assert not any(np.isnan(layer.iou) for layer in result.pairs["text-all"].layers)
    if gone:
        with pytest.raises(UsageError, match=r"no token of 'image' was measured in layers\.2"):
            probe.mask("image")
    assert probe.mask("text").density == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("make", [lambda: Overlap(skip_first=False), lambda: AttentionShift(queries="all")])
def test_under_a_policy_what_fills_up_a_sample_does_not_count(make: Any) -> None:
    """A batch with padding on the right is its samples one by one."""
    model, ragged = deep(), zoo.batch(HOST, *LAYOUTS, side="right")
    tallies = []
    for batches in ([ragged], samples(HOST)):
        probe = make()
        with torch.no_grad(), policies.Withdraw(layer=FIRST).on(model), probe.on(model):
            for inputs in batches:
                model(**inputs)
        tallies.append(probe.tally.sums)
    for name, sums in tallies[0].items():
        torch.testing.assert_close(sums, tallies[1][name], atol=1e-4, rtol=1e-4)


def test_alignment_takes_the_mean_of_the_tokens_that_are_left() -> None:
    probe = Alignment()
    model, inputs, places = withdrawn(HALF, probe_first=False, probe=probe)
    states = stream(model, inputs, places)
    for side, is_image in (("x", True), ("y", False)):
        expected = []
        for state in states:
            total = np.zeros(model.config.text_config.hidden_size)
            for sample, tokens in enumerate(state):
                row = inputs["input_ids"][sample]
                start = int((row == zoo.IMAGE).nonzero()[0])
                of_kind = [h for place, h in tokens.items() if (row[place] == zoo.IMAGE) == is_image and place >= start]
                total += unit(np.mean(of_kind, axis=0))
            expected.append(total)
        np.testing.assert_allclose(probe.tally.sums[f"{side}/image-text/stream"].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("change", ["same_token", "all_pairs"])
def test_geometry_follows_the_tokens_that_are_left(change: Any) -> None:
    probe = Geometry(change=change, sink_factor=1e6)
    model, inputs, places = withdrawn(HALF, probe_first=False, probe=probe)
    states, image = stream(model, inputs, places), inputs["input_ids"] == zoo.IMAGE
    measured = probe.result().sites["stream"].kinds["image"]
    changes, norms = [], []
    for state in range(LAYERS + 1):
        norms.append(
            np.mean(
                [
                    np.mean([np.linalg.norm(h) for place, h in tokens.items() if image[sample, place]])
                    for sample, tokens in enumerate(states[state])
                ]
            )
        )
    # of either sample: the first and third image token stand in all layers
    always = [[int(p) for p in row.nonzero()[:, 0]][::2] for row in image]
    for one, other in itertools.pairwise(states):
        if change == "same_token":
            both = [
                [unit(a[p]) @ unit(b[p]) for p in a if p in b and image[sample, p]]
                for sample, (a, b) in enumerate(zip(one, other, strict=True))
            ]
            changes.append(np.mean([np.mean(values) for values in both]))
        else:
            mean = [
                [np.mean([unit(state[s][always[s][k]]) for s in range(len(state))], axis=0) for k in range(2)]
                for state in (one, other)
            ]
            changes.append(np.mean([a @ b for a, b in zip(*mean, strict=True)]))
    np.testing.assert_allclose([estimate.value for estimate in measured.change[1]], changes, atol=1e-5)
    np.testing.assert_allclose([estimate.value for estimate in measured.norms["mean"]], norms, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "which", "told"),
    [
        (Alignment, ALL_IMAGES, "no image tokens left in decoder layer 2"),
        (Geometry, ALL_IMAGES, "no image tokens left in decoder layer 2"),
        (VocabularyLens, HALF, "that are read are not left in decoder layer 2"),
    ],
)
def test_what_cannot_be_measured_any_more_is_refused(make: Any, which: str, told: str) -> None:
    inputs, model = batch(), deep()
    Withdraw(model, inputs["input_ids"], left_of(inputs["input_ids"], which))
    with torch.no_grad(), make().on(model), pytest.raises(SeamError, match=told):
        model(**inputs)


def test_taking_tokens_out_behind_a_probe_of_block_inputs_is_refused() -> None:
    """It sees layer 2 entered by all tokens, layer 3 by some, and nothing in between."""
    with pytest.raises(SeamError, match="do not say which"):
        withdrawn(HALF, probe_first=True, probe=Alignment())


def test_the_lens_reads_layers_that_still_have_the_tokens() -> None:
    whole, lens = VocabularyLens(states=(0, 1)), VocabularyLens(states=(0, 1))
    _, inputs, _ = withdrawn(ALL_IMAGES, probe_first=False, probe=lens)
    model = deep()
    with torch.no_grad(), whole.on(model):
        model(**inputs)
    assert whole.result().to_dict() == lens.result().to_dict()
