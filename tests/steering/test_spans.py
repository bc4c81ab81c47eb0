"""Spans: which tokens hold a piece of a prompt's text, against the offsets that tokenizers give of texts alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import alula
from alula.errors import UsageError
from alula.seam import generation_extras
from alula.steering import Prompt, Span
from tests.hosts import tiny


def unigram() -> PreTrainedTokenizerFast:
    """As Llama-2's: words begin with a sign for the space before them, what is unknown falls apart into bytes."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz?")]
    pieces += [("▁red", -1.0), ("▁square", -1.5), ("▁a", -1.2), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    made = Tokenizer(models.Unigram(pieces, 0, True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(fused)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: small letters, words in pieces."""
    words = ["[UNK]", "red", "squ", "##are", "a", "##e", "is", "?", "the", "n", "##a", "##i", "##v"]
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]")


TOKENIZERS = {"bytes": tiny.tokenizer, "unigram": unigram, "word pieces": word_piece}


def text_model(tokenizer: Any) -> Any:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))


def expected(tokenizer: Any, text: str, *stretches: tuple[int, int]) -> torch.Tensor:
    """The tokens whose own characters meet a stretch."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return torch.tensor([[float(any(a < stop and b > start for start, stop in stretches)) for a, b in offsets]])


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a red square is a red square", "red"),
        ("a red square is a red square", "d squ"),
        ("a red square is a red square", "a red square is a red square"),
        ("the naïve square", "ï"),
        ("a red 日本 square 🙂", "本"),
        ("a red 日本 square 🙂", "🙂"),
        ("a red 日本 square 🙂", "日本 s"),
    ],
)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_a_text(kind: str, text: str, span: str) -> None:
    """Every occurrence; tokens that it covers in part are in it."""
    tokenizer = TOKENIZERS[kind]()
    if kind == "word pieces" and not text.isascii():
        return  # its unknown words lose their letters
    prompt = Prompt(text_model(tokenizer), tokenizer, tokenizer(text, return_tensors="pt"))
    found = prompt.marks(spans=[span])
    told = expected(tokenizer, text, *((m.start(), m.end()) for m in re.finditer(re.escape(span), text)))
    if kind == "unigram":  # it takes bytes of several characters for one; a lone space decodes with what follows
        assert span in tokenizer.decode(prompt.ids[found > 0])
        assert (found - told).sum() <= found.shape[1] // 4
    else:
        assert torch.equal(found, told)


def test_small_letters() -> None:
    tokenizer = word_piece()
    prompt = Prompt(text_model(tokenizer), tokenizer, tokenizer("A Red Square", return_tensors="pt"))
    assert prompt.marks(spans=["Red Square"]).tolist() == [[0, 1, 1, 1]]


def test_occurrences_and_characters() -> None:
    tokenizer, text = tiny.tokenizer(), "a red square left of a red circle, a red one"
    prompt = Prompt(text_model(tokenizer), tokenizer, tokenizer(text, return_tensors="pt"))
    places = [(m.start(), m.end()) for m in re.finditer("red", text)]
    for index in (0, 1, 2, -1, -3):
        assert torch.equal(prompt.marks(spans=[Span("red", index=index)]), expected(tokenizer, text, places[index]))
    assert torch.equal(prompt.marks(spans=Span(start=2, stop=11)), expected(tokenizer, text, (2, 11)))
    assert torch.equal(prompt.marks(spans=Span(start=-7)), expected(tokenizer, text, (len(text) - 7, len(text))))
    mixed = prompt.marks(spans=["a red square", Span("red", index=0, weight=-0.5)])
    weights = expected(tokenizer, text, (0, 12))
    assert torch.equal(mixed, torch.where(expected(tokenizer, text, (2, 5)) > 0, -0.5, weights))


def chat(*texts: str, image: bool = False) -> list[dict[str, Any]]:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]
    if image:
        messages[1]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (16, 16), "red")})
    return messages


