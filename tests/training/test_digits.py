"""Real digits: honest splits, right answers, and a file that trains like the source it was exported from."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from alula.data import ImageRef
from alula.errors import UsageError
from alula.training import train
from alula_fledgling.microworld import IMAGE_SIZE, export_llava
from alula_fledgling.microworld.digits import (
    DIGIT_FAMILIES,
    FORM_STARTS,
    HELD_OUT_FORMS,
    DigitsImage,
    DigitStream,
    digit_items,
    form_of,
    images_of,
)
from tests.training.conftest import MakeRecipe, rows

LABELS = load_digits().target


def test_the_labels_are_one_form_filled_in_fourteen_times() -> None:
    form = "".join(map(str, LABELS[:130]))
    assert form.startswith("0123456789" * 3)
    for start, end in zip(FORM_STARTS, [*FORM_STARTS[1:], len(LABELS)], strict=True):
        filled = "".join(map(str, LABELS[start:end]))
        assert common_subsequence(form, filled) >= len(filled) - 1  # the form's digits in its order, at most one other
        assert len(filled) >= 122


def common_subsequence(left: str, right: str) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for letter in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            diagonal, row[place] = row[place], diagonal + 1 if letter == other else max(row[place], row[place - 1])
    return row[-1]


def test_no_image_and_no_filling_is_on_both_sides() -> None:
    train_images, test_images = ({image for pool in images_of(split) for image in pool} for split in ("train", "test"))
    assert not train_images & test_images
    assert len(train_images) + len(test_images) == len(LABELS) == 1797
    assert {form_of(image) for image in test_images} == set(HELD_OUT_FORMS)
    assert not {form_of(image) for image in train_images} & set(HELD_OUT_FORMS)
    for split in ("train", "test"):
        for digit, pool in enumerate(images_of(split)):  # type: ignore[arg-type]
            assert pool
            assert all(LABELS[image] == digit for image in pool)


def test_answers_are_what_the_labels_say() -> None:
    for split in ("train", "test"):
        seen = set()
        for item in digit_items(200, split=split, seed=3):  # type: ignore[arg-type]
            picture = item.messages[0]["content"][0]["image"]
            digits = [int(LABELS[image]) for image in picture.images]
            answers = {
                "read": str(digits[0]),
                "row": "".join(map(str, digits)),
                "larger": str(max(digits)),
                "sum": str(sum(digits)),
            }
            assert item.targets[0].answer == answers[item.family]
            assert item.messages[1]["content"][0]["text"] == answers[item.family]
            assert all((form_of(image) in HELD_OUT_FORMS) == (split == "test") for image in picture.images)
            seen.add(item.family)
        assert seen == set(DIGIT_FAMILIES)


def test_items_are_a_function_of_their_position() -> None:
    stream = DigitStream(seed=5, n=20)
    assert list(stream) == [pickle.loads(pickle.dumps(stream))[n] for n in range(20)]
    assert [item.id for item in stream] != [item.id for item in DigitStream(seed=6, n=20)]
    with pytest.raises(IndexError):
        stream[20]
    with pytest.raises(UsageError, match="choose from: read, row, larger, sum"):
        DigitStream(families=("write",))
    with pytest.raises(UsageError, match="train or test"):
        DigitStream(split="unseen")


def test_a_picture_shows_the_digits_where_they_belong() -> None:
    image = images_of("train")[1][0]
    single = np.asarray(DigitsImage((image,), "black", 0).load()).astype(int)
    assert single.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    ink = 255 - single.mean(-1)
    small = np.asarray(Image.fromarray(ink[4:36, 4:36].astype(np.uint8)).resize((8, 8), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), load_digits().images[image].ravel())[0, 1] > 0.97
    pair = np.asarray(DigitsImage((image, image), "black", 0).load())
    assert np.array_equal(pair[:, 1:19], pair[:, 20:38])


def test_the_llava_export_trains_like_the_source(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Same items, same order, same pixels, same words: the same losses, step for step."""
    count = 24
    file = export_llava(digit_items(count, split="train", seed=0), tmp_path / "digits")
    streamed = train(recipe(data={"sources": [{"digits": "all", "limit": count}]}, steps=8), quiet=True)
    run = {"output_dir": f"{streamed.directory}-file"}
    source = {"llava": str(file), "images": str(file.parent / "images")}
    read = train(recipe(run=run, data={"sources": [source]}, steps=8), quiet=True)
    assert rows(read.directory) == rows(streamed.directory)


def test_a_picture_is_known_by_what_decides_it() -> None:
    one, same, other = (DigitsImage((n,), "black", 0) for n in (3, 3, 4))
    assert ImageRef.from_object(one).fingerprint() == ImageRef.from_object(same).fingerprint()
    assert ImageRef.from_object(one).fingerprint() != ImageRef.from_object(other).fingerprint()
