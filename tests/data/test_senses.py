"""Points, depth, normals, motion and responses in files: read as they were written, and what is wrong is named."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from transformers import LlavaProcessor
from typer.testing import CliRunner

from alula.cli import data as data_commands
from alula.data import (
    BadSampleError,
    Collator,
    DepthError,
    DepthRef,
    MotionError,
    MotionRef,
    NormalsError,
    NormalsRef,
    PointsError,
    PointsRef,
    RecordError,
    ResponseError,
    ResponseRef,
    open_file,
    open_mixture,
    open_source,
)
from alula.data.check import check
from alula.data.senses import motion, points, response
from alula.errors import RecipeError, UsageError

RNG = np.random.default_rng(0)
PLACES = RNG.normal(size=(50, 3)).astype(np.float32)
COLORS = RNG.integers(0, 256, (50, 3)).astype(np.uint8)
CLOUD = np.concatenate([PLACES, COLORS / 255], axis=1)
DEPTH = RNG.uniform(0.5, 4, (6, 8)).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def picture(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def refuses(ref, *told: str, error: type[BadSampleError]) -> None:
    with pytest.raises(error) as caught:
        ref.load()
    message = f"{caught.value.message} | {caught.value.remedy}"
    for words in told:
        assert words in message


# -- points -----------------------------------------------------------------------------------------------------------


def ply(*, text: bool = False, colors: np.ndarray | None = COLORS, faces: bool = False) -> bytes:
    plyfile = pytest.importorskip("plyfile")
    names = ("red", "green", "blue")
    kinds = [(axis, "f4") for axis in "xyz"] + ([(n, colors.dtype.str) for n in names] if colors is not None else [])
    vertex = np.empty(len(PLACES), dtype=kinds)
    for column, axis in enumerate("xyz"):
        vertex[axis] = PLACES[:, column]
    for column, name in enumerate(names if colors is not None else ()):
        vertex[name] = colors[:, column]
    elements = [plyfile.PlyElement.describe(vertex, "vertex")]
    if faces:
        rows = np.array([([0, 1, 2],), ([2, 3, 4],)], dtype=[("vertex_indices", "i4", (3,))])
        elements.append(plyfile.PlyElement.describe(rows, "face"))
    buffer = io.BytesIO()
    plyfile.PlyData(elements, text=text).write(buffer)
    return buffer.getvalue()


def las(places: np.ndarray, colors: np.ndarray | None, form: str = "las") -> bytes:
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=2 if colors is not None else 0, version="1.2")
    header.scales, header.offsets = np.full(3, 1e-4), np.floor(places.min(axis=0))
    file = laspy.LasData(header)
    file.x, file.y, file.z = places.T
    if colors is not None:
        file.red, file.green, file.blue = colors.T
    buffer = io.BytesIO()
    file.write(buffer, do_compress=form == "laz")
    return buffer.getvalue()


def pcd(form: str) -> bytes:
    """Written by hand, as the format's page has it; packed as its codec packs what does not repeat."""
    bits = (COLORS[:, 0].astype(np.uint32) << 16) | (COLORS[:, 1].astype(np.uint32) << 8) | COLORS[:, 2]
    rows = np.empty(50, dtype=[("x", "f4"), ("y", "f4"), ("z", "f4"), ("rgb", "u4")])
    for column, axis in enumerate("xyz"):
        rows[axis] = PLACES[:, column]
    rows["rgb"] = bits
    kind = "U" if form == "ascii" else "F"  # a float's bits, which text does not keep
    header = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\n"
        f"TYPE F F F {kind}\nCOUNT 1 1 1 1\nWIDTH 50\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 50\nDATA {form}\n"
    ).encode()
    if form == "ascii":
        return header + "".join(f"{x!s}  {y!s} {z!s}\t{color}\n" for x, y, z, color in rows.tolist()).encode()
    if form == "binary":
        return header + rows.tobytes()
    plain = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in ("x", "y", "z", "rgb"))
    # LZF without a repetition: 32 bytes at a time, behind their number less one
    packed = b"".join(bytes([len(plain[at : at + 32]) - 1]) + plain[at : at + 32] for at in range(0, len(plain), 32))
    return header + struct.pack("<II", len(packed), len(plain)) + packed


