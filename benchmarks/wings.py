"""What Wings costs: the host alone, with LoRA, with Wings, and Wings as naively written, side by side.

    python benchmarks/wings.py                                     # everything, resuming where it stopped
    python benchmarks/wings.py --only 0.5b/decode --rounds 3       # one part; --list names them all
    python benchmarks/wings.py --device cuda                       # the 7B shape in bfloat16
    python benchmarks/wings.py --shrink --rounds 1 --output x.json # the same code on tiny decoders, anywhere
    python benchmarks/wings.py --table                             # the committed figures as Markdown
    git worktree add rival 614ab685
    python benchmarks/wings.py --only 0.5b/prefill-4096 --rival rival --output y.json   # beside another build

In every round each contender runs once, right after the other; figures are ratios within rounds, given as the median
and the extremes over rounds. On CPU one thread runs and the clock is the process's CPU time, so that neighbours on the
machine disturb caches and memory but are not billed. Rounds are saved one by one: killing this loses at most one.

All contenders share the host's weights, random unless it is the fledgling. One image stands behind 14 tokens of text.

- host: the decoder alone. Its training step is what tuning a projector costs: gradients down to the input tokens.
- lora: PEFT, on all linear layers, at the rank of the learners.
- mass, attention: alula's Wings with both learners in all layers, routed by attention mass or by position.
- keys: mass, with `cache="keys"`: keys kept in place of their factors. Only where a cache is read.
- sdpa: the fused attention kernel alone, called as the learners call it, layer by layer. Only where prompts are read.
- naive: `naive_wings.py`; every matrix materialised, nothing cached.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import rival
import torch
import transformers
import wings_floor
from naive_wings import NaiveWings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

import alula
import alula_fledgling as fledgling
from alula.files import write_json
from alula.grafts import Graft, lifecycle
from alula.seam import TokenCache, find
from alula.seam.cache import GraftCacheLayer
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.training.environment import readable_environment

CACHE = cache_keyword()

RESULTS = Path(__file__).parent / "results" / "wings-speed.json"
CONTENDERS = ("host", "lora", "mass", "attention", "keys", "sdpa", "naive")
WINGS = ("mass", "attention", "keys")
IMAGE_START = 14
DECODED = 16  # steps per timing of decoding
GENERATED = 256

_QWEN = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "max_position_embeddings": 32768}


@dataclass(frozen=True)
class Plan:
    """One decoder: its configuration, the learners' rank, tokens per image, and the tokens of a training batch."""

    config: Callable[[], PreTrainedConfig]
    rank: int
    image_tokens: int
    train: tuple[int, int]
    accelerated: bool  # measured where there is an accelerator, else on the CPU
    dtype: torch.dtype
    naive_stride: int  # naive generation times every n-th step and integrates between


def _fledgling() -> PreTrainedConfig:
    return transformers.AutoConfig.from_pretrained(fledgling.directory() / "llm")


def _half_billion() -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **_QWEN,
    )


def _seven_billion() -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        **_QWEN,
    )


