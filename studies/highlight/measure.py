"""What is measured of a model under a way to point: answers, hallucinated things, how likely its words are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import alula
from alula.evaluation import prompts
from alula.evaluation.results import Part, Turn
from alula.files import write_json
from alula.inputs import Intake
from alula.loading import load_model
from alula.steering import Box, Distorted, Hidden, KeyDirections, Prompt, Whole, noised
from alula_fledgling.microworld.items import user
from alula_fledgling.microworld.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Thing
from alula_fledgling.microworld.scoring import normalise
from studies.examples import Said, Shown
from studies.highlight.plan import SHOWN, Arm, HighlightPlan
from studies.highlight.questions import Question, ambiguous, clear, whole

BATCH, SHORT, LONG, TAUGHT = 100, 8, 48, 40
"""questions at a time, most tokens of an answer and of a description, questions that key directions are learned from"""
TO_LOOK_AT = {"ambiguous": 3, "misled": 2, "existence": 1}
_LARGER, _FRAME = 4, (214, 39, 140)
Numbers = dict[str, list[float]]
"""measure -> a number for each item"""

_NAMED = " ".join(f"({'|'.join(names)})" for names in (SIZES, COLOURS, SHAPES))
_PART = re.compile(rf"an? {_NAMED} at the ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})")


def measure(plan: HighlightPlan, seed: int) -> None:
    """Measure a seed's model under every arm, unless that was done."""
    if plan.measured(seed).is_file():
        return
    with torch.no_grad():
        write_json(plan.measured(seed), Measuring(plan, seed).everything())


def show(plan: HighlightPlan) -> None:
    """Ask the first seed's model some questions to look at, unless that was done."""
    if not plan.shown.is_file():
        with torch.no_grad():
            shown = Measuring(plan, plan.seeds[0]).to_look_at()
        write_json(plan.shown, [each.model_dump() for each in shown])


