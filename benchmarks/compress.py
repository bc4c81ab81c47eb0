"""What compression saves: on the clock beside what is counted, on disk, and what it takes in memory.

    python benchmarks/compress.py                    # writes benchmarks/results/compress.json
    python benchmarks/compress.py --device cuda      # on an accelerator: a decoder of 7B widths in bfloat16
    python benchmarks/compress.py --shrink --rounds 1 --output x.json   # the same code on little, anywhere

The model as it was and what was made of it take turns in one process, as `policies.py` has it: on a CPU processor
seconds of one thread, a ratio is the median over rounds of the ratio within a round. What is counted are
multiplications of matrices in the decoder's layers, attention as all pairs of tokens. Zeros are expected to save
nothing, and are timed to say so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from alula.allocator import keep_freed_memory
from alula.compress import Removal, WeightPruning, encode, prune, remove
from alula.files import write_json
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.training.environment import readable_environment
from policies import ratio, timed

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SHARES = (0.5, 0.7)
"""of weights that are zero, on disk"""
PARTS = ("memory", "disk", "clock")


def decoder(device: str, dtype: torch.dtype | None, *, shrink: bool) -> tuple[Any, str]:
    """A random decoder of eight layers: 0.5B widths in float32 on a CPU, 7B widths in bfloat16 elsewhere."""
    torch.manual_seed(0)
    big = device != "cpu" and not shrink
    shape = (3584, 18944, 28, 4) if big else (64, 96, 4, 2) if shrink else (896, 4864, 14, 2)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = Qwen2Config(vocab_size=1024, num_hidden_layers=8, **dict(zip(names, shape, strict=True)))
    dtype = dtype or (torch.bfloat16 if big else torch.float32)
    with torch.device(device):
        model: PreTrainedModel = Qwen2ForCausalLM(config).to(dtype).eval()
    what = "7B widths" if big else "tiny widths" if shrink else "0.5B widths"
    return model, f"random decoder of 8 layers of {what}, vocabulary of 1,024"


def arms(model: Any) -> dict[str, Any]:
    """What is made of the model, by name. Which parts go does not matter here: no data."""
    made = {name: copy.deepcopy(model) for name in ("mlp", "heads", "blocks", "all", "zeros", "2:4")}
    remove(made["mlp"], Removal(mlp=0.25, method="magnitude"))
    remove(made["heads"], Removal(heads=0.5, method="magnitude"))
    remove(made["blocks"], Removal(blocks=2, method="magnitude"))
    remove(made["all"], Removal(mlp=0.25, heads=0.5, blocks=2, method="magnitude"))
    prune(made["zeros"], WeightPruning(method="magnitude", sparsity=0.5))
    prune(made["2:4"], WeightPruning(method="magnitude", pattern="2:4"))
    names = {
        "mlp": "25 % of MLP channels removed",
        "heads": "50 % of heads removed",
        "blocks": "2 of 8 blocks removed",
        "all": "all three",
        "zeros": "50 % of weights zero",
        "2:4": "zeros in the pattern 2:4",
    }
    return {names[key]: value for key, value in made.items()}


def counted(config: Any, tokens: int, keys: int) -> float:
    """Multiplications of matrices in all layers, for tokens that attend to as many keys each."""
    d, heads = config.head_dim if getattr(config, "head_dim", None) else 0, config.num_attention_heads
    d = d or config.hidden_size // heads
    projections = config.hidden_size * d * (2 * heads + 2 * config.num_key_value_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return float(config.num_hidden_layers * tokens * (projections + mlp + 2 * keys * heads * d))


def clock(model: Any, made: dict[str, Any], device: str, rounds: int, tokens: int, steps: int) -> dict[str, Any]:
    """Times of a prompt, and of steps behind it, over those of the model as it was."""
    every = {"plain": model, **made}
    ids = torch.randint(0, 1024, (1, tokens), device=device)
    caches = {name: cache_of_output(each(input_ids=ids, logits_to_keep=1)) for name, each in every.items()}

    def prompt(each: Any) -> Callable[[], None]:
        return lambda: each(input_ids=ids, logits_to_keep=1, use_cache=False)

    def stepping(name: str, each: Any) -> Callable[[], None]:
        def go() -> None:
            for _ in range(steps):
                each(input_ids=ids[:, :1], **{cache_keyword(): caches[name]})

        return go

    record: dict[str, Any] = {"tokens of the prompt": tokens, "steps per round": steps}
    runs = {
        "prompt": ({name: prompt(each) for name, each in every.items()}, (tokens, tokens)),
        "steps": ({name: stepping(name, each) for name, each in every.items()}, (1, tokens)),
    }
    for part, (run, sizes) in runs.items():
        seconds = timed(run, device, rounds)
        whole = counted(model.config, *sizes)
        record[part] = {"plain seconds": round(statistics.median(seconds["plain"]), 4)}
        for name, each in made.items():
            paper, found = counted(each.config, *sizes) / whole, ratio(seconds, name)
            record[part][name] = {"counted": round(paper, 3), "measured": found}
            if paper < 1:
                arrived = (1 - found["median"]) / (1 - paper)
                record[part][name]["share of the saving that arrives"] = round(arrived, 3)
            print(f"  {part:6} {name:30} counted {paper:.3f} measured {found['median']:.3f}", file=sys.stderr)
    return record


def disk(model: Any) -> dict[str, Any]:
    """Bytes of coded directories over those of ordinary ones: of files, everything counted."""
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for share in SHARES:
            pruned = copy.deepcopy(model).cpu().to(dtype)
            prune(pruned, WeightPruning(method="magnitude", sparsity=share, per="output"))
            with tempfile.TemporaryDirectory() as folder:
                plain, coded = Path(folder) / "plain", Path(folder) / "coded"
                pruned.save_pretrained(plain)
                encode(plain, coded)
                sizes = [sum(file.stat().st_size for file in each.iterdir()) for each in (plain, coded)]
            name = f"{str(dtype).removeprefix('torch.')}, {share:.0%} zero"
            found[name] = round(sizes[1] / sizes[0], 4)
            print(f"  disk   {name:30} {found[name]:.4f}", file=sys.stderr)
    return found


def memory(model: Any, samples: int, tokens: int) -> dict[str, Any]:
    """MiB above the model at the highest, by the system's own count; beside it what a forward of one batch, one
    layer's sums and the mask take, of which it has to consist."""
    batches = [{"input_ids": torch.randint(0, 1024, (1, tokens))} for _ in range(samples)]
    config, found = model.config, dict[str, Any]()
    inputs = (config.hidden_size, config.hidden_size, config.hidden_size, config.intermediate_size)
    sums = {"wanda": 8 * sum(inputs), "sparsegpt": 4 * sum(width**2 for width in inputs)}
    model(**batches[0], use_cache=False)  # what is set up once does not count
    with peak() as plain:
        began = time.thread_time()
        for batch in batches:
            model(**batch, use_cache=False)
        once = time.thread_time() - began
    found["a forward alone"] = plain()
    for method in ("wanda", "sparsegpt"):
        pruned = copy.deepcopy(model)
        settings: Any = {"method": method, "sparsity": 0.5}
        with peak() as highest:
            began = time.thread_time()
            mask = prune(pruned, WeightPruning(**settings), batches)
            spent = time.thread_time() - began
        found[method] = {
            "MiB above the model": highest(),
            "MiB of the sums of one layer": round(sums[method] / 2**20, 3),
            "MiB of the mask that is returned": round(sum(each.nbytes for each in mask.bits.values()) / 2**20, 1),
            "MiB of the model": round(sum(each.nbytes for each in model.parameters()) / 2**20, 1),
            "processor time over one pass of the data": round(spent / once, 2),
        }
        print(f"  memory {method:30} {found[method]}", file=sys.stderr)
    return {"calibration samples": samples, "tokens of each": tokens, **found}


