"""Films and sounds in files: decoded as they were written, and broken ones named."""

from __future__ import annotations

import io
import json
import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.signal import resample_poly

from alula.data import AudioError, AudioRef, ImageRef, VideoError, VideoRef, open_file, open_source
from alula.data.check import check
from alula_fledgling.export import export_microworld
from alula_fledgling.microworld import source


def colours(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), (40 * number, 255 - 40 * number, 7)) for number in range(count)]


def film_bytes(form: str, durations: list[int]) -> bytes:
    first, *others = colours(len(durations))
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(buffer, form, save_all=True, append_images=others, duration=durations, loop=0, **options)
    return buffer.getvalue()


def sound_bytes(samples: np.ndarray, width: int = 2, channels: int = 1, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def tone(seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate) * 32767).astype(np.int16)


def held_in(container: str, samples: np.ndarray, subtype: str | None = None, rate: int = 16000) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_frames_are_taken_evenly_over_time(form: str) -> None:
    frames = [np.asarray(frame) for frame in colours(4)]
    even = VideoRef.from_bytes(film_bytes(form, [100] * 4))
    assert np.array_equal(even.load(4), np.stack(frames))
    assert np.array_equal(even.load(8), np.stack(frames).repeat(2, axis=0))
    assert np.array_equal(even.load(2), np.stack([frames[1], frames[3]]))
    # the third frame is on the screen for most of the time
    slow = VideoRef.from_bytes(film_bytes(form, [100, 100, 700, 100]))
    assert np.array_equal(slow.load(5), np.stack([frames[i] for i in (1, 2, 2, 2, 3)]))


def test_the_default_picture_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    """What is shown where animation is not known, such as a title, is a picture and not of the film."""
    title, *frames = colours(4)
    title.save(tmp_path / "film.png", save_all=True, append_images=frames, default_image=True, duration=100)
    film = VideoRef.from_path(tmp_path / "film.png")
    assert np.array_equal(film.load(3), np.stack([np.asarray(frame) for frame in frames]))
    assert np.array_equal(np.asarray(ImageRef.from_path(tmp_path / "film.png").load()), np.asarray(title))


@pytest.mark.parametrize("stream", ["film", "sound"])
def test_exported_files_read_as_the_stream_itself(tmp_path: Path, stream: str) -> None:
    path = export_microworld(stream, tmp_path / "set", n=10, split="test", seed=1)
    files, items = open_file(path), open_source({"microworld": stream, "split": "test", "seed": 1})
    for number in range(10):
        ours, theirs = files[number].media()[0], items[number].media()[0]
        decoded = (ours.load(8), theirs.load(8)) if stream == "film" else (ours.load(), theirs.load())
        assert np.array_equal(*decoded)
        assert len(ours.fingerprint()) == 32
        assert ours.fingerprint() != theirs.fingerprint()
    report = check(path)
    assert report.ok
    assert (report.videos, report.audios) == ((10, 0) if stream == "film" else (0, 10))
    assert (report.images, report.text_only, report.placeholders) == (0, 0, 10)


