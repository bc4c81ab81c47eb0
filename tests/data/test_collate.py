"""Batches against an independent computation, and models that take them."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from alula.data import (
    IGNORED,
    Collator,
    ImageError,
    ImageRef,
    Mixture,
    PlaceholderError,
    Quarantine,
    RecordError,
    Sample,
    TooLongError,
    UnsupervisedError,
    open_source,
)
from alula.errors import DataError, UsageError
from alula.hosts import build_host
from tests.data.conftest import STRING_TEMPLATE, TEMPLATE, TOKENS_PER_IMAGE, ListSource, chat, say

RED, BLUE = Image.new("RGB", (9, 5), "red"), Image.new("RGB", (32, 32), "blue")


def expected(sample: Sample, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels by hand: spell the text out with every placeholder repeated, and mark the answers' characters."""
    text, answers = "", []
    for message in sample.messages:
        text += f"<|im_start|>{message['role']}\n"
        said = "".join(
            part["text"] if part["type"] == "text" else "<image>" * TOKENS_PER_IMAGE for part in message["content"]
        )
        if message["role"] == "assistant":
            answers.append((len(text), len(text) + len(said) + len("<|im_end|>")))
        text += said + "<|im_end|>\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(begin <= start and end <= stop for begin, stop in answers) else IGNORED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def dialogues() -> list[Sample]:
    two_images = [
        say("system", "be brief"),
        say("user", "compare ", RED, " and ", ImageRef.from_object(BLUE), " please"),
        say("assistant", "red, blue"),
        say("user", BLUE),
        say("assistant", "blue \u00e9\U0001f600 again"),
    ]
    return [
        chat("what colour?", "red", images=(RED,)),
        chat("how many rings?", "two of them"),
        Sample("two", two_images),
        chat("q", "a", "q", "a", "q", "a longer last answer"),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_training_batch_equals_the_computation_by_hand(processor, tokenizer, side: str) -> None:
    samples = dialogues()
    batch = Collator(processor, padding_side=side)(samples)
    wanted = [expected(sample, tokenizer) for sample in samples]
    length = max(len(ids) for ids, _ in wanted)
    assert batch["input_ids"].shape == (4, length)
    for row, (ids, labels) in enumerate(wanted):
        at = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        rest = [column for column in range(length) if column not in range(length)[at]]
        assert batch["input_ids"][row, at].tolist() == ids
        assert batch["labels"][row, at].tolist() == labels
        assert batch["attention_mask"][row, at].tolist() == [1] * len(ids)
        assert batch["mm_token_type_ids"][row, at].tolist() == [int(token == processor.image_token_id) for token in ids]
        assert batch["input_ids"][row, rest].eq(tokenizer.pad_token_id).all()
        assert batch["labels"][row, rest].eq(IGNORED).all()
        assert not batch["attention_mask"][row, rest].any()
        assert not batch["mm_token_type_ids"][row, rest].any()
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "mm_token_type_ids": torch.int64,
        "labels": torch.int64,
        "pixel_values": torch.float32,
    }
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    for row, colour in enumerate([RED, RED, BLUE, BLUE]):
        pixel = torch.tensor(colour.getpixel((0, 0))) / 127.5 - 1
        assert torch.allclose(batch["pixel_values"][row], pixel[:, None, None].expand(3, 32, 32), atol=1e-6)


