"""What is measured of a seed: answers, tokens, seconds and memory behind every number of shots, told in every way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from alula.demonstrations import Demonstration, FewShot, Shot, encode
from alula.draws import Draw
from alula.evaluation.generation import answer, batches, neutral_config, put
from alula.evaluation.prompts import turns
from alula.files import write_json
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.inputs import Intake, Rendered
from alula.loading import load_model
from alula.policies import Budget
from alula_fledgling.microworld import SceneImage, episode, normalise
from studies.demonstrations.plan import FAMILY, KEPT, WAYS, DemonstrationsPlan
from studies.examples import Said, Shown

_ASKED_AT_ONCE, _LONGEST = 12, 4
"""questions of a batch, tokens of an answer"""
_TO_LOOK_AT, _LOOKED_AT = 3, 3
"""episodes to look at, and their shots"""


def measure(plan: DemonstrationsPlan, seed: int) -> None:
    """Measure a seed's host and map, unless that was done."""
    if plan.measured_file(seed).is_file():
        return
    with torch.no_grad():
        write_json(plan.measured_file(seed), Measuring(plan, seed).everything())


def show(plan: DemonstrationsPlan) -> None:
    """Ask the first seed's host some episodes to look at, unless that was done."""
    if not plan.shown.is_file():
        with torch.no_grad():
            shown = Measuring(plan, plan.seeds[0]).to_look_at()
        write_json(plan.shown, [each.model_dump() for each in shown])


@dataclass(frozen=True)
class Asked:
    """A held-out episode.

    Attributes:
        shown: its demonstrations, of which the first are shown.
        question: in words.
        gold: the answer.
    """

    shown: list[Demonstration]
    question: str
    gold: str


def asked_episodes(count: int, seed: int, most: int) -> Iterator[Asked]:
    """Held-out episodes with so many demonstrations, of which the first are shown."""
    for index in range(count):
        shots, questions = episode(Draw("demonstrations", seed, index), FAMILY, "test", most)
        shown = [Demonstration(SceneImage(scene).load(), *exchange) for scene, exchange in shots]
        yield Asked(shown, *questions[-1])


class Measuring:
    """One seed's host, its map and its episodes."""

    def __init__(self, plan: DemonstrationsPlan, seed: int) -> None:
        self.model, self.processor = load_model(plan.adapter(seed))
        self.intake = Intake.of(self.processor)
        self.shots = plan.shots
        self.episodes = [*asked_episodes(plan.items, plan.task_seed, max(plan.shots))]
        self.context = context_length(self.model)
        self.config = neutral_config(self.model, self.processor, Decoding(), _LONGEST)

    def everything(self) -> dict[str, Any]:
        """Way -> shots -> measures; `encoding` seconds of the processor for one demonstration."""
        started = time.process_time()
        every = [encode(self.model, self.intake, each.shown) for each in self.episodes]
        spent = time.process_time() - started
        found: dict[str, Any] = {way: {} for way in WAYS}
        for shots in self.shots:
            for way in WAYS:  # side by side, so that what else the machine does is shared
                found[way][str(shots)] = self._told(way, shots, every)
        return {"ways": found, "encoding": spent / (len(self.episodes) * max(self.shots)), "context": self.context}

    def to_look_at(self) -> list[Shown]:
        """Episodes with their answers, told in every way."""
        episodes = self.episodes[:_TO_LOOK_AT]
        every = [encode(self.model, self.intake, each.shown[:_LOOKED_AT]) for each in episodes]
        shown = [
            Shown(family=FAMILY, prompt=turns(self._messages("full", each, _LOOKED_AT)), gold=each.gold, answers={})
            for each in episodes
        ]
        for way in WAYS:
            prompts = [self._prompt(way, each, _LOOKED_AT, fused) for each, fused in zip(episodes, every, strict=True)]
            with self._policy(way):
                told = answer(self.model, self.processor, prompts, self.config, 0)
            for one, said, each in zip(shown, told, episodes, strict=True):
                one.answers[way] = Said(text=said.text, right=normalise(said.text) == normalise(each.gold))
        return shown

    def _told(self, way: str, shots: int, every: list[list[Shot]]) -> dict[str, Any]:
        prompts = [
            self._prompt(way, each, shots, fused[:shots]) for each, fused in zip(self.episodes, every, strict=True)
        ]
        lengths = [prompt.length for prompt in prompts]
        found: dict[str, Any] = {"tokens": sum(lengths) / len(lengths)}
        if self.context is not None and max(lengths) + _LONGEST > self.context:
            return found
        answers: dict[int, str] = {}
        with self._policy(way):
            peak = peak_bytes(lambda: self._prefill(prompts[0]))
            started = time.process_time()
            for batch in batches(lengths, _ASKED_AT_ONCE):
                told = answer(self.model, self.processor, [prompts[at] for at in batch], self.config, 0)
                answers |= {at: each.text for at, each in zip(batch, told, strict=True)}
            spent = time.process_time() - started
        right = [float(normalise(answers[at]) == normalise(each.gold)) for at, each in enumerate(self.episodes)]
        return {**found, "right": right, "seconds": spent / len(prompts), "peak": peak}

    def _prompt(self, way: str, each: Asked, shots: int, fused: list[Shot]) -> Rendered:
        if way == "aim":
            return FewShot(self.processor, fused).render(self._messages(way, each, 0))
        return self.intake.render(self._messages(way, each, shots))

    def _messages(self, way: str, each: Asked, shots: int) -> list[Any]:
        question = {"role": "user", "content": [{"type": "text", "text": each.question}]}
        shown = [turn for one in each.shown[:shots] for turn in one.messages(picture=way != "text")]
        return [*shown, question]

    def _policy(self, way: str) -> AbstractContextManager[Any]:
        return Budget(image_tokens=KEPT).on(self.model) if way == "pruned" else nullcontext()

    def _prefill(self, prompt: Rendered) -> None:
        with put(self.model, [prompt], self.config) as given:
            self.model.generate(**given, generation_config=self.config)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of tensors at the peak of a run on the CPU, above those before it, as torch's allocator counts them: the
    same in every run."""
    with _profiled() as events:
        run()
    now = peak = 0
    for event in sorted(events(), key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _profiled() -> Iterator[Callable[[], list[Any]]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: [each for each in _results(profiler).events() if each.name() == "[memory]"]


def _results(profiler: Any) -> Any:
    return profiler.profiler.kineto_results
