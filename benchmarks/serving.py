"""`alula serve` beside `transformers serve`: the same model directory, the same requests over HTTP, in one run.

    python benchmarks/serving.py                                 # all parts; writes benchmarks/results/serving.json
    python benchmarks/serving.py --only throughput
    python benchmarks/serving.py --only memory --only load --minutes 10

Each server is a process of its own with one thread for its arithmetic, idle while the other is asked. The model is the
demo of the fledgling, put together in a moment; the requests are held-out questions of the microworld: a third about
text, a third about a picture, a third for a caption.

- throughput: --clients clients, each with its share of the requests, streamed and greedy. A round asks both servers
  for the same, in turn; its ratio is one round's, and what is told is the median over rounds, and how many answers were
  the same texts.
- text: the same of a text model, whose `transformers serve` batches continuously; 64 tokens an answer. The model is as
  wide as the fledgling's and of random weights, which hardly ever end an answer.
- memory: --requests different requests to one `alula serve`, and after each tenth what its process holds, what of
  it is in use (glibc's mallinfo2: blocks that are handed out), what is free and kept for what comes, and how many
  objects Python's collector knows. A leak shows in what is in use; what is free grows where blocks of other sizes come
  to lie between freed ones, and levels.
- load: --crowd clients for --minutes, requests and models mixed: the host, and Wings and a LoRA over its weights, drawn
  at random. Every answer is compared with the one that the request has alone, by the model's own `generate`.

What was measured stays: a run that was stopped goes on where it was, in the folder --work.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import alula
from alula.book import Book
from alula.files import write_json
from alula.hosts import names
from alula.inputs import Intake
from alula.serving.demo import put_together
from alula.training.environment import readable_environment
from alula_fledgling.microworld import caption_items, text_items, visual_items

HERE = Path(__file__).resolve().parents[1]
PARTS = ("throughput", "text", "memory", "load")
SERVERS = ("alula serve", "transformers serve")
BATCHING = ("alula serve", "transformers serve --continuous-batching")
OPENING = "<|im_start|>assistant"
"""what the template of the fledgling begins an answer with; `transformers serve` 5.24 streams the prompt up to it, too,
where a text model of Qwen's architecture answers (findings/serve_answers_with_the_prompt.sh)"""
CUT = "\ufffd"
"""what bytes at the end of an answer are told as that make no character; transformers' stream leaves them out"""
SEED, MOST, MOST_TEXT = 20, 48, 64

# runs `alula` and, at SIGUSR1, writes what the process holds into the file that is named first
WATCHED = """
import ctypes, gc, json, os, signal, sys
from alula.cli.app import main
place = sys.argv.pop(1)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
info = ctypes.CDLL("libc.so.6").mallinfo2
info.restype = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
def told(*_):
    gc.collect()
    found = info()
    numbers = {"used": found.uordblks + found.hblkhd, "free": found.fordblks, "objects": len(gc.get_objects())}
    with open(place + ".part", "w") as file:
        json.dump(numbers, file)
    os.replace(place + ".part", place)
signal.signal(signal.SIGUSR1, told)
main()
"""


def questions(count: int, seed: int = SEED) -> list[list[dict[str, Any]]]:
    """Conversations that end with a question, a third of each kind; pictures as PIL images."""
    streams = [make(None, split="test", seed=seed) for make in (text_items, visual_items, caption_items)]
    found = []
    for stream in itertools.islice(itertools.cycle(streams), count):
        item = next(stream)
        found.append([_decoded(message) for message in item.messages[: item.targets[-1].turn]])
    return found


def _decoded(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": message["role"],
        "content": [{**p, "image": p["image"].load().convert("RGB")} if p["type"] == "image" else p for p in parts],
    }


def over_http(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as OpenAI's API has it."""
    return [{"role": each["role"], "content": [_part(part) for part in each["content"]]} for each in messages]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    file = io.BytesIO()
    part["image"].save(file, format="PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": address}}


# -- servers ----------------------------------------------------------------------------------------------------------