def test_batch_rows_equal_single_rows(processor) -> None:
    collate, samples = Collator(processor), dialogues()
    batch = collate(samples)
    images = 0
    for row, sample in enumerate(samples):
        single = collate([sample])
        length = single["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(batch[key][row, :length], single[key][0])
        if "pixel_values" in single:
            count = len(single["pixel_values"])
            assert torch.equal(batch["pixel_values"][images : images + count], single["pixel_values"])
            images += count


def test_a_published_template_without_markers_is_marked(processor) -> None:
    """What is learnt is what the marked template says: each answer, with the token that ends it."""
    samples = [chat("what?", "red", images=(RED,)), chat("q", "a", "and?", "b c. ")]
    trained = Collator(processor)(samples)
    template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    found = Collator(unmarked)(samples)
    assert set(found) == set(trained)
    assert all(torch.equal(found[key], trained[key]) for key in trained)
    measured = Collator(unmarked, labels=False)(samples)
    assert set(measured) == set(trained) - {"labels"}
    assert all(torch.equal(measured[key], trained[key]) for key in measured)


def test_microworld_dialogues_through_the_template(processor, tokenizer) -> None:
    source = open_source({"microworld": "dialogue", "limit": 28})
    samples = [source[n] for n in range(28)]
    batch = Collator(processor)(samples)
    for row, sample in enumerate(samples):
        ids, labels = expected(sample, tokenizer)
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["labels"][row, : len(ids)].tolist() == labels
    assert len(batch["pixel_values"]) == sum(len(sample.images) for sample in samples)


def test_text_only_batches_have_no_pixels(processor) -> None:
    batch = Collator(processor)([chat("a", "b"), chat("a longer one", "b")])
    assert set(batch) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}
    assert not batch["mm_token_type_ids"].any()


def test_plain_tokenizers_give_the_same_text_rows(processor, tokenizer) -> None:
    samples = [chat("a", "b", "c", "d"), chat("a longer one", "b")]
    plain, full = Collator(tokenizer)(samples), Collator(processor)(samples)
    assert set(plain) == {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(plain[key], full[key]) for key in plain)
    with pytest.raises(RecordError, match="reads text only"):
        Collator(tokenizer)([chat("a", "b", images=(RED,))])


def test_prompts_end_where_the_assistant_begins(processor, tokenizer) -> None:
    prompts = [Sample(s.id, s.messages[:-1]) for s in dialogues()]
    batch = Collator(processor, train=False)(prompts)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    for row, sample in enumerate(prompts):
        ids = expected(sample, tokenizer)[0] + start
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - len(ids)) + [1] * len(ids)
    with pytest.raises(RecordError, match="must end with a user turn"):
        Collator(processor, train=False)(dialogues())
    assert Collator(tokenizer, train=False)([chat("a")])["input_ids"][0, -len(start) :].tolist() == start


def test_stock_models_take_the_batches(processor, tokenizer) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    host = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=processor.image_token_id,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    ).eval()
    batch = Collator(processor)(dialogues())
    loss = host(**batch).loss
    logits = host(**{key: value for key, value in batch.items() if key not in ("labels", "mm_token_type_ids")}).logits
    told = batch["labels"][:, 1:] != IGNORED
    by_hand = -logits[:, :-1].log_softmax(-1)[told].gather(-1, batch["labels"][:, 1:][told][:, None]).mean()
    torch.testing.assert_close(loss, by_hand)
    prompts = Collator(processor, train=False)([Sample(s.id, s.messages[:-1]) for s in dialogues()])
    out = host.generate(**prompts, max_new_tokens=2, do_sample=False)
    assert out.shape[1] <= prompts["input_ids"].shape[1] + 2
    assert LlamaForCausalLM(text)(**Collator(tokenizer)([chat("a", "b")])).loss.isfinite()


def _other_processor(name: str):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<boi>",
        "<eoi>",
        "<fake_token_around_image>",
        "<global-img>",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["a"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    named = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=named
    )
    side = {"height": 32, "width": 32}
    match name:
        case "llava_next":
            pixels = LlavaNextImageProcessorPil(
                size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=[[32, 64], [64, 32]]
            )
            return LlavaNextProcessor(
                pixels, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=TEMPLATE
            )
        case "gemma3":
            template = TEMPLATE.replace("<image>", "<boi>")
            return Gemma3Processor(
                Gemma3ImageProcessorPil(size=side), tokenizer, image_seq_length=4, chat_template=template
            )
        case "idefics3":
            pixels = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
            return Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=TEMPLATE)


