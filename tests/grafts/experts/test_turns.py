"""Experts that act up to the user's next turn."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula.errors import UsageError
from alula.grafts import ExpertsConfig
from alula.seam.dialect import cache_keyword, cache_of_output
from alula.tokens import Role, TokenMap
from tests import zoo
from tests.grafts.common import run, wake
from tests.grafts.experts.test_experts import by_token, in_double, updates_of

CACHE = cache_keyword()
TURNS = ("s2 u3I2 a2 u4 a3 uI2 a1", "u5 a2 u1I1I2 a4 u2 a1", "s1 u4 a3 u2 a2")
"""conversations: whose turn, and what is in it"""


def conversation(turns: str, seed: int = 0) -> tuple[list[int], list[int]]:
    """Ids and roles."""
    ids: list[int] = []
    roles: list[int] = []
    for number, turn in enumerate(turns.split()):
        said = zoo.prompt(turn[1:], seed=seed + number)
        ids += said
        roles += [{"s": Role.SYSTEM, "u": Role.USER, "a": Role.ASSISTANT}[turn[0]]] * len(said)
    return ids, roles


def batch(*conversations: str, side: str = "left") -> dict[str, Tensor]:
    each = [conversation(turns, seed) for seed, turns in enumerate(conversations)]
    longest = max(len(ids) for ids, _ in each)

    def padded(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([padded(ids, 0) for ids, _ in each]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in each]),
        "token_roles": torch.tensor([padded([int(role) for role in roles], -1) for _, roles in each]),
        **zoo.pixels("llava-llama", sum(turns.count("I") for turns in conversations)),
    }


def expert_of(inputs: dict[str, Tensor]) -> Tensor:
    """(B, S) 0 where the expert acts, -1 elsewhere: turn by turn."""
    found = torch.full_like(inputs["input_ids"], -1)
    for sample, (ids, roles, mask) in enumerate(
        zip(inputs["input_ids"], inputs["token_roles"], inputs["attention_mask"], strict=True)
    ):
        acts, before = False, None
        for place in mask.nonzero()[:, 0].tolist():
            if roles[place] == Role.USER and before != Role.USER:
                acts = False
            acts = acts or bool(ids[place] == zoo.IMAGE)
            before = roles[place]
            found[sample, place] = 0 if acts else -1
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [3, None])
def test_they_act_from_an_image_to_the_end_of_the_answer(rank: int | None, side: str) -> None:
    model, inputs = zoo.build("llava-llama").double(), in_double(batch(*TURNS, side=side))
    graft = wake(alula.attach(model, ExpertsConfig(tokens="turn", rank=rank)))
    ours, updates = run(model, "llava-llama", inputs), updates_of(graft)
    alula.detach(model)
    roles, valid = inputs.pop("token_roles"), inputs["attention_mask"].bool()
    plain = run(model, "llava-llama", inputs)
    acts = expert_of({**inputs, "token_roles": roles})
    assert (acts >= 0).sum(dim=1).tolist() == [15, 15, 0]  # image, what follows it in its turn, and the answer
    assert torch.equal(ours[2][valid[2]], plain[2][valid[2]])  # no image: the base's bits
    by_token(model, updates, acts)
    torch.testing.assert_close(run(model, "llava-llama", inputs)[valid], ours[valid], atol=1e-9, rtol=1e-9)


def test_turns_that_come_one_by_one_are_the_whole_conversation() -> None:
    model, whole = zoo.build("llava-llama").double(), in_double(batch(TURNS[0]))
    wake(alula.attach(model, ExpertsConfig(tokens="turn", rank=3)))
    together = run(model, "llava-llama", whole)
    # answers come token by token, and nothing says whose they are: they belong to the turn before
    pieces: list[tuple[str, int]] = []
    for turn in TURNS[0].split():
        count = len(zoo.prompt(turn[1:]))
        pieces += [("a", 1)] * count if turn[0] == "a" else [(turn[0], count)]
    cache, logits, images, begin = None, [], 0, 0
    for who, count in pieces:
        end = begin + count
        ids = whole["input_ids"][:, begin:end]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": whole["attention_mask"][:, :end]}
        if who != "a":
            given["token_roles"] = whole["token_roles"][:, begin:end]
        if (ids == zoo.IMAGE).any():
            given["pixel_values"], images = whole["pixel_values"][images : images + 1], images + 1
        with torch.no_grad():
            output = model(**given, **({} if cache is None else {CACHE: cache}), use_cache=True)
        cache, begin = cache_of_output(output), end
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), together, atol=1e-9, rtol=1e-9)


def test_a_prompt_in_pieces_is_the_whole_prompt() -> None:
    """Roles that are lent are those of the whole prompt, whatever piece of it a forward is given."""
    model, whole = zoo.build("llava-llama").double(), in_double(batch(TURNS[0]))
    graft = wake(alula.attach(model, ExpertsConfig(tokens="turn", rank=3)))
    roles, expected = whole["token_roles"], run(model, "llava-llama", whole)
    cache, logits, ends = None, [], (0, 13, whole["input_ids"].shape[1])  # the second begins with the user's question
    with torch.no_grad(), graft.seam.given_roles(roles):
        for number, (begin, end) in enumerate(itertools.pairwise(ends)):
            output = model(
                input_ids=whole["input_ids"][:, begin:end],
                attention_mask=whole["attention_mask"][:, :end],
                pixel_values=whole["pixel_values"][number : number + 1],
                **({} if cache is None else {CACHE: cache}),
                use_cache=True,
            )
            cache = cache_of_output(output)
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-9, rtol=1e-9)


def test_a_step_brings_no_roles_to_the_device() -> None:
    """What a prompt's tokens are is copied with the prompt: these could not be."""
    model, inputs = zoo.build("llava-llama"), batch(TURNS[0])
    graft = wake(alula.attach(model, ExpertsConfig(tokens="turn", rank=3)))
    roles = inputs.pop("token_roles")
    with torch.no_grad(), graft.seam.given_roles(roles):
        cache = cache_of_output(model(**inputs, use_cache=True))
        step = model(input_ids=torch.tensor([[5]]), **{CACHE: copy.deepcopy(cache)}).logits
    with torch.no_grad(), graft.seam.given_roles(roles.to("meta")):
        assert torch.equal(model(input_ids=torch.tensor([[5]]), **{CACHE: cache}).logits, step)


