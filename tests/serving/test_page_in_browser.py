"""The page of `alula serve` in a browser: the real server, tiny models, Chromium of the distribution."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image
from transformers import ASTConfig

from alula.hosts import build_host, save_host
from alula.serving.engine import Engine, Limits
from alula.serving.http import Settings, application, listen
from tests.hosts import tiny
from tests.serving import reciting
from tests.serving.made import saved_lora
from tests.serving.relay import Relay

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")

SAID = (
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>\n\n",
    "**bold** and `code`\n",
    "- [good](https://example.org/a)\n",
    "- [bad](javascript:alert(1))\n",
)
EARS = ASTConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_mel_bins=32,
    max_length=1024,  # ten seconds
    patch_size=16,
    frequency_stride=16,
    time_stride=16,
)
TOKEN = "a-token-of-twenty-characters"
FLAGS = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
IDLE = "html:not(.answering)"


def png(color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    image = Image.new("RGB", (64, 48), "white")
    image.paste(color, (8, 8, 28, 28))
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def wav(seconds: float = 0.1, rate: int = 8000) -> bytes:
    """Stereo, of a rate that no tower has."""
    data = b"".join(struct.pack("<hh", 900 * (i % 7), -900 * (i % 5)) for i in range(int(seconds * rate)))
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 2, rate, 4 * rate, 4, 16)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE") + form + struct.pack("<4sI", b"data", len(data)) + data
    )


@dataclass(frozen=True)
class Site:
    """Two servers over one engine: an open one, and one behind a token."""

    port: int
    guarded: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    tiny.decoder("qwen2").save_pretrained(folder / "llm")
    tiny.tokenizer().save_pretrained(folder / "llm")
    save_host(build_host(str(folder / "llm"), tiny.TOWERS["siglip"][0]), folder / "host")
    hearing = build_host(
        tiny.decoder("qwen2"), tiny.TOWERS["siglip"][0], "linear", tokenizer=tiny.tokenizer(), audio=EARS
    )
    save_host(hearing, folder / "ears")
    saved_lora(folder / "host", folder / "lora")
    reciting.save(folder / "reciter", SAID)
    reciting.save(folder / "endless", [f" word{i}" for i in range(40)], over=False)
    report = folder / "runs" / "one" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html><title>What the eyes cost</title><h1>What the eyes cost</h1>")
    engine = Engine(limits=Limits(answer_tokens=400))
    for name in ("host", "ears", "reciter", "endless"):
        engine.load(name, folder / name)
    engine.load("host+lora", folder / "lora")
    settings = Settings(runs=folder / "runs")
    servers, ports = [], []
    for each in (settings, replace(settings, token=TOKEN)):
        listening = listen("127.0.0.1", 0)
        ports.append(listening.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(application(engine, each), log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        servers.append((server, thread))
    yield Site(*ports)
    for server, thread in servers:
        server.should_exit = server.force_exit = True
        thread.join(10)
    engine.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    heard = tmp_path_factory.mktemp("microphone") / "heard.wav"
    heard.write_bytes(wav(2.0, 16000))
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={heard}"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Visit:
    """The page, opened; what it asked, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.text))
        self.page.goto(url)

    def _note(self, request: Any) -> None:
        if request.url.endswith("/chat/completions"):
            self.asked.append(request.post_data_json)

    def _hear(self, text: str) -> None:
        if "Content Security Policy" in text or "Uncaught" in text:
            self.wrong.append(text)

    def choose(self, model: str, second: str | None = None) -> None:
        self.page.locator(f"#model-a option[value='{model}']").wait_for(state="attached")
        self.page.select_option("#model-a", model)
        if second:
            self.page.click("#compare")
            self.page.select_option("#model-b", second)

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")
        if wait:
            self.page.wait_for_selector(IDLE)

    def attach(self, *contents: bytes) -> None:
        files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": each} for i, each in enumerate(contents)]
        self.page.set_input_files("#files", files)
        self.page.wait_for_selector(f"#tray li:nth-child({len(contents)})")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.inner_text()

    def slide(self, name: str, value: float) -> None:
        self.page.locator(f"#{name}").fill(str(value))
        self.page.locator(f"#{name}").dispatch_event("change")


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Visit]:
    made = Visit(browser, site.url)
    yield made
    made.context.close()
    assert made.wrong == []


