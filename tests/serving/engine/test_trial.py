"""The trial at loading tells hosts that batches change from those that they do not."""

from __future__ import annotations

import pytest

from alula.serving.engine.trial import is_alike
from tests import media_hosts, zoo

IDS = list(range(1, 9))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "llava-mistral", "qwen2_5_vl"])
def test_most_are_alike(name: str) -> None:
    assert is_alike(zoo.build(name), IDS)


def test_positions_that_begin_at_one_are_found_out() -> None:
    """Those of PaliGemma, which counts them by itself where none are given."""
    text = media_hosts.text("gemma", head_dim=8, vocab_size=64, pad_token_id=0, eos_token_id=1)
    parts = {"vision_config": {**media_hosts.siglip(), "projection_dim": 32}, "text_config": text}
    host = media_hosts.build("paligemma", **parts, projection_dim=32, hidden_size=32, image_token_id=60, vocab_size=64)
    assert not is_alike(host, IDS)
