"""What is trained on beside the prepared captions: questions whether a thing is there, and the model's own words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from alula.chat_template import TemplateSettings
from alula.data import Sample, message_text, open_source
from alula.data.samples import user
from alula.draws import Draw
from alula.evaluation import ItemTask, TaskItem, evaluate
from alula.files import write_text
from alula.hosts import Host
from alula.real.things import words_of
from alula.training.distillation.teacher import own_questions


def read(path: Path, count: int | None = None, *, seed: int | None = None) -> list[Sample]:
    """Samples of a file of records: the first ones, or so many drawn by a seed, in the order of the file."""
    source = open_source({"jsonl": str(path)})
    places = list(range(source.size or 0))
    if count is not None and count < len(places):
        places = places[:count] if seed is None else sorted(Draw(path.stem, seed).sample(places, count))
    return [source[place] for place in places]


def thing_of(sample: Sample) -> str | None:
    """What a captioned picture is of: the word by which it was put into its split; None where no word is one."""
    words = words_of(message_text(sample.messages[-1]))
    return words[-1] if words else None


def asked(thing: str) -> str:
    """The question whether a thing is in the picture."""
    return f"Is there {'an' if thing[0] in 'aeiou' else 'a'} {thing} in the picture? Answer yes or no."


def write_questions(path: Path, captions: list[Path]) -> None:
    """Write a yes and a no question for each captioned training picture: of its thing, and of another picture's."""
    pictures = [(sample, thing) for file in captions for sample in read(file) if (thing := thing_of(sample))]
    things = sorted({thing for _, thing in pictures})
    lines = []
    for sample, thing in pictures:
        named = set(words_of(message_text(sample.messages[-1])))
        absent = [other for other in things if other not in named]
        other = Draw("things", sample.id).choice(absent or things)
        image = str(sample.images[0].path)
        for about, answer in ((thing, "yes"), (other, "no")):
            content = [{"type": "image", "image": image}, {"type": "text", "text": asked(about)}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"id": f"{sample.id}-{answer}", "messages": messages}))
    write_text(path, "\n".join(lines) + "\n")


def write_own_words(path: Path, host: Host, count: int, seed: int) -> None:
    """Write what a host answers to questions it writes itself: text to be replayed that no benchmark holds."""
    written = own_questions(host, count, TemplateSettings(), max_new_tokens=48, batch_size=count, seed=seed)
    items = [TaskItem(str(number), "own", [user(text)], gold="") for number, text in enumerate(written)]
    task = ItemTask("own", "own words", items, lambda item, answer: 0.0, max_new_tokens=64)
    run = evaluate(host.model, host.processor, [task], batch_size=count)
    records: list[dict[str, Any]] = []
    for item in run.tasks["own"].items:
        if item.answer.strip():
            turns = (("user", written[int(item.id)]), ("assistant", item.answer))
            messages = [{"role": role, "content": text} for role, text in turns]
            records.append({"id": item.id, "messages": messages})
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def popular(samples: list[Sample]) -> list[str]:
    """Things of pictures, the most frequent first."""
    counts = Counter(thing for sample in samples if (thing := thing_of(sample)))
    return sorted(counts, key=lambda thing: (-counts[thing], thing))