def test_an_answer_says_what_it_cost_and_its_tokens_where_they_looked(visit: Visit) -> None:
    page = visit.page
    visit.choose("host")
    visit.slide("length", 1)  # 32 tokens
    visit.attach(png())
    page.wait_for_selector("#budget-effect:has-text('16 of 16 image tokens kept')")
    visit.ask("what is this?")
    (body,) = visit.asked
    assert body["alula"] == {"attention": True}
    assert base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]) == png()
    facts = visit.text(".readout")
    assert "16 image tokens" in facts
    assert "computed by host" in facts
    assert "tokens/s" in facts
    page.locator(".answer-text .t").nth(2).hover()
    page.wait_for_selector("#looked-words:has-text('16 tokens')")
    assert page.locator("#alternatives li").count() >= 2
    assert visit.text("#token-place").startswith("token 3 of ")
    most = page.get_attribute("#heat", "aria-label")
    assert most.startswith("Most attention: row ")
    page.locator("#heat").hover()
    assert "column" in visit.text("#cell")

    visit.slide("budget", 5)
    page.wait_for_selector("#budget-effect:has-text('5 of 16 image tokens kept')")
    page.click("text=Ask again")
    page.wait_for_selector(IDLE)
    assert visit.asked[1]["alula"] == {"attention": True, "image_tokens": 5}
    assert "5 of 16 image tokens" in visit.text(".readout")
    rows = page.locator(".attempts tbody tr")
    assert [rows.nth(i).locator("td").first.inner_text() for i in range(2)] == ["16 of 16", "5 of 16"]
    page.click("[aria-label='Earlier attempt']")
    assert "16 image tokens" in visit.text(".readout")
    visit.page.check("#again")
    visit.slide("budget", 9)
    page.wait_for_selector(".attempts tbody tr:nth-child(3) td:has-text('9 of 16')")


def test_two_models_answer_one_question_and_their_differences_are_marked(visit: Visit) -> None:
    page = visit.page
    visit.choose("host", "host+lora")
    visit.attach(png())
    page.wait_for_selector("#budget-effect:has-text('16 of 16')")
    visit.slide("length", 1)
    visit.slide("temperature", 0.5)
    visit.page.fill("#seed", "3")
    visit.ask("what is this?")
    assert sorted(body["model"] for body in visit.asked) == ["host", "host+lora"]
    assert {(body["seed"], body["temperature"], body["max_tokens"]) for body in visit.asked} == {(3, 0.5, 32)}
    answers = page.locator(".answer-text")
    assert answers.count() == 2
    assert answers.nth(0).inner_text() != answers.nth(1).inner_text()
    assert "in A alone" in visit.text(".verdict")
    marked = page.evaluate("() => ['only-a', 'only-b'].map((name) => CSS.highlights.get(name).size)")
    assert min(marked) > 0
    page.select_option("#model-b", "host")
    page.click("text=Ask again")
    page.wait_for_selector(IDLE)
    page.wait_for_selector(".verdict:has-text('the same answer')")


def test_words_and_parts_of_the_picture_are_highlighted_by_mouse(visit: Visit) -> None:
    page = visit.page
    visit.choose("host")
    visit.slide("length", 0)
    visit.attach(png())
    page.fill("#draft", "a red square, a red circle")
    page.click("#marker")  # the highlighter: a click marks a word
    frame = page.locator("#draft").bounding_box()
    page.locator("#draft").click(position={"x": 30, "y": frame["height"] / 2})
    page.wait_for_selector("#mirror mark")
    assert page.locator("#mirror mark").all_inner_texts() == ["red"]
    page.press("#draft", "Home")
    page.keyboard.type("so ")
    assert page.locator("#mirror mark").all_inner_texts() == ["red"]  # marks stay on their words

    page.click("#tray .picture")
    stage = page.locator("#regions-stage img").bounding_box()
    page.mouse.move(stage["x"] + 0.25 * stage["width"], stage["y"] + 0.25 * stage["height"])
    page.mouse.down()
    page.mouse.move(stage["x"] + 0.75 * stage["width"], stage["y"] + 0.5 * stage["height"], steps=3)
    page.mouse.up()
    assert page.locator("#regions-list li").count() == 1
    page.click("#regions .actions [data-close]")
    page.click("#send")
    page.wait_for_selector(IDLE)
    highlight = visit.asked[0]["alula"]["highlight"]
    assert highlight["spans"] == [{"text": "red", "message": 0, "index": 0}]
    assert highlight["regions"] == [{"item": 0, "box": [16, 12, 48, 24]}]
    assert highlight["strength"] == pytest.approx(0.693, abs=1e-3)
    assert highlight["guidance"] == 1.3
    assert "computed by host" in visit.text(".readout")
    assert page.locator(".question mark").all_inner_texts() == ["red"]
    assert page.locator(".turn .box.shown").count() == 1