@pytest.mark.parametrize(("width", "scale"), [(1, 128), (2, 2**15), (3, 2**23), (4, 2**31)])
def test_every_sample_width(width: int, scale: int) -> None:
    values = np.array([-scale, -scale // 2, 0, 1, scale // 2, scale - 1])
    if width == 3:
        raw = b"".join(int(value).to_bytes(3, "little", signed=True) for value in values)
        samples = np.frombuffer(raw, np.uint8)
    else:
        samples = (values + 128).astype(np.uint8) if width == 1 else values.astype(f"<i{width}")
    decoded = AudioRef.from_bytes(sound_bytes(samples, width)).load()
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, values / scale, atol=1e-7)


def test_channels_are_averaged_and_rates_changed() -> None:
    left, right = np.full(800, 8000, "<i2"), np.full(800, -4000, "<i2")
    stereo = AudioRef.from_bytes(sound_bytes(np.stack([left, right], axis=1), channels=2))
    np.testing.assert_allclose(stereo.load(), np.full(800, 2000 / 32768), atol=1e-7)
    tone = (9000 * np.sin(2 * np.pi * 440 * np.arange(4410) / 44100)).astype("<i2")
    ref = AudioRef.from_bytes(sound_bytes(tone, rate=44100))
    np.testing.assert_allclose(ref.load(16000), resample_poly(tone / 32768, 160, 441), atol=1e-6)
    assert len(ref.load(16000)) == 1600
    clip = source("sound", n=1)[0].messages[0]["content"][0]["audio"]
    assert np.array_equal(AudioRef.from_object(clip).load(), clip.load().astype(np.float32) / 32768)


GUID = bytes.fromhex("000000001000800000aa00389b71")  # behind the format's tag


def wav_bytes(
    samples: bytes,
    *,
    tag: int = 1,
    bits: int = 16,
    channels: int = 1,
    extensible: bool = False,
    sizes: tuple[int, int] | None = None,
    before: bytes = b"",
    behind: bytes = b"",
) -> bytes:
    """A WAV file made by hand; ``sizes`` of the file and of its samples are stated in place of the true ones."""
    step = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else tag, channels, 16000, 16000 * step, step, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, tag) + GUID
    head = b"WAVE" + before + b"fmt " + struct.pack("<I", len(form)) + form
    stated = sizes or (len(head) + 8 + len(samples) + len(behind), len(samples))
    return b"RIFF" + struct.pack("<I", stated[0]) + head + b"data" + struct.pack("<I", stated[1]) + samples + behind


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("tag", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_kind_of_number_under_both_headers(tag: int, bits: int, extensible: bool) -> None:
    values = np.array([[-1.0, -0.5], [0.0, 0.25], [0.5, 0.75]])
    if tag == 3:
        raw = values.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        raw = (values * 128 + 128).astype(np.uint8).tobytes()
    else:  # the high bytes of 32 bits
        raw = (values * 2**31).astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - bits // 8 :].tobytes()
    made = wav_bytes(raw, tag=tag, bits=bits, channels=2, extensible=extensible)
    assert np.array_equal(AudioRef.from_bytes(made).load(), np.float32([-0.75, 0.125, 0.625]))


def test_sizes_that_a_pipe_left_open_are_those_of_the_bytes_there(tmp_path: Path) -> None:
    samples = np.arange(300, dtype="<i2")
    for sizes in [(0, 0), (2**32 - 1, 2**32 - 1), (2**32 - 1, 0), (36, 0)]:
        path = tmp_path / "pipe.wav"
        path.write_bytes(wav_bytes(samples.tobytes() + b"h", sizes=sizes))  # ended in the middle of a sample
        assert np.array_equal(AudioRef.from_path(path).load(), samples / np.float32(2**15))
        endless = wav_bytes(bytes(2 * 16000 * 601), sizes=sizes)
        with pytest.raises(AudioError, match="lasts 601 seconds"):
            AudioRef.from_bytes(endless).load()
    empty = wav_bytes(b"", behind=b"LIST" + struct.pack("<I", 4) + b"INFO")  # states truly that it holds nothing
    with pytest.raises(AudioError, match="holds no samples"):
        AudioRef.from_bytes(empty).load()


def test_other_chunks_are_stepped_over(recwarn: pytest.WarningsRecorder) -> None:
    odd = b"odd " + struct.pack("<I", 3) + b"abc\0"
    made = wav_bytes(np.full(9, 2**14, "<i2").tobytes(), before=odd, behind=odd)
    assert np.array_equal(AudioRef.from_bytes(made).load(), np.full(9, 0.5))
    assert not recwarn.list


def broken_files(folder: Path) -> dict[str, str]:
    """File name -> what its error says."""
    film, sound = film_bytes("WEBP", [100] * 4), sound_bytes(np.zeros(500, "<i2"))
    gif = film_bytes("GIF", [100] * 4)
    (folder / "cut.webp").write_bytes(film[: len(film) // 2])
    (folder / "cut.gif").write_bytes(gif[: len(gif) - 20])
    (folder / "text.webp").write_text("not a film")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    (folder / "empty.gif").write_bytes(b"")
    (folder / "cut.wav").write_bytes(sound[:-100])
    (folder / "head.wav").write_bytes(sound[:20])
    (folder / "silent.wav").write_bytes(sound_bytes(np.zeros(0, "<i2")))
    (folder / "text.wav").write_text("not a sound")
    as_float = bytearray(sound)
    as_float[20:22] = struct.pack("<H", 3)
    (folder / "float.wav").write_bytes(bytes(as_float))
    wide, fast = bytearray(sound), bytearray(sound)
    wide[34:36], fast[24:28] = struct.pack("<H", 40), struct.pack("<I", 2**32 - 5)
    (folder / "wide.wav").write_bytes(bytes(wide))
    (folder / "fast.wav").write_bytes(bytes(fast))
    long = bytearray(sound)
    long[40:44] = struct.pack("<I", 2**31 - 2)
    (folder / "long.wav").write_bytes(bytes(long))
    (folder / "law.wav").write_bytes(wav_bytes(bytes(80), tag=7, bits=8))
    (folder / "nan.wav").write_bytes(wav_bytes(np.array([0, np.nan], "<f4").tobytes(), tag=3, bits=32))
    return {
        "cut.webp": "truncated or corrupt|corrupt or of a format",
        "cut.gif": "truncated or corrupt",
        "text.webp": "corrupt or of a format",
        "film.mp4": "corrupt or of a format",
        "empty.gif": "empty",
        "gone.webp": "missing",
        "cut.wav": "truncated: 900 of 1,000 bytes",
        "head.wav": "not a WAV file",
        "silent.wav": "holds no samples",
        "text.wav": "not a WAV file",
        "float.wav": "not a WAV file of integers or floating-point numbers: Unsupported bit depth",
        "wide.wav": "40 bits",
        "law.wav": "MULAW",
        "nan.wav": "no finite",
        "fast.wav": "4,294,967,291 samples a second",
        "long.wav": "lasts .* seconds, more than 600",
        "gone.wav": "missing",
    }


def test_broken_files_are_named_and_counted(tmp_path: Path) -> None:
    reasons = broken_files(tmp_path)
    lines = []
    for name, reason in reasons.items():
        kind, ref = ("audio", AudioRef) if name.endswith("wav") else ("video", VideoRef)
        with pytest.raises(AudioError if kind == "audio" else VideoError, match=reason):
            ref.from_path(tmp_path / name).load()
        question = {"role": "user", "content": [{"type": kind, kind: name}, {"type": "text", "text": "?"}]}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": "a"}]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    report = check(tmp_path / "data.jsonl")
    assert len(report.bad) == len(reasons)
    assert {bad.kind for bad in report.bad} == {"video", "audio"}
    assert [bad.line for bad in report.bad] == list(range(1, len(reasons) + 1))


def test_huge_frames_are_refused_before_they_are_decoded() -> None:
    data = film_bytes("GIF", [100] * 2)
    with pytest.raises(VideoError, match="6 x 4 = 24 pixels, more than the limit of 23"):
        VideoRef("film", data=data, max_pixels=23).load()
    assert len(VideoRef("film", data=data, max_pixels=24).load(3)) == 3


CONTAINERS = [("FLAC", "PCM_16", 0.0), ("OGG", "VORBIS", 0.05), ("OGG", "OPUS", 0.05), ("MP3", None, 0.05)]


@pytest.mark.parametrize(("container", "subtype", "loss"), CONTAINERS)
def test_other_containers_are_read_as_the_wav_of_the_same_sound(
    container: str, subtype: str | None, loss: float
) -> None:
    wav = AudioRef.from_bytes(sound_bytes(tone()))
    held = AudioRef.from_bytes(held_in(container, tone(), subtype), name=f"tone.{container.lower()}")
    # lossy codecs ring at both ends
    assert np.abs(held.load() - wav.load())[400:-400].max() <= loss
    assert len(held.load(8000)) == 8000


def test_channels_of_a_container_are_averaged() -> None:
    both = np.stack([tone(), np.zeros_like(tone())], axis=1)
    assert np.array_equal(AudioRef.from_bytes(held_in("FLAC", both)).load(), (both / 65536).sum(1).astype(np.float32))


@pytest.mark.parametrize(("container", "subtype"), [entry[:2] for entry in CONTAINERS])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_containers_cut_short_are_named(container: str, subtype: str | None, share: float) -> None:
    whole = held_in(container, tone(), subtype)
    cut = AudioRef.from_bytes(whole[: int(len(whole) * share)], name="cut.bin")
    with pytest.raises(AudioError, match=r"cut\.bin"):
        cut.load()


@pytest.mark.parametrize("container", ["FLAC", "WAV"])
def test_a_clip_over_the_limits_is_refused_before_it_is_decoded_whole(container: str) -> None:
    held = held_in(container, tone())
    with pytest.raises(AudioError, match="lasts"):
        AudioRef.from_bytes(held, max_seconds=0.5).load()
    with pytest.raises(AudioError, match="samples a second"):
        AudioRef.from_bytes(held, max_rate=4_000).load()


def test_a_container_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = held_in("FLAC", tone(0.1))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(AudioError, match=r"alula\[audio\]"):
        AudioRef.from_bytes(data).load()