def test_points_of_every_format_are_the_points_that_were_written(tmp_path: Path) -> None:
    exact = {
        "binary.ply": ply(), "text.ply": ply(text=True), "mesh.ply": ply(faces=True), "cloud.npy": npy(CLOUD),
        **{f"{form}.pcd": pcd(form) for form in ("ascii", "binary", "binary_compressed")},
    }  # fmt: skip
    for name, content in exact.items():
        (tmp_path / name).write_bytes(content)
        for ref in (PointsRef.from_path(tmp_path / name), PointsRef.from_bytes(content)):
            loaded = ref.load()
            assert loaded.dtype == np.float32
            np.testing.assert_allclose(loaded, CLOUD, atol=1e-6, err_msg=name)
    for form in ("las", "laz"):
        loaded = PointsRef.from_bytes(las(PLACES, COLORS.astype(np.uint16) * 257, form)).load()
        np.testing.assert_allclose(loaded, CLOUD, atol=6e-5)  # the file's own step
        # many programs write 8 bits where 16 are
        np.testing.assert_allclose(PointsRef.from_bytes(las(PLACES, COLORS, form)).load(), CLOUD, atol=6e-5)
    shouted = re.sub(rb"(property \S+ )(\w+)", lambda found: found[1] + found[2].upper(), ply())
    np.testing.assert_allclose(PointsRef.from_bytes(shouted).load(), CLOUD, atol=1e-6)
    gray = PointsRef.from_bytes(ply(colors=None)).load()
    assert (gray[:, 3:] == points.GRAY).all()
    lost = re.sub(rb"\t\d+\n", b"\t0\n", pcd("ascii"))
    assert (PointsRef.from_bytes(lost).load()[:, 3:] == points.GRAY).all()
    np.testing.assert_allclose(PointsRef.from_bytes(las(PLACES, None)).load()[:, :3], PLACES, atol=6e-5)


def test_places_far_from_the_origin_stay_apart() -> None:
    """Surveys count from far away, where float32 has steps of a quarter of a meter."""
    far = PLACES.astype(np.float64) + np.array([500_000, 4_500_000, 100])
    near = PointsRef.from_bytes(las(far, None)).load()[:, :3]
    np.testing.assert_allclose(near - near[0], PLACES - PLACES[0], atol=2e-4)


def test_gaussian_splats_have_the_colors_of_their_constant_term() -> None:
    content = ply(colors=(COLORS / 255.0 - 0.5).astype("f4") / np.float32(0.28209479177387814))
    for place, name in enumerate((b"red", b"green", b"blue")):
        content = content.replace(b"property float " + name, b"property float f_dc_%d" % place)
    np.testing.assert_allclose(PointsRef.from_bytes(content).load()[:, 3:], COLORS / 255.0, atol=1e-6)


def test_axes_and_gaps_of_points() -> None:
    turned = PointsRef.from_bytes(npy(CLOUD), axes="xz-y").load()
    np.testing.assert_allclose(turned[:, :3], np.stack([PLACES[:, 0], -PLACES[:, 2], PLACES[:, 1]], 1), atol=1e-6)
    gaps = CLOUD.copy()
    gaps[::2, 1] = np.nan
    np.testing.assert_allclose(PointsRef.from_bytes(npy(gaps)).load(), CLOUD[1::2], atol=1e-6)
    assert PointsRef.from_bytes(npy(CLOUD)).fingerprint() != PointsRef.from_bytes(npy(CLOUD), axes="xzy").fingerprint()


def test_points_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(content: bytes, *words: str, **options) -> None:
        refuses(PointsRef.from_bytes(content, name="a.x", **options), "a.x", *words, error=PointsError)

    told(b"", "empty")
    told(b"hello", "no format", "PLY")
    told(npy(CLOUD.T), "(6, 50)", "array.T")
    told(npy(CLOUD[:, :4]), "(50, 4)")
    told(npy(CLOUD[:0]), "no values")
    told(npy(np.full((3, 3), np.nan)), "NaN")
    told(npy(CLOUD), "next to nothing of 255", "colors: 1", colors=255)
    told(npy(np.array([[1, 2, None]])), "Python objects")
    told(npy(CLOUD)[:300], "truncated")
    told(ply()[:-5], "truncated or corrupt PLY")
    told(ply().replace(b"property float y", b"property float v"), "no 'y'")
    told(ply()[:40], "header does not end")
    told(pcd("binary")[:-20], "truncated: 48 of 50")
    told(pcd("ascii")[:-200], "truncated")
    told(pcd("binary_compressed")[:-20], "PCD")
    told(las(PLACES, COLORS)[:-40], "LAS")
    told(ply(colors=COLORS.astype(np.float32)), "full", "colors: 255")
    told(ply(colors=COLORS.astype(np.int32)), "full brightness is open")
    colored = PointsRef.from_bytes(ply(colors=COLORS.astype(np.float32)), colors=255).load()
    np.testing.assert_allclose(colored, CLOUD, atol=1e-6)
    for wrong in ({"axes": "xyy"}, {"axes": 3}, {"colors": 7}):
        with pytest.raises(PointsError, match=next(iter(wrong))):
            PointsRef.from_bytes(b"", **wrong)
    # large files: every k-th point of a binary one; text is refused
    monkeypatch.setattr(points, "MOST_POINTS", 20)
    for name, content in {"a.ply": ply(), "a.pcd": pcd("binary"), "a.npy": npy(CLOUD)}.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_allclose(PointsRef.from_path(tmp_path / name).load(), CLOUD[::3], atol=1e-6)
    np.testing.assert_allclose(PointsRef.from_bytes(las(PLACES, COLORS)).load(), CLOUD[::3], atol=6e-5)
    told(ply(text=True), "50 points as text", "binary")
    told(pcd("binary_compressed"), "50 points")


