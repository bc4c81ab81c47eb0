"""Criteria against naive loops in double precision, and under the form that bars keys by masks, over the zoo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alula import TokenMap
from alula.anatomy import Anatomy
from alula.errors import HostError, SeamError, UsageError
from alula.policies import Budget, Policy, Prune
from alula.policies.criteria.base import to_knee
from alula.seam import dialect, taps
from alula.seam.dialect import cache_of_output
from alula.seam.lanes import LeanLayer
from tests import zoo
from tests.grafts.common import run
from tests.policies.oracle import Left, masked
from tests.policies.test_withdraw import HOSTS, LAYERS, close

LAYOUTS = ("3III2", "5", "I4I2")
BEHIND_WORDS = ("3III2", "5", "1I4I2")
"""where an image in front looks at nothing but itself: tokens of one embedding are one and the same there"""


class Seen(NamedTuple):
    """What a criterion may go by in one sample: the stream in front of the layer, and where tokens stand.

    Attributes:
        stream: (S, d) in double precision.
        normed: the same behind the decoder's last norm.
        keys: (G, S, D) of the layer before; none in front of the first.
        queries, unrotated: (H, S, D), (G, S, D) of the layer before, as they are projected.
        last: place of the last valid token.
        there: places of the image tokens left, by image.
        text: places of text behind the first image.
    """

    stream: np.ndarray
    normed: np.ndarray
    keys: np.ndarray
    queries: np.ndarray
    unrotated: np.ndarray
    last: int
    there: list[list[int]]
    text: list[int]


Naive = Callable[[Seen, list[int]], list[int]]
"""given what is seen and how many of every image are wanted, the places that stay"""


def grid(seen: Seen, wanted: list[int]) -> list[int]:
    kept = []
    for image, count in zip(seen.there, wanted, strict=True):
        kept += [image[middle] for middle in sorted(set(middles(len(image), count)))]
    return kept


def middles(tokens: int, count: int) -> list[int]:
    """The token in the middle of the part that each is in, by trying every part for every token."""
    side = math.isqrt(tokens)
    rows, columns = (side, side) if side * side == tokens else (1, tokens)
    bands = min(max(round((count * rows / columns) ** 0.5), -(-count // columns), 1), rows, count)
    found = []
    for token in range(tokens):
        row, column = divmod(token, columns)
        band = next(b for b in reversed(range(bands)) if row * bands >= b * rows)
        of_band = [r for r in range(rows) if r * bands >= band * rows and r * bands < (band + 1) * rows]
        cells = (band + 1) * count // bands - band * count // bands
        cell = next(c for c in reversed(range(cells)) if column * cells >= c * columns)
        of_cell = [c for c in range(columns) if c * cells >= cell * columns and c * cells < (cell + 1) * columns]
        found.append(of_band[(len(of_band) - 1) // 2] * columns + of_cell[(len(of_cell) - 1) // 2])
    return found


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def max_min_diversity(seen: Seen, wanted: list[int]) -> list[int]:
    every = [place for image in seen.there for place in image]
    kept: list[int] = []
    for _ in range(total(wanted)):
        against = kept or every
        nearest = [
            -np.inf
            if place in kept
            else min(1 - cosine(seen.stream[place], seen.stream[other]) for other in against if other != place)
            for place in every
        ]
        kept.append(every[int(np.argmax(nearest))])
    return kept


def conditional_dpp(seen: Seen, wanted: list[int]) -> list[int]:
    """The determinant of what stays, computed anew for every token that could be added."""
    every = [place for image in seen.there for place in image]
    unlike = [-np.mean([cosine(seen.stream[place], seen.stream[word]) for word in seen.text]) for place in every]
    weight = [(each - min(unlike) + 1e-6) / (max(unlike) - min(unlike)) for each in unlike]
    kernel = np.array(
        [[w * v * cosine(seen.stream[a], seen.stream[b]) for b, v in zip(every, weight, strict=True)]
         for a, w in zip(every, weight, strict=True)]
    )  # fmt: skip
    kept: list[int] = []
    for _ in range(total(wanted)):
        volumes = [
            -np.inf if i in kept else np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])]) for i in range(len(every))
        ]
        kept.append(int(np.argmax(volumes)))
    return [every[i] for i in kept]


def duplicates(seen: Seen, wanted: list[int]) -> list[int]:
    every = [place for image in seen.there for place in image]
    norms = np.abs(seen.keys).sum(axis=(0, 2))
    pivots = sorted(every, key=lambda place: -norms[place])[: min(4, total(wanted))]
    kept = list(pivots)
    pivots += sorted(seen.text, key=lambda place: -norms[place])[:4]
    rest, number = total(wanted) - len(kept), len(pivots)
    for i, pivot in enumerate(pivots):
        left = [place for place in every if place not in kept]
        left.sort(key=lambda place: cosine(seen.normed[pivot], seen.normed[place]))
        kept += left[: rest // number + (i < rest % number)]
    return kept


def rope_free_attention(seen: Seen, wanted: list[int]) -> list[int]:
    """Queries and keys as the projections give them; of each of two by two tokens, the first is uniform."""
    kept, heads = [], seen.queries.shape[0] // seen.unrotated.shape[0]
    last = seen.last
    for image, count in zip(seen.there, wanted, strict=True):
        scores = np.zeros(len(image))
        for head, query in enumerate(seen.queries):
            logits = np.array([query[last] @ seen.unrotated[head // heads][place] for place in image])
            exponents = np.exp(logits * seen.queries.shape[2] ** -0.5)
            scores += exponents / exponents.sum() / len(seen.queries)
        side = math.isqrt(len(image))
        for token in range(len(image)):
            row, column = divmod(token, side)
            scores[token] += (row % 3 == 0 and column % 3 == 0) if side**2 == len(image) else token % 9 == 0
        kept += [image[token] for token in np.argsort(-scores, kind="stable")[:count]]
    return kept


def total(wanted: list[int]) -> int:
    """Half of all, as it is rounded."""
    return max(1, int(sum(wanted)))


NAIVE: dict[str, Naive] = {
    "grid": grid,
    "pooling": grid,
    "max_min_diversity": max_min_diversity,
    "conditional_dpp": conditional_dpp,
    "duplicates": duplicates,
    "rope_free_attention": rope_free_attention,
}
FIRST = dict.fromkeys(("max_min_diversity", "conditional_dpp", "duplicates"), 1) | {"rope_free_attention": 2}
"""in front of which layer"""
LOOKING = [host for host in HOSTS if host not in zoo.TEXT or host in ("opt", "gpt2")]
"""hosts in which the tokens of an image differ: other text decoders are given the same for all of them"""
PROJECTED = ["llama", "qwen2", "gpt_neox", "phi3", "llava-llama", "llava-mistral", "qwen2_5_vl"]
"""hosts whose queries and keys are what a projection gives, rotated; a text decoder with a window would have nothing to
tell tokens of one embedding by in it"""
WHERE = dict.fromkeys(("grid", "pooling"), HOSTS) | {"rope_free_attention": PROJECTED}
PAIRS = [(host, each) for each in NAIVE for host in WHERE.get(each, LOOKING)]


def images(model: Any, host: str, ids: Tensor) -> list[list[int]]:
    """Places of every image of a sample, as the host's tokens are told apart: text decoders know runs only."""
    found: list[list[int]] = []
    for place in (ids == zoo.IMAGE).nonzero()[:, 0].tolist():
        starts = not found or found[-1][-1] != place - 1
        if starts or (host not in zoo.TEXT and len(found[-1]) == zoo.TOKENS_PER_IMAGE):
            found.append([])
        found[-1].append(place)
    return found


