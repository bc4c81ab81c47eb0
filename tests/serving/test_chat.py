"""alula chat: turns with history and images, in a terminal and down a pipe."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from typer.testing import CliRunner

import alula
from alula.cli import chat as command
from alula.errors import AlulaError, HostError, UsageError
from alula.hosts import Host, build_host, load_host, save_host
from alula.hosts.decoding import Decoding
from alula.serving import Conversation, Reply, Terminal
from tests.hosts import tiny
from tests.silence import silenced

RED, BLUE = Image.new("RGB", (50, 40), (255, 0, 0)), Image.new("RGB", (30, 70), (0, 0, 255))
SHORT: dict[str, int] = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text model, a host built on it, a Wings adapter for the host, and pictures, good and bad."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.decoder("qwen3").save_pretrained(folder / "llm")
    tiny.tokenizer().save_pretrained(folder / "llm")
    save_host(build_host(str(folder / "llm"), tiny.TOWERS["siglip"][0]), folder / "host")
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue one.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def host(parts: Path) -> Host:
    return load_host(parts / "host")


def ask(conversation: Conversation, text: str) -> tuple[Reply, str]:
    pieces: list[str] = []
    reply = conversation.ask(text, pieces.append)
    return reply, "".join(pieces)


def content(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]


@torch.no_grad()
def test_the_answer_is_what_generate_gives_with_the_whole_history(host: Host) -> None:
    conversation = Conversation(*host, **SHORT)
    turns: list[dict[str, Any]] = []
    for text, images in (("what?", [RED]), ("left or right?", []), ("how many?", [BLUE, RED])):
        turns.append({"role": "user", "content": content(text, *images)})
        inputs = host.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = host.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        for image in images:
            conversation.attach(image)
        reply, streamed = ask(conversation, text)
        expected = host.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.text == streamed == expected
        assert reply.tokens == len(ids)
        assert not reply.interrupted
        turns.append({"role": "assistant", "content": content(expected)})
    assert conversation.messages == turns
    assert conversation.waiting == []


def test_what_is_attached_takes_part(host: Host) -> None:
    with silenced(host.model, host.processor.tokenizer.eos_token_id):
        reply, streamed = ask(Conversation(*host, **SHORT), "what?")
    assert (reply.text, streamed, reply.tokens) == ("", "", 1)


def test_answers_stop_where_those_of_an_evaluation_do(parts: Path) -> None:
    """At the tokenizer's end token too, where the model's own settings name another."""
    model, tokenizer = alula.load_model(parts / "llm")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what?"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    reply, _ = ask(Conversation(model, tokenizer, **SHORT), "what?")
    assert reply.tokens == ids.index(ids[2]) + 1


def test_reset_forgets_turns_and_images_but_not_the_system_prompt(host: Host) -> None:
    conversation = Conversation(*host, **SHORT)
    conversation.instruct("be brief")
    first, _ = ask(conversation, "what?")
    ask(conversation, "and?")
    conversation.attach(RED)
    conversation.reset()
    assert (conversation.messages, conversation.waiting) == ([], [])
    assert ask(conversation, "what?")[0].text == first.text
    conversation.instruct(None)
    assert ask(conversation, "what?")[0].text != first.text


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(host: Host) -> None:
    conversation = Conversation(*host, max_new_tokens=200)
    heard: list[str] = []

    def listen(text: str) -> None:
        heard.append(text)
        if len(heard) == 1:
            raise KeyboardInterrupt

    reply = conversation.ask("what do you see?", listen)
    assert reply.interrupted
    assert 0 < reply.tokens < 200
    assert reply.text == "".join(heard)
    assert conversation.messages[-1]["content"] == content(reply.text)
    assert not ask(conversation, "go on")[0].interrupted


def test_sampling_is_seeded(host: Host) -> None:
    def drawn(seed: int) -> str:
        return ask(Conversation(*host, Decoding.at(1.5, seed), max_new_tokens=12), "what?")[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(host: Host) -> None:
    conversation = Conversation(*host, **SHORT)
    conversation.attach(RED)
    with pytest.raises(HostError, match=r"U\+FDD3, which is no character"):
        conversation.ask("a literal <image> and \ufdd3 here", print)
    with pytest.raises(HostError, match=r"tokens long, the model takes 512[\s\S]*start over"):
        conversation.ask("very long " * 512, print)
    assert conversation.messages == []
    assert conversation.waiting == [("image", RED)]
    with pytest.raises(UsageError, match="negative"):
        Decoding.at(-1)


def test_a_brought_host_sees_images_as_its_processor_says() -> None:
    """Gemma-3's token types let the tokens of an image attend to one another; without them it answers otherwise."""
    model, processor = tiny.gemma3_host()
    first: list[Any] = []
    model.model.register_forward_pre_hook(lambda m, args, named: first.append(named), with_kwargs=True)
    conversation = Conversation(model, processor, **SHORT)
    conversation.attach(RED)
    ask(conversation, "what do you see?")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content("what do you see?", RED)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(first[0]["token_type_ids"], inputs["token_type_ids"])
    assert int(inputs["token_type_ids"].sum()) == 4


