"""Models over shared weights: what is one's own stays it, whatever the other computes."""

from __future__ import annotations

import threading
from typing import Any

import torch

from alula.loading import sharing
from tests import zoo
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


@torch.no_grad()
def test_a_copy_made_while_another_thread_reads_a_first_picture() -> None:
    """transformers puts hooks on a tower then, one layer after the other; a copy has all of them, once."""
    model, batch = zoo.build("llava-llama"), zoo.batch("llava-llama", "2I2")
    layer = model.model.vision_tower.get_submodule("encoder.layers.1")
    halfway, go_on = threading.Event(), threading.Event()
    register = layer.register_forward_hook

    def slowly(*args: Any, **kwargs: Any) -> Any:
        halfway.set()
        go_on.wait(1)
        return register(*args, **kwargs)

    layer.register_forward_hook = slowly
    read = threading.Thread(target=lambda: model(**batch))
    read.start()
    assert halfway.wait(30)
    threading.Timer(0.2, go_on.set).start()
    other = sharing(model)
    read.join()
    del layer.register_forward_hook
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    counts = [[len(module._forward_hooks) for module in each.model.vision_tower.modules()] for each in (model, other)]
    assert counts[0] == counts[1]
