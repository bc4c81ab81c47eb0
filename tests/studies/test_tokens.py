"""The study of tokenizers: what its arms share, how drawings are judged, and what its figures are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from alula.reports import render
from alula.training.codes import KMeansSpec, encoder_features
from studies.tokens import TokensPlan, TokensRecord, markdown, report, table, verdict
from studies.tokens.measure import error, held_out, matched
from studies.tokens.plan import ARMS, CODES
from studies.tokens.record import Measured


def test_arms_are_trained_alike_but_for_the_codes(tmp_path: Path) -> None:
    plan = TokensPlan(tmp_path, training=8)
    recipes = {arm: plan.tuning(0, arm) for arm in ARMS}
    for recipe in recipes.values():
        assert [stage.steps for stage in recipe.stages] == [2, 6]
        assert [stage.data for stage in recipe.stages] == [stage.data for stage in recipes["two"].stages]
    assert list(recipes["two"].stages[0].settings.codes) == ["seen", "drawn"]  # type: ignore[attr-defined]
    for name in CODES:
        fitted = plan.fitted(3, name)
        assert (fitted.seed, fitted.items) == (3, plan.pictures)
        assert (fitted.vq is None) is not name.startswith("vq")


def test_the_tower_finds_pictures_that_show_what_was_asked(tmp_path: Path) -> None:
    plan = TokensPlan(tmp_path, items=8)
    pictures = [sample.images[0].load() for sample in held_out(plan)]
    tower = encoder_features(KMeansSpec(encoder="fledgling"), "image", 0)
    assert matched(tower, pictures, pictures) == [True] * 8
    assert not any(matched(tower, [*pictures[1:], pictures[0]], pictures))
    black, white = (Image.new("RGB", (4, 4), color) for color in ("black", "white"))
    assert error(black, black) == 0
    assert error(black, white) == pytest.approx(4)
    assert ImageChops.difference(pictures[0], pictures[1]).getbbox()


def test_figures_are_caption_by_caption(tmp_path: Path) -> None:
    def of(nats: float, drawn: bool) -> Measured:
        spread = [nats + 0.1 * place for place in range(8)]
        flags = [drawn] * 7 + [not drawn]
        return Measured(read=spread, drawn=flags, coded=[True] * 8, pixels=[0.5] * 8, pixels_coded=[0.1] * 8)

    arms = {"tower-128": of(3.0, False), "vq-128": of(1.0, True), "two": of(3.0, True), "untrained-128": of(0.5, False)}
    record = TokensRecord(
        command="x", created="now", environment={}, seconds=1.0, settings={"training": 1, "items": 8},
        seeds={0: arms, 1: arms},
    )  # fmt: skip
    assert record.gain("two", "vq-128", "read").value == pytest.approx(2.0)
    assert record.likelier("vq-128").value == 1
    assert record.mean("vq-128", "drawn").value == pytest.approx(7 / 8)
    said = "\n".join(verdict(record))
    assert "k-means of the tower, 128: +3.35" in said
    assert "one in eight): VQ, 128; reads k-means of the tower, writes VQ, 128 each" in said
    assert markdown(record).count("\n|") == 2 + len(arms)
    assert "VQ, 128" in render(report(record))
    assert table(record).row_count == len(arms)
