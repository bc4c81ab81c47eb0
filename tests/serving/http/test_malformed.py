"""Some hundreds of requests that are wrong in one thing each: the right status, and the field by its name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serving.http.conftest import ASK, CHAT, TEXT, data, png, shown

WRONG: dict[str, list[Any]] = {
    # by what a field holds: values that it cannot have
    "text": [None, 5, True, [], {}],
    "label": [5, True, [], {}],
    "flag": ["true", 1, [], {}],
    "whole": ["3", 1.5, True, [], {}],
    "number": ["0.5", True, [], {}],
    "object": [5, "text", [], True],
    "list": [5, {}, True],
}
FIELDS: dict[str, tuple[str, list[Any]]] = {
    # field of a chat: what it holds, and values of that kind that are out of bounds
    "stream": ("flag", []),
    "n": ("whole", [0, -1, 9, 10**30]),
    "max_tokens": ("whole", [0, -1, 65, 10**12]),
    "max_completion_tokens": ("whole", [0, -1]),
    "temperature": ("number", [-0.1, 2.1]),
    "top_p": ("number", [0, -1, 1.1]),
    "top_k": ("whole", [-2]),
    "seed": ("whole", [2**63, -(2**63) - 1]),
    "frequency_penalty": ("number", [-2.1, 2.1]),
    "presence_penalty": ("number", [-2.1, 2.1]),
    "repetition_penalty": ("number", [0, -1]),
    "logprobs": ("flag", []),
    "top_logprobs": ("whole", [-1, 21, 3]),  # 3: without logprobs
    "stop": ("list", ["", [""], [5], ["a", "b", "c", "d", "e"]]),
    "stream_options": ("object", [{"include_usage": True}, {"unknown": True}]),  # the first: without stream
    "chat_template_kwargs": ("object", []),
    "user": ("label", []),
    "safety_identifier": ("label", []),
    "prompt_cache_key": ("label", []),
    "metadata": ("object", [{"a": 1}]),
    "parallel_tool_calls": ("flag", []),
    "alula": ("object", [{"unknown": 1}, {"image_tokens": 4}, {"attention": True}]),
}
UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": 1},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "min_p": 0.5,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "best_of": 2,
    "echo": True,
    "suffix": "x",
    "use_beam_search": True,
    "store": True,
    "prediction": {"type": "content", "content": "x"},
    "service_tier": "priority",
    "prompt_cache_retention": "24h",
}
PART = "messages[0].content[0]"
MESSAGES: list[tuple[Any, str]] = [
    # messages that are none, and the field that says so
    (None, "messages"),
    ("hello", "messages"),
    ([], "messages"),
    ({}, "messages"),
    (["hello"], "messages[0]"),
    ([{}], "messages[0]"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"content": "hello"}], "messages[0].role"),
    ([{"role": "tool", "content": "hello"}], "messages[0].role"),
    ([{"role": 5, "content": "hello"}], "messages[0].role"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {}}], "messages[0].content"),
    ([{"role": "user", "content": ["hello"]}], PART),
    ([{"role": "user", "content": [{}]}], PART),
    ([{"role": "user", "content": [{"type": "picture"}]}], PART),
    ([{"role": "user", "content": [{"type": "text"}]}], f"{PART}.text"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], f"{PART}.text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}], f"{PART}.more"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], f"{PART}.image_url"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], f"{PART}.image_url"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], f"{PART}.image_url.url"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}], f"{PART}.image_url.url"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "detail": "original"}}]}],
        f"{PART}.image_url",
    ),
    (
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a", "detail": "low"}}]}],
        f"{PART}.video_url.detail",
    ),
    (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "a"}}]}],
        f"{PART}.input_audio.format",
    ),
    (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "a", "format": "aac"}}]}],
        f"{PART}.input_audio.format",
    ),
    (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}]}],
        f"{PART}.input_audio.data",
    ),
    ([{"role": "assistant", "content": [{"type": "image_url", "image_url": data(png())}]}], PART),
    ([{"role": "system", "content": [{"type": "image_url", "image_url": data(png())}]}], PART),
    ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
    ([{"role": "user", "content": "a", "extra": 1}], "messages[0].extra"),
]
URLS = [
    # addresses that are read from nowhere
    *("/etc/hostname", "etc/hostname", "../../etc/hostname", "~/a.png", "C:\\a.png", "a.png", "\\\\host\\a.png"),
    *("file:///etc/hostname", "FILE:/etc/hostname", "file:a.png", "ftp://example.org/a.png", "javascript:1", "blob:1"),
    *("http://example.org/a.png", "https://example.org/a.png", "HTTP://127.0.0.1/", "http://[::1]/a.png"),
    *("data:image/png", "data:image/png;base64,", "data:image/png;base64,!!!", "data:text/html;base64,PGI+"),
    *("data:image/svg+xml,<svg/>", "data:image/png,abc", "data:;base64,aGVsbG8=", "alula-upload:none", "alula-upload:"),
    *("alula-upload:../../etc/hostname", "iVBORw0KGgo" * 10, "\x00", " data:image/png;base64,aGVsbG8="),
]
HIGHLIGHTS: list[tuple[Any, str]] = [
    (5, "alula.highlight"),
    ({}, "alula.highlight"),
    ({"spans": "this"}, "alula.highlight.spans"),
    ({"spans": [5]}, "alula.highlight.spans[0]"),
    ({"spans": [{"text": "this", "weight": "1"}]}, "alula.highlight.spans[0].weight"),
    ({"spans": [{"text": "this", "weight": 2}]}, "alula.highlight.spans[0]"),
    ({"spans": [{"words": "this"}]}, "alula.highlight.spans[0].words"),
    ({"spans": ["a"] * 65}, "alula.highlight.spans"),
    ({"regions": [{}]}, "alula.highlight.regions[0]"),
    ({"regions": [{"box": [1, 2, 3]}]}, "alula.highlight.regions[0].box"),
    ({"regions": [{"box": [1, 2, 3, "4"]}]}, "alula.highlight.regions[0].box[3]"),
    ({"regions": [{"box": [0, 0, 9, 9], "item": -1}]}, "alula.highlight.regions[0].item"),
    ({"regions": [{"polygon": [[0, 0], [1, 1]]}]}, "alula.highlight.regions[0].polygon"),
    ({"regions": [{"box": [0, 0, 9, 9], "polygon": [[0, 0], [1, 1], [2, 0]]}]}, "alula.highlight.regions[0]"),
    ({"spans": ["this"], "strength": "much"}, "alula.highlight.strength"),
    ({"spans": ["this"], "strength": 5.5}, "alula.highlight.strength"),
    ({"spans": ["this"], "strength": -5.5}, "alula.highlight.strength"),
    ({"spans": ["this"], "guidance": -1}, "alula.highlight.guidance"),
    ({"spans": ["this"], "guidance": 10.5}, "alula.highlight.guidance"),
]
OWN: list[tuple[str, Any]] = [
    *(("image_tokens", value) for value in (0, -1, 1.5, "9", True)),
    *(("attention", value) for value in ("yes", 1)),
    *(("deadline", value) for value in (0, -1, "1", True)),
    *(("compare", value) for value in ("base", [5], ["base"] * 8)),
    *(("policies", value) for value in (5, [], {"a": 5})),
    *(("template", value) for value in (5, [])),
]
PROMPTS = [None, 5, [], {}, True, [[]], [None], [True], [-1], ["a", 5], [[1], [-1]], ["a"] * 9, [[1.5]], ""]
BODIES: list[bytes] = [
    # no JSON, or more than JSON may hold
    *(b"", b"{", b"[]", b"5", b"null", b'"text"', b"{'a': 1}", b'{"a": 1,}', b'{"model": "base"} x', b"\xff\xfe{}"),
    *(b'{"model": "base", "model": "other"}', b'{"temperature": NaN}', b'{"temperature": -Infinity}', b'{"a": "\x01"}'),
    *(
        b'{"a": "\\ud800"}',
        b'{"\\udc00": 1}',
        b'{"a": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
        b'{"a": ' * 40 + b"1" + b"}" * 40,
    ),
    b'{"a": [' + b"1," * 250_000 + b"1]}",
]
CHATTING: dict[str, Any] = {"model": "base", "messages": ASK, "max_tokens": 1}


def chats() -> Iterator[tuple[dict[str, Any], str]]:
    """Bodies of chats, and the field that each is wrong in."""
    for field, (kind, more) in FIELDS.items():
        for value in [*WRONG[kind], *more]:
            yield {**CHATTING, field: value}, field
    for value in WRONG["text"]:
        yield {**CHATTING, "model": value}, "model"
    for field, value in UNSUPPORTED.items():
        yield {**CHATTING, field: value}, field
    for field in ("input", "instructions", "max_output_tokens", "Messages", "temprature"):
        yield {**CHATTING, field: 1}, field
    for messages, field in MESSAGES:
        yield {**CHATTING, "messages": messages}, field
    for url in URLS:
        yield {**CHATTING, "messages": shown(url)}, f"{PART}.image_url.url"
    for highlight, field in HIGHLIGHTS:
        yield {**CHATTING, "messages": shown(data(png())), "alula": {"highlight": highlight}}, field
    for field, value in OWN:
        yield {**CHATTING, "alula": {field: value}}, f"alula.{field}"
    for field in ("model", "messages"):
        yield {name: value for name, value in CHATTING.items() if name != field}, field


ALL = list(chats())


def check(response: Any, field: str | None, status: int = 400) -> None:
    """An error in OpenAI's shape that names its field in `param` and in its words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) - {"alula"} == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    if field is not None:
        assert error["param"] is not None, error
        assert error["param"].startswith(field), error
        assert error["message"].startswith(error["param"]), error


