"""What the server's tests share: an engine over tiny models, its application, and a real server on a free port."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from scipy.io import wavfile
from starlette.testclient import TestClient

import alula
from alula.grafts import WingsConfig, save_adapter
from alula.hosts import build_host, load_host, save_host
from alula.serving.engine import Engine, Limits
from alula.serving.http import Connections, Settings, application, listen
from alula.serving.http.connections import Config
from tests.grafts.common import wake
from tests.hosts import tiny
from tests.serving.made import sensing

ASK = [{"role": "user", "content": "what do birds do ?"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def png(color: str = "red", size: tuple[int, int] = (50, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 0.5, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    tone = np.sin(np.arange(int(seconds * rate)) * 440 * 2 * np.pi / rate)
    wavfile.write(file, rate, (tone * 20_000).astype(np.int16))
    return file.getvalue()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64(content)}"


def shown(url: str, text: str = "what is this ?") -> list[dict[str, Any]]:
    """A question about a picture."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="package")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, an adapter of Wings for it, and a host that also takes sounds and films."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    host = build_host(tiny.decoder("qwen2"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    save_host(host, folder / "host")
    model, _ = load_host(folder / "host")
    wake(alula.attach(model, WingsConfig(rank=4)))
    save_adapter(model, folder / "adapters" / "wings" / "final", base=folder / "host")
    save_host(sensing(), folder / "senses")
    return folder


@pytest.fixture(scope="package")
def engine(parts: Path) -> Iterator[Engine]:
    with Engine(Limits(answer_tokens=64, pixels_per_image=1_000_000, images_per_request=4)) as made:
        made.load("base", parts / "host")
        made.load("base+wings", parts / "adapters" / "wings" / "final")
        made.load("senses", parts / "senses")
        yield made


@pytest.fixture(scope="package")
def client(engine: Engine) -> TestClient:
    """Without the application's end, which would close the engine."""
    return TestClient(application(engine, Settings()), raise_server_exceptions=False)


def client_of(engine: Engine, settings: Settings, **more: Any) -> TestClient:
    return TestClient(application(engine, settings, **more), raise_server_exceptions=False)


@contextlib.contextmanager
def running(app: Any, buffer: int | None = None, connections: Connections | None = None) -> Iterator[str]:
    """The address of a real server in a thread. The application's end is left out: the engine goes on.

    Args:
        buffer: bytes that the system keeps of what a client does not take.
        connections: that are taken.
    """
    listening = listen("127.0.0.1", 0)
    if buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    config = Config(app, connections or Connections(), lifespan="off", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="package")
def url(engine: Engine) -> Iterator[str]:
    with running(application(engine, Settings(token="a-token-of-the-tests"))) as address:
        yield address
