"""What owners bring to generation: a toy dims tokens of the prompt, by an input of its own, a bias and a processor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from alula.errors import UsageError
from alula.seam import Bias, LayerView, Owner, generation_extras, install, marked
from tests import zoo


class Forbid(LogitsProcessor):
    """Forbids each sample the tokens that are dimmed in its prompt."""

    def __init__(self, ids: Tensor, dimmed: Tensor, calls: list[str]) -> None:
        self.ids, self.dimmed, self.calls = ids, dimmed, calls

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append("forbid")
        beams = len(scores) // len(self.ids)
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, self.ids[row // beams][self.dimmed[row // beams]]] = -torch.inf
        return scores


class Dimmer(Owner, Bias):
    """Takes `dimmed`, (B, S) bool of the prompt's tokens: attention turns away from them, and none is said again."""

    owner_id = "the dimmer"
    further_inputs = ("dimmed",)

    def __init__(self, model: Any) -> None:
        self.calls: list[str] = []
        self.seam = install(model, "dimmer", self)
        self.handles = [self.seam.request_bias(layer, self) for layer in range(self.seam.anatomy.num_layers)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.seam.release("dimmer")

    def key_bias(self, view: LayerView) -> Tensor | None:
        if "dimmed" not in view.ctx.given:
            return None
        dimmed = view.ctx.given["dimmed"]
        bias = torch.zeros(view.ctx.all_tokens.shape)
        bias[:, : dimmed.shape[1]] = -4.0 * dimmed[:, : bias.shape[1]]
        return bias[:, None, None]

    def logits_processors(self, inputs: Mapping[str, Any]) -> Sequence[LogitsProcessor]:
        return [Forbid(inputs["input_ids"], inputs["dimmed"], self.calls)] if "dimmed" in inputs else []


def prompts(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch, and which of its tokens are dimmed: others in each sample."""
    batch = zoo.batch(name, *(("3I4", "I2I1") if name in zoo.HOSTS else ("9", "5")))
    places = torch.arange(batch["input_ids"].shape[1])
    dimmed = torch.stack([places % 3 == 0, places % 2 == 1]) & batch["attention_mask"].bool()
    return batch, dimmed


SETTINGS = {"max_new_tokens": 6, "do_sample": False}


def generated(model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
    with generation_extras(model, batch) as given:
        found: Tensor = model.generate(**given, **{**SETTINGS, **options})
    return found[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "llava-qwen3"])
def test_each_sample_is_generated_as_if_alone(name: str, options: dict[str, Any]) -> None:
    """By what it was given itself, whatever became of the batch: beams, several answers, drafts, no cache."""
    model, (batch, dimmed) = zoo.build(name), prompts(name)
    plain = generated(model, batch)
    dimmer = Dimmer(model)
    assert torch.equal(generated(model, batch), plain)
    assert not dimmer.calls
    answers = options.get("num_return_sequences", 1)
    together = (
        None if "prompt_lookup_num_tokens" in options else generated(model, {**batch, "dimmed": dimmed}, **options)
    )
    images = 0
    for sample in range(2):
        valid = batch["attention_mask"][sample].bool()
        alone: dict[str, Tensor] = {k: batch[k][sample, valid][None] for k in ("input_ids", "attention_mask")}
        if "pixel_values" in batch:
            count = int((alone["input_ids"] == zoo.IMAGE).sum()) // zoo.TOKENS_PER_IMAGE
            alone["pixel_values"] = batch["pixel_values"][images : images + count]
            images += count
        own = dimmed[sample, valid][None]
        found = generated(model, {**alone, "dimmed": own}, **options)
        beams = {key: options[key] for key in options if key.startswith("num_")}
        with torch.no_grad():  # token by token, from scratch
            ids = alone["input_ids"]
            for _ in range(6 if not beams else 0):
                mask = torch.ones_like(ids)
                logits = model(
                    **{**alone, "input_ids": ids, "attention_mask": mask}, dimmed=own, use_cache=False
                ).logits
                logits[:, -1, model.generation_config.suppress_tokens + alone["input_ids"][own].tolist()] = -torch.inf
                ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        if not beams:
            assert torch.equal(found, ids[:, alone["input_ids"].shape[1] :])
        if together is not None:
            assert torch.equal(together[sample * answers : (sample + 1) * answers], found)
        assert not set(found.flatten().tolist()) & set(alone["input_ids"][own].tolist())
    if together is not None and not options:
        assert not torch.equal(together, plain)
    dimmer.remove()
    assert torch.equal(generated(model, batch), plain)


def test_processors_come_behind_those_of_the_caller() -> None:
    model, (batch, dimmed) = zoo.build("llama"), prompts("llama")
    dimmer = Dimmer(model)

    class Own(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            dimmer.calls.append("own")
            return scores

    given = {**batch, "dimmed": dimmed, "logits_processor": [Own()]}
    generated(model, given, max_new_tokens=2)
    assert dimmer.calls == ["own", "forbid"] * 2


def test_a_disabled_owner_brings_no_processors() -> None:
    model, (batch, dimmed) = zoo.build("llama"), prompts("llama")
    dimmer = Dimmer(model)
    with marked(Dimmer.owner_id):
        generated(model, {**batch, "dimmed": dimmed})
    assert not dimmer.calls


def test_nothing_attached_changes_nothing() -> None:
    model, (batch, _) = zoo.build("llama"), prompts("llama")
    with generation_extras(model, {**batch, "max_new_tokens": 2}) as given:
        assert given == {**batch, "max_new_tokens": 2}


def test_transformers_has_no_way_of_its_own_for_further_inputs() -> None:
    """The day this fails, `generation_extras` can hand them to `generate` itself."""
    model, (batch, dimmed) = zoo.build("llama"), prompts("llama")
    Dimmer(model)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, dimmed=dimmed, **SETTINGS)


def test_inputs_of_another_batch_are_refused() -> None:
    model, (batch, dimmed) = zoo.build("llama"), prompts("llama")
    Dimmer(model)
    three = torch.cat([dimmed, dimmed[:1]])
    with pytest.raises(UsageError, match="dimmed is of 3 samples, the forward of 2"):
        model(**batch, dimmed=three)
    with ExitStack() as stack:
        given = stack.enter_context(generation_extras(model, {**batch, "dimmed": three, **SETTINGS}))
        given.pop("logits_processor")
        with pytest.raises(UsageError, match="dimmed is of 3 samples, the forward of 2"):
            model.generate(**given)


def test_threads_give_their_own() -> None:
    model, (batch, dimmed) = zoo.build("llama"), prompts("llama")
    Dimmer(model)
    masks = {"one": dimmed, "other": ~dimmed & batch["attention_mask"].bool()}
    expected = {name: generated(model, {**batch, "dimmed": mask}) for name, mask in masks.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in masks}

    def run(name: str) -> None:
        for _ in range(4):
            found[name].append(generated(model, {**batch, "dimmed": masks[name]}))

    threads = [threading.Thread(target=run, args=(name,)) for name in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(expected["one"], expected["other"])
    for name, answers in found.items():
        assert len(answers) == 4
        assert all(torch.equal(answer, expected[name]) for answer in answers)
