"""Points, depth, normals, motion and responses of the microworld: held to geometry and physics, files, answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alula.data import open_file, open_source
from alula.data.check import check
from alula.errors import UsageError
from alula_fledgling.export import export_microworld
from alula_fledgling.microworld import SENSE_FAMILIES, sense_items, source
from alula_fledgling.microworld.films import NUM_FRAMES
from alula_fledgling.microworld.reliefs import (
    METERS_PER_PIXEL,
    WALL,
    Cloud,
    DepthMap,
    NormalMap,
    Plate,
    Relief,
    ReliefImage,
)
from alula_fledgling.microworld.render import IMAGE_SIZE, INK
from alula_fledgling.microworld.responses import NUM_FEATURES, Response, features, weights
from alula_fledgling.microworld.rides import GRAVITY, RATE
from alula_fledgling.microworld.scenes import UNSEEN_PAIRS, Scene, Thing

MIDDLE = 4
MEDIA = ("points", "depth", "normals", "motion", "response")


def part(item):
    return item.messages[0]["content"][0]


def clip(item):
    return part(item)[part(item)["type"]]


def question(item):
    return item.messages[0]["content"][1]["text"]


@pytest.fixture(scope="module")
def reliefs() -> list[Relief]:
    return [clip(item).relief for item in sense_items("points", 60, split="test", seed=2)]


def two(near: float, far: float) -> Relief:
    """Two squares, side by side, that overlap."""
    things = Thing("red", "square", "large", MIDDLE), Thing("blue", "square", "large", MIDDLE + 1)
    return Relief(Scene(things), (Plate(near, "left"), Plate(far, "upwards")))


def test_what_is_nearer_hides_what_is_behind() -> None:
    near, far = two(1.0, 2.2), two(2.2, 1.0)
    alone = [
        DepthMap(Relief(Scene((thing,)), (plate,))).load()
        for thing, plate in zip(near.scene.things, near.plates, strict=True)
    ]
    np.testing.assert_array_equal(DepthMap(near).load(), np.minimum(*alone))
    both = (alone[0] < WALL) & (alone[1] < WALL)
    assert both.sum() >= 10
    for relief, shown in ((near, "red"), (far, "blue")):
        assert (np.asarray(ReliefImage(relief).load())[both] == INK[shown]).all()


def test_normals_are_those_of_the_depth(reliefs: list[Relief]) -> None:
    """Unit vectors along the gradient of the surface z = -depth, taken by differences inside of each plate."""
    checked = 0
    for relief in reliefs:
        depth, normals = DepthMap(relief).load().astype(float), NormalMap(relief).load()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, atol=1e-6)
        seen = np.asarray(ReliefImage(relief).load()).astype(int)
        down, right = np.gradient(depth, METERS_PER_PIXEL)
        normal = np.stack([right, -down, np.ones_like(depth)], axis=2)
        normal /= np.linalg.norm(normal, axis=2, keepdims=True)
        same = np.ones(depth.shape, bool)
        for axis in (0, 1):
            for step in (-1, 1):
                same &= (np.roll(seen, step, axis) == seen).all(axis=2)
        same[[0, -1]] = same[:, [0, -1]] = False
        same &= np.abs(np.stack([right, down])).max(axis=0) < 1  # two plates of one color
        np.testing.assert_allclose(normals[same], normal[same], atol=0.02)  # depth is in whole millimeters
        checked += int((same & (depth < WALL)).sum())
    assert checked > 1000


def before(relief: Relief) -> np.ndarray:
    """Meters from each point back to the surface that the camera sees there; NaN where that is the wall."""
    points, depth = Cloud(relief).load(), DepthMap(relief).load()
    x, y, z = points[:, :3].T.astype(float)
    columns, rows = x / METERS_PER_PIXEL + IMAGE_SIZE / 2, IMAGE_SIZE / 2 - y / METERS_PER_PIXEL
    # from the middle of the pixel that shows it, along the plane that its normal stands on
    at = rows.astype(int), columns.astype(int)
    normal = NormalMap(relief).load()[at]
    right, up = (columns - at[1] - 0.5) * METERS_PER_PIXEL, (at[0] + 0.5 - rows) * METERS_PER_PIXEL
    surface = depth[at] + (normal[:, 0] * right + normal[:, 1] * up) / normal[:, 2]
    return np.where(depth[at] == np.float32(WALL), np.nan, surface + z)


def test_points_lie_on_the_surfaces(reliefs: list[Relief]) -> None:
    hidden = []
    for relief in reliefs:
        points, things = Cloud(relief).load(), relief.scene.things
        inks = {tuple(np.float32(np.array(INK[thing.colour]) / 255)) for thing in things}
        assert {tuple(color) for color in points[:, 3:]} <= inks
        for thing, plate in zip(things, relief.plates, strict=True):
            off = before(Relief(Scene((thing,)), (plate,)))
            assert np.nanmax(np.abs(off)) < 0.001  # depth is in whole millimeters
            assert np.isnan(off).mean() < 0.2  # rims: a pixel shows what most of it is
        off = before(relief)
        hidden.append((off < -0.1).mean())
        assert (np.abs(off) < 0.001).mean() > 0.5
        assert (off > 0.1).mean() < 0.1  # rims again: the pixel shows what is behind
    assert 0 < np.mean(hidden) < 0.2  # the cloud is of whole things


def test_double_integration_gives_the_films_way() -> None:
    """Rotation from the gyroscope, readings turned back, gravity taken off, summed twice: the film's places."""
    for item in sense_items("motion", 24, split="test", seed=4):
        ride, felt = clip(item).ride, clip(item).load().astype(float)
        angle = np.cumsum(felt[:, 5]) / RATE
        east = np.cos(angle) * felt[:, 0] - np.sin(angle) * felt[:, 1]
        north = np.sin(angle) * felt[:, 0] + np.cos(angle) * felt[:, 1]
        way = np.cumsum(np.cumsum(np.stack([east, north]), axis=1), axis=1) / RATE**2
        frames = (ride.first_frame + np.arange(NUM_FRAMES) / 8) * RATE
        places = np.stack([np.interp(frames, np.arange(len(felt)), axis) for axis in way])
        told = np.array([ride.actor.at(frame) for frame in range(NUM_FRAMES)], float)
        told = (told - told[0]) * METERS_PER_PIXEL
        wanted = np.stack([told, 0 * told] if ride.film.axis == "horizontal" else [0 * told, -told])
        assert np.abs(places - places[:, :1] - wanted).max() < 0.03
        assert abs(felt[:, 2].mean() - GRAVITY) < 0.01
        assert np.abs(felt[:50, :2]).max() < 0.05  # at rest
        turned = "left" if angle[-1] > 1 else "right" if angle[-1] < -1 else ""
        assert turned == ride.turn


