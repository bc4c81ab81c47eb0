"""LoRRA, the routers and whole layers against loops in float64 that share no code with the library.

The loops go query by query and key by key, decide legality from token ids and true positions, and make RoPE angles from
the base frequency.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alula
from alula import WingsConfig
from alula.grafts.wings import LoRRA
from alula.grafts.wings.learners import Angles, narrow_angles, rotate, split_queries
from tests import zoo
from tests.grafts.common import CONFIGS, token_map, true_positions, wake

BASE = 10000.0


def _np(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def _low_rank(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.up"] @ (weights[f"{name}.down"] @ x)


def _turn(head: np.ndarray, angles: np.ndarray | None) -> np.ndarray:
    """Half-split rotation of one head by D / 2 angles."""
    if angles is None:
        return head
    half = len(angles)
    out = head.copy()
    for i, angle in enumerate(angles):
        a, b = head[i], head[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def loop_lorra(
    weights: dict[str, np.ndarray],
    query: np.ndarray,
    keys: list[np.ndarray],
    head_dim: int,
    query_angles: np.ndarray | None,
    key_angles: list[np.ndarray | None],
) -> np.ndarray:
    """What one query attends to among its legal keys."""
    if not keys:
        return np.zeros_like(query)
    q = query + _low_rank(weights, "q", query)
    out = np.zeros_like(query)
    for start in range(0, len(query), head_dim):
        part = slice(start, start + head_dim)
        scores, values = [], []
        for x, angles in zip(keys, key_angles, strict=True):
            k, v = x + _low_rank(weights, "k", x), x + _low_rank(weights, "v", x)
            scores.append(_turn(q[part], query_angles) @ _turn(k[part], angles) / math.sqrt(head_dim))
            values.append(v[part])
        softmax = np.exp(np.array(scores) - max(scores))
        out[part] = sum(p * v for p, v in zip(softmax / softmax.sum(), values, strict=True))
    return _low_rank(weights, "o", out)


def _weights_of(graft: Any, layer: int, part: str) -> dict[str, np.ndarray]:
    prefix = f"layers.{layer}.{part}."
    return {k.removeprefix(prefix): _np(v) for k, v in graft.state_dict().items() if k.startswith(prefix)}


def loop_weights(
    router: dict[str, np.ndarray],
    kind: str,
    attention: np.ndarray,
    is_image: list[bool],
    positions: list[int],
) -> np.ndarray:
    """(visual, textual) weight of one query from its (H, K) attention."""
    logits = router["bias"].copy()
    for token in range(2):
        if kind == "attention":
            for k, position in enumerate(positions):
                if position >= 0:
                    logits[token] += attention[:, k].mean() * router["weight"][token, position]
        elif kind == "mass":
            for h in range(attention.shape[0]):
                mass = sum(attention[h, k] for k in range(attention.shape[1]) if is_image[k])
                logits[token] += router["weight"][token, h] * mass
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("queries", [1, 3, 5, 9])  # few (without values written out) below the head width of 4
@pytest.mark.parametrize("rope", [False, True])
def test_lorra_equals_the_loops(queries: int, rope: bool) -> None:
    width, head_dim, keys = 12, 4, 7
    generator = torch.Generator().manual_seed(3)
    module = LoRRA(width, head_dim, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    q = torch.randn(2, queries, width, generator=generator)
    x = torch.randn(2, keys, width, generator=generator)
    counts = torch.randint(1, keys + 1, (2, queries), generator=generator)
    counts[0, 0] = 0  # a query without any legal key
    angles = torch.rand(2, queries + keys, head_dim // 2, generator=generator) * 6
    table = torch.cat([angles, angles], dim=-1)
    options = {}
    if rope:
        options["query_angles"] = Angles.of(table[:, :queries].cos(), table[:, :queries].sin())
        options["key_angles"] = Angles.of(table[:, queries:].cos(), table[:, queries:].sin())
    out = module(q, x, counts, **options)
    weights = {name: _np(value) for name, value in module.named_parameters()}
    for b in range(2):
        for i in range(queries):
            chosen = range(counts[b, i])
            expected = loop_lorra(
                weights,
                _np(q[b, i]),
                [_np(x[b, k]) for k in chosen],
                head_dim,
                _np(angles[b, i]) if rope else None,
                [_np(angles[b, queries + k]) if rope else None for k in chosen],
            )
            np.testing.assert_allclose(_np(out[b, i]), expected, atol=2e-6)
    assert (out[0, 0] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("queries", [2, 11])
def test_blocks_of_queries_change_nothing(size: int, queries: int) -> None:
    generator = torch.Generator().manual_seed(5)
    module = LoRRA(12, 4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    q, x = torch.randn(2, queries, 12, generator=generator), torch.randn(2, 6, 12, generator=generator)
    counts = torch.randint(0, 7, (2, queries), generator=generator).sort(dim=1).values
    counts[:, -1] = 6  # a block that sees everything
    whole = module(q, x, counts)
    blocks = split_queries(counts.numpy(), size)
    assert [block.start for block in blocks] == list(range(0, queries, size))
    torch.testing.assert_close(module(q, x, counts, blocks=blocks), whole, atol=1e-6, rtol=1e-5)


def test_queries_that_are_the_keys_need_no_mask() -> None:
    """Keys' own tokens in the middle, the last of them padding, others around them that see none, two or all keys."""
    generator = torch.Generator().manual_seed(5)
    module = LoRRA(12, 4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    q, x = torch.randn(2, 11, 12, generator=generator), torch.randn(2, 6, 12, generator=generator)
    counts = torch.tensor([[0, 2, 1, 2, 3, 4, 5, 6, 6, 6, 6], [0, 0, 0, 0, 3, 4, 5, 0, 5, 5, 0]])
    whole = module(q, x, counts, blocks=split_queries(counts.numpy()))
    blocks = split_queries(counts.numpy(), cuts=(8,), own=slice(2, 8))
    assert [(block.start, block.stop, block.is_causal) for block in blocks] == [
        (0, 2, False),
        (2, 8, True),
        (8, 11, False),
    ]
    assert (
        blocks[0].min_keys == blocks[0].max_keys == 2
    )  # who sees nothing is set to zero afterwards, and needs no mask
    torch.testing.assert_close(module(q, x, counts, blocks=blocks), whole, atol=1e-6, rtol=1e-5)


# -- a whole layer inside a host ----------------------------------------------------------------------------------

CASES = [
    ("llama", "mass", 0),
    ("llama", "attention", 1),
    ("llama", "paper", 1),
    ("mistral", "mass", 1),
    ("qwen3", "attention", 0),
    ("qwen3", "constant", 1),
    ("gemma2", "mass", 0),
    ("gemma3", "paper", 0),
    ("gemma3", "mass", 1),
    ("opt", "constant", 1),
    ("llama", "no rope", 1),
    ("llama", "normalized", 1),
    ("gemma3", "normalized", 0),
    ("phi3", "visual", 0),
    ("qwen2", "textual", 1),
    ("qwen2", "gated textual", 0),
    ("qwen2_5_vl", "mass", 0),
    ("qwen2_5_vl", "attention", 1),
    ("llava-llama", "paper", 0),
]


@pytest.mark.parametrize(("host", "config", "layer"), CASES)
def test_a_layer_equals_the_loops(host: str, config: str, layer: int) -> None:
    settings = WingsConfig(**{**CONFIGS[config].to_dict(), "layers": (layer,)})
    model = zoo.build(host)
    inputs = zoo.batch(host, "2I3I1", "I2", "6")
    if host == "qwen2_5_vl":
        places = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0]
        extra: dict[str, Any] = {}
    else:
        places = true_positions(inputs)
        extra = {} if host == "opt" else {"position_ids": places}
    tokens = {"token_map": token_map(inputs)} if host in zoo.TEXT else {}

    # the main branch's attention in this layer, from the host alone (layers before it carry no graft)
    needs_attention = settings.router != "constant" and len(settings.learners) == 2
    probabilities = None
    if needs_attention:
        eager = zoo.build(host)
        eager.set_attn_implementation({"text_config": "eager"} if host in zoo.HOSTS else "eager")
        with torch.no_grad():
            probabilities = _np(eager(**inputs, **extra, output_attentions=True).attentions[layer])

    graft = wake(alula.attach(model, settings))
    anatomy = graft.seam.anatomy
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = value.detach().clone()

    out = anatomy.attention_out(layer)
    handles = [
        anatomy.layers[0].register_forward_pre_hook(lambda m, a, k: keep("inputs", a[0]), with_kwargs=True),
        anatomy.layers[layer].register_forward_pre_hook(lambda m, a, k: keep("stream", a[0]), with_kwargs=True),
        # in front of the graft's hook: the branch alone; behind it: the branch with the learners
        out.register_forward_hook(lambda m, a, o: keep("branch", o[0] if isinstance(o, tuple) else o), prepend=True),
        out.register_forward_hook(lambda m, a, o: keep("both", o[0] if isinstance(o, tuple) else o)),
    ]
    with torch.no_grad():
        model(**inputs, **extra, **tokens)
    for handle in handles:
        handle.remove()

    head_dim = math.gcd(anatomy.hidden_size, anatomy.head_dim)
    base = _rope_base(model, anatomy, layer)
    shape = (*inputs["input_ids"].shape, -1)
    added = _np((seen["both"] - seen["branch"]).view(*shape))
    stream, branch = _np(seen["stream"].view(*shape)), _np(seen["branch"].view(*shape))
    first = _np(seen["inputs"].view(*shape))
    query = stream + branch if settings.query == "post_attention" else stream
    if settings.normalize:
        query, first = (x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) for x in (query, first))

    def angles(b: int, s: int) -> np.ndarray | None:
        if not settings.rope or host == "opt":
            return None
        frequencies = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if host == "qwen2_5_vl":
            axis = [0, 0, 1, 2]  # mrope_section [2, 1, 1]
            return np.array([float(places[axis[i], b, s]) * f for i, f in enumerate(frequencies)])
        return np.array([float(places[b, s]) * f for f in frequencies])

    ids, mask = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    active = 0
    for b in range(len(ids)):
        real = [s for s in range(len(ids[b])) if mask[b][s]]
        image = [ids[b][s] == zoo.IMAGE for s in range(len(ids[b]))]
        for s in real:
            before = [k for k in real if k <= s]
            has_seen = any(image[k] for k in before)
            expected = np.zeros(anatomy.hidden_size)
            weights = np.ones(2)
            if len(settings.learners) == 2:
                positions = [real.index(k) if k in real else -1 for k in range(len(ids[b]))]
                attention = probabilities[b, :, s] if probabilities is not None else np.zeros((1, 1))
                weights = loop_weights(
                    _weights_of(graft, layer, "router"), settings.router, attention, image, positions
                )
            for learner in settings.learners:
                keys = [k for k in before if image[k] == (learner == "visual")]
                if learner == "textual" and settings.gate == "exact" and not has_seen:
                    keys = []
                output = loop_lorra(
                    _weights_of(graft, layer, learner),
                    query[b, s],
                    [first[b, k] for k in keys],
                    head_dim,
                    angles(b, s),
                    [angles(b, k) for k in keys],
                )
                expected += settings.gain * weights[0 if learner == "visual" else 1] * output
            np.testing.assert_allclose(added[b, s], expected, atol=2e-5, rtol=1e-4)
            active += bool(np.abs(expected).max() > 1e-2)
    assert active >= 4


