"""A tiny stock LLaVA processor, with a tokenizer trained on the spot."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from alula.data import Place, Sample

TOKENS_PER_IMAGE = 16  # 32 px in patches of 8

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What text models ship: content is a string."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["what colour is the big square ? red . how many rings are there ? two of them"] * 4
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=STRING_TEMPLATE,
    )


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


class ListSource:
    """Samples held in a list; a bad one is an exception to raise."""

    def __init__(self, samples: list[Sample | Exception], name: str = "list", size: int | None = -1) -> None:
        self.samples, self.name = samples, name
        self.size = len(samples) if size == -1 else size

    def __getitem__(self, index: int) -> Sample:
        found = self.samples[index % len(self.samples)]
        if isinstance(found, Exception):
            raise found
        return found


def say(role: str, *content: object) -> dict:
    """A message of texts and images, in the order given."""
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in content
        ],
    }


def chat(*turns: str, name: str = "s", images: tuple[object, ...] = ()) -> Sample:
    """User and assistant in turn, the images before the first text."""
    messages = [say("assistant" if number % 2 else "user", turn) for number, turn in enumerate(turns)]
    messages[0]["content"] = [{"type": "image", "image": image} for image in images] + messages[0]["content"]
    return Sample(name, messages, place=Place("test", record=name))