def test_a_response_is_linear_in_the_scene_and_tells_what_is_there() -> None:
    scenes = {s.content: s for s in (clip(i).scene for i in sense_items("response", 700, split="train", seed=0))}
    known = list(scenes.values())
    held = [clip(item).scene for item in sense_items("response", 100, split="test", seed=0)]
    assert not {scene.content for scene in held} & scenes.keys()
    noise = np.stack([Response(known[0], repeat).load() for repeat in range(200)]) - weights() @ features(known[0])
    assert np.abs(noise).max() <= 0.5
    assert np.abs(noise.mean(axis=0)).max() < 0.1
    one, other = (Scene((Thing("red", "ring", "large", cell),)) for cell in (0, 5))
    both = Scene((*one.things, *other.things))
    np.testing.assert_allclose(features(both), features(one) + features(other))
    # least squares from responses to features, asked what colors there are on scenes that it has not seen
    given = np.stack([Response(scene).load() for scene in known]).astype(float)
    found, *_ = np.linalg.lstsq(given, np.stack([*map(features, known)]), rcond=None)
    right = chance = total = 0
    for scene in held:
        told = (Response(scene, 1).load() @ found).reshape(9, NUM_FEATURES // 9)
        for thing in scene.things:
            guess = int(told[thing.cell, :6].argmax())
            right += list(INK)[guess] == thing.colour
            chance += 1 / 6
            total += 1
    assert right / total > 0.9 > 3 * chance / total


@pytest.mark.parametrize("name", MEDIA)
def test_exported_files_read_as_the_stream_itself(tmp_path: Path, name: str) -> None:
    if name == "points":
        pytest.importorskip("plyfile")
    stream = f"{name}_pictured" if name in ("depth", "normals") else name
    path = export_microworld(stream, tmp_path / "set", n=6, split="test", seed=1)
    files, items = open_file(path), open_source({"microworld": stream, "split": "test", "seed": 1})
    for number in range(6):
        ours, theirs = files[number].media()[0], items[number].media()[0]
        np.testing.assert_allclose(ours.load(), theirs.load(), atol=1e-6)
        if name in ("depth", "normals"):
            shown = [np.asarray(each[number].messages[0]["content"][0]["image"].load()) for each in (files, items)]
            assert np.array_equal(*shown)
    report = check(path)
    assert report.ok, report.bad


@pytest.mark.parametrize("name", list(SENSE_FAMILIES))
def test_streams_repeat_and_splits_share_nothing(name: str) -> None:
    made = {split: list(sense_items(name, 40, split=split, seed=0)) for split in ("train", "test")}
    again = source(name, split="train", seed=0)
    for index in (0, 17):
        assert again[index].messages == made["train"][index].messages
        np.testing.assert_array_equal(clip(again[index]).load(), clip(made["train"][index]).load())
    assert not {clip(i).fingerprint() for i in made["train"]} & {clip(i).fingerprint() for i in made["test"]}
    assert {item.family for item in made["test"]} == {*SENSE_FAMILIES[name]}
    if name in ("depth", "normals", "motion"):
        with pytest.raises(UsageError, match="no unseen"):
            source(name, split="unseen")
        return
    for item in sense_items(name, 8, split="unseen", seed=0):
        scene = clip(item).scene if name == "response" else clip(item).relief.scene
        assert {thing.pair for thing in scene.things} & UNSEEN_PAIRS


def test_answers_about_space_are_those_of_the_maps() -> None:
    checked = 0
    for item in sense_items("depth", 80, split="test", seed=5, families=("nearness", "form", "number")):
        relief, answer = clip(item).relief, item.targets[0].answer
        if item.family == "nearness":
            depth = DepthMap(relief).load()
            named = {}
            for thing, plate in zip(relief.scene.things, relief.plates, strict=True):
                alone = DepthMap(Relief(Scene((thing,)), (plate,))).load()
                named[thing.shape] = float(np.median(alone[alone < WALL]))
                assert (depth <= alone).all()
            pair = {shape: meters for shape, meters in named.items() if shape in question(item)}
            pick = min if "nearer" in question(item) else max
            assert pick(pair, key=pair.__getitem__) == answer
            checked += 1
    for item in sense_items("normals", 40, split="test", seed=5, families=("facing",)):
        relief = clip(item).relief
        (number,) = [n for n, thing in enumerate(relief.scene.things) if thing.shape in question(item)]
        only = NormalMap(Relief(Scene((relief.scene.things[number],)), (relief.plates[number],))).load()
        x, y, _ = only[only[..., 2] < 0.999][0]
        way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("upwards" if y > 0 else "downwards")
        assert way == item.targets[0].answer
        checked += 1
    assert checked > 60