class Measuring:
    """One seed's model and its questions."""

    def __init__(self, plan: HighlightPlan, seed: int) -> None:
        self.plan = plan
        loaded = load_model(plan.model(seed))
        self.model: Any = loaded.model
        self.intake = Intake.of(loaded.processor)
        count, draws = plan.items, plan.task_seed
        self.asked: dict[str, list[Question]] = {
            "ambiguous": ambiguous(count, draws),
            "clear": clear(count, draws, misled=False),
            "misled": clear(count, draws, misled=True),
            "existence": whole("existence", count, draws),
            "caption": whole("caption", count, draws),
        }

    def everything(self) -> dict[str, dict[str, Numbers]]:
        """Arm -> task -> measures; arms that can highlight no part are asked about whole pictures alone."""
        return {
            arm.name: {
                task: self.scored(task, questions, arm)
                for task, questions in self.asked.items()
                if arm.method != "distorted" or task in ("existence", "caption")
            }
            for arm in self.plan.chosen
        }

    def to_look_at(self) -> list[Shown]:
        """Questions, their pictures with what is highlighted framed, and the answers under some arms."""
        made: list[Shown] = []
        for task, count in TO_LOOK_AT.items():
            questions = self.asked[task][:count]
            said = {arm.name: self.answers(questions, arm, SHORT, likely=False)[0] for arm in SHOWN}
            for place, question in enumerate(questions):
                answers = {
                    name: Said(text=told[place], right=_answered(question, told[place])["right"])
                    for name, told in said.items()
                }
                prompt = [Turn(role="user", content=[Part(image=self.framed(question)), Part(text=question.words)])]
                made.append(Shown(family=task, prompt=prompt, gold=question.gold, answers=answers))
        return made

    def framed(self, question: Question) -> str:
        """The picture, larger, with a frame around what is highlighted, as a data URI."""
        (chat,) = [prompts.loaded(question.messages, self.intake)]
        image = next(part["image"] for message in chat for part in message["content"] if part["type"] == "image")
        box = Box(0, 0, *image.size) if question.highlighted is None else self.box(chat, question.highlighted)
        large = image.resize((image.width * _LARGER, image.height * _LARGER), Image.Resampling.NEAREST)
        corners = [_LARGER * edge for edge in (box.left, box.top, box.right, box.bottom)]
        ImageDraw.Draw(large).rectangle(
            [corners[0], corners[1], corners[2] - 1, corners[3] - 1], outline=_FRAME, width=3
        )
        return prompts.thumbnail(large, max(large.size))

    def scored(self, task: str, questions: Sequence[Question], arm: Arm) -> Numbers:
        """The measures of a task."""
        found: Numbers = {}
        for start in range(0, len(questions), BATCH):
            part = questions[start : start + BATCH]
            answers, likely = self.answers(part, arm, LONG if task == "caption" else SHORT, likely=task == "caption")
            judge = _described if task == "caption" else _answered
            scores = [judge(question, answer) for question, answer in zip(part, answers, strict=True)]
            for each, nats in zip(scores, likely, strict=True):
                for name, value in {**each, **({"nats": nats} if task == "caption" else {})}.items():
                    found.setdefault(name, []).append(float(value))
        return found

    def answers(
        self, questions: Sequence[Question], arm: Arm, length: int, *, likely: bool
    ) -> tuple[list[str], list[float]]:
        """Answers, and what each costs the model as it is, in nats per token."""
        chats = [prompts.loaded(question.messages, self.intake) for question in questions]
        inputs = self.inputs(chats)
        with self.pointing(arm, inputs, chats, questions):
            ids = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
        told = ids[:, inputs["input_ids"].shape[1] :]
        answers = [self.intake.tokenizer.decode(each, skip_special_tokens=True).strip() for each in told]
        return answers, self.nats(inputs, told) if likely else [0.0] * len(answers)

    def inputs(self, chats: list[Any]) -> dict[str, Tensor]:
        """Of prompts, padded on the left."""
        self.intake.tokenizer.padding_side = "left"
        return dict(
            self.intake.processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                processor_kwargs={"padding": True},
            )
        )

    def nats(self, inputs: dict[str, Tensor], told: Tensor) -> list[float]:
        """Nats per token of what was said under the model as it is."""
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], told], dim=1)}
        is_said = told != self.intake.tokenizer.pad_token_id
        is_said[:, 0] = True
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], is_said.long()], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in whole:
                whole[name] = torch.nn.functional.pad(whole[name], (0, told.shape[1]))
        logits = self.model(**whole).logits[:, -told.shape[1] - 1 : -1].float()
        each = -torch.log_softmax(logits, dim=-1).gather(-1, told[..., None])[..., 0]
        return ((each * is_said).sum(dim=1) / is_said.sum(dim=1)).tolist()

    def pointing(
        self, arm: Arm, inputs: dict[str, Tensor], chats: list[Any], questions: Sequence[Question]
    ) -> AbstractContextManager[Any]:
        """The block in which answers are given."""
        if arm.method == "none":
            return nullcontext()
        if arm.method == "distorted":
            return alula.highlight(self.model, guidance=arm.guidance, by=Distorted(noised(inputs)))
        by: Any = Hidden() if arm.method == "hidden" else self.directions if arm.method == "keys" else None
        regions = [
            [Whole("image") if question.highlighted is None else self.box(chat, question.highlighted)]
            for chat, question in zip(chats, questions, strict=True)
        ]
        prompt = Prompt(self.model, self.intake, inputs, chats)
        return alula.highlight(self.model, prompt, regions=regions, strength=arm.strength, guidance=arm.guidance, by=by)

    def box(self, chat: Any, thing: Thing) -> Box:
        """The cell of the grid that a thing stands in."""
        image = next(part["image"] for message in chat for part in message["content"] if part["type"] == "image")
        width, height = image.width / 3, image.height / 3
        left, top = thing.column * width, thing.row * height
        return Box(left, top, left + width, top + height)

    def behind(self, words: str, question: Question, thing: Thing) -> tuple[dict[str, Tensor], Tensor]:
        """A picture behind some words, and marks of a thing in it."""
        message = user(words, question.messages[0]["content"][0]["image"])
        message["content"].reverse()
        chat = prompts.loaded([message], self.intake)
        inputs = self.inputs([chat])
        return inputs, Prompt(self.model, self.intake, inputs, chat).marks(regions=[self.box(chat, thing)])

    @cached_property
    def directions(self) -> KeyDirections:
        """Learned from questions that stand in front of a picture, about a thing and about another one."""
        samples = []
        for question in clear(TAUGHT, self.plan.task_seed + 1, misled=False):
            thing = question.highlighted
            assert thing is not None
            other = next(each for each in question.scene.things if each is not thing)
            words = (".", f"What is at the {thing.position}?", f"What is at the {other.position}?")
            alone, relevant, irrelevant = (self.behind(each, question, thing) for each in words)
            samples.append((alone, relevant, irrelevant))
        return KeyDirections.learned(self.model, samples)


def _answered(question: Question, answer: str) -> dict[str, bool]:
    said = normalise(answer)
    found = {"right": said == normalise(question.gold), "other": said == normalise(question.other)}
    if question.highlighted is None:
        found["yes"] = said == "yes"
        found["false yes"] = said == "yes" and normalise(question.gold) == "no"
    return found


def _described(question: Question, answer: str) -> dict[str, float]:
    """What a description is worth: as CHAIR has it, with things told by colour and shape."""
    named = [(colour, shape) for _, colour, shape, _ in _PART.findall(normalise(answer))]
    there = {thing.pair for thing in question.scene.things}
    left = _PART.sub("", normalise(answer))
    return {
        "hallucinated": sum(pair not in there for pair in named) / max(len(named), 1),
        "covered": len(there & set(named)) / len(there),
        "well-formed": float(not re.sub(r",|\band\b|\s", "", left) and bool(named)),
    }