def test_every_malformed_chat_names_its_field(client: TestClient) -> None:
    assert len(ALL) > 200
    failed = []
    for body, field in ALL:
        try:
            check(client.post(CHAT, json=body), field)
        except AssertionError as error:
            failed.append(f"{json.dumps(body)[:300]}: {field}: {error}")
    assert not failed, "\n".join(failed)


def test_every_malformed_prompt_names_it(client: TestClient) -> None:
    for prompt in PROMPTS:
        check(client.post(TEXT, json={"model": "base", "max_tokens": 1, "prompt": prompt}), "prompt")
    for field, value in {"logprobs": True, "messages": ASK, "max_completion_tokens": 1}.items():
        check(client.post(TEXT, json={"model": "base", "prompt": "a", field: value}), field)
    check(client.post(TEXT, json={"model": "base", "prompt": "a", "alula": {"attention": True}}), "alula.attention")
    check(client.post(TEXT, json={"model": "base", "prompt": ["a"] * 5, "n": 2}), "prompt")


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:30]))
def test_what_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    for path in (CHAT, TEXT, "/alula/v1/preview"):
        found = client.post(path, content=body, headers={"content-type": "application/json"})
        check(found, None)
        assert found.json()["error"]["code"] == "invalid_json"


def test_fields_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    """What clients send without meaning anything by it, and what an answer carries when it comes back as a turn."""
    idle = {
        **dict.fromkeys(UNSUPPORTED),
        **dict.fromkeys(FIELDS),
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": [],
        "top_k": -1,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_retention": "in_memory",
        "prompt_cache_key": "k",
    }
    first = client.post(CHAT, json={**idle, **CHATTING})
    assert first.status_code == 200, first.text
    turn = {
        **first.json()["choices"][0]["message"],
        "annotations": [],
        "tool_calls": None,
        "audio": None,
        "name": None,
        "reasoning_content": None,
    }
    for said in (turn, {**turn, "content": None}):
        again = client.post(CHAT, json={**CHATTING, "messages": [*ASK, said, *ASK]})
        assert again.status_code == 200, again.text