def test_whose_turn_it_is_has_to_be_said() -> None:
    model, inputs = zoo.build("llava-llama"), batch("u1I2 a1 u3")
    graft = wake(alula.attach(model, ExpertsConfig(tokens="turn", rank=3)))
    roles = inputs.pop("token_roles")
    with pytest.raises(UsageError, match="whose turn a token is"):
        model(**inputs)
    with torch.no_grad(), graft.seam.given_roles(roles):
        lent = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(lent, model(**inputs, token_roles=roles).logits)
        text = {name: value for name, value in batch("u4 a2").items() if name in ("input_ids", "attention_mask")}
        model(**text)  # nothing to act on: nobody asks


def test_the_map_of_tokens_knows_turns() -> None:
    roles = torch.tensor([[0, 1, 1, 1, 2, -1, 1, 2, 1, 1, 2]])
    modalities = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]])
    tokens = TokenMap.from_modalities(modalities, roles=roles)
    assert tokens.has_seen_in_turn.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]]


def test_padding_begins_no_turn_whatever_role_it_carries() -> None:
    roles, mask = torch.tensor([[1, 1, 1, 2, 1, 1, 2]]), torch.tensor([[1, 1, 1, 1, 0, 0, 1]])
    tokens = TokenMap.from_modalities(torch.tensor([[0, 1, 0, 0, 0, 0, 0]]), mask, roles=roles)
    assert tokens.has_seen_in_turn.int().tolist() == [[0, 1, 1, 1, 0, 0, 1]]
