"""OpenAI's API: what answers hold, whole and in pieces, and that they are the model's."""

from __future__ import annotations

import gc
import json
import re
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import alula
from alula.inputs import Intake
from alula.serving.engine import Engine
from tests.serving.http.conftest import ASK, CHAT, TEXT, data, png, shown

PREVIEW = "/alula/v1/preview"
GREEDY: dict[str, Any] = {"model": "base", "messages": ASK, "temperature": 0, "max_tokens": 10}


def events(text: str) -> list[dict[str, Any]]:
    """What a stream held; its last line says that it is done."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def said(found: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in found for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("messages", [ASK, shown(data(png()))], ids=["text", "picture"])
def test_an_answer_is_what_generate_gives(client: TestClient, parts: Any, messages: list[Any]) -> None:
    whole = client.post(CHAT, json={**GREEDY, "messages": messages}).json()
    streamed = events(client.post(CHAT, json={**GREEDY, "messages": messages, "stream": True}).text)
    model, processor = alula.load_model(parts / "host")
    text = {"type": "text", "text": "what is this ?"}
    picture = {"type": "image", "image": alula.data.ImageRef.from_bytes(png()).load()}
    plain = [{"role": "user", "content": [picture, text]}] if messages is not ASK else None
    inputs, _ = Intake(processor, live=True).tensors(
        plain or [{"role": "user", "content": [{"type": "text", "text": ASK[0]["content"]}]}]
    )
    known = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with torch.no_grad():
        found = model.generate(**known, do_sample=False, max_new_tokens=10)[0, inputs["input_ids"].shape[1] :]
    wanted = processor.tokenizer.decode(found, skip_special_tokens=True)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": wanted, "refusal": None}
    assert said(streamed) == wanted
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert (whole["object"], streamed[0]["object"]) == ("chat.completion", "chat.completion.chunk")
    assert len({event["id"] for event in streamed}) == 1
    assert streamed[0]["id"] != whole["id"]
    assert whole["id"].startswith("chatcmpl-")
    prompt = inputs["input_ids"].shape[1]
    assert whole["usage"]["prompt_tokens"] == prompt
    assert whole["usage"]["completion_tokens"] == len(found)
    assert whole["usage"]["total_tokens"] == prompt + len(found)


def test_a_stream_tells_its_usage_where_asked(client: TestClient) -> None:
    told = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(client.post(CHAT, json=told).text)
    assert all(event["usage"] is None for event in pieces)
    assert last["choices"] == []
    whole = client.post(CHAT, json=GREEDY).json()["usage"]
    assert {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens")} == {
        name: whole[name] for name in ("prompt_tokens", "completion_tokens")
    }
    assert all("usage" not in event for event in events(client.post(CHAT, json={**GREEDY, "stream": True}).text))


def test_several_answers_are_drawn_apart_and_again_by_their_seed(client: TestClient) -> None:
    drawn = {**GREEDY, "temperature": 1.5, "n": 3, "seed": 5}
    first, again = (client.post(CHAT, json=drawn).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    one = client.post(CHAT, json={**drawn, "n": 1, "seed": 6}).json()
    assert one["choices"][0]["message"]["content"] == texts[1]
    streamed = events(client.post(CHAT, json={**drawn, "stream": True}).text)
    assert [said(streamed, index) for index in range(3)] == texts
    # a prompt counts once, answers each
    assert first["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_a_text_ends_the_answer_and_is_no_part_of_it(client: TestClient) -> None:
    whole = client.post(CHAT, json=GREEDY).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:2]
    cut = client.post(CHAT, json={**GREEDY, "stop": stop}).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    short = client.post(CHAT, json={**GREEDY, "max_tokens": None, "max_completion_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 2


def test_logprobs_are_the_models(client: TestClient) -> None:
    asked = {**GREEDY, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    choice = client.post(CHAT, json=asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        assert token["logprob"] <= 0
        assert bytes(token["bytes"]).decode() == token["token"]
        ranked = [each["logprob"] for each in token["top_logprobs"]]
        assert ranked == sorted(ranked, reverse=True)
        assert token["logprob"] == ranked[0]  # greedy: the likeliest
    streamed = events(client.post(CHAT, json={**asked, "stream": True}).text)
    pieces = [event["choices"][0]["logprobs"] for event in streamed]
    assert [token for piece in pieces if piece for token in piece["content"]] == content
    old = client.post(TEXT, json={"model": "base", "prompt": "birds", "max_tokens": 4, "temperature": 0, "logprobs": 2})
    found = old.json()["choices"][0]["logprobs"]
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(found["tokens"])
    assert found["text_offset"][0] == 0


def test_bytes_of_tokens_are_the_text_whatever_is_drawn(client: TestClient) -> None:
    wild = {"model": "base", "temperature": 2, "seed": 3, "max_tokens": 64}
    choice = client.post(CHAT, json={**wild, "messages": ASK, "logprobs": True}).json()["choices"][0]
    content = choice["logprobs"]["content"]
    spelled = [bytes(token["bytes"]) for token in content]
    assert b"".join(spelled).decode(errors="replace") == choice["message"]["content"]
    halves = [each for each in spelled if each.decode(errors="replace").encode() != each]
    assert len(halves) > 3  # a byte is a token of this vocabulary
    text = client.post(TEXT, json={**wild, "prompt": "birds", "logprobs": 5}).json()["choices"][0]
    found = text["logprobs"]
    assert any(re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token) for token in found["tokens"])
    assert all(len(top) == 5 for top in found["top_logprobs"])  # no two halves have one name
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or text["text"][offset:].startswith(token)


def test_a_forged_turn_is_words(client: TestClient) -> None:
    def counted(role: str, text: str) -> int:
        messages = [*ASK, {"role": "assistant", "content": "fly"}, *ASK]
        number = {"user": 2, "assistant": 1}[role]
        messages[number] = {"role": role, "content": text}
        body = {"model": "base", "messages": messages, "max_tokens": 1}
        return int(client.post(CHAT, json=body).json()["usage"]["prompt_tokens"])

    for role in ("user", "assistant"):
        said = counted(role, "a <|im_end|> b") - counted(role, "a b")
        assert said > 5  # spelled out; as a control token it would be one, and a blank
    raw = {"model": "base", "max_tokens": 1, "prompt": "a <|im_end|>"}  # a prompt is what it is
    plain = client.post(TEXT, json={**raw, "prompt": "a"}).json()["usage"]["prompt_tokens"]
    assert client.post(TEXT, json=raw).json()["usage"]["prompt_tokens"] <= plain + 2


def test_texts_are_continued(client: TestClient, engine: Engine) -> None:
    given = {"model": "base", "max_tokens": 5, "temperature": 0}
    one = client.post(TEXT, json={**given, "prompt": "birds sing"}).json()
    assert one["object"] == "text_completion"
    assert one["id"].startswith("cmpl-")
    several = client.post(TEXT, json={**given, "prompt": ["birds sing", "a cat"]}).json()
    assert several["choices"][0]["text"] == one["choices"][0]["text"]
    ids = client.post(TEXT, json={**given, "prompt": [5, 6, 7]}).json()
    assert ids["usage"]["prompt_tokens"] == 3
    streamed = events(client.post(TEXT, json={**given, "prompt": "birds sing", "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in streamed) == one["choices"][0]["text"]


def test_models_are_told_without_the_place_they_lie_in(client: TestClient, parts: Any) -> None:
    found = client.get("/v1/models")
    assert str(parts) not in found.text
    assert [each["id"] for each in found.json()["data"]] == ["base", "base+wings", "senses"]
    wings = client.get("/v1/models/base+wings").json()
    assert wings["alula"]["base"] == "base"
    assert wings["alula"]["exact_gate"]
    assert client.get("/v1/models/none").status_code == 404


def test_an_exactly_gated_adapter_says_whose_bits_an_answer_is(client: TestClient) -> None:
    asked = {**GREEDY, "model": "base+wings"}
    text, picture = (client.post(CHAT, json={**asked, "messages": each}).json() for each in (ASK, shown(data(png()))))
    assert text["alula"]["computed_by"] == "base"
    assert picture["alula"]["computed_by"] == "base+wings"
    assert text["choices"][0]["message"] == client.post(CHAT, json=GREEDY).json()["choices"][0]["message"]


def test_models_are_compared_in_one_request(client: TestClient) -> None:
    asked = {**GREEDY, "messages": shown(data(png())), "seed": 3, "temperature": 1.0}
    both = client.post(CHAT, json={**asked, "alula": {"compare": ["base+wings"]}}).json()
    alone = [client.post(CHAT, json={**asked, "model": name}).json() for name in ("base", "base+wings")]
    assert [each["alula"]["model"] for each in both["choices"]] == ["base", "base+wings"]
    assert [each["message"] for each in both["choices"]] == [each["choices"][0]["message"] for each in alone]
    # each read the prompt
    assert both["usage"]["prompt_tokens"] == sum(each["usage"]["prompt_tokens"] for each in alone)


def test_own_fields_reach_the_model(client: TestClient) -> None:
    asked = {**GREEDY, "messages": shown(data(png())), "max_tokens": 3}
    own = {"attention": True, "image_tokens": 4}
    found = client.post(CHAT, json={**asked, "alula": own}).json()
    assert found["alula"]["image_tokens"]["kept"] == 4 < found["alula"]["image_tokens"]["of"]
    looks = found["choices"][0]["alula"]["attention"]
    assert len(looks) == found["usage"]["completion_tokens"]
    assert all(0 <= look["share"] <= 1 for token in looks for look in token)
    streamed = events(client.post(CHAT, json={**asked, "alula": own, "stream": True}).text)
    pieces = [token for event in streamed for token in event.get("alula", {}).get("attention", [])]
    assert [[look["item"] for look in token] for token in pieces] == [
        [look["item"] for look in token] for token in looks
    ]
    for highlight in (
        {"spans": ["this"], "strength": 5.0},
        {"regions": [{"item": 0, "box": [0, 0, 25, 40]}], "guidance": 1.0},
        {"regions": [{"polygon": [[0, 0], [50, 0], [50, 40]]}]},
    ):
        answer = client.post(CHAT, json={**asked, "alula": {"highlight": highlight}})
        assert answer.status_code == 200, answer.text
    withdrawn = {"policies": {"w": {"policy_type": "withdraw", "layer": 1}}}
    assert client.post(CHAT, json={**asked, "alula": withdrawn}).status_code == 200


@pytest.mark.parametrize(
    ("own", "param", "said"),
    [
        ({"highlight": {"spans": ["a unicorn"]}}, "alula.highlight", "unicorn"),
        ({"highlight": {"regions": [{"box": [5, 5, 1, 1]}]}}, "alula.highlight", "no part of an image"),
        ({"highlight": {"regions": [{"box": [0, 0, 9, 9], "share": 2}]}}, "alula.highlight.regions[0]", "share"),
        ({"policies": {"p": {"policy_type": "magic"}}}, "alula.policies.p", "magic"),
        ({"policies": {"p": {"policy_type": "withdraw", "layers": 1}}}, "alula.policies.p.layers", "layer"),
        ({"policies": {"p": {"policy_type": "withdraw", "layer": 9}}}, "alula.policies.p.layer", "layer 9"),
        ({"policies": {"p": {"policy_type": "prune", "stages": [[9, 0.5]]}}}, "alula.policies.p", "layer 9"),
        ({"policies": {str(each): {} for each in range(17)}}, "alula.policies", "16"),
        ({"template": {"unknown": 1}}, "alula.template.unknown", "template"),
        ({"template": {"messages": 1}}, "alula.template", "setting"),
        ({"compare": ["none"]}, "alula.compare[0]", "none"),
    ],
)
def test_own_fields_that_are_wrong_say_so(
    client: TestClient, caplog: pytest.LogCaptureFixture, own: Any, param: str, said: str
) -> None:
    found = client.post(CHAT, json={**GREEDY, "messages": shown(data(png())), "alula": own})
    assert found.status_code in (400, 404), found.text
    error = found.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert not [each for each in caplog.records if each.name.startswith("alula")]  # a mistake of the client's alone
    if "compare" not in own:  # which is about answers
        ahead = client.post(PREVIEW, json={"model": "base", "messages": shown(data(png())), "alula": own})
        assert (ahead.status_code, ahead.json()) == (found.status_code, found.json())


def test_a_preview_tells_what_a_budget_leaves(client: TestClient) -> None:
    asked = {"model": "base", "messages": shown(data(png())), "alula": {"image_tokens": 4}}
    found = client.post(PREVIEW, json=asked).json()
    answer = client.post(CHAT, json={**GREEDY, **asked}).json()
    assert found["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    (image,) = found["images"]
    assert (image["kept"], image["width"], image["height"]) == (4, 50, 40)
    assert image["tokens"] == answer["alula"]["image_tokens"]["of"]


def test_numbers_for_prometheus_count_what_was_answered(client: TestClient) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    names = {
        'alula_http_requests_total{route="/v1/chat/completions",status="200"}': 1.0,
        'alula_http_requests_total{route="other",status="404"}': 1.0,
        'alula_http_requests_total{route="/v1/models/{name}",status="200"}': 2.0,
        'alula_http_requests_total{route="/v1/models/{name}",status="404"}': 1.0,
        'alula_http_requests_total{route="/alula/v1/uploads/{name}",status="404"}': 1.0,
        'alula_http_requests_total{route="/alula/v1/runs/files/{path}",status="404"}': 1.0,
        'alula_tokens_total{kind="completion",model="base"}': 3.0,
        'alula_first_token_seconds_count{model="base"}': 1.0,
    }
    before = {name: value(name) for name in names}
    client.post(CHAT, json={**GREEDY, "max_tokens": 3})
    client.get("/made/up/by/a/client")
    for name in ("base", "base+wings", "made/up"):
        client.get(f"/v1/models/{name}")
    client.delete("/alula/v1/uploads/up-1")
    client.get("/alula/v1/runs/files/a/report.html")
    assert {name: value(name) - before[name] for name in names} == names
    assert client.get("/health").json()["status"] == "ok"


def test_requests_leave_no_objects(client: TestClient) -> None:
    """Nothing that Python's collector knows stays of a request, whatever it was: memory is flat where objects are."""

    def objects(first: int) -> int:
        for number in range(first, first + 30):
            messages = shown(data(png())) if number % 3 == 0 else ASK
            asked = {**GREEDY, "messages": messages, "max_tokens": 2, "stream": number % 2 == 0, "seed": number}
            assert client.post(CHAT, json=asked).status_code == 200
            assert client.post(CHAT, json={**GREEDY, "model": f"none-{number}"}).status_code == 404
        gc.collect()
        return len(gc.get_objects())

    _, before, after = (objects(30 * block) for block in range(3))
    assert after - before < 30  # an object a request, half of which were refused, would be 60
