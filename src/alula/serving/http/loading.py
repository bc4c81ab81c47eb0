"""Models that come and go while the server runs: from below one folder, under names that say what they stand on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyio import to_thread

from alula.errors import AlulaError, quoted
from alula.serving.engine import Engine, Served, UnknownModel
from alula.serving.http.problems import Problem
from alula.serving.http.schema import LoadAsked
from alula.serving.http.settings import Settings

ADAPTER, MODEL = "adapter_config.json", "config.json"
_DEPTH = 4
"""folders below one another that are looked into"""
_MOST = 200
"""adapters that are listed"""


class Loading:
    """Loads and unloads by request.

    Args:
        engine: into which.
        settings: whether, and from where.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self._may = engine, settings.may_load
        self._root = None if settings.adapters is None else settings.adapters.resolve()

    def listed(self) -> dict[str, Any]:
        """What lies in the folder, by its path there."""
        root = self._allowed()
        loaded = {str(Path(each.path).resolve()): each.name for each in self.engine.models()}
        found = [
            {
                "path": place.relative_to(root).as_posix(),
                "type": "adapter" if (place / ADAPTER).is_file() else "model",
                "loaded_as": loaded.get(str(place)),
            }
            for place in self._places(root, 0)
        ]
        return {"data": found[:_MOST]}

    async def load(self, asked: LoadAsked) -> Served:
        """Load what a request names.

        Raises:
            Problem: 403 where that is not allowed, 404 where nothing is there, 409 where the name is taken, and 400.
        """
        place = self._place(asked.path)
        names = {each.name: each for each in self.engine.models()}
        if asked.name in names:
            raise Problem(f"{asked.name!r} is loaded already", status=409, param="name", code="name_taken")
        if (place / ADAPTER).is_file():
            base = names.get(asked.name.partition("+")[0])
            if "+" not in asked.name or base is None or base.base is not None:
                bases = ", ".join(name for name, each in names.items() if each.base is None)
                raise Problem(
                    "an adapter is named after the model that it is put on",
                    param="name",
                    code="invalid_value",
                    remedy=f"write BASE+NAME; bases are: {bases}",
                )
        try:
            return await to_thread.run_sync(lambda: self.engine.load(asked.name, place))
        except AlulaError as error:
            places = {str(place): asked.path} | {each.path: name for name, each in names.items()}
            told = [_without(places, said) for said in (error.message, error.remedy)]
            raise Problem(told[0] or "", param="path", code="not_loadable", remedy=told[1]) from error

    async def unload(self, name: str) -> None:
        """Let go of a model, once its requests are answered.

        Raises:
            Problem: 403 where that is not allowed, or for what lies elsewhere; 404 where there is none, 409 where
                adapters stand on it.
        """
        root = self._allowed()
        served = next((each for each in self.engine.models() if each.name == name), None)
        if served is not None and not Path(served.path).resolve().is_relative_to(root):
            raise Problem(
                f"{name!r} was loaded by whoever runs the server",
                status=403,
                param="name",
                code="unloading_not_allowed",
                remedy="what lies below --adapters can be unloaded by request",
            )
        try:
            await to_thread.run_sync(self.engine.unload, name)
        except UnknownModel as error:
            raise Problem(error.message, status=404, param="name", code="model_not_found") from error
        except AlulaError as error:
            raise Problem(error.message, status=409, param="name", code="in_use", remedy=error.remedy) from error

    def _allowed(self) -> Path:
        if not self._may or self._root is None:
            raise Problem(
                "models are not loaded by request here",
                status=403,
                code="loading_not_allowed",
                remedy="whoever runs the server may allow it: --allow-load --adapters DIRECTORY",
            )
        return self._root

    def _place(self, path: str) -> Path:
        """The directory that a path below the folder names, wherever links lead."""
        root = self._allowed()
        missing = Problem(
            f"nothing to load lies at {quoted(path, 80)}", status=404, param="path", code="adapter_not_found"
        )
        try:
            place = (root / path).resolve()
            is_there = place.is_relative_to(root) and any((place / name).is_file() for name in (ADAPTER, MODEL))
        except (OSError, ValueError):  # names that no file can have
            raise missing from None
        if not is_there:
            raise missing
        return place

    def _places(self, folder: Path, depth: int) -> list[Path]:
        if any((folder / name).is_file() for name in (ADAPTER, MODEL)):
            return [folder]
        if depth == _DEPTH:
            return []
        below = sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
        return [place for each in below if not each.name.startswith(".") for place in self._places(each, depth + 1)]


def _without(places: Mapping[str, str], said: str | None) -> str | None:
    """Words without the places of the server's disk, each by what requests call it."""
    for place in sorted(places, key=len, reverse=True):  # one may lie in another
        said = None if said is None else said.replace(place, places[place])
    return said