@contextmanager
def peak() -> Iterator[Callable[[], float | None]]:
    """Gives, after the block, MiB that the process held at most above what it held before; None where none can tell."""
    gc.collect()
    hand_back_freed_memory()
    found: list[float | None] = []
    resettable = True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        resettable = False
    before = _held("VmRSS") if resettable else None
    yield lambda: found[0]
    after = _held("VmHWM") if resettable else None
    found.append(None if before is None or after is None else round((after - before) / 1024, 1))


def hand_back_freed_memory() -> None:
    """Let glibc give memory back as soon as it is free: else what earlier work left is used again, and not counted."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(parameter, 1 << 16)
        libc.malloc_trim(0)


def _held(what: str) -> float | None:
    """kB of a process, as Linux has it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{what}:")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="in place of the decoder's own")
    parser.add_argument("--shrink", action="store_true", help="a small decoder, short prompts: checks this script only")
    parser.add_argument("--only", action="append", choices=PARTS, help="some parts; the others are left out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compress.json")
    options = parser.parse_args()
    parts = options.only or PARTS
    torch.set_num_threads(1)
    hand_back_freed_memory()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, what = decoder(options.device, dtype, shrink=options.shrink)
    print(what, file=sys.stderr)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/compress.py", *sys.argv[1:]]),
        "environment": readable_environment(),
        "device": options.device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "what": what,
        "2:4 on a GPU with a library that uses it": None,
    }
    tokens, steps = (24, 1) if options.shrink else (512, 16)
    with torch.inference_mode():
        if "memory" in parts and options.device == "cpu":
            record["memory"] = memory(model, *((2, 16) if options.shrink else (8, 256)))
        keep_freed_memory()  # as the command line does
        if "disk" in parts:
            record["disk"] = disk(model)
    if "clock" in parts:
        with torch.no_grad():
            made = arms(model)
        with torch.inference_mode():
            record["clock"] = clock(model, made, options.device, options.rounds, tokens, steps)
    write_json(options.output, record)


if __name__ == "__main__":
    main()