def test_media_are_pasted_and_dropped_and_what_does_not_fit_is_said(visit: Visit) -> None:
    page = visit.page
    visit.choose("host")
    give = """([event, target, files]) => {
      const data = new DataTransfer();
      for (const [name, type, content] of files)
        data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
      const made = event === "paste"
        ? new ClipboardEvent(event, { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true });
      document.querySelector(target).dispatchEvent(made);
    }"""
    picture = ["a.png", "image/png", base64.b64encode(png()).decode()]
    sound = ["a.wav", "audio/wav", base64.b64encode(wav()).decode()]
    page.evaluate(give, ["paste", "#draft", [picture]])
    page.wait_for_selector("#tray li:nth-child(1)")
    page.evaluate(give, ["drop", "#scroller", [picture]])
    page.wait_for_selector("#tray li:nth-child(2)")
    page.evaluate(give, ["drop", "#scroller", [sound]])
    page.wait_for_selector("#notice:has-text('takes no sounds')")
    page.evaluate(give, ["drop", "#scroller", [["a.txt", "text/plain", ""]]])
    page.wait_for_selector("#notice:has-text('neither a picture nor a sound')")
    # browsers show it, the server does not read it
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for name, kind in (("a.svg", "image/svg+xml"), ("b.png", "image/png")):
        page.evaluate(give, ["drop", "#scroller", [[name, kind, base64.b64encode(drawing).decode()]]])
        page.wait_for_selector(f"#notice:has-text('{name} is no picture that the server reads. It reads PNG, JPEG')")
    page.evaluate(give, ["drop", "#scroller", [["a.png", "image/png", base64.b64encode(png()[:20]).decode()]]])
    page.wait_for_selector("#notice:has-text('no picture that this browser can show')")
    assert page.locator("#tray li").count() == 2
    page.click("[aria-label^='Remove']")
    assert page.locator("#tray li").count() == 1
    # whatever the browser decodes goes out as WAV of one channel
    url = page.evaluate(
        """async (content) => {
      const { asWav } = await import("/js/sound.js");
      const made = await asWav(new Blob([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))]));
      return made.url;
    }""",
        sound[2],
    )
    made = base64.b64decode(url.partition(",")[2])
    channels, rate = struct.unpack("<HI", made[22:28])
    assert (made[:4], channels, rate, len(made)) == (b"RIFF", 1, 16000, 44 + 2 * 1600)


def test_a_recording_and_a_picture_are_asked_about_together(visit: Visit) -> None:
    page = visit.page
    visit.choose("ears")
    visit.slide("length", 0)
    page.click("#record")
    page.wait_for_selector("#record[aria-pressed=true]")
    page.wait_for_timeout(300)
    page.click("#record")
    page.wait_for_selector("#tray .sound")
    visit.attach(png(), png())
    visit.ask("what do you hear?")
    sound, *pictures, _ = visit.asked[0]["messages"][0]["content"]
    assert [each["type"] for each in pictures] == ["image_url", "image_url"]
    recorded = base64.b64decode(sound["input_audio"]["data"])
    assert recorded[:4] == b"RIFF"
    assert len(set(recorded[44:])) > 1  # not silence
    assert "computed by ears" in visit.text(".readout"), page.locator(".problem").all_inner_texts()
    page.locator(".answer-text .t").first.click()
    page.wait_for_selector("#looked-items button:nth-child(3)")
    chips = page.locator("#looked-items button").all_inner_texts()
    assert [each.partition(":")[0] for each in chips] == ["sound 1", "picture 2", "picture 3"]
    page.click("#looked-items button:first-child")
    page.wait_for_selector("#looked-words:has-text('went to the sound')")
    page.wait_for_selector("#heat", state="hidden")
    page.click("#looked-items button:nth-child(2)")
    page.wait_for_selector("#heat", state="visible")