def test_a_text_model_talks_but_takes_no_images(parts: Path) -> None:
    loaded = alula.load_model(parts / "llm")
    conversation = Conversation(loaded.model, loaded.processor, **SHORT)
    assert ask(conversation, "what?")[0].tokens > 0
    with pytest.raises(HostError, match="takes no images"):
        conversation.attach(RED)
    loaded.processor.chat_template = "{{ raise_exception('no, thanks') }}"
    with pytest.raises(HostError, match="no, thanks"):
        conversation.ask("what?", print)


def test_a_base_model_without_template_still_talks() -> None:
    conversation = Conversation(tiny.decoder("llama"), tiny.tokenizer(None, eos_token="</s>"), **SHORT)
    assert ask(conversation, "what?")[0].tokens > 0


def invoke(*arguments: str, lines: list[str]) -> Any:
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(
        app,
        [*arguments, "--device", "cpu", "--max-new-tokens", "5"],
        input="\n".join(lines).encode(errors="surrogateescape"),
    )


def test_a_pipe_gets_answers_on_stdout_and_the_rest_on_stderr(parts: Path) -> None:
    alone = [
        invoke(str(parts / "host"), lines=lines) for lines in (["what?"], [f"/image {parts / 'red.png'}", "what?"])
    ]
    assert all(result.exit_code == 0 for result in alone)
    assert alone[0].stdout != alone[1].stdout
    lines = ["what?", "", "/reset", f"/image {parts / 'red.png'}", "what?", "/exit", "never read"]
    both = invoke(str(parts / "host"), lines=lines)
    assert both.stdout == alone[0].stdout + alone[1].stdout
    assert "red.png, 50x40 px" in both.stderr


def test_wrong_lines_are_named_and_the_chat_goes_on(parts: Path) -> None:
    wrong = {
        "/image nowhere.png": "no such file",
        f"/image {parts / 'broken.png'}": "broken.png' is corrupt",
        "/image": "which image?",
        "/image 'open": "No closing quotation",
        "/dance": "no command '/dance'",
        "/image ~nosuchuser/a.png": "~nosuchuser/a.png: no such file",
        "/image " + " ".join(f"{parts}/{n}-{'long' * 20}.png" for n in range(20)): "no such file",
        "/image a\0b.png": "no such file",
        "/system look at <image> and \ufdd3 first": "U+FDD3",
        "half \udcff of it": "is not UTF-8",
        f"/image {parts / 'red.png'} {parts / 'broken.png'}": "broken.png' is corrupt",
    }
    result = invoke(str(parts / "host"), lines=[*wrong, "what?"])
    assert result.exit_code == 1
    for complaint in wrong.values():
        assert complaint in result.stderr
    assert result.stdout == invoke(str(parts / "host"), lines=["what?"]).stdout


def test_names_of_files_are_shown_and_not_obeyed(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;owned\x07\u202eb.png"
    RED.save(parts / name)
    for line in (f"/image {parts / name}", f"/image {parts / name}.gone", "/\x1b[2J"):
        result = invoke(str(parts / "host"), lines=[line])
        assert result.stderr.isprintable() or not set(result.stderr) & {"\x1b", "\x07", "\u202e"}
        assert r"\x1b" in result.stderr


def test_bytes_that_are_not_text_spoil_their_line_only(host: Host, monkeypatch: Any, capsys: Any) -> None:
    lines = b"what\xff\xfe?\nwhat?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert Terminal(Conversation(*host, **SHORT), interactive=False).run() == 1
    streams = capsys.readouterr()
    assert r"what\udcff\udcfe?: the line is not UTF-8" in streams.err
    assert streams.out == ask(Conversation(*host, **SHORT), "what?")[0].text + "\n"


def test_an_answer_ends_where_the_context_does(host: Host) -> None:
    host.model.config.text_config.max_position_embeddings = 24
    conversation = Conversation(*host, max_new_tokens=100)
    prompt = conversation._inputs([{"role": "user", "content": content("what?")}])[0]["input_ids"].shape[1]
    reply, _ = ask(conversation, "what?")
    assert reply.tokens <= 24 - prompt
    with pytest.raises(HostError, match="tokens long, the model takes 24"):
        ask(conversation, "and then, what else is there to see?")


def test_placeholders_are_words_where_people_or_the_model_write_them(host: Host) -> None:
    conversation, word = Conversation(*host, **SHORT), host.processor.image_token
    conversation.instruct(f"{word} is an element")
    conversation.attach(RED)
    ask(conversation, f"is it {word}?")
    conversation.messages[-1]["content"] = content(f"an {word} of")
    inputs = conversation._inputs([*conversation.messages, {"role": "user", "content": content(f"{word}{word}")}])[0]
    ids = inputs["input_ids"][0].tolist()
    tokenizer = host.processor.tokenizer
    shown = tokenizer.decode([token for token in ids if token != host.processor.image_token_id])
    assert [shown.count(text) for text in (word, f"is it {word}?", f"an {word} of", f"{word}{word}")] == [5, 1, 1, 1]
    assert inputs["pixel_values"].shape[0] == 1
    alone = Conversation(*host, **SHORT)
    alone.attach(RED)
    ask(alone, "is it?")
    assert ids.count(host.processor.image_token_id) == alone._inputs(alone.messages[:1])[0]["input_ids"][
        0
    ].tolist().count(host.processor.image_token_id)
    assert tokenizer(word)["input_ids"] == [host.processor.image_token_id]  # the tokenizer itself is as it was


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**31)], "--seed"),
        (["--template", "thinking=false"], "without effect"),
        (["--template", "thinking"], "NAME=VALUE"),
    ],
)
def test_options_that_say_nothing_are_refused(parts: Path, options: list[str], told: str) -> None:
    result = invoke(str(parts / "llm"), *options, lines=["what?"])
    assert result.exit_code == 2 or isinstance(result.exception, UsageError)
    assert told in (result.stderr or "") + str(result.exception)


