"""How many kernels a decoder layer launches, and what makes the host wait, with whatever can be attached to it.

    python benchmarks/launches.py            # writes benchmarks/results/launches.json
    python benchmarks/launches.py --check    # counts again; fails where a count is above the committed one
    python benchmarks/launches.py --table    # the committed counts as Markdown

Kernels, copies and waits are counted, not timed (`meter.py`), on thin decoders on the CPU: counts depend neither on
width nor on the device, but on the dtype, since adapters are kept in float32: that of the fledgling is float32, all
others are counted in bfloat16. Two depths tell what a layer costs from what a forward costs once. One image stands
behind 14 tokens of text; "ragged" is a padded batch of three samples: images that stand elsewhere, and none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from highlight import Marks
from meter import Counts, Meter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, Qwen2Config
from wings import PLANS

import alula
import policies
from alula.files import write_json
from alula.grafts import ExpertsConfig, MKS2Config
from alula.grafts.aim import FUSED, FUSED_AT
from alula.policies import Budget, ParallelAttention, Prune, Skip, Withdraw
from alula.probes import watch
from alula.seam import find, taps
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.tokens import CONDITIONS
from alula.training.environment import readable_environment
from probes import PROBES

RESULTS = Path(__file__).parent / "results" / "launches.json"
CACHE = cache_keyword()
DEPTHS = 4, 6
SEAM = "seam alone"
NOTHING = "nothing asked"
"""the seam on a host, for somebody who asks nothing of it"""
DTYPES = {
    "fledgling": torch.float32,
    "7b": torch.bfloat16,
    "probes": torch.bfloat16,
    "pictures": torch.bfloat16,
}
WITH_PICTURES = ("probes", "pictures")
"""sections whose base is a host that reads pictures; of the others it is a decoder alone"""
RANK = 8
IMAGE_START, IMAGE, TOKENS = 14, 120, 256
LINEARS = ("attention", "mlp")


def _wings(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: alula.attach(model, alula.WingsConfig(rank=RANK, **settings))


def _experts(tokens: str) -> Callable[[Any], Any]:
    return lambda model: alula.attach(model, ExpertsConfig(tokens=tokens, rank=RANK, targets=LINEARS))  # type: ignore[arg-type]


def _mks2(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: alula.attach(model, MKS2Config(rank=RANK, **settings))


GRAFTS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    ),
    "Wings (mass)": _wings(),
    "Wings (attention)": _wings(router="attention", router_tokens=2 * TOKENS),
    "Wings (keys kept)": _wings(cache="keys"),
    "experts (image)": _experts("image"),
    "experts (seen)": _experts("seen"),
    "experts (both)": _experts("both"),
    "MKS2 (mix)": _mks2(),
    "MKS2 (parallel)": _mks2(lora="parallel"),
    "MKS2 (modality)": _mks2(route="modality"),
    "MKS2 (store)": _mks2(mode="store"),
    "AIM": lambda model: alula.attach(model, alula.AimConfig()),
}
FUSED_TOKENS = 100
"""of each prompt, of which AIM is given every second one"""
HIGHLIGHTS: dict[str, dict[str, Any]] = {"highlight (shift)": {"guidance": 1}, "highlight (guidance)": {}}
ON_PICTURES = ("plain", "browse", "browse (told)")
"""a host as it is; one that browses; one whose conditions are told, so that it need not"""
STAGES = ((1, 0.5), (2, 0.25), (3, 0.125))
POLICIES = {
    NOTHING: None,
    "Withdraw": Withdraw(layer=2),
    "Withdraw (dense)": Withdraw(layer=2, positions="dense"),
    "Prune": Prune(stages=[(2, 0.5)]),
    "Prune in stages": Prune(stages=STAGES),
    "PyramidDrop": Prune(
        stages=STAGES, criterion={"name": "last_query_attention", "of_layer": "itself"}, positions="dense"
    ),
    "Budget": Budget(image_tokens=30),
    "Skip (MLP)": Skip(part="mlp"),
    "Skip (block)": Skip(part="block"),
    "Skip (frozen)": Skip(part="block", keys="own"),
    "Skip (steps)": Skip(part="block", tokens="all", when="steps"),
    "parallel attention": ParallelAttention(),
}


def decoder(shape: str, layers: int, dtype: torch.dtype) -> Any:
    """A thin decoder of that many layers: as the fledgling's, or Qwen2 as at 7B, seven query heads to a key head."""
    torch.manual_seed(0)
    if shape == "7b":
        config: Any = Qwen2Config(
            vocab_size=512,
            hidden_size=112,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=7,
            num_key_value_heads=1,
        )
    else:
        config = PLANS[shape].config()
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:1] * layers
        config.hidden_size, config.head_dim, config.intermediate_size = 48, 16, 96
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def modalities(*, ragged: bool) -> Tensor:
    """(B, tokens) 0 text, 1 image, -1 padding."""
    found = torch.zeros(3 if ragged else 1, TOKENS, dtype=torch.int64)
    found[0, IMAGE_START : IMAGE_START + IMAGE] = 1
    if ragged:
        found[1, 40 : 40 + IMAGE] = 1
        found[1, -9:] = found[2, -30:] = -1
    return found


