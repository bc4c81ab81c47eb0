"""Connections of a real server: how many there are, and for how long one may be silent."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from alula.errors import UsageError
from alula.serving.engine import Engine
from alula.serving.http import Connections, Settings, application
from alula.serving.http.connections import holder_of
from alula.serving.http.door import Receive, Scope, Send
from tests.serving.http.conftest import running

BOUND = 30.0
"""seconds: by far more than a connection of these tests may be silent"""
SHORT = Connections(most=12, per_address=4, head_seconds=0.5, idle_seconds=4, stalled_seconds=1.5)
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def short(engine: Engine) -> Iterator[str]:
    """A server with little patience; what the system keeps of its answers is little too."""
    with running(application(engine, Settings(token=TOKEN)), 4_096, SHORT) as address:
        yield address


@contextlib.contextmanager
def connected(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    place = urlsplit(url)
    with socket.socket() as found:
        found.settimeout(BOUND)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        found.connect((place.hostname, place.port))
        found.sendall(sent)
        yield found


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes; a timeout of the socket fails the test."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65_536):
            found += part
    return found


def told(answer: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)
    assert headers["connection"] == "close"
    return int(first.split()[1]), headers, json.loads(body)["error"]


def answered(url: str) -> None:
    """Wait until the server answers: it sees a moment later that others have gone."""
    end = time.monotonic() + BOUND
    while httpx.get(f"{url}/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("most", "per_address", "status", "kind"),
    [(12, 4, 429, "rate_limit_error"), (3, 3, 503, "server_error")],
)
def test_who_holds_all_there_is_room_for_shuts_nobody_out_for_long(
    engine: Engine, most: int, per_address: int, status: int, kind: str
) -> None:
    patient = Connections(most=most, per_address=per_address, head_seconds=BOUND)
    with running(application(engine, Settings()), connections=patient) as url, contextlib.ExitStack() as held:
        answered(url)
        silent = [held.enter_context(connected(url, b"GET /hea" if i % 2 else b"")) for i in range(per_address - 1)]
        answered(url)  # in the last place
        silent.append(held.enter_context(connected(url)))
        with connected(url, b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as refused:
            found, headers, error = told(rest(refused))
        assert (found, error["type"], error["code"]) == (status, kind, "too_many_connections")
        assert int(headers["retry-after"]) > 0
        with connected(url) as refused:  # and asks nothing: it is not kept either
            assert rest(refused) == b""
        silent[0].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert rest(silent[0]).startswith(b"HTTP/1.1 200")  # those that are in go on
        answered(url)


def test_a_flood_from_one_address_leaves_room_for_others(engine: Engine) -> None:
    patient = Connections(most=12, per_address=4, head_seconds=BOUND)
    with running(application(engine, Settings()), connections=patient) as url, contextlib.ExitStack() as held:
        place = urlsplit(url)
        for _ in range(150):  # more than are told that there is no room
            held.enter_context(connected(url))
        with socket.socket() as other:
            other.settimeout(BOUND)
            other.bind(("127.0.0.2", 0))
            other.connect((place.hostname, place.port))
            other.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert rest(other).startswith(b"HTTP/1.1 200")


def test_silent_connections_are_closed_and_slow_headers_told_so(short: str) -> None:
    with connected(short) as silent, connected(short, b"GET /health HTTP/1.1\r\nHost:") as half:
        assert rest(silent) == b""
        status, _, error = told(rest(half))
    assert (status, error["code"]) == (408, "request_timeout")
    answered(short)


def dripped(connection: socket.socket) -> bytes:
    """What comes while a letter is sent every now and then."""
    connection.settimeout(0.05)
    end, found = time.monotonic() + BOUND, b""
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            connection.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                if not (part := connection.recv(65_536)):
                    return found
                found += part
    assert time.monotonic() < end
    return found


def test_drops_of_a_request_keep_no_connection(short: str) -> None:
    with connected(short, b"GET /health HTTP/1.1\r\nX-Long: ") as slow:
        dripped(slow)
    # nobody reads this body: the answer needs none of it
    refused = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with connected(short, refused) as slow:
        assert dripped(slow).startswith(b"HTTP/1.1 401")
    # after an answer too
    with connected(short, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea") as slow:
        assert dripped(slow).startswith(b"HTTP/1.1 200")


def test_connections_are_kept_between_requests_for_a_while(short: str) -> None:
    ask = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connected(short) as kept:
        for _ in range(2):
            kept.sendall(ask)
            found = b""
            while not found.endswith(b"}"):
                found += kept.recv(65_536)
            assert found.startswith(b"HTTP/1.1 200")
            time.sleep(2 * SHORT.head_seconds)
        assert rest(kept) == b""


def test_who_takes_nothing_of_an_answer_is_cut_off(short: str) -> None:
    script = httpx.get(f"{short}/js/app.js").content
    ask = b"GET /js/app.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 8
    with contextlib.ExitStack() as held:
        lazy = [held.enter_context(connected(short, ask)) for _ in range(SHORT.per_address)]
        answered(short)  # which has no room as long as they are there
        assert any(len(rest(each)) < 8 * len(script) for each in lazy)
    answered(short)


def test_a_slow_reader_gets_all_of_it(short: str) -> None:
    script = httpx.get(f"{short}/js/app.js").content
    with connected(short, b"GET /js/app.js HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n") as slow:
        pause = 2 * SHORT.stalled_seconds / (len(script) / 1_024)
        found = b""
        while part := slow.recv(1_024):
            found += part
            time.sleep(pause)
    assert found.endswith(script)


LARGE = 16_000_000
"""bytes: more than the system keeps of a connection"""


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    """An application with an answer of megabytes."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
    for _ in range(LARGE // 4_000):
        await send({"type": "http.response.body", "body": bytes(4_000), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_who_reads_megabytes_slowly_gets_them_and_who_stops_does_not() -> None:
    # the system asks for more in lots, so asyncio's buffer stands still for longer than a client may be silent
    patience = Connections(stalled_seconds=1.0)
    ask = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with running(large, connections=patience) as url:
        place = urlsplit(url)
        with socket.create_connection((place.hostname, place.port), BOUND) as slow:
            slow.sendall(ask)
            end, found = time.monotonic() + 4 * patience.stalled_seconds, 0
            while time.monotonic() < end:
                found += len(slow.recv(20_000))
                time.sleep(0.05)
            assert found + len(rest(slow)) > LARGE
        with socket.create_connection((place.hostname, place.port), BOUND) as stopped:
            stopped.sendall(ask)
            time.sleep(3 * patience.stalled_seconds)
            assert len(rest(stopped)) < LARGE


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS \r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 70_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so_as_all_errors_are(short: str, sent: bytes) -> None:
    with connected(short, sent) as wrong:
        status, _, error = told(rest(wrong))
    assert (status, error["code"], error["type"]) == (400, "invalid_http", "invalid_request_error")


CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("first", "more", "status"),
    [
        (b"", b"f" * 65_536, 400),  # a size of more digits than there is memory for
        (b"5;", b"x" * 65_536, 400),  # or an extension
        (b"F" * 21 + b"\r\n", b"", 400),
        (b"5\r\nabcde and no end of it\r\n", b"", 400),
        (b"0\r\n", b"x: " + b"y" * 60_000 + b"\r\n", 400),  # trailers
        (b"F" * 20 + b"\r\n", b"x" * 65_536, 413),  # a chunk of 2^80 bytes
    ],
)
def test_no_chunk_is_too_large_for_an_answer(short: str, first: bytes, more: bytes, status: int) -> None:
    """The answer comes while the client would send gigabytes, of which no more are read than a body may hold."""
    sent = 0
    with connected(short, CHUNKED + first) as wrong:
        with contextlib.suppress(ConnectionError):
            while more and sent < 2**30:
                wrong.sendall(more)
                sent += len(more)
        answer = rest(wrong)
    assert sent < 2 * Settings().body_bytes if status == 413 else sent < 2**24
    if answer:  # lost where the system resets a connection on which more was sent than was read
        found, _, error = told(answer)
        assert (found, error["type"]) == (status, "invalid_request_error")
    assert answer or more
    answered(short)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET /health\r\n\r\n", "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", "Host"),
        (b"GET /\x1b[31m HTTP/1.1\r\nHost: a\r\n\r\n" + b"a" * 1_000, "illegal request line"),
        (CHUNKED + b"no number\r\n", "illegal chunk header"),
    ],
)
def test_the_log_says_who_sent_what_is_no_http(
    short: str, caplog: pytest.LogCaptureFixture, sent: bytes, why: str
) -> None:
    with connected(short, sent) as wrong:
        host, port = wrong.getsockname()
        assert told(rest(wrong))[0] == 400
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{host}:{port} sent what is no valid HTTP/1.1: ")
    assert why in line
    assert len(line) < 300
    assert line.isprintable()


