"""Training without padding is training: the same losses and weights, and samples that never meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alula.anatomy import HostParts
from alula.data.packing import LAYOUT, narrowed, packed
from alula.errors import HostError, RecipeError
from alula.hosts import build_host, load_host
from alula.seam import PACKED, blank_mask, packs
from alula.training import train
from alula.training.trainer import token_mean_loss
from tests import media_hosts, zoo
from tests.hosts import tiny
from tests.training.conftest import MakeRecipe, batch_of, rows

WITHOUT = {"packing": True, "logits": "supervised"}
TEXT_TOO = {"sources": [{"microworld": "visual"}], "text_replay": {"ratio": 0.4, "sources": [{"microworld": "text"}]}}


def model_of(family: str) -> Any:
    return build_host(tiny.decoder(family), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()).model


def told(model: Any, batch: dict[str, Any]) -> Any:
    """Logits, where the batch asks for them."""
    given = {key: value for key, value in batch.items() if key not in ("labels", LAYOUT)}
    if LAYOUT in batch:
        given |= {PACKED: batch[LAYOUT], **blank_mask(given["input_ids"])}
    return model(**given, use_cache=False).logits


def learnt(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradients."""
    model.zero_grad()
    loss = token_mean_loss({"logits": told(model, batch)}, batch["labels"])
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_are_those_of_the_padded_batch(family: str, recipe: MakeRecipe) -> None:
    batch = batch_of(recipe(data=TEXT_TOO, batch_size=6), 0)
    model = model_of(family).double()
    batch["pixel_values"] = batch["pixel_values"].double()
    loss, gradients = learnt(model, batch)
    with packs(model):
        for made in (packed(batch), narrowed(batch), narrowed(packed(batch))):
            got, found = learnt(model, made)
            torch.testing.assert_close(got, loss.float(), rtol=1e-6, atol=0)
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)  # the loss is taken in float32
        row = packed(batch)
        assert row["input_ids"].shape[1] < int(batch["attention_mask"].sum())  # they begin alike
    torch.testing.assert_close(learnt(model, batch)[0], loss, rtol=0, atol=0)


def test_pictures_that_samples_share_are_learnt_from_as_often(recipe: MakeRecipe) -> None:
    """Samples that ask about one picture: it stands in the row once, and the projector learns from all of them."""
    batch = batch_of(recipe(batch_size=6), 0)
    kinds = batch["mm_token_type_ids"].bool()
    assert kinds.sum() == len(batch["pixel_values"]) * kinds[0].sum()  # one in each
    model = model_of("llama").double()
    batch["pixel_values"] = batch["pixel_values"][[0, 0, 2, 3, 0, 2]].double()
    loss, gradients = learnt(model, batch)
    row = packed(batch)
    assert len(row["pixel_values"]) == 3
    assert row["input_ids"].shape[1] <= packed(batch, share_pictures=False)["input_ids"].shape[1] - 3 * kinds[0].sum()
    with packs(model):
        for made in (row, narrowed(row), packed(batch, share_pictures=False)):
            got, found = learnt(model, made)
            torch.testing.assert_close(got, loss.float(), rtol=1e-6, atol=0)
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


