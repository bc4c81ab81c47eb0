"""What a forward knows of its tokens: in plain calls, through `generate`, across caches. Installing leaves no trace."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from alula import TokenMap
from alula.errors import AlulaError, UsageError
from alula.seam import NAME, ForwardContext, TokenCache, find, install
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.tokens import Modality
from tests import zoo

CACHE = cache_keyword()

HOSTS = ["llava-qwen3", "llava-gemma3", "qwen2_5_vl"]


class Listener:
    """Records the `ForwardContext` of every call."""

    def __init__(self, model: Any, *, inputs: bool = False) -> None:
        self.seam = install(model, "listener")
        if inputs:
            self.seam.keep_inputs("listener")
        self.forwards: list[ForwardContext] = []
        layer = self.seam.anatomy.layers[-1]
        layer.register_forward_pre_hook(lambda m, a, kw: self.forwards.append(kw[NAME]), with_kwargs=True)


@pytest.mark.parametrize("name", HOSTS)
def test_rows_of_a_batch(name: str) -> None:
    model = zoo.build(name)
    listener = Listener(model)
    batch = zoo.batch(name, "3I4", "I2I1", "5")
    model(**batch)
    tokens = listener.forwards[0].tokens
    assert torch.equal(tokens.is_perceptual, batch["input_ids"] == zoo.IMAGE)
    assert torch.equal(tokens.valid, batch["attention_mask"].bool())
    assert tokens.item.max(dim=1).values.tolist() == [0, 1, -1]
    expected = torch.where(tokens.valid, batch["attention_mask"].cumsum(1) - 1, -1)
    assert torch.equal(tokens.position, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", HOSTS)
def test_each_generated_token_is_text_and_positions_continue(name: str, options: dict) -> None:
    model = zoo.build(name)
    listener = Listener(model)
    batch = zoo.batch(name, "3I4", "I2I1")
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    model.generate(**batch, max_new_tokens=5, **options)
    assert len(listener.forwards) == 5
    images = (batch["input_ids"] == zoo.IMAGE).sum(1).repeat_interleave(copies)
    lengths = batch["attention_mask"].sum(1).repeat_interleave(copies)
    for step, forward in enumerate(listener.forwards):
        assert torch.equal(forward.all_tokens.is_perceptual.sum(1), images)
        assert torch.equal(forward.all_tokens.position.max(1).values + 1, lengths + step)
        if step:
            assert forward.tokens.is_text.all()
            assert forward.tokens.shape == (2 * copies, 1)


def test_a_kept_cache_carries_the_rows_into_the_next_turn() -> None:
    model = zoo.build("llava-llama")
    listener = Listener(model, inputs=True)
    first, second = zoo.batch("llava-llama", "2I3"), zoo.batch("llava-llama", "2I1", seed=7)
    cache = cache_of_output(model(**first, use_cache=True))
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    model(**{**second, "attention_mask": mask}, **{CACHE: cache})
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "attention_mask": mask,
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    model(**whole)
    _, continued, at_once = listener.forwards
    assert torch.equal(continued.all_tokens.stack(), at_once.tokens.stack())
    torch.testing.assert_close(continued.all_inputs(), at_once.inputs)
    for ours, expected in zip(continued.all_rope("full_attention"), at_once.rope["full_attention"], strict=True):
        torch.testing.assert_close(ours, expected.expand_as(ours))


def test_cache_operations_take_the_rows_along() -> None:
    model = zoo.build("llava-llama")
    Listener(model, inputs=True)
    cache = cache_of_output(model(**zoo.batch("llava-llama", "3I4", "I2I1"), use_cache=True))
    tokens = TokenCache.of(cache).tokens.stack()
    assert tokens.shape[:2] == (2, 11)
    inputs = TokenCache.of(cache).inputs
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(TokenCache.of(cache).tokens.stack(), tokens.flip(0)[:, :-2])
    assert torch.equal(TokenCache.of(cache).inputs, inputs.flip(0)[:, :-2])
    assert TokenCache.of(cache).get_seq_length() == cache.get_seq_length() == 9


@pytest.mark.parametrize(
    "make", [lambda c: DynamicCache(), lambda c: DynamicCache(config=c), lambda c: StaticCache(c, 32)]
)
def test_every_kind_of_cache_given_by_the_caller(make: Any) -> None:
    model = zoo.build("llava-llama")
    listener = Listener(model)
    batch = zoo.batch("llava-llama", "3I4")
    cache = make(model.config.get_text_config())
    model.generate(**batch, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
    assert listener.forwards[-1].all_tokens.shape[1] == 11 + 3


def test_rows_can_be_given_by_hand() -> None:
    model = zoo.build("llama")
    listener = Listener(model)
    ids = torch.randint(0, 50, (1, 8))
    tokens = TokenMap.from_modalities(torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0]]))
    embeds = model.get_input_embeddings()(ids)
    model(inputs_embeds=embeds, token_map=tokens)
    assert torch.equal(listener.forwards[0].tokens.modality, tokens.modality)
    with listener.seam.given_tokens(tokens):
        model.generate(ids, max_new_tokens=3, num_beams=2)
    assert torch.equal(listener.forwards[-1].all_tokens.is_perceptual.sum(1), torch.tensor([3, 3]))
    with pytest.raises(UsageError, match="token_map describes"):
        model(ids[:, :5], token_map=tokens)


@pytest.mark.parametrize("name", ["llama", "llava-gemma3"])
def test_static_caches_under_flex_attention_are_refused(name: str) -> None:
    """transformers itself gets them wrong: see `preconditions.check_cache`."""
    model = zoo.build(name)
    zoo.set_attention(model, "flex_attention")
    install(model, "test")
    cache = StaticCache(model.config.get_text_config(), 32)
    with zoo.uncompiled(), pytest.raises(UsageError, match="fixed size under flex attention"):
        model(**zoo.batch(name, "7"), **{CACHE: cache})


def test_a_mask_that_cannot_be_read_is_refused() -> None:
    model = zoo.build("llama")
    zoo.set_attention(model, "flex_attention")
    install(model, "test")
    block = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 7, 7, device="cpu")
    with zoo.uncompiled(), pytest.raises(UsageError, match="attention_mask is a BlockMask"):
        model(**zoo.batch("llama", "7") | {"attention_mask": block})


class TestInputsEmbeds:
    """Tokens merged by the caller: what is an image among them has to be said."""

    @staticmethod
    def merged(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The same call with inputs_embeds, images merged in."""
        images = {key: value for key, value in batch.items() if key in ("pixel_values", "image_grid_thw")}
        slots = batch["input_ids"] == zoo.IMAGE
        with torch.no_grad():
            seen = torch.cat(list(model.get_image_features(**images).pooler_output))
            embeds = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(slots[..., None], seen)
        return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}

    @pytest.mark.parametrize("name", HOSTS)
    def test_alone_they_are_refused(self, name: str) -> None:
        model = zoo.build(name)
        given = self.merged(model, zoo.batch(name, "3I4", "5"))
        install(model, "test")
        for call in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(UsageError, match="inputs_embeds alone") as told:
                call(**given)
            assert "token_map=" in str(told.value)

    @pytest.mark.parametrize("name", HOSTS)
    def test_with_a_map_or_types_they_are_what_ids_are(self, name: str) -> None:
        model = zoo.build(name)
        batch = zoo.batch(name, "3I4", "I2I1", "5")
        types = (batch["input_ids"] == zoo.IMAGE).long()
        listener = Listener(model)
        model(**batch)
        expected = listener.forwards[-1].tokens
        more = {"token_map": TokenMap.from_modalities(types, batch["attention_mask"])}, {"mm_token_type_ids": types}
        for each in more:
            given = self.merged(model, batch) | each
            if name == "qwen2_5_vl":
                model.model.rope_deltas = None
                with pytest.raises(UsageError, match="position_ids"):
                    model(**given)
                grid, mask = batch["image_grid_thw"], batch["attention_mask"]
                given["position_ids"] = model.model.get_rope_index(
                    batch["input_ids"], types, image_grid_thw=grid, attention_mask=mask
                )[0]
            model(**given)
            tokens = listener.forwards[-1].tokens
            assert torch.equal(tokens.modality, expected.modality)
            assert torch.equal(tokens.position, expected.position)

    def test_a_cache_is_gone_on_with_by_ids_alone(self) -> None:
        model = zoo.build("llava-llama")
        batch = zoo.batch("llava-llama", "3I4")
        listener = Listener(model)
        tokens = TokenMap.from_modalities((batch["input_ids"] == zoo.IMAGE).long())
        plain = model.generate(**batch, max_new_tokens=4, do_sample=False)
        given = self.merged(model, batch)
        with listener.seam.given_tokens(tokens):
            assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), plain[:, 11:])
        cache = cache_of_output(model(**given, token_map=tokens, use_cache=True))
        one = model.get_input_embeddings()(torch.tensor([[1]]))
        with pytest.raises(UsageError, match="inputs_embeds alone"):
            model(inputs_embeds=one, **{CACHE: cache})
        model(inputs_embeds=one, mm_token_type_ids=torch.tensor([[0]]), **{CACHE: cache})
        assert listener.forwards[-1].all_tokens.is_perceptual.sum() == zoo.TOKENS_PER_IMAGE

    def test_of_a_text_decoder_they_are_text(self) -> None:
        model = zoo.build("llama")
        listener = Listener(model)
        model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[1, 2, 3]])))
        assert not listener.forwards[-1].any_media