def test_what_turns_out_to_be_no_http_is_answered_once(short: str, caplog: pytest.LogCaptureFixture) -> None:
    """Though the application has begun on the request, and refuses it before it reads the body."""
    head = CHUNKED.replace(TOKEN.encode(), b"wrong")
    for beginning in (b"", b"2\r\nab\r\n"):
        with connected(short, head + beginning + b"no number\r\n") as wrong:
            answer = rest(wrong)
        assert told(answer)[0] == 400
        assert answer.count(b"HTTP/1.1 ") == 1
    answered(short)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_share_is_of_an_address_or_of_a_network_of_64_bits() -> None:
    assert holder_of("192.0.2.7") == holder_of("::ffff:192.0.2.7") != holder_of("192.0.2.8")
    assert holder_of("2001:db8::1") == holder_of("2001:db8::ffff:0:0:1") != holder_of("2001:db8:0:1::1")
    assert holder_of("fe80::1%eth0") == holder_of("fe80::2")


def test_as_many_as_the_process_may_have_open() -> None:
    held = Connections.fitting(40, 4)
    assert (held.most, held.per_address) == (40, 4)
    assert Connections.fitting(40).per_address == 40
    with pytest.raises(UsageError, match="one address cannot have 41 of 40"):
        Connections.fitting(40, 41)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        assert Connections.fitting().most == 108
        with pytest.raises(UsageError, match="more than the 300") as refused:
            Connections.fitting(200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused.value.remedy == "ulimit -n 392 in the shell that starts it"
