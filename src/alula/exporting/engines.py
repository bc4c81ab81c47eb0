"""Directories for other engines: what each asks for, looked at one by one, and written where nothing is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import __version__ as transformers_version

from alula.errors import AdapterError, HostError, UsageError
from alula.exporting import registries, stock
from alula.exporting.export import BASE, HOST, check_target, copy_model, directory_of, host_of
from alula.exporting.older import readable_before_5
from alula.exporting.plain import (
    countable,
    make_plain,
    names_in,
    obstacles,
    published_names,
    stock_classes,
    without_paths,
)
from alula.exporting.requirements import Requirement, Verdict
from alula.files import atomic_directory, read_json, telling, write_json
from alula.grafts.experts import export_lora
from alula.grafts.storage import CONFIG_FILE
from alula.hosts.placement import dtype_named
from alula.loading import load_model

Part = Literal["all", "text"]
_WORK = ".made"  # where the directory grows, inside the one that gets its name


@dataclass(frozen=True)
class Engine:
    """Who reads the directory.

    Attributes:
        name: as `--for` has it.
        source: of what it asks for.
        asks: looks at a plain directory, and at what stock transformers said of it (`stock.loaded`).
    """

    name: str
    source: str
    asks: Callable[[Path, Mapping[str, Any]], Iterator[Requirement]]


def export_for(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    engine: str,
    *,
    part: Part = "all",
    dtype: torch.dtype | str | None = None,
) -> Verdict:
    """Write a model as an engine takes it, after a look at everything the engine asks for.

    Args:
        source: directory of a host, a text LLM or a PEFT adapter, which is merged; for "peft" the adapter itself, or
            experts with ``tokens="seen"``, whose host comes along as ``host``.
        directory: made; a model that is there is replaced as a whole.
        engine: a name of `ENGINES`.
        part: "text": the decoder alone, as a causal language model.
        dtype: of the weights; by default the checkpoint's.

    Returns:
        What was asked for and met; `Requirement.met` is None for what only the engine could tell.

    Raises:
        UsageError: an engine or part that is none, a ``directory`` that `export_model` refuses. HostError: something is
            missing, named with its remedy; nothing is written then. HostError, AdapterError: see `alula.load_model`.
    """
    path, target = directory_of(source), Path(directory)
    check_target(path, target)
    with telling(target), atomic_directory(target) as partial:
        made = partial / _WORK
        verdict = _made(path, made, engine, part=part, dtype=dtype)
        if not verdict.accepted:
            missing = "; ".join(f"{each.what}: {each.found}" for each in verdict.unmet)
            remedies = dict.fromkeys(each.remedy for each in verdict.unmet if each.remedy)
            raise HostError(f"{engine} does not take it ({missing})", where=str(source), remedy="; ".join(remedies))
        for file in made.iterdir():
            file.rename(partial / file.name)
        made.rmdir()
    return verdict


def check_for(
    source: str | os.PathLike[str], engine: str, *, part: Part = "all", dtype: torch.dtype | str | None = None
) -> Verdict:
    """What `export_for` would say, of a copy that is made beside the model and dropped again.

    Raises:
        as `export_for`, but for what is missing, which is in the verdict.
    """
    path = directory_of(source)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".check-") as workplace:
        return _made(path, Path(workplace) / _WORK, engine, part=part, dtype=dtype)


def _made(path: Path, target: Path, name: str, *, part: str, dtype: torch.dtype | str | None) -> Verdict:
    engine = ENGINES.get(name)
    if engine is None:
        raise UsageError(f"{name!r} is no engine", where="--for", remedy=f"one of {', '.join(ENGINES)}")
    if part not in get_args(Part):
        raise UsageError(f"{part!r} is no part", where="--part", remedy=f"one of {', '.join(get_args(Part))}")
    dtype = dtype_named(dtype) if isinstance(dtype, str) else dtype
    if name == PEFT:
        if part != "all" or dtype is not None:
            raise UsageError("a LoRA is written as it is", where="--for peft", remedy="leave out --part and --dtype")
        return Verdict(name, engine.source, list(_lora(path, target)))
    found = obstacles(path)
    if not found and part == "all" and not (path / CONFIG_FILE).is_file():
        found = [each for each in stock_classes(path) if not each.met]
    if found:
        return Verdict(name, engine.source, found)
    try:
        make_plain(path, target, part=part, dtype=dtype)
    except AdapterError as error:
        return Verdict(name, engine.source, [Requirement("plain weights", False, error.message, error.remedy or "")])
    published_names(target)
    countable(target)
    without_paths(target)
    found = [*stock_classes(target), _before_5(target)]
    if all(each.met is not False for each in found):
        said = _in_fresh_process(target)
        found += _strict(said)
        if "error" not in said:
            found += engine.asks(target, said)
    return Verdict(name, engine.source, found)


def _before_5(target: Path) -> Requirement:
    alike = readable_before_5(target)
    return Requirement(
        "words read alike by transformers before 5",
        alike or None,
        "rope_theta and rope_scaling stand beside rope_parameters, the tokenizer's class is one of 4"
        if alike
        else "rope_parameters has what their keys cannot say",
        "take an engine that is built on transformers 5: vLLM 0.19.1 or later",
    )


def _in_fresh_process(*directories: Path) -> dict[str, Any]:
    """What a process without alula says of loading (`stock`)."""
    command = [sys.executable, "-I", stock.__file__, *map(str, directories)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": said}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _strict(said: Mapping[str, Any]) -> Iterator[Requirement]:
    what = f"transformers {transformers_version} alone loads it, strictly"
    if "error" in said:
        yield Requirement(what, False, said["error"], "look at its config.json and processor_config.json")
        return
    odd = {kind: said[kind] for kind in ("missing", "unexpected", "mismatched") if said[kind]}
    told = "; ".join(f"{len(names)} {kind}, the first {names[0]}" for kind, names in odd.items())
    yield Requirement(what, not odd, told or f"{said['class']}, every weight used and none missing")


def _ids(said: Mapping[str, Any]) -> Iterator[Requirement]:
    yield Requirement(
        "every token has an embedding",
        said["highest_id"] < said["rows"],
        f"ids to {said['highest_id']}, {said['rows']} embeddings",
        "save the host with resized embeddings, or the tokenizer it was trained with",
    )
    yield Requirement(
        "a chat template",
        said["template"],
        "there" if said["template"] else "none",
        "save chat_template.jinja beside the weights",
    )


def _for_transformers(path: Path, said: Mapping[str, Any]) -> Iterator[Requirement]:
    yield from _ids(said)
    if said["sees"]:
        yield _tokens_of_a_picture(said)


def _tokens_of_a_picture(said: Mapping[str, Any]) -> Requirement:
    count = said.get("image_tokens", 0)
    return Requirement(
        "the processor makes tokens of a picture",
        count > 0,
        f"{said['processor']}: {count} at {said['image_token']!r}",
        "save the processor the host was built with",
    )


def _for_vllm(path: Path, said: Mapping[str, Any]) -> Iterator[Requirement]:
    config = read_json(path / "config.json")
    name = said["class"]
    yield from _for_transformers(path, said)
    known = registries.VLLM_IMAGES if said["sees"] else registries.VLLM_TEXT
    against = [] if name in known else [f"{name} is not in its list"]
    if name == "LlavaForConditionalGeneration":
        against += [*_against_llava(config), *_against_pixels(config, said)]
    counts = not said["sees"] or said.get("counted") == said.get("image_tokens")
    if said["sees"] and not counts:
        told = said.get("counting") or f"{said.get('counted')} counted, {said.get('image_tokens')} made"
    else:
        told = "as many tokens counted as made" if said["sees"] else ""
    if not against:
        yield Requirement("a model class of vLLM's own", True, name)
    else:
        backend = bool(said["backend"]) and counts
        remedy = "serve it with --model-impl transformers" if backend else "--part text: its decoder alone"
        found = f"{'; '.join(against)}; " + (
            "its Transformers backend takes it (--model-impl transformers)"
            if backend
            else "nor does its Transformers backend take it"
            + ("" if said["backend"] else ": its attention does not go through transformers' interface")
        )
        yield Requirement("a model class of vLLM's own, or one for its Transformers backend", backend, found, remedy)
    if said["sees"]:
        yield Requirement(
            "the processor counts tokens without pictures (_get_num_multimodal_tokens; Transformers backend)",
            counts or not against or None,
            told,
            "" if counts else "only for --model-impl transformers",
        )
    if config.get("model_type") == "llava":
        sizes = _against_pixels(config, said)
        yield Requirement(
            "pictures of its tower's size (vision_config.image_size), which its LLaVA holds them to",
            not sizes or None,
            sizes[0] if sizes else "the processor makes them so",
            "only for --model-impl transformers; or save the processor with that size" if sizes else "",
        )
        odd = [each for each in names_in(path) if not each.startswith(_PUBLISHED)]
        yield Requirement(
            "weights under published names",
            not odd,
            odd[0] if odd else "language_model.*, vision_tower.*, multi_modal_projector.*",
        )
    dtype = config.get("dtype")
    yield Requirement(
        "a type of weights it computes in",
        dtype in ("float16", "bfloat16", "float32"),
        str(dtype),
        "--dtype bfloat16",
    )


_PUBLISHED = ("language_model.", "vision_tower.", "multi_modal_projector.")


def _against_llava(config: Mapping[str, Any]) -> list[str]:
    tower = (config.get("vision_config") or {}).get("model_type")
    decoder = ((config.get("text_config") or {}).get("architectures") or ["no architectures in text_config"])[0]
    found = []
    if tower not in registries.VLLM_LLAVA_TOWERS:
        found.append(f"its LLaVA has no tower {tower}")
    if not isinstance(config.get("vision_feature_layer"), int):
        found.append("its LLaVA reads one layer of the tower")
    if config.get("projector_hidden_act") not in registries.VLLM_ACTIVATIONS:
        found.append(f"it has no activation {config.get('projector_hidden_act')!r} for the connector")
    if decoder not in registries.VLLM_TEXT:
        found.append(f"decoder: {decoder} is not in its list")
    return found


def _against_pixels(config: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """Of towers whose positions are learned; Pixtral's takes any size."""
    vision = config.get("vision_config") or {}
    side = vision.get("image_size")
    odd = [tuple(each) for each in said.get("pixels", ()) if tuple(each) != (side, side)]
    if vision.get("model_type") == "pixtral" or not odd:
        return []
    return [f"its LLaVA wants {side} x {side} pixels, and the processor makes {odd[0][0]} x {odd[0][1]}"]