def test_what_a_model_or_a_user_writes_is_text(visit: Visit) -> None:
    page = visit.page
    visit.choose("reciter")
    visit.ask("<b>bold?</b> <img src=x onerror=\"document.title='owned'\">")
    assert visit.text(".question").startswith("<b>bold?</b> <img src=x")
    shown = visit.text(".answer-text")
    assert SAID[0] in shown
    assert "<script>document.title='owned'</script>" in shown
    assert page.locator("#thread img, #thread script, #thread b").count() == 0
    assert page.locator(".answer-text strong").inner_text() == "bold"
    assert page.locator(".answer-text code").inner_text() == "code"
    links = page.locator(".answer-text a")
    assert [links.nth(i).get_attribute("href") for i in range(links.count())] == ["https://example.org/a"]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert "(https://example.org/a)" in shown
    assert "[bad](javascript:alert(1))" in shown
    assert page.title() == "alula"


def test_an_error_is_said_with_its_remedy_and_the_question_kept(visit: Visit) -> None:
    page = visit.page
    visit.choose("host")
    visit.slide("length", 0)
    long = "what do you see? " * 400
    visit.ask(long)
    problem = visit.text(".problem")
    assert "up to 511 are taken" in problem
    assert problem.count("horten it, or start a new conversation") == 1
    page.click("text=Edit the question")
    assert page.input_value("#draft") == long
    page.keyboard.press("Escape")
    assert page.locator(".turn").count() == 1
    page.keyboard.press("Alt+e")
    visit.ask("what?")
    assert page.locator(".problem").count() == 0
    assert "computed by host" in visit.text(".readout")


def test_a_lost_connection_keeps_what_came_and_what_was_written(browser: Any, site: Site) -> None:
    relay = Relay(site.port)
    visit = Visit(browser, f"http://127.0.0.1:{relay.port}/")
    page = visit.page
    try:
        visit.choose("endless")
        page.fill("#draft", "go on")
        visit.slide("length", 5)
        page.press("#draft", "Enter")
        page.wait_for_selector(".answer-text .t:nth-child(5)")
        page.fill("#draft", "my next question")
        relay.cut()
        page.wait_for_selector(".problem:has-text('connection to the server was lost')")
        assert page.locator(".answer-text .t").count() >= 5
        assert "kept" in visit.text(".problem")
        assert "alula serve" in visit.text(".problem")
        again = page.locator("button:visible", has_text="Try again")
        assert again.count() == 1  # one box, one thing to do
        again.click()
        page.wait_for_selector(".problem:has-text('does not answer')")
        assert again.count() == 1
        relay.mend()
        visit.slide("length", 0)
        again.click()
        page.wait_for_selector(IDLE)
        page.wait_for_selector(".readout:has-text('16 tokens')")
        assert again.count() == 0
        assert page.input_value("#draft") == "my next question"
        assert visit.wrong == []
    finally:
        visit.context.close()
        relay.close()


def test_a_page_that_learns_of_no_models_says_so_until_it_does(visit: Visit) -> None:
    page = visit.page
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#connection:has-text('does not answer')")
    page.unroute("**/v1/models")
    page.click("#connection-again")
    page.wait_for_selector("#connection", state="hidden")
    visit.choose("host")


def test_shares_are_short(visit: Visit) -> None:
    shares = [0, 7.4e-8, 4.2e-4, 0.0123, 0.213, 0.9999]
    written = visit.page.evaluate(
        "async (shares) => { const { percent } = await import('/js/numbers.js'); return shares.map(percent); }", shares
    )
    assert written == ["0 %", "< 0.001 %", "0.042 %", "1.23 %", "21.3 %", "100 %"]


