"""Looking at a model directory before transformers does, so that what is wrong can be named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from alula.errors import HostError
from alula.files import recovered, regular_files

_HUB_SECONDS = 10.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIGS = ("config.json", "adapter_config.json")
_INSIDE = ("final", "latest", "llm", "model")
"""Where runs and fledglings keep a model."""


def locate(source: str | os.PathLike[str], what: str) -> str:
    """The argument for ``from_pretrained``: an existing, readable directory, or a hub id as it is.

    Args:
        source: a directory or hub id.
        what: what it should hold, for the message ("llm", "vision", "host").

    Raises:
        HostError: a path that does not exist or is no directory, a directory with a missing or broken file, or a hub
            id that is not in the cache while the hub cannot be reached.
    """
    path = recovered(Path(source).expanduser())
    if path.is_dir():
        inspect_directory(path)
        return str(path)
    if path.exists():
        raise HostError(
            "is a file, not a model directory",
            where=f"{what} {path}",
            remedy="name the directory that holds config.json",
        )
    text = os.fspath(source)
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise HostError("no such directory", where=f"{what} {text}", remedy="check the path, or give a hub id")
    _reach(text, what)
    return text


def _reach(name: str, what: str) -> None:
    """Knock at the hub once for a model that is not in the cache: transformers would retry for half a minute."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
        return  # the hub spoke, or must not be asked: transformers says best what is wrong
    except Exception as error:  # whatever the HTTP library of the day raises
        raise HostError(
            f"no such directory, and the hub cannot be reached ({error})",
            where=f"{what} {name}",
            remedy="check the path, or the connection; models in the cache are found without",
        ) from error


def inspect_directory(path: Path) -> None:
    """Check that the JSON files of a model directory parse and that its weight files are there and whole.

    Raises:
        HostError: naming the missing or broken file. FilesError: naming a pipe or device in place of one.
    """
    regular_files(path)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            remedy = "this is an adapter; use alula.load_model"
        else:
            inside = next((name for name in _INSIDE if any((path / name / file).is_file() for file in _CONFIGS)), None)
            remedy = f"there is one at {path / inside}" if inside else "name the directory that save_pretrained wrote"
        raise HostError("has no config.json, so it is not a model directory", where=str(path), remedy=remedy)
    for file in sorted(path.glob("*.json")):
        read_json(file)
    there, named = set(path.glob("*.safetensors")), set[Path]()
    for index in sorted(path.glob("*.safetensors.index.json")):
        named |= {path / name for name in read_json(index).get("weight_map", {}).values()}
    older = path.glob("pytorch_model*.bin")  # which transformers reads too
    if not there | named and not any(older):
        raise HostError(
            "holds no weights (*.safetensors)",
            where=str(path),
            remedy="name the directory that a model was saved to, such as final/ of a run, or copy it again",
        )
    for shard in sorted(there | named):
        if not shard.is_file():
            what = "a shard that the index names is missing" if shard in named else "is a link that leads nowhere"
            raise HostError(what, where=str(shard), remedy="copy or download the model again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise HostError(
                f"the weights cannot be read ({error})", where=str(shard), remedy="copy or download the model again"
            ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; HostError when it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise HostError(f"is not readable JSON ({error})", where=str(file)) from error
    if not isinstance(value, dict):
        raise HostError("does not hold a JSON object", where=str(file))
    return value
