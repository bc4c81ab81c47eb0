"""A model as a plain directory: of stock classes, weights under the names that published checkpoints have."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from alula.anatomy import HostParts
from alula.coding import decode, is_coded
from alula.errors import HostError
from alula.exporting.export import copy_model, host_of
from alula.exporting.merge import merge_model
from alula.exporting.requirements import Requirement
from alula.files import read_json, write_json
from alula.grafts.storage import CONFIG_FILE
from alula.hosts.host import tokenizer_of
from alula.hosts.quiet import quiet_loading
from alula.loading import load_model
from alula.seam import DECLARED, POLICIES

INDEX = "model.safetensors.index.json"
# towers that transformers' releases before 5.6 had in a module more, as published checkpoints and other engines have it
_WRAPPED = {"clip_vision_model", "siglip_vision_model"}
_PROBE = 12


def obstacles(path: Path) -> list[Requirement]:
    """What keeps a model from being plain, told by its files: everything that no stock class does."""
    found = []
    adapter = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    host = (host_of(path) if adapter else path) or path
    config = read_json(host / "config.json") if (host / "config.json").is_file() else {}
    if kind := adapter.get("alula_type"):
        found.append(
            Requirement(
                "every token passes the same weights",
                False,
                f"{kind} acts on some tokens and not on others, which no change of weights does",
                "serve it with alula; experts with tokens: seen are a LoRA (--for peft)",
            )
        )
    grafts = sorted(config.get(DECLARED) or {})
    if grafts:
        found.append(
            Requirement(
                "every token passes the same weights",
                False,
                f"its weights hold the graft {', '.join(grafts)}",
                "serve it with alula, or save the host alone: alula.load_model, then save_host",
            )
        )
    policies = sorted({**(config.get(POLICIES) or {}), **(adapter.get(POLICIES) or {})})
    if policies:
        found.append(
            Requirement(
                "every layer computes every token",
                False,
                f"it was saved with the policy {', '.join(policies)}, which takes work from some tokens",
                "save it without: alula.load_model(..., policies={}), then save_host",
            )
        )
    return found


def stock_classes(path: Path) -> list[Requirement]:
    """Whether configuration classes are transformers' own, told by config.json."""
    config = read_json(path / "config.json")
    parts = {"": config, **{name: each for name, each in config.items() if isinstance(each, dict)}}
    found = []
    for name, each in parts.items():
        kind = each.get("model_type")
        if isinstance(kind, str) and (kind not in CONFIG_MAPPING or _is_ours(kind)):
            where = f"{name}: " if name else ""
            found.append(
                Requirement(
                    "classes of stock transformers",
                    False,
                    f"{where}{kind} is a class of alula's" if kind in CONFIG_MAPPING else f"{where}{kind} is unknown",
                    "--part text: its decoder alone is a stock model",
                )
            )
    if config.get("auto_map"):
        found.append(Requirement("no code in the directory", False, "auto_map names code", "remove auto_map"))
    return found or [Requirement("classes of stock transformers", True, str(config.get("model_type")))]


def make_plain(path: Path, target: Path, *, part: str, dtype: torch.dtype | str | None) -> Path:
    """Write what `obstacles` finds nothing against.

    Args:
        path: a host, a text LLM, or a PEFT adapter, which is merged.
        target: made.
        part: "all", or "text": the decoder as a causal language model.
        dtype: of the weights; by default their own.

    Raises:
        AdapterError, HostError: it cannot be merged, or has no decoder that is a causal language model.
    """
    if part == "text":
        write_text_part(path, target, dtype=dtype)
    elif (path / CONFIG_FILE).is_file():
        merge_model(path, target, dtype=dtype)
    elif dtype is not None:
        model, processor = load_model(path, dtype=dtype)
        _save(model, processor, target)
    elif is_coded(path):
        decode(path, target)
    else:
        target.mkdir()
        copy_model(path, target)
    return target


