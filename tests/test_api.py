"""The names at the top: what a user needs, loaded when first used."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import alula


def test_every_name_is_there_and_documented() -> None:
    names = set(alula._HOMES)
    expected = {"build_host", "load_model", "save_host", "attach", "detach", "load_adapter", "save_adapter"}
    assert names >= expected | {"train", "evaluate", "compare", "audit"}
    for name in names:
        assert getattr(alula, name).__doc__, name


def test_names_are_not_hidden_by_rooms() -> None:
    """`alula.audit` is the function also once its room was imported."""
    rooms = [room.name for room in pkgutil.iter_modules(alula.__path__) if room.name != "__main__"]
    for room in rooms:
        importlib.import_module(f"alula.{room}")
    assert not set(rooms) & set(alula._HOMES)
    assert all(callable(getattr(alula, name)) for name in alula._HOMES)


def test_names_that_are_listed_are_public() -> None:
    """What a prompt completes: the names, the rooms that were imported, and what every module has."""
    program = """
import sys, alula, alula.data
listed = {name for name in dir(alula) if not name.startswith("__")}
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("alula.") and not name.startswith("alula._")}
sys.exit(str(listed ^ {*alula._HOMES, *rooms}) if listed != {*alula._HOMES, *rooms} else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert {"__version__", "__doc__", "__path__"} <= set(dir(alula))


def test_a_star_brings_the_public_names_and_nothing_else() -> None:
    brought: dict[str, object] = {}
    exec("from alula import *", brought)
    assert brought.keys() - {"__builtins__"} == set(alula._HOMES)


def test_importing_is_cheap() -> None:
    program = "import sys, alula; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_and_a_check_of_data_load_no_more_than_they_need() -> None:
    program = """
import sys
from alula.cli.app import _registered
from studies.__main__ import commands
_registered(), commands()
heavy = {"numpy", "PIL", "pydantic", "torch", "transformers"} & {*sys.modules}
import alula.data.check
sys.exit(f"help: {heavy}" if heavy else "a check loads torch" if "torch" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
