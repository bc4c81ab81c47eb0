"""The fledgling's tokenizer: byte-level BPE learned on the microworld's own words, with a chat template."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alula_fledgling.microworld import caption_items, text_items, visual_items

PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SPECIAL_TOKENS = (PAD, START, END, IMAGE, "<video>", "<audio>", *(f"<|reserved_{n}|>" for n in range(10)))
"""Ids 0 to 15. Pictures, films and sounds have their placeholders from birth; the reserved ones are for later."""

VOCABULARY_SIZE = 1024

# Qwen's way of cutting text into words, each digit by itself
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+(?:-\p{L}+)*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every text starts with one blank, so that a word is the same token wherever it stands. Content may be a string or a
# list of parts; a picture is its placeholder.
CHAT_TEMPLATE = """\
{%- macro said(content) -%}
    {%- if content is string -%}{{- ' ' + content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] in ('image', 'video', 'audio') -%}{{- '<' + part['type'] + '>' -}}
            {%- elif part['type'] == 'text' -%}{{- ' ' + part['text'] | trim -}}
            {%- else -%}{{- raise_exception('the fledgling does not take ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- said(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}{{- said(message['content']) + '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""


def learn_tokenizer(seed: int = 0, *, num_items: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges from ``num_items`` training items; plain ``AutoTokenizer`` reloads the result."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, num_items), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    return int(tokenizer.get_vocab()[token])


def _corpus(seed: int, num_items: int) -> Iterator[str]:
    for stream in (
        text_items(num_items, split="train", seed=seed),
        visual_items(num_items // 4, split="train", seed=seed),
        caption_items(num_items // 8, split="train", seed=seed),
    ):
        for item in stream:
            for message in item.messages:
                yield from (" " + part["text"] for part in message["content"] if part["type"] == "text")
    for role in ("user", "assistant", "system"):
        yield from [role] * num_items
