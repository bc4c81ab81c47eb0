"""Answers of the engine: those of the model alone, whatever runs beside."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from alula.errors import UsageError
from alula.loading import put_adapter
from alula.seam.joining import chosen
from alula.serving.engine import (
    Delta,
    Engine,
    EngineClosed,
    Finished,
    Limits,
    QueueFull,
    Request,
    RequestError,
    Sampling,
    UnknownModel,
    batch,
    residents,
)
from alula.serving.engine.prefill import Prefill
from alula.serving.engine.prompts import prepare
from alula.serving.engine.sampling import Defaults, Sampler, draw
from tests.serving.engine.conftest import BLUE, RED, alone, asked, loaded, rendered, tokens_of, told

QUESTIONS = [
    asked("what do you see?", RED),
    asked("how many green triangles are there? be brief"),
    asked("first second third", RED, BLUE),
    asked("two words"),
    asked("what do you see?", BLUE),
]
HOSTS = (
    "host",
    "host+wings",
    "host+turns",
    "host+lora",
    "qwen-vl",
    "host+experts",
    "host+mks2",
    "host+modality",
    "qwen-vl+relating",
)
TEXTS = ("llm", "sliding", "llm+prefix")


def directory(parts: Path, name: str) -> Path:
    return parts / name.rpartition("+")[2]


def test_streamed_is_alone_token_for_token(engine: Engine, parts: Path) -> None:
    """All models, all at once, of different lengths, with and without images."""
    jobs = [(name, each) for name in HOSTS for each in QUESTIONS]
    jobs += [(name, each) for name in TEXTS for each in (QUESTIONS[1], QUESTIONS[3])]
    handles = []
    for place, (name, each) in enumerate(jobs):
        handles.append(engine.submit(Request(name, each, sampling=Sampling(max_tokens=4 + place % 9))))
        if place % 5 == 4:
            time.sleep(0.01)  # so that some join while others run
    for place, ((name, each), handle) in enumerate(zip(jobs, handles, strict=True)):
        events = list(handle)
        assert [delta.index for delta in events if isinstance(delta, Delta)] == list(range(len(events) - 1))
        tokens = [token for delta in events if isinstance(delta, Delta) for token in delta.token_ids]
        assert tokens == alone(directory(parts, name), each, 4 + place % 9), (name, each)
        end = events[-1]
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens == len(tokens)
        assert end.usage.prompt_tokens == rendered(directory(parts, name), each)["input_ids"].shape[1]


def test_it_says_what_is_computed_together_and_why_not(engine: Engine) -> None:
    served = {each.name: each for each in engine.models()}
    assert {name for name, each in served.items() if not each.batched} == {"llm+prefix"}
    assert "learned prompt" in (served["llm+prefix"].why_alone or "")
    assert {name: each.kind for name, each in served.items()} == {
        "host": "host",
        "host+wings": "alula",
        "host+experts": "alula",
        "host+turns": "alula",
        "host+mks2": "alula",
        "host+modality": "alula",
        "host+lora": "peft",
        "llm": "text",
        "llm+prefix": "peft",
        "sliding": "text",
        "qwen-vl": "host",
        "qwen-vl+relating": "alula",
    }
    assert {each.base for each in served.values()} == {None, "host", "llm", "qwen-vl"}
    assert served["host+wings"].adapter == "wings"
    assert served["host"].takes == {"image"}
    assert served["llm"].takes == frozenset()
    assert {name for name, each in served.items() if each.exact_gate} == {"host+wings", "host+experts", "host+turns"}


def test_adapters_share_the_tensors_of_their_base(engine: Engine) -> None:
    base = engine._residents.entered("host")
    own = {value.data_ptr() for value in base.model.state_dict().values()}
    for name in ("host+wings", "host+experts", "host+lora"):
        other = engine._residents.entered(name)
        weights = other.model.state_dict()
        further = [key for key, value in weights.items() if value.data_ptr() not in own]
        assert further
        assert all("alula" in key or "lora_" in key for key in further), further[:3]
        engine._residents.left(other)
    engine._residents.left(base)


def test_text_alone_is_computed_by_the_base_of_an_exact_gate(parts: Path) -> None:
    """Bits are those of one way to compute: a prompt that goes on from a kept prefix is rounded in another order."""

    def ends(name: str, messages: Any) -> tuple[list[Any], str]:
        sampling = Sampling(max_tokens=6, logprobs=True, top_logprobs=3)
        *deltas, end = engine.submit(Request(name, messages, sampling=sampling))
        return [delta.logprobs for delta in deltas], end.computed_by

    with Engine(Limits(prefix_tokens=0)) as engine:
        engine.load("host", parts / "host")
        for name in ("wings", "experts", "lora"):
            engine.load(f"host+{name}", parts / name)
        by_base = ends("host", QUESTIONS[1])
        assert ends("host+wings", QUESTIONS[1]) == by_base == ends("host+experts", QUESTIONS[1])
        assert by_base[1] == "host"
        assert ends("host+lora", QUESTIONS[1])[1] == "host+lora"
        assert ends("host+wings", QUESTIONS[0])[1] == "host+wings"


def test_seeds_are_drawn_alike_whatever_runs_beside(engine: Engine) -> None:
    request = Request("host", QUESTIONS[0], sampling=Sampling(max_tokens=12, temperature=1.5, top_p=0.9, seed=7))
    by_itself, _ = tokens_of(engine.submit(request))
    others = [engine.submit(Request("host", each, sampling=Sampling(temperature=2.0))) for each in QUESTIONS]
    beside, _ = tokens_of(engine.submit(request))
    for other in others:
        other.cancel()
    assert beside == by_itself
    assert by_itself != alone_tokens(engine)
    seeds = {tuple(told(engine, "host", QUESTIONS[0], sampling={"temperature": 1.5, "seed": n})) for n in range(4)}
    assert len(seeds) > 1


def alone_tokens(engine: Engine) -> list[int]:
    return told(engine, "host", QUESTIONS[0])


def test_draws_follow_the_distribution(engine: Engine, parts: Path) -> None:
    """Frequencies of 120 first tokens against the softmax of the model's own logits, cut at top_k."""
    with torch.no_grad():
        logits = loaded(parts / "llm").model(**rendered(parts / "llm", QUESTIONS[3])).logits[0, -1].double()
    best = (logits / 0.5).topk(4)
    wanted = dict(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))
    sampling = [Sampling(max_tokens=1, temperature=0.5, top_k=4, seed=seed) for seed in range(120)]
    handles = [engine.submit(Request("llm", QUESTIONS[3], sampling=each)) for each in sampling[:60]]
    drawn = [tokens_of(handle)[0][0] for handle in handles]
    handles = [engine.submit(Request("llm", QUESTIONS[3], sampling=each)) for each in sampling[60:]]
    drawn += [tokens_of(handle)[0][0] for handle in handles]
    assert set(drawn) <= wanted.keys()
    for token, share in wanted.items():
        assert abs(drawn.count(token) / 120 - share) < 4 * (share * (1 - share) / 120) ** 0.5 + 1e-6