def _inputs(model: Any, kinds: Tensor) -> dict[str, Any]:
    ids = torch.arange(kinds.numel()).view(kinds.shape) % 400
    inputs: dict[str, Any] = {"input_ids": ids}
    if (kinds < 0).any():
        inputs["attention_mask"] = (kinds >= 0).to(torch.int64)
    if find(model) is not None:
        inputs["token_map"] = alula.TokenMap.from_modalities(kinds)
    return inputs


def _fused(model: Any, samples: int) -> dict[str, Any]:
    """What AIM is given with a prompt; nothing where it is not attached."""
    if "AimGraft" not in {type(graft).__name__ for graft in alula.grafts_of(model).values()}:
        return {}
    fused = torch.randn(samples, FUSED_TOKENS, model.config.hidden_size, dtype=model.dtype)
    return {FUSED: fused, FUSED_AT: (torch.arange(FUSED_TOKENS) % 2 == 0).expand(samples, -1)}


def prompt_and_step(model: Any, *, ragged: bool = False) -> dict[str, Counts]:
    """What a prompt asks, and then the second step of decoding: the first makes what those behind it find."""
    inputs = _inputs(model, modalities(ragged=ragged))
    given = _fused(model, len(inputs["input_ids"]))
    inputs |= given
    step: dict[str, Any] = {"input_ids": inputs["input_ids"][:, :1], **given}
    with torch.no_grad():  # inference mode shows operators whole that then split up
        with Meter() as prompt:
            cache = cache_of_output(model(**inputs, logits_to_keep=1))
        for place in (1, 2):
            if "attention_mask" in inputs:
                step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, place), value=1)
            with Meter() as after:
                model(**step, **{CACHE: cache})
    if ragged:
        return {"ragged prompt": prompt.counts, "ragged step": after.counts}
    return {"prompt": prompt.counts, "step": after.counts}


def _learnt(ids: Tensor, is_image: Tensor) -> Tensor:
    """Labels of what is text and not predicted from an image, whose tokens policies take out."""
    behind = torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return ids.masked_fill(is_image | behind, -100)


def training_step(model: Any) -> dict[str, Counts]:
    """What a forward and a backward ask, the optimizer left out; input tokens need gradients, as behind a projector."""
    kinds = modalities(ragged=False)
    inputs = _inputs(model, kinds)
    ids = inputs.pop("input_ids")
    labels = _learnt(ids, kinds == 1)
    inputs |= {name: value.requires_grad_(name == FUSED) for name, value in _fused(model, len(ids)).items()}
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()
    with Meter() as meter:
        model(inputs_embeds=embeds, labels=labels, use_cache=False, **inputs).loss.backward()
    model.eval()
    return {"training step": meter.counts}