# -- depth ------------------------------------------------------------------------------------------------------------


def exr(channels: dict[str, np.ndarray]) -> bytes:
    openexr = pytest.importorskip("OpenEXR")
    import tempfile

    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
    with tempfile.TemporaryDirectory() as folder:
        with openexr.File(header, {k: np.ascontiguousarray(v) for k, v in channels.items()}) as file:
            file.write(f"{folder}/a.exr")
        return Path(folder, "a.exr").read_bytes()


def test_depth_of_every_format_is_in_meters(tmp_path: Path) -> None:
    millimeters = np.rint(DEPTH * 1000).astype(np.uint16)
    for content, options, step in (
        (picture(millimeters), {"unit": "mm"}, 1e-3),
        (picture(np.rint(DEPTH * 5000).astype(np.uint16)), {"scale": 0.0002}, 2e-4),
        (picture(millimeters, "TIFF"), {"unit": "mm"}, 1e-3),
        (picture(DEPTH, "TIFF"), {}, 0),
        (npy(DEPTH), {}, 0),
        (npy(DEPTH * 100), {"unit": "cm"}, 0),
        (npy(millimeters.astype(np.int32)), {"unit": "mm"}, 1e-3),
        (exr({"Z": DEPTH}), {}, 0),
        (exr({"V": DEPTH}), {}, 0),
        (exr({"depth.Z": DEPTH, "A": DEPTH * 0}), {}, 0),
        (exr({"far": DEPTH, "A": DEPTH * 0}), {"channel": "far"}, 0),
    ):
        (tmp_path / "map").write_bytes(content)
        for ref in (DepthRef.from_bytes(content, **options), DepthRef.from_path(tmp_path / "map", **options)):
            loaded = ref.load()
            assert (loaded.dtype, loaded.shape) == (np.float32, (6, 8))
            np.testing.assert_allclose(loaded, DEPTH, atol=step / 2 + 1e-6)


def test_an_exr_is_as_large_as_its_view(tmp_path: Path) -> None:
    """Renderers store the part in which something is to be seen; a picture of the same view is whole."""
    library = pytest.importorskip("OpenEXR")
    meters = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    windows = {
        "dataWindow": (np.array([-1, 2], np.int32), np.array([4, 5], np.int32)),
        "displayWindow": (np.array([0, 0], np.int32), np.array([7, 7], np.int32)),
    }
    with library.File(
        {"compression": library.ZIP_COMPRESSION, "type": library.scanlineimage, **windows}, {"Z": meters}
    ) as f:
        f.write(str(tmp_path / "part.exr"))
    read = DepthRef.from_path(tmp_path / "part.exr").load()
    wanted = np.zeros((8, 8))
    wanted[2:6, :5] = meters[:, 1:]
    np.testing.assert_array_equal(read, wanted)


def test_depth_that_is_unknown_is_0() -> None:
    holes = DEPTH.copy()
    holes[0, 0], holes[0, 1], holes[0, 2], holes[0, 3] = np.nan, np.inf, 0, -1
    loaded = DepthRef.from_bytes(npy(holes), unknown=-1).load()
    assert (loaded[0, :4] == 0).all()
    np.testing.assert_array_equal(loaded[1:], DEPTH[1:])
    far = DEPTH.copy()
    far[2, 2] = 1e10  # what a renderer writes for the sky
    assert DepthRef.from_bytes(npy(far), unknown=1e10).load()[2, 2] == 0


