"""What every way to tune promises: recipes name it, it trains what it says and leaves what loads to the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alula.hosts import build_host, save_host
from alula.training.methods import METHODS
from alula.training.methods.base import Method
from tests.hosts import tiny

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


@every_method
def test_it_says_what_it_is(method: Method) -> None:
    assert METHODS[method.name] is method
    assert type(method).__doc__
    settings = None if method.settings is None else method.settings()
    rates = method.rates(settings)
    assert rates, "a stage that names no rates trains something"
    assert set(rates) <= set(method.parts)
    assert any(part.startswith(method.defining) for part in rates)
    assert all(any(part.startswith(start) for part in method.parts) for start in method.defining)


@every_method
def test_what_it_expands_is_its_own(method: Method) -> None:
    expanded = method.expand({method.name: 1e-3}, None)
    assert all(rate == 1e-3 for rate in expanded.values())
    given = dict.fromkeys(method.parts, 1e-3)
    assert dict(method.expand(given, None)) == given


TOY = '''
from typing import ClassVar
from alula.training.fields import Section
from alula.training.methods.base import HostMethod

class NormSettings(Section):
    note: str = ""

class HeadOnly(HostMethod):
    """The decoder under another name: a toy."""
    name: ClassVar = "toy"
    settings: ClassVar = NormSettings
    parts: ClassVar = {"llm": 1e-3, "projector": None}
    defining: ClassVar = ("llm",)

METHOD = HeadOnly()
'''

PROGRAM = """
import sys
from alula.loading import load_model
from alula.training import load_recipe, train
recipe = load_recipe(sys.argv[1])
assert recipe.stages[0].settings.note == "hello", recipe
result = train(recipe)
print(type(load_model(result.final).model).__name__)
"""


def _site(directory: Path, code: str) -> Path:
    """A folder that holds an installed package with a method, as pip leaves one."""
    facts = directory / "toy_tuning-1.0.dist-info"
    facts.mkdir(parents=True)
    (directory / "toy_tuning.py").write_text(code)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tuning\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[alula.methods]\ntoy = toy_tuning:METHOD\n")
    return directory


def test_a_package_whose_method_does_not_load_is_named(tmp_path: Path) -> None:
    site = _site(tmp_path / "site", "import nothing_of_that_name\n")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "alula", "train", "recipe.yaml"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "toy_tuning:METHOD" in done.stderr
    assert "nothing_of_that_name" in done.stderr
    assert "remedy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_method_of_another_package_is_a_file_and_an_entry_point(tmp_path: Path) -> None:
    """Installed, it is legal in recipes with a section of its own, and trains; nothing of alula is changed."""
    decoder = tiny.decoder("llama", tied=True)
    host_directory = save_host(
        build_host(decoder, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()), tmp_path / "host"
    )
    site = _site(tmp_path / "site", TOY)
    recipe = {
        "name": "toy",
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "host": {"path": str(host_directory)},
        "stages": [
            {
                "name": "one",
                "method": "toy",
                "toy": {"note": "hello"},
                "steps": 1,
                "batch_size": 2,
                "data": {"sources": [{"microworld": "visual"}]},
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    paths = [str(site), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "LlavaForConditionalGeneration"
