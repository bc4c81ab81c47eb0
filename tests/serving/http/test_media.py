"""Media of requests: what is decoded, what is too large, and that nothing of the server's own is read."""

from __future__ import annotations

import gc
import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image
from starlette.testclient import TestClient

from alula.serving.engine import Engine
from alula.serving.http import Settings, application
from alula.serving.http.uploads import Upload, Uploads
from tests.serving.http.conftest import CHAT, b64, client_of, data, png, running, shown, wav

URL = "messages[0].content[0].image_url.url"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ask(client: TestClient, content: list[dict[str, Any]], model: str = "base") -> Any:
    text = {"type": "text", "text": "what is this ?"}
    messages = [{"role": "user", "content": [*content, text]}]
    return client.post(CHAT, json={"model": model, "messages": messages, "max_tokens": 2, "temperature": 0})


def flac(seconds: float, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * rate), np.int16), rate, format="FLAC")
    return file.getvalue()


def png_saying(width: int, height: int) -> bytes:
    """A picture of a few bytes that says that it is large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_pictures_of_every_format_are_seen(client: TestClient, kind: str) -> None:
    content = saved(Image.new("RGB", (50, 40), "red"), kind)
    for url in (data(content, f"image/{kind.lower()}"), data(content, ""), data(content, "image/png;name=a.png")):
        assert ask(client, [{"type": "image_url", "image_url": {"url": url}}]).status_code == 200
    assert ask(client, [{"type": "image_url", "image_url": data(content)}]).status_code == 200  # an address alone


def test_of_low_detail_a_small_copy_is_seen(client: TestClient) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (640, 800, 3), dtype=np.uint8)
    whole = Image.fromarray(noise)
    small = whole.resize((512, 410), Image.Resampling.BICUBIC, reducing_gap=2.0)  # made by the client itself

    def asked(picture: Image.Image, **detail: Any) -> tuple[Any, Any]:
        link = {"url": data(saved(picture, "PNG")), **detail}
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": link}]}]
        body = {"model": "base", "messages": messages}
        (image,) = client.post("/alula/v1/preview", json=body).json()["images"]
        told = client.post(CHAT, json={**body, "max_tokens": 3, "temperature": 0, "logprobs": True}).json()
        scores = [each["logprob"] for each in told["choices"][0]["logprobs"]["content"]]
        return (image["width"], image["height"]), scores

    sizes, scores = zip(
        asked(whole),
        asked(whole, detail="auto"),
        asked(whole, detail="high"),
        asked(whole, detail="low"),
        asked(small),
        strict=True,
    )
    assert sizes == ((800, 640), (800, 640), (800, 640), (512, 410), (512, 410))
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert scores[one] == pytest.approx(scores[other], abs=1e-4)
    assert scores[0] != pytest.approx(scores[3], abs=1e-3)
    (few, _), (few_too, _) = asked(Image.new("RGB", (50, 40)), detail="low"), asked(Image.new("RGB", (50, 40)))
    assert few == few_too == (50, 40)  # never larger than it was


def test_regions_are_of_the_picture_as_sent(client: TestClient) -> None:
    link = {"url": data(png()), "detail": "low"}
    own = {"highlight": {"regions": [{"item": 0, "box": [0, 0, 9, 9]}]}}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": link}, {"type": "text", "text": "?"}]}]
    for path in (CHAT, "/alula/v1/preview"):
        error = client.post(path, json={"model": "base", "messages": messages, "alula": own}).json()["error"]
        assert error["param"] == "alula.highlight.regions[0]"
        assert "detail low" in error["message"]


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO", "PCX", "PDF"])
def test_other_formats_are_not_shown_to_decoders(client: TestClient, kind: str) -> None:
    found = ask(client, [{"type": "image_url", "image_url": data(saved(Image.new("RGB", (50, 40)), kind))}])
    assert found.status_code == 400
    assert found.json()["error"]["param"] == URL
    assert "PNG" in found.json()["error"]["alula"]["remedy"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: png_saying(60_000, 60_000), "pixels"),
        (lambda: png_saying(1_001, 1_000), "pixels"),
        (lambda: png()[:60], "corrupt"),
        (lambda: b"GIF89a" + b"\xff" * 50, "as sent"),
        (lambda: b"\x89PNG\r\n\x1a\n", "as sent"),
        (lambda: b"hello", "no image of a format"),
    ],
)
def test_bombs_and_broken_pictures_are_refused(client: TestClient, content: Callable[[], bytes], said: str) -> None:
    found = ask(client, [{"type": "image_url", "image_url": data(content())}])
    assert found.status_code == 400
    assert found.json()["error"]["param"] == URL
    assert said in found.json()["error"]["message"]


def test_pictures_have_bounds_together(client: TestClient, engine: Engine) -> None:
    one = {"type": "image_url", "image_url": data(png(size=(500, 400)))}
    assert ask(client, [one] * 4).status_code == 200
    assert ask(client, [one] * 5).json()["error"]["code"] == "too_many_media"
    narrow = client_of(engine, Settings(pixels_per_request=500_000, media_bytes=2_000))
    assert ask(narrow, [one] * 3).json()["error"]["code"] == "image_too_large"
    large = {"type": "image_url", "image_url": data(png() + bytes(4_000))}
    assert ask(narrow, [large]).json()["error"]["code"] == "image_too_large"


def test_sounds_and_films(client: TestClient) -> None:
    film = saved(
        Image.new("RGB", (40, 40), "red"),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (40, 40), color) for color in ("blue", "green")],
    )
    sound = {"type": "input_audio", "input_audio": {"data": b64(wav()), "format": "wav"}}
    for part in (
        sound,
        {"type": "audio_url", "audio_url": {"url": data(flac(0.5, 8_000), "audio/flac")}},
        {"type": "video_url", "video_url": {"url": data(film, "image/gif")}},
    ):
        found = ask(client, [part], "senses")
        assert found.status_code == 200, found.text
        assert found.json()["alula"]["image_tokens"]["of"] > 0
    for said, content, found in (("mp3", wav(), "WAV"), ("wav", flac(0.5, 8_000), "FLAC"), ("opus", wav(), "WAV")):
        other = ask(client, [{"type": "input_audio", "input_audio": {"data": b64(content), "format": said}}], "senses")
        error = other.json()["error"]
        assert (other.status_code, error["param"]) == (400, "messages[0].content[0].input_audio.format")
        assert f"{found}, not {said}" in error["message"]
    refused = ask(client, [sound])  # a model that hears nothing
    assert refused.status_code == 400
    assert "audio" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: flac(700, 8_000), "120 seconds"),
        (lambda: flac(0.1, 384_000), "samples a second"),
        (lambda: wav(130, 8_000), "more than 120"),
        (lambda: wav()[:30], "cut off"),
        (lambda: b"OggS" + bytes(60), "truncated"),
        (lambda: b"hello", "no audio of a format"),
    ],
)
def test_sounds_that_are_too_long_or_broken(client: TestClient, content: Callable[[], bytes], said: str) -> None:
    kind = {b"fLaC": "flac", b"OggS": "ogg"}.get(content()[:4], "wav")
    part = {"type": "input_audio", "input_audio": {"data": b64(content()), "format": kind}}
    found = ask(client, [part], "senses")
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "messages[0].content[0].input_audio.data"
    assert said in found.json()["error"]["message"]


def test_films_have_bounds(client: TestClient, engine: Engine) -> None:
    frames = [Image.new("RGB", (40, 40), (n, n, n)) for n in range(5)]
    film = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    narrow = client_of(engine, Settings(frames_per_video=4, pixels_per_frame=2_000))
    part = {"type": "video_url", "video_url": {"url": data(film, "image/gif")}}
    assert "5 frames" in ask(narrow, [part], "senses").json()["error"]["message"]
    wide = saved(Image.new("RGB", (60, 60)), "GIF")
    part = {"type": "video_url", "video_url": {"url": data(wide, "image/gif")}}
    assert "pixels" in ask(narrow, [part], "senses").json()["error"]["message"]


def test_no_file_of_the_server_is_read(client: TestClient, tmp_path: Path) -> None:
    """A picture that lies on its disk, under all the names that it has there."""
    place = tmp_path / "secret.png"
    place.write_bytes(png())
    for url in (str(place), place.as_uri(), f"file://localhost{place}", f"file:{place}", f"FILE://{place}"):
        found = ask(client, [{"type": "image_url", "image_url": {"url": url}}])
        assert (found.status_code, found.json()["error"]["param"]) == (400, URL), url
        assert "no file of this machine is read" in found.json()["error"]["message"]


# -- uploads -----------------------------------------------------------------------------------------------------------


def upload(client: TestClient, content: bytes, name: str = "../../a.png") -> Any:
    return client.post("/alula/v1/uploads", files={"file": (name, content)})


def test_an_upload_is_named_in_a_request(client: TestClient) -> None:
    made = upload(client, png())
    assert made.status_code == 201
    told = made.json()
    assert (told["medium"], told["width"], told["height"], told["bytes"]) == ("image", 50, 40, len(png()))
    inline, named = (
        client.post(CHAT, json={"model": "base", "messages": shown(url), "max_tokens": 5, "temperature": 0}).json()
        for url in (data(png()), told["url"])
    )
    assert named["choices"][0]["message"] == inline["choices"][0]["message"]
    sound = upload(client, wav()).json()
    assert sound["medium"] == "audio"
    part = {"type": "audio_url", "audio_url": {"url": f"alula-upload:{sound['id']}"}}
    assert ask(client, [part], "senses").status_code == 200
    wrong = ask(client, [{"type": "image_url", "image_url": {"url": f"alula-upload:{sound['id']}"}}])
    assert "is audio, not image" in wrong.json()["error"]["message"]
    assert client.delete(f"/alula/v1/uploads/{told['id']}").status_code == 204
    assert client.delete(f"/alula/v1/uploads/{told['id']}").status_code == 404
    assert ask(client, [{"type": "image_url", "image_url": {"url": f"alula-upload:{told['id']}"}}]).status_code == 400


def test_uploads_that_are_none(client: TestClient, engine: Engine) -> None:
    path = "/alula/v1/uploads"
    assert upload(client, b"hello").json()["error"]["code"] == "invalid_media"
    assert upload(client, b"").status_code == 400
    assert upload(client, png_saying(9_000, 9_000)).status_code == 400
    assert client.post(path, files={"picture": ("a.png", png())}).status_code == 400
    two = [("file", ("a.png", png())), ("file", ("b.png", png()))]
    assert client.post(path, files=two).status_code == 400
    assert client.post(path, files={"file": ("a.png", png())}, data={"more": "1"}).status_code == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post(path, content=b"--y\r\nhello", headers=broken).status_code == 400
    assert client.post(path, content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
    narrow = client_of(engine, Settings(media_bytes=10_000))
    assert upload(narrow, png() + bytes(100_000)).status_code == 413


def test_an_upload_goes_by_the_clock_though_nobody_asks(engine: Engine) -> None:
    def kept() -> list[Upload]:
        # by type(): isinstance asks the object, and a proxy of something gone (any library may hold one) raises then
        return [each for each in gc.get_objects() if type(each) is Upload]

    before = kept()  # held, so that none of these goes meanwhile
    with running(application(engine, Settings(upload_seconds=0.2))) as url:
        made = httpx.post(f"{url}/alula/v1/uploads", files={"file": ("a.png", png())})
        assert made.status_code == 201
        assert len(kept()) == len(before) + 1
        end = time.monotonic() + 30
        while len(kept()) > len(before):
            assert time.monotonic() < end
            time.sleep(0.1)


def test_uploads_go_by_their_age_and_number() -> None:
    now = [0.0]
    kept = Uploads(most=3, most_bytes=25, seconds=60, clock=lambda: now[0])
    ids = [kept.put("image", bytes(10), {}).id for _ in range(3)]
    assert len(set(ids)) == 3
    with pytest.raises(Exception, match="no upload"):
        kept.get(ids[0], "url")  # 30 bytes are more than 25
    assert kept.get(ids[1], "url").content == bytes(10)
    now[0] = 61.0
    with pytest.raises(Exception, match="no upload"):
        kept.get(ids[1], "url")
    with pytest.raises(Exception, match="no upload"):
        kept.drop(ids[2])
