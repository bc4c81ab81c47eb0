"""Browse-and-concentrate against a loop over samples of its equations, published numbers, and its ways of running."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

import alula
from alula.errors import HostError, UsageError
from alula.grafts import BrowseConfig, ExpertsConfig, WingsConfig, read_conditions
from alula.grafts.browse.graft import BrowseGraft, Condition
from alula.hosts import load_host, save_host
from alula.policies.search import search_withdrawal
from alula.policies.withdraw import Withdraw
from alula.probes import AttentionShift, watch
from alula.seam import generation_extras, scoring_inputs
from alula.seam.dialect import cache_keyword
from alula.serving import Conversation
from tests import zoo
from tests.grafts.common import run, wake, with_ids
from tests.hosts.test_multimodal import film, picture, said, sound
from tests.hosts.test_multimodal import host as own_host
from tests.hosts.test_multimodal import inputs as own_inputs

HOST = "llava-llama"
RAGGED = ("3I2", "5", "I1I2")
GOLDEN = Path(__file__).parents[2] / "golden" / "brote.safetensors"


def grafted(name: str = HOST, **settings: Any) -> tuple[Any, Any]:
    model = zoo.build(name)
    return model, wake(alula.attach(model, BrowseConfig(**settings)))


def by_hand(connector: Any, features: Tensor, shift: Tensor) -> Tensor:
    """(P or Q, D) of one image's (P, width) features, told a shift of (w,)."""
    if hasattr(connector, "linear_1"):
        return connector.linear_2(connector.act(connector.linear_1(features) + shift))
    entry = connector.entries["vision"](features)
    if not hasattr(connector.trunk, "queries"):
        return connector.trunk(connector.act(entry + shift))
    tokens = torch.cat([entry, connector.trunk.queries + shift])[None]
    for layer in connector.trunk.layers:
        tokens = layer(tokens)
    return connector.trunk.project(connector.trunk.up(tokens[0, -len(connector.trunk.queries) :]))


