"""The examples of docs/methods/probes.md run, in order, on the fledgling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import alula
from alula.data import Collator, Sample
from alula_fledgling.microworld import visual_items

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "probes.md"


def test_the_page_runs(capsys: Any) -> None:
    model, processor = alula.build_host("fledgling", "fledgling")
    samples = [
        Sample(id=item.id, messages=item.messages, source="microworld", meta={})
        for item in visual_items(6, split="test", seed=0)
    ]
    collated = Collator(processor, max_length=512)(samples)
    batch = {name: value for name, value in collated.items() if torch.is_tensor(value) and name != "labels"}
    names: dict[str, Any] = {"batches": [batch], "batch": batch}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
            exec(block, names)
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, before[name]), name
    printed = capsys.readouterr().out
    assert "Estimate(value=" in printed
    assert "state 6" in printed  # the lens table, six blocks deep
    assert names["noise"].result().pairs["image-text"].samples == 6
