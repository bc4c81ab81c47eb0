"""What experts cost beside PEFT's LoRA of the same rank on the same linears: time and memory, side by side.

    python benchmarks/experts.py                                      # everything, resuming where it stopped
    python benchmarks/experts.py --only 0.5b/train --rounds 3         # one part; --list names them all
    python benchmarks/experts.py --shrink --rounds 1 --output x.json  # the same code on tiny decoders, anywhere
    python benchmarks/experts.py --table                              # the committed figures as Markdown

Decoders, workloads, clock and rounds are those of `wings.py`: every contender once per round, every second round
backwards, and ratios within rounds. One image stands behind 14 tokens of text.

- host: the decoder alone.
- lora: PEFT, on all linear layers of attention and MLP.
- image, seen, both: experts on the same linears, of LoRA's rank and scale; `both` has two of that rank per linear.
- halves: `both` with half the rank, which is as many parameters as LoRA has.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import wings

import alula
from alula.files import write_json
from alula.training.environment import readable_environment

RESULTS = Path(__file__).parent / "results" / "experts-speed.json"
CONTENDERS = ("host", "lora", "image", "seen", "both", "halves")
EXPERTS = CONTENDERS[2:]
WORKLOADS = ("train", "prefill-1024", "decode")
Names = tuple[str, ...]
RANK, ALPHA = 64, 8  # the latter is PEFT's own


class Bench(wings.Bench):
    """A decoder and these contenders."""

    def completed(self, model: Any, contender: str) -> Any:
        if contender == "lora":
            config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False)
            return peft.get_peft_model(model, config)
        if contender in EXPERTS:
            tokens: Any = "both" if contender == "halves" else contender
            share = 2 if contender == "halves" else 1
            config = alula.ExpertsConfig(tokens=tokens, rank=RANK // share, alpha=ALPHA / share)
            self.awaken(alula.attach(model, config))
        return model


def run_part(
    name: str, workload: str, records: dict[str, Any], args: argparse.Namespace, bench: wings.Bench, contenders: Names
) -> None:
    """Add the peaks and rounds that are missing, saving after each."""
    key, place = f"{name}/{workload}", {"device": bench.device, "dtype": str(bench.host.dtype).removeprefix("torch.")}
    record = records["parts"].setdefault(key, {"rounds": [], "peak bytes": [], "place": place})
    if record["place"] != place:
        raise SystemExit(f"{args.output}: {key} was measured on {record['place']}: name another --output, or --again")
    record["trained parameters"] = {
        c: sum(p.numel() for p in bench.model(c).parameters() if p.requires_grad) for c in contenders
    }
    peaks = record["peak bytes"]
    while not args.no_memory and len(peaks) < args.peaks:
        peaks.append({c: wings.measure_peak(bench, workload, c) for c in contenders})
        record["peak over lora"] = ratios(peaks, "lora")
        write_json(args.output, records)
    if len(record["rounds"]) >= args.rounds:
        return
    clock, least = wings.clock_of(bench.device), 0.0 if bench.shrink else 0.2
    tasks = {c: wings.task_of(bench, workload, c) for c in contenders}
    for task, _ in tasks.values():
        task()  # once, to warm up
    while len(record["rounds"]) < args.rounds:
        order = contenders if len(record["rounds"]) % 2 == 0 else contenders[::-1]
        seconds = {c: seconds_of(tasks[c][0], clock, least) / tasks[c][1] for c in order}
        record["rounds"].append({c: seconds[c] for c in contenders})
        record["environment"] = {
            **readable_environment(),
            "processor": wings.processor(),
            "threads": str(torch.get_num_threads()),
        }
        record["over host"], record["over lora"] = (ratios(record["rounds"], base) for base in ("host", "lora"))
        write_json(args.output, records)
        shown = {c: round(each["median"], 3) for c, each in record["over lora"].items()}
        print(key, f"round {len(record['rounds'])}, over lora:", json.dumps(shown), flush=True)


def seconds_of(task: Callable[[], Any], clock: Callable[[], float], least: float) -> float:
    """Of one run, of as many as take the least time."""
    begin, runs, spent = clock(), 0, 0.0
    while not runs or spent < least:
        task()
        runs, spent = runs + 1, clock() - begin
    return spent / runs


def ratios(rounds: list[dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Per contender the median and the extremes over rounds of what it took over what the base did."""
    found = {c: [each[c] / each[base] for each in rounds] for c in rounds[0]}
    return {c: {"median": statistics.median(r), "least": min(r), "most": max(r)} for c, r in found.items()}


def table(records: dict[str, Any], contenders: Names) -> str:
    """The record as Markdown: time and peak memory over LoRA's, with extremes over rounds."""
    columns = [c for c in contenders if c != "lora"]
    lines = ["| over LoRA | rounds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for key, record in records["parts"].items():
        for what, rounds in (("time", record["rounds"]), ("peak memory", record["peak bytes"])):
            if rounds:
                found = ratios(rounds, "lora")
                cells = [f"{r['median']:.2f} ({r['least']:.2f} to {r['most']:.2f})" for r in map(found.get, columns)]
                lines.append(f"| {key}, {what} | {len(rounds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def benchmark(text: str, kind: type[wings.Bench], contenders: Names, results: Path) -> None:
    """The command line of a benchmark against LoRA, which is described by `text`."""
    parser = wings.command_line(text, "0.5b/train", 6, results)
    parser.add_argument("--peaks", type=int, default=3, help="measurements of peak memory each part shall have")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = json.loads(args.output.read_text()) if args.output.exists() else {"parts": {}}
    if args.table:
        print(table(records, contenders))
        return
    parts = wings.chosen(args, WORKLOADS)
    if args.list:
        print("\n".join("/".join(part) for part in parts))
        return
    dtype = getattr(torch, args.dtype) if args.dtype else None
    benches: dict[str, wings.Bench] = {}
    for name, workload in parts:
        if args.again:
            records["parts"].pop(f"{name}/{workload}", None)
        if name not in benches:
            benches = {name: kind(name, args.device, dtype, shrink=args.shrink)}  # one decoder in memory at a time
        run_part(name, workload, records, args, benches[name], contenders)


def main() -> None:
    benchmark(__doc__ or "", Bench, CONTENDERS, RESULTS)


if __name__ == "__main__":
    main()
