"""Files of transformers 5 that its fourth version reads as well, which other engines still build on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from alula.files import read_json, write_json

_CONFIG = "config.json"
_TOKENIZER = "tokenizer_config.json"
_NEW_CLASS = "TokenizersBackend"
_OLD_CLASS = "PreTrainedTokenizerFast"
_OF_A_LOAD = ("backend", "is_local", "local_files_only")
"""what the fifth version keeps of the call that loaded a tokenizer"""
_APART = ("rope_theta", "partial_rotary_factor")
"""parameters of rotary positions that have keys of their own in the fourth"""


def readable_before_5(directory: Path) -> bool:
    """Put what transformers 4 looks for beside what transformers 5 has written; whether it reads the same there.

    The base and scaling of rotary positions stand in ``rope_parameters`` since 5, which 4 does not know: it would take
    its own default, and compute other numbers without a word. Its tokenizers are of another class, and keep special
    tokens that only a model has by name, not as a list. What the installed release reads stays what it was: a change
    after which it does not is taken back.
    """
    _tokenizer(directory / _TOKENIZER)
    return _rotary(directory / _CONFIG)


def _rotary(file: Path) -> bool:
    before = read_json(file)
    config = copy.deepcopy(before)
    for part in _parts(config):
        part.update(_of_4(part["rope_parameters"]))
    if config == before:
        return True
    known = AutoConfig.from_pretrained(file.parent).to_dict()
    write_json(file, config)
    read = AutoConfig.from_pretrained(file.parent).to_dict()
    if any(read.get(name) != value for name, value in known.items()):
        write_json(file, before)
        return False
    return True


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and those in it, as far as they have rotary positions."""
    if isinstance(config.get("rope_parameters"), dict):
        yield config
    for each in config.values():
        if isinstance(each, dict):
            yield from _parts(each)


def _of_4(rope: dict[str, Any]) -> dict[str, Any]:
    """Keys of the fourth version, of one kind of layers or of full and sliding ones (Gemma-3)."""
    if "full_attention" in rope:
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        return {**_of_4(rope["full_attention"]), **({} if local is None else {"rope_local_base_freq": local})}
    found = {name: rope[name] for name in _APART if rope.get(name) is not None}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in rope.items() if name not in _APART}
    return found


def _tokenizer(file: Path) -> None:
    if not file.is_file():
        return
    said = {name: value for name, value in read_json(file).items() if name not in _OF_A_LOAD}
    if said.get("tokenizer_class") == _NEW_CLASS:
        said["tokenizer_class"] = _OLD_CLASS
    extra = said.get("extra_special_tokens")
    if isinstance(extra, list):
        said["extra_special_tokens"] = said.pop("model_specific_special_tokens", {})
        if extra:
            said["additional_special_tokens"] = extra
    write_json(file, said)