def _for_llama_cpp(path: Path, said: Mapping[str, Any]) -> Iterator[Requirement]:
    config = read_json(path / "config.json")
    text = config.get("text_config") or config
    name = said["class"]
    decoder = (
        name if not said["sees"] or name in registries.LLAMA_CPP_WHOLE else (text.get("architectures") or [name])[0]
    )
    yield from _ids(said)
    yield Requirement(
        "a decoder that convert_hf_to_gguf.py knows",
        decoder in registries.LLAMA_CPP_TEXT | registries.LLAMA_CPP_WHOLE,
        decoder,
        "none here: a decoder of another class is another model",
    )
    rope = (text.get("rope_parameters") or text.get("rope_scaling") or {}).get("rope_type", "default")
    yield Requirement("positions that it knows", rope in registries.LLAMA_CPP_ROPES, f"rope_type {rope}")
    yield from _vocabulary(path, decoder)
    yield _places(path, text)
    if said["sees"]:
        yield _projector(config, name)


def _vocabulary(path: Path, decoder: str) -> Iterator[Requirement]:
    file = path / "tokenizer.json"
    kind = read_json(file).get("model", {}).get("type") if file.is_file() else None
    if (path / "tokenizer.model").is_file():
        yield Requirement("a vocabulary that it reads", True, "tokenizer.model (SentencePiece)")
        return
    fits = kind == "BPE" and decoder not in registries.LLAMA_CPP_SENTENCEPIECE
    yield Requirement(
        "a vocabulary that it reads",
        fits,
        f"tokenizer.json ({kind})" if kind else "no tokenizer.json",
        "put the model's tokenizer.model beside it",
    )
    if fits:
        yield Requirement(
            "a pre-tokenizer that it knows",
            None,
            "the script goes by a hash of what the tokenizer makes of a text of its own",
            "run it: where it stops with 'BPE pre-tokenizer was not recognized', name yours in get_vocab_base_pre",
        )