class Server:
    """One server as a process of its own."""

    def __init__(self, name: str, models: Sequence[tuple[str, Path]], device: str) -> None:
        self.name, self.port = name, _free_port()
        # `transformers serve` knows a model by its directory alone
        self.model = models[0][0] if name == "alula serve" else str(models[0][1])
        self._told = Path(tempfile.mkdtemp(prefix="serving-")) / "held.json"
        if name == "alula serve":
            told = ["-c", WATCHED, str(self._told), "serve", *(f"{model}={path}" for model, path in models)]
        else:
            told = ["-m", "transformers.cli.transformers", *name.split()[1:], str(models[0][1])]
        command = [sys.executable, *told, "--port", str(self.port), "--device", device, "--host", "127.0.0.1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        self.log.seek(0)
        raise RuntimeError(f"{self.name} does not answer:\n{self.log.read()[-3000:]}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> dict[str, float]:
        """Megabytes that its process holds, and of these in use and free; and objects."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        self._told.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + 60
        while not self._told.exists() and time.monotonic() < until:
            time.sleep(0.1)
        numbers = json.loads(self._told.read_text())
        held = pages * os.sysconf("SC_PAGE_SIZE")
        sizes = {"megabytes": held, "in use": numbers["used"], "free": numbers["free"]}
        return {name: size / 2**20 for name, size in sizes.items()} | {"objects": numbers["objects"]}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self._told.parent, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(names: Sequence[str], models: Sequence[tuple[str, Path]], device: str) -> Iterator[list[Server]]:
    servers: list[Server] = []
    try:
        for name in names:
            servers.append(Server(name, models, device))
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()


def ask(
    client: httpx.Client, url: str, model: str, messages: Any, most: int, *, is_echoed: bool = False
) -> dict[str, Any]:
    """A streamed answer: its text, and seconds to its first piece and to its end.

    Args:
        is_echoed: the prompt comes before the answer; it is left out.
    """
    body = {"model": model, "messages": messages, "max_tokens": most, "temperature": 0, "stream": True}
    start, first, pieces = time.perf_counter(), None, []
    with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()[:500]}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            text = "".join((choice.get("delta") or {}).get("content") or "" for choice in event["choices"])
            pieces.append(text)
            if text and first is None and (not is_echoed or "".join(pieces).partition(OPENING)[2]):
                first = time.perf_counter() - start
    end = time.perf_counter() - start
    told = "".join(pieces)
    return {
        "text": told.partition(OPENING)[2] if is_echoed else told,
        "first": end if first is None else first,
        "total": end,
    }


def crowd(server: Server, asked: Sequence[Any], clients: int, most: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that all took, and the answers in order."""
    connection = threading.local()

    def one(messages: Any) -> dict[str, Any]:
        if not hasattr(connection, "client"):
            connection.client = httpx.Client()
        is_echoed = server.name == BATCHING[1]
        return ask(connection.client, server.url, server.model, messages, most, is_echoed=is_echoed)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, asked))
    return time.perf_counter() - start, answers


# -- parts ------------------------------------------------------------------------------------------------------------


def throughput(options: argparse.Namespace, models: Any, book: Book) -> dict[str, Any]:
    def asked(count: int, seed: int) -> list[Any]:
        return [over_http(each) for each in questions(count, seed=seed)]

    return _beside("throughput", SERVERS, models, asked, options.most, options, book)


def text(options: argparse.Namespace, models: Any, book: Book) -> dict[str, Any]:
    def asked(count: int, seed: int) -> list[Any]:
        stream = text_items(None, split="test", seed=seed)
        return [over_http([_decoded(item.messages[0])]) for item in itertools.islice(stream, count)]

    most = min(options.most, 3) if options.shrink else MOST_TEXT
    return _beside("text", BATCHING, [("text", random_decoder(options.work / "text"))], asked, most, options, book)


def random_decoder(folder: Path) -> Path:
    """A text model of the fledgling's size and words whose answers go on: of random weights."""
    source = names.resolve("fledgling", "llm")
    config = AutoConfig.from_pretrained(source)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _beside(
    part: str,
    servers_of: Sequence[str],
    models: Any,
    requests: Callable[[int, int], list[Any]],
    most: int,
    options: argparse.Namespace,
    book: Book,
) -> dict[str, Any]:
    """Rounds in which two servers are asked for the same.

    Args:
        requests: so many, by a seed.
        most: tokens of an answer.
    """
    wanted = [f"{part}/{number}" for number in range(options.rounds)]
    if any(key not in book for key in wanted):
        with running(servers_of, models, options.device) as servers:
            for server in servers:  # what is done at a first request is not what is measured
                crowd(server, requests(6, SEED + 999), 2, most)
            for number, key in enumerate(wanted):
                if key in book:
                    continue
                asked = requests(options.each * options.clients, SEED + number)
                order = servers[:: 1 if number % 2 == 0 else -1]
                found = {each.name: crowd(each, asked, options.clients, most) for each in order}
                texts = [[answer["text"].rstrip(CUT) for answer in found[name][1]] for name in servers_of]
                book.note(
                    key,
                    {
                        "requests": len(asked),
                        "seconds": {name: found[name][0] for name in servers_of},
                        "first": {
                            name: statistics.median(each["first"] for each in found[name][1]) for name in servers_of
                        },
                        "characters": {name: sum(map(len, each)) for name, each in zip(servers_of, texts, strict=True)},
                        "same": sum(one == other for one, other in zip(*texts, strict=True)),
                    },
                )
                print(key, book[key], flush=True)
    rounds = [book[key] for key in wanted]
    ours, theirs = servers_of
    return {
        "rounds": rounds,
        "throughput over transformers": statistics.median(
            each["seconds"][theirs] / each["seconds"][ours] for each in rounds
        ),
        "first token over transformers": statistics.median(
            each["first"][ours] / each["first"][theirs] for each in rounds
        ),
        "answers that are the same": sum(each["same"] for each in rounds) / sum(each["requests"] for each in rounds),
    }


