"""Taps see what the host itself reports, once per forward."""

from __future__ import annotations

from contextvars import Context

import pytest
import torch

from alula.errors import UsageError
from alula.seam import TapEvent, find, taps
from tests import zoo


@pytest.mark.parametrize("name", zoo.ALL)
def test_blocks_equal_the_hosts_own_hidden_states(name: str) -> None:
    model = zoo.build(name)
    batch = zoo.batch(name, "3I4", "6") if name in zoo.HOSTS else zoo.batch(name, "9", "5")
    events = []
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        with taps(model, ["block_input", "attention", "mlp", "block_output"], events.append):
            logits = model(**batch).logits
    assert torch.equal(logits, expected.logits)
    assert find(model) is None
    assert [(e.layer, e.point) for e in events] == [
        (layer, point) for layer in range(2) for point in ("block_input", "attention", "mlp", "block_output")
    ]
    at = {(e.layer, e.point): e.hidden for e in events}
    for layer in range(2):
        assert torch.equal(at[layer, "block_input"], expected.hidden_states[layer])
        total = at[layer, "block_input"] + at[layer, "attention"] + at[layer, "mlp"]
        torch.testing.assert_close(total, at[layer, "block_output"], atol=1e-5, rtol=1e-5)
    assert torch.equal(events[0].tokens.valid, batch["attention_mask"].bool())


def test_checkpointing_reports_once() -> None:
    model = zoo.build("llama").train()
    model.gradient_checkpointing_enable()
    events = []
    with taps(model, ["block_input", "attention", "mlp"], events.append, layers=[-1]):
        model(**zoo.batch("llama", "9"), use_cache=False).logits.sum().backward()
    assert [(e.layer, e.point) for e in events] == [(1, "block_input"), (1, "attention"), (1, "mlp")]


def test_a_forward_that_failed_is_forgotten() -> None:
    """Nobody's later forward is taken for it: here that of a task that did not enter the taps."""
    model, events = zoo.build("llama"), []

    def fail(event: TapEvent) -> None:
        raise ValueError("full")

    with taps(model, ["block_input"], fail), taps(model, ["block_input", "mlp"], events.append):
        with pytest.raises(ValueError, match="full"):
            model(**zoo.batch("llama", "9"))
        events.clear()
        Context().run(model, **zoo.batch("llama", "5"))
    assert events == []


def test_several_taps_at_once_and_bad_names() -> None:
    model = zoo.build("llama")
    first, second = [], []
    with taps(model, ["mlp"], first.append), taps(model, ["mlp_norm", "attention_norm"], second.append, layers=[0]):
        model(**zoo.batch("llama", "9"))
    assert len(first) == 2
    assert [e.point for e in second] == ["attention_norm", "mlp_norm"]
    with pytest.raises(UsageError, match="unknown tap point 'mpl'"), taps(model, ["mpl"], first.append):
        pass
    with pytest.raises(UsageError, match="layer 7 does not exist"), taps(model, ["mlp"], first.append, layers=[7]):
        pass
    assert find(model) is None