def _places(path: Path, text: Mapping[str, Any]) -> Requirement:
    """Whether llama.cpp's own table of names (the package `gguf`) has a place for each of the decoder's weights."""
    what = "a place in GGUF for every weight of the decoder"
    try:
        import gguf
    except ImportError:
        return Requirement(what, None, "the package gguf is not here", "pip install gguf")
    kind = str(text.get("model_type"))
    wanted = _AS_LLAMA.get(kind, kind.removesuffix("_text").replace("_", ""))
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name.replace("-", "") == wanted), None)
    if arch is None:
        return Requirement(what, None, f"gguf names no architecture {wanted}", "run convert_hf_to_gguf.py")
    places = gguf.get_tensor_name_map(arch, int(text["num_hidden_layers"]))
    own = [name.removeprefix("language_model.") for name in names_in(path) if not _NOT_TEXT.match(name)]
    odd = [name for name in own if places.get_name(name, try_suffixes=(".weight", ".bias")) is None]
    return Requirement(what, not odd, f"{len(own)} of {arch.name}" if not odd else f"none for {odd[0]}")


_AS_LLAMA = {"mistral": "llama", "mixtral": "llama"}
_NOT_TEXT = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|visual)\.")


def _projector(config: Mapping[str, Any], name: str) -> Requirement:
    what = "a tower and connector that --mmproj takes"
    tower = (config.get("vision_config") or {}).get("model_type")
    if name not in registries.LLAMA_CPP_IMAGES:
        return Requirement(what, False, name, "--part text: words without pictures")
    if name == "LlavaForConditionalGeneration" and tower in registries.LLAMA_CPP_OLDER_TOWERS:
        return Requirement(
            what,
            None,
            f"of LLaVA, --mmproj takes Pixtral's tower alone; {tower} and its connector are for an older script, "
            f"{registries.LLAMA_CPP_OLDER}, which was not tried",
            "try that script; where it does not take them, --part text: words without pictures",
        )
    if name == "LlavaForConditionalGeneration" and tower not in registries.LLAMA_CPP_LLAVA_TOWERS:
        return Requirement(
            what,
            False,
            f"of LLaVA it takes Pixtral's tower alone, and this is {tower}",
            "--part text: words without pictures",
        )
    return Requirement(what, True, f"{name} with {tower}")