def test_paths_with_spaces_and_several_images(parts: Path) -> None:
    spaced, red = parts / "blue one.png", parts / "red.png"
    result = invoke(str(parts / "host"), lines=[f"/image {spaced}", f"/image '{spaced}' {red}", "what?"])
    assert result.exit_code == 0
    assert result.stderr.count("goes with the next question") == 3


def test_a_grafted_host_talks(parts: Path) -> None:
    host = load_host(parts / "host")
    alula.attach(host.model, alula.WingsConfig(rank=4))
    alula.save_adapter(host.model, parts / "wings", processor=host.processor)
    lines = [f"/image {parts / 'red.png'}", "what?"]
    grafted, bare = invoke(str(parts / "wings"), lines=lines), invoke(str(parts / "host"), lines=lines)
    assert grafted.exit_code == 0, grafted.stderr
    assert grafted.stdout == bare.stdout  # a fresh graft says nothing


def test_a_host_with_a_peft_adapter_talks(parts: Path) -> None:
    host = load_host(parts / "host")
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(host.model, config)
    tuned.save_pretrained(parts / "lora")
    lines = [f"/image {parts / 'red.png'}", "what?"]
    adapted, bare = invoke(str(parts / "lora"), lines=lines), invoke(str(parts / "host"), lines=lines)
    assert adapted.exit_code == 0, adapted.stderr
    assert adapted.stdout != bare.stdout


def test_models_and_devices_that_do_not_exist(tmp_path: Path, parts: Path) -> None:
    for arguments, reason in (
        ([str(tmp_path / "none" / "such")], "no such directory"),
        ([str(parts / "host"), "--dtype", "int8"], "not a floating-point type"),
        ([str(parts / "host"), "--device", "abacus"], "cannot be used"),
    ):
        app = typer.Typer()
        command.register(app)
        result = CliRunner().invoke(app, arguments, input="what?")
        assert isinstance(result.exception, AlulaError)
        assert reason in str(result.exception)


@pytest.mark.slow
def test_a_person_at_a_terminal(parts: Path) -> None:
    endless = load_host(parts / "host")
    endless.model.config.text_config.max_position_embeddings = 10**6
    endless.model.generation_config.suppress_tokens += [4]  # it never finds an end, so Ctrl-C always comes in time
    save_host(endless, parts / "endless")
    program = "import typer; from alula.cli import chat; app = typer.Typer(); chat.register(app); app()"
    arguments = ["-c", program, str(parts / "endless"), "--device", "cpu", "--max-new-tokens", "100000"]
    child = pexpect.spawn(
        sys.executable,
        arguments,
        encoding="utf-8",
        timeout=200,
        dimensions=(40, 200),
        # a test run in the background ignores Ctrl-C and would hand that down; a terminal's programs start without it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child.expect(r"LlavaForConditionalGeneration.*M parameters, float32 on cpu; takes text and images")
    child.expect("\n> ")
    child.sendline("/help")
    child.expect("/image PATH")
    child.expect("\n> ")
    child.sendline(f"/image {parts / 'red.png'}")
    child.expect("red.png, 50x40 px")
    child.expect("\n> ")
    child.sendline("what do you see?")
    child.expect(r"\w")
    child.expect(r"[^\n]{20}\s*")  # the answer is under way
    child.sendintr()
    child.expect(r"stopped; (\d+) tokens")
    assert 0 < int(child.match[1]) < 100000
    child.expect("\n> ")
    child.sendintr()
    child.expect("Ctrl-D leaves")
    child.sendline("/nonsense")
    child.expect("error.*no command")
    child.expect("\n> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_terminal_does_not_obey_the_model(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    escape = host.processor.tokenizer.encode("\x1b", add_special_tokens=False)
    others = [token for token in range(host.model.config.text_config.vocab_size) if token not in escape]
    host.model.generation_config.suppress_tokens = others  # it can say nothing but ESC
    for interactive, said in ((True, "\N{REPLACEMENT CHARACTER}"), (False, "\x1b")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("what?\n"))
        Terminal(Conversation(*host, **SHORT), interactive=interactive).run()
        assert capsys.readouterr().out.replace("\n> ", "") == said * 6 + "\n"