_compared: dict[int, tuple[Tensor, Tensor]] = {}


def _spy(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    _compared[module.layer_idx] = query, key  # type: ignore[index]
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


AttentionInterface.register("spy", _spy)
AttentionMaskInterface.register("spy", sdpa_mask)


@contextmanager
def spied() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Inside, under the attention implementation "spy", queries and keys are noted by layer."""
    _compared.clear()
    yield _compared


@contextmanager
def projected(model: Any, layer: int | None) -> Iterator[list[Tensor]]:
    """Inside, what a layer projects to (B, H, S, D) queries and (B, G, S, D) keys is noted."""
    anatomy, found = Anatomy.of(model), [torch.zeros(8, 1, 1, 1)] * 2
    handles = []

    def note(at: int, output: Tensor, heads: int) -> None:
        found[at] = output.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

    if layer is not None and layer >= 0:
        attention: Any = anatomy.attention(layer)
        heads, of_keys = anatomy.num_heads, anatomy.num_kv_heads

        def split(module: nn.Module, args: Any, output: Tensor) -> None:
            if hasattr(attention, "query_key_value"):  # head by head
                query, key, _ = output.unflatten(-1, (heads, 3, -1)).unbind(dim=-2)
                query, key = query.flatten(-2), key.flatten(-2)
            else:
                width = anatomy.head_dim
                query, key, _ = output.split([heads * width, of_keys * width, of_keys * width], dim=-1)
            note(0, query, heads)
            note(1, key, of_keys)

        whole = getattr(attention, "query_key_value", None) or getattr(attention, "qkv_proj", None)
        if whole is not None:
            handles.append(whole.register_forward_hook(split))
        else:
            handles.append(attention.q_proj.register_forward_hook(lambda m, a, out: note(0, out, heads)))
            handles.append(attention.k_proj.register_forward_hook(lambda m, a, out: note(1, out, of_keys)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """Inside, what a decoder layer is given is noted."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(dialect.hidden_of(args, kwargs, where="here").detach())

    handle = Anatomy.of(model).layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def edited(model: Any, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a decoder layer is given something else."""

    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return dialect.with_hidden(args, kwargs, edit(dialect.hidden_of(args, kwargs, where="here")))

    handle = Anatomy.of(model).layers[layer].register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def pooled(there: list[list[list[int]]], counts: list[list[int]]) -> Callable[[Tensor], Tensor]:
    """Every image of every sample as the means of its parts, in the tokens in their middle."""

    def edit(hidden: Tensor) -> Tensor:
        new = hidden.clone()
        for sample, (of_sample, wanted) in enumerate(zip(there, counts, strict=True)):
            for image, count in zip(of_sample, wanted, strict=True):
                into = middles(len(image), count)
                for middle in set(into):
                    part = [image[token] for token, where in enumerate(into) if where == middle]
                    new[sample, image[middle]] = hidden[sample, part].double().mean(dim=0).to(hidden)
        return new

    return edit


def kept_by(model: Any, host: str, inputs: dict[str, Tensor], criterion: str, stages: Any) -> tuple[Left, list[Any]]:
    """What a naive loop leaves by layer, and what it merges there."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    kept: dict[int, Tensor] = {}
    edits: list[Any] = []

    def left(layer: int, now: Tensor) -> Tensor:
        stays = torch.ones_like(now, dtype=torch.bool)
        for first, of_stage in kept.items():
            if layer >= first:
                stays = stays & of_stage
        return stays

    there = [images(model, host, sample) for sample in ids]
    sizes = [[len(image) for image in of_sample] for of_sample in there]
    anatomy, implementation = Anatomy.of(model), model.config.get_text_config(decoder=True)._attn_implementation
    for layer, share in stages:
        with ExitStack() as stack:
            if layer:  # Gemma-2 caps its logits, which the spy does not
                zoo.set_attention(model, "spy")
                stack.callback(zoo.set_attention, model, implementation)
            stack.enter_context(masked(model, left))
            for at, edit in edits:
                stack.enter_context(edited(model, at, edit))
            seen = stack.enter_context(watched(model, layer))
            with spied() as compared, projected(model, layer - 1 if host in PROJECTED else None) as projections:
                run(model, host, inputs, use_cache=False)
        _, keys = compared.get(layer - 1, (None, torch.zeros(len(ids), 1, ids.shape[1], 1)))
        norm = anatomy.final_norm or nn.Identity()
        wanted = [[max(1, int(share * size + 0.5)) for size in of_sample] for of_sample in sizes]
        if criterion == "pooling":
            edits.append((layer, pooled(list(there), wanted)))
        stays = ids != zoo.IMAGE
        for sample in range(len(ids)):
            text = [place for place in range(ids.shape[1]) if valid[sample, place] and ids[sample, place] != zoo.IMAGE]
            first = there[sample][0][0] if there[sample] else 0
            stream = seen[-1][sample]
            of = Seen(
                stream.double().numpy(),
                norm(stream).detach().double().numpy(),
                keys[sample].double().numpy(),
                *(each[sample].double().numpy() for each in projections),
                int(valid[sample].nonzero().max()),
                there[sample],
                [place for place in text if place > first],
            )
            if not there[sample]:
                continue
            places = NAIVE[criterion](of, wanted[sample])
            stays[sample, places] = True
            there[sample] = [[place for place in image if place in places] for image in there[sample]]
        kept[layer] = stays
    return left, edits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("host", "criterion"), PAIRS)
def test_prefill_equals_the_masked_oracle_of_a_naive_loop(host: str, criterion: str, side: str) -> None:
    layouts = LAYOUTS if host in LOOKING else BEHIND_WORDS
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *layouts, side=side)
    first = FIRST.get(criterion, 0)
    stages = [(first, 0.5)]
    left, edits = kept_by(model, host, inputs, criterion, stages)
    with ExitStack() as stack:
        stack.enter_context(masked(model, left))
        for at, edit in edits:
            stack.enter_context(edited(model, at, edit))
        expected = run(model, host, inputs, use_cache=False)
    with Prune(stages=stages, criterion=criterion).on(model):
        ours = run(model, host, inputs)
    stays = inputs["attention_mask"].bool() & left(LAYERS - 1, inputs["input_ids"])
    close(ours[stays], expected[stays])
    assert int((~left(first, inputs["input_ids"])).sum()) == int((inputs["input_ids"] == zoo.IMAGE).sum()) // 2