def test_a_long_answer_is_appended_to_and_can_be_stopped(visit: Visit) -> None:
    page = visit.page
    visit.choose("endless")
    page.evaluate(
        """() => {
      window.added = 0;
      new MutationObserver((all) => { for (const each of all) window.added += each.addedNodes.length; })
        .observe(document.getElementById("thread"), { childList: true, subtree: true });
    }"""
    )
    visit.slide("length", 5)  # 400, the most that this server gives
    visit.ask("go on", wait=False)
    page.wait_for_selector(".answer-text .t:nth-child(20)")
    page.fill("#draft", "written meanwhile")
    assert page.locator("html.answering").count() == 1
    page.wait_for_selector(IDLE)
    assert page.locator(".answer-text .t").count() == 400
    words = visit.text(".answer-text").split()
    assert words == [f"word{i % 40}" for i in range(400)]
    assert "longest answer" in visit.text(".note")
    facts = 12 * 420  # what an answer costs is written anew with each frame
    assert page.evaluate("() => window.added") < 3 * 400 + facts
    page.press("#draft", "Enter")
    page.wait_for_selector(".turn:nth-child(2) .answer-text .t:nth-child(3)")
    page.click("#stop")
    page.wait_for_selector(IDLE)
    assert "You stopped" in visit.text(".note")
    assert page.locator(".turn:nth-child(2) .answer-text .t").count() < 400


def test_lines_of_thousands_of_tokens_cost_what_they_weigh(visit: Visit) -> None:
    """Twice the tokens, twice the nodes: nothing is rendered anew."""
    counts = visit.page.evaluate(
        """async () => {
      const { AnswerText } = await import("/js/answer.js");
      const counts = [];
      for (const many of [4000, 8000]) {
        const text = new AnswerText({ told: true });
        let made = 0;
        const create = document.createElement.bind(document);
        document.createElement = (name) => { made += 1; return create(name); };
        for (let i = 0; i < many; i += 1) text.push(i % 50 === 49 ? "a **b**\\n" : " word", i, 4);
        text.end();
        document.createElement = create;
        counts.push(made);
      }
      return counts;
    }"""
    )
    assert counts[0] > 4000
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.01)


