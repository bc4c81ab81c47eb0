"""What training costs: alula's recipes beside a plain Hugging Face Trainer, on the same real model, data and batches.

    python benchmarks/training.py --real real

Each contender runs in a process of its own, one after the other, on one thread. Samples pass twice; the first
pass fills caches and is told apart. Time is what the process took of the processor, so that other work on the machine
weighs little; peak memory is the process's largest resident set. Operations are those of matrix products, counted by
torch: what they fall by is what time can.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from alula import build_host, save_host
from alula.anatomy import HostParts
from alula.data import Collator, MixtureSpec, open_mixture
from alula.files import read_json, write_json
from alula.hosts import load_host
from alula.training import train
from alula.training.environment import readable_environment

RATES = {"align": 1e-3, "instruct": 2e-5}
CONTENDERS: dict[str, dict[str, Any]] = {
    "trainer": {},
    "cache": {"feature_cache": {}},
    "cache, packing": {"feature_cache": {}, "packing": True},
    "all": {"feature_cache": {}, "packing": True, "logits": "supervised"},
}
"""settings of a stage; `trainer` is transformers' own, with its own loss"""


SAID = ("times_trainer", "times_trainer_counted", "memory_over_trainer", "loss_off")
KINDS = ("wall", "processor", "operations")


class Clock(TrainerCallback):
    """Seconds of wall and of processor and operations from the end of one step to the end of the next, and losses."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.marks: list[tuple[float, ...]] = []
        self.losses: list[float] = []

    def _mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), self.counter.get_total_flops()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def sources(real: Path, task: str, batch: int) -> dict[str, Any]:
    """Two batches of samples: captions, and of instruct questions as well."""
    names = ["stamps", "emoji"] if task == "align" else ["stamps", "emoji", "easy-vqa", "easy-vqa"]
    each = 2 * batch // len(names)
    limits = {name: each * names.count(name) for name in names}
    return {
        "sources": [
            {"jsonl": str(real / "data" / name / "train.jsonl"), "limit": limit, "weight": limit}
            for name, limit in limits.items()
        ]
    }


def contend(options: argparse.Namespace) -> dict[str, Any]:
    """One contender's steps."""
    torch.set_num_threads(1)
    data = sources(options.real, options.task, options.batch)
    with FlopCounterMode(display=False) as counter:
        clock = Clock(counter)
        if options.contend == "trainer":
            plain(options, data, clock)
        else:
            recipe(options, data, clock)
    steps = {
        kind: [after[i] - before[i] for before, after in itertools.pairwise(clock.marks)]
        for i, kind in enumerate(KINDS)
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"losses": clock.losses, **steps, "peak_mib": peak}


def plain(options: argparse.Namespace, data: dict[str, Any], clock: Clock) -> None:
    """The loop that anybody would write."""
    host = load_host(options.host, dtype=torch.float32)
    host.model.requires_grad_(False)
    parts = HostParts.of(host.model)
    assert parts.projector is not None
    parts.projector.requires_grad_(True)
    if options.task == "instruct":
        for module in (parts.decoder, parts.head):
            assert module is not None
            module.requires_grad_(True)
    mixture = open_mixture(MixtureSpec.model_validate({**data, "seed": 0}))
    arguments = TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=RATES[options.task],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=options.precision == "bf16",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Trainer(
        model=host.model,
        args=arguments,
        train_dataset=mixture.window(options.steps * options.batch),
        data_collator=Collator(host.processor),
        callbacks=[clock],
    ).train()


def recipe(options: argparse.Namespace, data: dict[str, Any], clock: Clock) -> None:
    """A stage of alula's."""
    rate = RATES[options.task]
    method = {
        "align": {"method": "projector", "train": {"projector": rate}},
        "instruct": {"method": "full", "train": {"llm": rate, "projector": rate}},
    }[options.task]
    stage = {
        "name": options.task,
        **method,
        "data": {**data, "seed": 0},
        "steps": options.steps,
        "batch_size": options.batch,
        **CONTENDERS[options.contend],
    }
    train(
        {
            "name": "speed",
            "output_dir": str(options.output),
            "host": {"path": str(options.host)},
            "precision": options.precision,
            "device": "cpu",
            "stages": [stage],
        },
        callbacks=[clock],
    )


def measure(options: argparse.Namespace) -> None:
    """All contenders, each in its own process, told beside `trainer`; what the record holds stands."""
    settings = {"batch": options.batch, "steps": options.steps, "precision": options.precision}
    before = read_json(options.result) if options.result.is_file() else {}
    tasks: dict[str, Any] = before["tasks"] if before.get("settings") == settings else {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        models, host = options.real / "models", Path(scratch) / "host"
        save_host(build_host(str(models / "smollm2-135m-instruct"), str(models / "efficientnet-lite0")), host)
        for task in options.only or list(RATES):
            runs = tasks.setdefault(task, {})
            for number, name in enumerate(CONTENDERS):
                if name in runs or (options.contender and name not in options.contender):
                    continue
                command = [sys.executable, __file__, "--contend", name, "--task", task, "--host", str(host)]
                command += ["--real", str(options.real), "--output", str(Path(scratch) / f"{task}-{number}")]
                command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
                done = subprocess.run(
                    command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True, text=True
                )
                runs[name] = json.loads(done.stdout.splitlines()[-1])
                runs[name] |= told(runs, name, options)
                print(task, name, {key: runs[name][key] for key in SAID})
                record = {
                    "command": "python " + " ".join(sys.argv),
                    "environment": readable_environment(),
                    "settings": settings,
                    "tasks": tasks,
                }
                write_json(options.result, record)


def told(runs: dict[str, Any], name: str, options: argparse.Namespace) -> dict[str, float]:
    """A contender beside `trainer`: samples per second of processor where features are known, and before; as many for
    the operations counted; memory."""
    base, run, first = runs["trainer"], runs[name], 2

    def seconds(of: dict[str, Any], which: str, part: slice) -> float:
        return statistics.median(of[which][part])

    return {
        "samples_per_second": options.batch / seconds(run, "processor", slice(first, None)),
        "times_trainer": seconds(base, "processor", slice(first, None)) / seconds(run, "processor", slice(first, None)),
        "times_trainer_counted": sum(base["operations"][first:]) / sum(run["operations"][first:]),
        "times_trainer_wall": seconds(base, "wall", slice(first, None)) / seconds(run, "wall", slice(first, None)),
        "times_trainer_first_pass": sum(base["processor"][:first]) / sum(run["processor"][:first]),
        "memory_over_trainer": run["peak_mib"] / base["peak_mib"],
        "loss_off": max(abs(a - b) / abs(b) for a, b in zip(run["losses"], base["losses"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", type=Path, default=Path("real"), help="made by alula real prepare")
    parser.add_argument("--only", action="append", choices=list(RATES))
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="default: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--scratch", type=Path, default=None, help="directory for what is written meanwhile")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/training-speed.json"))
    for name in ("contend", "task", "host", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend is None:
        if options.task or options.host or options.output:
            parser.error("--task, --host and --output are said to contenders; the record goes to --result")
        measure(options)
    else:
        print(json.dumps(contend(options)))


if __name__ == "__main__":
    main()
