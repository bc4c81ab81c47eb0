"""TEAL: ids behind the host's own, read and told, and text that stays text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

import alula
from alula.codes import JointVocabulary, VQCodes, VQConfig
from alula.errors import CodesError, HostError, UsageError
from alula.evaluation.likelihood.engine import log_likelihoods
from alula.grafts import TealConfig
from alula.grafts.teal import CodeConstraint, CodesSpec
from alula.seam import generation_extras
from tests import zoo
from tests.grafts.common import wake

CODES = {"image": CodesSpec(size=6, tokens=4, width=5), "audio": CodesSpec(size=4, tokens=3, width=2, streams=2)}


def made(host: str = "qwen3", **settings: Any) -> tuple[Any, Any, JointVocabulary]:
    model = zoo.build(host)
    graft: Any = wake(alula.attach(model, TealConfig(codes=CODES, **settings)))
    return model, graft, graft.vocabulary


def mixed(vocabulary: JointVocabulary) -> Tensor:
    """(2, 12): an image and words; words alone."""
    image = vocabulary["image"].ids([3, 0, 5, 5])
    return torch.tensor([[7, 8, *image, 9, 10, 11, 12], [*range(5, 17)]])


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_ids_of_a_joint_vocabulary_are_arithmetic() -> None:
    vocabulary = JointVocabulary.of(100, {"image": (6, 4), "audio": (4, 3, 2)})
    image, audio = vocabulary.ranges
    assert [image.begin, image.end, image.first, image.stop] == [100, 101, 102, 108]
    assert (audio.begin, audio.stop, vocabulary.size) == (108, 114, 114)
    kinds = [vocabulary.range_of(number) for number in range(114)]
    assert [each.name if each else "" for each in kinds] == [""] * 100 + ["image"] * 8 + ["audio"] * 6
    row = [5, *image.ids([0, 5, 1, 2]), 6, *audio.ids([1, 2, 0]), image.begin, 103, 104, 7]
    found = vocabulary.found(row)
    assert [(each.name, each.codes.tolist(), each.complete) for each in found] == [
        ("image", [0, 5, 1, 2], True), ("audio", [1, 2, 0], True), ("image", [1, 2], False)
    ]  # fmt: skip
    assert row[found[1].start : found[1].stop] == audio.ids([1, 2, 0])
    with pytest.raises(CodesError, match="6 is no code of 'image'"):
        image.ids([6])
    with pytest.raises(CodesError, match="image, audio"):
        vocabulary["video"]


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_the_equations_say(tied: bool) -> None:
    model, graft, vocabulary = made(bias_norm=False, tied=tied)
    ids = mixed(vocabulary)
    ids[1, 4:9] = torch.tensor(vocabulary["audio"].ids([2, 1, 3]))
    ours = logits(model, input_ids=ids)
    weights = graft.state_dict()
    alula.detach(model)
    rows, states = [], []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    for row in ids.tolist():
        embeds = []
        for number in row:
            its = vocabulary.range_of(number)
            if its is None:
                embeds.append(model.get_input_embeddings().weight[number])
            else:
                at = f"decoder.{its.name}"
                embeds.append(weights[f"{at}.inward"] @ weights[f"{at}.embeddings"][number - its.start])
        rows.append(torch.stack(embeds))
    told = logits(model, inputs_embeds=torch.stack(rows))
    handle.remove()
    for name in CODES:
        table = weights[f"decoder.{name}.{'embeddings' if tied else 'outputs'}"]
        told = torch.cat([told, states[0] @ weights[f"decoder.{name}.outward"].mT @ table.mT], dim=-1)
    assert ours.shape[-1] == vocabulary.size
    torch.testing.assert_close(ours, told, atol=1e-4, rtol=1e-4)


def test_bias_norm_is_a_host_with_other_weights() -> None:
    model, graft, vocabulary = made("llama", reach="all")
    weights, twin = graft.state_dict(), copy.deepcopy(model)
    alula.detach(twin)
    for index, layer in enumerate(twin.model.layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                at, own = f"layers.{index}", name.replace(".", "__")
                scale, bias = weights[f"{at}.scales.{own}"], weights[f"{at}.biases.{own}"]
                linear.weight.data.mul_(scale[:, None])
                linear.bias = nn.Parameter(scale * bias)
        layer.input_layernorm.weight.data.mul_(weights[f"layers.{index}.gains.attention"])
        layer.post_attention_layernorm.weight.data.mul_(weights[f"layers.{index}.gains.mlp"])
    text = mixed(vocabulary)[1:]
    theirs = logits(twin, input_ids=text)
    torch.testing.assert_close(logits(model, input_ids=text)[..., : vocabulary.text], theirs, atol=1e-4, rtol=1e-4)


def test_text_keeps_its_bits_and_codes_reach_what_follows_them() -> None:
    model, _, vocabulary = made()
    ids = mixed(vocabulary)
    ours = logits(model, input_ids=ids)
    alone = logits(model, input_ids=ids[:1])
    torch.testing.assert_close(ours[:1], alone, atol=1e-5, rtol=1e-5)
    cache = model(input_ids=ids[:, :7], use_cache=True)
    behind = model(input_ids=ids[:, 7:], past_key_values=cache.past_key_values).logits.detach()
    torch.testing.assert_close(behind, ours[:, 7:], atol=5e-5, rtol=1e-4)  # a code in the cache is remembered
    alula.detach(model)
    text = ids.clone()
    text[0, 2:] = 1
    host = logits(model, input_ids=text)
    assert torch.equal(ours[1, :, : vocabulary.text], host[1])
    assert torch.equal(ours[0, :2, : vocabulary.text], host[0, :2])


def test_a_joint_softmax_takes_mass_from_text_and_the_mask_gives_it_back() -> None:
    model = zoo.build("qwen3")
    alula.attach(model, TealConfig(codes={"image": CodesSpec(size=3 * 96, tokens=4, width=5)}))
    ids = torch.tensor([[5, 6, 7, 8]])
    joint = logits(model, input_ids=ids)[:, -1]
    graft: Any = alula.grafts_of(model)["teal"]
    (mask,) = graft.logits_processors({"input_ids": ids})
    masked = mask(ids, joint).softmax(dim=-1)
    alula.detach(model)
    host = logits(model, input_ids=ids)[:, -1]
    text = host.shape[-1]
    share = float(joint.softmax(dim=-1)[:, text:].sum())
    assert share > 0.5  # what is lost to text without the mask
    assert torch.equal(joint[:, :text], host)
    assert not masked[:, text:].any()
    torch.testing.assert_close(masked[:, :text], host.softmax(dim=-1), atol=1e-7, rtol=1e-6)


def test_texts_are_as_likely_as_they_are_to_the_host() -> None:
    model = zoo.build("qwen3")
    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 9, 10, 11]), ([5, 6], [12])]
    before = log_likelihoods(model, pairs, pad=0, batch_size=4)
    alula.attach(model, TealConfig(codes={"image": CodesSpec(size=3 * 96, tokens=4, width=5)}))
    assert log_likelihoods(model, pairs, pad=0, batch_size=4) == before


def test_codebooks_are_taken_row_by_row() -> None:
    codes = {"image": VQCodes(VQConfig(size=6, width=5, hidden=8, grid=2, patch=2), seed=0)}
    model = zoo.build("qwen3")
    graft: Any = alula.attach(model, TealConfig.of(codes))
    graft.start_from(codes)
    kind = graft.kinds["image"]
    assert torch.equal(kind.embeddings[2:], codes["image"].codebook())
    assert torch.equal(kind.outputs[2:], codes["image"].codebook())
    length = model.get_input_embeddings().weight.square().mean().sqrt()
    started = kind.embedded(torch.arange(8)).square().mean().sqrt()
    assert 0.4 < float(started / length) < 2.5
    with pytest.raises(UsageError, match="codebooks of"):
        graft.start_from({"sound": codes["image"]})


def test_the_loss_of_a_mixed_batch_is_that_of_its_samples() -> None:
    model, _, vocabulary = made()
    rows = [[7, 8, *vocabulary["image"].ids([1, 2, 3, 4])], [5, 6, 7], [*vocabulary["audio"].ids([0, 2, 1]), 9, 9]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def total(given: Tensor, attention: Tensor) -> Tensor:
        told = logits(model, input_ids=given, attention_mask=attention)[:, :-1]
        labels = torch.where(attention[:, 1:] == 1, given[:, 1:], -100)
        return F.cross_entropy(told.flatten(0, 1), labels.flatten(), reduction="sum")

    alone = sum(total(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)) for row in rows)
    torch.testing.assert_close(total(ids, mask), alone, atol=1e-3, rtol=1e-4)
    with pytest.raises(UsageError, match="leave labels out"):
        model(input_ids=ids, labels=ids)


PLANS = [[0, 1, -1], [1, -1, -1], [-1, -1, -1], [0, 0, 1]]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 1}], ids=str
)
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "between words"])
def test_generation_gives_what_was_asked_for(options: dict[str, Any], apart: bool) -> None:
    model, _, vocabulary = made()
    model.generation_config.eos_token_id = 2
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8], [0, 9, 9, 9], [4, 4, 4, 4]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long(), "generates": torch.tensor(PLANS)}
    if apart:
        inputs["interleaved"] = torch.tensor([True, True, False, True])
        for each in vocabulary.ranges:  # or they would hardly begin by themselves
            with torch.no_grad():
                alula.grafts_of(model)["teal"].kinds[each.name].outputs[0].mul_(20)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    with generation_extras(model, inputs) as given:
        said = model.generate(**given, max_new_tokens=48, pad_token_id=0, **options)[:, 4:]
    stops = [(row == 2).nonzero()[:1, 0].tolist() for row in said]
    for plan, row, stop in zip(PLANS, said, stops, strict=True):
        wanted = [vocabulary.names[number] for number in plan if number >= 0]
        row = row[: stop[0]] if stop else row
        found = vocabulary.found(row.tolist())
        assert [each.name for each in found if each.complete] == wanted[: len(found)]
        outside = torch.ones_like(row, dtype=torch.bool)
        for each in found:
            outside[each.start : each.stop] = False
            if each.name == "audio":  # codebooks take turns
                assert [int(code) // 2 for code in each.codes] == [0, 1, 0][: len(each.codes)]
        assert not vocabulary.is_code(row[outside]).any()
        if not apart:
            assert [each.name for each in found] == wanted
            assert [each.start for each in found] == [sum(vocabulary[name].length for name in wanted[:n])
                                                      for n in range(len(wanted))]  # fmt: skip
        elif stop:  # no end before all there was to give
            assert len(found) == len(wanted)


def test_interleaved_answers_end_by_what_generate_is_told() -> None:
    model, _, vocabulary = made()
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generates": torch.tensor([[0]])}
    inputs["interleaved"] = torch.tensor([True])
    told: Any = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    with generation_extras(model, inputs) as given:
        first = int(model.generate(**given, **told)[0, 4])
    assert not vocabulary.is_code(torch.tensor(first))
    settings = GenerationConfig(eos_token_id=first, **told)
    for further in (
        {"eos_token_id": first, **told},
        {"eos_token_id": [first], **told},
        {"generation_config": settings},
    ):
        with generation_extras(model, {**inputs, **further}) as given:
            said = model.generate(**given)[0, 4:]
        assert said[0] != first  # it was the likeliest, and may not come before the item


def test_generating_with_a_cache_is_generating_without() -> None:
    model, _, _ = made()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]] * 2), "generates": torch.tensor([[0, 1], [1, 0]])}
    said = []
    for use_cache in (True, False):
        with generation_extras(model, inputs) as given:
            said.append(model.generate(**given, max_new_tokens=16, do_sample=False, use_cache=use_cache))
    assert torch.equal(*said)


def test_without_a_plan_text_alone_is_generated() -> None:
    model, graft, vocabulary = made()
    ids = torch.tensor([[5, 6, 7]])
    with generation_extras(model, {"input_ids": ids}) as given:
        said = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert not vocabulary.is_code(said).any()
    with graft.disabled():
        bare = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    alula.detach(model)
    assert torch.equal(said, model.generate(input_ids=ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(said, bare)


def test_what_makes_no_sense_is_refused() -> None:
    model, _, vocabulary = made()
    with pytest.raises(UsageError, match="another graft has ids"):
        alula.attach(model, TealConfig(codes=CODES), "second")
    assert set(alula.grafts_of(model)) == {"teal"}
    with pytest.raises(IndexError):  # nobody has it, as on a host alone
        model(input_ids=torch.tensor([[5, vocabulary.size]]))
    with pytest.raises(UsageError, match="kinds"):
        CodeConstraint(vocabulary, 3, torch.tensor([[2]]))
    with pytest.raises(UsageError, match="at least one kind"):
        TealConfig(codes={})
    with pytest.raises(UsageError, match="no name"):
        TealConfig(codes={"a b": CODES["image"]})
    with pytest.raises(UsageError, match="not as many of each of 2 codebooks"):
        CodesSpec(size=5, tokens=4, width=5, streams=2)
    model = zoo.build("qwen3")
    model.lm_head = nn.Linear(model.config.hidden_size, 70, bias=False)
    with pytest.raises(HostError, match="tells 70"):
        alula.attach(model, TealConfig(codes=CODES))
