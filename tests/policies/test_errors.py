"""What policies cannot do is refused by name, with a remedy; what they should not be asked is warned of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from alula.errors import HostError, UsageError
from alula.policies import Budget, Policy, Prune, Skip, Withdraw
from alula.policies.endings import tell_ending
from alula.seam import find
from tests import zoo
from tests.grafts.common import run
from tests.policies.test_withdraw import LAYERS

POLICIES: dict[str, Policy] = {
    "withdraw": Withdraw(layer=1),
    "prune": Prune(stages=[(1, 0.5)]),
    "skip": Skip(part="mlp"),
}
every_case = pytest.mark.parametrize("case", POLICIES)


def enter(policy: Policy, model: Any) -> None:
    with policy.on(model):
        pass


@every_case
@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_without_masks_that_can_be_read(case: str, implementation: str) -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    model.config.get_text_config(decoder=True)._attn_implementation = implementation  # its kernels are not needed here
    with pytest.raises(HostError, match=rf"(?s)'{implementation}'.*set_attn_implementation"):
        enter(POLICIES[case], model)
    assert find(model) is None


@every_case
def test_a_decoder_in_parts(case: str) -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    model._tp_size = 2
    with pytest.raises(HostError, match=r"(?s)split over 2 devices by tensor parallelism.*load it without tp_plan"):
        enter(POLICIES[case], model)
    with pytest.raises(HostError, match="tensor parallelism"):
        POLICIES[case].attach(model)
    assert find(model) is None


@pytest.mark.parametrize("layer", [-1, 0, LAYERS, 9])
def test_a_layer_outside_the_decoder(layer: int) -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    with pytest.raises(UsageError, match="give one of 1 to 3"):
        enter(Withdraw(layer=layer), model)


def labels(inputs: dict[str, Tensor], *left: int) -> Tensor:
    """Labels at these places alone."""
    found = torch.full_like(inputs["input_ids"], -100)
    found[:, list(left)] = inputs["input_ids"][:, list(left)]
    return found


def test_labels_that_taken_out_tokens_would_predict() -> None:
    """In "3I2" the image stands at 3 to 6: what stands at 4 to 7 is predicted from it."""
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2")
    with Withdraw(layer=1).on(model):
        for place in (4, 6, 7):
            with pytest.raises(UsageError, match=r"(?s)sample 0 has a label right behind.*to -100"):
                model(**inputs, labels=labels(inputs, 1, place))
        loss = model(**inputs, labels=labels(inputs, 1, 3, 8)).loss
        assert torch.isfinite(loss)
        bare = model(**inputs).logits
    text = torch.nn.functional.cross_entropy(bare[0, [0, 2, 7]], inputs["input_ids"][0, [1, 3, 8]])
    torch.testing.assert_close(loss, text)
    model(**inputs, labels=labels(inputs, 4))
    with Withdraw(layer=1).on(model):  # labels of one forward are not another's
        model(**inputs)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="its wrappers call past the host's hooks")
@pytest.mark.parametrize("case", ["withdraw", "prune"])
def test_labels_are_heard_through_a_wrapper_of_peft(case: str) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped: Any = peft.get_peft_model(model, config)
    with POLICIES[case].on(wrapped):
        with pytest.raises(UsageError, match=r"(?s)sample 0 has a label right behind.*to -100"):
            wrapped(**inputs, labels=inputs["input_ids"])
        assert torch.isfinite(wrapped(**inputs, labels=labels(inputs, 1, 3, 8)).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_ends_in_an_image_is_warned_of_once(side: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ends = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "2I", side=side)
    tell_ending.cache_clear()
    with caplog.at_level(logging.WARNING), Withdraw(layer=1).on(model):
        run(model, "llava-llama", zoo.batch("llava-llama", "3I2", "I3", "4", side=side))
        assert not caplog.records
        run(model, "llava-llama", ends)
        logits = run(model, "llava-llama", ends)
    assert torch.isfinite(logits).all()
    assert [record.message.split(" under")[0] for record in caplog.records] == ["a prompt ends in an image"]


def test_a_prompt_of_images_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", "3I2", "I")
    tell_ending.cache_clear()
    with caplog.at_level(logging.WARNING), Withdraw(layer=1).on(model):
        with pytest.raises(UsageError, match="prompt 1 has images and no text"):
            run(model, "llava-llama", inputs, use_cache=False)
        said = model.generate(**inputs, max_new_tokens=2, do_sample=False)  # what follows may be text
    assert said.shape == (2, 11)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Withdraw(16), r"Withdraw\(layer=\.\.\.\)"),
        (lambda: Prune(stages=(2, 0.5)), r"\[\(2, 0\.5\)\]"),
        (lambda: Prune(stages=[(2, 0.5)], criterion={"name": "random", "sed": 1}), "legal keys: name, seed$"),
        (lambda: Budget(image_tokens=1, by="grid", merge="contextual"), "none is one that others are merged into"),
    ],
)
def test_a_slip_in_settings_is_told_with_what_to_write(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()
