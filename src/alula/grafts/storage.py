"""Adapter directories: config + safetensors, tied to the base they were trained on, loaded strictly or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alula import plugins
from alula._version import __version__
from alula.anatomy import Anatomy, unwrap
from alula.errors import AdapterError, PathError, UsageError
from alula.files import (
    atomic_directory,
    check_replaceable,
    recovered,
    regular,
    regular_files,
    telling,
    write_json,
    write_text,
)
from alula.grafts.base import Graft, check_keys, check_values
from alula.grafts.lifecycle import attach, check_name, get
from alula.grafts.registry import graft_types, kind_of
from alula.seam import NAME, POLICIES, declared

_log = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SAMPLE = 1024  # elements per tensor that enter a fingerprint
_FACTS: dict[str, type] = {
    "name": str,
    "base_model_name_or_path": str,
    "base_class": str,
    "base_fingerprint": str,
    "base_parts": dict,
    "base_vocabulary": int,
    "modules": list,
    "config": dict,
    POLICIES: dict,
}
_SINCE = ("base_parts", "base_vocabulary", POLICIES)  # which adapters of earlier versions do not have
_JSON = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    modules: Sequence[str] = (),
    processor: Any = None,
) -> Path:
    """Write one graft of `model` as an adapter directory.

    Args:
        model: the host with the graft attached.
        directory: made; an adapter that is there is replaced as a whole, once the new content is complete.
        name: of the graft; the only one by default.
        base: hub id or directory of the host; taken from `model.config` by default. A local directory is recorded
            relative to the adapter, so both can move together. Without one (a host just built, and not saved) the
            adapter can be put on a host by `load`, but `load_model` does not know which.
        modules: paths of host modules that were trained beside the graft and belong to it, e.g.
            "model.multi_modal_projector".
        processor: saved beside the weights when given.

    Raises:
        UsageError: no such graft or module; ``directory`` holds a whole model, such as the host, an adapter of another
            kind, or other things.
    """
    graft, host, directory = get(model, name), unwrap(model), Path(directory)
    weights = {f"graft.{key}": value for key, value in graft.state_dict().items()}
    weights |= {f"host.{key}": value for key, value in _module_weights(host, modules).items()}
    base = str(base or getattr(host, "name_or_path", "") or "")
    if not base:
        _log.warning(
            "%s: the adapter names no host, so load_model cannot load it by itself; save the host (save_host) and name "
            "its directory as base=",
            directory,
        )
    facts = {
        "alula_type": graft.config.graft_type,
        "alula_version": __version__,
        "name": graft.name,
        "base_model_name_or_path": _portable(base, directory),
        "base_class": type(host).__name__,
        "base_fingerprint": fingerprint(model),
        "base_parts": _part_fingerprints(host, modules),
        "base_vocabulary": _vocabulary(host),
        "modules": list(modules),
        "config": graft.config.to_dict(),
        POLICIES: declared(host.config, POLICIES),
    }
    check_adapter_replaceable(directory, graft.config.graft_type)
    with atomic_directory(directory) as partial:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in weights.items()}, partial / WEIGHTS_FILE, {"format": "pt"}
        )
        write_json(partial / CONFIG_FILE, facts)
        write_text(partial / "README.md", _card(facts, graft))
        if processor is not None:
            processor.save_pretrained(partial)
    return directory


def check_adapter_replaceable(directory: Path, kind: str) -> None:
    """Refuse to write an adapter over anything but an earlier one of its kind.

    Args:
        kind: what the adapter's configuration names as its ``alula_type`` or ``peft_type``.

    Raises:
        PathError: something else stands there.
    """
    check_replaceable(directory)
    held = None
    if (directory / "config.json").is_file():
        held = "a whole model"
    elif (directory / CONFIG_FILE).is_file():
        try:
            facts = json.loads((directory / CONFIG_FILE).read_bytes())
            there = facts.get("alula_type") or facts["peft_type"]
            held = None if there == kind else f"another adapter ({str(there).lower()}, this one is {kind.lower()})"
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            held = "an adapter of which nothing is known"
    if held is not None:
        raise PathError(f"holds {held}, which would be lost", where=str(directory), remedy="name another directory")


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    check_base: bool = True,
    **settings: Any,
) -> Graft:
    """Attach the graft stored in `directory` to `model`, strictly.

    Args:
        model: the host it was trained on.
        name: to attach under another name than the stored one.
        check_base: refuse a decoder, tower, projector or head whose weights are not those the adapter was trained on.
        settings: in place of those it was saved with, of those that weights do not depend on: ``cache="keys"``.

    Raises:
        UsageError: a setting that cannot be changed, or a value the graft refuses.
        AdapterError: not an adapter directory, a damaged file, another base, or any weight missing, unused, of another
            shape, or not a finite floating-point number. The model is left as it was.
    """
    directory = Path(directory)
    facts = read_config(directory)
    weights = _read_weights(directory / WEIGHTS_FILE)
    where = str(directory)
    kind = type(unwrap(model)).__name__
    if facts["modules"] and facts["base_class"] != kind:
        raise AdapterError(
            f"it holds {', '.join(facts['modules'])} of a {facts['base_class']}, and this is a {kind}",
            where=where,
            remedy="load it into the host it was trained on (save that with save_host and name it as base)",
        )
    if check_base:
        _check_base(unwrap(model), facts, where)
    stored_name = facts["name"]
    try:
        expected = _module_weights(unwrap(model), facts["modules"])
        kind_of_graft = kind_of(facts["alula_type"])
        assert kind_of_graft is not None  # `read_config` has seen to it
        config = kind_of_graft.config.from_dict(facts["config"])
        check_name(stored_name)
        Anatomy.of(model).layer_indices(getattr(config, "layers", None))
    except UsageError as error:
        raise AdapterError(
            error.message,
            where=": ".join(filter(None, (str(directory / CONFIG_FILE), error.where))),
            remedy=error.remedy or "load it into the base and with the version of alula it was saved with",
        ) from error
    if settings:
        for given in settings:
            if given not in config.free:
                raise UsageError(
                    f"{given!r} is not a setting that can be changed while loading",
                    remedy=f"those its weights do not depend on: {', '.join(config.free)}",
                )
        config = type(config)(**{**config.to_dict(), **settings})
    stored = {key.removeprefix("host."): value for key, value in weights.items() if key.startswith("host.")}
    check_keys(expected, stored, where=where)
    check_values(expected, stored, where=where)
    graft = attach(model, config, name or stored_name)
    try:
        grafted = {key.removeprefix("graft."): value for key, value in weights.items() if not key.startswith("host.")}
        with torch.no_grad():
            graft.load_state_dict(config.with_current_names(grafted, where=where), where=where)
            for key, value in expected.items():
                value.copy_(stored[key])
    except BaseException:
        graft.detach()
        raise
    return graft


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of an adapter directory.

    Raises:
        AdapterError: missing or unreadable config, or not one of alula's adapters.
    """
    path = Path(directory) / CONFIG_FILE
    facts = read_facts(directory)
    if kind_of(facts.get("alula_type")) is None:
        legal = f"alula_type must be one of: {', '.join(graft_types())}; or install the package of that graft"
        raise AdapterError(
            "not an alula adapter" + (", but PEFT's" if "peft_type" in facts else ""),
            where=str(path),
            remedy="alula.load_model takes it, with its base" if "peft_type" in facts else legal,
        )
    for name, kind in _FACTS.items():
        if name not in facts and name not in _SINCE:
            raise AdapterError(f"it lacks {name!r}", where=str(path), remedy="save the adapter again")
        check_fact(facts, name, kind, where=str(path))
    for name, kind in (("modules", str), ("base_parts", str), (POLICIES, dict)):
        given = facts.get(name, ())
        if not all(isinstance(each, kind) for each in (given.values() if isinstance(given, dict) else given)):
            raise AdapterError(
                f"{name!r} holds what is not {_JSON[kind]}", where=str(path), remedy="save the adapter again"
            )
    return facts


