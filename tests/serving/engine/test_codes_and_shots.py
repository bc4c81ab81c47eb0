"""Adapters whose prompts hold more than text and pixels: codes (TEAL), demonstrations that were fused (AIM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import alula
from alula.codes import CodesProcessor, VQCodes, VQConfig
from alula.demonstrations import Bank, Demonstration, FewShot
from alula.errors import BankError, UsageError
from alula.grafts import AimConfig, TealConfig, save_adapter
from alula.hosts import load_host
from alula.inputs import Intake
from alula.seam import generation_extras
from alula.serving.engine import Engine, Highlighted, Request, RequestError, Sampling
from alula.steering import Box, Prompt, Whole
from tests.grafts.common import wake
from tests.serving.engine.conftest import BLUE, RED, alone, asked, tokens_of, told

CODES = VQCodes(VQConfig(size=8, width=4, grid=2, patch=20, hidden=8), seed=1)
SHOWN = [Demonstration(RED, "color?", "red"), Demonstration(BLUE, "what is it?", "a blue thing")]


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TEAL adapter with the processor of its codes beside it, an AIM adapter, and a bank of demonstrations."""
    folder = tmp_path_factory.mktemp("further")
    host = load_host(parts / "host")
    codes = {"image": CODES}
    graft: Any = wake(alula.attach(host.model, TealConfig.of(codes)))
    graft.start_from(codes)
    save_adapter(host.model, folder / "teal", base=parts / "host")
    CodesProcessor.over(host.processor, graft.vocabulary.text, codes).save_pretrained(folder / "teal")
    model, _ = load_host(parts / "host")
    wake(alula.attach(model, AimConfig()))
    save_adapter(model, folder / "aim", base=parts / "host")
    Bank(folder / "bank", *alula.load_model(folder / "aim")).encoded(SHOWN)
    return folder


@pytest.fixture(scope="module")
def served(parts: Path, folder: Path) -> Any:
    with Engine() as engine:
        engine.load("host", parts / "host")
        engine.load("host+teal", folder / "teal")
        engine.load("host+aim", folder / "aim")
        engine.load("host+shown", folder / "aim", bank=folder / "bank")
        yield engine


def generated(model: Any, inputs: dict[str, Any]) -> list[int]:
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with torch.no_grad(), generation_extras(model, inputs) as given:
        found = model.generate(**given, max_new_tokens=12, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def test_pictures_that_are_read_as_codes(served: Engine, folder: Path) -> None:
    """Text is answered, and codes stay out of it, as with `generate`."""
    model, processor = alula.load_model(folder / "teal")
    graft: Any = alula.grafts_of(model)["teal"]
    for messages in (asked("what do you see?", RED), asked("two words"), asked("first second", RED, BLUE)):
        wanted = generated(model, Intake(processor, live=True).tensors(messages)[0])
        short = Sampling(max_tokens=3)
        handles = [served.submit(Request(name, messages, sampling=short)) for name in ("host+teal", "host", "host+aim")]
        assert told(served, "host+teal", messages) == wanted
        assert max(wanted) < graft.vocabulary.text
        for handle in handles:
            list(handle)
    (teal,) = (each for each in served.models() if each.name == "host+teal")
    assert "tokens of its own" in (teal.why_alone or "")
    assert teal.takes == {"image"}


def test_demonstrations_stand_before_every_conversation(served: Engine, folder: Path, parts: Path) -> None:
    model, processor = alula.load_model(folder / "aim")
    shots = Bank(folder / "bank", model, processor).shots(2)
    messages = asked("what do you see?", RED)
    inputs = FewShot(processor, shots, live=True).tensors(messages)[0]
    behind = generated(model, inputs)
    assert told(served, "host+shown", messages) == behind
    _, end = tokens_of(served.submit(Request("host+shown", messages, sampling=Sampling(max_tokens=1))))
    assert end.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert told(served, "host+aim", messages) == alone(folder / "aim", messages) == alone(parts / "host", messages)
    assert behind != alone(folder / "aim", messages)
    shown = {each.name: each.shots for each in served.models()}
    assert shown == {"host": 0, "host+teal": 0, "host+aim": 0, "host+shown": 2}


def test_a_bank_that_does_not_fit_is_refused(served: Engine, folder: Path, parts: Path) -> None:
    with pytest.raises(BankError, match="3 shots are asked for"):
        served.load("host+more", folder / "aim", bank=folder / "bank", shots=3)
    with pytest.raises(UsageError, match="no map"):
        served.load("host+wings", parts / "wings", bank=folder / "bank")
    with pytest.raises(UsageError, match="adapter of method aim"):
        served.load("other", parts / "host", bank=folder / "bank")
    with pytest.raises(UsageError, match="from a bank"):
        served.load("host+more", folder / "aim", shots=3)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("image_tokens", {"image_tokens": 4}),
        ("attention", {"attention": True}),
        ("highlight", {"highlight": Highlighted(regions=[(0, Box(0, 0, 10, 20))])}),
    ],
)
def test_codes_are_no_tokens_of_a_picture(served: Engine, field: str, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="as codes") as refused:
        served.submit(Request("host+teal", asked("what do you see?", RED), **given)).result()
    assert refused.value.where == field


@pytest.mark.parametrize("region", [Box(0, 0, 10, 20), Whole("image")])
def test_no_part_of_codes_is_highlighted(folder: Path, region: Any) -> None:
    """Said by `alula.highlight` too, whose words are found all the same."""
    model, processor = alula.load_model(folder / "teal")
    messages = asked("what do you see?", RED)
    prompt = Prompt(model, processor, Intake(processor).tensors(messages)[0], messages)
    with pytest.raises(UsageError, match="as codes") as refused, alula.highlight(model, prompt, regions=[region]):
        pass
    assert "spans" in (refused.value.remedy or "")
    assert prompt.marks(spans=["see"]).any()


def test_words_are_highlighted_behind_demonstrations(served: Engine, folder: Path) -> None:
    model, processor = alula.load_model(folder / "aim")
    intake = FewShot(processor, Bank(folder / "bank", model, processor).shots(2), live=True)
    messages = asked("what do you see? first second", RED)
    inputs = intake.tensors(messages)[0]
    with alula.highlight(model, Prompt(model, intake, inputs, messages), spans=["second"], strength=9.0):
        wanted = generated(model, inputs)
    asks = Highlighted(spans=["second"], strength=9.0)
    assert told(served, "host+shown", messages, highlight=asks) == wanted