def memory(options: argparse.Namespace, models: Any, book: Book) -> dict[str, Any]:
    if "memory" not in book:
        held = []
        with running(SERVERS[:1], models, options.device) as (server,):
            count = options.requests // 10
            for tenth in range(10):
                asked = [over_http(each) for each in questions(count, seed=SEED + 100 + tenth)]
                crowd(server, asked, options.clients, 4)
                held.append({"requests": (tenth + 1) * count, **server.memory()})
                print(held[-1], flush=True)
        book.note("memory", held)
    held = book["memory"]
    return {"held": held} | {
        f"growth from the second tenth to the last, {name}": held[-1][name] / held[1][name] - 1
        for name in ("megabytes", "in use", "objects")
    }


def adapters(name: str, host: Path, folder: Path) -> list[tuple[str, Path]]:
    """Wings and a LoRA on a host, of random weights: what they answer is of no matter, that it stays the same is."""
    torch.manual_seed(SEED)
    model, _ = alula.load_model(host)
    graft = alula.attach(model, alula.WingsConfig(rank=8))
    with torch.no_grad():
        for parameter in graft.parameters():
            parameter.normal_(std=0.1)
    alula.save_adapter(model, folder / "random-wings", base=host)
    model, _ = alula.load_model(host)
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*(q_proj|v_proj)"))
    with torch.no_grad():
        for key, value in tuned.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    tuned.peft_config["default"].base_model_name_or_path = str(host)
    tuned.save_pretrained(str(folder / "random-lora"))
    return [(f"{name}+{each}", folder / f"random-{each}") for each in ("wings", "lora")]


def load(options: argparse.Namespace, models: Any, book: Book) -> dict[str, Any]:
    if "load" not in book:
        models = [models[0], *adapters(models[0][0], models[0][1], options.work)]
        asked = questions(options.pool, seed=SEED + 500)
        wanted = {name: _alone(path, asked, options.most) for name, path in models}
        bodies = [over_http(each) for each in asked]
        with running(SERVERS[:1], models, options.device) as (server,):
            book.note("load", _crowded(server, bodies, wanted, options))
    return dict(book["load"])


def _alone(path: Path, asked: Sequence[Any], most: int) -> list[str]:
    """What a model answers by itself, one request after another."""
    model, processor = alula.load_model(path)
    intake, tokenizer = Intake(processor, live=True), processor.tokenizer
    found = []
    for messages in asked:
        inputs, _ = intake.tensors(messages)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)
        found.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def _crowded(server: Server, bodies: Any, wanted: dict[str, list[str]], options: Any) -> dict[str, Any]:
    until = time.monotonic() + 60 * options.minutes
    counts, differing, errors = dict.fromkeys(wanted, 0), [], []
    lock = threading.Lock()

    def client(number: int) -> None:
        with httpx.Client() as one:
            for turn in itertools.count(number):
                if time.monotonic() > until:
                    return
                name = list(wanted)[turn % len(wanted)]
                place = (turn * 7 + number) % len(bodies)
                try:
                    text = ask(one, server.url, name, bodies[place], options.most)["text"]
                except Exception as error:
                    with lock:
                        errors.append(str(error)[:300])
                    continue
                with lock:
                    counts[name] += 1
                    if text != wanted[name][place]:
                        differing.append({"model": name, "asked": place, "got": text, "alone": wanted[name][place]})

    threads = [threading.Thread(target=client, args=(number,)) for number in range(options.crowd)]
    before = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "clients": options.crowd,
        "seconds": time.monotonic() - before,
        "answers": counts,
        "otherwise than alone": len(differing),
        "examples": differing[:5],
        "errors": errors[:5],
        "failed": len(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part, or several")
    parser.add_argument("--model", type=Path, help="a directory in the place of the demo")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=3, help="requests of a client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=MOST, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--crowd", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pool", type=int, default=96, help="different requests under load")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shrink", action="store_true", help="next to nothing, which says nothing about speed")
    parser.add_argument("--work", type=Path, default=HERE / "runs" / "serving")
    parser.add_argument("--output", type=Path, default=HERE / "benchmarks" / "results" / "serving.json")
    options = parser.parse_args()
    if options.shrink:
        options.clients = options.each = options.crowd = 2
        options.requests, options.minutes, options.pool, options.most = 20, 0.02, 3, 3
    options.work.mkdir(parents=True, exist_ok=True)
    models = put_together("fledgling", options.work) if options.model is None else [("model", options.model)]
    settings = ("clients", "each", "most", "requests", "crowd", "minutes", "pool", "device")
    told = {name: getattr(options, name) for name in settings} | {"models": [name for name, _ in models]}
    book = Book(options.work / "book.jsonl", told)
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.only or PARTS:
        made = globals()[part](options, models, book)
        made |= {"command": " ".join(sys.argv), "environment": readable_environment(), "options": told}
        record[part] = made
        write_json(options.output, record)
        print(part, {name: value for name, value in record[part].items() if not isinstance(value, list)}, flush=True)


if __name__ == "__main__":
    main()
