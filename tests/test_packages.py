"""Two distributions: alula, which every user installs, and alula-fledgling, which plugs into it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 1_000_000
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


@pytest.fixture(scope="module")
def alone(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has alula's wheel and what it requires, and nothing else of this repository."""
    place = tmp_path_factory.mktemp("alone")
    with zipfile.ZipFile(wheels["alula"]) as wheel:
        wheel.extractall(place)
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.lower().startswith(("alula", "_alula", "__editable__")) and installed.suffix != ".pth":
            (place / installed.name).symlink_to(installed)
    return {**os.environ, "PYTHONPATH": str(place)}


def python(environment: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -S: no .pth of this environment is read, so that what is installed for development is not there
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


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


def test_without_the_fledgling_all_of_alula_is_there(alone: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, alula\n"
        "for module in pkgutil.walk_packages(alula.__path__, 'alula.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "from alula.evaluation import task_names\n"
        "from alula.data.registry import SOURCES\n"
        "print(task_names(), SOURCES.names())\n"
    )
    done = python(alone, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "() ('jsonl', 'llava', 'dataset', 'coco', 'webdataset')\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["quickstart"],
        ["fledgling", "show"],
        ["chat", "fledgling"],
        ["eval", "fledgling"],
        ["eval", "MODEL", "--task", "text_bare"],
        ["train", "recipe.yaml"],
    ],
    ids=" ".join,
)
def test_what_the_fledgling_brings_is_named_where_it_is_missing(
    arguments: list[str], alone: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: a\noutput_dir: out\nhost: {path: .}\n"
        "stages: [{name: one, method: full, steps: 1, data: {sources: [{microworld: visual}]}}]\n"
    )
    done = python(alone, "-m", "alula", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert "pip install 'alula[fledgling]'" in " ".join(done.stderr.split()), done.stderr


def test_help_names_no_command_that_is_missing(alone: dict[str, str], tmp_path: Path) -> None:
    done = python(alone, "-m", "alula", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "audit" in done.stdout
    assert "quickstart" not in done.stdout