def test_hosts_that_alula_builds(tokenizer) -> None:
    # the language model's own template (strings only) becomes the host's: same text, same labels, images added
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=STRING_TEMPLATE,
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    host = build_host(
        LlamaConfig(**size, vocab_size=len(own)),
        SiglipVisionConfig(**size, image_size=32, patch_size=8),
        tokenizer=own,
    )
    samples = dialogues()
    batch = Collator(host.processor)(samples)
    for row, sample in enumerate(samples):
        ids, labels = expected(sample, tokenizer)
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["labels"][row, : len(ids)].tolist() == labels
    assert host.model(**batch).loss.isfinite()


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])
def test_other_stock_processors(name: str) -> None:
    # tilings, added begin and end tokens, token types under another name: the labels hold whatever the expansion is
    processor = _other_processor(name)
    tokenizer, collate = processor.tokenizer, Collator(processor)
    image = tokenizer.convert_tokens_to_ids("<image>")
    samples = [chat("what?", "red", "and?", "blue", images=(RED, BLUE)), chat("q", "a"), chat("q", "aa", images=(RED,))]
    batch = collate(samples)
    told = [tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert told == ["red<|im_end|>blue<|im_end|>", "a<|im_end|>", "aa<|im_end|>"]
    assert batch["mm_token_type_ids"][batch["input_ids"] == image].all()
    assert batch["mm_token_type_ids"].sum(1).gt(0).tolist() == [True, False, True]
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    text = collate([samples[1]])
    assert "pixel_values" not in text
    assert {"input_ids", "attention_mask", "mm_token_type_ids", "labels"} <= set(text)
    length = text["input_ids"].shape[1]
    assert torch.equal(text["labels"][0], batch["labels"][1, :length])
    # signs of the one are ordinary special tokens to another
    words = "<image>" + {"gemma3": " <boi>", "idefics3": " <fake_token_around_image><global-img>"}.get(name, "")
    literal = collate([chat(f"what is {words}?", words, images=(RED,)), samples[2]])
    assert tokenizer.decode(literal["labels"][0][literal["labels"][0] != IGNORED], skip_special_tokens=True) == words
    assert torch.equal((literal["input_ids"] == image).sum(1), (batch["input_ids"] == image).sum(1)[[2, 2]])
    prompts = Collator(processor, train=False)([Sample("p", s.messages[:-1]) for s in samples])
    assert all(tokenizer.decode(row).endswith("<|im_start|>assistant\n") for row in prompts["input_ids"])


def test_too_long_is_an_error_never_a_cut(processor, tokenizer) -> None:
    sample = chat("what?", "red", images=(RED, BLUE))
    length = len(expected(sample, tokenizer)[0])
    assert Collator(processor, max_length=length)([sample])["input_ids"].shape == (1, length)
    with pytest.raises(
        TooLongError, match=rf"test: {length} tokens, 2 image\(s\) included, more than max_length {length - 1}"
    ):
        Collator(processor, max_length=length - 1)([chat("a", "b"), sample])


def test_nothing_to_learn_from_is_an_error(processor) -> None:
    with pytest.raises(UnsupervisedError, match="no token to learn from"):
        Collator(processor)([chat("only a question")])


@pytest.mark.parametrize("plain", [False, True])
def test_answers_marked_so_are_not_learnt(processor, tokenizer, plain: bool) -> None:
    sample = chat("q", "one", "q", "two three", "q", "four")
    _, labels = expected(sample, tokenizer)
    learnt = [at for at, label in enumerate(labels) if label != IGNORED]
    starts = [at for at in learnt if at - 1 not in learnt]
    for off in ([1], [0, 2]):
        for number in (0, 1, 2):
            sample.messages[2 * number + 1]["train"] = number not in off
        wanted = [
            IGNORED if sum(start <= at for start in starts) - 1 in off else label for at, label in enumerate(labels)
        ]
        other = chat("q", "a longer answer than the others", "and then ?", "whole", name="other")
        batch = Collator(tokenizer if plain else processor)([other, sample])
        assert batch["labels"][1, : len(labels)].tolist() == wanted
        assert batch["labels"][0].tolist()[: len(expected(other, tokenizer)[1])] == expected(other, tokenizer)[1]
    for message in sample.messages[1::2]:
        message["train"] = False
    with pytest.raises(UnsupervisedError):
        Collator(processor)([sample])


def test_answers_cannot_be_told_apart_where_the_template_does_not(processor: LlavaProcessor) -> None:
    twice = copy.copy(processor)
    twice.chat_template = TEMPLATE.replace("{% generation %}", "{% generation %}A{% endgeneration %}:{% generation %}")
    sample = chat("q", "one", "q", "two")
    sample.messages[1]["train"] = False
    with pytest.raises(RecordError, match=r"2 answers .* marks 4 stretches"):
        Collator(twice)([sample])


def test_placeholders_written_as_words_are_text(processor, tokenizer) -> None:
    """As if the vocabulary held no such token: segments between the template's own tokens, taken as plain text."""
    sample = chat("is <image><image>\nthe <image> tag", "<image> is", "what?", "a <image>", images=(RED,))
    ids, labels = [], []
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    read = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    for number, message in enumerate(sample.messages):
        answer = message["role"] == "assistant"
        text = message["content"][-1]["text"]
        opened = read(f"{message['role']}\n")["input_ids"]
        if number == 0:
            said = [processor.image_token_id] * TOKENS_PER_IMAGE + read(text)["input_ids"]
        else:
            both = read(f"{message['role']}\n{text}")["input_ids"]
            assert both[: len(opened)] == opened
            said = both[len(opened) :]
        ids += [begin, *opened, *said, end, *read("\n")["input_ids"]]
        labels += [IGNORED] * (1 + len(opened)) + [*said, end] if answer else [IGNORED] * (2 + len(opened) + len(said))
        labels += [IGNORED] * len(read("\n")["input_ids"])
    other = chat("what?", "red", images=(BLUE,))
    batch = Collator(processor)([other, sample])
    assert batch["input_ids"][1].tolist() == ids
    assert batch["labels"][1].tolist() == labels
    assert batch["mm_token_type_ids"][1].sum() == TOKENS_PER_IMAGE
    alone = Collator(processor)([other])
    assert torch.equal(batch["input_ids"][0, : alone["input_ids"].shape[1]], alone["input_ids"][0])
    prompt = Collator(processor, train=False)([chat("an <image>?")])
    assert "an <image>?" in tokenizer.decode(prompt["input_ids"][0])
    assert processor.image_token_id not in prompt["input_ids"]
    assert tokenizer("<image>")["input_ids"] == [processor.image_token_id]  # the tokenizer itself is as it was
    split = Sample("split", [say("user", "the <ima", "ge> tag"), say("assistant", "a")])
    with pytest.raises(PlaceholderError, match="two text parts make the special token '<image>' together"):
        Collator(processor)([other, split, sample])


def test_placeholders_that_a_tokenizer_cannot_take_as_text_are_an_error(processor: LlavaProcessor) -> None:
    words = [
        *["<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<unk>"],
        *["what", "does", "mean", "?", "a", "tag", "user", "assistant"],
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    whole = LlavaProcessor(processor.image_processor, tokenizer, patch_size=8, chat_template=TEMPLATE)
    with pytest.raises(
        PlaceholderError, match=r"test: the text contains the image token '<image>'.*\n.*word it"
    ) as caught:
        Collator(whole)([chat("what does <image> mean ?", "a tag", name="svg")])
    assert caught.value.place.record == "svg"


def test_bad_images_name_their_record(processor) -> None:
    sample = chat("?", "a", images=(ImageRef.from_bytes(b"no image"),), name="broken")
    with pytest.raises(ImageError, match="test: image '<bytes>' is corrupt") as caught:
        Collator(processor)([chat("a", "b"), sample])
    assert caught.value.place.record == "broken"


def test_refusing_templates_name_their_record(tokenizer, processor) -> None:
    template = (
        "{% if messages[0].content[0].text == 'bad' %}{{ raise_exception('no such thing') }}{% endif %}"
        + processor.chat_template
    )
    strict = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    with pytest.raises(RecordError, match="refuses it: no such thing") as caught:
        Collator(strict)([chat("good", "a"), chat("bad", "a", name="the bad one")])
    assert caught.value.place.record == "the bad one"


def test_skipping_replaces_samples_reproducibly(processor, tokenizer, tmp_path) -> None:
    good = [chat(f"q{n}", "a", name=f"good{n}", images=(RED,) if n % 2 else ()) for n in range(12)]
    bad = [
        chat("q", "a", name="image", images=(ImageRef.from_bytes(b"x"),)),
        chat("q " * 300, "a", name="long"),
        chat("q", name="silent"),
        chat("<image>\ufdd3", "a", name="token"),
    ]
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    mixture = Mixture([ListSource([*good, *bad])], seed=1, quarantine=quarantine)
    collate = Collator(processor, max_length=100, quarantine=quarantine, replacer=mixture)
    batches = [collate([mixture[n] for n in range(first, first + 8)]) for first in (0, 8)]
    assert all(batch["input_ids"].shape[0] == 8 for batch in batches)
    assert quarantine.counts() == {"image": 1, "too long": 1, "unsupervised": 1, "placeholders": 1}
    assert {entry["id"] for entry in quarantine.entries()} == {"image", "long", "silent", "token"}
    again = collate([mixture[n] for n in range(8, 16)])  # a resumed run
    assert all(torch.equal(again[key], batches[1][key]) for key in again)
    # without a replacer the bad ones leave gaps, and a batch of nothing is an error
    alone = Collator(processor, max_length=100, quarantine=quarantine)
    assert alone([*good[:3], *bad])["input_ids"].shape[0] == 3
    with pytest.raises(DataError, match="no sample of the batch is usable"):
        alone(bad)


def test_padding_to_a_multiple_and_fingerprints(processor) -> None:
    batch = Collator(processor, pad_to_multiple_of=32, fingerprints=True)(dialogues())
    assert batch["input_ids"].shape[1] % 32 == 0
    keys = batch["image_fingerprints"]
    assert len(keys) == len(batch["pixel_values"])
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_unusable_processors_are_refused(processor, tokenizer) -> None:
    def with_template(template: str | None) -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=processor.image_processor, tokenizer=tokenizer, patch_size=8, chat_template=template
        )

    with pytest.raises(UsageError, match="does not mark what the assistant says"):
        Collator(with_template("{{ messages[0].content }}"))
    Collator(with_template("{{ messages[0].content }}"), train=False)
    with pytest.raises(UsageError, match="no chat template"):
        Collator(with_template(None))


# -- answers end with a stop token ---------------------------------------------------------------------------------

# as published with llava-hf/llava-1.5-7b-hf: answers are marked, but nothing ends them
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def learnt(processor: object, sample: Sample, **options: object) -> list[str]:
    """The stretches of text a training batch has labels for."""
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    batch = Collator(processor, **options)([sample])
    stretches: list[list[int]] = [[]]
    for label in batch["labels"][0].tolist():
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


def templated(processor: LlavaProcessor, template: str) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


DIALOGUE = Sample(
    "two",
    [
        say("user", RED, "what colour?"),
        say("assistant", "red", "and nothing else"),
        say("user", "how many rings?"),
        say("assistant", "two of them"),
    ],
)


def test_a_template_that_writes_no_stop_token_is_given_one(processor: LlavaProcessor, caplog) -> None:
    llava = templated(processor, LLAVA_TEMPLATE)
    assert learnt(llava, DIALOGUE) == [" red and nothing else<|im_end|>", " two of them<|im_end|>"]
    assert "ends answers with no stop token" in caplog.text
    prompt = chat("what colour?", "red", "how many?", images=(RED,))
    shown = llava.tokenizer.decode(Collator(llava, train=False)([prompt])["input_ids"][0])
    assert "<|im_end|>" not in shown, "prompts are the model's own"


def test_looking_for_marks_is_no_reason_to_warn(processor: LlavaProcessor, transformers_says) -> None:
    """transformers warns, once per process, of whoever asks it for marks that a template does not set."""
    Collator(templated(processor, re.sub("{% (end)?generation %}", "", TEMPLATE)))
    assert "mask" not in transformers_says.text


def test_a_stop_token_behind_the_marked_answer_is_learnt(processor: LlavaProcessor, caplog) -> None:
    outside = TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ '\n<|im_end|>' }}")
    made = templated(processor, outside)
    assert learnt(made, chat("a?", "red", "b?", "two")) == ["red\n<|im_end|>", "two\n<|im_end|>"]
    ids = Collator(made)([chat("a?", "red")])["input_ids"]
    assert ids.equal(Collator(made, labels=False)([chat("a?", "red")])["input_ids"]), "the text stays the template's"
    assert not caplog.text
    # what a template does not read is taken for an argument of the processor's
    assert "refuse_cut_answers" in Collator(made).intake.keywords
    assert "refuse_cut_answers" not in Collator(templated(processor, TEMPLATE)).intake.keywords