def merged(seen: Seen, wanted: int, merge: str) -> tuple[list[int], dict[int, np.ndarray]]:
    """Who stays by diversity, and what becomes of them that others join."""
    every = [place for image in seen.there for place in image]
    over = int(10 / 64 * 2 * wanted + 0.5) if merge == "contextual" else 0
    kept = max_min_diversity(seen, [wanted - over])
    targets = kept
    if merge == "contextual":
        rest = [place for place in every if place not in kept]
        targets = rest[:: len(rest) // over][:over] if over else []
    joins: dict[int, list[int]] = {target: [] for target in targets}
    for place in every:
        if place not in kept and place not in targets and targets:
            joins[max(sorted(targets), key=lambda t: cosine(seen.stream[t], seen.stream[place]))].append(place)
    new = {}
    for target, others in joins.items():
        rows = seen.stream[others]
        if merge == "nearest":
            new[target] = np.mean([seen.stream[target], *rows], axis=0)
        elif others:
            new[target] = seen.stream[target] + rows.mean(axis=0)
    return [*kept, *targets], new


@pytest.mark.parametrize("merge", ["nearest", "contextual"])
@pytest.mark.parametrize("host", LOOKING)
def test_what_leaves_is_merged_as_by_a_naive_loop(host: str, merge: str) -> None:
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    with watched(model, 1) as given:
        run(model, host, inputs, use_cache=False)
    stays, changed = ids != zoo.IMAGE, given[0].clone()
    for sample in range(len(ids)):
        there, stream = images(model, host, ids[sample]), given[0][sample].double().numpy()
        if there:
            of = Seen(stream, stream, stream, stream, stream, 0, there, [])
            kept, new = merged(of, sum(map(len, there)) // 2, merge)
            stays[sample, kept] = True
            for place, row in new.items():
                changed[sample, place] = torch.from_numpy(row).to(changed)
    assert not torch.equal(changed, given[0])
    whole = torch.ones_like(stays)
    with masked(model, lambda layer, now: stays if layer else whole), edited(model, 1, lambda hidden: changed):
        expected = run(model, host, inputs, use_cache=False)
    settings = {"name": "contextual", "share": 20 / 64} if merge == "contextual" else merge
    policy = Prune.model_validate({"stages": ((1, 0.5),), "criterion": "max_min_diversity", "merge": settings})
    with policy.on(model):
        ours = run(model, host, inputs)
    close(ours[stays & valid], expected[stays & valid])


def knee(scores: list[float]) -> list[int]:
    """The indices above the knee, point by point."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    high, low = scores[order[0]], scores[order[-1]]
    if high == low:
        return list(range(len(scores)))
    below = [1 - j / (len(order) - 1) - (scores[i] - low) / (high - low) for j, i in enumerate(order)]
    deepest = max(range(len(order)), key=lambda j: below[j])
    return sorted(order[: deepest + 1] if below[deepest] > 1e-5 else order)


def test_the_knee_of_a_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    tail = torch.cat([torch.linspace(1, 0.2, 9), torch.linspace(0.19, 0, 56)])[torch.randperm(65, generator=generator)]
    many = torch.rand(65, generator=generator) ** 4
    rows = torch.stack(
        [tail, 3 * tail - 7, many, torch.ones(65), 1 - torch.arange(65) / 64, 1 - (torch.arange(65) / 64) ** 3]
    )
    real = torch.ones_like(rows, dtype=torch.bool)
    stays = to_knee(rows, real)
    assert stays.sum(dim=1).tolist()[:2] == [9, 9]
    assert torch.equal(stays[0], tail >= 0.2 - 1e-6)
    assert bool(stays[3:].all())  # flat, straight, and nowhere below its chord: no long tail
    for row, kept in zip(rows.double(), stays, strict=True):
        assert kept.nonzero()[:, 0].tolist() == knee(row.tolist())
    some = torch.arange(65) < torch.tensor([[65], [40], [1], [7], [2], [30]])
    for row, there, kept in zip(rows.double(), some, to_knee(rows, some), strict=True):
        assert kept.nonzero()[:, 0].tolist() == knee(row[there].tolist())


@pytest.mark.parametrize("host", ["llava-llama", "llava-mistral", "llava-gemma3", "qwen2_5_vl"])
def test_knees_in_stages_by_two_criteria(host: str) -> None:
    """The instruction's attention read of eager weights; random scores, which have no tail, first."""
    model, inputs = zoo.build(host, layers=LAYERS), zoo.batch(host, *LAYOUTS)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    kept: dict[int, Tensor] = {}

    def left(layer: int, now: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(ids, dtype=torch.bool), *(kept[at] for at in kept if layer >= at)]).all(
            dim=0
        )

    zoo.set_attention(model, "eager")
    for layer, last in ((1, True), (3, False)):
        with masked(model, left), torch.no_grad():
            weights = model(**inputs, use_cache=False, output_attentions=True).attentions[layer - 1]
        stays = ids != zoo.IMAGE
        for sample in range(len(ids)):
            there = images(model, host, ids[sample])
            text = [
                p
                for p in range(ids.shape[1])
                if valid[sample, p] and there and p > there[0][0] and ids[sample, p] != zoo.IMAGE
            ]
            for image in there:
                image = [place for place in image if left(layer - 1, ids)[sample, place]]
                asks = [int(valid[sample].nonzero().max())] if last else text
                scores = weights[sample][:, asks][..., image].double().mean(dim=(0, 1))
                stays[sample, [image[i] for i in knee(scores.tolist())]] = True
        kept[layer] = stays
    zoo.set_attention(model, implementation)
    with masked(model, left):
        expected = run(model, host, inputs, use_cache=False)
    policy = Prune.model_validate(
        {
            "stages": ((1, "knee"), (3, "knee")),
            "criterion": ("last_query_attention", "instruction_attention"),
            "per": "image",
        }
    )
    with policy.on(model):
        ours = run(model, host, inputs)
    stays = valid & left(LAYERS - 1, ids)
    assert int(stays.sum()) < int((valid & left(1, ids)).sum()) < int(valid.sum())
    close(ours[stays], expected[stays])


def prompt(*sizes: int, width: int = 32, seed: int = 0) -> tuple[Tensor, TokenMap]:
    """Embeddings of one prompt with images of so many tokens, text around each, and its map."""
    kinds = [0] * 3
    for size in sizes:
        kinds += [1] * size + [0] * 2
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, len(kinds), width, generator=generator)
    return embeds, TokenMap.from_modalities(torch.tensor([kinds]))


