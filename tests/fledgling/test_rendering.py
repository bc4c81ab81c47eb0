"""Pictures: deterministic pixels that show what the scene says."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest

from alula.draws import Draw
from alula_fledgling.microworld import IMAGE_SIZE, NumberScene, Scene, SceneImage, Thing, render
from alula_fledgling.microworld.render import BACKGROUNDS, INK
from alula_fledgling.microworld.scenes import COLOURS, POSITIONS, SHAPES, SIZES, draw_number, draw_scene


def array(scene):
    return np.asarray(render(scene)).astype(int)


def test_pixels_never_change():
    """A digest over many scenes: other pixels mean another world, for which no tower was raised."""
    draw, digest = Draw("pixels", 0), hashlib.sha256()
    for _ in range(50):
        digest.update(render(draw_scene(draw, draw.between(1, 5))).tobytes())
        digest.update(render(draw_number(draw)).tobytes())
    assert digest.hexdigest() == "67a539839a8abbfa81e4e051ffbe05bce6bdc2bacf35661404e97b944ff321c6"


def test_image_is_small_rgb_and_lazy():
    image = SceneImage(draw_number(Draw(1)))
    copy = pickle.loads(pickle.dumps(image))
    assert copy == image
    assert image.load().mode == "RGB"
    assert image.load().size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.load().tobytes() == copy.load().tobytes()


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", range(len(BACKGROUNDS)))
def test_a_thing_is_its_colour_in_its_cell_and_nowhere_else(colour, background):
    for cell, shape in zip(range(9), SHAPES * 2, strict=False):
        pixels = array(Scene((Thing(colour, shape, "large", cell),), background))
        differs = (pixels != BACKGROUNDS[background]).any(-1)
        rows, columns = np.nonzero(differs)
        third = IMAGE_SIZE / 3
        assert cell // 3 == int(rows.mean() // third), POSITIONS[cell]
        assert cell % 3 == int(columns.mean() // third), POSITIONS[cell]
        assert rows.max() - rows.min() < 14
        assert (pixels == INK[colour]).all(-1).sum() > 12  # pixels of the pure ink


def test_edges_are_anti_aliased():
    pixels = array(Scene((Thing("red", "circle", "large", 4),), 0))
    pure = (pixels == INK["red"]).all(-1) | (pixels == BACKGROUNDS[0]).all(-1)
    assert 8 < (~pure).sum() < 60


@pytest.mark.parametrize("shape", SHAPES)
def test_large_covers_about_twice_as_much_as_small(shape):
    def cover(size):
        return (array(Scene((Thing("blue", shape, size, 4),), 0)) != BACKGROUNDS[0]).any(-1).sum()

    assert 1.5 < cover("large") / cover("small") < 3


@pytest.mark.parametrize("size", SIZES)
def test_no_two_shapes_look_alike(size):
    masks = {s: array(Scene((Thing("black", s, size, 4),), 0)).sum(-1) for s in SHAPES}
    full = sum(BACKGROUNDS[0]) - sum(INK["black"])
    for one, other in itertools.combinations(SHAPES, 2):
        assert abs(masks[one] - masks[other]).sum() / full >= 8, (one, other, size)  # whole pixels' worth


def test_things_in_neighbouring_cells_do_not_touch_each_other():
    shifted = (Thing("red", "square", "large", 3, (1, 0)), Thing("blue", "square", "large", 4, (-1, 0)))
    pixels = array(Scene(shifted, 0))
    red, blue = ((pixels == INK[c]).all(-1).sum() for c in ("red", "blue"))
    alone = (array(Scene((Thing("red", "square", "large", 3, (1, 0)),), 0)) == INK["red"]).all(-1).sum()
    assert red >= alone - 12
    assert blue >= alone - 12


@pytest.mark.parametrize("digits", ["7", "42", "903"])
def test_each_digit_of_a_number_is_inside_the_picture(digits):
    """Separate columns of ink, one run per digit, none cut off at the edge."""
    for scale in range(3):
        for right in (-2, 0, 2):
            for down in (-4, 4):
                pixels = array(NumberScene(digits, "black", 0, scale, (right, down)))
                inked = (pixels != BACKGROUNDS[0]).any(-1)
                assert not inked[0].any()
                assert not inked[-1].any()
                columns = inked.any(0).astype(int)
                assert np.diff(np.r_[0, columns, 0]).clip(0).sum() == len(digits)


def test_digits_are_told_apart():
    seen = {render(NumberScene(str(d), "black", 0)).tobytes() for d in range(10)}
    assert len(seen) == 10