def test_what_a_template_ends_its_turns_with_ends_answers(processor: LlavaProcessor, caplog) -> None:
    """Gemma's end of turn is not its tokenizer's end token."""
    made = templated(processor, TEMPLATE.replace("<|im_end|>", "<pad>"))
    assert learnt(made, chat("a?", "red", "b?", "two")) == ["red<pad>", "two<pad>"]
    outside = templated(processor, TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<pad>"))
    assert learnt(outside, chat("a?", "red", "b?", "two")) == ["red<pad>", "two<pad>"]
    assert not caplog.text


def test_what_begins_the_next_turn_ends_no_answer(processor: LlavaProcessor) -> None:
    between = TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}").replace("{{ '\n' }}", "")
    made = templated(processor, between)  # the next turn follows at once, with a special token of its own
    assert learnt(made, chat("a?", "red", "b?", "two")) == ["red<|im_end|>", "two<|im_end|>"]


def test_tokens_that_the_model_stops_at_count(processor: LlavaProcessor) -> None:
    last = "{% endgeneration %}{{ '<pad>' if loop.last else 'x' }}"
    made = templated(processor, TEMPLATE.replace("<|im_end|>{% endgeneration %}", last))
    assert learnt(made, chat("a?", "red"), stops=[made.tokenizer.pad_token_id]) == ["red<pad>"]