REFUSED = ("llava_pixtral", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_5_vl_films")


@pytest.mark.parametrize("name", [name for name in media_hosts.HOSTS if name not in REFUSED])
def test_media_stay_with_their_samples(name: str) -> None:
    """The first and the third begin with the same words, and show the same where media are pictures of one size."""
    host = media_hosts.HOSTS[name]()
    marker = {"image": zoo.IMAGE, "video": media_hosts.VIDEO, "audio": media_hosts.AUDIO}[host.kind.name.lower()]
    samples = [
        [3, word, *[marker] * count, question, 7, 8, answer]
        for word, count, question, answer in zip((1, 2, 1), host.tokens, (4, 5, 6), (20, 21, 22), strict=True)
    ]
    length = max(map(len, samples))
    ids = torch.tensor([[*sample, *[0] * (length - len(sample))] for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (length - len(sample)) for sample in samples])
    labels = torch.where(mask.cumsum(1) > mask.sum(1, keepdim=True) - 2, ids, -100).where(mask.bool(), -100)
    media = {key: value.double() if value.is_floating_point() else value for key, value in host.inputs.items()}
    kinds = (ids == marker) * int(host.kind)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": kinds, **media}
    if is_shared := set(media) == {"pixel_values"}:
        batch["pixel_values"][2] = batch["pixel_values"][0]
    model = host.model.double()
    loss, gradients = learnt(model, batch)
    apart = packed(batch, share_pictures=False)
    with packs(model):
        for made in (packed(batch), apart):
            got, found = learnt(model, made)
            torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
            assert found.keys() == gradients.keys()
            for each, gradient in gradients.items():
                torch.testing.assert_close(found[each], gradient, rtol=1e-5, atol=1e-7)
    assert apart["input_ids"].shape[1] - packed(batch)["input_ids"].shape[1] == (host.tokens[2] if is_shared else 0)


def test_samples_of_a_row_never_meet(recipe: MakeRecipe) -> None:
    batch = batch_of(recipe(batch_size=3), 0)
    model = model_of("llama")
    other = {key: value.clone() for key, value in batch.items()}
    changed = other["labels"][1] != -100
    other["input_ids"][1, changed] = (other["input_ids"][1, changed] + 1) % 50
    other["pixel_values"][1] += 1.0
    with packs(model), torch.no_grad():
        first, second = (told(model, packed(each))[0] for each in (batch, other))
    members = packed(batch)[LAYOUT]["members"]
    lengths = batch["attention_mask"].sum(1)
    for number, is_same in ((0, True), (1, False), (2, True)):
        own = members[number, : lengths[number]]
        assert torch.equal(first[own], second[own]) == is_same


@pytest.mark.parametrize(
    ("method", "more"),
    [("projector", {}), ("full", {"micro_batch_size": 2}), ("lora", {"lora": {"rank": 4}, "feature_cache": {}})],
)
def test_a_stage_learns_the_same(method: str, more: dict[str, Any], recipe: MakeRecipe, tmp_path: Path) -> None:
    rates = {"projector": {"projector": 1e-2}, "full": {"llm": 1e-3}, "lora": {"lora": 1e-3, "projector": 1e-2}}
    found = []
    for name, without in (("padded", {}), ("packed", WITHOUT)):
        stage = recipe(
            {"output_dir": str(tmp_path / name), "gradient_checkpointing": method == "full"},
            method=method,
            train=rates[method],
            data=TEXT_TOO,
            **more,
            **without,
        )
        result = train(stage)
        weights = next(result.stages[0].model.glob("*.safetensors"))
        found.append((rows(tmp_path / name, without=("seconds", "loss", "grad_norm")), rows(tmp_path / name), weights))
    (same, padded, before), (also, packed_rows, after) = found
    assert same == also  # steps, rates, tokens and samples
    for one, two in zip(padded, packed_rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    old, new = load_file(before), load_file(after)
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"method": "wings", "train": {"wings": 1e-3}, "packing": True}, "packing: method `wings` asks where tokens"),
        ({"method": "prefix", "train": {"prefix": 1e-3}, "logits": "supervised"}, "logits: method `prefix` asks"),
        ({"distill": {}, "packing": True}, "packing: `distill` reads logits by their places"),
        (
            {"method": "lora", "train": {"lora": 1e-3}, "lora": {"dropout": 0.1}, "packing": True},
            "packing: with dropout",
        ),
    ],
)
def test_what_reads_padded_batches_is_refused(stage: dict[str, Any], words: str, recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**stage)


def test_probes_of_a_budget_are_refused(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"retention\.probes: false"):
        recipe({"retention": {}}, packing=True)


@pytest.mark.parametrize(
    ("kind", "words"), [("gemma2", "other than full attention"), ("qwen2_5_vl", "three directions")]
)
def test_decoders_of_other_attention_are_refused(kind: str, words: str) -> None:
    with pytest.raises(HostError, match=words), packs(zoo.build(kind)):
        pass


def test_a_decoder_that_drops_the_layout_is_refused() -> None:
    model = model_of("llama")
    for layer in HostParts.of(model).layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != PACKED}), with_kwargs=True
        )
    with pytest.raises(HostError, match="something else of samples"), packs(model):
        pass
    assert HostParts.of(model).config._attn_implementation == "sdpa"


def test_other_batches_pass_as_before(host_directory: Path, recipe: MakeRecipe) -> None:
    model, batch = load_host(host_directory).model, batch_of(recipe(), 0)
    with torch.no_grad():
        before = told(model, batch)
        with packs(model):
            assert torch.equal(told(model, batch), before)
