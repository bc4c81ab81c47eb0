"""Two distributions: alula, which every user installs, and alula-fledgling, which plugs into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 1_400_000
"""of alula's wheel"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, as pip would build them."""
    built = {}
    for name, project in (("alula", ROOT), ("alula-fledgling", ROOT / "fledgling")):
        place = tmp_path_factory.mktemp(name)
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
        subprocess.run(build, cwd=project, check=True, capture_output=True)
        (built[name],) = place.glob("*.whl")
    return built


MISSING = (
    ("quickstart",),
    ("fledgling", "show"),
    ("chat", "fledgling"),
    ("serve", "--demo", "--port", "0"),
    ("eval", "fledgling"),
    ("eval", "MODEL", "--task", "text_bare"),
    ("train", "recipe.yaml"),
)
"""commands that the fledgling brings, or brings something for"""
RECIPE = """
name: a
output_dir: out
host: {path: .}
stages: [{name: one, method: full, steps: 1, data: {sources: [{microworld: visual}]}}]
"""
PROGRAM = """
import contextlib, importlib, io, json, os, pkgutil, sys, alula
for module in pkgutil.walk_packages(alula.__path__, "alula."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from alula.cli.app import main
from alula.data.registry import SOURCES
from alula.evaluation import task_names
print(json.dumps({"tasks": task_names(), "sources": SOURCES.names()}), flush=True)
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:  # each in a process of its own; only what is imported is shared
        sys.argv = ["alula", *words]
        code = 0
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What a process says that has alula's wheel and what it requires, and nothing else of this repository: what is
    there once every module is imported, and how commands end."""
    place, folder = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("folder")
    with zipfile.ZipFile(wheels["alula"]) as wheel:
        wheel.extractall(place)
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.lower().startswith(("alula", "_alula", "__editable__")) and installed.suffix != ".pth":
            (place / installed.name).symlink_to(installed)
    (folder / "recipe.yaml").write_text(RECIPE)
    commands = [*MISSING, ("--help",)]
    # -S: no .pth of this environment is read, so that what is installed for development is not there
    words = [sys.executable, "-S", "-c", PROGRAM, json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there, *ends = map(json.loads, done.stdout.splitlines())
    return {"there": there, **dict(zip(commands, ends, strict=True))}


def test_what_every_user_installs_is_small_and_holds_no_apparatus(wheels: dict[str, Path]) -> None:
    assert wheels["alula"].stat().st_size < MOST_BYTES
    names = zipfile.ZipFile(wheels["alula"]).namelist()
    assert not [
        name for name in names if any(part in name for part in ("fledgling", "microworld", "quickstart", "studies"))
    ]
    assert any(name.endswith("alula/py.typed") for name in names)


def test_the_fledgling_is_whole(wheels: dict[str, Path]) -> None:
    names = zipfile.ZipFile(wheels["alula-fledgling"]).namelist()
    for part in ("llm", "vision", "audio"):
        assert f"alula_fledgling/assets/{part}/model.safetensors" in names
    assert any(name.endswith("quickstart/recipes/wings.yaml") for name in names)
    assert not [name for name in names if name.startswith("alula/")]


def test_without_the_fledgling_all_of_alula_is_there(said: dict[Any, Any]) -> None:
    assert said["there"] == {"tasks": [], "sources": ["jsonl", "llava", "dataset", "coco", "webdataset"]}


@pytest.mark.parametrize("words", MISSING, ids=" ".join)
def test_what_the_fledgling_brings_is_named_where_it_is_missing(words: tuple[str, ...], said: dict[Any, Any]) -> None:
    assert said[words]["code"] != 0
    assert "pip install 'alula[fledgling]'" in " ".join(said[words]["err"].split()), said[words]


def test_help_names_no_command_that_is_missing(said: dict[Any, Any]) -> None:
    end = said["--help",]
    assert end["code"] == 0, end
    assert "audit" in end["out"]
    assert "quickstart" not in end["out"]
