"""Who may ask: tokens, names of the server, pages of other origins; and the headers of every answer."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from alula.errors import UsageError
from alula.serving.engine import Engine
from alula.serving.http import Settings
from alula.serving.http.settings import check_exposure, check_origin, own_names
from tests.serving.http.conftest import ASK, CHAT, client_of

TOKEN = "a-token-of-the-tests"
GUARDED = [
    "/v1/models",
    "/metrics",
    "/alula/v1/server",
    "/alula/v1/runs",
    "/alula/v1/samples",
    "/v1/models/base",
    "/v1/no",
]


@pytest.fixture(scope="module")
def guarded(engine: Engine) -> TestClient:
    return client_of(
        engine,
        Settings(
            token=TOKEN, hosts=own_names("127.0.0.1", ("testserver",)), origins=frozenset({"https://app.example"})
        ),
    )


@pytest.mark.parametrize("path", GUARDED)
def test_nothing_is_told_without_the_token(guarded: TestClient, path: str) -> None:
    wrong = [
        "",
        "Bearer",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xe9",
        "Bearer None",
    ]
    for shown in [None, *wrong]:
        headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
        found = guarded.get(path, headers=headers)
        assert found.status_code == 401, shown
        assert found.json()["error"]["type"] == "authentication_error"
        assert found.headers["www-authenticate"] == "Bearer"
    assert guarded.get(path, headers={"authorization": f"bearer {TOKEN}"}).status_code in (200, 404)


def test_the_page_and_health_need_none(guarded: TestClient) -> None:
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/").status_code == 200
    assert "<html" in guarded.get("/").text
    for path in ("/__init__.py", "/../settings.py", "/%2e%2e/http/app.py", "/js", "/js/..%2f__init__.py"):
        assert guarded.get(path).status_code == 404, path


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1", "a@localhost"]
)
def test_a_name_that_somebody_else_gave_the_server_is_not_answered(guarded: TestClient, host: str) -> None:
    found = guarded.get("/health", headers={"host": host})
    assert (found.status_code, found.json()["error"]["code"]) == (421, "unknown_host")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "testserver"])
def test_its_own_names_are(guarded: TestClient, host: str) -> None:
    assert guarded.get("/health", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_may_not_ask(guarded: TestClient) -> None:
    own = {"authorization": f"Bearer {TOKEN}"}
    body = {"model": "base", "messages": ASK, "max_tokens": 1}
    for origin in (
        "https://evil.example",
        "null",
        "http://testserver.evil.example",
        "https://app.example.evil.example",
    ):
        for response in (
            guarded.post(CHAT, json=body, headers={**own, "origin": origin}),
            guarded.get("/v1/models", headers={**own, "origin": origin}),
            guarded.options(CHAT, headers={"origin": origin, "access-control-request-method": "POST"}),
        ):
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers
    page = guarded.post(CHAT, json=body, headers={**own, "origin": "http://testserver"})
    assert page.status_code == 200
    assert "access-control-allow-origin" not in page.headers


def test_pages_of_allowed_origins_may(guarded: TestClient) -> None:
    origin = {"origin": "https://app.example"}
    asked = guarded.options(CHAT, headers={**origin, "access-control-request-method": "POST"})
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for response in (guarded.get("/v1/models", headers=origin), guarded.get("/health", headers=origin)):
        assert response.headers["access-control-allow-origin"] == "https://app.example"  # errors are read as well
        assert "access-control-allow-credentials" not in response.headers
        assert response.headers["vary"] == "Origin"
    assert guarded.options(CHAT).status_code == 405


def test_headers_of_every_answer(guarded: TestClient) -> None:
    for path in ("/", "/health", "/nothing", "/v1/models", "/js/app.js", "/index.html"):
        headers = guarded.get(path).headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-request-id"].startswith("req-")
        assert "server" not in headers
    assert guarded.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert guarded.get("/health", headers={"x-request-id": "a b<c>"}).headers["x-request-id"].startswith("req-")


def test_health_is_asked_by_its_head_as_well(guarded: TestClient) -> None:
    assert guarded.head("/health").status_code == 200
    assert guarded.head("/").status_code == 200
    assert guarded.head("/v1/models").status_code == 401


def test_what_would_open_the_server_is_refused() -> None:
    with pytest.raises(UsageError, match="every machine"):
        check_exposure("0.0.0.0", None)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_exposure(host, None)
    check_exposure("0.0.0.0", TOKEN)
    assert own_names("0.0.0.0", ()) is None
    for token in ("short", "with spaces in the middle", "\u00e9" * 20):
        with pytest.raises(UsageError, match="a token has"):
            Settings(token=token)
    for origin in ("*", "example.org", "https://example.org/path", "null", "https://"):
        with pytest.raises(UsageError, match="is no origin"):
            check_origin(origin)
    with pytest.raises(UsageError, match="--allow-load"):
        Settings(may_load=True)
