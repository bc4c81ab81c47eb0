"""What the model answers to text, bare and after an image, against its base."""

from __future__ import annotations

from typing import Any

from alula.auditing.plan import Plan
from alula.evaluation import Task, data_task, native_tasks
from alula.evaluation.prompts import takes_images
from alula.hosts.host import tokenizer_of

BARE, AFTER_IMAGE = "text_bare", "text_after_image"


def tasks_of(plan: Plan) -> list[Task]:
    """The tasks: the user's own questions, or the microworld's bare and after an unrelated image."""
    if plan.text is not None:
        return [data_task(plan.text, name=BARE, n=plan.items)]
    return native_tasks([BARE, AFTER_IMAGE], n=plan.items, seed=plan.seed)


class InTheWordsOf:
    """Puts questions to a text LLM in the very tokens that the audited host gets: its template, without its media.

    Args:
        processor: the host's.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.image_processor = processor.image_processor  # so that messages keep the shape the template expects
        self.chat_template = processor.chat_template

    def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, Any]:
        inputs = self.processor.apply_chat_template(messages, **options)
        return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def asking(base_processor: Any, processor: Any) -> Any:
    """The processor to ask the base with: the audited host's own words where the base is a text LLM that shares its
    vocabulary, else the base's."""
    if takes_images(base_processor):
        return base_processor
    own, host = tokenizer_of(base_processor).get_vocab(), tokenizer_of(processor).get_vocab()
    # tokens added for the host, such as its image placeholder, do not occur in text
    shared = all(host.get(token) == number for token, number in own.items())
    return InTheWordsOf(processor) if shared else base_processor