def test_depth_that_cannot_be_used_is_named() -> None:
    def told(content: bytes, *words: str, **options) -> None:
        refuses(DepthRef.from_bytes(content, name="d.x", **options), "d.x", *words, error=DepthError)

    gray = picture(np.rint(DEPTH * 1000).astype(np.uint16))
    told(gray, "without a unit", "unit: mm")
    told(npy(DEPTH * 1000), "more than 1,000", "unit: mm")
    told(npy(-DEPTH), "nearer than 0", "unknown: -1")
    told(npy(DEPTH * np.nan), "no depth anywhere")
    told(npy(DEPTH[None]), "(1, 6, 8)", "array[0]")
    told(npy(np.stack([DEPTH] * 3, -1)), "(6, 8, 3)")
    told(picture(np.zeros((4, 4, 3), np.uint8)), "colored picture", unit="mm")
    told(picture(np.zeros((4, 4), np.uint8), "JPEG"), "loss", unit="mm")
    told(picture(np.zeros((4, 4, 2), np.uint8)), "mode LA", unit="mm")
    told(gray[:-30], "truncated", unit="mm")
    told(gray, "48 pixels", "limit of 40", unit="mm", max_pixels=40)
    told(npy(DEPTH), "48 pixels", max_pixels=40)
    told(exr({"Z": DEPTH}), "48 pixels", max_pixels=40)
    told(exr({"Z": DEPTH})[:-40], "EXR")
    told(exr({"R": DEPTH, "G": DEPTH}), "channels G, R", "channel: NAME")
    told(npy(DEPTH), "no EXR", channel="Z")
    told(b"", "empty")
    for wrong in ({"unit": "feet"}, {"scale": -1}, {"scale": True}, {"unknown": "x"}, {"unit": "mm", "scale": 1}):
        with pytest.raises(DepthError, match=next(iter(wrong))):
            DepthRef.from_bytes(b"", **wrong)


# -- normals ----------------------------------------------------------------------------------------------------------


def vectors() -> np.ndarray:
    made = RNG.normal(size=(6, 8, 3))
    made[..., 2] = np.abs(made[..., 2]) + 0.2
    return (made / np.linalg.norm(made, axis=-1, keepdims=True)).astype(np.float32)


def test_normals_of_every_format_are_unit_vectors() -> None:
    unit = vectors()
    unit[0, 0] = 0  # unknown
    eight = np.rint((unit + 1) * 127.5).astype(np.uint8)
    for content, tolerance in (
        (npy(unit), 1e-6),
        (npy((eight.astype(np.uint16)) * 257), 0.012),
        (picture(eight), 0.012),
        (exr({axis: unit[..., place] for place, axis in enumerate("XYZ")}), 1e-6),
        (exr({f"normal.{axis}": unit[..., place] for place, axis in enumerate("RGB")}), 1e-6),
    ):
        loaded = NormalsRef.from_bytes(content).load()
        np.testing.assert_allclose(loaded, unit, atol=tolerance)
        lengths = np.linalg.norm(loaded, axis=-1)
        np.testing.assert_allclose(lengths.reshape(-1)[1:], 1, atol=1e-6)
        assert lengths[0, 0] == 0
    down = NormalsRef.from_bytes(npy(unit), axes="x-yz").load()
    np.testing.assert_allclose(down, unit * [1, -1, 1], atol=1e-6)
    seen = np.concatenate([eight, np.full((6, 8, 1), 255, np.uint8)], axis=-1)
    seen[1, 1], eight[2, 2] = (9, 9, 9, 0), 0  # transparent; black
    assert not NormalsRef.from_bytes(picture(seen)).load()[1, 1].any()
    assert not NormalsRef.from_bytes(picture(eight)).load()[2, 2].any()


def test_normals_that_cannot_be_used_are_named() -> None:
    def told(content: bytes, *words: str, **options) -> None:
        refuses(NormalsRef.from_bytes(content, name="n.x", **options), "n.x", *words, error=NormalsError)

    unit = vectors()
    told(npy(np.moveaxis(unit, -1, 0)), "(3, 6, 8)", "moveaxis")
    told(npy((unit + 1) / 2), "not of length 1", "array * 2 - 1")
    told(npy(unit * 3), "not of length 1", "unit vectors")
    told(npy(unit * np.nan), "no normal anywhere")
    told(picture(np.zeros((4, 4), np.uint8)), "one value a pixel")
    told(exr({"Z": unit[..., 2]}), "channels Z", "X, Y and Z")
    told(npy(np.full((4, 4, 3), -7, np.int32)), "int32")
    told(npy(unit), "limit of 40", max_pixels=40)


# -- motion -----------------------------------------------------------------------------------------------------------

SENSED = np.concatenate([RNG.normal(size=(200, 3)) + np.array([0, 9.8, 0]), RNG.normal(size=(200, 3))], axis=1)
UNITS = {"acceleration": "m/s^2", "rotation": "rad/s"}


def table(values: np.ndarray, names: str, times: np.ndarray | None = None, divider: str = ",") -> bytes:
    columns = values if times is None else np.concatenate([times[:, None], values], axis=1)
    lines = [divider.join(names.split()), *(divider.join(map(repr, row)) for row in columns.tolist())]
    return "\n".join(lines).encode()


ROS = " ".join(f"#{sensor}.{axis}" for sensor in ("linear_acceleration", "angular_velocity") for axis in "xyz")
PHYPHOX = "Time~(s) " + " ".join(
    f"{sensor}~{axis}~({unit})"
    for sensor, unit in (("Acceleration", "m/s^2"), ("Gyroscope", "rad/s"))
    for axis in "xyz"
)