@torch.no_grad()
def in_a_loop(model: Any, inputs: dict[str, Tensor], token: int, condition: Any) -> list[Tensor]:
    """Logits of every sample alone, from the equations: read, take the last state, encode again, answer."""
    backbone, taken, found = model.model, 0, []
    connector = backbone.multi_modal_projector
    connector = connector if hasattr(connector, "linear_1") else connector.of("image")
    kept: list[Tensor] = []
    handle = connector.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    if "pixel_values" in inputs:
        backbone.get_image_features(inputs["pixel_values"])
    handle.remove()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        embeds, spots = backbone.get_input_embeddings()(ids), (ids == token).nonzero()[:, 0]
        zero = torch.zeros(condition.weight.shape[0])
        each = len(by_hand(connector, kept[0][0], zero)) if kept else 1
        images = [kept[0][taken + place] for place in range(len(spots) // each)]
        taken += len(images)

        def answered(shift: Tensor, embeds: Tensor = embeds, images: Any = images, spots: Tensor = spots) -> Tensor:
            embeds = embeds.clone()
            if images:
                embeds[spots] = torch.cat([by_hand(connector, image, shift) for image in images])
            return backbone.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]

        final = answered(zero)[-1]
        found.append(
            model.lm_head(answered(condition.weight @ final + (0 if condition.bias is None else condition.bias)))
        )
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_its_equations(side: str, bias: bool) -> None:
    model, graft = grafted(bias=bias)
    model, inputs = model.double(), zoo.batch(HOST, *RAGGED, side=side)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    mask = inputs["attention_mask"].bool()
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    together = run(model, HOST, inputs)
    for sample, expected in enumerate(in_a_loop(zoo.build(HOST).double(), inputs, zoo.IMAGE, graft.whole)):
        torch.testing.assert_close(together[sample][mask[sample]], expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("connector", ["queries", "mlp2x_gelu", "linear"])
def test_it_is_its_equations_in_connectors_of_our_own(connector: str) -> None:
    host = own_host(connector, audio=None, video=False)
    turns = [
        said(("image", picture(1)), "and", ("image", picture(2)), "left"),
        said("words"),
        said(("image", picture(3))),
    ]
    given, token = own_inputs(host, turns), host.model.config.image_token_id
    given = {name: value for name, value in given.items() if name != "mm_token_type_ids"}
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model: Any = host.model.eval()
    before, bare = run(model, HOST, given), copy.deepcopy(model)
    graft: Any = alula.attach(model, BrowseConfig())
    assert torch.equal(run(model, HOST, given), before)
    wake(graft)
    for sample, expected in enumerate(in_a_loop(bare, given, token, graft.whole)):
        found = run(model, HOST, given)[sample][given["attention_mask"][sample].bool()]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(run(model, HOST, given)[1], before[1])


def test_published_queries_and_conditions() -> None:
    """Numbers of the authors' code: one condition per sample is added to the queries of all its images."""
    golden = load_file(GOLDEN)
    condition = Condition(20, 16, bias=True, like=golden["weight"])
    condition.load_state_dict({name: golden[name] for name in ("weight", "bias")})
    queries = golden["query_tokens"] + condition(golden["condition"])[torch.tensor([0, 0, 1])][:, None]
    torch.testing.assert_close(queries, golden["query_input"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fresh_it_is_the_host_bit_for_bit(side: str) -> None:
    model, inputs = zoo.build(HOST), zoo.batch(HOST, *RAGGED, side=side)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    before = run(model, HOST, inputs), model.generate(**inputs, **options)
    graft = alula.attach(model, BrowseConfig())
    assert torch.equal(run(model, HOST, inputs), before[0])
    assert torch.equal(model.generate(**inputs, **options), before[1])
    wake(graft)
    changed = (run(model, HOST, inputs) - before[0]).abs().amax(dim=(1, 2))
    assert changed[1] == 0  # no image, no change, in one batch with others
    assert changed[0] > 0.1
    assert changed[2] > 0.1
    zeros = torch.zeros(3, 32)
    assert torch.equal(run(model, HOST, inputs, conditions=zeros), before[0])


def test_the_tower_runs_once_and_browsing_is_once_per_prompt() -> None:
    model, _ = grafted()
    inputs, ran = zoo.batch(HOST, *RAGGED), {"tower": 0, "decoder": 0}
    model.model.vision_tower.register_forward_hook(lambda *_: ran.update(tower=ran["tower"] + 1))
    model.model.language_model.register_forward_hook(lambda *_: ran.update(decoder=ran["decoder"] + 1))
    run(model, HOST, inputs)
    assert ran == {"tower": 1, "decoder": 2}
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        ran.update(tower=0, decoder=0)
        model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
        assert ran == {"tower": 1, "decoder": 7}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generating_with_a_cache_equals_without(options: dict[str, Any]) -> None:
    model, _ = grafted()
    inputs = zoo.batch(HOST, *(RAGGED if "num_beams" in options or not options else ("3I2I4",)))
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    plain = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **plain, use_cache=False))


def test_explicit_conditions_give_the_numbers_of_implicit_ones() -> None:
    model, graft = grafted()
    inputs = zoo.batch(HOST, *RAGGED)
    conditions = read_conditions(model, inputs)
    assert conditions.shape == (3, 32)
    with graft.disabled():
        assert torch.equal(read_conditions(zoo.build(HOST), inputs), conditions)  # a browser of its own, not grafted
    assert torch.equal(run(model, HOST, inputs, conditions=conditions), run(model, HOST, inputs))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        with generation_extras(model, {**inputs, "conditions": conditions}) as given:
            explicit = model.generate(**given, **options, num_beams=beams)
        assert torch.equal(explicit, model.generate(**inputs, **options, num_beams=beams))
    with pytest.raises(UsageError, match="the decoder is 32 wide"):
        run(model, HOST, inputs, conditions=conditions[:, :5])
    with pytest.raises(UsageError, match="no input_ids"):
        read_conditions(model, {})


def test_answers_are_not_read_before_they_are_learnt() -> None:
    model, _ = grafted()
    inputs = zoo.batch(HOST, "2I6", "I2I3")
    answer = inputs["input_ids"].clone()
    answer[:, :-3] = -100
    other = with_ids(inputs, inputs["input_ids"].clone())
    other["input_ids"][:, -3:] = (other["input_ids"][:, -3:] + 9) % 50
    ends = torch.full((2,), inputs["input_ids"].shape[1] - 4)
    for told in ({"labels": answer}, {"prompt_ends": ends}):
        before = [run(model, HOST, given, **told)[:, :-3] for given in (inputs, other)]
        torch.testing.assert_close(before[0], before[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(run(model, HOST, inputs, labels=answer), run(model, HOST, inputs, prompt_ends=ends))
    unsaid = [run(model, HOST, given)[:, :-3] for given in (inputs, other)]
    assert (unsaid[0] - unsaid[1]).abs().max() > 0.1
    model.train()
    with pytest.raises(UsageError, match="nothing says where prompts end"):
        model(**inputs)
    model(**inputs, labels=answer).loss.backward()


def test_a_later_turn_with_a_picture_is_read_behind_what_is_cached() -> None:
    model, graft = grafted()
    first, later = zoo.batch(HOST, "3I2"), zoo.batch(HOST, "2I3", seed=5)
    cache = DynamicCache(config=model.config.get_text_config())
    run(model, HOST, first, **{cache_keyword(): cache})
    length = cache.get_seq_length()
    keys = cache.layers[0].keys.clone()
    mask = torch.ones(1, length + later["input_ids"].shape[1], dtype=torch.int64)
    with graft.disabled():
        bare = copy.deepcopy(cache)
        states = model.model(**{**later, "attention_mask": mask, cache_keyword(): bare}).last_hidden_state
    explicit = run(
        model,
        HOST,
        {**later, "attention_mask": mask},
        conditions=states[:, -1],
        **{cache_keyword(): copy.deepcopy(cache)},
    )
    found = run(model, HOST, {**later, "attention_mask": mask}, **{cache_keyword(): cache})
    torch.testing.assert_close(found, explicit, atol=1e-6, rtol=1e-6)
    assert cache.get_seq_length() == mask.shape[1]
    assert torch.equal(cache.layers[0].keys[:, :, :length], keys)  # earlier images stay as they were encoded


def test_images_of_another_encoding_are_refused() -> None:
    model, _ = grafted()
    inputs, others = zoo.batch(HOST, "3I2"), zoo.batch(HOST, "3I2", seed=4)
    with torch.no_grad():
        made = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        model.model.get_image_features(others["pixel_values"])
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with pytest.raises(UsageError, match="encoded before others"):
            model(**ids, mm_encoder_outputs={"image": made})
        made = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        assert torch.equal(model(**ids, mm_encoder_outputs={"image": made}).logits, run(model, HOST, inputs))
        # the same pictures under another question are read anew
        asked = zoo.batch(HOST, "3I2", seed=8)
        made = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        for given in (inputs, asked):
            told = {name: given[name] for name in ("input_ids", "attention_mask")}
            pixels = {"pixel_values": inputs["pixel_values"]}
            logits = model(**told, mm_encoder_outputs={"image": made}, use_cache=False).logits
            made = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
            assert torch.equal(logits, run(model, HOST, {**told, **pixels}))


@pytest.mark.parametrize("own", [False, True])
def test_prompts_in_pieces_are_refused_unless_conditions_are_told(own: bool) -> None:
    if own:
        host = own_host("queries", audio=None, video=False)
        model: Any = host.model.eval()
        inputs = own_inputs(host, [said(("image", picture(1)), "what is on the left?")])
        wake(alula.attach(model, BrowseConfig()))
    else:
        model, inputs = grafted()[0], zoo.batch(HOST, "3I9")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for size in (8, 64):  # all images are in the first piece, the end of the prompt is not; one piece
        with pytest.raises(UsageError, match="comes in pieces"):
            model.generate(**inputs, **options, prefill_chunk_size=size)
    with generation_extras(model, {**inputs, "conditions": read_conditions(model, inputs)}) as given:
        found = model.generate(**given, **options, prefill_chunk_size=8)
    assert torch.equal(found, model.generate(**inputs, **options))


def test_a_cache_of_a_fixed_size_gives_the_same_in_a_ragged_batch() -> None:
    model, _ = grafted()
    inputs, options = zoo.batch(HOST, *RAGGED), {"max_new_tokens": 5, "do_sample": False}
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, **options))


def test_films_and_sounds_after_images_are_the_hosts_own() -> None:
    host = own_host("queries")
    graft: Any = wake(alula.attach(host.model.eval(), BrowseConfig()))
    shown, *others = [
        own_inputs(host, [said(part, "left")])
        for part in (("image", picture(1)), ("video", film(1)), ("audio", sound(1)))
    ]
    for inputs in others:
        with graft.disabled():
            expected = run(host.model, HOST, inputs)
        run(host.model, HOST, shown)
        assert torch.equal(run(host.model, HOST, inputs), expected)


def test_images_that_no_connector_was_seen_to_encode_are_refused() -> None:
    model, graft = grafted()
    inputs = zoo.batch(HOST, "3I2")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    wrapped = peft.get_peft_model(model, config)  # a copy of the connector stands in its place
    with pytest.raises(UsageError, match="not seen to encode"):
        run(wrapped, HOST, inputs)
    with graft.disabled():
        run(wrapped, HOST, inputs)


def test_the_same_features_with_another_end_are_read_anew() -> None:
    model, _ = grafted()
    inputs, end = zoo.batch(HOST, "3I9"), torch.tensor([7])
    expected = run(model, HOST, inputs, prompt_ends=end)
    with torch.no_grad():
        made = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
    told = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    whole = run(model, HOST, told, mm_encoder_outputs=made, use_cache=False)
    assert torch.equal(run(model, HOST, told, mm_encoder_outputs=made, use_cache=False, prompt_ends=end), expected)
    assert not torch.equal(whole, expected)


def test_another_prompt_about_the_same_features_is_read_anew() -> None:
    """By hand, without a cache: what begins as the last prompt did is no step of its generation."""
    model, _ = grafted()
    inputs = zoo.batch(HOST, "3I9")
    with torch.no_grad():
        made = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
    whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    begun = {name: value[:, :-4] for name, value in whole.items()}
    run(model, HOST, begun, mm_encoder_outputs=made, use_cache=False)
    assert torch.equal(run(model, HOST, whole, mm_encoder_outputs=made, use_cache=False), run(model, HOST, inputs))


def test_dropout_has_no_part_in_what_is_read() -> None:
    model, graft = grafted()
    inputs = zoo.batch(HOST, "3I9")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    expected = read_conditions(model, {**inputs, "labels": labels})
    for layer in graft.seam.anatomy.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    seen: list[Tensor] = []
    handle = graft.whole.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses = [model(**inputs, labels=labels).loss for _ in range(2)]
    handle.remove()
    assert not torch.equal(*losses)  # what is learnt is dropped out of
    for told in (*seen, read_conditions(model, {**inputs, "labels": labels})):
        assert torch.equal(told, expected)
    assert all(module.training for module in model.modules())


def test_answers_that_are_weighed_without_labels_are_not_read() -> None:
    """A search of policies weighs answers that it wrote behind the prompt."""
    model, _ = grafted()
    prompt = {name: value[:, :-3] for name, value in zoo.batch(HOST, "3I9").items() if name != "pixel_values"}
    prompt["pixel_values"] = zoo.batch(HOST, "3I9")["pixel_values"]
    model.generation_config.eos_token_id = None
    found = search_withdrawal(model, [prompt], layers=[1], max_new_tokens=3)
    told = {**prompt, "conditions": read_conditions(model, prompt)}
    expected = search_withdrawal(model, [told], layers=[1], max_new_tokens=3)
    assert found.agreed == expected.agreed
    assert found.divergences[0] == pytest.approx(expected.divergences[0], rel=1e-4)
    bare = zoo.build(HOST)
    ends = torch.tensor([3])
    assert scoring_inputs(bare, prompt, ends) == prompt  # nothing is attached that would take it
    assert torch.equal(scoring_inputs(model, prompt, ends)["prompt_ends"], ends)
    assert torch.equal(scoring_inputs(model, {**prompt, "prompt_ends": ends + 1}, ends)["prompt_ends"], ends + 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_condition_and_nothing_through_the_reading(checkpointing: bool) -> None:
    model, graft = grafted()
    inputs = zoo.batch(HOST, "2I6", "I2I3")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    conditions = read_conditions(model, {**inputs, "labels": labels})
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=labels).loss.backward()
    implicit = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model(**inputs, labels=labels, conditions=conditions).loss.backward()
    assert {"projector", "vision_tower"} <= {
        part for name in implicit for part in ("projector", "vision_tower") if part in name
    }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(implicit[name], parameter.grad, atol=1e-6, rtol=1e-5)
    assert graft.whole.weight.grad.abs().max() > 1e-5


def test_it_stands_beside_other_grafts_lora_policies_highlights_and_probes() -> None:
    model, graft = grafted()
    inputs = zoo.batch(HOST, "3I2", "I1I2")
    alone = run(model, HOST, inputs)
    for config in (WingsConfig(rank=2), ExpertsConfig(rank=2)):
        other = wake(alula.attach(model, config))
        both = run(model, HOST, inputs)
        conditions = read_conditions(model, inputs)
        assert torch.equal(run(model, HOST, inputs, conditions=conditions), both)  # the browser has the other graft
        assert not torch.equal(both, alone)
        other.detach()
    with Withdraw(layer=1).on(model):
        withdrawn = run(model, HOST, inputs)
        assert torch.equal(run(model, HOST, inputs, conditions=read_conditions(model, inputs)), withdrawn)
    assert not torch.equal(withdrawn, alone)
    marks = torch.zeros(inputs["input_ids"].shape)
    marks[:, -2:] = 1
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with (
        alula.highlight(model, strength=1.0, guidance=1.3),
        generation_extras(model, {**inputs, "highlighted": marks}) as given,
    ):
        told = model.generate(**given, **options)
    assert bool(torch.stack(told.logits).isfinite().all())
    assert torch.equal(run(model, HOST, inputs), alone)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ends = torch.full((2,), inputs["input_ids"].shape[1] - 1)
    with torch.no_grad():
        lora = wrapped(**inputs, prompt_ends=ends).logits
    assert not torch.equal(lora, alone)
    assert torch.equal(run(model, HOST, inputs, conditions=read_conditions(model, inputs)), lora)
    del graft


def test_probes_read_the_second_pass_alone() -> None:
    model, _ = grafted()
    inputs = zoo.batch(HOST, "3I2", "I1I2")
    conditions, seen = read_conditions(model, inputs), []
    for given in ({}, {"conditions": conditions}):
        probe = AttentionShift()
        with watch(model, [probe]):
            run(model, HOST, inputs, **given)
        seen.append(probe.result())
    assert str(seen[0]) == str(seen[1])


def test_saved_among_the_hosts_weights_it_comes_back(tmp_path: Path) -> None:
    host = own_host("mlp2x_gelu", audio=None, video=False)
    given = own_inputs(host, [said(("image", picture(1)), "left")])
    model: Any = host.model.eval()
    wake(alula.attach(model, BrowseConfig(bias=True)))
    before = run(model, HOST, given)
    model.save_pretrained(tmp_path)
    host.processor.save_pretrained(tmp_path)
    again, _ = alula.load_model(str(tmp_path))
    assert isinstance(alula.grafts_of(again)["browse"], BrowseGraft)
    assert torch.equal(run(again, HOST, given), before)


def test_chat_reads_the_whole_dialogue_for_every_answer(tmp_path: Path) -> None:
    save_host(own_host("queries", audio=None, video=False), tmp_path)
    model, processor = load_host(tmp_path)
    wake(alula.attach(model, BrowseConfig()))
    conversation, turns = Conversation(model, processor, max_new_tokens=4), []
    for text, images in (("left", [picture(1)]), ("right", []), ("lines", [picture(2), picture(3)])):
        for image in images:
            conversation.attach(image)
        said_ = conversation.ask(text, lambda piece: None).text
        turns.append(
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
            }
        )
        given = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with generation_extras(model, {**given, "conditions": read_conditions(model, given)}) as extras:
            ids = model.generate(**extras, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert said_ == processor.tokenizer.decode(ids, skip_special_tokens=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": said_}]})


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "gemma3_vl"])
def test_hosts_whose_connector_is_not_known_inside_are_refused(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(HostError, match="no connector of images whose queries or hidden layer are known"):
        alula.attach(model, BrowseConfig())
    assert alula.grafts_of(model) == {}


def test_connectors_shared_between_media_are_refused() -> None:
    host = own_host("queries", shared=True, audio=None)
    with pytest.raises(HostError, match="not shared between media"):
        alula.attach(host.model, BrowseConfig())
