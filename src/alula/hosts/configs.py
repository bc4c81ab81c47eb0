"""Reading what a directory says of its model, and naming what is wrong with it where transformers cannot take it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from alula.errors import HostError

_CONFIG = "config.json"
_SPEAKING = (OSError, ValueError, RuntimeError, ImportError)  # whose messages can be read without their names
_SHOWN = 3


def read_config(where: str) -> PreTrainedConfig:
    """The configuration of a model directory or hub id.

    Raises:
        HostError: there is none, or it has values that transformers cannot take.
    """
    try:
        config: Any = AutoConfig.from_pretrained(where)
    except Exception as error:  # a value of another type fails in whatever line meets it first
        raise HostError(
            f"no model configuration ({first_line(error)})",
            where=where,
            remedy=suspicion(where) or "give a directory with a config.json, or a hub id that can be reached",
        ) from error
    given = _given(where)
    for name in config.sub_configs:
        # transformers takes its default for the part, which is a model of billions of parameters
        if name in given and given[name] is None and getattr(config, name, None) is not None:
            raise HostError(f"{name} is null in its {_CONFIG}", where=where, remedy="restore what stood there")
    return config


def first_line(error: BaseException) -> str:
    """What an error says, in a line; transformers' messages run over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    if text and isinstance(error, _SPEAKING):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def suspicion(where: str) -> str | None:
    """A remedy that names values in the config.json of a directory which are of another kind than transformers' own."""
    given = _given(where)
    odd = sorted(_odd(given, ""), key=lambda field: field[1] is None) if given else []
    found = [f"{name} is {json.dumps(value)[:40]}" for name, value in odd]
    return f"look at its {_CONFIG}: {', '.join(found[:_SHOWN])}" if found else None


def _given(where: str) -> dict[str, Any]:
    """What stands in the config.json of a directory; empty for a hub id."""
    try:
        given = json.loads((Path(where) / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _odd(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Fields of a config (and the configs in it) whose values have another JSON type than the class's default has."""
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        yield f"{prefix}model_type", kind
        return
    try:
        usual = {**CONFIG_MAPPING[kind]().to_dict(), "dtype": "float32"}
    except Exception:  # not every class can be made of nothing
        return
    yield from _differing(given, usual, prefix)


def _differing(given: Mapping[str, Any], usual: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _odd(value, f"{prefix}{name}.")
        elif usual.get(name) is not None and not _alike(value, usual[name]):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and isinstance(usual.get(name), dict):
            yield from _differing(value, usual[name], f"{prefix}{name}.")


def _alike(value: Any, usual: Any) -> bool:
    """Whether both are of one JSON type; a whole number may stand for another."""
    if isinstance(usual, float):
        return type(value) in (int, float)
    return type(value) is (list if isinstance(usual, tuple) else type(usual))
