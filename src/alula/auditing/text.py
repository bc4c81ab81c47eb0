"""What the model answers to text, bare and after an image, against its base."""

from __future__ import annotations

from typing import Any

from alula.auditing.plan import Plan
from alula.evaluation import Task, data_task, native_tasks
from alula.evaluation.prompts import takes_images
from alula.hosts.host import tokenizer_of
from alula.inputs import Intake

BARE, AFTER_IMAGE = "text_bare", "text_after_image"


def tasks_of(plan: Plan) -> list[Task]:
    """The tasks: the user's own questions, or the microworld's bare and after an unrelated image."""
    if plan.text is not None:
        return [data_task(plan.text, name=BARE, n=plan.items)]
    return native_tasks([BARE, AFTER_IMAGE], n=plan.items, seed=plan.seed)


def asking(base_processor: Any, processor: Any) -> Any:
    """The processor to ask the base with: the audited host's own words where the base is a text LLM that shares its
    vocabulary, else the base's."""
    if takes_images(base_processor):
        return base_processor
    own, host = tokenizer_of(base_processor).get_vocab(), tokenizer_of(processor).get_vocab()
    # tokens added for the host, such as its image placeholder, do not occur in text
    shared = all(host.get(token) == number for token, number in own.items())
    return Intake(processor, text_only=True) if shared else base_processor