@torch.no_grad()
def left_by(policy: Policy, model: Any, embeds: Tensor, tokens: TokenMap, layer: int = -1) -> list[list[int]]:
    """Of every image, which of its tokens stand in a layer, from what its cache holds."""
    with policy.on(model):
        output = model(inputs_embeds=embeds, token_map=tokens, use_cache=True)
    cache: Any = cache_of_output(output)
    of_layer = cache.layers[range(model.config.num_hidden_layers)[layer]]
    places = of_layer.slots.places[0] if isinstance(of_layer, LeanLayer) else range(tokens.shape[1])
    items = tokens.item[0]
    return [
        [int(place) - int((items == item).nonzero()[0]) for place in places if items[place] == item]
        for item in range(int(items.max()) + 1)
    ]


@pytest.mark.parametrize("side", [2, 3, 5, 24])
def test_pooling_by_a_whole_factor_is_average_pooling(side: int) -> None:
    model = zoo.build("llama")
    embeds, tokens = prompt((2 * side) ** 2, width=32)
    policy, seen = Budget(image_tokens=side**2), []
    with policy.on(model), taps(model, ["block_input"], seen.append):
        model(inputs_embeds=embeds, token_map=tokens)
    image = embeds[0, 3:-2].T.view(1, 32, 2 * side, 2 * side)
    expected = nn.functional.avg_pool2d(image, 2).flatten(2)[0].T
    kept = left_by(policy, model, embeds, tokens)[0]
    assert kept == [2 * r * 2 * side + 2 * c for r in range(side) for c in range(side)]
    torch.testing.assert_close(seen[0].hidden[0, [3 + place for place in kept]], expected)


