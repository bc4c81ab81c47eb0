"""From nothing to a fledgling: tokenizer, schooling, eyes, ears, examination, and a directory with its card."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import SiglipImageProcessorPil

from alula._version import __version__
from alula.allocator import keep_freed_memory
from alula.errors import HostError, PathError
from alula.files import atomic_directory, contents, write_json, write_text
from alula_fledgling.microworld import IMAGE_SIZE
from alula_fledgling.raising.ears import EarPlan, write_ears
from alula_fledgling.raising.examination import examine
from alula_fledgling.raising.model_card import model_card
from alula_fledgling.raising.schooling import Progress, Schooling, school
from alula_fledgling.raising.tokenizer import learn_tokenizer
from alula_fledgling.raising.tower import TowerPlan, raise_tower
from alula_fledgling.weights import card as card_of

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called with the stage, the steps done in it, its steps, and figures to show."""


@dataclass(frozen=True)
class Upbringing:
    """Everything that decides what a fledgling becomes, beside the machine it is raised on."""

    schooling: Schooling = field(default_factory=Schooling)
    tower: TowerPlan = field(default_factory=TowerPlan)
    ears: EarPlan = field(default_factory=EarPlan)
    seed: int = 0
    exam_items: int = 200


def raise_fledgling(
    output: str | os.PathLike[str],
    upbringing: Upbringing,
    *,
    device: torch.device,
    dtype: torch.dtype,
    command: str,
    report: Report | None = None,
) -> dict[str, Any]:
    """Raise a fledgling and write it to ``output``; nothing is there before everything is done.

    Args:
        device: where it is raised.
        dtype: of the matrix products; the weights are float32.
        command: what the user typed, for the card.
        report: told of every step.

    Returns:
        Its card (also in ``output/card.json``).

    Raises:
        PathError: ``output`` holds other things than a fledgling.
    """
    _check_replaceable(Path(output))

    def progress(stage: str) -> Progress | None:
        return None if report is None else lambda done, total, figures: report(stage, done, total, figures)

    keep_freed_memory()
    torch.set_flush_denormal(True)  # vanishing gradients are not worth slow arithmetic
    seed = upbringing.seed
    seconds: dict[str, float] = {}
    watch = _Watch(seconds)
    with atomic_directory(output) as folder:
        tokenizer = learn_tokenizer(seed)
        watch.lap("tokenizer")
        llm = school(
            tokenizer, upbringing.schooling, seed=seed, device=device, dtype=dtype, progress=progress("schooling")
        )
        watch.lap("schooling")
        tower = raise_tower(
            tokenizer, upbringing.tower, seed=seed, device=device, dtype=dtype, progress=progress("tower")
        )
        watch.lap("tower")
        ears = write_ears(
            folder / "audio",
            upbringing.ears,
            seed=seed,
            device=device,
            command=command,
            probe_sounds=3 * upbringing.exam_items,
            progress=progress("ears"),
        )
        watch.lap("ears")
        results = examine(llm, tokenizer, tower, num_items=upbringing.exam_items, progress=progress("examination"))
        watch.lap("examination")
        llm.save_pretrained(folder / "llm")
        tokenizer.save_pretrained(folder / "llm")
        tower.save_pretrained(folder / "vision")
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        SiglipImageProcessorPil(size=size).save_pretrained(folder / "vision")
        card = {
            "name": "fledgling",
            "alula": __version__,
            "command": command,
            "upbringing": asdict(upbringing),
            "llm": {"class": type(llm).__name__, "parameters": llm.num_parameters()},
            "tower": {
                "class": type(tower).__name__,
                "parameters": tower.num_parameters(),
                "image_size": IMAGE_SIZE,
            },
            "ears": {"class": ears["class"], "parameters": ears["parameters"], "probe": ears["probe"]},
            **results,
            "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
            "machine": _machine(device, dtype),
        }
        write_json(folder / "card.json", card)
        write_text(folder / "README.md", model_card(card))
        for part in ("llm", "vision"):  # safetensors are written for their owner's eyes only
            (folder / part / "model.safetensors").chmod(0o644)
    return card


def _check_replaceable(output: Path) -> None:
    """Refuse to raise one over other things, such as the sources of this package, which have its name in a clone."""
    if not output.is_dir() or not contents(output):
        return
    try:
        card_of(output)
    except HostError:
        raise PathError(
            "holds other things than a fledgling, which would be lost",
            where=str(output),
            remedy="name a new folder: --output DIR",
        ) from None


def _machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the fledgling was raised on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or _processor_name(),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


class _Watch:
    """Seconds between laps, written into a dictionary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = round(now - self._last, 1)
        self._last = now