def check_fact(facts: Mapping[str, Any], name: str, kind: type, *, where: str, optional: bool = False) -> None:
    """Raise an AdapterError if `facts` have a value under `name` that is not of `kind` (nor null, if `optional`)."""
    value = facts.get(name)
    if name not in facts or (optional and value is None):
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AdapterError(
            f"{name!r} must be {_JSON[kind]}, and is {json.dumps(value)[:80]}",
            where=where,
            remedy="save the adapter again, or write there what belongs there",
        )


def read_facts(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter config of a directory, alula's or PEFT's, as it is written.

    Raises:
        AdapterError: missing or unreadable. FilesError: a pipe or device stands in place of a file.
    """
    path = recovered(directory) / CONFIG_FILE
    if path.parent.is_dir():
        regular_files(path.parent)
    if not path.exists():
        lacking = f"no {CONFIG_FILE} there" if path.parent.exists() else "no such directory"
        raise AdapterError(lacking, where=str(directory), remedy="name an adapter directory")
    try:
        with telling(path):
            facts = json.loads(regular(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not readable as JSON: {error}", where=str(path), remedy="save the adapter again") from None
    if not isinstance(facts, dict):
        raise AdapterError("not a JSON object", where=str(path), remedy="save the adapter again")
    return facts


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def fingerprint(model: nn.Module) -> str:
    """A hash of the decoder's weights: every tensor's name, shape and an even sample of its values.

    The values enter rounded to bfloat16, so that a host loaded in float32 or bfloat16 has one fingerprint. Grafts and
    PEFT adapters on the decoder do not count.
    """
    return digest_of(own_weights(Anatomy.of(model).decoder))


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """A host module's weights by its own names: without grafts, without PEFT's adapters and trained copies."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in module.state_dict().items()
        if f"{NAME}." not in name and "lora_" not in name and ".modules_to_save." not in name
    }


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """A hash of tensors: every one's name, shape and an even sample of its values, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _SAMPLE)]
        digest.update(picked.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _part_fingerprints(host: nn.Module, without: Sequence[str]) -> dict[str, str]:
    """A `fingerprint` of each part of a host beside its decoder, leaving out the modules `without`."""
    anatomy = Anatomy.of(host)
    paths = {id(module): f"{name}." for name, module in host.named_modules(remove_duplicate=False)}
    parts = {
        "vision tower": anatomy.tower,
        "audio tower": anatomy.audio_tower,
        "projector": anatomy.projector,
        "language-model head": anatomy.head,
    }
    roots = {paths[id(module)]: part for part, module in parts.items() if module is not None}
    skipped = [paths[id(anatomy.decoder)], *(f"{path}." for path in without)]
    if anatomy.head is not None and anatomy.head.weight is anatomy.embeddings.weight:
        skipped.append(paths[id(anatomy.head)])  # tied: it counts with the decoder
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in own_weights(host).items():
        if not name.startswith(tuple(skipped)):
            root = next((root for root in roots if name.startswith(root)), "")
            found.setdefault(roots.get(root, "other parts"), {})[name.removeprefix(root)] = value
    return {part: digest_of(weights) for part, weights in found.items()}


def _vocabulary(host: nn.Module) -> int:
    """Tokens of the token embeddings."""
    embeddings: Any = Anatomy.of(host).embeddings
    return int(embeddings.weight.shape[0])


def _check_base(host: nn.Module, facts: Mapping[str, Any], where: str) -> None:
    """Raise an AdapterError unless `host` has the weights that the adapter of `facts` was trained on."""
    kind, base = type(host).__name__, facts.get("base_model_name_or_path") or "unknown"
    tokens = facts.get("base_vocabulary", _vocabulary(host))
    if tokens != _vocabulary(host):
        raise AdapterError(
            f"it was trained on a base with {tokens} token embeddings, and this {kind} has {_vocabulary(host)} "
            f"(base: {base})",
            where=where,
            remedy="save the host it was trained on, resized as it was, by save_host and name its directory as base",
        )
    if facts["base_fingerprint"] != fingerprint(host):
        if Anatomy.of(host).embeddings.weight.dtype == torch.float16:
            raise AdapterError(
                f"what float16 left of this {kind}'s weights does not tell whether it is the base (base: {base})",
                where=where,
                remedy="load both in float32 or bfloat16 (--dtype)",
            )
        raise AdapterError(
            f"it was trained on other weights than this {kind} has (base: {base})",
            where=where,
            remedy="load it into the base it names, or pass check_base=False if you know better",
        )
    here = _part_fingerprints(host, facts["modules"])
    for part, mark in facts.get("base_parts", {}).items():
        if here.get(part) != mark:
            raise AdapterError(
                f"it was trained with another {part} than this {kind} has (base: {base})",
                where=where,
                remedy="load it into the base it names; a part that was trained beside the graft has to be named when "
                "saving, modules=[...]; or pass check_base=False if you know better",
            )


def _module_weights(host: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in modules:
        try:
            module = host.get_submodule(path)
        except AttributeError:
            near = get_close_matches(path, [name for name, _ in host.named_modules()], n=1)
            raise UsageError(
                f"{type(host).__name__} has no module {path!r}",
                remedy=f"did you mean {near[0]!r}?" if near else "name one of model.named_modules()",
            ) from None
        found |= {f"{path}.{key}": value for key, value in module.state_dict().items()}
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise AdapterError("the weights are missing", where=str(path), remedy="copy the whole directory")
    try:
        return load_file(regular(path))
    except SafetensorError as error:
        raise AdapterError(
            f"damaged weights: {error}", where=str(path), remedy="copy or save the adapter again"
        ) from None


def _portable(base: str, directory: Path) -> str:
    if base in plugins.names(plugins.MODELS):  # whatever directory of that name is here
        return base
    path = Path(base)
    return os.path.relpath(path.resolve(), directory.resolve()) if base and path.is_dir() else base


def _card(facts: dict[str, Any], graft: Graft) -> str:
    settings = "\n".join(f"| {key} | {value} |" for key, value in facts["config"].items())
    return (
        f"---\nlibrary_name: alula\ntags: [alula, {facts['alula_type']}, multimodal]\n---\n\n"
        f"# {facts['name']}: a {facts['alula_type']} adapter for `{facts['base_model_name_or_path'] or 'its base'}`\n\n"
        f"{sum(p.numel() for p in graft.parameters()):,} trainable parameters"
        + (f" in {len(graft.layers)} layers" if graft.layers else "")
        + (f", and the host's {', '.join(facts['modules'])}" if facts["modules"] else "")
        + '.\n\n```python\nimport alula\n\nmodel, processor = alula.load_model("this/directory")\n```\n\n'
        f"| setting | value |\n|---|---|\n{settings}\n"
    )
