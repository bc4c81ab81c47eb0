"""The bytes of tokens, and which tokens of an answer are listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers

from alula.serving.engine import Delta, Engine, Finished, Request, Sampling, TokenLogprob
from alula.serving.engine.spelling import Spelling
from tests.hosts import tiny
from tests.serving import reciting

SAID = "né 中🐦ok!"
ASK = [{"role": "user", "content": "say it"}]


def pieces() -> hf.PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: pieces that begin with a blank, and bytes for what no piece is."""
    names = ["<unk>", "<s>", "<pad>", "<|im_start|>", reciting.END, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁n", "▁", "ok!", "▁ok"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=reciting.END, pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = tiny.CHATML
    return fast


BYTES = [b"\xe4", b"\xb8", b"\xad", b"\xf0", b"\x9f", b"\x90", b"\xa6"]
"""of the two characters that are cut by tokens"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("spelling")
    level, fallback = tiny.tokenizer(), pieces()
    ids = level(SAID, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    reciting.save(folder / "level", ids)
    names = ["▁n", "<0xC3>", "<0xA9>", "▁", *(f"<0x{byte[0]:02X}>" for byte in BYTES), "ok!"]
    reciting.save(folder / "fallback", fallback.convert_tokens_to_ids(names), tokenizer=fallback)
    with Engine() as made:
        for name in ("level", "fallback"):
            made.load(name, folder / name)
        yield made


def listed(engine: Engine, model: str, **settings: Any) -> tuple[str, list[TokenLogprob], Finished]:
    """Text, tokens and end of an answer, whose pieces are checked on the way."""
    sampling = Sampling(temperature=0, logprobs=True, top_logprobs=4, **settings)
    *deltas, end = engine.submit(Request(model, ASK, sampling=sampling))
    assert isinstance(end, Finished)
    text, found = "", []
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.logprobs is not None
        text += delta.text
        found += delta.logprobs
        said = b"".join(each.utf8 for each in found)
        assert text.startswith(said.decode(errors="replace"))  # nothing is listed that was not told
    return text, found, end


@pytest.mark.parametrize("model", ["level", "fallback"])
def test_all_bytes_are_the_text(engine: Engine, model: str) -> None:
    text, found, end = listed(engine, model, max_tokens=40)
    assert (text, end.reason) == (SAID, "stop")
    assert b"".join(each.utf8 for each in found) == SAID.encode()
    assert end.usage.completion_tokens == len(found) + 1  # what ended it is not listed
    halves = [each for each in found if each.utf8 in BYTES]
    assert [each.utf8 for each in halves] == BYTES
    assert halves[0].text == r"\xe4"
    assert all(each.text == each.utf8.decode() for each in found if each.utf8.isascii())
    assert [each.top[0].utf8 for each in found] == [each.utf8 for each in found]
    assert [each.top[0].text for each in found] == [each.text for each in found]


@pytest.mark.parametrize("model", ["level", "fallback"])
@pytest.mark.parametrize("stop", ["ok", "k!", "中🐦", "🐦", "!", "é 中"])
def test_what_is_cut_off_is_not_listed(engine: Engine, model: str, stop: str) -> None:
    text, found, end = listed(engine, model, max_tokens=40, stop=("never", stop))
    assert (text, end.reason) == (SAID[: SAID.index(stop)], "stop")
    assert b"".join(each.utf8 for each in found) == text.encode()
    assert all(each.utf8 for each in found)
    if (model, stop) == ("fallback", "k!"):  # within a token
        assert (found[-1].text, found[-1].utf8) == ("o", b"o")


def test_a_text_held_for_a_stop_that_does_not_come_is_listed(engine: Engine) -> None:
    text, found, _ = listed(engine, "level", max_tokens=40, stop=("ok!?",))
    assert text == SAID
    assert b"".join(each.utf8 for each in found) == SAID.encode()


@pytest.mark.parametrize("model", ["level", "fallback"])
def test_an_answer_that_ends_in_half_a_character_tells_the_half(engine: Engine, model: str) -> None:
    most = next(
        number for number in range(2, 20) if listed(engine, model, max_tokens=number)[0].startswith("né \ufffd")
    )
    text, found, end = listed(engine, model, max_tokens=most)
    assert (text, end.reason) == ("né \ufffd", "length")
    assert found[-1].utf8 == b"\xe4"
    assert len(found) == most


def test_every_token_of_a_byte_level_vocabulary() -> None:
    tokenizer = tiny.tokenizer()
    spelling = Spelling(tokenizer)
    ids = list(range(len(tokenizer)))
    found = spelling.spelled(ids, [])
    whole = [(i, own) for i, own in zip(ids, found, strict=True) if "\ufffd" not in tokenizer.decode([i])]
    assert len(whole) > 150
    for i, own in whole:
        assert own == tokenizer.decode([i]).encode()
    halves = [own for i, own in zip(ids, found, strict=True) if "\ufffd" in tokenizer.decode([i])]
    assert {own for own in halves if len(own) == 1} == {bytes([byte]) for byte in range(128, 256)}
    assert spelling.spelled([len(tokenizer) + 7], []) == [b""]  # the model has more ids than the tokenizer


def test_a_piece_has_its_blank_but_where_it_begins_the_text() -> None:
    tokenizer = pieces()
    (token,) = tokenizer.convert_tokens_to_ids(["▁ok"])
    assert Spelling(tokenizer).spelled([token], []) == [b"ok"]
    assert Spelling(tokenizer).spelled([token], [token]) == [b" ok"]
    assert not Spelling(tokenizer).is_written(tokenizer.eos_token_id)
