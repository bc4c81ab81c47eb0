"""A language model that knows one text by heart: real weights of a real class, made rather than trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.hosts import tiny

END = "<|im_end|>"


def save(
    folder: Path, pieces: Sequence[str | int], *, tokenizer: Any = None, over: bool = True, context: int = 4096
) -> Path:
    """Write a model that answers every question with ``pieces``, a token each, in order.

    A token's embedding is a direction of its own, the one layer adds nothing, and the head gives the most to the token
    that comes next; so a piece may stand there
    once, and none may be what the prompt ends with, a line's end.

    Args:
        pieces: texts, or ids of tokens that there are, each different.
        tokenizer: by default one of bytes, some 300 tokens.
        over: whether the answer ends behind the last piece; else it begins anew.
    """
    tokenizer = tokenizer or tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces if isinstance(piece, str)])
    ids = [piece if isinstance(piece, int) else tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    end = tokenizer.convert_tokens_to_ids(END)
    size = 8 * ((len(tokenizer) + 7) // 8)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=size // 8,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=end,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(tokenizer)])
        model.model.norm.weight.fill_(1)
        follows = torch.full((len(tokenizer),), ids[0])  # whatever ends the prompt, the text begins
        for here, there in zip(ids, [*ids[1:], end if over else ids[0]], strict=True):
            follows[here] = there
        model.lm_head.weight[follows, torch.arange(len(tokenizer))] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
