"""What a universal host is made of: points in groups, experts and routers, experts grown from one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alula.hosts.universal import ProjectionShape, UniversalConnectors, shape_of
from alula.hosts.universal.points import farthest_points, grouped, neighbors
from alula.hosts.universal.projection import Router
from alula.hosts.universal.shapes import ROUTERS
from alula.hosts.universal.tokenizing import tokenizer_of

WIDTH, OUT = 16, 12


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def connectors(**options: Any) -> UniversalConnectors:
    shape = ProjectionShape(
        **{"experts": 3, "depth": 2, "heads": 2, "modality_tokens": 5, "feedforward": 24, **options}
    )
    made = UniversalConnectors(shape, {"image": shape_of("image"), "video": shape_of("video")}, WIDTH, OUT, first=False)
    made.initialise(1)
    return made


# -- points -----------------------------------------------------------------------------------------------------------


def naive_centers(places: np.ndarray, count: int) -> list[int]:
    """Farthest point sampling, written out point by point."""
    middle = places.mean(axis=0)
    chosen = [max(range(len(places)), key=lambda i: ((places[i] - middle) ** 2).sum())]
    while len(chosen) < count:
        nearest = [min(((p - places[c]) ** 2).sum() for c in chosen) for p in places]
        chosen.append(int(np.argmax(nearest)))
    return chosen


def test_centers_and_neighbors_are_those_of_a_loop() -> None:
    places = noise(2, 40, 3).double()
    centers = farthest_points(places, 7)
    for n in range(2):
        assert centers[n].tolist() == naive_centers(places[n].numpy(), 7)
    at = places.take_along_dim(centers[..., None], dim=1)
    found = neighbors(places, at, 5)
    for n in range(2):
        for g in range(7):
            distances = ((places[n] - at[n, g]) ** 2).sum(-1)
            assert set(found[n, g].tolist()) == set(distances.argsort()[:5].tolist())
            assert found[n, g, 0] == centers[n, g]


@torch.no_grad()
@torch.no_grad()
def test_half_precision_groups_as_full_precision_does() -> None:
    """Places on a line, nearer to each other than bfloat16 can tell."""
    tokenizer: Any = tokenizer_of(shape_of("points", {"points": 48, "groups": 6, "neighbors": 4}), WIDTH, first=False)
    torch.nn.init.zeros_(tokenizer.project.weight)[0, 3] = 1
    torch.nn.init.zeros_(tokenizer.project.bias)
    points = torch.zeros(1, 48, 6)
    points[0, :, 0] = 1 + torch.linspace(0, 1, 48) ** 2 / 400
    points[0, :, 3] = torch.linspace(0, 1, 48)
    full = tokenizer.tokens(points)
    half = tokenizer.bfloat16().tokens(points)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.01, rtol=0.01)


def test_geometry_groups_and_color_does_not() -> None:
    points = noise(1, 40, 6)
    recolored = torch.cat([points[..., :3], noise(1, 40, 3, seed=1)], dim=-1)
    assert torch.equal(grouped(points, 6, 4)[..., :3], grouped(recolored, 6, 4)[..., :3])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    tokenizer: Any = tokenizer_of(shape_of("points", {"points": 40, "groups": 6, "neighbors": 4}), WIDTH, first=False)
    torch.nn.init.normal_(tokenizer.positions)
    assert torch.equal(tokenizer(points, None), tokenizer(points[:, order], None))  # a cloud has no order
    assert not torch.equal(tokenizer(points, None), tokenizer(recolored, None))
    naive = torch.stack([(tokenizer.project(group)).amax(0) for group in grouped(points, 6, 4)[0]])
    torch.testing.assert_close(tokenizer.tokens(points)[0], naive)


def test_published_sizes() -> None:
    """Tokens and parameters of the methods page: 12 x 101, 391, 1024, 8; 102.8 million weights of an expert."""
    tokens = {name: shape_of(name).tokens for name in ("audio", "points", "motion", "response")}  # type: ignore[union-attr]
    assert tokens == {"audio": 12 * 101, "points": 1024, "motion": 391, "response": 8}
    with torch.device("meta"):
        made = UniversalConnectors(ProjectionShape(), {"image": shape_of("image")}, 1024, 4096, first=True)
    assert sum(parameter.numel() for parameter in made.experts[0].parameters()) == 8 * 12_847_104


# -- experts and routers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [kind for kind in ROUTERS if kind != "sparse"])
@torch.no_grad()
def test_equal_experts_give_the_single_expert(router: str) -> None:
    several, one = connectors(router=router), connectors(experts=1)
    for expert in several.experts:
        expert.load_state_dict(one.experts[0].state_dict())
    for medium in ("image", "video"):
        own = several.of(medium)
        own.load_state_dict({**own.state_dict(), **one.of(medium).state_dict()})
    features = {"image": noise(2, 9, WIDTH), "video": noise(1, 9, WIDTH, seed=1)}
    ours, theirs = several(features), one(features)
    for medium in features:
        torch.testing.assert_close(ours[medium], theirs[medium], atol=2e-6, rtol=1e-5)


def test_routers_weigh_as_published_and_as_in_the_paper() -> None:
    expected = {
        "soft_sigmoid": [0.4683, 0.2659, 0.2659],
        "softmax": [0.7870, 0.1065, 0.1065],
        "sparse": [0.7870, 0.0, 0.0],
    }
    for kind, weights in expected.items():
        router = Router(kind, WIDTH, 3)
        with torch.no_grad():
            router.logits.weight.zero_()
            router.logits.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
            found = router(noise(1, 2, WIDTH))
        torch.testing.assert_close(found, torch.tensor(weights).expand(1, 2, 3), atol=1e-4, rtol=0)


@torch.no_grad()
def test_experts_are_weighed_token_by_token() -> None:
    features = noise(2, 9, WIDTH)
    for kind in ROUTERS:
        made = connectors(router=kind)
        own = made.of("image")
        entered = own.entered(features)
        read = [expert(entered, 5) for expert in made.experts]
        assert (own.router is None) == (kind == "constant")
        weights = torch.full((2, 5, 3), 1 / 3) if own.router is None else own.router(entered[:, :5])
        if kind != "sparse":
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
        else:
            assert ((weights > 0).sum(-1) == 1).all()
        looped = torch.zeros(2, 5, WIDTH)
        for n in range(2):
            for q in range(5):
                for k in range(3):
                    looped[n, q] += weights[n, q, k] * read[k][n, q]
        torch.testing.assert_close(made({"image": features})["image"], own.handed_over(looped), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_block_is_computed_for_the_wanted_tokens_alone_and_is_the_same() -> None:
    made = connectors()
    tokens = noise(2, 12, WIDTH)
    for expert in made.experts:
        whole = tokens
        for block in expert:
            whole = block(whole)  # type: ignore[operator]
        torch.testing.assert_close(expert(tokens, 5), whole[:, :5], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_order_of_encoder_tokens_plays_no_part_and_that_of_modality_tokens_is_kept() -> None:
    made, features = connectors(), noise(1, 9, WIDTH)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    expected = made({"image": features})["image"]
    torch.testing.assert_close(made({"image": features[:, order]})["image"], expected, atol=2e-6, rtol=1e-5)
    own = made.of("image")
    own.tokens.copy_(own.tokens[torch.tensor([4, 0, 1, 2, 3])])
    moved = expected[:, torch.tensor([0, 5, 1, 2, 3, 4, 6])]
    torch.testing.assert_close(made({"image": features})["image"], moved, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_media_pass_the_experts_together_as_alone() -> None:
    made = connectors()
    features = {"image": noise(2, 9, WIDTH), "video": noise(3, 9, WIDTH, seed=1)}
    together = made(features)
    for medium, tokens in features.items():
        torch.testing.assert_close(together[medium], made({medium: tokens})[medium], atol=2e-6, rtol=1e-5)