def write_text_part(path: Path, target: Path, *, dtype: torch.dtype | str | None) -> None:
    """The decoder of a host as a causal language model of its own; a LoRA is merged into it.

    Raises:
        HostError: transformers has no such class, or it does not compute the host's own text logits.
    """
    model, processor = load_model(path, dtype=dtype)
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        model = tuner.merge_and_unload(safe_merge=True)
    parts = HostParts.of(model)
    if type(parts.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HostError(f"transformers has no causal model of {parts.config.model_type!r}", where=str(path))
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(parts.config)]
    config = copy.deepcopy(parts.config)
    config.architectures = [kind.__name__]
    state = {f"{kind.base_model_prefix}.{name}": value for name, value in parts.decoder.state_dict().items()}
    tied = parts.head is None or parts.head.weight is parts.embeddings.weight
    if parts.head is not None and not tied:
        state["lm_head.weight"] = parts.head.get_parameter("weight")
    config.tie_word_embeddings = tied
    with quiet_loading():
        causal, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=parts.embeddings.weight.dtype, output_loading_info=True
        )
    causal.generation_config = copy.deepcopy(parts.host.generation_config)
    ids = torch.arange(_PROBE)[None] % len(tokenizer_of(processor))
    with torch.no_grad():
        same = torch.equal(causal.eval()(input_ids=ids).logits, parts.host(input_ids=ids).logits)
    if info["missing_keys"] or info["unexpected_keys"] or not same:
        raise HostError(
            f"its decoder alone, as a {kind.__name__}, does not compute what the host computes of text",
            where=str(path),
            remedy="export the whole of it",
        )
    tokenizer = tokenizer_of(processor)
    tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    _save(causal, tokenizer, target)


def published_names(directory: Path) -> bool:
    """Give the weights of a LLaVA model the names of its published checkpoints, which every release reads; whether any
    was another.

    transformers 5.6 took a module out of CLIP and SigLIP towers; it reads both, and other engines the published one.
    """
    config = read_json(directory / "config.json")
    if config.get("model_type") != "llava":
        return False
    tower = (config.get("vision_config") or {}).get("model_type")
    inside = "vision_model." if tower in _WRAPPED else ""
    rules = {
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        rf"^(?:model\.)?vision_tower\.(?!{inside or '$'})": f"vision_tower.{inside}",
        r"^model\.vision_tower\.": "vision_tower.",
        r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    }
    changed = False
    for file in sorted(directory.glob("*.safetensors")):
        changed |= _rename(file, rules)
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        index["weight_map"] = {_renamed(name, rules): file for name, file in index["weight_map"].items()}
        write_json(directory / INDEX, index)
    return changed


def countable(directory: Path) -> bool:
    """Have a `LlavaProcessor` count the tokens of a picture: it reads the crop size, which SigLIP's processor has not.

    No picture is cropped by it (`do_center_crop` stays off). Whether anything was written.
    """
    file = directory / "processor_config.json"
    said = read_json(file) if file.is_file() else {}
    images = said.get("image_processor")
    if said.get("processor_class") != "LlavaProcessor" or not isinstance(images, dict) or images.get("crop_size"):
        return False
    size = images.get("size") or {}
    if not {"height", "width"} <= size.keys() or images.get("do_center_crop"):
        return False
    write_json(file, {**said, "image_processor": {**images, "crop_size": size, "do_center_crop": False}})
    return True


def without_paths(directory: Path) -> None:
    """Take out of a config where its parts once lay on the disk of who made it."""
    file = directory / "config.json"

    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: clean(each) for name, each in value.items() if name != "_name_or_path"}

    config = read_json(file)
    if clean(config) != config:
        write_json(file, clean(config))


def names_in(directory: Path) -> list[str]:
    """Names of all weights in a directory."""
    found: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found += weights.keys()
    return found


def _is_ours(kind: str) -> bool:
    return CONFIG_MAPPING[kind].__module__.partition(".")[0] != "transformers"


def _save(model: Any, processor: Any, target: Path) -> None:
    with quiet_loading():
        model.save_pretrained(target)
        processor.save_pretrained(target)


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, new in rules.items():
        name, count = re.subn(pattern, new, name)
        if count:
            break
    return name


def _rename(file: Path, rules: Mapping[str, str]) -> bool:
    weights = load_file(file)
    named = {_renamed(name, rules): value for name, value in weights.items()}
    if named.keys() == weights.keys():
        return False
    save_file(named, file, {"format": "pt"})
    return True
