"""What is measured of a model under policies: answers, the first token against the whole, who stays, text's bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alula.evaluation import Decoding, generation
from alula.files import read_json, write_json
from alula.hosts.host import tokenizer_of
from alula.inputs import Intake
from alula.loading import load_model
from alula.policies import Policy, Stand, policy_of, search_withdrawal
from alula.policies.base import asked as with_asked
from alula.seam import LayerView, Owner, Phase, Point, evaluating
from alula.seam.dialect import cache_keyword, cache_of_output
from alula_fledgling.microworld import score
from studies.policies.plan import PoliciesPlan
from studies.policies.questions import DESCRIPTION, LONG, SHORT, Question, pictures, single, texts, turns
from studies.policies.rows import LAYERS, LOOKED, TOKENS, Row, changes_text, knee_rows, layer_rows, share_name

BATCH = 128
DRAWN = 32
"""prompts that share a draw, where chance decides"""
_PER_KIND = 5
"""questions of each kind whose first token is looked at; who stays is looked at in as many"""
_TEXTS, _SHOWN = 10, 6
"""prompts without a picture, a question of each family, and those with one beside them"""


def measure(plan: PoliciesPlan, seed: int) -> None:
    """Measure a seed's model; what was measured before is left as it is."""
    with torch.no_grad():
        work = Measuring(plan, seed)
        for path, job in work.jobs():
            if not path.is_file():
                write_json(path, job())


def measurements(plan: PoliciesPlan, seed: int) -> list[Path]:
    """The files that `measure` writes."""
    return [path for path, _ in Measuring(plan, seed).jobs()]