def _lora(path: Path, target: Path) -> Iterator[Requirement]:
    """Write a LoRA, with its host where that is here, and say what there is to say of both."""
    facts = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    kind = facts.get("alula_type")
    if not facts:
        yield Requirement("a LoRA", False, "a model without an adapter", "--for transformers")
        return
    if kind is not None:
        settings = facts.get("config") or {}
        if kind != "experts" or settings.get("tokens") != "seen" or settings.get("rank") is None:
            told = kind if kind != "experts" else f"experts of {settings.get('tokens')!r}, rank {settings.get('rank')}"
            yield Requirement(
                "a change of weights for all tokens of a request",
                False,
                f"{told} acts on some tokens and not on others",
                "train experts with tokens: seen and a rank, or serve it with alula",
            )
            return
        export_lora(load_model(path).model, target, name=str(facts.get("name")))
    else:
        target.mkdir()
        copy_model(path, target, hosts=False)
    settings = read_json(target / CONFIG_FILE)
    settings.pop("alula_policies", None)
    is_lora = settings.get("peft_type") == "LORA"
    yield Requirement("a LoRA", is_lora, str(settings.get("peft_type")), "alula merge, or --for transformers")
    if not is_lora:
        return
    host = host_of(path)
    if host is not None:
        (target / HOST).mkdir()
        copy_model(host, target / HOST)
        settings[BASE] = HOST
    write_json(target / CONFIG_FILE, settings)
    if policies := [each for each in obstacles(path) if "policy" in each.found]:
        yield from policies
        return
    if host is None:
        yield Requirement("weights that fit the host", None, f"{settings.get(BASE)} is on the hub", "load it once")
    else:
        classes = stock_classes(target / HOST)
        yield from classes
        if all(each.met for each in classes):
            yield from _strict(_in_fresh_process(target, target / HOST))
    whole = settings.get("modules_to_save")
    yield Requirement(
        "for vLLM (--lora-modules): no modules beside the LoRA",
        not whole or None,
        ", ".join(whole) if whole else "none",
        "alula export --for vllm merges them, or serve it by PEFT" if whole else "",
    )
    yield from _loras_of_vllm(target, settings)
    if kind is not None:
        yield Requirement(
            "for vLLM: put on requests with pictures alone",
            None,
            "--default-mm-loras '{\"image\": DIRECTORY}'",
            "words before the first picture are changed too, where alula leaves them alone",
        )


def _loras_of_vllm(target: Path, settings: Mapping[str, Any]) -> Iterator[Requirement]:
    """What vLLM refuses, or reads as if it were not there (lora/peft_helper.py)."""
    wanted = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    odd = [name for name, plain in wanted.items() if settings.get(name) not in (None, plain)]
    yield Requirement(
        "for vLLM: one rank and one scale for all matrices, and nothing but these",
        not odd or None,
        f"{', '.join(odd)}: refused there, or left out of account" if odd else "so it is",
        "alula export --for vllm merges it" if odd else "",
    )
    away = sorted({name for name in names_in(target) if "vision_tower" in name or "multi_modal_projector" in name})
    yield Requirement(
        "for vLLM: matrices of the decoder",
        not away or None,
        f"{len(away)} of the tower or connector, the first {away[0]}" if away else "all of them",
        "alula export --for vllm merges it; vLLM puts a LoRA on the decoder, unless told otherwise" if away else "",
    )
    rank = int(settings.get("r") or 0)
    if rank > _VLLM_RANK:
        yield Requirement("for vLLM: a rank that it makes room for", None, f"rank {rank}", f"--max-lora-rank {rank}")


_VLLM_RANK = 16
"""the largest rank without `--max-lora-rank`"""
PEFT = "peft"
ENGINES: Mapping[str, Engine] = {
    each.name: each
    for each in (
        Engine("vllm", registries.VLLM_SOURCE, _for_vllm),
        Engine("llama.cpp", registries.LLAMA_CPP_SOURCE, _for_llama_cpp),
        Engine("transformers", f"transformers {transformers_version}, as installed", _for_transformers),
        Engine(
            PEFT, "PEFT, as installed; vLLM's page on LoRA adapters and lora/peft_helper.py, read 2026-11-28", _for_vllm
        ),
    )
}
"""the engines a model can be exported for, by name"""