def test_motion_in_any_unit_is_in_ours() -> None:
    times = np.arange(200) / 100
    both = np.repeat([9.80665, np.pi / 180], 3)
    for content, options in (
        (npy(SENSED), {"rate": 100, **UNITS}),
        (npy(SENSED / both), {"rate": 100, "acceleration": "g", "rotation": "deg/s"}),
        (table(SENSED, "t ax ay az gx gy gz", times), UNITS),
        (table(SENSED, "Timestamp_ms acc_x acc_y acc_z gyro_x gyro_y gyro_z", times * 1000, ";"), UNITS),
        (table(SENSED / both, "time[ns] ax[g] ay[g] az[g] wx[deg/sec] wy[deg/sec] wz[deg/sec]", times * 1e9), {}),
        (table(SENSED, "accel_x accel_y accel_z gyr_x gyr_y gyr_z"), {"rate": 100, **UNITS}),
        (table(SENSED[:, [3, 4, 5, 0, 1, 2]], "gx gy gz ax ay az"), {"rate": 100, **UNITS}),
        (table(SENSED, f"%time {ROS.replace('#', 'field.')}", times * 1e9), {}),
        (table(SENSED, f"__time {ROS.replace('#', '/imu/').replace('.', '/')}", times), {}),
        (table(SENSED, PHYPHOX, times, "\t").replace(b"~", b" "), {}),
        (table(SENSED, "t ax ay az gx gy gz", times * 1e6 + 1.7e15), {"time": "us", **UNITS}),
    ):
        ref = MotionRef.from_bytes(content, **options)
        np.testing.assert_allclose(ref.load(), SENSED, atol=2e-5)
        assert len(ref.load(100)) == 200
    turned = MotionRef.from_bytes(npy(SENSED), rate=100, axes="y-xz", **UNITS).load()
    np.testing.assert_allclose(turned, SENSED[:, [1, 0, 2, 4, 3, 5]] * [-1, 1, 1, -1, 1, 1], atol=1e-6)


def test_a_mirror_turns_rotations_round() -> None:
    """What turns to the left is seen in a mirror to turn to the right: angular rates are no arrows."""
    ref = MotionRef.from_bytes(npy(SENSED), rate=100, axes="-xyz", **UNITS)
    np.testing.assert_allclose(ref.load(), SENSED * [-1, 1, 1, 1, -1, -1], rtol=1e-6)


def test_motion_at_another_rate_keeps_what_is_slow() -> None:
    """A slow swing and gravity are the same at any rate, up to the ends; a fast one folds into nothing."""
    time = np.arange(400) / 100

    def swing(at: np.ndarray) -> np.ndarray:
        return np.stack([np.sin(2 * np.pi * at), 9.8 + 0 * at, at, np.cos(2 * np.pi * at), 0 * at, 0 * at + 2], 1)

    ref = MotionRef.from_bytes(npy(swing(time)), rate=100, **UNITS)
    for rate in (200, 50, 62.5):
        made = ref.load(rate)
        assert len(made) == round(4 * rate)
        np.testing.assert_allclose(made, swing(np.arange(len(made)) / rate), atol=0.03)
    uneven = time + RNG.uniform(0, 0.004, 400)
    jittered = MotionRef.from_bytes(table(swing(uneven), "t ax ay az gx gy gz", uneven), **UNITS).load(200)
    wanted = swing(uneven[0] + np.arange(len(jittered)) / 200)
    np.testing.assert_allclose(jittered[20:-20], wanted[20:-20], atol=0.06)
    assert np.abs(jittered - wanted).max() < 0.3
    fast = np.zeros((400, 6))
    fast[:, 0] = np.sin(2 * np.pi * 45 * time)
    assert np.abs(MotionRef.from_bytes(npy(fast), rate=100, **UNITS).load(50)[20:-20]).max() < 0.05
    still = np.tile([0, 0, 9.8, 0, 0, 0], (100, 1))
    for samples in (100, 1):  # gravity is no tone, and one sample is not nothing
        made = MotionRef.from_bytes(npy(still[:samples]), rate=100, **UNITS).load(200)
        np.testing.assert_allclose(made, np.tile(still[:1], (2 * samples, 1)), atol=1e-5)