PLANS = {
    "fledgling": Plan(_fledgling, 16, 25, (8, 160), False, torch.float32, 1),
    "0.5b": Plan(_half_billion, 64, 729, (1, 512), False, torch.float32, 64),
    "7b": Plan(_seven_billion, 64, 729, (1, 2048), True, torch.bfloat16, 1),
}
WORKLOADS = ("prefill-256", "prefill-1024", "prefill-4096", "decode", "train", "generate")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, two thin layers."""
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 2
    config.num_attention_heads, config.num_key_value_heads, config.vocab_size = 4, 2, 512
    config.layer_types = config.layer_types[:2]
    return config


# -- contenders -------------------------------------------------------------------------------------------------------


class Bench:
    """One decoder on its device, and its contenders, built when they are first used."""

    def __init__(self, name: str, device: str, dtype: torch.dtype | None, *, shrink: bool) -> None:
        self.plan, self.shrink, self.device = PLANS[name], shrink, device
        config = self.plan.config()
        dtype = self.plan.dtype if dtype is None else dtype
        torch.manual_seed(0)
        if name == "fledgling" and not shrink:
            self.host: Any = AutoModelForCausalLM.from_pretrained(fledgling.directory() / "llm", dtype=dtype)
        else:
            with torch.device(self.device):
                config = shrunk(config) if shrink else config
                self.host = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.host = self.host.to(self.device).requires_grad_(False).eval()
        self.host.generation_config.eos_token_id = None
        config = self.host.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.head_dim = head_dim
        self.shape = wings_floor.Shape(
            config.hidden_size,
            config.num_hidden_layers,
            heads,
            config.num_key_value_heads,
            head_dim,
            self.plan.rank,
            itemsize=dtype.itemsize,
            weight_size=torch.float32.itemsize,  # a graft's own, whatever the host is in
        )
        self._models: dict[str, Any] = {}

    @torch.inference_mode(mode=False)  # whoever comes first: what is made inside could never be trained
    def model(self, contender: str) -> Any:
        """The contender's model; all of them share the host's weights."""
        if contender not in self._models:
            # a deep copy in which every weight is the host's own tensor
            shared = {id(tensor): tensor for tensor in (*self.host.parameters(), *self.host.buffers())}
            model = self.completed(copy.deepcopy(self.host, shared), contender)
            self._models[contender] = model.to(self.device).eval()
        return self._models[contender]

    def completed(self, model: Any, contender: str) -> Any:
        """A copy of the host with what makes it the contender."""
        match contender:
            case "lora":
                config = peft.LoraConfig(r=self.plan.rank, target_modules="all-linear", init_lora_weights=False)
                return peft.get_peft_model(model, config)
            case "mass" | "attention":
                self.awaken(alula.attach(model, alula.WingsConfig(rank=self.plan.rank, router=contender)))
            case "keys":
                self.awaken(alula.attach(model, alula.WingsConfig(rank=self.plan.rank, cache="keys")))
            case "naive":
                return NaiveWings(model, self.graft("mass").state_dict(), "mass")
        return model

    def graft(self, contender: str) -> Graft:
        return lifecycle.get(self.model(contender))

    def awaken(self, graft: Graft) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in graft.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def size(self, number: int, least: int = 32) -> int:
        """A number of tokens or samples: a part of it, and no fewer than `least`, where all is tiny."""
        return max(least, number // 32) if self.shrink else number

    @property
    def train_size(self) -> tuple[int, int]:
        """Samples and tokens of a training batch."""
        batch, tokens = self.plan.train
        return self.size(batch, least=1), self.size(tokens)

    def kinds(self, tokens: int) -> Tensor:
        """(tokens,) 1 at image tokens."""
        kinds = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        kinds[IMAGE_START : IMAGE_START + self.image_tokens(tokens)] = 1
        return kinds

    def image_tokens(self, tokens: int) -> int:
        return min(self.plan.image_tokens, tokens // 2)

    def ids(self, tokens: int, batch: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(3, 500, (batch, tokens), generator=generator).to(self.device)

    def run(self, contender: str, tokens: int, batch: int = 1, **inputs: Any) -> Any:
        """A forward over a prompt of `tokens` tokens."""
        kinds = self.kinds(tokens)
        if contender == "naive":
            inputs.pop("use_cache", None)
            return self.model(contender)(kinds, **inputs)
        if find(self.model(contender)) is not None:
            inputs["token_map"] = alula.TokenMap.from_modalities(kinds.expand(batch, -1))
        return self.model(contender)(**inputs)


# -- workloads --------------------------------------------------------------------------------------------------------


def prefill(bench: Bench, contender: str, tokens: int) -> tuple[Callable[[], Any], int]:
    """A prompt into an empty cache, to its last logits."""
    ids = bench.ids(tokens)

    @torch.inference_mode()
    def once() -> Any:
        return bench.run(contender, tokens, input_ids=ids, logits_to_keep=1)

    return once, 1


def attention_alone(bench: Bench, tokens: int, batch: int = 1, *, train: bool = False) -> Callable[[], Any]:
    """The attention of the learners of all layers and nothing else: `tokens` tokens with one image, both learners."""
    images, heads = bench.image_tokens(tokens), bench.shape.width // bench.shape.head_dim
    texts = tokens - images

    def random_tokens(count: int) -> Tensor:
        shape = (batch, count, heads, bench.shape.head_dim)
        return torch.randn(shape, device=bench.device, dtype=bench.host.dtype).transpose(1, 2).requires_grad_(train)

    text, image, opening, closing = (random_tokens(n) for n in (texts, images, IMAGE_START, texts - IMAGE_START))
    # queries and keys: the tokens of either kind themselves; the image the text before it; the text behind it the image
    pairs = ((text, text, True), (image, opening, False), (image, image, True), (closing, image, False))

    def once() -> None:
        with torch.set_grad_enabled(train):
            for _ in range(bench.shape.layers):
                outs = [scaled_dot_product_attention(q, k, k, is_causal=causal) for q, k, causal in pairs]
                if train:
                    torch.autograd.backward(outs, outs)

    return once


def decode(bench: Bench, contender: str, tokens: int) -> tuple[Callable[[], Any], int]:
    """Steps of one token behind `tokens` cached ones; the naive form has no cache and recomputes."""
    count = bench.size(DECODED, least=2)
    new_ids = bench.ids(count)
    if contender == "naive":
        return prefill(bench, contender, tokens + 1)
    with torch.inference_mode():
        cache = cache_of_output(bench.run(contender, tokens, input_ids=bench.ids(tokens), logits_to_keep=1))
    model = bench.model(contender)

    @torch.inference_mode()
    def steps() -> Any:
        for i in range(count):
            model(input_ids=new_ids[:, i : i + 1], **{CACHE: cache})
        cache.crop(-count)
        return cache

    return steps, count


def train(bench: Bench, contender: str) -> tuple[Callable[[], Any], int]:
    """Forward, backward and optimizer step; input tokens need gradients, as behind a projector in training."""
    batch, tokens = bench.train_size
    model = bench.model(contender)
    trained = [] if contender == "host" else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    labels = bench.ids(tokens, batch)
    embedded = bench.host.get_input_embeddings()(labels).detach()

    def step() -> None:
        model.train()
        leaf = embedded.clone().requires_grad_()
        bench.run(contender, tokens, batch, inputs_embeds=leaf, labels=labels, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.eval()

    return step, 1


def generate(bench: Bench, contender: str) -> tuple[Callable[[], Any], int]:
    """`GENERATED` tokens behind a prompt of as many, greedily, through `generate`."""
    tokens, new = bench.size(GENERATED), bench.size(GENERATED, least=4)
    model, ids = bench.model(contender), bench.ids(tokens)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def whole() -> Any:
        seam = find(model)
        if seam is None:
            return model.generate(input_ids=ids, **options)
        with seam.given_tokens(alula.TokenMap.from_modalities(bench.kinds(tokens)[None])):
            return model.generate(input_ids=ids, **options)

    return whole, 1


def _time_naive_generation(bench: Bench, clock: Callable[[], float]) -> float:
    """Seconds of `GENERATED` recomputations, from every n-th of them and straight lines between."""
    tokens, new = bench.size(GENERATED), bench.size(GENERATED, least=4)
    lengths = sorted({*range(tokens, tokens + new, bench.plan.naive_stride), tokens + new - 1})
    seconds = []
    for length in lengths:
        ids = bench.ids(length)
        kinds = bench.kinds(tokens).new_zeros(length)
        kinds[:tokens] = bench.kinds(tokens)
        model = bench.model("naive")
        begin = clock()
        with torch.inference_mode():
            int(model(kinds, input_ids=ids, logits_to_keep=1).logits.argmax())
        seconds.append(clock() - begin)
    return float(np.interp(range(tokens, tokens + new), lengths, seconds).sum())


def contenders_of(workload: str) -> tuple[str, ...]:
    """Who takes part."""
    left_out = {"decode": {"sdpa"}, "generate": {"lora", "sdpa"}}.get(workload, {"keys"})
    return tuple(contender for contender in CONTENDERS if contender not in left_out)


def task_of(bench: Bench, workload: str, contender: str) -> tuple[Callable[[], Any], int]:
    """What to run, and how many units (forwards, steps, generations) one run is."""
    if contender == "sdpa":
        batch, tokens = bench.train_size if workload == "train" else (1, tokens_of(bench, workload))
        return attention_alone(bench, tokens, batch, train=workload == "train"), 1
    if workload.startswith("prefill-"):
        return prefill(bench, contender, tokens_of(bench, workload))
    if workload == "decode":
        return decode(bench, contender, bench.size(1024))
    return train(bench, contender) if workload == "train" else generate(bench, contender)


def tokens_of(bench: Bench, workload: str) -> int:
    """The tokens of a prompt that is read."""
    return bench.size(int(workload.removeprefix("prefill-")))


# -- measuring --------------------------------------------------------------------------------------------------------


def clock_of(device: str) -> Callable[[], float]:
    def synchronized() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else synchronized


def time_round(bench: Bench, workload: str, tasks: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, float]:
    """Seconds per unit of every contender, one after the other."""
    clock, seconds = clock_of(bench.device), {}
    for contender, (task, units) in tasks.items():
        if workload == "generate" and contender == "naive":
            seconds[contender] = _time_naive_generation(bench, clock)
            continue
        if workload == "generate":  # long enough not to be repeated for a warm-up
            begin = clock()
            task()
            seconds[contender] = clock() - begin
            continue
        timer = Timer("task()", globals={"task": task}, timer=clock, num_threads=torch.get_num_threads())
        seconds[contender] = timer.blocked_autorange(min_run_time=0 if bench.shrink else 0.2).median / units
    return seconds


def measure_machine(bench: Bench) -> dict[str, float]:
    """The rates floors are counted against: matrix multiplication and reading memory."""
    clock, place = clock_of(bench.device), {"device": bench.device, "dtype": bench.host.dtype}
    size, numbers = (64, 2**16) if bench.shrink else (1024, 2**26) if bench.device == "cpu" else (8192, 2**30)
    a, b = (torch.randn(size, size, **place) for _ in range(2))
    big = torch.ones(numbers, **place)
    best = {}
    for name, task, amount in (
        ("flops_per_second", lambda: a @ b, 2 * size**3),
        ("bytes_per_second", lambda: big.sum(), big.nbytes),
    ):
        times = []
        for _ in range(5):
            begin = clock()
            task()
            times.append(clock() - begin)
        best[name] = amount / min(times)
    return best


def measure_peak(bench: Bench, workload: str, contender: str) -> int:
    """Bytes at the peak of one run, above what stood before it (weights included in what stood).

    On CPU it is the resident memory of a child process of its own, which has handed all free memory back before.
    """
    if bench.device != "cpu":
        _warm(bench, contender)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task_of(bench, workload, contender)[0]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reader, writer = os.pipe()
    child = os.fork()  # one thread, so that a fork is safe; the weights are shared with the child
    if child == 0:
        try:
            os.write(writer, str(_peak_of_this_process(bench, workload, contender)).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    if not told:
        raise SystemExit(f"the peak of {contender} in {workload} could not be measured (see above); try --no-memory")
    return int(told)


def _peak_of_this_process(bench: Bench, workload: str, contender: str) -> int:
    _warm(bench, contender)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = _resident("VmRSS")
    task_of(bench, workload, contender)[0]()
    return _resident("VmHWM") - before


def _warm(bench: Bench, contender: str) -> None:
    bench.model(contender)
    with torch.inference_mode():
        bench.run(contender, 32, input_ids=bench.ids(32))


def _resident(field: str) -> int:
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith(field))
    return int(line.split()[1]) * 1024


def cache_bytes(cache: Any) -> dict[str, int]:
    """Bytes of a cache by owner: the host's keys and values, tokens shared by the learners, their factors."""

    def size(*tensors: Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    sizes = {"host": 0, "rows": 0, "facts": 0, "factors": 0}
    for layer in cache.layers:
        if isinstance(layer, GraftCacheLayer):
            sizes["factors"] += size(layer.keys, layer.values)
        elif isinstance(layer, TokenCache):
            sizes["rows"] += size(layer.keys)
            sizes["facts"] += size(layer.values)
        else:
            sizes["host"] += size(layer.keys, layer.values)
    return sizes


def agreement(bench: Bench) -> float:
    """Largest difference of naive from fused logits over 96 tokens, relative to the largest logit."""
    ids = bench.ids(96)
    with torch.inference_mode():
        ours, theirs = (bench.run(c, 96, input_ids=ids).logits.float() for c in ("mass", "naive"))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def floor_of(bench: Bench, workload: str) -> dict[str, wings_floor.Floor]:
    """What the learners must do in this workload."""
    if workload.startswith("prefill-"):
        tokens = tokens_of(bench, workload)
        return {"floor": wings_floor.prefill(bench.shape, tokens, IMAGE_START, bench.image_tokens(tokens))}
    if workload == "train":
        batch, tokens = bench.train_size
        return {"floor": wings_floor.training_step(bench.shape, tokens, IMAGE_START, bench.image_tokens(tokens), batch)}
    if workload == "decode":
        past = bench.size(1024)
        return {f"floor, {kept} kept": wings_floor.decode(bench.shape, past, kept) for kept in ("factors", "keys")}
    return {}


# -- records ----------------------------------------------------------------------------------------------------------


def summarize(record: dict[str, Any], floors: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Medians, ratios within rounds and, where there is one, measured cost of the learners over the floor."""
    rounds = record["rounds"]
    summary: dict[str, Any] = {"seconds": {c: statistics.median(r[c] for r in rounds) for c in rounds[0]}}
    for base in ("host", "lora"):
        if base in rounds[0]:
            summary[f"over {base}"] = {
                c: dict(zip(("median", "least", "most"), _spread([r[c] / r[base] for r in rounds]), strict=True))
                for c in rounds[0]
                if c != base
            }
    for name, floor in floors.items():
        seconds = floor.seconds(**rates)
        extra = {c: summary["seconds"][c] - summary["seconds"]["host"] for c in rounds[0] if c in WINGS}
        summary[name] = {
            "flops": floor.flops,
            "bytes": floor.bytes,
            "seconds": seconds,
            "floor over host": seconds / summary["seconds"]["host"],
            "measured over floor": {c: value / seconds for c, value in extra.items()},
        }
    return summary


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def processor() -> str:
    names = [li for li in Path("/proc/cpuinfo").read_text().splitlines() if li.startswith("model name")]
    return names[0].split(":")[1].strip() if names else "unknown"


def run_part(name: str, workload: str, records: dict[str, Any], args: argparse.Namespace, bench: Bench) -> None:
    """Add the rounds that are missing, saving after each."""
    key = f"{name}/{workload}"
    record = records["parts"].setdefault(key, {"rounds": []})
    here = {"device": bench.device, "dtype": str(bench.host.dtype).removeprefix("torch.")}
    if record["rounds"] and (there := record.get("place", {"device": "cpu", "dtype": "float32"})) != here:
        raise SystemExit(f"{args.output}: {key} was measured on {there}, not {here}: name another --output, or --again")
    record["place"] = here
    contenders = [c for c in contenders_of(workload) if c not in args.without]
    if record["rounds"] and {*record["rounds"][0]} != {*contenders}:
        raise SystemExit(f"{args.output}: {key} holds other contenders: name another --output, or --again")
    peaks = record.setdefault("peak bytes", {})
    for contender in contenders:
        if workload != "generate" and not args.no_memory and contender not in (*peaks, "sdpa"):
            peaks[contender] = measure_peak(bench, workload, contender)
            write_json(args.output, records)
            print(key, "peak bytes", json.dumps(peaks), flush=True)
    floors = floor_of(bench, workload)
    if len(record["rounds"]) < args.rounds:
        tasks = {
            c: (lambda: None, 1) if workload == "generate" and c == "naive" else task_of(bench, workload, c)
            for c in contenders
        }
        if workload == "decode":
            record["cache bytes"] = {c: cache_bytes(tasks[c][0]()) for c in ("host", *WINGS)}
            record["learner memory by the formula"] = wings_floor.learner_memory(bench.shape)
        while len(record["rounds"]) < args.rounds:
            record["rounds"].append(time_round(bench, workload, tasks))
            record["environment"] = {
                **readable_environment(),
                "processor": processor(),
                "threads": str(torch.get_num_threads()),
            }
            record["rates"] = measure_machine(bench)
            record["summary"] = summarize(record, floors, record["rates"])
            write_json(args.output, records)
            print(key, f"round {len(record['rounds'])}:", json.dumps(record["summary"].get("over host")), flush=True)


def table(records: dict[str, Any]) -> str:
    """The record as a Markdown table of ratios."""
    lines = ["| part | " + " | ".join(CONTENDERS[1:]) + " | over LoRA: mass, attention | floor over host |"]
    lines.append("|---" * (len(CONTENDERS) + 2) + "|")
    for key, record in records["parts"].items():
        if not record["rounds"]:
            continue
        summary = record["summary"]
        cells = [_cell(summary["over host"].get(c)) for c in CONTENDERS[1:]]
        lora = summary.get("over lora", {})
        floors = [f"{v['floor over host']:.3f}" for k, v in summary.items() if k.startswith("floor")]
        cells += [", ".join(_cell(lora.get(c)) for c in ("mass", "attention")) if lora else "", " / ".join(floors)]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def command_line(text: str, part: str, rounds: int, results: Path) -> argparse.ArgumentParser:
    """The options of a benchmark in parts, which is described by `text`.

    Args:
        part: named as an example.
        rounds: by default.
        results: where its record is.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu: fledgling and 0.5b; an accelerator such as cuda: 7b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the decoder's own")
    parser.add_argument("--only", action="append", default=[], help=f"parts whose name starts so, e.g. {part}")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds each part shall have in the end")
    parser.add_argument("--again", action="store_true", help="forget the chosen parts' earlier figures")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--shrink", action="store_true", help="tiny decoders, all three: checks this script, not speed")
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--table", action="store_true", help="print the record as Markdown and stop")
    return parser


def chosen(args: argparse.Namespace, workloads: Iterable[str]) -> list[tuple[str, str]]:
    """The parts (decoder, workload) that the options name."""
    names = [n for n, plan in PLANS.items() if args.shrink or plan.accelerated == (args.device != "cpu")]
    parts = [(n, w) for n in names for w in workloads]
    return [(n, w) for n, w in parts if not args.only or any(f"{n}/{w}".startswith(o) for o in args.only)]


def beside_rival(args: argparse.Namespace) -> dict[str, Any]:
    """What Wings takes of the host, of this build over a rival; LoRA, of no build, tells how still the machine was."""
    options = ["--no-memory", *(["--shrink"] if args.shrink else [])]
    options += [word for part in args.only for word in ("--only", part)]

    def over_host(record: Any) -> dict[str, dict[str, float]]:
        return {
            part: {contender: ratio["median"] for contender, ratio in each["summary"]["over host"].items()}
            for part, each in record["parts"].items()
        }

    found = rival.beside("wings.py", args.rival, args.rounds, options, over_host, ("host", "lora", *WINGS))
    return {
        "command": " ".join(["python", "benchmarks/wings.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "rounds": args.rounds,
        "build over rival": found,
    }


def main() -> None:
    parser = command_line(__doc__, "0.5b/prefill", 5, RESULTS)
    others = [contender for contender in CONTENDERS if contender not in ("host", *WINGS)]
    parser.add_argument(
        "--without", action="append", default=[], choices=others, help="a contender that is left out; naive is slow"
    )
    parser.add_argument("--rival", type=Path, help="a checkout of another build, measured beside this one (rival.py)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rival is not None:
        rival.refuse_idle(parser, args, "only")
        write_json(args.output, beside_rival(args))
        return
    records = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    if args.table:
        print(table(records))
        return
    dtype = getattr(torch, args.dtype) if args.dtype else None
    parts = chosen(args, WORKLOADS)
    if args.list:
        print("\n".join("/".join(part) for part in parts))
        return
    benches: dict[str, Bench] = {}
    for name, workload in parts:
        if args.again:
            records["parts"].pop(f"{name}/{workload}", None)
        if name not in benches:
            benches = {name: Bench(name, args.device, dtype, shrink=args.shrink)}  # one decoder in memory at a time
            records.setdefault("agreement of naive and fused logits", {})[name] = agreement(benches[name])
        run_part(name, workload, records, args, benches[name])


if __name__ == "__main__":
    main()
