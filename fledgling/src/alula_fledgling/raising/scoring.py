"""How well a language model answers held-out text items: bare, and after material that has nothing to do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alula.draws import Draw
from alula_fledgling.microworld import TEXT_FAMILIES, Item, score, text_items
from alula_fledgling.raising.curriculum import word_salad
from alula_fledgling.raising.schooling import foreign_tokens
from alula_fledgling.raising.tokenizer import IMAGE, token_id

CONDITIONS = ("bare", "after words", "after foreign rows")
"""``bare``: the question alone. ``after words``: 16 to 36 tokens of unrelated words in the same turn before it.
``after foreign rows``: a turn before it holds 25 rows that are no word's embedding, as an untrained connector would
yield, and a question about a picture with its answer."""

_FOREIGN_TOKENS = 25
_BATCH = 100


@dataclass(frozen=True)
class Scores:
    """Accuracy by family in 0..1, over ``num_items`` items each."""

    families: Mapping[str, float]
    num_items: int

    @property
    def mean(self) -> float:
        return sum(self.families.values()) / len(self.families)

    @property
    def lowest(self) -> float:
        return min(self.families.values())


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_items: int,
    seed: int,
    condition: str = "bare",
    families: Sequence[str] = TEXT_FAMILIES,
    max_new_tokens: int = 48,
) -> Scores:
    """Answer ``num_items`` held-out items of each family greedily and score them.

    Args:
        condition: one of ``CONDITIONS``.
    """
    accuracy = {}
    for family in families:
        items = list(text_items(num_items, split="test", seed=seed, families=[family]))
        answers: list[str] = []
        for first in range(0, num_items, _BATCH):
            batch = items[first : first + _BATCH]
            prompts = [_prompt(item, tokenizer, condition, seed, first + place) for place, item in enumerate(batch)]
            answers += _answer(model, tokenizer, prompts, max_new_tokens, seed)
        right = [score(family, item.targets[-1].answer, answer) for item, answer in zip(items, answers, strict=True)]
        accuracy[family] = sum(right) / num_items
    return Scores(accuracy, num_items)


def _prompt(item: Item, tokenizer: PreTrainedTokenizerBase, condition: str, seed: int, place: int) -> str:
    messages = list(item.messages[:-1])
    draw = Draw("unrelated", seed, place)
    if condition == "after words":
        first = dict(messages[0])
        first["content"] = [{"type": "text", "text": word_salad(draw, draw.between(16, 36))}, *first["content"]]
        messages[0] = first
    elif condition == "after foreign rows":
        rows = {"type": "text", "text": IMAGE * _FOREIGN_TOKENS}
        asked = {"type": "text", "text": "What colour is the circle?"}
        said = {"role": "assistant", "content": [{"type": "text", "text": draw.choice(("red", "blue", "green"))}]}
        messages = [{"role": "user", "content": [rows, asked]}, said, *messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    inputs = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    image_id = token_id(tokenizer, IMAGE)
    rows = foreign_tokens(model.get_input_embeddings(), inputs["input_ids"], image_id, generator)
    generate: Any = model.generate  # its annotation asks for a protocol that no model class is declared to meet
    output = generate(
        inputs_embeds=rows,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(tokenizer.batch_decode(output, skip_special_tokens=True))
