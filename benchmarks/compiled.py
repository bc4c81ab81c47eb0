"""What grafts cost once decoder layers are compiled, beside a host and a LoRA whose layers are compiled alike.

    python benchmarks/compiled.py                                      # everything, resuming where it stopped
    python benchmarks/compiled.py --only 0.5b/train --rounds 3         # one part; --list names them all
    python benchmarks/compiled.py --device cuda                        # the 7B shape in bfloat16, with CUDA graphs
    python benchmarks/compiled.py --shrink --rounds 1 --output x.json  # the same code on tiny decoders, anywhere
    python benchmarks/compiled.py --table                              # the committed figures as Markdown

Decoders, workloads, clock and rounds are those of `wings.py`: every contender once per round, every second round
backwards, and ratios within rounds. Each is there as it is written ("host") and compiled ("host, compiled"): grafts by
`alula.compile_layers`, the host and LoRA by torch's own ``layer.compile``, all with torch's inductor and whatever
length is asked. `decode` has a growing cache, `decode-static` one of fixed size, which on a CUDA device is recorded in
graphs (``mode="reduce-overhead"``). What compiling itself takes is the wall time of the first run less that of a later
one. With ``--shrink`` graphs are made, and run as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts
import peft
import torch
import wings
from transformers import StaticCache

import alula
from alula.anatomy import Anatomy
from alula.files import write_json
from alula.seam.dialect import cache_keyword
from alula.training.environment import readable_environment

RESULTS = Path(__file__).parent / "results" / "compiled.json"
KINDS = ("host", "lora", "wings", "experts")
CONTENDERS = tuple(f"{kind}{how}" for kind in KINDS for how in ("", ", compiled"))
WORKLOADS = ("prefill-256", "prefill-1024", "decode", "decode-static", "train")


class Bench(wings.Bench):
    """A decoder and these contenders."""

    options: dict[str, Any]
    """of `torch.compile`"""

    def completed(self, model: Any, contender: str) -> Any:
        kind, _, how = contender.partition(", ")
        rank = self.plan.rank
        if kind == "lora":
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
            )
        elif kind == "wings":
            self.awaken(alula.attach(model, alula.WingsConfig(rank=rank)))
        elif kind == "experts":
            self.awaken(alula.attach(model, alula.ExpertsConfig(rank=rank)))
        if how and kind in ("wings", "experts"):
            alula.compile_layers(model, **self.options)
        elif how:
            for layer in Anatomy.of(model).layers:
                layer.compile(dynamic=True, **self.options)
        return model


def decode_static(bench: Bench, contender: str, tokens: int, rounds: int) -> tuple[Callable[[], Any], int]:
    """Steps of one token into a cache of fixed size, which has room for those of all rounds."""
    count = bench.size(wings.DECODED, least=2)
    new_ids, model = bench.ids(count), bench.model(contender)
    room = tokens + count * (rounds + 3)
    with torch.inference_mode():
        cache = StaticCache(config=bench.host.config, max_cache_len=room)
        name = {cache_keyword(): cache}
        bench.run(contender, tokens, input_ids=bench.ids(tokens), logits_to_keep=1, **name)

    @torch.inference_mode()
    def steps() -> None:
        for i in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            model(input_ids=new_ids[:, i : i + 1], **name)

    return steps, count


def task_of(bench: Bench, workload: str, contender: str, rounds: int) -> tuple[Callable[[], Any], int]:
    if workload == "decode-static":
        return decode_static(bench, contender, bench.size(1024), rounds)
    return wings.task_of(bench, workload, contender)


def run_part(name: str, workload: str, records: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the rounds that are missing, saving after each."""
    torch.compiler.reset()
    bench = Bench(name, args.device, getattr(torch, args.dtype) if args.dtype else None, shrink=args.shrink)
    uses_graphs = args.device == "cuda" and workload == "decode-static"
    bench.options = {"mode": "reduce-overhead"} if uses_graphs else {"backend": "eager"} if args.shrink else {}
    key, place = f"{name}/{workload}", {"device": bench.device, "dtype": str(bench.host.dtype).removeprefix("torch.")}
    record = records["parts"].setdefault(key, {"rounds": [], "place": place, "options": bench.options})
    if record["place"] != place:
        raise SystemExit(f"{args.output}: {key} was measured on {record['place']}: name another --output, or --again")
    if len(record["rounds"]) >= args.rounds:
        return
    clock, tasks, first = wings.clock_of(bench.device), {}, {}
    for contender in CONTENDERS:
        began = time.perf_counter()
        tasks[contender] = task_of(bench, workload, contender, args.rounds)
        tasks[contender][0]()
        first[contender] = time.perf_counter() - began
        began = time.perf_counter()
        tasks[contender][0]()  # once more: kernels are chosen, memory is there
        first[contender] -= time.perf_counter() - began
    record["seconds until compiled"] = {c: round(took, 2) for c, took in first.items() if c.endswith("compiled")}
    while len(record["rounds"]) < args.rounds:
        order = CONTENDERS if len(record["rounds"]) % 2 == 0 else CONTENDERS[::-1]
        # a cache of fixed size has room for one run a round
        least = 0.0 if bench.shrink or workload == "decode-static" else 0.2
        seconds = {c: experts.seconds_of(tasks[c][0], clock, least) / tasks[c][1] for c in order}
        record["rounds"].append({c: seconds[c] for c in CONTENDERS})
        record["environment"] = {
            **readable_environment(),
            "processor": wings.processor(),
            "threads": str(torch.get_num_threads()),
        }
        for base in ("host", "host, compiled", "lora, compiled"):
            record[f"over {base}"] = experts.ratios(record["rounds"], base)
        write_json(args.output, records)
        shown = {c: round(each["median"], 3) for c, each in record["over host, compiled"].items()}
        print(key, f"round {len(record['rounds'])}, over host, compiled:", json.dumps(shown), flush=True)


def table(records: dict[str, Any]) -> str:
    """The record as Markdown: time over the compiled host's, with extremes over rounds, and what compiling took."""
    columns = [c for c in CONTENDERS if c != "host, compiled"]
    lines = ["| over host, compiled | rounds | " + " | ".join(columns) + " | seconds until compiled |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for key, record in records["parts"].items():
        if record["rounds"]:
            found = experts.ratios(record["rounds"], "host, compiled")
            cells = [f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" for r in map(found.get, columns)]
            took = ", ".join(f"{c.partition(',')[0]} {s:.0f}" for c, s in record["seconds until compiled"].items())
            lines.append(f"| {key} | {len(record['rounds'])} | " + " | ".join([*cells, took]) + " |")
    return "\n".join(lines)


def main() -> None:
    args = wings.command_line(__doc__, "0.5b/train", 5, RESULTS).parse_args()
    torch.set_num_threads(1)
    records = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    if args.table:
        print(table(records))
        return
    parts = wings.chosen(args, WORKLOADS)
    if args.list:
        print("\n".join("/".join(part) for part in parts))
        return
    for name, workload in parts:
        if args.again:
            records["parts"].pop(f"{name}/{workload}", None)
        run_part(name, workload, records, args)


if __name__ == "__main__":
    main()