@pytest.mark.parametrize("criterion", ["pooling", "grid", "random"])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 143, 575, 576, 600])
def test_a_budget_is_met_exactly(criterion: str, count: int) -> None:
    model = zoo.build("llama")
    embeds, tokens = prompt(576, 100, 30)
    policy = Budget(image_tokens=count, by=criterion)  # type: ignore[arg-type]
    kept = left_by(policy, model, embeds, tokens, 0)
    assert [len(image) for image in kept] == [min(count, size) for size in (576, 100, 30)]
    whole = Budget(image_tokens=count, by=criterion, per="request")  # type: ignore[arg-type]
    if criterion == "random" or count >= 3:
        shared = left_by(whole, model, embeds, tokens, 0)
        assert sum(map(len, shared)) == min(count, 706)
        if criterion != "random":
            for image, size in zip(shared, (576, 100, 30), strict=True):
                assert abs(len(image) - min(count, 706) * size / 706) < 1.5 or len(image) == 1
    else:
        with pytest.raises(UsageError, match="more than the"):
            left_by(whole, model, embeds, tokens, 0)


@pytest.mark.parametrize(("count", "spaced"), [(144, 2), (64, 3), (36, 4), (16, 6)])
def test_a_grid_is_even(count: int, spaced: int) -> None:
    embeds, tokens = prompt(576)
    (kept,) = left_by(Budget(image_tokens=count, by="grid"), zoo.build("llama"), embeds, tokens)  # type: ignore[arg-type]
    first = (spaced - 1) // 2
    assert kept == [24 * row + column for row in range(first, 24, spaced) for column in range(first, 24, spaced)]


