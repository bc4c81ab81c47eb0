"""The table of media: everything that knows of image, video and audio reads it, and it is open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alula import media
from alula.data.samples import MEDIA as REFERENCES
from alula.errors import UsageError
from alula.items import brings_media, inputs_of
from alula.media import MEDIA, Medium
from alula.probes import token_sets
from alula.tokens import Modality, TokenMap

TOUCH = Medium(name="touch", modality=9, inputs=("pressure",), tower="touch", a="a touch", plural="touches")


@pytest.fixture
def touch() -> Iterator[Medium]:
    MEDIA.register(TOUCH)
    yield TOUCH
    del MEDIA._media["touch"]


def test_the_named_modalities_are_those_of_the_table() -> None:
    assert {name: int(Modality[name.upper()]) for name in MEDIA} == {m.name: m.modality for m in MEDIA.values()}
    assert set(REFERENCES) <= set(MEDIA)
    with pytest.raises(ValueError, match="9 is not a valid Modality"):
        Modality(9)


def test_a_registered_medium_is_known_everywhere(touch: Medium) -> None:
    assert Modality(9).name == "TOUCH"
    assert Modality.of("touch") is Modality(9) or Modality.of("touch") == Modality(9)
    assert brings_media({"pressure": torch.ones(1)})
    assert not brings_media({"temperature": torch.ones(1)})
    assert inputs_of("touch")[0] == "pressure"
    assert "pressure" not in inputs_of("vision")
    tokens = TokenMap.from_input_ids(torch.tensor([[5, 9, 9, 6]]), {Modality.of("touch"): 9})
    assert tokens.is_perceptual.tolist() == [[False, True, True, False]]
    token_sets.check("touch", "text")
    assert token_sets.select(tokens, "touch").tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    "change", [{"name": "image"}, {"modality": 1}, {"inputs": ("pixel_values",)}, {"modality": 0}], ids=str
)
def test_names_and_numbers_are_given_once(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        MEDIA.register(Medium(**{**vars(TOUCH), **change}))  # type: ignore[arg-type]
    assert "touch" not in media.MEDIA
