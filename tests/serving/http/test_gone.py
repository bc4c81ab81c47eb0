"""Clients that go away, that take nothing or send slowly; queues that are full and deadlines that pass."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from alula.serving.engine import Engine, Limits
from alula.serving.http import Settings, application
from alula.serving.http.places import Places
from alula.serving.http.problems import Problem
from tests.serving.http.conftest import ASK, CHAT, running

LONG: dict[str, Any] = {"model": "base", "messages": ASK, "max_tokens": 60_000, "temperature": 1.0, "stop": []}


@pytest.fixture(scope="module")
def busy(parts: Path) -> Iterator[tuple[str, Engine]]:
    """A server whose queue is short and whose answers may be long."""
    with Engine(Limits(queue=2, running=1, answer_tokens=60_000)) as engine:
        engine.load("base", parts / "host")
        # no end of a turn: an answer goes on until somebody ends it
        engine._residents._by_name["base"].__dict__["ends"] = frozenset()
        with running(
            application(engine, Settings(body_seconds=0.5, stalled_seconds=0.5, pulse_seconds=0.1)), buffer=4096
        ) as url:
            yield url, engine


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def is_idle(engine: Engine) -> bool:
    return engine.running == 0 and engine.queued == 0


def raw(url: str, body: dict[str, Any]) -> socket.socket:
    """A request on a connection that is in our hands."""
    port = int(url.rpartition(":")[2])
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_of_a_client_that_goes_away_ends(busy: tuple[str, Engine], stream: bool) -> None:
    url, engine = busy
    connection = raw(url, {**LONG, "stream": stream})
    until(lambda: engine.running == 1)
    if stream:
        assert b"text/event-stream" in connection.recv(4096)
    connection.close()
    until(lambda: is_idle(engine))
    if not stream:
        assert 'status="499"' in httpx.get(f"{url}/metrics").text


def test_a_client_that_takes_nothing_holds_nobody_up_and_is_left(busy: tuple[str, Engine]) -> None:
    url, engine = busy
    connection = raw(url, {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20})
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    until(lambda: engine.running == 1)
    assert httpx.get(f"{url}/health").json()["running"] == 1
    until(lambda: is_idle(engine), 60)  # its buffers are full, and half a second passes
    connection.close()
    assert httpx.post(f"{url}{CHAT}", json={**LONG, "max_tokens": 2}, timeout=60).status_code == 200


def test_a_full_queue_is_told_at_once(busy: tuple[str, Engine]) -> None:
    url, engine = busy
    waiting = [raw(url, LONG)]
    until(lambda: engine.running == 1)
    for count in (1, 2):
        waiting.append(raw(url, LONG))
        until(lambda count=count: engine.queued == count)  # type: ignore[misc]
    refused = httpx.post(f"{url}{CHAT}", json=LONG)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    for connection in waiting:
        connection.close()
    until(lambda: is_idle(engine))


def test_a_deadline_is_told_by_its_status_or_ends_the_stream(busy: tuple[str, Engine]) -> None:
    url, engine = busy
    own = {**LONG, "alula": {"deadline": 0.2}}
    late = httpx.post(f"{url}{CHAT}", json=own, timeout=60)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    streamed = httpx.post(f"{url}{CHAT}", json={**own, "stream": True}, timeout=60).text.split("\n\n")
    last = json.loads(streamed[-2].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"
    assert len(streamed) > 3  # what was there by then came through
    until(lambda: is_idle(engine))


def test_a_stream_that_waits_says_so_and_ends_by_its_deadline(busy: tuple[str, Engine]) -> None:
    url, engine = busy
    first = raw(url, LONG)
    until(lambda: engine.running == 1)
    own = {**LONG, "stream": True, "alula": {"deadline": 1.0}}
    waited = httpx.post(f"{url}{CHAT}", json=own, timeout=60)
    first.close()
    *begun, last = waited.text.strip().split("\n\n")
    assert waited.status_code == 200
    assert ": still there" in begun
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    until(lambda: is_idle(engine))


def test_places_count_what_comes_before_the_engine(busy: tuple[str, Engine]) -> None:
    _, engine = busy
    places = Places(engine, most_bytes=100_000, most_pixels=50)
    with places.take() as first, places.take() as second:
        with pytest.raises(Problem, match="too many requests wait"):
            places.take()
        first.enter()  # counted by the engine from now on
        with places.take() as third:
            third.hold(60_000)  # short ones are not counted
            assert (places.waiting, places.bytes) == (2, 0)
        first.hold(150_000)
        second.hold(10)
        with pytest.raises(Problem, match="too many bytes"):
            second.hold(150_000)
        second.show(50)
        with pytest.raises(Problem, match="too many pixels") as refused:
            first.show(1)
        assert refused.value.status == 429
    assert (places.waiting, places.bytes, places.pixels) == (0, 0, 0)


def test_a_request_that_is_sent_slowly_is_not_waited_for(busy: tuple[str, Engine]) -> None:
    url, _ = busy
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        connection.settimeout(10)
        assert b" 408 " in connection.recv(4096)


def test_many_clients_get_their_own_answers(url: str) -> None:
    """Sixteen at once, of different lengths: each what it gets alone."""
    asked = [
        {
            "model": "base",
            "messages": [{"role": "user", "content": "birds " * n}],
            "max_tokens": 3 + n,
            "temperature": 0,
        }
        for n in range(1, 9)
    ] * 2
    found: dict[int, str] = {}
    headers = {"authorization": "Bearer a-token-of-the-tests"}

    def ask(number: int) -> None:
        response = httpx.post(f"{url}{CHAT}", json=asked[number], headers=headers, timeout=60)
        found[number] = response.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    for number in range(8):
        ask(number)
        assert together[number] == together[number + 8] == found[number]
