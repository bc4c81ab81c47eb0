"""Encoding demonstrations and showing them, against a loop over demonstrations that splices by hand."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula import AimConfig
from alula.chat_template import TemplateSettings
from alula.demonstrations import Demonstration, FewShot, Shot, demonstrations_in, encode
from alula.demonstrations.few_shot import fused_inputs
from alula.errors import UsageError
from alula.evaluation.generation import answer, neutral_config
from alula.grafts.aim import FUSED, FUSED_AT
from alula.hosts.decoding import Decoding
from alula.inputs import Intake
from alula.seam import generation_extras
from tests.demonstrations.conftest import asked, demonstration


def tokens(processor: Any, text: str) -> int:
    """How many tokens a text is."""
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def naive_fused(model: Any, processor: Any, shown: Demonstration) -> Tensor:
    """F = LayerNorm(W h + b) over the words of one demonstration, token by token, its tokens counted by hand: the
    tokenizer of these tests has one per character, and one per token of a picture."""
    before, between = "<|user|>", "<|end|><|assistant|>"
    text = f"{before}<image>{shown.question}{between}{shown.answer}<|end|>"
    inputs = processor(text=text, images=shown.picture, return_tensors="pt")
    states = model.model(**inputs).last_hidden_state[0]
    start = tokens(processor, before) + 4
    behind = start + len(shown.question) + tokens(processor, between)
    rows = [*range(start, start + len(shown.question)), *range(behind, behind + len(shown.answer))]
    assert len(states) == behind + len(shown.answer) + tokens(processor, "<|end|>")
    weights = alula.grafts_of(model)["aim"].state_dict()
    w, b, gain, shift = (
        next(v for k, v in weights.items() if k.endswith(end))
        for end in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    )
    found = []
    for row in rows:
        mapped = w.double() @ states[row].double() + b.double()
        centered = mapped - mapped.mean()
        found.append(centered / (centered.square().mean() + 1e-5).sqrt() * gain.double() + shift.double())
    return torch.stack(found).float()


@torch.no_grad()
def naive_logits(model: Any, stock: Any, processor: Any, shown: list[Demonstration], question: Any) -> Tensor:
    """Logits (1, S, V) of a stock host over embeddings that are put together piece by piece."""
    tokenizer, embed = processor.tokenizer, stock.get_input_embeddings()

    def glue(text: str) -> Tensor:
        return embed(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"])[0]

    pieces = []
    for each in shown:
        fused = naive_fused(model, processor, each)
        pieces += [glue("<|user|>"), fused[: len(each.question)], glue("<|end|><|assistant|>")]
        pieces += [fused[len(each.question) :], glue("<|end|>")]
    inputs = Intake(processor).tensors(question)[0]
    embeddings = torch.cat([*pieces, embed(inputs["input_ids"])[0]])[None]
    pixels = {key: value for key, value in inputs.items() if key == "pixel_values"}
    return stock(inputs_embeds=embeddings, **pixels).logits


def logits(model: Any, intake: Intake, question: Any) -> Tensor:
    with torch.no_grad():
        return model(**intake.tensors(question)[0]).logits


def test_it_is_the_loop_over_demonstrations_in_any_order(
    model: Any, stock: Any, processor: Any, demonstrations: list[Demonstration]
) -> None:
    shots = encode(model, processor, demonstrations)
    for shot, shown in zip(shots, demonstrations, strict=True):
        torch.testing.assert_close(shot.fused, naive_fused(model, processor, shown), atol=2e-5, rtol=1e-4)
        assert len(shot.fused) == len(shown.question) + len(shown.answer), "one fused token for each token of the words"
    for order in ((0,), *[*permutations(range(4))][::7]):
        found = logits(model, FewShot(processor, [shots[i] for i in order]), asked())
        expected = naive_logits(model, stock, processor, [demonstrations[i] for i in order], asked())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_prompt_is_as_long_as_that_of_texts_alone(
    model: Any, processor: Any, demonstrations: list[Demonstration]
) -> None:
    inputs, roles = FewShot(processor, encode(model, processor, demonstrations)).tensors(asked(), roles=True)
    texts = [turn for each in demonstrations for turn in each.messages(picture=False)]
    plain, expected = Intake(processor).tensors([*texts, *asked()], roles=True)
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert torch.equal(inputs["attention_mask"], plain["attention_mask"])
    assert roles == expected
    assert len(inputs["pixel_values"]) == 1, "the pictures of demonstrations are gone"
    assert int(inputs[FUSED_AT].sum()) == sum(len(each.question) + len(each.answer) for each in demonstrations)


def test_encoding_is_the_same_in_any_batch(model: Any, processor: Any, demonstrations: list[Demonstration]) -> None:
    together = encode(model, processor, demonstrations)
    for size in (1, 3):
        for one, other in zip(encode(model, processor, demonstrations, batch_size=size), together, strict=True):
            torch.testing.assert_close(one.fused, other.fused, atol=1e-5, rtol=1e-5)
            assert (one.question_ids, one.answer_ids) == (other.question_ids, other.answer_ids)
    other = encode(model, processor, [demonstration(7, demonstrations[0].question, demonstrations[0].answer)])[0]
    assert not torch.allclose(other.fused, together[0].fused, atol=1e-3), "another picture, other fused tokens"


def test_without_shots_it_is_the_hosts_own(model: Any, stock: Any, processor: Any) -> None:
    assert torch.equal(logits(model, FewShot(processor, []), asked()), logits(stock, Intake(processor), asked()))
    assert FewShot(processor, []).render(asked()).hash == Intake(processor).render(asked()).hash


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}])
def test_answers_in_a_batch_are_those_alone(
    way: dict[str, Any], model: Any, processor: Any, demonstrations: list[Demonstration]
) -> None:
    """Prompts of different lengths with other shots; with a cache and without."""
    shots = encode(model, processor, demonstrations)
    prompts = [
        FewShot(processor, shots[:3]).render(asked()),
        FewShot(processor, shots[2:]).render(asked(5, "or that?", shown=False)),
        Intake(processor).render(asked(6, "?")),
    ]
    config = neutral_config(model, processor, Decoding(), 6)
    config.update(**way)
    together = answer(model, processor, prompts, config, 0)
    for prompt, found in zip(prompts, together, strict=True):
        assert answer(model, processor, [prompt], config, 0)[0].ids == found.ids
    config.use_cache = False
    assert [each.ids for each in answer(model, processor, prompts, config, 0)] == [each.ids for each in together]
    bare = answer(model, processor, [Intake(processor).render(asked())], config, 0)[0]
    assert bare.ids != together[0].ids, "the shots count"


def test_ragged_batches_put_every_fused_token_where_its_word_is(
    model: Any, processor: Any, demonstrations: list[Demonstration]
) -> None:
    shots = encode(model, processor, demonstrations)
    prompts = [FewShot(processor, shots[:1]).render(asked()), FewShot(processor, shots).render(asked(shown=False))]
    width = max(prompt.length for prompt in prompts)
    batch = fused_inputs(prompts, width)
    for row, prompt in enumerate(prompts):
        left = width - prompt.length
        rows = prompt.inputs[FUSED][0]
        assert torch.equal(batch[FUSED][row, left : left + len(rows)], rows)
        assert not batch[FUSED_AT][row, :left].any()
        assert int(batch[FUSED_AT][row].sum()) == int(prompt.inputs[FUSED_AT].sum())
    assert fused_inputs([Intake(processor).render(asked())], 9) == {}


def test_a_system_prompt_stays_in_front(model: Any, processor: Any, demonstrations: list[Demonstration]) -> None:
    intake = FewShot(processor, encode(model, processor, demonstrations[:2]))
    for words in ("be brief", "be long", "be brief"):
        system = [{"role": "system", "content": [{"type": "text", "text": words}]}]
        inputs, _ = intake.tensors([*system, *asked()])
        text = processor.tokenizer.decode(inputs["input_ids"][0].tolist())
        before = f"<|system|>{words}<|end|><|user|>"
        assert text.startswith(f"{before}color?<|end|><|assistant|>red<|end|>")
        start = tokens(processor, before)
        assert not inputs[FUSED_AT][0, :start].any()
        assert inputs[FUSED_AT][0, start : start + len("color?")].all()


def test_words_that_are_other_tokens_beside_a_picture_keep_those(model: Any, processor: Any) -> None:
    """Templates put signs of their own between picture and words: fused tokens are as many as the words have there."""
    shot = encode(model, processor, [demonstration(0, "color?", "red")])[0]
    longer = Shot("color?", "red", (*shot.question_ids, 7), shot.answer_ids, torch.cat([shot.fused[:1], shot.fused]))
    ids = FewShot(processor, [longer]).tensors(asked())[0]
    plain = FewShot(processor, [shot]).tensors(asked())[0]
    length = plain["input_ids"].shape[1]
    assert ids["input_ids"].shape == ids["attention_mask"].shape == (1, length + 1)
    assert int(ids[FUSED_AT].sum()) == int(plain[FUSED_AT].sum()) + 1
    behind = tokens(processor, "<|user|>color?")
    assert ids["input_ids"][0, behind] == 7
    assert torch.equal(ids["input_ids"][0, behind + 1 :], plain["input_ids"][0, behind:])


def test_words_of_the_template_are_never_taken_for_words(model: Any, processor: Any) -> None:
    """A question that reads like the sign before it, and an answer that stands in the question."""
    shown = [demonstration(0, "user", "user"), demonstration(1, "end", "|")]
    inputs, _ = FewShot(processor, encode(model, processor, shown)).tensors(asked())
    text = processor.tokenizer.decode(inputs["input_ids"][0].tolist())
    assert text.startswith("<|user|>user<|end|><|assistant|>user<|end|><|user|>end<|end|><|assistant|>|<|end|>")
    at = [token for token, fused in enumerate(inputs[FUSED_AT][0].tolist()) if fused]
    said = 0
    for before, words in (
        ("<|user|>", 4),
        ("<|end|><|assistant|>", 4),
        ("<|end|><|user|>", 3),
        ("<|end|><|assistant|>", 1),
    ):
        said += tokens(processor, before)
        assert at[:words] == [*range(said, said + words)]
        at, said = at[words:], said + words
    assert not at


def test_half_precision(model: Any, processor: Any, demonstrations: list[Demonstration]) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    shots = encode(half, processor, demonstrations)
    full = encode(model, processor, demonstrations)
    for one, other in zip(shots, full, strict=True):
        assert one.fused.dtype == torch.bfloat16
        assert (one.fused.float() - other.fused).abs().mean() < 0.1 * other.fused.abs().mean()
    inputs = FewShot(processor, shots).tensors(asked())[0]
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with generation_extras(half, inputs) as given, torch.no_grad():
        assert half.generate(**given, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_map_from_an_earlier_layer(stock: Any, processor: Any, demonstrations: list[Demonstration]) -> None:
    host = copy.deepcopy(stock)
    alula.attach(host, AimConfig(layer=0, norm=False))
    shot = encode(host, processor, demonstrations[:1])[0]
    inputs = processor(text="<|user|><image>color?<|end|>", images=demonstrations[0].picture, return_tensors="pt")
    with torch.no_grad():
        states = stock(**inputs, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(shot.fused[:6], states[-7:-1], atol=1e-5, rtol=1e-5)


def test_what_a_template_is_told_keeps_the_shots(
    model: Any, processor: Any, demonstrations: list[Demonstration]
) -> None:
    intake = FewShot(processor, encode(model, processor, demonstrations))
    assert Intake.of(intake) is intake
    told = Intake.of(intake, TemplateSettings())
    assert isinstance(told, FewShot)
    assert told.digest == intake.digest


def test_demonstrations_of_a_conversation() -> None:
    shown = demonstration(0, "what?", "this")
    two = {**asked()[0], "content": [*asked()[0]["content"][:1] * 2, {"type": "text", "text": "both?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    chat = [*asked(question="no picture", shown=False), said, *shown.messages(), two, said, *asked()]
    found = [*demonstrations_in(chat)]
    assert [(each.question, each.answer) for each in found] == [("what?", "this")]
    assert found[0].fingerprint() == shown.fingerprint()


def test_what_cannot_be_is_refused(model: Any, stock: Any, processor: Any, demonstrations: list[Demonstration]) -> None:
    with pytest.raises(UsageError, match="no map"):
        encode(stock, processor, demonstrations)
    with pytest.raises(UsageError, match="needs words"):
        demonstration(0, " ", "a")
    upper = copy.deepcopy(processor)
    upper.chat_template = upper.chat_template.replace("part.text }}", "part.text | upper }}")
    with pytest.raises(UsageError, match="words of a message are not found"):
        encode(model, upper, demonstrations)
    host = copy.deepcopy(model)
    alula.attach(host, AimConfig(), "other")
    with pytest.raises(UsageError, match=r"which map\? The model has aim, other"):
        encode(host, processor, demonstrations)
    assert len(encode(host, processor, demonstrations, name="other")) == 4
