"""Records of both shapes and all containers become the same samples, and bad ones say where and why."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from alula.data import (
    AudioError,
    ImageError,
    PlaceholderError,
    RecordError,
    Sample,
    VideoError,
    open_file,
    open_mixture,
    open_source,
)
from alula.data.check import check
from alula.errors import DataError, RecipeError, UsageError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    Image.new("RGB", (4, 4), "green").save(tmp_path / "images" / "green.png")
    return tmp_path


def jsonl(folder, *records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return open_source({"jsonl": str(path)})


def llava(folder, *records, name="data.json", **spec):
    path = folder / name
    path.write_text(json.dumps(list(records), indent=1))
    return open_source({"llava": str(path), **spec})


def seen(sample: Sample) -> list:
    """Roles, texts and the colour of each image."""
    return [
        (m["role"], [p["text"] if p["type"] == "text" else p["image"].load().getpixel((0, 0)) for p in m["content"]])
        for m in sample.messages
    ]


RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def ask(*content):
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]}


def test_messages_with_a_list_of_images(folder) -> None:
    source = jsonl(
        folder,
        {
            "id": 7,
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red, blue"}]},
                {"role": "user", "content": "and <image>\n?"},
                {"role": "assistant", "content": "green"},
            ],
            "images": ["red.png", "blue.png", "green.png"],
            "mood": "fine",
        },
    )
    sample = source[0]
    assert (sample.id, sample.source, sample.meta, str(sample.place)) == (
        "7",
        "data",
        {"mood": "fine"},
        f"{folder}/data.jsonl:1",
    )
    assert seen(sample) == [
        ("system", ["be brief"]),
        ("user", [RED, "what?", BLUE]),
        ("assistant", ["red, blue"]),
        ("user", ["and ", GREEN, "?"]),
        ("assistant", ["green"]),
    ]
    assert [ref.name for ref in sample.images] == ["red.png", "blue.png", "green.png"]


@pytest.mark.parametrize("key", ["image", "path", "url", "base64", "data", "image_url", "file", "absolute"])
def test_inline_images(folder, key: str) -> None:
    content = base64.b64encode((folder / "red.png").read_bytes()).decode()
    part = {
        "base64": {"base64": content},
        "data": {"url": f"data:image/png;base64,{content}"},
        "image_url": {"type": "image_url", "image_url": {"url": "red.png"}},
        "file": {"url": f"file://{folder}/red.png"},
        "absolute": {"image": f"{folder}/red.png"},
    }.get(key, {key: "red.png"})
    sample = jsonl(folder, ask({"type": "image", **part}, {"type": "text", "text": "?"}))[0]
    assert seen(sample)[0] == ("user", [RED, "?"])


@pytest.mark.parametrize("key", ["base64", "image", "url", "images"])
@pytest.mark.parametrize("kind", ["plain", "lines", "data", "data in lines", "url-safe", "unpadded"])
def test_base64_as_people_write_it(folder, key: str, kind: str) -> None:
    Image.effect_noise((20, 20), 90).save(folder / "noise.png")
    data = (folder / "noise.png").read_bytes()
    assert {*"+/"} & {*base64.b64encode(data).decode()}, "the alphabets differ"
    text = {
        "plain": base64.b64encode(data),
        "lines": base64.encodebytes(data).replace(b"\n", b"\r\n"),
        "data": b"data:image/png;base64," + base64.b64encode(data),
        "data in lines": b"data:image/png;base64,\n" + base64.encodebytes(data),
        "url-safe": base64.urlsafe_b64encode(data),
        "unpadded": base64.b64encode(data).rstrip(b"="),
    }[kind].decode()
    part = {"type": "image"} if key == "images" else {"type": "image", key: text}
    record = {**ask(part, {"type": "text", "text": "?"}), **({"images": [text]} if key == "images" else {})}
    (image,) = jsonl(folder, record)[0].images
    assert image.data == data


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("file://{}/a%20b%25.png", "a b%.png"),
        ("file://localhost{}/a%20b%25.png", "a b%.png"),
        ("file:{}/red.png", "red.png"),
        ("FILE://{}/red.png", "red.png"),
        ("file://red.png", "red.png"),
        ("{}/a%20b.png", "a%20b.png"),
    ],
)
def test_file_addresses(folder, address: str, name: str) -> None:
    Image.new("RGB", (4, 4), "blue").save(folder / name)
    sample = jsonl(folder, ask({"type": "image", "url": address.format(folder)}, {"type": "text", "text": "?"}))[0]
    assert sample.images[0].path == f"{folder}/{name}"
    assert seen(sample)[0] == ("user", [BLUE, "?"])


@pytest.mark.parametrize("record", [
    ask({"type": "image", "image": "https://x.org/" + "a" * 5000}),
    ask({"type": "image", "image": "a" * 5000 + ".png"}),
    ask({"type": "image", "image": {"path": "a" * 5000}}),
    ask({"type": "image", "base64": "?" * 5000}),
    ask({"type": "image", "image": {"bytes": "b" * 5000}}),
    ask({"type": "image", "image": ["b" * 5000]}),
    ask({"type": "smell", "smell": "a" * 5000}),
    ask({"type": "text", "text": "a", "k" * 5000: 1}),
    {"messages": [{"role": "r" * 5000, "content": "x"}]},
    {"messages": [USER, {**ANSWER, "weight": "w" * 5000}]},
    {"messages": [], "id": "i" * 5000},
    {"k" * 5000: 1},
    {f"key {number}": number for number in range(500)},
])  # fmt: skip
def test_no_message_quotes_a_value_at_length(folder, record: dict) -> None:
    """A picture as base64 is a megabyte of text, which nobody wants on the terminal."""
    jsonl(folder, record)
    (bad,) = check(folder / "data.jsonl", form="jsonl").bad
    assert len(str(bad)) < 700
    assert max(len(word) for word in str(bad).split("'")[1::2] or [""]) <= 120


def test_indexed_images_take_their_own(folder) -> None:
    record = ask(
        {"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0}, {"type": "text", "text": "?"}
    )
    assert seen(jsonl(folder, {**record, "images": ["red.png", "blue.png"]})[0])[0] == ("user", [BLUE, RED, "?"])
    twice = ask({"type": "image", "index": 0}, {"type": "image", "index": 0}, {"type": "text", "text": "?"})
    with pytest.raises(PlaceholderError):
        jsonl(folder, {**twice, "images": ["red.png", "blue.png"]})[0]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nwhat?", [RED, "what?"]),
        ("what?\n<image>", ["what?", RED]),
        ("a <image> b", ["a ", RED, " b"]),
        ("a\n\n<image>\n\nb", ["a\n", RED, "\nb"]),
    ],
)
def test_where_a_placeholder_stands(folder, value: str, parts: list) -> None:
    record = {
        "id": "x",
        "image": "red.png",
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "ok"}],
    }
    assert seen(llava(folder, record)[0]) == [("user", parts), ("assistant", ["ok"])]


WORD = "put it into <image>"


def test_placeholders_meant_as_words(folder) -> None:
    """Beside media that are all given as parts as they are, elsewhere behind a backslash; in both shapes alike."""
    part, text = {"type": "image", "image": "red.png"}, {"type": "text", "text": r"<image> or \<image>"}
    told = {"role": "assistant", "content": WORD}
    source = jsonl(
        folder,
        {"messages": [{"role": "user", "content": [part, text]}, told]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, told], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "<image>\n\\<image>\n<image>"}, ANSWER], "images": ["red.png"] * 2},
        {"messages": [{"role": "user", "content": "C:\\\\<image>?"}, ANSWER], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "\\\\\\<image>, <video>, <audio>?"}, ANSWER]},
        {"messages": [USER, told]},
    )
    assert [seen(source[index])[:2] for index in (0, 1)] == [
        [("user", [RED, r"<image> or \<image>"]), ("assistant", [WORD])]
    ] * 2
    assert [seen(source[index])[0][1] for index in (2, 3, 4)] == [
        [RED, "<image>", RED],
        ["C:\\", RED, "?"],
        ["\\<image>, <video>, <audio>?"],
    ]
    (bad,) = check(folder / "data.jsonl").bad
    assert bad.line == 6
    assert r'meant as text is written \<image> ("\\<image>" in JSON)' in bad.reason
    turns = [{"from": "human", "value": r"is it \<image>?"}, {"from": "gpt", "value": r"\<image>"}]
    assert seen(llava(folder, {"conversations": turns})[0]) == [
        ("user", ["is it <image>?"]),
        ("assistant", ["<image>"]),
    ]


def test_conversations_in_all_their_dialects(folder) -> None:
    turns = [{"from": "human", "value": "<image>\n<image>\ncompare"}, {"from": "gpt", "value": "ok"}]
    want = [("user", [RED, GREEN, "compare"]), ("assistant", ["ok"])]
    variants = [
        {"image": ["red.png", "green.png"], "conversations": turns},
        {"images": ["red.png", "green.png"], "conversations": turns},
        {
            "image": ["red.png", "green.png"],
            "conversations": [
                {"role": "user", "content": turns[0]["value"]},
                {"role": "assistant", "content": "ok"},
            ],
        },
        {
            "image": ["red.png", "green.png"],
            "conversations": [{"from": "USER", "value": turns[0]["value"]}, {"from": "chatgpt", "value": "ok"}],
        },
    ]
    source = llava(folder, *variants)
    assert [seen(source[index]) for index in range(source.size)] == [want] * len(variants)
    with_system = [
        {"system": "be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "image": None,
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ],
        },
    ]
    source = llava(folder, *with_system)
    assert seen(source[0]) == seen(source[1]) == [("system", ["be brief"]), ("user", ["q"]), ("assistant", ["a"])]
    assert source[0].id == "data-3" or source[0].id.startswith("data-")


def test_image_folder_given_or_beside(folder, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (4, 4), "blue").save(elsewhere / "red.png")
    record = {
        "image": "red.png",
        "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}],
    }
    assert seen(llava(folder, record)[0])[0][1][0] == RED
    assert seen(llava(folder, record, images=str(elsewhere))[0])[0][1][0] == BLUE


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"messages": [{"role": "user", "content": "<image> <image>"}, ANSWER], "images": ["red.png"]},
         PlaceholderError, "2 image placeholder.* but 1 image"),
        ({"messages": [USER, ANSWER], "images": ["red.png"]}, PlaceholderError, "0 image placeholder.* but 1 image"),
        (ask({"type": "image"}), PlaceholderError, "1 image placeholder.* but 0 image"),
        (ask({"type": "image", "url": "https://x.org/a.png"}), ImageError, "web address"),
        (ask({"type": "image", "base64": "???"}), ImageError, "base64"),
        (ask({"type": "image", "image": 5}), ImageError, "path or bytes"),
        (ask({"type": "smell", "smell": "a.rose"}), RecordError, r"content\[0\] is neither"),
        ({"messages": [USER, ANSWER], "video": "a.webp"}, PlaceholderError, "0 video placeholder.* but 1 video"),
        (ask({"type": "audio"}), PlaceholderError, "1 audio placeholder.* but 0 audio"),
        (ask({"type": "video", "video": "https://x.org/a.webp"}), VideoError, "web address"),
        (ask({"type": "audio", "audio": 5}), AudioError, "path or bytes"),
        ({"messages": [USER, ANSWER], "image": "a", "images": ["b"]}, RecordError, "both 'images' and 'image'"),
        ({"messages": []}, RecordError, "at least one turn"),
        ({"messages": "hello"}, RecordError, "at least one turn"),
        ({"text": "hello"}, RecordError, "no key 'messages'"),
        (["a"], RecordError, "JSON object, not list"),
        ({"messages": [{"role": "user"}]}, RecordError, r"messages\[0\] needs the keys"),
        ({"messages": [{"role": "tool", "content": "x"}]}, RecordError, "unknown role 'tool'"),
        ({"messages": [ANSWER]}, RecordError, "assistant speaks where the user should"),
        ({"messages": [USER, USER]}, RecordError, r"messages\[1\]: user speaks where the assistant"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, RecordError, "may only come first"),
        ({"messages": [{"role": "system", "content": "x"}]}, RecordError, "no user turn"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, RecordError, "assistant turn is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "red.png"}]}]},
         RecordError, "cannot hold an image"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, RecordError, "text or a list of parts"),
    ],
)  # fmt: skip
def test_bad_records_say_where_and_why(folder, record, error, message: str) -> None:
    source = jsonl(folder, {"messages": [USER, ANSWER]}, "\n", record)
    with pytest.raises(error, match=message) as caught:
        source[1]
    assert caught.value.where == f"{folder}/data.jsonl:3"
    assert caught.value.place.line == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.message, again.where, again.place) == (
        type(caught.value),
        caught.value.message,
        caught.value.where,
        caught.value.place,
    )


TOLD = {"role": "assistant", "content": "yes"}
CALLS = [{"type": "function", "function": {"name": "zoom", "arguments": {"box": [1, 2]}}}]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [USER, TOLD | {"tool_calls": CALLS}]}, r"messages\[1\]: the key 'tool_calls'"),
        ({"messages": [USER, TOLD | {"tool_calls": CALLS, "content": None}]}, r"messages\[1\]: the key 'tool_calls'"),
        ({"messages": [USER, TOLD | {"reasoning_content": "hm"}]}, "'reasoning_content'"),
        ({"messages": [USER | {"name": "Ann"}, TOLD]}, r"messages\[0\]: the key 'name'"),
        ({"messages": [USER, TOLD | {"loss": False}]}, "'loss'.*\n.*weight: 0"),
        ({"messages": [USER, TOLD | {"weight": 0.5}]}, "'weight' is 0.5"),
        ({"messages": [USER, TOLD | {"train": "false"}]}, "'train' is 'false'"),
        ({"messages": [USER, TOLD | {"train": True, "weight": 0}]}, "'weight' and 'train' disagree"),
        ({"messages": [USER | {"train": True}, TOLD]}, "'train' asks to learn a user turn"),
        ({"messages": [USER, TOLD], "tools": CALLS}, "'tools' of the record"),
        ({"messages": [USER, TOLD], "system": "be brief"}, "'system' of the record.*\n.*first message"),
        ({"messages": [USER, TOLD], "weight": 2}, "'weight' of the record.*\n.*recipe"),
        ({"messages": [USER, TOLD], "chat_template_kwargs": {"enable_thinking": True}}, "'chat_template_kwargs'"),
        (ask({"type": "image", "image": "red.png", "total_pixels": 9}), r"messages\[0\]: content\[0\].*'total_pixels'"),
        (ask({"type": "image", "image": {"path": "red.png", "total_pixels": 28}}), "'total_pixels'"),
        (ask({"type": "image", "image_url": {"url": "red.png", "detail": "low"}}), "'detail'"),
        (ask({"type": "image", "image": "red.png", "text": "a square"}), "'text'"),
        (ask({"type": "image", "image": "red.png", "path": "blue.png"}), "by image and path"),
        (ask({"type": "text", "text": "a", "image": "red.png"}), "'image'"),
        (ask({"type": "video", "video": "a.webp", "fps": 2}), "'fps'"),
    ],
)  # fmt: skip
def test_keys_that_change_what_is_learnt_are_refused_by_name(folder, record, named: str) -> None:
    source = jsonl(folder, record)
    with pytest.raises(RecordError, match=named) as caught:
        source[0]
    assert caught.value.where == f"{folder}/data.jsonl:1"
    assert caught.value.remedy
    (bad,) = check(folder / "data.jsonl").bad
    assert (bad.line, caught.value.message in bad.reason, caught.value.remedy in bad.reason) == (1, True, True)


def test_turns_of_conversations_are_held_to_the_same_keys(folder) -> None:
    asked, told = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
    source = llava(
        folder,
        {"conversations": [asked, told | {"weight": 0}, asked, told]},
        {"conversations": [asked, told | {"tool_calls": CALLS}]},
        {"conversations": [asked, told], "tools": CALLS},
        {"conversations": [asked, told | {"content": "no"}]},
        {"conversations": [asked, told], "tools": "[]"},
    )
    assert [message.get("train") for message in source[0].messages] == [None, False, None, None]
    for number, named in enumerate(["'tool_calls'", "'tools'", "both 'value' and 'content'"], 1):
        with pytest.raises(RecordError, match=named):
            source[number]
    assert len(source[4].messages) == 2
    assert [record.line is not None for record in check(folder / "data.json").bad] == [True] * 3


def test_keys_that_teach_nothing_pass(folder) -> None:
    """Notes, keys that a table holds for the sake of other rows, and columns of the record."""
    notes = {"id": 3, "timestamp": "2026", "metadata": {"by": "me"}, "tool_calls": None, "name": "", "weight": 1.0}
    notes["function_call"] = {"name": None, "arguments": None}
    part = {"type": "image", "image": "red.png", "text": None, "id": "p", "max_pixels": None}
    record = {
        "source": "web",
        "metadata": {"tools": CALLS},
        "answer": "yes",
        "tools": [],
        "train": True,
        "score": 0.5,
        "messages": [USER | {"content": [part], "train": False}, TOLD | notes, USER, TOLD | {"train": False}],
    }
    sample = jsonl(folder, record)[0]
    assert [message.get("train") for message in sample.messages] == [None, None, None, False]
    assert sample.meta["metadata"] == {"tools": CALLS}
    assert check(folder / "data.jsonl").ok
    jsonl(folder, {"messages": [USER, TOLD | {"weight": 0}]})
    (bad,) = check(folder / "data.jsonl").bad
    assert bad.kind == "unsupervised"


def test_unknown_speaker_lists_the_known_ones(folder) -> None:
    with pytest.raises(RecordError, match="human, user, gpt"):
        llava(folder, {"conversations": [{"from": "martian", "value": "x"}]})[0]


def test_lines_are_found_again(folder) -> None:
    first = json.dumps(
        {"id": "a", "messages": [{**USER, "content": "\u00e4\u00f6 \U0001f600"}, ANSWER]}, ensure_ascii=False
    )
    second = json.dumps({"id": "b", "messages": [USER, ANSWER]})
    text = "\ufeff" + "\r\n".join(["", first, "  ", "{broken", second])
    path = folder / "data.jsonl"
    path.write_bytes(text.encode())
    source = open_source({"jsonl": str(path)})
    assert source.size == 3
    assert seen(source[0])[0] == ("user", ["\u00e4\u00f6 \U0001f600"])
    with pytest.raises(RecordError, match=r"data\.jsonl:4: not valid JSON"):
        source[1]
    assert (source[2].id, source[2].place.line) == ("b", 5)
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(RecordError, match="UTF-8"):
        open_source({"jsonl": str(path)})[0]


def test_array_elements_are_found_again(folder) -> None:
    conversation = [{"from": "human", "value": "\u00e4 \U0001f600 ]},{["}, {"from": "gpt", "value": "a"}]
    path = folder / "data.json"
    for mark in ("", "\ufeff"):
        text = json.dumps([{"id": n, "conversations": conversation} for n in range(5)], indent=1, ensure_ascii=False)
        path.write_bytes((mark + "\n" + text).encode())
        source = open_source({"llava": str(path)})
        assert [source[n].id for n in (4, 0, 2)] == ["4", "0", "2"]
        lines = text.splitlines()
        starts = [number + 2 for number, line in enumerate(lines) if line == " {"]
        assert [source[n].place.line for n in range(5)] == starts


def test_records_are_not_held_in_memory(folder) -> None:
    source = jsonl(folder, *[{"id": n, "messages": [{**USER, "content": "x" * 10_000}, ANSWER]} for n in range(50)])
    assert len(pickle.dumps(source)) < 5_000  # what a DataLoader worker gets
    assert pickle.loads(pickle.dumps(source))[49].id == "49"


def test_a_file_that_changes_is_noticed(folder) -> None:
    source = jsonl(folder, {"messages": [USER, ANSWER]})
    with open(folder / "data.jsonl", "a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match="changed while"):
        source[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no records"),
        ("[]", "no records"),
        ("[{}, {", "does not parse"),
        ("[{} {}]", "lacks a comma"),
        ("[{}", "cut off"),
    ],
)
def test_files_unusable_as_a_whole(folder, text: str, message: str) -> None:
    path = folder / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_source({"llava": str(path)})


def test_missing_files(folder) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be read: No such file.*\n.*check the path$"):
        open_source({"jsonl": str(folder / "nothing.jsonl")})


@pytest.mark.parametrize(
    "spec",
    [
        {"jsonl": "vis/dat.jsonl"},
        {"llava": "vis/dat.json"},
        {"coco": "vis/dat.json"},
        {"dataset": "vis/dat"},
        {"dataset": "vis/dat.parquet"},
    ],
    ids=str,
)
def test_a_relative_path_that_leads_nowhere(folder, monkeypatch: pytest.MonkeyPatch, spec: dict[str, str]) -> None:
    monkeypatch.chdir(folder)
    jsonl(folder, {"messages": [USER, ANSWER]})
    file = next(folder.glob("*.jsonl")).name
    remedy = f"check the path: relative ones start from the working directory, {Path.cwd()}"
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert caught.value.remedy == remedy
    for key, mixture in (
        ("data.sources.1", {"sources": [{"jsonl": file}, spec]}),
        (
            "data.text_replay.sources.0",
            {"sources": [{"jsonl": file}], "text_replay": {"ratio": 0.5, "sources": [spec]}},
        ),
    ):
        with pytest.raises(DataError) as caught:
            open_mixture(mixture)
        assert str(caught.value).startswith(f"{key}: ")
        assert caught.value.remedy == remedy


def test_what_a_file_holds_is_found_out(folder) -> None:
    jsonl(folder, "{broken\n", {"messages": [USER, ANSWER]})
    llava(folder, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    (folder / "lines.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}]}) + "\n")
    assert open_file(folder / "data.jsonl")[1].messages[0]["role"] == "user"
    assert open_file(folder / "data.json")[0].messages[1]["role"] == "assistant"
    assert open_file(folder / "lines.jsonl")[0].messages[0]["role"] == "user"
    (folder / "other.json").write_text('[{"question": "?"}]')
    with pytest.raises(DataError, match="none of the first records"):
        open_file(folder / "other.json")
    with pytest.raises(UsageError, match="unknown format"):
        open_file(folder / "data.json", form="csv")
    with pytest.raises(UsageError, match="no such folder"):
        open_file(folder / "data.json", images=folder / "nowhere")


@pytest.mark.parametrize(
    ("spec", "where", "message"),
    [
        ({"jsonl": "a", "foo": 1}, "source.foo", "unknown key"),
        ({"json": "a"}, "source", "jsonl, llava, dataset, coco, webdataset, digits, microworld"),
        ({"jsonl": "a", "max_pixels": 0}, "source.max_pixels", "greater than 0"),
        ({"jsonl": "a", "weight": -1}, "source.weight", "greater than 0"),
        ({"llava": 3}, "source.llava", "path"),
        ({"microworld": "smell"}, "source.microworld", "'text', 'visual', 'caption', .*'sound_caption'"),
        ({"microworld": "text", "split": "dev"}, "source.split", "'train', 'test' or 'unseen'"),
    ],
)
def test_source_specs_are_validated(spec: dict, where: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        open_source(spec)
    assert caught.value.where == where
    assert caught.value.exit_code == 2


def test_unknown_key_names_the_legal_ones() -> None:
    with pytest.raises(RecipeError, match=r"legal keys: .*limit.*jsonl"):
        open_source({"jsonl": "a", "imgs": "b"})


def test_relative_paths_start_at_the_recipe(folder) -> None:
    jsonl(folder, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]})
    source = open_source({"jsonl": "data.jsonl", "limit": 1, "name": "mine"}, base=folder)
    assert (source.size, source.name, source[0].source) == (1, "mine", "mine")
    with pytest.raises(IndexError):
        source[1]


def test_words_alone_are_the_same_conversations_without_their_media(folder) -> None:
    records = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "which?"}, picture]}, ANSWER]}
        for picture in ({"type": "image", "image": "red.png"}, {"type": "image", "image": "missing.png"})
    ]
    whole = jsonl(folder, *records, {"messages": [USER, ANSWER]})
    told = open_source({"jsonl": str(folder / "data.jsonl"), "text_only": True})
    assert told.size == 3
    for index in range(3):
        assert told[index].id == whole[index].id
        assert not told[index].media()
    assert seen(told[0]) == [("user", ["which?"]), ("assistant", ["yes"])]
    assert whole[0].images  # the source itself is left as it was
    assert seen(told[2]) == seen(whole[2])
    image = {"type": "image", "image": "red.png"}
    this, red, dish, spaced, blue = (
        {"type": "text", "text": text} for text in ("Is this", "red", "dish?", "Is ", "blue?")
    )
    asked = [
        {"messages": [{"role": "user", "content": content}, ANSWER]}
        for content in ([this, image, red, dish], [spaced, image, image, blue])
    ]
    jsonl(folder, *asked, name="mid.jsonl")
    worded = open_source({"jsonl": str(folder / "mid.jsonl"), "text_only": True})
    assert seen(worded[0])[0] == ("user", ["Is this", " red", "dish?"])  # a picture stood between two words of these
    assert seen(worded[1])[0] == ("user", ["Is ", "blue?"])
    words = {"type": "text", "text": "seen?"}
    jsonl(folder, {"messages": [USER], "browsed": [{"role": "user", "content": [image, words]}]}, name="browsed.jsonl")
    browsed = open_source({"jsonl": str(folder / "browsed.jsonl"), "text_only": True})[0].meta["browsed"]
    assert browsed == [{"role": "user", "content": [words]}]
    nothing = {"messages": [{"role": "user", "content": [image]}, ANSWER]}
    jsonl(folder, nothing, name="shown.jsonl")
    with pytest.raises(RecordError, match=r"shown.jsonl:1.*user turn is empty"):
        open_source({"jsonl": str(folder / "shown.jsonl"), "text_only": True})[0]


def test_words_alone_may_be_replayed() -> None:
    """What is promised to be text is held to it, and media that were taken out are none."""
    spec = {
        "sources": [{"microworld": "caption"}],
        "text_replay": {"ratio": 0.5, "sources": [{"microworld": "visual"}]},
    }
    shown = open_mixture(spec)
    spec["text_replay"]["sources"][0]["text_only"] = True
    told = open_mixture(spec)
    with pytest.raises(RecordError, match="holds an image"):
        [shown[n] for n in range(32)]
    assert 8 < sum(not told[n].media() for n in range(32)) < 24
