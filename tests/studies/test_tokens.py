"""The study of tokenizers: what its arms share, how drawings are judged, and what its figures are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from alula.reports import render
from alula.training.codes import KMeansSpec, encoder_features
from studies.tokens import TokensPlan, TokensRecord, markdown, report, table, verdict
from studies.tokens.measure import error, held_out, matched, shown
from studies.tokens.plan import ARMS, CODES, SOUNDS
from studies.tokens.record import Measured

_CODES = {"vq-25": 25, "vq-128": 9, "placed-128": 9, "vq-512": 9, "sound-256": 10}
"""codes of an item"""


def test_arms_are_trained_alike_but_for_the_codes(tmp_path: Path) -> None:
    plan = TokensPlan(tmp_path, training=8)
    recipes = {arm: plan.tuning(0, arm) for arm in ARMS}
    for arm, recipe in recipes.items():
        assert [stage.steps for stage in recipe.stages] == [1, 7]
        if arm not in SOUNDS:
            assert [stage.data for stage in recipe.stages] == [stage.data for stage in recipes["two"].stages]
        assert {stage.settings.write for stage in recipe.stages} == {0.75}  # type: ignore[attr-defined]
    assert list(recipes["two"].stages[0].settings.codes) == ["seen", "drawn"]  # type: ignore[attr-defined]
    for name in CODES:
        fitted = plan.fitted(3, name)
        assert (fitted.seed, fitted.items) == (3, plan.pictures)
        assert (fitted.vq is None) is (name.startswith(("tower", "untrained")))
        if fitted.vq is not None:
            assert (fitted.vq.steps, fitted.vq.of_codes().tokens_per_item) == (600, _CODES[name])


def test_the_tower_finds_pictures_that_show_what_was_asked_on_any_background(tmp_path: Path) -> None:
    plan = TokensPlan(tmp_path, items=8)
    pictures = [sample.images[0].load() for sample in held_out(plan, "image")]
    wanted = shown(plan, "image")
    tower = encoder_features(KMeansSpec(encoder="fledgling"), "image", 0)
    assert matched(tower, pictures, wanted) == [True] * 8
    assert all(picture in each for picture, each in zip(pictures, wanted, strict=True))
    for place in (0, -1):
        others = [each[place] for each in wanted]
        assert matched(tower, others, wanted) == [True] * 8
        assert not any(matched(tower, [*others[1:], others[0]], wanted))
    black, white = (Image.new("RGB", (4, 4), color) for color in ("black", "white"))
    assert error(black, black) == 0
    assert error(black, white) == pytest.approx(4)
    assert ImageChops.difference(pictures[0], pictures[1]).getbbox()


def test_the_ears_find_sounds_that_show_what_was_asked(tmp_path: Path) -> None:
    plan = TokensPlan(tmp_path, items=8)
    sounds = [sample.media("audio")[0].load(rate=16000) for sample in held_out(plan, "audio")]
    ears = encoder_features(KMeansSpec(encoder="fledgling"), "audio", 0)
    wanted = shown(plan, "audio")
    assert matched(ears, sounds, wanted) == [True] * 8
    assert not any(matched(ears, [*sounds[1:], sounds[0]], wanted))


def test_figures_are_caption_by_caption(tmp_path: Path) -> None:
    def of(nats: float, drawn: bool) -> Measured:
        spread = [nats + 0.1 * place for place in range(8)]
        flags = [drawn] * 7 + [not drawn]
        return Measured(read=spread, drawn=flags, coded=[True] * 8, pixels=[0.5] * 8, pixels_coded=[0.1] * 8)

    heard = Measured(read=[1.0] * 8, drawn=[True] * 8, coded=[True] * 8)
    arms = {
        "tower-128": of(3.0, False),
        "placed-128": of(1.0, True),
        "two": of(3.0, True),
        "untrained-128": of(0.5, False),
    }
    arms["sound-256"] = heard
    record = TokensRecord(
        command="x", created="now", environment={}, seconds=1.0, settings={"training": 1, "items": 8},
        seeds={0: arms, 1: arms},
    )  # fmt: skip
    assert record.gain("two", "placed-128", "read").value == pytest.approx(2.0)
    assert record.likelier("placed-128").value == 1
    assert record.mean("placed-128", "drawn").value == pytest.approx(7 / 8)
    said = "\n".join(verdict(record))
    assert "k-means of the tower, 128: +3.35" in said
    shown_for = (
        "VQ, 128 of each place",
        "reads k-means of the tower, 128, writes VQ, 128 of each place",
        "VQ of sounds",
    )
    assert f"one in eight): {'; '.join(shown_for)}" in said
    assert markdown(record).count("\n|") == 2 * 2 + len(arms)
    assert "VQ, 128 of each place" in render(report(record))
    assert table(record).row_count == len(arms) - 1