def inputs_of(processor: Any, *chats: Any, side: str = "left") -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = side
    kwargs: Any = {"return_tensors": "pt", "padding": True}
    kwargs = {"processor_kwargs": kwargs} if tokenizer is not processor else kwargs
    return processor.apply_chat_template(
        list(chats), tokenize=True, return_dict=True, add_generation_prompt=True, **kwargs
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_of_messages_behind_an_image(host: Any, processor: Any, side: str) -> None:
    """Texts that stand in the template, in media and in other messages too are told apart; samples are padded."""
    chats = [chat("e", "user", "r", "image", image=True), chat("be brief", "what is it?", image=True)]
    inputs = inputs_of(processor, *chats, side=side)
    prompt = Prompt(host, processor, inputs, chats)
    spans = [[Span(message=1)], [Span(message=1, part=1, start=5, stop=7), Span("be", message=0)]]
    marks = prompt.marks(spans=spans)
    tokenizer, found = processor.tokenizer, []
    for ids, row in zip(inputs["input_ids"], marks, strict=True):
        assert row.dtype == torch.float32
        found.append(tokenizer.decode(ids[row > 0]).replace(" ", ""))
    assert found == ["user", "beis"]
    places = [row.nonzero()[:, 0].tolist() for row in marks]
    opened = [(inputs["input_ids"][n] == processor.image_token_id).nonzero().max().item() for n in (0, 1)]
    assert places[0] == [opened[0] + k for k in range(1, 5)]  # right behind the image, not the template's own word
    for message, words in ((0, "e"), (2, "r"), (3, "image")):
        row = Prompt(host, processor, inputs, chats).marks(spans=[[Span(message=message)], ["what"]])[0]
        assert tokenizer.decode(inputs["input_ids"][0][row > 0]).replace(" ", "") == words


def test_a_tokenizer_that_decodes_with_spaces(host: Any, spaced: Any) -> None:
    """Words are found as it writes them; characters cannot be counted in them."""
    chats = [chat("be brief", "what is it?", image=True)]
    inputs = inputs_of(spaced, *chats)
    prompt = Prompt(host, spaced, inputs, chats)
    for span in ("at is", Span("at is", message=1), Span(message=1)):
        found = spaced.tokenizer.decode(inputs["input_ids"][prompt.marks(spans=[span]) > 0])
        assert found == "w h a t   i s   i t ?"[slice(4, 13) if span != Span(message=1) else slice(None)]
    with pytest.raises(UsageError, match="characters cannot be counted"):
        prompt.marks(spans=[Span(message=1, start=1)])


@torch.no_grad()
def test_the_door_finds_spans(host: Any, processor: Any) -> None:
    chats = [chat("be brief", "red or blue?", image=True), chat("be brief", "blue or red?", image=True)]
    inputs = inputs_of(processor, *chats)
    prompt = Prompt(host, processor, inputs, chats)
    options = {"max_new_tokens": 6, "do_sample": False}
    with alula.highlight(host, prompt, spans="red", strength=1.0) as block:
        assert torch.equal(block.marks, prompt.marks(spans=[["red"], ["red"]]))
        found = [host.generate(**inputs, **options, num_beams=beams) for beams in (1, 3)]
    with alula.highlight(host, strength=1.0), generation_extras(host, {**inputs, "highlighted": block.marks}) as given:
        told = [host.generate(**given, **options, num_beams=beams) for beams in (1, 3)]
    assert all(map(torch.equal, found, told))
    assert not torch.equal(found[0], host.generate(**inputs, **options))


def test_what_is_not_found_is_said(host: Any, processor: Any) -> None:
    chats = [chat("be brief", "what is it?", image=True)] * 2
    inputs = inputs_of(processor, *chats)
    prompt = Prompt(host, processor, inputs, chats)
    cases: list[tuple[Any, str]] = [
        ("green", "'green' is not there"),
        (Span("it", index=2), "stands there 1 times"),
        (Span(start=999), "is not in"),
        (Span(message=7), "no message 7"),
        (Span(message=1, part=0), "no text with words"),
        (["what"], "whose are these spans"),
        ([["what"]] * 3, "of 3 samples"),
        ((), "nothing is highlighted"),
        (3, "not a int"),
    ]
    for spans, message in cases:
        with pytest.raises(UsageError, match=message):
            prompt.marks(spans=spans)
    with pytest.raises(UsageError, match="what the prompt was made of is not known"):
        Prompt(host, processor, inputs).marks(spans=Span(message=1))
    with pytest.raises(UsageError, match="not found among the tokens"):
        Prompt(host, processor, inputs, [chat("be brief", "no words of it")] * 2).marks(spans=Span(message=1))
    for wrong in ({}, {"text": "a", "start": 1}, {"index": 1}, {"part": 1}, {"text": "a", "weight": 0}, {"text": " "}):
        with pytest.raises(UsageError):
            Span(**wrong)
