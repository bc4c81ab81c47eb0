"""Drawings: valid, finite, inside their frame, and legible where points crowd."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pytest

from alula.evaluation import Estimate
from alula.reports.figures import Curve, Line, Point, Sides, butterfly, cloud, curves, lines, scatter
from alula.reports.figures.canvas import Scale, nice_step, spread, text_width
from alula.reports.figures.markers import MARKERS, marker_path, marker_svg
from alula.reports.palette import SERIES_DARK, SERIES_LIGHT


def estimate(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        for key, value in element.attrib.items():
            if key in ("x", "x1", "x2", "cx"):
                assert -1 <= float(value) <= width + 1, (element.tag, key, value)
            if key in ("y", "y1", "y2", "cy"):
                assert -1 <= float(value) <= height + 1, (element.tag, key, value)
            if key in ("width", "height", "r"):
                assert value.endswith("px") or float(value) >= 0
            if key == "d":
                assert all(math.isfinite(float(n)) for n in re.findall(r"-?\d+\.?\d*|nan|inf", value))
    return root


def labels(root: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    found = []
    for element in root.iter("text"):
        if element.attrib.get("class") == "label":
            x, y, text = float(element.attrib["x"]), float(element.attrib["y"]), element.text or ""
            assert x + text_width(text, 13) <= float(root.attrib["viewBox"].split()[2]) + 4
            found.append((x, y - 11, x + text_width(text, 13), y + 2))
    return found


def overlapping(boxes: list[tuple[float, float, float, float]]) -> int:
    return sum(
        min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1]) for a, b in combinations(boxes, 2)
    )


@pytest.mark.parametrize("seed", range(12))
def test_scatter_labels_never_overlap_even_in_a_crowd(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [
        Point(f"method number {k}", k, estimate(0.7 + 0.02 * rng.random()), estimate(0.98 + 0.02 * rng.random()))
        for k in range(6)
    ]
    root = parsed(scatter(points, title="t", x_title="x", y_title="y", reference=(1.0, "base")))
    boxes = labels(root)
    assert len(boxes) == 6
    assert overlapping(boxes) == 0


@pytest.mark.parametrize(
    "points",
    [
        [Point("only", 0, estimate(0.5, 0), estimate(1.0, 0))],
        [Point("wide", 0, estimate(0.5, 0.5), Estimate(value=1.0, low=math.nan, high=math.nan))],
        [Point("zero", 0, estimate(0.0, 0), estimate(0.0, 0)), Point("one", 1, estimate(1.0, 0), estimate(1.0, 0))],
        [Point("a & <b>", 0, estimate(0.3), estimate(2.5), [(0.1, 2.0), (0.6, 3.0)])],
    ],
)
def test_scatter_of_extremes(points: list[Point]) -> None:
    root = parsed(scatter(points, title='say "t" & u', x_title="x", y_title="y", reference=(1.0, "base")))
    assert root.attrib["aria-label"] == 'say "t" & u'
    assert sum(element.attrib.get("class") == "point" for element in root.iter("g")) == len(points)


def test_intervals_end_inside_the_frame_or_in_an_arrow() -> None:
    """Few items make wide intervals: their ends are seen, and are no axes."""
    few = Point("few", 0, Estimate(0.21, 0.04, 0.38), Estimate(0.9, 0.7, 1.05))
    root = parsed(scatter([few], title="t", x_title="x", y_title="y", reference=(1.0, "base")))
    across, up = [e for e in root.iter("line") if e.attrib.get("class") == "bar"]
    (axis,) = [e for e in root.iter("line") if e.attrib.get("class") == "axis"]
    left, right = float(axis.attrib["x1"]), float(axis.attrib["x2"])
    assert left + 5 < float(across.attrib["x1"]) < float(across.attrib["x2"]) < right - 5
    assert 44 + 5 < float(up.attrib["y2"]) < float(up.attrib["y1"]) < 450 - 54 - 5
    arrows = [e for e in root.iter("path") if e.attrib.get("class") == "bar"]
    assert arrows == []
    wild = Point("wild", 0, Estimate(0.5, 0.45, 0.55), Estimate(1.0, 0.9, 9.0))
    root = parsed(scatter([wild], title="t", x_title="x", y_title="y", reference=(1.0, "base")))
    assert len([e for e in root.iter("path") if e.attrib.get("class") == "bar"]) == 1


def test_curves_end_labels_keep_apart_and_runs_are_drawn() -> None:
    steps = np.arange(1, 301)
    found = [
        Curve(f"method {k}", k, [(steps, 2.0 * np.exp(-steps / 90) + 0.3 + 0.0001 * k + 0.001 * r) for r in range(3)])
        for k in range(7)
    ]
    root = parsed(curves(found, title="t"))
    assert overlapping(labels(root)) == 0
    kinds = [element.attrib.get("class") for element in root.iter("path")]
    assert (kinds.count("curve"), kinds.count("faint")) == (7, 21)


def test_a_curve_of_two_points_and_one_that_reaches_zero() -> None:
    parsed(
        curves([Curve("short", 0, [([1, 2], [0.5, 0.4])]), Curve("zero", 1, [([1, 2, 3], [1.0, 0.1, 0.0])])], title="")
    )


def test_smoothing_keeps_the_mean_of_a_line() -> None:
    steps = np.arange(200.0)
    root = parsed(curves([Curve("line", 0, [(steps, 1.0 + 0 * steps)])], title=""))
    (path,) = [e for e in root.iter("path") if e.attrib.get("class") == "curve"]
    heights = {y for _, y in re.findall(r"([\d.]+) ([\d.]+)", path.attrib["d"])}
    assert len(heights) == 1


@pytest.mark.parametrize("lost", [0, 1, 90, 400])
def test_butterfly_bars_are_in_proportion(lost: int) -> None:
    sides = [
        Sides("a", 0, lost, 2, 400, [(lost, 2)]),
        Sides("a much longer name", 1, lost / 2, 0, 400, [(lost, 0), (0, 0)]),
    ]
    root = parsed(butterfly(sides, title="t"))
    bars = [float(e.attrib["width"]) for e in root.iter("rect") if e.attrib["class"] == "loss"]
    assert bars[1] == pytest.approx(bars[0] / 2, abs=0.02)
    assert overlapping(labels(root)) == 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 1.01), (-3, 1234), (0.5, 0.5004)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])


@pytest.mark.parametrize(("low", "high"), [(0.3, 3.0), (0.01, 50), (0.9, 1.1)])
def test_logarithmic_scale(low: float, high: float) -> None:
    scale = Scale(low, high, 0, 100, log=True)
    assert scale((low * high) ** 0.5) == pytest.approx(50)
    assert all(low <= tick <= high for tick in scale.ticks())
    assert scale.ticks()


def test_helpers() -> None:
    assert [nice_step(v) for v in (0.9, 1, 1.1, 2.2, 26, 0.03)] == pytest.approx([1, 1, 2, 2.5, 50, 0.05])
    assert spread([1.0, 1.0]) == (0.5, 1.5)
    assert spread([0.0, 0.0], least=1.0)[1] == pytest.approx(0.56)


def test_every_series_has_its_own_marker() -> None:
    assert len({marker_path(k, 0, 0, 5) for k in range(len(MARKERS))}) == len(MARKERS) == len(SERIES_LIGHT)
    assert len({marker_svg(k) for k in range(2 * len(MARKERS))}) == 2 * len(MARKERS)  # shape and color together


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize(("colours", "page"), [(SERIES_LIGHT, "#ffffff"), (SERIES_DARK, "#14181c")])
def test_series_colours_can_be_read_as_text(colours: tuple[str, ...], page: str) -> None:
    for colour in colours:  # WCAG AA for text
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_lines_keep_their_labels_apart_and_pass_over_what_is_undefined() -> None:
    rng = np.random.default_rng(0)
    values = [0.3, math.nan, *(0.3 + 0.01 * rng.standard_normal(6))]
    bands = [(v - 0.02, v + 0.02) for v in values]
    found = [Line(f"series {k}", k, [v + 0.001 * k for v in values], bands, dashed=k == 3) for k in range(4)]
    root = parsed(lines(range(8), found, title="t", x_title="layer", y_title="share", null=[(0.0, 0.1)] * 8))
    assert overlapping(labels(root)) == 0
    along = [e.text or "" for e in root.iter("text") if e.attrib.get("text-anchor") == "middle"]
    assert [tick for tick in along if tick != "layer"] == [str(at) for at in range(0, 8, 2)]


def test_lines_of_shares_start_at_zero() -> None:
    root = parsed(lines(range(3), [Line("a", 0, [0.0, 0.4, 0.2])], title="t", x_title="layer", y_title="share"))
    assert min(float(e.text or 0) for e in root.iter("text") if e.attrib.get("class") == "tick") == 0


def test_clouds_hold_their_points_and_keep_their_shape() -> None:
    points = [(0.0, 0.0), (30.0, 0.0), (0.0, 10.0)]
    root = parsed(cloud(points, [0, 1, 1], title="state 0"))
    assert len(root.findall("path")) == 3
    assert parsed(cloud([(1.0, 1.0)] * 3, [0, 0, 0], title="one place")) is not None