def test_a_stretch_and_few_gaps_of_motion(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", SENSED)
    ref = MotionRef.from_path(tmp_path / "long.npy", rate=100, start=0.5, seconds=1, **UNITS)
    np.testing.assert_allclose(ref.load(), SENSED[50:150], atol=1e-6)
    gaps = SENSED.copy()
    gaps[10:14, 2] = np.nan
    filled = MotionRef.from_bytes(npy(gaps), rate=100, **UNITS).load()
    np.testing.assert_allclose(filled[9:15, 2], np.linspace(SENSED[9, 2], SENSED[14, 2], 6), atol=1e-5)
    np.testing.assert_allclose(np.delete(filled, range(10, 14), 0), np.delete(SENSED, range(10, 14), 0), atol=1e-6)


def test_motion_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(content: bytes, *words: str, **options) -> None:
        refuses(MotionRef.from_bytes(content, name="m.x", **options), "m.x", *words, error=MotionError)

    times, names = np.arange(200) / 100, "t ax ay az gx gy gz"
    whole = {"rate": 100, **UNITS}
    told(b"", "empty")
    silent = np.tile(SENSED, (20, 1))
    silent[300:420] = np.nan  # few of all, but more than a second at once
    told(npy(silent), "1.2 seconds behind sample 300", **whole)
    told(npy(SENSED), "rate: 200", **UNITS)
    told(npy(SENSED), "in which unit acceleration is", "g", rate=100, rotation="rad/s")
    told(table(SENSED, names, times), "in which unit rotation is", acceleration="g")
    told(npy(SENSED.T), "(6, 200)", "array.T", **whole)
    told(npy(SENSED[:, :3]), "(200, 3)", **whole)
    told(table(SENSED, names, times * 1000), "by its times", "time: ms", **UNITS)
    told(table(SENSED, names, times), "rate: 50 is given", rate=50, **UNITS)
    told(table(SENSED, names, times[::-1]), "sample 2", "not after", **UNITS)
    told(table(SENSED, names, times + (times > 1) * 3), "no sample for 3", **UNITS)
    told(table(SENSED, "t ax ay az gx gy q", times), "rotation along z", "'q'", **UNITS)
    told(table(SENSED, names, times).replace(b"t,ax", b"0,1"), "no column of acceleration along x", **UNITS)
    told(table(SENSED, names, times) + b"\n1,2,3", "3 values for 7 columns", **UNITS)
    told(table(SENSED, names, times) + b"\n3,a,1,1,1,1,1", "neither CSV nor NPY", **UNITS)
    told(table(SENSED[:0], names, times[:0]), "no samples", **UNITS)
    told(table(SENSED, "t ax[g] ay[g] az[g] gx gy gz", times), "in g", **UNITS)
    told(npy(np.where(RNG.random(SENSED.shape) < 0.1, np.nan, SENSED)), "NaN", **whole)
    told(npy(SENSED * 200), "rotation of", "deg/s", **whole)
    told(npy(SENSED * [2000, 2000, 2000, 1, 1, 1]), "acceleration of", **whole)
    told(npy(SENSED), "lasts 2.00 seconds", start=1, seconds=2, **whole)
    monkeypatch.setattr(motion, "MOST_SAMPLES", 100)
    told(npy(SENSED), "200 samples", "start: 0", **whole)
    told(table(SENSED, names, times), "more than 100 samples", "NPY", **UNITS)
    for wrong in ({"rate": 0}, {"rate": 1e6}, {"acceleration": "ft"}, {"time": "h"}, {"seconds": -1}):
        with pytest.raises(MotionError, match=next(iter(wrong))):
            MotionRef.from_bytes(b"", **wrong)


# -- responses --------------------------------------------------------------------------------------------------------


def nifti(array: np.ndarray, *, shift: float = 0, second: bool = False) -> bytes:
    nibabel = pytest.importorskip("nibabel")
    affine = np.eye(4)
    affine[0, 3] = shift
    return (nibabel.Nifti2Image if second else nibabel.Nifti1Image)(array.astype(np.float32), affine).to_bytes()


def test_responses_of_every_format(tmp_path: Path) -> None:
    volume = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    mask = RNG.random((3, 4, 5)) < 0.5
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(nifti(mask)))
    np.save(tmp_path / "mask.npy", mask)
    for content in (nifti(volume), gzip.compress(nifti(volume)), nifti(volume, second=True), npy(volume)):
        np.testing.assert_array_equal(ResponseRef.from_bytes(content).load(), volume.reshape(-1))
        for name in ("mask.nii.gz", "mask.npy"):
            kept = ResponseRef.from_bytes(content, mask=str(tmp_path / name)).load()
            np.testing.assert_array_equal(kept, volume[mask])
    repeats = RNG.normal(size=(3, 4, 5, 2)).astype(np.float32)
    made = ResponseRef.from_bytes(nifti(repeats), mask=str(tmp_path / "mask.npy"), repeats="mean").load()
    np.testing.assert_allclose(made, repeats.mean(-1)[mask], atol=1e-6)
    for single in (volume, volume[..., None]):  # the mean of a session with one repeat is that repeat
        made = ResponseRef.from_bytes(nifti(single), mask=str(tmp_path / "mask.npy"), repeats="mean").load()
        np.testing.assert_array_equal(made, volume[mask])
    rows = RNG.normal(size=(3, 20))
    np.testing.assert_allclose(ResponseRef.from_bytes(npy(rows), repeats="mean").load(), rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(ResponseRef.from_bytes(npy(rows[0])).load(), rows[0], atol=1e-6)


def test_responses_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(content: bytes, *words: str, **options) -> None:
        refuses(ResponseRef.from_bytes(content, name="r.x", **options), "r.x", *words, error=ResponseError)

    volume = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "mask.npy", np.ones((4, 3, 5)))
    np.save(tmp_path / "none.npy", np.zeros((3, 4, 5)))
    (tmp_path / "moved.nii").write_bytes(nifti(np.ones((3, 4, 5)), shift=2))
    told(b"", "empty")
    told(b"hello there", "no format")
    told(nifti(volume)[:-50], "NIfTI")
    told(gzip.compress(nifti(volume))[:-50], "NIfTI")
    told(npy(np.ones((3, 20))), "(3, 20)", "repeats: mean")
    told(nifti(np.ones((3, 4, 5, 2))), "series of 2", "repeats: mean")
    for grayordinates in (np.ones((1, 1, 1, 1, 3, 50)), np.ones((1, 1, 1, 1, 1, 50))):  # as CIFTI is kept
        told(nifti(grayordinates), "neither a volume nor a series", "NPY", repeats="mean")
    told(npy(np.ones(20)), "without repeats", repeats="mean")
    told(npy(np.array([1, np.nan, np.inf])), "2 of 3 voxels", "mask")
    told(nifti(volume), "(4, 3, 5)", "(3, 4, 5)", mask=str(tmp_path / "mask.npy"))
    told(nifti(volume), "keeps no voxel", mask=str(tmp_path / "none.npy"))
    told(nifti(volume), "affine", mask=str(tmp_path / "moved.nii"))
    told(nifti(volume), "missing", mask=str(tmp_path / "not.npy"))
    monkeypatch.setattr(response, "MOST_VOXELS", 50)
    told(nifti(volume), "60 voxels", "mask")
    monkeypatch.setattr(response, "MOST_VALUES", 50)
    told(nifti(volume), "more than 50")


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "cloud.npy", CLOUD)
    (tmp_path / "room.png").write_bytes(picture(np.rint(DEPTH * 1000).astype(np.uint16)))
    (tmp_path / "room.jpg").write_bytes(picture(np.zeros((6, 8, 3), np.uint8), "JPEG"))
    (tmp_path / "side.jpg").write_bytes(picture(np.zeros((8, 6, 3), np.uint8), "JPEG"))
    np.save(tmp_path / "walk.npy", SENSED)
    np.save(tmp_path / "brain.npy", np.arange(6.0).reshape(1, 2, 3))
    np.save(tmp_path / "mask.npy", np.arange(6).reshape(1, 2, 3) % 2)
    return tmp_path