def _rope_base(model: Any, anatomy: Any, layer: int) -> float:
    rope = getattr(anatomy.config, "rope_parameters", None) or {}
    rope = rope.get(anatomy.layer_type(layer), rope)
    return float(rope.get("rope_theta", BASE))


def test_narrow_heads_turn_by_the_narrow_rope() -> None:
    """Learner heads of half the host's width get exactly the RoPE of that width."""
    position = torch.arange(5.0)
    wide = position[:, None] * torch.tensor([BASE ** (-2 * i / 16) for i in range(8)])
    narrow = position[:, None] * torch.tensor([BASE ** (-2 * i / 4) for i in range(2)])
    tables = tuple(f(torch.cat([wide, wide], dim=-1))[None] for f in (torch.cos, torch.sin))
    cos, sin = narrow_angles((tables[0], tables[1]), 16, 4)
    torch.testing.assert_close(cos[0], torch.cat([narrow, narrow], dim=-1).cos())
    torch.testing.assert_close(sin[0], torch.cat([narrow, narrow], dim=-1).sin())


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotation_has_all_its_derivatives(rotated: int) -> None:
    """Backward, twice, forward mode and torch.func; also where only a part of a head turns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(2, 5, rotated // 2, generator=generator, dtype=torch.float64)
    angles = Angles.of(torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin())

    def call(x: Tensor) -> Tensor:
        return rotate(x, angles)

    with torch.no_grad():
        expected = rotate(x, angles)
        torch.testing.assert_close(expected.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(call(x), expected)
    assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x,))
    of_norm = torch.func.grad(lambda x: (rotate(x, angles) ** 2).sum())(x.detach())
    torch.testing.assert_close(of_norm, 2 * x.detach())
