"""Models over shared weights: what is one's own stays it, whatever the other computes."""

from __future__ import annotations

import torch

from alula.loading import sharing
from tests.hosts import tiny

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 3.0, 9.0, 27.0],
    "original_max_position_embeddings": 32,
    "factor": 16.0,
}


@torch.no_grad()
def test_what_forwards_write_is_each_ones_own() -> None:
    """Frequencies of longrope are written by every forward, for the length that it sees."""
    model = tiny.decoder("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32).eval()
    other = sharing(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    other(input_ids=torch.arange(40)[None], use_cache=False)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(other.model.rotary_emb.inv_freq, frequencies)


def test_what_checkpoints_hold_is_shared() -> None:
    """Buffers among it, as quantized weights are in some formats."""
    model = tiny.decoder("llama")
    model.model.norm.register_buffer("held", torch.ones(3))
    other = sharing(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        theirs = other.state_dict(keep_vars=True)[name]
        assert theirs.data_ptr() == tensor.data_ptr()
        assert theirs is not tensor
