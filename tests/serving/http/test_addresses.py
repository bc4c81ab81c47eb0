"""Which addresses are fetched: names that were allowed, in the public internet, and at the very address that was looked
at. The servers of these tests are our own, behind a resolver and a connection of the tests' own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest

from alula.errors import UsageError
from alula.serving.engine import Engine
from alula.serving.http import Settings
from alula.serving.http.addresses import Allowed, host_of, is_public
from alula.serving.http.fetching import Fetched, Fetcher
from alula.serving.http.problems import Problem
from tests.serving.http.conftest import CHAT, client_of, data, png, shown

PUBLIC, HOST = "93.184.215.14", "pictures.example.org"
ALLOWED = Allowed.of([HOST])

INSIDE = [
    # this machine, private networks, links, clouds' own services, groups, what is kept for later
    *("127.0.0.1", "127.255.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "168.63.129.16", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
    # the same in IPv6, and IPv4 in its forms
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:93.184.215.14", "::127.0.0.1", "::ffff:0:7f00:1", "64:ff9b::7f00:1"),
    *("64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:0:7f00:1::", "3fff::1", "3ffe::1", "5f00::1"),
    *("2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a00:1", "100::1"),
    # no addresses
    *("", "localhost", "127.1", "0x7f000001", "2130706433", "1.2.3.4.5"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_no_address_of_the_inside_is_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses_are() -> None:
    for address in (PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001:81b::200e"):
        assert is_public(address), address


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "017700000001",
        "127.1",
        "0x7f.0.0.1",
        "127.0.0.1",
        "1.2.3.0x",
        "[::1]",
        "a..b",
        "-a.b",
        "a_b.c",
        "ex\u00e4mple.org",
        "\uff11\uff12\uff17.0.0.1",
        "a" * 64 + ".org",
        "a." * 127 + "org",
        "",
        ".",
        "a b",
    ],
)
def test_what_might_be_read_as_a_number_is_no_host(host: str) -> None:
    assert host_of(host) is None


@pytest.mark.parametrize(
    "address",
    [
        "ftp://pictures.example.org/a.png",
        "file:///etc/hostname",
        "gopher://pictures.example.org/",
        "http:/pictures.example.org/",
        "http:pictures.example.org",
        "//pictures.example.org/a.png",
        "http://user@pictures.example.org/a.png",
        "http://user:word@pictures.example.org/a.png",
        "http://pictures.example.org@10.0.0.1/a.png",
        "http://10.0.0.1#@pictures.example.org/",
        "http://10.0.0.1\\@pictures.example.org/",
        "http://pictures.example.org:22/a.png",
        "http://pictures.example.org:443/a.png",
        "http://pictures.example.org:0/a.png",
        "http://pictures.example.org:99999/a.png",
        "http://pictures.example.org:/a.png",
        "http://pictures.example.org:8 0/a.png",
        "http://pictures.example.org/a b.png",
        "http://pictures.example.org/a\r\nhost: inside",
        "http://pictures.example.org/\u00e9.png",
        "http://pictures.example.org.evil.example/a.png",
        "http://evilpictures.example.org/a.png",
        "http://sub.pictures.example.org/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://0x7f000001/a.png",
        "http://2130706433/a.png",
        "http://localhost/a.png",
        "http:///a.png",
        "http://pictures.example.org/" + "a" * 3_000,
    ],
)
def test_addresses_that_are_not_asked(address: str) -> None:
    with pytest.raises(Problem) as refused:
        ALLOWED.check(address, "messages[0].content[0].image_url.url")
    assert refused.value.status == 400
    assert refused.value.where == "messages[0].content[0].image_url.url"


def test_hosts_are_allowed_by_name_below_a_name_and_by_port() -> None:
    assert ALLOWED.check("HTTPS://Pictures.Example.ORG./a?b=c#d", "p").target == "/a?b=c"
    assert ALLOWED.check("http://pictures.example.org?b", "p").target == "/?b"
    below = Allowed.of(["*.example.org", "store.example.net:8443"])
    assert below.check("https://a.b.example.org/", "p").host == "a.b.example.org"
    assert below.check("https://store.example.net:8443/", "p").authority == "store.example.net:8443"
    for address in ("https://example.org/", "https://store.example.net/", "https://badexample.org/"):
        with pytest.raises(Problem, match="fetches nothing from"):
            below.check(address, "p")
    with pytest.raises(Problem, match="--allow-host"):
        Allowed().check("https://example.org/", "p")
    for wrong in ("10.0.0.1", "https://example.org", "*", "a.org:http", "a.org:0", ""):
        with pytest.raises(UsageError, match="no name of a host"):
            Allowed.of([wrong])


class Answers(BaseHTTPRequestHandler):
    """A host of pictures that is up to something."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["host"], dict(self.headers)))  # type: ignore[attr-defined]
        match self.path.partition("?")[0]:
            case "/a.png":
                self._send(200, png(), {"Content-Type": "image/png"})
            case "/page":
                self._send(200, png(), {"Content-Type": "text/html; charset=utf-8"})
            case "/large":
                self._send(200, b"", {"Content-Length": str(10**9)})
            case "/endless":
                self.send_response(200)
                self.end_headers()
                for _ in range(1_000):
                    self.wfile.write(b"0" * 10_000)
            case "/slow":
                threading.Event().wait(2)
            case "/packed":
                self._send(200, b"\x1f\x8b", {"Content-Encoding": "gzip"})
            case "/to":
                self._send(302, b"", {"Location": self.path.partition("?")[2]})
            case _:
                self._send(404, b"")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Pictures(ThreadingHTTPServer):
    """The host's server; says nothing of connections that we leave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    def handle_error(self, *_: Any) -> None:
        pass


class Connection(httpx.AsyncHTTPTransport):
    """Leads public addresses to the server of the tests, and remembers them."""

    def __init__(self, port: int, asked: list[str]) -> None:
        super().__init__(verify=False)  # over http; reading certificates takes a while
        self.port, self.asked = port, asked

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.host)
        assert request.extensions["sni_hostname"] == HOST
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        return await super().handle_async_request(request)


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    server = Pictures()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


class Fetching:
    """A fetcher whose names resolve to what they are told, one answer after another."""

    def __init__(self, host: Any, *answers: list[str], seconds: float = 5.0) -> None:
        self.answers, self.asked, self.resolved = list(answers), [], 0  # type: ignore[var-annotated]

        async def resolver(name: str, port: int) -> list[str]:
            self.resolved += 1
            if not self.answers:
                raise OSError
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

        self.fetcher = Fetcher(
            ALLOWED,
            most=100_000,
            seconds=seconds,
            resolver=resolver,
            transport=lambda: Connection(host.server_port, self.asked),
        )

    def __call__(self, path: str) -> Fetched:
        return anyio.run(self.fetcher.fetch, f"http://{HOST}{path}", "image")


def test_a_picture_is_fetched_from_the_address_that_was_looked_at(host: Any) -> None:
    fetching = Fetching(host, [PUBLIC], ["127.0.0.1"])  # a second question would be answered otherwise
    assert fetching("/a.png?size=1") == Fetched(png(), "image/png")
    assert (fetching.asked, fetching.resolved) == ([PUBLIC], 1)
    path, name, headers = host.seen[-1]
    assert (path, name) == ("/a.png?size=1", HOST)
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in {each.lower() for each in headers}


@pytest.mark.parametrize(
    "answer", [["127.0.0.1"], ["10.1.2.3"], [PUBLIC, "10.1.2.3"], ["::ffff:10.0.0.1"], ["fd00::1"]]
)
def test_a_name_that_leads_inside_is_not_connected_to(host: Any, answer: list[str]) -> None:
    fetching = Fetching(host, answer)
    with pytest.raises(Problem, match="does not lie in the public internet"):
        fetching("/a.png")
    assert fetching.asked == []


def test_a_redirect_is_a_new_address(host: Any) -> None:
    assert Fetching(host, [PUBLIC])("/to?/a.png").content == png()
    assert Fetching(host, [PUBLIC])(f"/to?http://{HOST}/to?/a.png").content == png()
    for to in ("http://127.0.0.1/a.png", "http://inside.example/a.png", "file:///etc/hostname", "//10.0.0.1/a.png"):
        fetching = Fetching(host, [PUBLIC])
        with pytest.raises(Problem):
            fetching(f"/to?{to}")
        assert fetching.asked == [PUBLIC]
    # the same name, which leads inside when it is asked for again
    fetching = Fetching(host, [PUBLIC], ["192.168.0.1"])
    with pytest.raises(Problem, match="does not lie in the public internet"):
        fetching("/to?/a.png")
    assert fetching.asked == [PUBLIC]
    with pytest.raises(Problem, match="more than 3 redirects"):
        Fetching(host, [PUBLIC])("/to?/to?/to?/to?/to?/a.png")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/large", "larger than 100,000 bytes"),
        ("/endless", "larger than 100,000 bytes"),
        ("/slow", "more than 0.5 seconds"),
        ("/packed", "compressed"),
        ("/gone", "answers 404"),
    ],
)
def test_what_is_too_large_slow_or_strange_is_left(host: Any, path: str, said: str) -> None:
    with pytest.raises(Problem, match=said):
        Fetching(host, [PUBLIC], seconds=0.5 if path == "/slow" else 5.0)(path)


def test_names_that_are_not_there_and_hosts_that_do_not_answer(host: Any) -> None:
    with pytest.raises(Problem, match="there is no host"):
        Fetching(host)("/a.png")
    fetching = Fetching(host, [PUBLIC])
    fetching.fetcher._transport = lambda: Connection(1, [])  # a port on which nobody listens
    with pytest.raises(Problem, match="cannot be asked"):
        fetching("/a.png")


def test_a_request_sees_what_an_allowed_host_has(host: Any, engine: Engine) -> None:
    client = client_of(engine, Settings(allowed=ALLOWED), fetcher=Fetching(host, [PUBLIC]).fetcher)

    def ask(url: str) -> httpx.Response:
        body = {"model": "base", "messages": shown(url), "max_tokens": 4, "temperature": 0}
        return client.post(CHAT, json=body)

    fetched, inline = ask(f"http://{HOST}/a.png"), ask(data(png()))
    assert fetched.status_code == 200, fetched.text
    assert fetched.json()["choices"][0]["message"] == inline.json()["choices"][0]["message"]
    for path, said in (("/page", "no type of image"), ("/gone", "answers 404")):
        refused = ask(f"http://{HOST}{path}")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"
        assert said in refused.json()["error"]["message"]
    assert client.get("/alula/v1/server").json()["fetches"] == [HOST]