def of_graft(shape: str, name: str, layers: int, dtype: torch.dtype) -> dict[str, Counts]:
    """A decoder with a graft or an adapter attached; the host's own without a name that is known."""
    model = decoder(shape, layers, dtype)
    attach = GRAFTS.get(name)
    attached = model if attach is None else attach(model)
    model = attached if name == "LoRA" else model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return {**prompt_and_step(model), **prompt_and_step(model, ragged=True), **training_step(model)}


def of_policy(shape: str, name: str, layers: int, dtype: torch.dtype) -> dict[str, Counts]:
    """A decoder under a policy; None: nothing but the seam."""
    model, policy = decoder(shape, layers, dtype), POLICIES[name]
    with policies.idle(model) if policy is None else policy.on(model):
        return {**prompt_and_step(model), **prompt_and_step(model, ragged=True), **training_step(model)}


def of_highlight(shape: str, name: str, layers: int, dtype: torch.dtype) -> dict[str, Counts]:
    """A decoder of whose prompt a quarter is highlighted."""
    model = decoder(shape, layers, dtype)
    with alula.highlight(model, Marks(TOKENS), spans="all", **HIGHLIGHTS[name]):
        return prompt_and_step(model)


def pictured(layers: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA host with a thin decoder, and a batch of two prompts with a picture each."""
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=511)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    ids = torch.arange(96).view(2, 48) % 400 + 3
    ids[:, 6:22] = config.image_token_id
    pixels = torch.randn(2, 3, 32, 32).to(dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def of_probes(name: str, layers: int, dtype: torch.dtype) -> dict[str, Counts]:
    """A host while probes watch it: none, one, or all five; or nothing but the seam, which tells what tokens are."""
    model, batch = pictured(layers, dtype)
    chosen = PROBES if name == "all five" else {key: value for key, value in PROBES.items() if key == name}
    watched: Any = watch(model, [make() for make in chosen.values()]) if chosen else contextlib.nullcontext()
    if name == SEAM:
        watched = taps(model, ["block_input"], lambda event: None)
    mask, ids = batch["attention_mask"], batch["input_ids"]
    labels = _learnt(ids, ids == model.config.image_token_id)
    with watched:
        with torch.no_grad():
            model(**batch, use_cache=False)  # what is found out once, of the first batch
            with Meter() as prompt:
                model(**batch, use_cache=False)
            cache = cache_of_output(model(**batch, logits_to_keep=1))
            for place in (1, 2):
                longer = torch.nn.functional.pad(mask, (0, place), value=1)
                with Meter() as step:
                    model(input_ids=ids[:, :1], attention_mask=longer, **{CACHE: cache})
        model.train()
        with Meter() as training:
            model(**batch, labels=labels, use_cache=False).loss.backward()
    return {"prompt": prompt.counts, "step": step.counts, "training step": training.counts}


def of_pictures(name: str, layers: int, dtype: torch.dtype) -> dict[str, Counts]:
    """A host that reads pictures, and what reads them once more."""
    model, batch = pictured(layers, dtype)
    model.requires_grad_(False)
    given = dict[str, Any]()
    if name != "plain":
        alula.attach(model, alula.BrowseConfig())
    if name == "browse (told)":
        given[CONDITIONS] = torch.randn(len(batch["input_ids"]), model.config.text_config.hidden_size)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad(), Meter() as prompt:
        cache = cache_of_output(model(**batch, **given, logits_to_keep=1))
    with torch.no_grad():
        for place in (1, 2):
            longer = torch.nn.functional.pad(mask, (0, place), value=1)
            with Meter() as step:
                model(input_ids=ids[:, :1], attention_mask=longer, **{CACHE: cache})
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    with Meter() as training:
        model(**batch, **given, labels=ids, use_cache=False).loss.backward()
    return {"prompt": prompt.counts, "step": step.counts, "training step": training.counts}


def split(shallow: Counts, deep: Counts, layers: tuple[int, int]) -> dict[str, float]:
    """What each further layer asks, and what a forward asks beside its layers."""
    steps = layers[1] - layers[0]
    pairs = {
        "launches": (shallow.total, deep.total),
        "copies": (shallow.copies, deep.copies),
        "waits": (shallow.waits, deep.waits),
    }
    found = {}
    for name, (few, many) in pairs.items():
        per_layer = (many - few) / steps
        found[f"{name} a layer"] = round(per_layer, 2)
        found[f"{name} a forward"] = round(few - layers[0] * per_layer, 2)
    return found


Job = tuple[str, str, Callable[[int], dict[str, Counts]]]


def jobs() -> Iterator[Job]:
    """(section, name, what counts it at a number of layers)."""
    for shape in ("fledgling", "7b"):
        for name in ("host", *GRAFTS):
            yield shape, name, lambda layers, s=shape, n=name: of_graft(s, n, layers, DTYPES[s])
        for name in POLICIES:
            yield shape, name, lambda layers, s=shape, n=name: of_policy(s, n, layers, DTYPES[s])
        for name in HIGHLIGHTS:
            yield shape, name, lambda layers, s=shape, n=name: of_highlight(s, n, layers, DTYPES[s])
    for name in ON_PICTURES:
        yield "pictures", name, lambda layers, n=name: of_pictures(n, layers, DTYPES["pictures"])
    for name in ("plain", SEAM, *PROBES, "all five"):
        yield "probes", name, lambda layers, n=name: of_probes(n, layers, DTYPES["probes"])


def count(only: str | None) -> dict[str, Any]:
    """Everything: by section, by what is attached, by workload."""
    found: dict[str, Any] = {}
    for section, name, at in jobs():
        if only not in (None, section):
            continue
        few, many = (at(layers) for layers in DEPTHS)
        found.setdefault(section, {})[name] = {
            workload: split(few[workload], many[workload], DEPTHS) for workload in few
        }
        print(f"  {section}: {name}", file=sys.stderr)
    return found


def above(found: Any, committed: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What is counted more often than is committed, or is not committed at all."""
    for name, value in found.items():
        here = (*path, name)
        known = committed.get(name)
        if known is None:
            yield f"{', '.join(here)}: not committed"
        elif isinstance(value, dict):
            yield from above(value, known, here)
        elif value > known:
            yield f"{', '.join(here)}: {value:g}, committed {known:g}"


def table(counts: dict[str, Any]) -> str:
    """Launches a layer over the host's own, as Markdown."""
    lines = []
    for section, contenders in counts.items():
        base = "plain" if section in WITH_PICTURES else "host"
        workloads = list(contenders[base])
        lines += [f"| {section} | " + " | ".join(workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
        for name, by_workload in contenders.items():
            cells = []
            for workload in workloads:
                if workload not in by_workload:
                    cells.append("")
                    continue
                own, host = by_workload[workload], contenders[base][workload]
                more = own["launches a layer"] - (0 if name == base else host["launches a layer"])
                cells.append(f"{more:g}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a count is above the committed one")
    parser.add_argument("--table", action="store_true", help="print the committed counts over the host's")
    parser.add_argument(
        "--only", choices=tuple(DTYPES), help="count one section; the others are left out of the record"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text())["counts"]))
        return
    torch.set_num_threads(1)
    found = count(options.only)
    if options.check:
        more = list(above(found, json.loads(RESULTS.read_text())["counts"]))
        print("\n".join(more))
        sys.exit(1 if more else 0)
    record = {
        "command": " ".join(["python", "benchmarks/launches.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "dtypes": {section: str(dtype).removeprefix("torch.") for section, dtype in DTYPES.items()},
        "counts": found,
    }
    write_json(options.output, record)
    print(table(found))


if __name__ == "__main__":
    main()