def written(folder: Path, *records: dict) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def asked(*content: dict, **more) -> dict:
    said = {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}
    return {"messages": [said, {"role": "assistant", "content": "a"}], **more}


def test_parts_and_lists_name_their_media_and_how_they_are_read(folder: Path) -> None:
    walk = {"rate": 100, "acceleration": "m/s^2", "rotation": "rad/s"}
    path = written(
        folder,
        asked(
            {"type": "points", "points": "cloud.npy", "axes": "xzy"},
            {"type": "depth", "depth": "room.png", "unit": "mm", "image": "room.jpg"},
            {"type": "motion", "path": "walk.npy", **walk},
            {"type": "response", "response": "brain.npy", "mask": "mask.npy"},
        ),
        asked(
            {"type": "depth"},
            {"type": "motion", **walk},
            depth={"path": "room.png", "unit": "mm"},
            motions=["walk.npy"],
            points=5,  # a score, not a cloud
        ),
    )
    source = open_file(path)
    (cloud, room, moved, brain), parts = source[0].media(), source[0].messages[0]["content"]
    np.testing.assert_allclose(cloud.load()[:, :3], PLACES[:, [0, 2, 1]], atol=1e-6)
    np.testing.assert_allclose(room.load(), DEPTH, atol=6e-4)
    assert parts[1]["image"].load().size == (8, 6)
    assert moved.load(50).shape == (100, 6)
    assert brain.load().tolist() == [1, 3, 5]
    assert [ref.load().shape for ref in source[1].media()] == [(6, 8), (200, 6)]
    assert source[1].meta["points"] == 5
    report = check(path)
    assert report.ok
    told = json.loads(json.dumps(report.as_dict()))
    assert told["others"] == {"points": 1, "depth": 2, "motion": 2, "response": 1}
    assert told["said"]["depth"] == {"unit: mm": 2}
    np.testing.assert_allclose(told["extents"]["depth"], (DEPTH[DEPTH > 0].min(), DEPTH.max()), atol=6e-4)
    assert told["extents"]["response"] == [1, 5]
    assert (report.images, report.placeholders) == (0, 6)


