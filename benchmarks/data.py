"""What people feel before a model computes: help, imports, `alula data check`, rows of parquet that become batches.

    git worktree add rival 053a63e
    python benchmarks/data.py --rival rival         # writes benchmarks/results/data.json

The checkout named by --rival is the build before. Both builds run in processes of their own, in turn within each round,
on the same generated files. Each part says seconds on the clock and processor seconds, children included; a ratio is
the median over rounds of the ratio within a round. Each record has a picture (hard links to --pictures different ones).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alula.files import write_json
from alula.training.environment import readable_environment

HERE = Path(__file__).resolve().parents[1]
TEXT = "what is the color of the man or woman in this picture near a small large red dog on table with glass"
WORDS = TEXT.split()
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375))
ROWS = """
import sys, time
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from alula.data import Collator, Mixture, open_source
file, words, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
core = Tokenizer(models.BPE())
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
core.train_from_iterator([words] * 4, trainers.BpeTrainer(
    vocab_size=1000, initial_alphabet=alphabet, special_tokens=special, show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>",
    extra_special_tokens={"image_token": "<image>"})
template = ("{% for m in messages %}<|im_start|>{{ m.role }}\\n{% if m.role == 'assistant' %}{% generation %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endgeneration %}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}")
processor = LlavaProcessor(image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336},
    crop_size={"height": 336, "width": 336}), tokenizer=tokenizer, patch_size=14,
    vision_feature_select_strategy="default", chat_template=template)
mixture, collate = Mixture([open_source({"dataset": file})], seed=0), Collator(processor)
for first in range(0, rows, 8):
    if first == min(32, rows // 2 // 8 * 8):  # sizes are known by then
        began, used, start = time.perf_counter(), time.process_time(), first
    collate([mixture[position] for position in range(first, first + 8)])
print(time.perf_counter() - began, time.process_time() - used, rows - start)
"""


def records(folder: Path, count: int, pictures: int) -> Path:
    """LLaVA's JSON of ``count`` records, each with a picture of its own name."""
    draw, pixels = random.Random(0), np.random.default_rng(0)
    images = folder / "coco"
    images.mkdir(parents=True)
    for number in range(count):
        if number >= pictures:
            os.link(images / f"{number % pictures:012d}.jpg", images / f"{number:012d}.jpg")
            continue
        width, height = SIZES[number % len(SIZES)]
        coarse = pixels.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(images / f"{number:012d}.jpg", quality=draw.randint(75, 96), optimize=number % 2 == 1)
    found = []
    for number in range(count):
        turns = []
        for turn in range(draw.randint(1, 5)):
            asked = ("" if turn else "<image>\n") + " ".join(draw.choices(WORDS, k=12))
            answer = " ".join(draw.choices(WORDS, k=draw.choice((2, 20, 60))))
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        found.append({"id": f"{number}", "image": f"coco/{number:012d}.jpg", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(found))
    return folder / "llava.json"


def parquet(file: Path, rows: int) -> Path:
    """The first rows of LLaVA's JSON with their pictures inside."""
    import pyarrow
    from pyarrow import parquet as format_

    said = {"human": "user", "gpt": "assistant"}
    table = [
        {
            "messages": [{"role": said[t["from"]], "content": t["value"]} for t in record["conversations"]],
            "images": [{"bytes": (file.parent / record["image"]).read_bytes(), "path": None}],
        }
        for record in json.loads(file.read_text())[:rows]
    ]
    format_.write_table(pyarrow.Table.from_pylist(table), file.with_name("train.parquet"))
    return file.with_name("train.parquet")


def run(source: Path, *arguments: str) -> tuple[float, float, str]:
    """Seconds on the clock, processor seconds with children, and what is printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{source / 'src'}:{source / 'fledgling' / 'src'}",
        "OMP_NUM_THREADS": "1",
    }
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def seconds(source: Path, part: str, file: Path, table: Path, rows: int) -> dict[str, float]:
    """Of one part in one build."""
    match part:
        case "help":
            clock, used, _ = run(source, "-m", "alula", "--help")
        case "transformers":
            clock, used, _ = run(source, "-c", "import transformers")
        case "transformers and alula":
            clock, used, _ = run(source, "-c", "import transformers, alula")
        case "check":
            clock, used, _ = run(source, "-m", "alula", "data", "check", str(file), "--workers", "2")
        case _:
            printed = run(source, "-c", ROWS, str(table), " ".join(WORDS), str(rows))[2].split()
            clock, used = float(printed[-3]) / int(printed[-1]), float(printed[-2]) / int(printed[-1])
    return {"clock": clock, "processor": used}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", type=Path, required=True, help="a checkout of the build before")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=4_000)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", action="store_true", help="little data, which says nothing about speed")
    parser.add_argument("--output", type=Path, default=HERE / "benchmarks" / "results" / "data.json")
    options = parser.parse_args()
    count, rows = (200, 16) if options.shrink else (options.records, options.rows)
    parts = ["help", "transformers", "transformers and alula", "rows of parquet", "check"]
    if options.shrink:
        parts = ["help", "check"]
    measured: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    with tempfile.TemporaryDirectory() as folder:
        file = records(Path(folder) / "llava", count, min(options.pictures, count, 40 if options.shrink else count))
        table = parquet(file, rows)
        for number in range(options.rounds):
            for part in parts:
                builds = {"build": HERE, "rival": options.rival.resolve()}
                order = list(builds)[:: 1 if number % 2 == 0 else -1]
                measured[part].append({name: seconds(builds[name], part, file, table, rows) for name in order})
                print(part, measured[part][-1], flush=True)
    record = {
        "command": " ".join(sys.argv),
        "environment": readable_environment(),
        "records": count,
        "rows": rows,
        "rounds": measured,
        "rival over build": {
            part: {
                kind: statistics.median(each["rival"][kind] / each["build"][kind] for each in rounds)
                for kind in ("clock", "processor")
            }
            for part, rounds in measured.items()
        },
    }
    write_json(options.output, record)


if __name__ == "__main__":
    main()
