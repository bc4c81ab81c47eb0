"""Two threads over one model: each gets what it would get alone, whatever the other switches meanwhile."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from alula import TokenMap
from alula.probes import Alignment, AttentionShift, Overlap, noise_prompt
from alula.seam import find
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import grafted, prompt_tokens

ROUNDS = 12


def _side_by_side(*jobs: Callable[[], Any]) -> list[list[Any]]:
    """What each job gives in ROUNDS rounds, all jobs at once."""
    given: list[list[Any]] = [[] for _ in jobs]
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def work(place: int) -> None:
        try:
            with torch.no_grad():
                barrier.wait(timeout=30)
                for _ in range(ROUNDS):
                    given[place].append(jobs[place]())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures, failures
    assert [len(each) for each in given] == [ROUNDS] * len(jobs)
    return given


@pytest.mark.parametrize("config", ["mass", "constant"])
@pytest.mark.parametrize("name", ["llava-qwen3", "llava-gemma3"])
def test_a_graft_disabled_in_one_thread_speaks_in_the_other(name: str, config: str) -> None:
    model, graft = grafted(name, config)
    inputs = zoo.batch(name, "3I4", "2I1")

    def with_graft() -> torch.Tensor:
        return model(**inputs).logits

    def without_graft() -> torch.Tensor:
        with graft.disabled():
            assert not graft.enabled
            return model(**inputs).logits

    with torch.no_grad():
        expected = [with_graft(), without_graft()]
    assert not torch.equal(*expected)
    for given, alone in zip(_side_by_side(with_graft, without_graft), expected, strict=True):
        assert all(torch.equal(each, alone) for each in given)
    assert graft.enabled


def test_a_given_map_holds_for_its_own_thread() -> None:
    model, _ = grafted("qwen3", "mass")
    ids = torch.tensor([zoo.prompt("3I4")])
    seam: Any = find(model)
    maps = [TokenMap.from_modalities((ids == zoo.IMAGE).long()), TokenMap.from_modalities((ids == ids[0, 0]).long())]

    def with_map(tokens: TokenMap) -> torch.Tensor:
        with seam.given_tokens(tokens):
            return model.generate(ids, max_new_tokens=2, output_logits=True, return_dict_in_generate=True).logits[-1]

    jobs = [lambda: with_map(maps[0]), lambda: with_map(maps[1])]
    expected = [job() for job in jobs]
    assert not torch.equal(*expected)
    for given, alone in zip(_side_by_side(*jobs), expected, strict=True):
        assert all(torch.equal(each, alone) for each in given)


@pytest.mark.parametrize("make", [AttentionShift, Alignment, Overlap])
def test_a_probe_measures_its_own_thread_and_touches_no_other(make: Any) -> None:
    model, _ = grafted("llava-qwen3", "mass")
    mine, theirs = zoo.batch("llava-qwen3", "3I4"), zoo.batch("llava-qwen3", "2I3I2", seed=3)
    bare = zoo.batch("llava-qwen3", "5", seed=4)

    def measured() -> dict[str, torch.Tensor]:
        probe = make()
        with probe.on(model), noise_prompt(model) if make is Alignment else nullcontext():
            model(**mine)
        return probe.state_dict()

    def plain() -> torch.Tensor:
        return torch.cat([model(**theirs).logits[0], model(**bare).logits[0]])

    with torch.no_grad():
        expected, logits = measured(), plain()
    figures, others = _side_by_side(measured, plain)
    for state in figures:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(torch.equal(each, logits) for each in others)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("name", "config"), [("llava-llama", "mass"), ("llava-gemma3", "keys kept"), ("qwen3", "paper")]
)
def test_two_threads_generate_what_each_generates_alone(name: str, config: str, options: dict[str, Any]) -> None:
    """Caches, beams and maps of prompts belong to a request; nothing of them is kept on the model."""
    model, _ = grafted(name, config)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generating(layout: str, seed: int) -> Callable[[], torch.Tensor]:
        inputs = zoo.batch(name, layout, seed=seed)

        def job() -> torch.Tensor:
            with prompt_tokens(model, name, inputs):
                output = model.generate(**inputs, **options, **settings)
            return torch.stack(output.logits)

        return job

    jobs = [generating("3I4", 0), generating("2I3I2", 3)]
    expected = [job() for job in jobs]
    for given, alone in zip(_side_by_side(*jobs), expected, strict=True):
        assert all(torch.equal(each, alone) for each in given)


@pytest.mark.parametrize(("name", "config"), [("llava-qwen3", "mass"), ("llava-gemma3", "keys kept")])
def test_another_thread_reads_with_gradients_wherever_a_step_is(name: str, config: str) -> None:
    """As one of the graft's functions is called, of which it may let go of what steps have in common."""
    model, _ = grafted(name, config)
    inputs, word = zoo.batch(name, "3I4"), torch.tensor([[5]])

    def stepped(meanwhile: Callable[[Any], None]) -> torch.Tensor:
        before = sys.gettrace()
        with torch.no_grad():
            cache = cache_of_output(model(**inputs, use_cache=True))
            sys.settrace(lambda frame, *_: meanwhile(frame.f_code))
            try:
                return model(input_ids=word, **{cache_keyword(): cache}).logits
            finally:
                sys.settrace(before)

    called: dict[Any, None] = {}
    expected = stepped(lambda code: called.setdefault(code))
    places = [code for code in called if f"{os.sep}wings{os.sep}" in code.co_filename]
    assert len(places) > 10
    for place in places:
        other = threading.Thread(target=lambda: model(**inputs))

        def read(code: Any, place: Any = place, other: threading.Thread = other) -> None:
            if code is place and other.ident is None:
                other.start()
                other.join()

        assert torch.equal(stepped(read), expected)
        assert other.ident is not None
