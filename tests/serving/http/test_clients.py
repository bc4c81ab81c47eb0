"""The clients that people have, against a real server on a port: OpenAI's package, LiteLLM, curl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest

from tests.serving.http.conftest import ASK, b64, data, png, shown, wav

TOKEN = "a-token-of-the-tests"
SOUND = [
    {
        "role": "user",
        "content": [
            {"type": "input_audio", "input_audio": {"data": b64(wav()), "format": "wav"}},
            {"type": "text", "text": "what is this ?"},
        ],
    }
]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as made:
        yield made


def test_openai_asks_whole_and_in_pieces(client: openai.OpenAI) -> None:
    for model, messages in (("base", ASK), ("base+wings", shown(data(png()))), ("senses", SOUND)):
        given: dict[str, Any] = {"model": model, "messages": messages, **GREEDY}
        whole = client.chat.completions.create(**given)
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 6
        assert whole.choices[0].finish_reason in ("stop", "length")
        stream = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
        pieces = list(stream)
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert said == whole.choices[0].message.content
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_reads_what_else_there_is(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "base+wings", "senses"]
    assert client.models.retrieve("base+wings").id == "base+wings"
    answer = client.chat.completions.create(
        model="base",
        messages=shown(data(png())),  # type: ignore[arg-type]
        n=2,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        stop=["unheard"],
        max_completion_tokens=4,
        extra_body={"alula": {"image_tokens": 4, "attention": True}},
    )
    assert answer.choices[1].logprobs is not None
    assert answer.choices[1].logprobs.content is not None
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2
    assert answer.alula["image_tokens"]["kept"] == 4  # type: ignore[attr-defined]
    text = client.completions.create(model="base", prompt="birds", max_tokens=3, echo=False, logprobs=1)
    assert text.choices[0].logprobs is not None
    # a conversation goes on with what came back
    turns: Any = [*ASK, answer.choices[0].message, *ASK]
    assert client.chat.completions.create(model="base", messages=turns, max_tokens=2).choices


def test_openai_tells_errors_by_their_class(client: openai.OpenAI, url: str) -> None:
    wrong: Any = {"messages": ASK, "model": "base"}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**wrong, "temperature": 5})
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**wrong, "model": "none"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**wrong, tools=[{"type": "function", "function": {"name": "f"}}])


def test_openai_without_waiting(url: str) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN) as client:
            given: dict[str, Any] = {"model": "base", "messages": shown(data(png())), **GREEDY}
            whole = await client.chat.completions.create(**given)
            stream = await client.chat.completions.create(**given, stream=True)
            pieces = [piece.choices[0].delta.content or "" async for piece in stream]
            return [whole.choices[0].message.content or "", "".join(pieces)]

    whole, streamed = anyio.run(both)
    assert whole == streamed


LITELLM = """
import json, sys
import litellm
url, token, picture = sys.argv[1:]
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "what is this ?"}]
given = dict(model="openai/base", api_base=url, api_key=token, messages=[{"role": "user", "content": content}],
             temperature=0, max_tokens=6)
whole = litellm.completion(**given)
pieces = list(litellm.completion(**given, stream=True, stream_options={"include_usage": True}))
said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
try:
    litellm.completion(**{**given, "model": "openai/none"})
    failed = "nothing"
except litellm.NotFoundError:
    failed = "NotFoundError"
print(json.dumps([whole.choices[0].message.content, said, whole.usage.total_tokens, failed]))
"""


@pytest.mark.slow
def test_litellm(url: str, client: openai.OpenAI) -> None:
    """In a process of its own: it begins threads, and reads a list of prices from its own files when told to."""
    done = subprocess.run(
        [sys.executable, "-c", LITELLM, f"{url}/v1", TOKEN, data(png())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, streamed, total, failed = json.loads(done.stdout.splitlines()[-1])
    known: Any = {"model": "base", "messages": shown(data(png())), **GREEDY}
    answer = client.chat.completions.create(**known)
    assert answer.usage is not None
    assert whole == streamed == answer.choices[0].message.content
    assert (total, failed) == (answer.usage.total_tokens, "NotFoundError")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str, tmp_path: Path) -> None:
    def curl(path: str, *options: str) -> str:
        key = f"Authorization: Bearer {TOKEN}"
        command = ["curl", "--silent", "--noproxy", "*", "-H", key, f"{url}{path}", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    picture = tmp_path / "a.png"
    picture.write_bytes(png())
    made = json.loads(curl("/alula/v1/uploads", "-F", f"file=@{picture}"))
    body = json.dumps({"model": "base", "messages": shown(f"alula-upload:{made['id']}"), **GREEDY})
    typed = ("-H", "Content-Type: application/json")
    whole = json.loads(curl("/v1/chat/completions", *typed, "-d", body))
    streamed = curl("/v1/chat/completions", *typed, "-N", "-d", json.dumps({**json.loads(body), "stream": True}))
    lines = [line for line in streamed.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    said = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert said == whole["choices"][0]["message"]["content"]
    assert json.loads(curl("/v1/chat/completions", "-d", body))["error"]["param"] == "Content-Type"
    assert "alula_models 3.0" in curl("/metrics")
