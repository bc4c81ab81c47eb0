"""The examples of docs/usage/adapters.md run on the fledgling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import alula
from alula import WingsConfig
from alula.grafts.wings.config import LEARNERS

PAGE = (Path(__file__).parents[2] / "docs" / "usage" / "adapters.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    first, compiling, loading = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(first, names)
    assert alula.grafts_of(names["model"]) == {}  # type: ignore[arg-type]
    compile(compiling, "adapters.md", "exec")  # what it does: tests/grafts/wings/test_compiled.py
    exec(loading, names)
    assert alula.grafts_of(names["model"])["wings"].config.cache == "keys"  # type: ignore[arg-type]
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_every_setting_is_on_the_page() -> None:
    for name in WingsConfig().to_dict():
        assert f"`{name}`" in PAGE, name
    assert LEARNERS == ("visual", "textual")