@dataclass(frozen=True)
class Measuring:
    """What is measured of one seed's model, and how."""

    plan: PoliciesPlan
    seed: int

    def jobs(self) -> list[tuple[Path, Callable[[], dict[str, Any]]]]:
        """File by file, what makes it."""
        plan, directory = self.plan, self.plan.measured(self.seed)
        found: list[tuple[Path, Callable[[], dict[str, Any]]]] = []

        def add(name: str, job: Callable[[], dict[str, Any]]) -> None:
            found.append((directory / f"{name}.json", job))

        add("single/none", partial(self.single, None))
        for row in plan.rows:
            add(f"single/{row.name}", partial(self.single, row))
        if "shares" in plan.parts:
            for way in plan.chosen:
                if LOOKED in plan.shares:
                    looked = Row(way.name, way.label, way.settings(LOOKED), way.draws)
                    add(f"stays/{share_name(way.name, LOOKED)}", partial(self.stays, looked))
            for knee in knee_rows():
                add(f"stays/{knee.name}", partial(self.stays, knee))
        if "withdrawal" in plan.parts:
            add("first", self.first)
        talked: list[Row | None] = [None, *plan.talked]
        if "withdrawal" in plan.parts:
            talked += [row for row in plan.rows if row.name == f"withdraw-{LAYERS // 2}"]
        if "turns" in plan.parts:
            for each in talked:
                add(f"turns/{each.name if each else 'none'}", partial(self.turns, each))
        if "text" in plan.parts:
            add("text", self.text)
        if "pictures" in plan.parts:
            for each in talked:
                add(f"pictures/{each.name if each else 'none'}", partial(self.pictures, each))
        return found

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, processor = load_model(self.plan.model(self.seed))
        return model, processor

    @cached_property
    def _intake(self) -> Intake:
        return Intake.of(self._loaded[1])

    @cached_property
    def asked(self) -> list[Question]:
        return single(self._intake, self.plan.items, self.plan.task_seed)

    @cached_property
    def talks(self) -> tuple[list[Question], list[Question]]:
        return turns(self._intake, self.plan.pairs, self.plan.task_seed)

    @cached_property
    def _pictures(self) -> list[Question]:
        return pictures(self._intake, self.plan.pairs, self.plan.task_seed)

    @cached_property
    def _first_of_kind(self) -> list[Question]:
        return self.asked[: _PER_KIND * len({question.kind for question in self.asked})]

    @cached_property
    def _own(self) -> list[str]:
        """The model's answers without a policy."""
        answers: list[str] = read_json(self.plan.measured(self.seed) / "single" / "none.json")["answers"]
        return answers

    def single(self, row: Row | None) -> dict[str, Any]:
        """Answers to single questions: whether each is right, and whether it is the one without a policy."""
        answers = self.answers(row, self.asked)
        found: dict[str, Any] = {"right": self._right(self.asked, answers)}
        if row is None:
            return {**found, "answers": answers}
        return {**found, "same": packed([one == other for one, other in zip(answers, self._own, strict=True)])}

    def turns(self, row: Row | None) -> dict[str, Any]:
        """The second of two questions about a picture: asked alone; behind the first, in one prompt; and in a
        conversation whose first turn was read, under the policy, before the second was known."""
        talks, alone = self.talks
        return {
            "alone": self._right(alone, self.answers(row, alone)),
            "prompt": self._right(talks, self.answers(row, talks)),
            "chat": self._right(talks, self.chats(row, talks)),
        }

    def pictures(self, row: Row | None) -> dict[str, Any]:
        """The last of three questions about three pictures."""
        return {"right": self._right(self._pictures, self.answers(row, self._pictures))}

    def first(self) -> dict[str, Any]:
        """Withdrawal by layer: KL of the first token, and how many tokens of the model's own answer stay."""
        model, _ = self._loaded
        found = search_withdrawal(model, [question.prompt.inputs for question in self._first_of_kind])
        return {
            "layers": found.layers,
            "kinds": [question.kind for question in self._first_of_kind],
            "nats": [[float(f"{nats:.4g}") for nats in of] for of in found.divergences],
            "agreed": found.agreed,
            "lengths": found.lengths,
            "chosen": found.by_divergence(0.003).layer if min(found.divergence().values()) <= 0.003 else None,
        }

    def stays(self, row: Row) -> dict[str, Any]:
        """Place by place of the picture, in how many prompts its token is in the last layer."""
        model, _ = self._loaded
        counts = torch.zeros(TOKENS, dtype=torch.int64)
        looked = self._first_of_kind
        size = DRAWN if row.draws else BATCH
        for number, start in enumerate(range(0, len(looked), size)):
            batch = self._collated(looked[start : start + size])
            left = _left(model, policy_of(row.drawn(self._draw(number))), batch)
            is_image = batch["input_ids"] == model.config.image_token_id
            counts += left[is_image].view(-1, TOKENS).sum(dim=0)
        return {"prompts": len(looked), "stays": counts.tolist()}

    def text(self) -> dict[str, Any]:
        """Logits of text under every policy: alone, and in a batch beside pictures."""
        plan, (model, _) = self.plan, self._loaded
        words, shown = texts(self._intake, _TEXTS, plan.task_seed), self.asked[:_SHOWN]
        alone, mixed = self._collated(words), self._collated([*words, *shown])
        valid = alone["attention_mask"].bool()

        def of(batch: Mapping[str, Tensor], policy: Policy | None) -> Tensor:
            with _under(model, policy):
                logits: Tensor = model(**batch).logits
            return logits[: len(words), -valid.shape[1] :][valid]

        own, beside = of(alone, None), of(mixed, None)
        changed, apart, turned = [], {}, []
        # other shares and layers are other numbers in the same code
        several = {share_name(way.name, share) for way in plan.chosen for share in plan.shares if share != LOOKED}
        several |= {row.name for row in layer_rows()}
        rows = [row for row in plan.rows if not changes_text(row.settings) and row.name not in several]
        for row in rows:
            policy = policy_of(row.drawn(self._draw(0)))
            if not torch.equal(of(alone, policy), own):
                changed.append(row.name)
            here = of(mixed, policy)
            apart[row.name] = float((here - beside).abs().max())
            if not torch.equal(here.argmax(dim=-1), beside.argmax(dim=-1)):
                turned.append(row.name)
        meant = [row for row in plan.rows if changes_text(row.settings)]
        return {
            "policies": len(rows),
            "logits": own.numel(),
            "changed": changed,
            "beside": max(apart.values(), default=0.0),
            "turned": turned,
            "host": float((beside - own).abs().max()),
            "largest": float(own.abs().max()),
            "meant": len(meant),
            "meant_changed": sum(not torch.equal(of(alone, policy_of(row.settings)), own) for row in meant),
        }

    def _draw(self, number: int) -> int:
        """A number of its own for every draw of every training seed."""
        return 1000 * self.seed + number

    def answers(self, row: Row | None, questions: Sequence[Question]) -> list[str]:
        """Greedy answers, in the order of the questions."""
        answers = [""] * len(questions)
        for number, (batch, limit) in enumerate(_batches(questions, DRAWN if row and row.draws else BATCH)):
            for place, text in zip(batch, self._said(row, number, [questions[i] for i in batch], limit), strict=True):
                answers[place] = text
        return answers

    def _said(self, row: Row | None, number: int, asked_now: Sequence[Question], limit: int) -> list[str]:
        model, processor = self._loaded
        config = generation.neutral_config(model, processor, Decoding(), limit)
        with evaluating(model), _under(model, None if row is None else policy_of(row.drawn(self._draw(number)))):
            replies = generation.answer(model, processor, [each.prompt for each in asked_now], config, 0)
        return [reply.text for reply in replies]

    def chats(self, row: Row | None, questions: Sequence[Question]) -> list[str]:
        """Answers to the second turn, of a cache that the first one left."""
        model, processor = self._loaded
        answers = [""] * len(questions)
        config = generation.neutral_config(model, processor, Decoding(), SHORT)
        tokenizer = tokenizer_of(processor)
        alike: dict[tuple[int, int], list[int]] = {}  # no padding between the turns
        for place, question in enumerate(questions):
            assert question.first is not None
            alike.setdefault((question.first.length, question.prompt.length), []).append(place)
        number = 0
        for places in alike.values():
            for start in range(0, len(places), DRAWN):
                here = places[start : start + DRAWN]
                policy = None if row is None else policy_of(row.drawn(self._draw(number)))
                number += 1
                before = generation.collate([q.first for q in (questions[i] for i in here) if q.first], 0)
                whole = generation.collate([questions[i].prompt for i in here], 0)
                assert torch.equal(whole["input_ids"][:, : before["input_ids"].shape[1]], before["input_ids"])
                with evaluating(model), _under(model, policy):
                    cache = {cache_keyword(): cache_of_output(model(**before, use_cache=True))}
                    ids, mask = whole["input_ids"], whole["attention_mask"]
                    said = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **cache)
                for place, row_ids in zip(here, said[:, ids.shape[1] :], strict=True):
                    answers[place] = tokenizer.decode(row_ids, skip_special_tokens=True).strip()
        return answers

    def _collated(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        _, processor = self._loaded
        return generation.collate([each.prompt for each in questions], tokenizer_of(processor).pad_token_id)

    @staticmethod
    def _right(questions: Sequence[Question], answers: Sequence[str]) -> str:
        pairs = zip(questions, answers, strict=True)
        return packed([score(question.kind, question.gold, answer) == 1 for question, answer in pairs])


def packed(marks: Sequence[bool]) -> str:
    """A yes or no per item as one hexadecimal number, with a leading 1."""
    return f"{int('1' + ''.join('1' if mark else '0' for mark in marks), 2):x}"


def unpacked(text: str) -> list[bool]:
    """The marks of `packed`."""
    return [digit == "1" for digit in f"{int(text, 16):b}"[1:]]


def _batches(questions: Sequence[Question], size: int) -> list[tuple[list[int], int]]:
    """Indices batch by batch, and the most tokens of their answers; descriptions apart, and chance mixes the kinds."""
    found = []
    for limit in (SHORT, LONG):
        here = [i for i, question in enumerate(questions) if (question.kind == DESCRIPTION) == (limit == LONG)]
        found += [(here[start : start + size], limit) for start in range(0, len(here), size)]
    return found


def _under(model: Any, policy: Policy | None) -> AbstractContextManager[Any]:
    return nullcontext() if policy is None else policy.on(model)


def _left(model: Any, policy: Policy, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, S) bool: which tokens are in the last layer."""
    found: list[Tensor] = []

    def place(stand: Stand) -> None:
        def note(view: LayerView, hidden: Tensor) -> None:
            left = view.ctx.memo[stand.owner, "left"].attend
            found.append(view.ctx.tokens.valid if left is None else left)

        policy.place(stand)
        stand.at(Point.BLOCK_OUTPUT, stand.anatomy.num_layers - 1, note, phase=Phase.READ)

    with with_asked(model, Owner(), place, object()):
        model(**batch, use_cache=False)
    return found[0]