class Penalties(LogitsProcessor):
    """OpenAI's, written as they are defined."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token in set(input_ids[0, self.prompt :].tolist()):
            scores[0, token] -= 1.5 * input_ids[0, self.prompt :].tolist().count(token) + 0.5
        return scores


def test_penalties(engine: Engine, parts: Path) -> None:
    path, plain = parts / "host", alone(parts / "host", QUESTIONS[2], 20)
    repeated = alone(path, QUESTIONS[2], 20, repetition_penalty=1.5)
    assert told(engine, "host", QUESTIONS[2], 20, sampling={"repetition_penalty": 1.5}) == repeated != plain
    ours = Penalties(rendered(path, QUESTIONS[2])["input_ids"].shape[1])
    wanted = alone(path, QUESTIONS[2], 20, logits_processor=[ours])
    given = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    assert told(engine, "host", QUESTIONS[2], 20, sampling=given) == wanted != plain


def test_logprobs_are_the_models(engine: Engine, parts: Path) -> None:
    tokens = told(engine, "host", QUESTIONS[0], 5)
    inputs = rendered(parts / "host", QUESTIONS[0])
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = loaded(parts / "host").model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    barred = loaded(parts / "host").model.generation_config.suppress_tokens
    assert not set(tokens) & set(barred)
    wanted = logits[0, inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
    sampling = Sampling(max_tokens=5, logprobs=True, top_logprobs=2)
    deltas = [
        each for each in engine.submit(Request("host", QUESTIONS[0], sampling=sampling)) if isinstance(each, Delta)
    ]
    found = [each for delta in deltas for each in delta.logprobs or ()]
    assert [each.token_id for each in found] == tokens
    for each, row, token in zip(found, wanted, tokens, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.logprob for top in each.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_texts_end_answers_and_are_no_part_of_them(engine: Engine) -> None:
    def text(*stop: str) -> tuple[str, Finished]:
        return engine.submit(Request("host", QUESTIONS[0], sampling=Sampling(max_tokens=40, stop=stop))).result()

    whole, end = text()
    assert end.reason == "length"
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 3], whole[middle]):
        cut, end = text("never there", stop)
        assert cut == whole[: whole.index(stop)]
        assert end.reason == "stop"
    *deltas, _ = engine.submit(Request("host", QUESTIONS[0], sampling=Sampling(max_tokens=40)))
    pieces = [delta.text for delta in deltas if isinstance(delta, Delta)]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 5


def test_a_prompt_in_the_place_of_messages(engine: Engine, parts: Path) -> None:
    ids = rendered(parts / "llm", QUESTIONS[1])["input_ids"][0].tolist()
    assert told(engine, "llm", None, prompt=ids) == alone(parts / "llm", QUESTIONS[1])
    assert told(engine, "llm", None, prompt="two words")
    with pytest.raises(RequestError, match="stand for media"):
        engine.submit(Request("host", prompt=rendered(parts / "host", QUESTIONS[0])["input_ids"][0].tolist()))
    with pytest.raises(RequestError, match="token ids"):
        engine.submit(Request("llm", prompt=[10**6]))


def test_cancelled_and_late_ones_end_and_hold_nobody_up(parts: Path) -> None:
    with Engine(Limits(running=2, answer_tokens=400)) as engine:
        engine.load("llm", parts / "llm")
        slow, late = (engine.submit(Request("llm", QUESTIONS[1], deadline=each)) for each in (None, 0.15))
        waiting = engine.submit(Request("llm", QUESTIONS[3], deadline=0.1))
        next(iter(slow))
        assert tokens_of(waiting)[1].reason == "deadline"
        _, end = tokens_of(late)
        assert end.reason == "deadline"
        assert end.usage.completion_tokens < 400
        slow.cancel()
        *_, end = list(slow)
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
        assert told(engine, "llm", QUESTIONS[3]) == alone(parts / "llm", QUESTIONS[3])


def test_what_is_refused(engine: Engine, parts: Path) -> None:
    with pytest.raises(UnknownModel, match="host\\+wings"):
        engine.submit(Request("nobody", QUESTIONS[0]))
    with pytest.raises(RequestError, match="takes no images"):
        engine.submit(Request("llm", QUESTIONS[0]))
    with pytest.raises(RequestError, match="up to 511"):
        engine.submit(Request("llm", asked("word " * 600)))
    for wrong in (
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"stop": [""]},
        {"top_logprobs": 2},
        {"seed": 0.5},
    ):
        with pytest.raises(RequestError):
            Sampling(**wrong)
    for wrong, what in (([True, 5], "whole numbers"), ("\ud800", "surrogate"), ([5] * 600, "up to 511")):
        with pytest.raises(RequestError, match=what) as refused:
            engine.submit(Request("llm", prompt=wrong))
        assert refused.value.where == "prompt"
    for count, what in (
        (1500, "more than 1022 tokens long, and up to 511"),
        (5000, "characters long, and up to 511"),
    ):
        with pytest.raises(RequestError, match=what):  # told by a part of the text, or by its length alone
            engine.submit(Request("host", asked("first second third " * count)))
        with pytest.raises(RequestError, match=what):
            engine.submit(Request("llm", prompt="first second third " * count))
    with pytest.raises(RequestError, match="messages or a prompt"):
        Request("llm")
    with pytest.raises(RequestError, match="part is of type"):
        engine.submit(Request("llm", [{"role": "user", "content": [{"type": "smell"}]}]))
    small = Limits(images_per_request=1, pixels_per_image=3000, prompt_tokens=40, queue=1, running=1, answer_tokens=500)
    with Engine(small) as other:
        other.load("host", parts / "host")
        with pytest.raises(RequestError, match="up to 1 are taken"):
            other.submit(Request("host", QUESTIONS[2]))
        with pytest.raises(RequestError, match="up to 40 are taken"):
            other.submit(Request("host", asked("first second third " * 30)))
        with pytest.raises(RequestError, match="60 x 60 pixels"):
            other.submit(Request("host", asked("x", RED.resize((60, 60)))))
        running = [other.submit(Request("host", QUESTIONS[1]))]
        running += [other.submit(Request("host", QUESTIONS[1])) for _ in range(1) if _begun(running[0])]
        with pytest.raises(QueueFull):
            other.submit(Request("host", QUESTIONS[1]))
        for each in running:
            each.cancel()
    with pytest.raises(EngineClosed):
        other.submit(Request("host", QUESTIONS[1]))


def _begun(handle: Any) -> bool:
    """True, once the first piece is there."""
    return bool(next(iter(handle)))


def test_models_come_and_go_while_others_answer(engine: Engine, parts: Path) -> None:
    running = [engine.submit(Request("host", each, sampling=Sampling(max_tokens=30))) for each in QUESTIONS]
    engine.load("host+more", parts / "wings")
    theirs = engine.submit(Request("host+more", QUESTIONS[0], sampling=Sampling(max_tokens=30)))
    with pytest.raises(UsageError, match="loaded already"):
        engine.load("host+more", parts / "wings")
    with pytest.raises(UsageError, match="stand on it"):
        engine.unload("host")
    engine.unload("host+more")  # waits for its request
    assert theirs._events[-1].reason == "length"  # type: ignore[union-attr]
    assert tokens_of(theirs)[0] == alone(parts / "wings", QUESTIONS[0], 30)
    with pytest.raises(UnknownModel):
        engine.submit(Request("host+more", QUESTIONS[0]))
    for each, handle in zip(QUESTIONS, running, strict=True):
        assert tokens_of(handle)[0] == alone(parts / "host", each, 30)


def test_a_base_stays_for_an_adapter_that_is_on_its_way(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to go while an adapter of it is being loaded, it waits, and is told that one stands on it."""
    on_its_way, let = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        on_its_way.set()
        assert let.wait(60)
        return put_adapter(*args)

    monkeypatch.setattr(residents, "put_adapter", slow)  # as from a slow disk
    with Engine() as engine, ThreadPoolExecutor(2) as threads:
        engine.load("host", parts / "host")
        loading = threads.submit(engine.load, "host+wings", parts / "wings")
        assert on_its_way.wait(60)
        unloading = threads.submit(engine.unload, "host")
        wait([unloading], timeout=0.3)  # who does not wait for it is done by now
        let.set()
        with pytest.raises(UsageError, match="wings stand on it"):
            unloading.result()
        assert loading.result().base == "host"
        assert told(engine, "host+wings", QUESTIONS[0]) == alone(parts / "wings", QUESTIONS[0])


