"""The lessons of a stage: asked for once, and kept under a name that says what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alula.chat_template import TemplateSettings, template_of
from alula.evaluation.conditions import fingerprint
from alula.hosts import Host
from alula.training.distillation.teacher import own_questions, questions_of, teach
from alula.training.recipe import Distill


def prepare_lessons(
    spec: Distill,
    load: Callable[[], Host],
    template: TemplateSettings,
    directory: Path,
    *,
    key: str,
    device: torch.device,
    seed: int,
    progress: bool,
    notify: Callable[[str], None],
) -> Path:
    """Have the lessons of ``spec`` lie in a directory of their own, and say which; made only if they are not there.

    Args:
        load: loads the model the run starts from; called once.
        template: variables for its chat template beside the messages.
        directory: of the run, for the answers so far, and for the lessons where the spec names no cache.
        key: of the section in the recipe, for errors.
        seed: of questions that the model writes.
        progress: draw a bar on stderr.
        notify: says something to a person.

    Raises:
        DataError, HostError: see `teacher`.
    """
    host = load()
    host.model.to(device)  # type: ignore[arg-type]
    asked = [] if spec.prompts is None else questions_of(spec.prompts, spec.count, f"{key}.prompts")
    made: dict[str, Any] = {
        "model": fingerprint(host.model),
        "chat_template": _digest(template_of(host.processor)),
        "template": template.recorded(host.processor),
        "questions": _digest(asked) if asked else {"written": spec.count, "seed": seed},
        "max_new_tokens": spec.max_new_tokens,
        "candidates": spec.candidates,
    }
    name = _digest(made)[:32]
    place = (directory if spec.cache is None else Path(spec.cache)) / name
    if place.exists():
        return place
    notify("distillation: asking the model the run starts from for its words")
    if spec.prompts is None:
        asked = own_questions(
            host,
            spec.count,
            template,
            max_new_tokens=spec.max_new_tokens,
            batch_size=spec.batch_size,
            seed=seed,
        )
        notify(f"distillation: it wrote {len(asked)} questions")
    journal = directory / f"{name}.jsonl"
    lessons = teach(
        host,
        asked,
        template,
        candidates=spec.candidates,
        max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
        journal=journal,
        progress=progress,
    )
    lessons.save(place, made)
    journal.unlink(missing_ok=True)
    return place


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