@pytest.mark.parametrize("host", ["qwen2_5_vl", "qwen3_vl"])
def test_rows_and_columns_are_those_that_a_host_is_told(host: str) -> None:
    """Images of 2 by 6 and 4 by 3 tokens, which are no squares, in three parts each."""
    model = zoo.build(host)
    ids = torch.tensor([[1, 57, *[zoo.IMAGE] * 12, 58, 2, 57, *[zoo.IMAGE] * 12, 58, 3]])
    grids = torch.tensor([[1, 4, 12], [1, 8, 6]])
    pixels = torch.randn(2 * 48, 96, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == zoo.IMAGE).long()}
    with Budget(image_tokens=3).on(model), torch.no_grad():
        cache: Any = cache_of_output(model(**inputs, pixel_values=pixels, image_grid_thw=grids, use_cache=True))
    places = cache.layers[0].slots.places[0].tolist()
    first, second = ([p - start for p in places if start <= p < start + 12] for start in (2, 17))
    assert first == [0, 2, 4]
    assert second == sorted(set(middles_of(4, 3, 3)))


def middles_of(rows: int, columns: int, count: int) -> list[int]:
    """The token in the middle of every part, part by part."""
    bands = min(max(round((count * rows / columns) ** 0.5), -(-count // columns), 1), rows, count)
    found = []
    for band in range(bands):
        lines = [row for row in range(rows) if row * bands // rows == band]
        cells = (band + 1) * count // bands - band * count // bands
        for cell in range(cells):
            across = [column for column in range(columns) if column * cells // columns == cell]
            found.append(lines[(len(lines) - 1) // 2] * columns + across[(len(across) - 1) // 2])
    return found


def test_what_is_drawn_at_random_is_the_seeds() -> None:
    model, (embeds, tokens) = zoo.build("llama", layers=LAYERS), prompt(64, 64, 49)
    settings: list[Any] = [{"name": "random", "seed": seed} for seed in (0, 0, 1)]
    one, same, other = (left_by(Budget(image_tokens=20, by=by), model, embeds, tokens) for by in settings)
    assert one == same
    assert one != other
    assert one[0] != one[1]  # images of one size are drawn from anew
    staged = Prune(stages=[(0, 0.5), (2, 0.25)], criterion="random")  # type: ignore[arg-type]
    first, second = (left_by(staged, model, embeds, tokens, layer) for layer in (0, 2))
    assert [len(image) for image in second] != [len(image) for image in first]
    assert all(set(few) < set(many) for few, many in zip(second, first, strict=True))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"criterion": {"name": "grid", "seed": 1}}, "unknown key"),
        ({"criterion": "best"}, "last_query_attention"),
        ({"criterion": "grid", "per": "request"}, "has no effect"),
        ({"criterion": "pooling", "merge": "nearest"}, "merges by itself"),
        ({"criterion": {"name": "last_query_attention", "of_layer": "itself"}, "merge": "nearest"}, "not known before"),
        ({"criterion": "max_min_diversity", "stages": ((0, "knee"),)}, "gives no scores"),
        ({"criterion": "random", "stages": ((0, "knee"),), "merge": "nearest"}, "how many stay"),
        ({"criterion": ("random", "grid"), "stages": ((0, "knee"), (1, 0.5))}, "behind a knee"),
        ({"criterion": ("random", "grid")}, "2 criteria for 1 stages"),
        ({"stages": ((0, "elbow"),)}, 'or "knee"'),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Prune(**{"stages": ((0, 0.5),), **settings})


def test_attention_that_shows_no_keys_is_refused() -> None:
    model, (embeds, tokens) = zoo.build("llama"), prompt(16)
    policy = Prune.model_validate({"stages": ((1, 0.5),), "criterion": "duplicates"})
    zoo.set_attention(model, "eager")
    with pytest.raises(HostError, match="does not show queries and keys"), policy.on(model):
        pass
    zoo.set_attention(model, "sdpa")
    with policy.on(model):
        zoo.set_attention(model, "eager")
        with pytest.raises(SeamError, match="did not show what"):
            model(inputs_embeds=embeds, token_map=tokens)


def test_what_has_no_effect_on_a_host_is_refused() -> None:
    policy = Prune.model_validate({"stages": ((1, 0.5),), "criterion": "rope_free_attention"})
    for host in ("opt", "gpt2"):
        with pytest.raises(HostError, match="does not rotate positions"), policy.on(zoo.build(host)):
            pass


def test_a_uniform_share_that_is_more_than_what_stays_is_refused() -> None:
    embeds, tokens = prompt(36)
    budget = Budget.model_validate({"image_tokens": 3, "by": "rope_free_attention"})
    with pytest.raises(UsageError, match="are 4 tokens of an image of 36, of which 3 are to stay"):
        left_by(budget, zoo.build("llama"), embeds, tokens)


def test_images_that_cannot_be_told_apart_are_refused_per_image() -> None:
    model, (embeds, tokens) = zoo.build("llama"), prompt(16)
    unknown = TokenMap.unstack(torch.where(tokens.stack() == 0, tokens.stack(), tokens.stack()))
    unknown = TokenMap(unknown.modality, torch.where(tokens.is_perceptual, -2, -1), unknown.position, unknown.role)
    with pytest.raises(UsageError, match="cannot be told which are of which"):
        left_by(Budget(image_tokens=4), model, embeds, unknown)
    with Budget(image_tokens=4, by="random", per="request").on(model):  # type: ignore[arg-type]
        model(inputs_embeds=embeds, token_map=unknown)