def test_an_adapter_brings_its_base(parts: Path) -> None:
    with Engine() as engine:
        engine.load("mine", parts / "wings")
        assert {each.name: each.base for each in engine.models()} == {"host": None, "mine": "host"}
        assert told(engine, "mine", QUESTIONS[0]) == alone(parts / "wings", QUESTIONS[0])


@pytest.mark.parametrize("name", ["host", "host+wings", "host+turns"])
def test_turns_go_on_where_the_last_ended(engine: Engine, parts: Path, name: str) -> None:
    first = asked("what do you see? " * 3, RED)
    text, end = engine.submit(Request(name, first, sampling=Sampling(max_tokens=8))).result()
    again = [*first, {"role": "assistant", "content": text}, *asked("and then?")]
    tokens, end = tokens_of(engine.submit(Request(name, again, sampling=Sampling(max_tokens=12))))
    prompt = rendered(directory(parts, name), first)["input_ids"].shape[1]
    assert end.usage.cached_tokens > prompt - 4
    parted = [
        {**message, "content": asked(message["content"])[0]["content"]}
        if isinstance(message["content"], str)
        else message
        for message in again
    ]
    assert tokens == alone(directory(parts, name), parted)
    other = [*asked("what do you see? " * 3, RED.rotate(180, fillcolor=(0, 255, 0), translate=(9, 9))), *again[1:]]
    _, end = tokens_of(engine.submit(Request(name, other, sampling=Sampling(max_tokens=1))))
    assert end.usage.cached_tokens < 12  # what stands before the picture


