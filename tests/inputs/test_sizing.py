"""Budgets of pixels beside single images: obeyed where a processor can, refused by name where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alula.data import Collator, ImageRef, MixtureSpec, open_mixture
from alula.data.errors import BadSampleError
from alula.data.samples import Sample
from alula.errors import AlulaError, UsageError
from alula.evaluation.prompts import encode, loaded
from alula.hosts import Host, build_host, load_host
from alula.inputs import Intake
from alula.sizing import Sizing
from tests.hosts import tiny
from tests.hosts.qwen import written

SIZES = [(60, 40), (33, 90), (64, 64), (20, 20)]
SAID: list[dict[str, int]] = [
    {"max_pixels": 1024},
    {},
    {"resized_height": 30, "resized_width": 51},
    {"min_pixels": 2000, "max_pixels": 3000},
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return load_host(written(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl"))


def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


def ref(number: int) -> ImageRef:
    made = ImageRef.from_object(picture(number))
    return ImageRef(made.name, maker=made.maker, **ImageRef.fields_said(SAID[number]))


def sample(*numbers: int) -> Sample:
    content = [*({"type": "image", "image": ref(number)} for number in numbers), {"type": "text", "text": "what?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return Sample(f"s{numbers}", [{"role": "user", "content": content}, answer])


def alone(processor: Any, number: int) -> dict[str, Any]:
    """What the processor makes of one image, told of its budget for the whole call."""
    said, size, image = SAID[number], dict(processor.image_processor.size), picture(number)
    if "resized_height" in said:
        image = image.resize((48, 32), processor.image_processor.resample)  # 51 and 30 in whole tokens of 8
        size = {"shortest_edge": 1, "longest_edge": 10**6}
    size = {
        "shortest_edge": said.get("min_pixels", min(size["shortest_edge"], said.get("max_pixels", 10**9))),
        "longest_edge": said.get("max_pixels", size["longest_edge"]),
    }
    return processor.image_processor(images=[image], size=size, return_tensors="pt")


def test_every_image_is_what_the_processor_makes_of_it_under_its_budget(host: Host) -> None:
    model, processor = host
    batch = Collator(processor)([sample(0, 1), sample(2), sample(3)])
    expected = [alone(processor, number) for number in range(4)]
    assert torch.equal(batch["image_grid_thw"], torch.cat([each["image_grid_thw"] for each in expected]))
    assert torch.equal(batch["pixel_values"], torch.cat([each["pixel_values"] for each in expected]))
    grids = batch["image_grid_thw"].prod(dim=1)
    assert grids[0] * 16 <= 1024
    assert 2000 <= grids[3] * 16 <= 3000
    assert (batch["input_ids"] == model.config.image_token_id).sum() == grids.sum() // 4
    with torch.no_grad():
        assert model(**{key: value for key, value in batch.items() if key != "labels"}).logits.isfinite().all()


def test_without_budgets_nothing_changes(host: Host) -> None:
    _, processor = host
    plain = Collator(processor)([sample(1)])
    expected = processor.image_processor(images=[picture(1)], return_tensors="pt")
    assert torch.equal(plain["pixel_values"], expected["pixel_values"])


def test_questions_of_evaluation_and_chat_obey_them(host: Host) -> None:
    _, processor = host
    asked = loaded(sample(0, 3).messages[:1], Intake.of(processor))
    rendered = encode(processor, asked)
    expected = torch.cat([alone(processor, number)["pixel_values"] for number in (0, 3)])
    assert torch.equal(rendered.inputs["pixel_values"], expected)


def test_a_processor_of_one_size_refuses_by_name() -> None:
    processor = build_host(tiny.decoder("llama"), tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer()).processor
    with pytest.raises(BadSampleError, match=r"an image comes with max_pixels, and \w+ has one size for all images"):
        Collator(processor)([sample(0)])
    with pytest.raises(AlulaError, match="comes with min_pixels"):
        encode(processor, loaded(sample(3).messages[:1], Intake.of(processor)))


@pytest.mark.parametrize("where", ["part", "entry", "listed", "source"])
def test_records_say_them_beside_the_image(where: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    part: dict[str, Any] = {"type": "image", "image": "a.png"}
    record: dict[str, Any] = {"id": "1"}
    if where == "part":
        part["max_pixels"] = 1024
    elif where == "entry":
        record["images"], part = [{"path": "a.png", "max_pixels": 1024}], {"type": "image"}
    elif where == "listed":
        record["images"], part = ["a.png"], {"type": "image", "max_pixels": 1024}
    text = {"type": "text", "text": "what?"}
    record["messages"] = [{"role": "user", "content": [part, text]}, {"role": "assistant", "content": "red"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    source: dict[str, Any] = {"jsonl": str(tmp_path / "a.jsonl")}
    if where == "source":
        source["reading"] = {"image": {"max_pixels": 1024}}
    (image,) = open_mixture(MixtureSpec.model_validate({"sources": [source]}))[0].images
    assert image.sizing == Sizing(max_pixels=1024)
    assert image.load().size == SIZES[0]
    assert image.fingerprint() != ImageRef.from_path(tmp_path / "a.png").fingerprint()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"max_pixels": "many"}, "max_pixels is 'many', not a whole number"),
        ({"max_pixels": 0}, "not a whole number above 0"),
        ({"resized_height": 30}, "resized_height is given alone"),
        ({"resized_height": 30, "resized_width": 20, "max_pixels": 100}, "a size and bounds"),
        ({"min_pixels": 30, "max_pixels": 20}, "min_pixels 30 is above max_pixels 20"),
        ({"total_pixels": 30}, "'total_pixels' would be dropped"),
    ],
)
def test_what_has_no_meaning_is_named_with_its_line(said: dict[str, Any], told: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png", **said}, {"type": "text", "text": "what?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    mixture = open_mixture(MixtureSpec.model_validate({"sources": [{"jsonl": str(tmp_path / "a.jsonl")}]}))
    with pytest.raises(BadSampleError, match=told) as caught:
        mixture[0]
    assert "a.jsonl:1" in str(caught.value)


def test_beside_a_record_the_remedy_names_the_part(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "max_pixels": 100}))
    mixture = open_mixture(MixtureSpec.model_validate({"sources": [{"jsonl": str(tmp_path / "a.jsonl")}]}))
    with pytest.raises(BadSampleError, match="write it into the part of the image"):
        mixture[0]


def test_a_source_says_what_is_no_budget() -> None:
    with pytest.raises((UsageError, ValueError), match="above max_pixels"):
        open_mixture(
            MixtureSpec.model_validate(
                {"sources": [{"jsonl": "a.jsonl", "reading": {"image": {"min_pixels": 3, "max_pixels": 2}}}]}
            )
        )
