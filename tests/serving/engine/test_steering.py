"""What holds for one request alone: highlights, budgets, policies, and where its tokens looked."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import alula
from alula.errors import AlulaError
from alula.policies import Budget, ParallelAttention, Policy, Skip, Withdraw
from alula.serving.engine import Delta, Engine, Highlighted, Limits, Request, RequestError, Sampling
from alula.serving.engine.scheduler import _SWEEP
from alula.steering import Box, Prompt
from tests.serving.engine.conftest import BLUE, RED, alone, asked, loaded, rendered, tokens_of, told

KEEPS_ALL = Budget(image_tokens=999)
ASKED = asked("what do you see? first second third", RED, BLUE)


def generated(path: Path, messages: Any) -> list[int]:
    inputs = rendered(path, messages)
    found = loaded(path).model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["host", "host+wings"])
def test_each_gets_what_it_asked_for_and_others_do_not(engine: Engine, parts: Path, name: str) -> None:
    path = parts / name.rpartition("+")[2]
    model, processor = loaded(path)
    box = Box(0, 0, 10, 20)
    options: list[dict[str, Any]] = [
        {"highlight": Highlighted(spans=["second"], regions=[(1, box)], strength=3.0, guidance=2.0)},
        {"image_tokens": 4},
        {"policies": {"withdraw": Withdraw(layer=1)}},
        {},
        {"highlight": Highlighted(regions=[box], strength=5.0, guidance=1.0), "image_tokens": 9},
    ]
    handles = [engine.submit(Request(name, ASKED, sampling=Sampling(max_tokens=12), **each)) for each in options]
    found = [tokens_of(handle) for handle in handles]
    wanted = []
    prompt = Prompt(model, processor, rendered(path, ASKED), ASKED)
    second = Box(0, 0, 10, 20, image=1)
    with alula.highlight(model, prompt, spans=["second"], regions=[second], strength=3.0, guidance=2.0):
        wanted.append(generated(path, ASKED))
    with Budget(image_tokens=4).on(model):
        wanted.append(generated(path, ASKED))
    with Withdraw(layer=1).on(model):
        wanted.append(generated(path, ASKED))
    wanted.append(alone(path, ASKED))
    with Budget(image_tokens=9).on(model), alula.highlight(model, prompt, regions=[box], strength=5.0, guidance=1.0):
        wanted.append(generated(path, ASKED))
    assert [tokens for tokens, _ in found] == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 2
    kept = [(end.usage.image_tokens, end.usage.image_tokens_of) for _, end in found]
    assert kept == [(32, 32), (8, 32), (32, 32), (32, 32), (18, 32)]
    assert told(engine, name, ASKED) == alone(path, ASKED)


def test_where_tokens_looked(engine: Engine, parts: Path) -> None:
    """Against eager attention over the whole sequence."""
    *deltas, _ = engine.submit(Request("host", ASKED, sampling=Sampling(max_tokens=5), attention=True))
    looks = [each for delta in deltas if isinstance(delta, Delta) for each in delta.attention or ()]
    tokens = [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids]
    assert tokens == alone(parts / "host", ASKED, 5)
    inputs = rendered(parts / "host", ASKED)
    host, _ = alula.load_model(parts / "host")
    host.set_attn_implementation("eager")
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        weights = host(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    mean = torch.stack(weights).mean(dim=(0, 2))[0]  # over layers and heads
    places = (inputs["input_ids"][0] == host.config.image_token_id).nonzero()[:, 0]
    prompt = inputs["input_ids"].shape[1]
    assert len(looks) == 5
    for step, of_token in enumerate(looks):
        assert [(look.item, look.grid) for look in of_token] == [(0, (4, 4)), (1, (4, 4))]
        row = mean[prompt - 1 + step]
        for look, own in zip(of_token, places.view(2, 16), strict=True):
            assert look.weights == pytest.approx(row[own].tolist(), abs=1e-5)
            assert look.share == pytest.approx(float(row[own].sum()), abs=1e-4)


def test_those_that_look_are_computed_together(parts: Path) -> None:
    """Of different lengths, with others beside, in pieces and behind kept prefixes: as each by itself."""

    def looks(handle: Any) -> tuple[list[int], list[float]]:
        deltas = [each for each in handle if isinstance(each, Delta)]
        tokens = [token for delta in deltas for token in delta.token_ids]
        looked = [look for delta in deltas for of_token in delta.attention or () for look in of_token]
        return tokens, [weight or 0.0 for look in looked for weight in look.weights]

    def asks(name: str, messages: Any, **options: Any) -> Request:
        return Request(name, messages, sampling=Sampling(max_tokens=6), **options)

    asked_for = [ASKED, asked("what?", RED), asked("first second third " * 6, BLUE, RED), asked("two words", BLUE)]
    with Engine(Limits(prefill_tokens=40)) as engine:
        engine.load("host", parts / "host")
        engine.load("host+wings", parts / "wings")
        forwards: list[int] = []
        resident = engine._residents.entered("host")
        resident.watched.model.register_forward_pre_hook(
            lambda _, __, given: forwards.append(len(given["input_ids"])), with_kwargs=True
        )
        for name in ("host", "host+wings"):
            path = parts / name.rpartition("+")[2]
            beside = [engine.submit(asks(name, each)) for each in asked_for]
            together = [engine.submit(asks(name, each, attention=True)) for each in asked_for]
            found = [looks(handle) for handle in together]
            for handle, each, (tokens, weights) in zip(beside, asked_for, found, strict=True):
                assert tokens_of(handle)[0] == tokens == alone(path, each, 6)
                # a policy without effect sends it the other way
                by_itself = looks(engine.submit(asks(name, each, attention=True, policies={"all": KEEPS_ALL})))
                assert by_itself[0] == tokens
                assert weights == pytest.approx(by_itself[1], abs=1e-5)
                again = engine.submit(asks(name, each, attention=True))
                assert looks(again)[1] == pytest.approx(weights, abs=1e-5)
        assert max(forwards) > 1
        engine._residents.left(resident)


def test_of_tokens_that_are_gone_nothing_is_said(engine: Engine, parts: Path) -> None:
    asks = Highlighted(spans=["second"], strength=2.0)
    request = Request("host", ASKED, sampling=Sampling(max_tokens=3), attention=True, image_tokens=4, highlight=asks)
    looks = [each for delta in engine.submit(request) if isinstance(delta, Delta) for each in delta.attention or ()]
    assert len(looks) == 3
    for look in (look for of_token in looks for look in of_token):
        assert sum(weight is not None for weight in look.weights) == 4
        assert look.share == pytest.approx(sum(weight for weight in look.weights if weight is not None))


def test_settings_of_a_checkpoint_hold_once_whoever_computes(parts: Path, tmp_path: Path) -> None:
    """By itself, together with others, and as `generate` has it."""
    path = tmp_path / "host"
    shutil.copytree(parts / "host", path)
    config = GenerationConfig.from_pretrained(path)
    plain = alone(parts / "host", ASKED)
    config.repetition_penalty, config.suppress_tokens, config.stop_strings = 1.3, plain[:1], ["~"]
    config.save_pretrained(path)
    wanted = alone(path, ASKED, tokenizer=loaded(path).processor.tokenizer)
    with Engine() as engine:
        assert engine.load("host", path).batched
        found = [told(engine, "host", ASKED), told(engine, "host", ASKED, policies={"all": KEEPS_ALL})]
    assert found == [wanted, wanted]
    assert wanted != plain


def test_what_does_not_fit_is_said_to_its_reader(engine: Engine, parts: Path) -> None:
    lost = engine.submit(Request("host", ASKED, highlight=Highlighted(spans=["not there at all"])))
    with pytest.raises(AlulaError, match="is not there"):
        list(lost)
    beyond = engine.submit(Request("host", ASKED, policies={"withdraw": Withdraw(layer=7)}))
    with pytest.raises(AlulaError, match="layer 7"):
        list(beyond)
    for wrong, field in (
        ({"highlight": Highlighted(spans=["not there at all"])}, "highlight"),
        ({"highlight": Highlighted(regions=[Box(0, 0, 9, 9, image=7)])}, "highlight"),
        ({"policies": {"withdraw": Withdraw(layer=7)}}, "policies: withdraw.layer"),
    ):
        with pytest.raises(RequestError) as refused:
            engine.preview(Request("host", ASKED, **wrong))
        assert refused.value.where == field
    assert told(engine, "host", ASKED) == alone(parts / "host", ASKED)


@pytest.mark.parametrize(
    "options", [{"image_tokens": 4}, {"attention": True}, {"policies": {"w": Withdraw(layer=1), "all": KEEPS_ALL}}]
)
def test_what_is_asked_of_pictures_needs_one(engine: Engine, options: dict[str, Any]) -> None:
    (field,) = options
    for words in ({"messages": asked("two words")}, {"prompt": "two words"}):
        for ask in (engine.submit, engine.preview):
            with pytest.raises(RequestError, match="words alone") as refused:
                ask(Request("host+wings", **words, **options))
            assert refused.value.where == field
            assert f"leave {field} out" in (refused.value.remedy or "")


@pytest.mark.parametrize("policy", [Skip(part="mlp", layers=(0,), tokens="all"), ParallelAttention(tokens="all")])
def test_policies_about_text_hold_without_a_picture(engine: Engine, parts: Path, policy: Policy) -> None:
    model, _ = loaded(parts / "host")
    with policy.on(model):
        wanted = generated(parts / "host", asked("two words"))
    assert told(engine, "host", asked("two words"), policies={"p": policy}) == wanted


def test_a_preview_says_what_a_budget_leaves(engine: Engine, parts: Path) -> None:
    preview = engine.preview(Request("host", ASKED, image_tokens=5))
    assert preview.prompt_tokens == rendered(parts / "host", ASKED)["input_ids"].shape[1]
    assert [(each.tokens, each.kept, each.grid) for each in preview.images] == [(16, 5, (4, 4))] * 2


def test_previews_are_in_nobodys_way(engine: Engine, parts: Path) -> None:
    """What a preview tries on the model reaches no answer that is computed meanwhile, steered or not."""
    marked = {"highlight": Highlighted(spans=["second"]), "policies": {"w": Withdraw(layer=1)}}
    alike, steered = told(engine, "host", ASKED), told(engine, "host", ASKED, **marked)
    assert alike == alone(parts / "host", ASKED) != steered
    over = threading.Event()

    def look() -> int:
        count = 0
        while not over.is_set():
            count += engine.preview(Request("host", ASKED, image_tokens=4, **marked)).prompt_tokens > 0
        return count

    with ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        try:
            for _ in range(4):
                assert told(engine, "host", ASKED) == alike
                assert told(engine, "host", ASKED, **marked) == steered
        finally:
            over.set()
        assert all(each.result() for each in looking)


def test_neither_side_starves_the_other(engine: Engine) -> None:
    """Turns are counted: plain answers while others are computed alone, in order, and these while batches are full."""
    ended: list[int] = []

    def read(number: int, handle: Any) -> None:
        list(handle)
        ended.append(number)

    def alone_ones() -> list[threading.Thread]:
        asks = [Request("host", ASKED, sampling=Sampling(max_tokens=20), image_tokens=4) for _ in range(4)]
        readers = [
            threading.Thread(target=read, args=(number, engine.submit(each))) for number, each in enumerate(asks)
        ]
        for reader in readers:
            reader.start()
        return readers

    readers = alone_ones()
    plain = 0
    while len(ended) < 4:
        told(engine, "host", asked(f"two words {plain}"), 2)
        plain += 1
        assert plain < 2_000
    assert plain > 4  # a plain one waits for no more than a forward of theirs
    assert ended == [0, 1, 2, 3]
    for reader in readers:
        reader.join()
    ended.clear()
    readers, running, begun = alone_ones(), [], 0
    while len(ended) < 4:  # eight long ones at any time
        while len(running) < 8:
            running.append(engine.submit(Request("host", asked("first"), sampling=Sampling(max_tokens=100))))
            begun += 1
        list(running.pop(0))
        assert begun < 2_000
    for handle in running:
        handle.cancel()
    for reader in readers:
        reader.join()


@contextmanager
def held(engine: Engine, *names: str) -> Iterator[tuple[threading.Event, list[str]]]:
    """An event that requests computed by themselves wait for, and the models whose prompts were begun, in order."""
    let, begun, hooks = threading.Event(), list[str](), []

    def hook(name: str) -> Any:
        def wait(_: Any, __: Any, given: Any) -> None:
            if given["input_ids"].shape[1] > 1:
                begun.append(name)
            assert let.wait(60)

        return wait

    residents = [engine._residents.entered(name) for name in names]
    try:
        for name, each in zip(names, residents, strict=True):
            hooks.append(each.steered.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield let, begun
    finally:
        let.set()
        for each in hooks:
            each.remove()
        for resident in residents:
            engine._residents.left(resident)


def test_models_take_turns(engine: Engine) -> None:
    """However many one of them is asked for first."""
    names = ["host", "host+wings"]
    with held(engine, *names) as (let, begun):
        asks = [
            Request(name, ASKED, sampling=Sampling(max_tokens=2), image_tokens=4) for name in names for _ in range(3)
        ]
        handles = [engine.submit(each) for each in asks]
        let.set()
        for handle in handles:
            handle.result()
    assert begun in (names * 3, names[::-1] * 3)  # whose turn it is first goes by who had the last one


def test_who_waits_keeps_nobody_busy(parts: Path) -> None:
    """With all places taken there is a turn for each token and each look at those that wait, and no more."""
    with Engine(Limits(running=1)) as engine:
        engine.load("host", parts / "host")
        turns = 0
        turn = engine._scheduler._turn

        def counted() -> None:
            nonlocal turns
            turns += 1
            turn()

        engine._scheduler._turn = counted  # type: ignore[method-assign]
        with held(engine, "host") as (let, begun):
            alone_ones = [engine.submit(Request("host", ASKED, image_tokens=4)) for _ in range(2)]
            while not begun:
                time.sleep(0.001)
            before, since = turns, time.monotonic()
            plain = [engine.submit(Request("host", ASKED, sampling=Sampling(max_tokens=5))) for _ in range(2)]
            assert [len(tokens_of(handle)[0]) for handle in plain] == [5, 5]  # beside what is held
            time.sleep(5 * _SWEEP)
            looks = (time.monotonic() - since) / _SWEEP
            assert turns - before <= 2 * 5 + len(plain) + looks + 1
            for handle in alone_ones:
                handle.cancel()
            let.set()
            for handle in alone_ones:
                list(handle)