@pytest.mark.parametrize("name", ["host", "host+wings", "host+turns", "sliding"])
def test_prompts_in_pieces_are_prompts_as_a_whole(parts: Path, name: str) -> None:
    images = (RED, BLUE) if name.startswith("host") else ()
    messages = asked("how many green triangles are there? " * 4, *images)
    with Engine(Limits(prefill_tokens=9)) as engine:
        base = name.partition("+")[0]
        engine.load(base, parts / base)
        if name != base:
            engine.load(name, directory(parts, name))
        running = engine.submit(Request(base, QUESTIONS[3], sampling=Sampling(max_tokens=30)))
        assert told(engine, name, messages) == alone(directory(parts, name), messages)
        assert tokens_of(running)[0] == alone(parts / base, QUESTIONS[3], 30)


def test_many_threads_get_what_one_gets(engine: Engine, parts: Path) -> None:
    failures: list[Any] = []

    def client(number: int) -> None:
        name, messages = HOSTS[number % 4], QUESTIONS[number % 5]
        for _ in range(2):
            found = told(engine, name, messages, 5 + number % 3)
            if found != alone(directory(parts, name), messages, 5 + number % 3):
                failures.append((name, number))

    for name in HOSTS[:4]:
        loaded(directory(parts, name))
    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures


def test_an_event_loop_reads_answers(engine: Engine, parts: Path) -> None:
    async def read(messages: Any) -> list[int]:
        handle = engine.submit(Request("host", messages, sampling=Sampling(max_tokens=12)))
        return [token async for event in handle if isinstance(event, Delta) for token in event.token_ids]

    async def both() -> list[list[int]]:
        return await asyncio.gather(*(read(each) for each in QUESTIONS))

    assert asyncio.run(both()) == [alone(parts / "host", each) for each in QUESTIONS]


@pytest.mark.parametrize("name", ["llm", "sliding"])
def test_one_that_fails_is_the_only_one_that_does(parts: Path, name: str) -> None:
    """A fault that a token sets off behind the first layer, in one request's prompt and in the midst of another's
    answer, which is drawn by chance as is that of the one beside it."""
    sampling = [Sampling(max_tokens=20, temperature=2.0, seed=seed) for seed in (1, 2)]
    asks = [QUESTIONS[1], QUESTIONS[3], asked("first"), asked("be brief")]
    with Engine(Limits(prefix_tokens=0)) as engine:
        engine.load(name, parts / name)
        wanted = [
            tokens_of(engine.submit(Request(name, each, sampling=how)))[0]
            for each, how in zip(asks, sampling, strict=False)
        ]
        resident = engine._residents.entered(name)
        mine = next(token for token in wanted[0][2:] if token not in wanted[1])
        poison = rendered(parts / name, asked("first"))["input_ids"][0].tolist()
        faults: list[bool] = []

        def look(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs["input_ids"]
            in_step = ids.shape[1] == 1 and bool((ids == mine).any())
            faults[:] = [in_step or any(row.tolist()[-len(poison) :] == poison for row in ids)]

        def fail(*_: Any) -> None:
            if faults[0]:
                raise RuntimeError("a fault")

        resident.model.register_forward_pre_hook(look, with_kwargs=True)
        resident.model.model.layers[1].register_forward_pre_hook(fail)
        hows = [*sampling, Sampling(max_tokens=20), Sampling(max_tokens=2)]
        handles = [engine.submit(Request(name, each, sampling=how)) for each, how in zip(asks, hows, strict=True)]
        for place in (0, 2):
            with pytest.raises(RuntimeError, match="a fault"):
                list(handles[place])
        assert tokens_of(handles[1])[0] == wanted[1]
        assert tokens_of(handles[3])[0] == alone(parts / name, asks[3], 2)
        engine._residents.left(resident)


def test_a_fault_in_drawing_costs_no_random_number_of_others() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    how = Sampling(temperature=2.0, seed=5)
    by_itself, disturbed = Sampler(how, Defaults(), prompt=[1]), Sampler(how, Defaults(), prompt=[1])
    drawn: dict[Sampler, list[int]] = {by_itself: [], disturbed: []}
    for _ in range(8):
        beside = Sampler(Sampling(repetition_penalty=2.0), Defaults(), prompt=[50])  # stands in no row of logits
        with pytest.raises(IndexError):
            draw([disturbed, beside], logits)
        for each, tokens in drawn.items():
            tokens += draw([each], logits[:1])[1]
            each.told(tokens[-1])
    assert drawn[by_itself] == drawn[disturbed]
    assert len(set(drawn[by_itself])) > 1


def test_a_step_that_finds_no_memory_to_let_one_go_ends_its_own_batch_alone(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other models' answers go on; and one whose prefix cannot be kept is there all the same."""
    with Engine() as engine:
        engine.load("llm", parts / "llm")
        engine.load("host", parts / "host")

        def none(cache: Any, samples: Any, length: int) -> Any:
            if len(samples) == 1:
                raise torch.OutOfMemoryError("no room")
            return chosen(cache, samples, length)

        monkeypatch.setattr(batch, "chosen", none)  # there is no device here whose memory could be filled
        beside = engine.submit(Request("host", QUESTIONS[1], sampling=Sampling(max_tokens=20)))
        long = engine.submit(Request("llm", QUESTIONS[1], sampling=Sampling(max_tokens=40)))
        short = engine.submit(Request("llm", QUESTIONS[3], sampling=Sampling(max_tokens=3)))
        assert len(tokens_of(short)[0]) == 3
        with pytest.raises(torch.OutOfMemoryError):
            list(long)
        assert tokens_of(beside)[0] == alone(parts / "host", QUESTIONS[1], 20)


def test_memory_is_flat(parts: Path) -> None:
    def tensors() -> int:
        gc.collect()
        # of subclasses there may be some whose sizes cannot be told: what compiling left in this process
        plain = (torch.Tensor, torch.nn.Parameter)
        return sum(each.numel() for each in gc.get_objects() if type(each) in plain)

    def held(prefix_tokens: int) -> tuple[list[int], int]:
        """Numbers in tensors after each of four blocks of requests, and tokens kept of prefixes."""
        with Engine(Limits(prefix_tokens=prefix_tokens)) as engine:
            engine.load("host", parts / "host")
            engine.load("host+wings", parts / "wings")
            counts = []
            for block in range(4):
                handles = [
                    engine.submit(
                        Request(
                            HOSTS[number % 2],
                            asked(f"{block} {number}", *[RED] * (number % 3 == 0)),
                            sampling=Sampling(max_tokens=2),
                        )
                    )
                    for number in range(40)
                ]
                for handle in handles:
                    list(handle)
                del handles, handle
                counts.append(tensors())
            return counts, engine._scheduler._prefixes.tokens

    counts, _ = held(0)
    # what the engine's thread has in hand differs by some hundredths; caches that stayed would be half as much again
    assert max(counts[1:]) < 1.15 * counts[1]
    assert 0 < held(200)[1] <= 200


def test_pictures_are_let_go_behind_the_prompt(parts: Path) -> None:
    """While the answer is still written, nothing holds the picture or its pixels."""
    with Engine() as engine:
        engine.load("host", parts / "host")
        resident = engine._residents.entered("host")
        seen: list[weakref.ref[Any]] = []

        def look(module: Any, args: Any, kwargs: Any) -> None:
            if "pixel_values" in kwargs:
                seen.append(weakref.ref(kwargs["pixel_values"]))

        resident.model.register_forward_pre_hook(look, with_kwargs=True)
        picture = RED.copy()
        handle = engine.submit(Request("host", asked("what do you see?", picture), sampling=Sampling(max_tokens=450)))
        seen.append(weakref.ref(picture))
        del picture
        events = iter(handle)
        next(events)
        next(events)  # the second token is of a step: the prompt's forward is over
        gc.collect()
        assert len(seen) == 2
        assert [each() is None for each in seen] == [True, True]
        handle.cancel()
        *_, end = events
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
        engine._residents.left(resident)


def test_what_waits_is_not_on_the_device(parts: Path) -> None:
    """Tensors of a meta device cannot be read: what can be told of a prompt there was read on the host."""
    with Engine() as engine:
        engine.load("qwen-vl", parts / "qwen-vl", device="meta")
        request = Request("qwen-vl", QUESTIONS[2], sampling=Sampling(max_tokens=2))
        with Engine() as other:
            other.load("qwen-vl", parts / "qwen-vl")
            assert engine.preview(request) == other.preview(request)
        resident = engine._residents.entered("qwen-vl")
        prepared = prepare(resident, request, engine.limits)
        assert {each.device.type for each in prepared.inputs.values() if isinstance(each, torch.Tensor)} == {"cpu"}
        given: list[str] = []
        resident.model.register_forward_pre_hook(
            lambda _, __, kwargs: given.extend(kwargs[name].device.type for name in ("input_ids", "pixel_values")),
            with_kwargs=True,
        )
        with contextlib.suppress(Exception):  # whatever a model without weights does
            Prefill(resident, prepared, engine.limits.prefill_tokens).step()
        assert given == ["meta", "meta"]
        engine._residents.left(resident)


def test_kept_prefixes_are_bounded_by_bytes(parts: Path) -> None:
    """The bytes are those of the caches' tensors, what grafts keep included; what was not asked for longest goes."""

    def ask(engine: Engine, request: Request) -> int:
        """How many tokens of it were found."""
        _, end = tokens_of(engine.submit(request))
        while engine.running:  # what it left is kept before it counts as done
            time.sleep(0.001)
        kept = [layer for each in engine._scheduler._prefixes._kept for layer in each.cache.layers]
        tensors = [tensor for layer in kept for tensor in (layer.keys, layer.values)]
        held = {each.data_ptr(): each.untyped_storage().nbytes() for each in tensors if each.numel()}
        assert engine.kept_bytes == sum(held.values())
        return end.usage.cached_tokens

    def of_ids(first: int) -> Request:
        return Request("llm", prompt=[first] * 20, sampling=Sampling(max_tokens=5))

    with Engine() as engine:
        engine.load("llm", parts / "llm")
        ask(engine, of_ids(5))
        one = engine.kept_bytes
        engine.load("host+mks2", parts / "mks2")
        ask(engine, Request("host+mks2", QUESTIONS[0], sampling=Sampling(max_tokens=5)))
        assert engine.kept_bytes > 2 * one  # longer, and with more kept of each token
    with Engine(Limits(prefix_bytes=2 * one)) as engine:
        engine.load("llm", parts / "llm")
        assert [ask(engine, of_ids(each)) for each in (5, 6, 5)] == [0, 0, 19]
        assert engine.kept_bytes == 2 * one
        assert [ask(engine, of_ids(each)) for each in (7, 5, 7, 6)] == [0, 19, 19, 0]  # 6 went for 7, and not 5
        assert engine.kept_bytes == 2 * one
    with Engine(Limits(prefix_bytes=one - 1)) as engine:
        engine.load("llm", parts / "llm")
        assert [ask(engine, of_ids(5)) for _ in range(2)] == [0, 0]
        assert engine.kept_bytes == 0


def test_models_that_are_unloaded_are_let_go(parts: Path) -> None:
    with Engine() as engine:
        for is_asked in (False, True):
            engine.load("llm", parts / "llm")
            resident = engine._residents.entered("llm")
            engine._residents.left(resident)
            model = weakref.ref(resident.model)
            del resident
            if is_asked:
                told(engine, "llm", QUESTIONS[3])
            engine.unload("llm")
            until = time.monotonic() + 5
            while model() is not None and time.monotonic() < until:
                gc.collect()
                time.sleep(0.02)
            assert model() is None, is_asked


def test_closing_is_told_to_all_alike(parts: Path) -> None:
    """To one computed by itself as to those that wait."""
    engine = Engine()
    engine.load("llm", parts / "llm")
    engine.load("llm+prefix", parts / "prefix")
    alone_one = engine.submit(Request("llm+prefix", QUESTIONS[1], sampling=Sampling(max_tokens=400)))
    assert _begun(alone_one)
    waiting = engine.submit(Request("llm+prefix", QUESTIONS[1]))
    engine.close()
    for handle in (alone_one, waiting):
        with pytest.raises(EngineClosed):
            list(handle)


def test_prompts_with_roles_and_without_are_computed_together(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts to an exactly gated adapter that goes by turns are rows of its base's, which goes by none."""
    names = ["host", "host+turns", "host", "host+turns"]
    with Engine(Limits(prefix_tokens=0)) as engine:
        engine.load("host", parts / "host")
        engine.load("host+turns", parts / "turns")
        handles = [engine.submit(Request(each, QUESTIONS[3], sampling=Sampling(max_tokens=6))) for each in names]
        wanted = alone(parts / "host", QUESTIONS[3], 6)
        assert [tokens_of(handle)[0] for handle in handles] == [wanted] * len(names)
    assert not caplog.records