def test_a_cache_from_before_is_refused_where_its_inputs_are_needed() -> None:
    model = zoo.build("llama")
    cache = model(torch.randint(0, 50, (1, 6)), use_cache=True).past_key_values
    Listener(model, inputs=True)
    with pytest.raises(AlulaError, match="6 tokens that were computed before listener was attached"):
        model(torch.randint(0, 50, (1, 2)), **{CACHE: cache})


def test_a_cache_from_before_counts_as_text_elsewhere() -> None:
    model = zoo.build("llama")
    cache = model(torch.randint(0, 50, (1, 6)), use_cache=True).past_key_values
    listener = Listener(model)
    for _ in range(2):
        model(torch.randint(0, 50, (1, 2)), **{CACHE: cache})
    assert listener.forwards[-1].all_tokens.position.tolist() == [list(range(10))]
    assert listener.forwards[-1].all_tokens.modality.unique().tolist() == [Modality.TEXT]


def test_reading_an_output_without_a_cache_is_no_reason_to_warn(transformers_says: pytest.LogCaptureFixture) -> None:
    """transformers warns, once per process, of whoever asks an output for the cache by its older name."""
    model = zoo.build("llava-llama")
    Listener(model)
    model(**zoo.batch("llava-llama", "3I4"), use_cache=False)
    assert "deprecated" not in transformers_says.text


def test_installing_and_releasing_leaves_no_trace() -> None:
    model = zoo.build("llava-llama")

    def anatomy_of_hooks() -> list[tuple[str, int, int]]:
        return [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]

    before = anatomy_of_hooks()
    seam = install(model, "one")
    install(model, "two")
    with pytest.raises(UsageError, match="already in use"):
        install(model, "one")
    seam.release("one")
    assert find(model) is seam
    seam.release("two")
    assert find(model) is None
    assert anatomy_of_hooks() == before


def test_two_models_and_a_copy_do_not_meet() -> None:
    model = zoo.build("llava-llama")
    other = Listener(zoo.build("llava-qwen3"))
    listener = Listener(model)
    twin = copy.deepcopy(model)
    twin(**zoo.batch("llava-llama", "3I4"))
    assert find(twin) is not find(model)
    assert find(twin).anatomy.host is twin
    # the listener's own hook is a closure, which a copy shares; what it saw belongs to the copy
    assert [forward.anatomy for forward in listener.forwards] == [find(twin).anatomy]
    assert other.forwards == []