def test_a_check_names_line_medium_and_remedy(folder: Path) -> None:
    path = written(
        folder,
        asked({"type": "depth", "depth": "room.png"}),
        asked({"type": "depth", "depth": "room.png", "unit": "mm", "image": "side.jpg"}),
        asked({"type": "depth", "depth": "room.png", "unit": "mm", "image": "not.jpg"}),
        asked({"type": "depth", "depth": "room.png", "fov": 60}),
        asked({"type": "points", "points": "gone.ply"}),
        asked({"type": "motion"}),
    )
    report = check(path)
    assert [(bad.line, bad.kind) for bad in report.bad] == [
        (1, "depth"), (2, "depth"), (3, "image"), (4, "record"), (5, "points"), (6, "placeholders"),
    ]  # fmt: skip
    for bad, words in zip(
        report.bad, ("unit: mm", "on its side", "missing", "'fov'", "missing", "motion"), strict=True
    ):
        assert words in bad.reason
    # said once for all: what records leave open
    assert [bad.line for bad in check(path, reading={"depth": {"unit": "mm"}}).bad] == [2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="no such option"):
        check(path, reading={"depth": {"rate": 1}})
    with pytest.raises(RecipeError, match="reading"):  # conversations hold images alone
        open_source({"llava": str(path), "reading": {"depth": {"unit": "mm"}}})
    with pytest.raises(RecipeError, match="unit of depth"):
        open_source({"jsonl": str(path), "reading": {"depth": {"unit": "feet"}}})


def test_the_command_is_told_what_records_leave_open(folder: Path) -> None:
    path, app = written(folder, asked({"type": "depth", "depth": "room.png"})), typer.Typer()
    data_commands.register(app)

    def ran(*options: str) -> Any:
        return CliRunner().invoke(app, ["data", "check", str(path), "--workers", "0", *options])

    assert "without a unit" in ran().output
    assert "depth maps" in (good := ran("--reading", "depth.unit=mm")).output
    assert good.exit_code == 0
    assert ran("--reading", "depth.scale=0.001").exit_code == 0
    for wrong in (["depth.unit"], ["depth.unit=feet"], ["depth.unit=mm", "depth.unit=cm"]):
        refused = ran(*(word for pair in wrong for word in ("--reading", pair)))
        assert isinstance(refused.exception, UsageError)


def test_models_and_replay_refuse_them_by_name(folder: Path, processor: LlavaProcessor) -> None:
    """A host that reads no points says so, and words that are to be words alone hold none."""
    source = open_file(written(folder, asked({"type": "points", "points": "cloud.npy"})))
    with pytest.raises(RecordError, match="holds a point cloud, which the model does not take"):
        Collator(processor)([source[0]])
    replay = {"ratio": 0.5, "sources": [{"jsonl": str(folder / "data.jsonl")}]}
    mixture = open_mixture({"sources": [{"jsonl": str(folder / "data.jsonl")}], "text_replay": replay})
    with pytest.raises(RecordError, match="replay sample holds a point cloud"):
        [mixture[place] for place in range(4)]


def test_pairs_folders_and_shards_hold_them(folder: Path) -> None:
    pairs = written(
        folder,
        {"points": "cloud.npy", "text": "a cloud"},
        {"depth": "room.png", "question": "How far?", "answer": "4"},
        {"prompt": "Say it.", "response": "yes"},
    )
    source = open_source({"jsonl": str(pairs), "reading": {"depth": {"unit": "mm"}}})
    assert [[part["type"] for part in source[n].messages[0]["content"]] for n in range(3)] == [
        ["points"], ["depth", "text"], ["text"],
    ]  # fmt: skip
    np.testing.assert_allclose(source[1].media()[0].load(), DEPTH, atol=6e-4)
    split = folder / "set" / "train"
    split.mkdir(parents=True)
    np.save(split / "c.npy", CLOUD)
    (split / "metadata.jsonl").write_text(json.dumps({"points": "c.npy", "caption": "a cloud"}) + "\n")
    assert open_source({"dataset": str(folder / "set")})[0].media()[0].load().shape == (50, 6)
    members = {
        "0.depth.png": picture(np.rint(DEPTH * 1000).astype(np.uint16)), "0.txt": b"a room",
        "1.ply": ply(), "1.motion.npy": npy(SENSED), "1.txt": b"a walk",
    }  # fmt: skip
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    reading = {"depth": {"unit": "mm"}, "motion": {"rate": 100, **UNITS}}
    shard = open_file(folder / "a.tar", reading=reading)
    np.testing.assert_allclose(shard[0].media()[0].load(), DEPTH, atol=6e-4)
    assert [ref.load().shape for ref in shard[1].media()] == [(50, 6), (200, 6)]
