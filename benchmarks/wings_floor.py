"""What Wings learners must do at the least: floating-point operations and bytes, counted from the shapes.

Per layer, with r the rank, d the stream width and both learners (a multiply-add is two operations):

- a query that attends goes through two low-rank projections of each learner (Q and O): 2 * 2 * 4dr;
- a key token goes through two of the one learner it is a key of (K and V): 2 * 4dr;
- a (query, key) pair costs a score and a weighted sum: 4d;
- the router's sum of attention over image tokens costs 2H per pair of the main branch.

While decoding, keys and values of earlier tokens come from what was kept. Either their factors (2r numbers per token
and layer, and the input tokens once for all layers), from which K must be made again in every step, 2dr per token; or
keys and values themselves (2d numbers per token and layer), which need no arithmetic but are read in full. Values are
not made: the sum over factors (2rH per token and head set) is projected up once. Both floors are given.

Bytes: every weight that is used once, what is kept of the past once, new tokens in and out of the stream. Activations
that fit caches are not counted. The time floor is the larger of operations over the machine's matrix-multiply rate and
bytes over its read rate, both measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder and its learners that costs depend on."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    itemsize: int  # bytes of an activation and of a cached number
    weight_size: int  # bytes of a learner's weight


@dataclass(frozen=True)
class Floor:
    """Operations and bytes of the learners alone, of all layers together."""

    flops: int
    bytes: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def prefill(shape: Shape, tokens: int, image_start: int, image_tokens: int, batch: int = 1) -> Floor:
    """Floor of one pass over tokens with one image, under the exact gate (those before the image attend to nothing)."""
    active = tokens - image_start
    visual = sum(min(q - image_start + 1, image_tokens) for q in range(image_start, tokens))
    textual = sum(q + 1 - min(q - image_start + 1, image_tokens) for q in range(image_start, tokens))
    low_rank = 4 * shape.width * shape.rank
    per_layer = (
        active * 4 * low_rank + tokens * 2 * low_rank + (visual + textual) * 4 * shape.width + visual * 2 * shape.heads
    )
    weights = 2 * 8 * shape.width * shape.rank * shape.weight_size
    stream = 3 * batch * tokens * shape.width * shape.itemsize  # queries and input tokens in, the routed sum out
    return Floor(batch * per_layer * shape.layers, (weights + stream) * shape.layers)


def training_step(shape: Shape, tokens: int, image_start: int, image_tokens: int, batch: int = 1) -> Floor:
    """Floor of forward and backward: backward costs twice the forward where both factors need gradients."""
    forward = prefill(shape, tokens, image_start, image_tokens, batch)
    return Floor(3 * forward.flops, 3 * forward.bytes)


def decode(shape: Shape, past: int, kept: str) -> Floor:
    """Floor of one step for one sample after `past` tokens; `kept` is "factors" or "keys"."""
    d, r = shape.width, shape.rank
    flops = 4 * 4 * d * r + 2 * 2 * d * r
    weights = 2 * 4 * d * r + 2 * d * r  # Q and O of both learners, A_k and A_v of one
    if kept == "factors":
        flops += past * (2 * d * r + 4 * d + 2 * r * shape.heads) + 2 * 2 * d * r
        weights += 2 * 2 * d * r  # B_k and B_v of both
        memory = past * (2 * r * shape.layers + d)
    else:
        heads = d // shape.head_dim  # of a learner, each as wide as the host's
        value = heads * r if 4 * r <= shape.head_dim else d  # see `alula.grafts.wings.learners.keeps_outputs`
        flops += past * 2 * (d + value)
        weights += 2 * d * r
        memory = past * (d + value) * shape.layers
    return Floor(flops * shape.layers, weights * shape.layers * shape.weight_size + memory * shape.itemsize)


def learner_memory(shape: Shape, kept: str = "factors") -> float:
    """Bytes kept per token for the learners, over those of the host's own keys and values."""
    mine = 2 * shape.rank * shape.layers + shape.width if kept == "factors" else 2 * shape.width * shape.layers
    return mine / (2 * shape.kv_heads * shape.head_dim * shape.layers)