def test_everything_is_done_by_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.choose("host")
    focused = "() => document.activeElement.id || document.activeElement.className"
    page.focus("#length")
    page.keyboard.press("Home")
    assert visit.text("#length-value") == "16 tokens"
    page.keyboard.press("/")
    assert page.evaluate(focused) == "draft"
    page.keyboard.type("what do you see?")
    page.keyboard.press("Home")
    page.keyboard.press("Control+Shift+ArrowRight")
    page.keyboard.press("Alt+h")
    assert page.locator("#mirror mark").all_inner_texts() == ["what"]
    page.keyboard.press("Alt+h")  # no selection: the highlighter, which Escape puts away
    page.keyboard.press("Escape")
    visit.attach(png())
    page.focus("#tray .picture")
    page.keyboard.press("Enter")
    page.focus("#regions-add")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    assert page.locator("#regions-list li span").first.inner_text() == "15, 12 to 47, 37 px"
    page.keyboard.press("Escape")
    page.focus("#draft")
    page.keyboard.press("Enter")
    page.wait_for_selector(IDLE)
    assert visit.asked[0]["alula"]["highlight"]["regions"] == [{"item": 0, "box": [15, 12, 47, 37]}]
    page.keyboard.press("Alt+a")
    assert page.evaluate(focused) == "answer"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#looked-words:has-text('tokens')")
    assert visit.text("#token-place").startswith("token 3 of ")
    assert page.locator(".t.current").count() >= 1
    page.keyboard.press("Escape")
    page.wait_for_selector("#inspector-empty", state="visible")
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+e")
    assert page.input_value("#draft") == "what do you see?"
    assert page.locator("#mirror mark").all_inner_texts() == ["what"]
    # every control has a name
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter((each) =>
      each.checkVisibility() && !each.textContent.trim() && !each.getAttribute("aria-label") && !each.labels?.length)
      .map((each) => each.outerHTML)"""
    )
    assert unnamed == []


def test_a_token_is_asked_for_and_kept_in_the_tab(browser: Any, site: Site) -> None:
    visit = Visit(browser, f"http://127.0.0.1:{site.guarded}/")
    page = visit.page
    page.wait_for_selector("#token[open]")
    page.fill("#token-input", "not-the-token-that-it-wants")
    page.keyboard.press("Enter")
    page.wait_for_selector("#token-wrong", state="visible")
    page.fill("#token-input", TOKEN)
    page.keyboard.press("Enter")
    visit.choose("reciter")
    visit.ask("what?")
    assert "bold" in visit.text(".answer-text")
    held = page.evaluate("() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert TOKEN in held[0]
    assert held[1:] == [[], ""]
    page.reload()
    visit.choose("reciter")
    assert page.locator("#token[open]").count() == 0
    # reports open in a tab of their own, which sends no token
    page.click("#menu-toggle")
    page.click("#show-reports")
    with visit.context.expect_page() as opened:
        page.click("text=What the eyes cost")
    assert opened.value.inner_text("h1") == "What the eyes cost"
    visit.context.close()
    assert visit.wrong == []


def test_a_conversation_is_saved_opened_and_outlives_a_reload(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.choose("host")
    visit.slide("length", 0)
    visit.attach(png())
    visit.ask("what is this?")
    answer = visit.text(".answer-text")
    page.reload()
    assert visit.text(".answer-text") == answer
    page.click("#menu-toggle")
    with page.expect_download() as saved:
        page.click("#save")
    kept = json.loads(Path(saved.value.path()).read_text())
    assert kept["turns"][0]["lanes"][0]["attempts"][0]["report"]["computed_by"] == "host"
    page.click("#new")
    assert page.locator(".turn").count() == 0
    page.set_input_files("#open-file", saved.value.path())
    page.wait_for_selector(".turn")
    assert visit.text(".answer-text") == answer
    page.locator(".answer-text .t").first.hover()
    page.wait_for_selector("#looked-words:has-text('16 tokens')")
    visit.choose("host")
    visit.ask("and left?")
    assert [each["role"] for each in visit.asked[-1]["messages"]] == ["user", "assistant", "user"]

    attempt = kept["turns"][0]["lanes"][0]["attempts"][0]
    attempt["report"]["seconds"] = {"total": "<b>"}
    attempt["pieces"][0]["tokens"] = [{"text": 7, "logprob": "?"}]
    (tmp_path / "odd.json").write_text(json.dumps(kept))
    page.set_input_files("#open-file", tmp_path / "odd.json")
    page.wait_for_selector(".turn:nth-child(2)", state="detached")
    assert visit.text(".answer-text") == answer
    assert "computed by host" in visit.text(".readout")
    kept["turns"][0]["media"][0]["url"] = "https://example.org/spy.png"
    (tmp_path / "hostile.json").write_text(json.dumps(kept))
    page.set_input_files("#open-file", tmp_path / "hostile.json")
    page.wait_for_selector("#notice:has-text('damaged')")
    assert page.locator(".turn").count() == 1


def test_both_themes_on_a_small_screen(browser: Any, site: Site) -> None:
    small = {"width": 360, "height": 740}
    visit = Visit(browser, site.url, viewport=small, color_scheme="light", reduced_motion="reduce")
    page = visit.page

    def is_light() -> bool:
        color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(int(each) for each in re.findall(r"\d+", color)) > 380

    visit.choose("host", "host+lora")
    page.click("#panel-toggle")
    visit.slide("length", 1)
    page.click("#panel-close")
    visit.attach(png())
    visit.ask("what is this?")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert is_light() is (scheme == "light")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    page.locator(".answer-text .t").nth(1).click()
    page.wait_for_selector("#heat", state="visible")
    page.click("#inspector-close")
    page.wait_for_selector("#panel", state="hidden")
    page.click("#menu-toggle")
    page.click("#menu label:has([value='dark'])")
    assert not is_light()
    page.reload()
    assert not is_light()
    assert page.locator(".turn").count() == 1
    visit.context.close()
    assert visit.wrong == []