@pytest.mark.parametrize("change", [("{{ p.text }}", "{{ p.text | upper }}"), ("{{ p.text }}", "{{ p.text[:-1] }}")])
def test_templates_whose_answers_cannot_be_ended_are_refused(processor: LlavaProcessor, change: tuple) -> None:
    endless = TEMPLATE.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}").replace(*change)
    with pytest.raises(UsageError, match=r"(?s)without the token that ends them.*put the token inside"):
        Collator(templated(processor, endless))


def test_template_of_strings_is_ended_too(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = STRING_TEMPLATE.replace("{{ m['content'] + '<|im_end|>' }}{% endg", "{{ m['content'] }}{% endg")
    own = tokenizer.chat_template
    tokenizer.chat_template = endless
    try:
        batch = Collator(tokenizer)([chat("a?", "red")])
    finally:
        tokenizer.chat_template = own
    kept = batch["labels"][0]
    assert tokenizer.decode(kept[kept != IGNORED]) == "red<|im_end|>"


# the idiom of Qwen3's: the last thought is written anew, earlier ones are left out
THINKING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}{%- set said = m['content'] -%}"
    "{%- if '</think>' in said -%}{%- set said = m['content'].split('</think>')[-1].lstrip('\n') -%}"
    "{%- if loop.last -%}{%- set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
    "{{- said + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def test_thoughts_in_front_of_answers_are_learnt_as_far_as_they_are_written(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.copy(tokenizer)
    own.chat_template = THINKING
    first, last = "<think>\nlong\n</think>\n\nred", "<think>short</think>two"
    (row,) = Collator(own)([chat("a?", first, "b?", last)])["labels"].tolist()
    kept = [label for label in row if label != IGNORED]
    assert own.decode(kept) == "red<|im_end|><think>\nshort\n</think>\n\ntwo<|im_end|>"
    # a template that keeps what is said as it is learns all of it
    own.chat_template = STRING_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (row,) = Collator(own)([chat("a?", first, "b?", last)])["labels"].tolist()
    assert own.decode([label for label in row if label != IGNORED]) == f"{first}<|im_end|>{last}<|im_end|>"
    # what is cut elsewhere would have no labels
    own.chat_template = THINKING
    with pytest.raises(RecordError, match="cuts an answer"):
        Collator(own)([chat("a?", "<think>one</think> or <think>two</think> so")])