def test_wrong_ways_to_ask(client: TestClient) -> None:
    check(client.get(CHAT), None, 405)
    check(client.get("/v1/nothing"), None, 404)
    check(client.post("/v1/embeddings", json={}), None, 404)
    check(client.post("/v1/models", json={}), None, 405)
    for method in ("PUT", "TRACE", "PROPFIND"):
        refused = client.request(method, CHAT)
        check(refused, None, 405)
        assert refused.headers["allow"] == "POST"
    assert client.head(CHAT).status_code == 405
    assert client.head("/v1/models").status_code == 200
    assert client.request("TRACE", "/v1/models").headers["allow"] == "GET, HEAD"
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    check(client.post(CHAT, content=gzip.compress(json.dumps(CHATTING).encode()), headers=packed), "Content-Enc", 415)
    check(client.post(CHAT, json={**CHATTING, "model": "none"}), "model", 404)
    check(client.post(CHAT, content=json.dumps(CHATTING)), "Content-Type", 415)
    check(client.post(CHAT, data={"model": "base"}), "Content-Type", 415)
    check(client.post(f"{CHAT}?stream=true", json=CHATTING), None)
    check(client.post("/alula/v1/uploads", json={}), "Content-Type", 415)
    huge = {"content-type": "application/json", "content-length": str(10**12)}
    check(client.post(CHAT, content=b"{}", headers=huge), None, 413)
