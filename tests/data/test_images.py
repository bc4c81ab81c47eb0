"""Every kind of picture has one defined outcome, and decoding leaves Pillow's globals alone."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from alula.data import ImageError, ImageRef
from alula.data.jpeg import whole_pixels
from alula_fledgling.microworld import source

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = ImageRef.from_bytes(data).load()
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return rgb * a + 255 * (1 - a)


def test_rgb_is_taken_as_it_is() -> None:
    assert np.array_equal(decoded(encoded(Image.fromarray(PIXELS))), PIXELS)


def test_grey_and_one_bit() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(decoded(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert np.array_equal(decoded(encoded(bits))[..., 1], np.where(np.asarray(bits), 255, 0))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 128, 129, 257, 4096, 32767, 65534, 65535]], dtype=np.uint16)
    got = decoded(encoded(Image.fromarray(values), form))
    assert np.array_equal(got[..., 0], np.rint(values / 65535 * 255).astype(np.uint8))
    assert np.array_equal(got[..., 0], got[..., 2])


def test_big_endian_16_bit() -> None:
    values = np.array([[0, 1000, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert np.asarray(ImageRef.from_object(image).load())[0, :, 0].tolist() == [0, 4, 255]


def test_16_bit_colour_png_keeps_the_high_byte() -> None:
    wide = PIXELS.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decoded(png), PIXELS)


def test_32_bit_integers_only_within_16_bits() -> None:
    good = np.array([[0, 257 * 7, 65535]], dtype=np.int32)
    assert decoded(encoded(Image.fromarray(good), "TIFF"))[0, :, 0].tolist() == [0, 7, 255]
    for bad in ([[0, 70000]], [[-1, 3]]):
        with pytest.raises(ImageError, match="no defined white level"):
            decoded(encoded(Image.fromarray(np.array(bad, dtype=np.int32)), "TIFF"))


def test_floating_point_is_refused_nan_or_not() -> None:
    for values in ([[0.0, 1.0]], [[float("nan"), 1.0]]):
        with pytest.raises(ImageError, match="floating point"):
            decoded(encoded(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF"))


def test_cmyk() -> None:
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    image = Image.frombytes("CMYK", (4, 1), ink.tobytes())
    want = 255 - np.minimum(255, ink[..., :3].astype(int) + ink[..., 3:])
    assert np.abs(decoded(encoded(image, "TIFF")).astype(int) - want).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decoded(encoded(flat, "JPEG", quality=95))[8, 8].astype(int) - (255, 0, 0)).max() <= 8


def test_palette_without_and_with_transparency() -> None:
    indexed = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    indexed.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert decoded(encoded(indexed)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    clear_one = encoded(indexed, transparency=1)
    assert decoded(clear_one).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    half = encoded(indexed, transparency=bytes([255, 255, 128]))
    assert np.abs(decoded(half)[0, 2].astype(int) - (127, 127, 255)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    alpha = np.linspace(0, 255, 54).reshape(6, 9).astype(np.uint8)
    rgb = PIXELS if mode == "RGBA" else np.repeat(PIXELS[..., :1], 3, 2)
    bands = np.dstack([rgb, alpha]) if mode == "RGBA" else np.dstack([rgb[..., 0], alpha])
    assert np.abs(decoded(encoded(Image.fromarray(bands, mode))) - on_white(rgb, alpha)).max() <= 1


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert decoded(encoded(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(form: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if form == "WEBP" else {}
    got = decoded(encoded(first, form, save_all=True, append_images=[second], **options))
    assert (got == (255, 0, 0)).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int, form: str) -> None:
    # the EXIF standard: which corner row 0 and column 0 of the stored pixels are at, as numpy moves
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    blocks = np.kron(np.array([[10, 90, 170], [60, 130, 250]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
    stored = np.repeat(blocks[..., None], 3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if form == "JPEG" else {}
    got = decoded(encoded(Image.fromarray(stored), form, exif=exif, **options))
    assert got.shape == upright(stored).shape
    assert np.abs(got.astype(int) - upright(stored)).max() <= (3 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_counts_as_upright() -> None:
    data = encoded(Image.fromarray(PIXELS), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(decoded(data), PIXELS)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_truncated_files_are_errors(form: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    with pytest.raises(ImageError, match=r"truncated|corrupt"):
        decoded(data[: int(len(data) * share)])


def test_a_missing_end_marker_costs_no_pixel() -> None:
    data = encoded(Image.fromarray(PIXELS))
    assert np.array_equal(decoded(data[:-12]), PIXELS)


def test_corrupt_empty_and_foreign_files(tmp_path) -> None:
    noise = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    flipped = bytearray(noise)
    flipped[len(noise) // 2] ^= 0xFF
    for data, reason in ((bytes(flipped), "corrupt"), (b"", "empty"), (b"not an image at all", "corrupt")):
        with pytest.raises(ImageError, match=reason):
            decoded(data)
    with pytest.raises(ImageError, match=r"'no\.png' is missing: no file .*a.no\.png nor .*b.no\.png"):
        ImageRef.from_path("no.png", roots=[tmp_path / "a", tmp_path / "b"]).load()
    with pytest.raises(ImageError):
        ImageRef.from_path(tmp_path).load()


def test_too_many_pixels_are_refused_before_decoding() -> None:
    # a bomb: a header of 12000 x 12000 with no pixels behind it, so an attempt to decode would say "truncated"
    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 5) + b"IDAT"
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="144,000,000 pixels"):
        decoded(bomb)
    small = encoded(Image.new("RGB", (10, 10)))
    assert ImageRef.from_bytes(small, max_pixels=100).load().size == (10, 10)
    with pytest.raises(ImageError, match="limit of 99"):
        ImageRef.from_bytes(small, max_pixels=99).load()


def test_beyond_pillows_own_limit() -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ImageError, match="too large"):
        decoded(bomb + struct.pack(">I", 5) + b"IDAT")


def test_pillows_globals_stay_as_they_are() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    test_too_many_pixels_are_refused_before_decoding()
    decoded(encoded(Image.fromarray(PIXELS)))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_references_load_the_same_after_pickling(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS)))
    scene = source("visual")[0].messages[0]["content"][0]["image"]
    for ref in (
        ImageRef.from_path(path),
        ImageRef.from_path("a.png", roots=[tmp_path / "nowhere", tmp_path]),
        ImageRef.from_bytes(path.read_bytes()),
        ImageRef.from_object(Image.fromarray(PIXELS)),
        ImageRef.from_object(scene),
    ):
        again = pickle.loads(pickle.dumps(ref))
        assert again.load().tobytes() == ref.load().tobytes()
        assert again.fingerprint() == ref.fingerprint()
        assert ImageRef.from_object(ref) is ref


def test_loading_leaves_no_file_open_and_does_not_alias(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(PIXELS)))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    images = [ImageRef.from_path(path).load() for _ in range(5)]
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
    assert len({id(image) for image in images}) == 5
    original = Image.fromarray(PIXELS)
    ImageRef.from_object(original).load().putpixel((0, 0), (0, 0, 0))
    assert np.array_equal(np.asarray(original), PIXELS)


def test_fingerprints_follow_content(tmp_path) -> None:
    one, two = encoded(Image.new("RGB", (4, 4), "red")), encoded(Image.new("RGB", (4, 4), "blue"))
    assert ImageRef.from_bytes(one).fingerprint() == ImageRef.from_bytes(one, name="other").fingerprint()
    assert ImageRef.from_bytes(one).fingerprint() != ImageRef.from_bytes(two).fingerprint()
    path = tmp_path / "a.png"
    path.write_bytes(one)
    before = ImageRef.from_path(path).fingerprint()
    assert ImageRef.from_path("a.png", roots=[tmp_path]).fingerprint() == before
    os.utime(path, ns=(1, 1))
    assert ImageRef.from_path(path).fingerprint() != before
    path.unlink()
    with pytest.raises(ImageError, match="missing"):
        ImageRef.from_path(path).fingerprint()
    scenes = [source("visual", seed=seed)[0].messages[0]["content"][0]["image"] for seed in (0, 0, 1)]
    prints = [ImageRef.from_object(scene).fingerprint() for scene in scenes]
    assert prints[0] == prints[1] != prints[2]


def test_what_is_no_image() -> None:
    with pytest.raises(ImageError, match="cannot be made from int"):
        ImageRef.from_object(3)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 50)])
def test_thin_images_survive(size: tuple[int, int]) -> None:
    assert ImageRef.from_bytes(encoded(Image.new("RGB", size))).load().size == size


@pytest.mark.parametrize("kind", ["texts", "one text", "profile"])
def test_notes_beyond_pillows_limits_are_no_damage(kind: str) -> None:
    """Editors write megabytes of history into XMP, cameras into profiles; the pixels are whole."""
    notes = PngInfo()
    if kind == "texts":
        for number in range(70):
            notes.add_text(f"k{number}", "x" * 1_000_000, zip=True)
    elif kind == "one text":
        notes.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    extra = {"icc_profile": bytes(3_000_000)} if kind == "profile" else {"pnginfo": notes}
    data = encoded(Image.fromarray(PIXELS), **extra)
    with pytest.raises(ValueError, match="MAX_TEXT"), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert np.array_equal(decoded(data), PIXELS)
    with pytest.raises(ImageError, match="truncated or corrupt"):
        decoded(data[:-40])


def test_a_tiff_of_several_pages_is_refused(tmp_path) -> None:
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    with pytest.raises(ImageError, match=r"'.*pages\.tif' has 2 pages") as caught:
        ImageRef.from_path(tmp_path / "pages.tif").load()
    assert "a file of its own" in caught.value.remedy
    # a thumbnail behind the picture is no page
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "thumb.tif", new=True) as writer:
        first.save(writer, "TIFF")
        writer.newFrame()
        second.resize((3, 2)).save(writer, "TIFF", tiffinfo={254: 1})
    with Image.open(tmp_path / "thumb.tif") as image:
        assert image.n_frames == 2
    assert np.array_equal(np.asarray(ImageRef.from_path(tmp_path / "thumb.tif").load()), PIXELS)


def _damaged(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """The file, cut off and with bytes changed, lost and put in."""
    yield data
    yield from (data[:length] for length in range(1, len(data), 29))
    for _ in range(150):
        at, changed = draw.randrange(len(data)), bytearray(data)
        match draw.randrange(3):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + draw.randrange(1, 40)]
            case _:
                changed[at:at] = draw.randbytes(draw.randrange(1, 9))
        yield bytes(changed)


def test_what_is_told_of_a_jpeg_without_decoding_is_what_decoding_tells() -> None:
    draw, told = random.Random(0), 0
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("RGB", {}),
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"restart_marker_blocks": 2}),
    ]
    for mode, options in kinds:
        stored = io.BytesIO()
        channels = [Image.frombytes("L", (40, 27), draw.randbytes(40 * 27)) for _ in Image.new(mode, (1, 1)).getbands()]
        Image.merge(mode, channels).save(stored, "JPEG", **options)
        for data in _damaged(stored.getvalue(), draw):
            pixels = whole_pixels(data)
            if pixels is not None:
                told += 1
                image = ImageRef.from_bytes(data).load()  # raises where it was told wrongly
                assert image.width * image.height == pixels
    assert told > 200


def test_progressive_jpegs_are_decoded_to_be_verified() -> None:
    stored = io.BytesIO()
    Image.new("RGB", (40, 27), "red").save(stored, "JPEG", progressive=True)
    assert whole_pixels(stored.getvalue()) is None
    ImageRef.from_bytes(stored.getvalue()).verify()
    with pytest.raises(ImageError, match="truncated"):
        ImageRef.from_bytes(stored.getvalue()[:-200]).verify()
    with pytest.raises(ImageError, match="more than the limit"):
        ImageRef.from_bytes(stored.getvalue(), max_pixels=100).verify()
