"""Whose turn a token belongs to: told from templates, and put to use by recipes, evaluations, chats and audits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import alula
from alula.auditing import Plan, audit
from alula.auditing.plan import probe_settings
from alula.data import Collator, Sample
from alula.errors import UsageError
from alula.evaluation import data_task, evaluate
from alula.hosts import build_host, save_host
from alula.serving import Conversation
from alula.tokens import Role, TokenMap
from alula.training import parse_recipe, train
from tests.data.conftest import chat, say
from tests.data.test_collate import _other_processor, dialogues
from tests.hosts import tiny

RED = Image.new("RGB", (32, 32), "red")

MERGED = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<|im_start|>{{ m['role'] }}\n{{ first if loop.first else '' }}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
)
"""As Gemma and Llama-2 have it: the system prompt is a part of the first question."""

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3 has it: the last answer has a thought, earlier ones have none."""


def spoken(batch: Any, row: int, tokenizer: Any) -> list[tuple[str, str]]:
    """The stretches of one role in a row, with their text; media left out."""
    found: list[tuple[str, list[int]]] = []
    kinds = (
        batch["mm_token_type_ids"][row] if "mm_token_type_ids" in batch else torch.zeros_like(batch["input_ids"][row])
    )
    ids, roles, valid = batch["input_ids"][row], batch["token_roles"][row], batch["attention_mask"][row]
    assert (roles[valid == 0] == Role.UNKNOWN).all()
    for token, role, kind in zip(ids[valid == 1], roles[valid == 1].tolist(), kinds[valid == 1].tolist(), strict=True):
        name = Role(role).name.lower()
        if not found or found[-1][0] != name:
            found.append((name, []))
        if not kind:
            found[-1][1].append(int(token))
    return [(name, tokenizer.decode(ids)) for name, ids in found]


def test_roles_are_the_turns_of_the_template(processor: Any) -> None:
    samples = dialogues()
    plain, batch = Collator(processor)(samples), Collator(processor, roles=True)(samples)
    for name, value in plain.items():
        assert torch.equal(batch[name], value), name
    for row, sample in enumerate(samples):
        expected = []
        for message in sample.messages:
            text = "".join(part.get("text", "") for part in message["content"])
            expected.append((message["role"], f"<|im_start|>{message['role']}\n{text}<|im_end|>\n"))
        assert spoken(batch, row, processor.tokenizer) == expected


def test_prompts_end_with_the_assistant(processor: Any, tokenizer: Any) -> None:
    sample = Sample("p", [say("system", "be brief"), say("user", RED, "what?")])
    batch = Collator(processor, train=False, roles=True)([sample])
    assert spoken(batch, 0, tokenizer)[-1] == ("assistant", "<|im_start|>assistant\n")
    text = Sample("p", [say("system", "be brief"), say("user", "what?")])
    batch = Collator(tokenizer, train=False, roles=True)([text])
    assert [role for role, _ in spoken(batch, 0, tokenizer)] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])
def test_whatever_a_processor_puts_in_the_place_of_an_image(name: str) -> None:
    other = _other_processor(name)
    samples = [sample for sample in dialogues() if sample.messages]
    batch = Collator(other, roles=True)(samples)
    for row, sample in enumerate(samples):
        found = spoken(batch, row, other.tokenizer)
        assert [role for role, _ in found] == [message["role"] for message in sample.messages]
        for (_, text), message in zip(found, sample.messages, strict=True):
            assert all(part.get("text", "").strip() in text for part in message["content"])


def test_a_last_answer_that_is_written_otherwise(tokenizer: Any) -> None:
    thinking = tiny.tokenizer(THINKING)
    batch = Collator(thinking, labels=False, roles=True)([chat("one", "two", "three", "four")])
    assert [role for role, _ in spoken(batch, 0, thinking)] == ["user", "assistant"] * 2


def test_templates_that_cannot_be_split_are_refused() -> None:
    merged = tiny.tokenizer(MERGED)
    sample = Sample("s", [say("system", "be brief"), say("user", "what?"), say("assistant", "red")])
    assert "input_ids" in Collator(merged, labels=False)([sample])  # nobody asks for roles
    with pytest.raises(UsageError, match="does not write the system turn as a stretch of its own"):
        Collator(merged, labels=False, roles=True)([sample])
    alone = Collator(merged, labels=False, roles=True)([chat("what?", "red")])
    assert [role for role, _ in spoken(alone, 0, merged)] == ["user", "assistant"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    return save_host(made, tmp_path_factory.mktemp("roles") / "host")


@pytest.fixture(scope="module")
def data(host: Path) -> Path:
    """Conversations with a system prompt and an image."""
    RED.save(host.parent / "red.png")
    path = host.parent / "data.jsonl"
    image = {"type": "image", "image": "red.png"}
    with path.open("w") as file:
        for number in range(6):
            messages = [
                {"role": "system", "content": f"be brief {number}"},
                {"role": "user", "content": [image, {"type": "text", "text": f"what is {number}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
            ]
            file.write(json.dumps({"id": str(number), "messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(host: Path, data: Path) -> Path:
    """A recipe's two steps of Wings that leave the system prompt out."""
    stage = {
        "name": "only",
        "method": "wings",
        "train": {"wings": 1e-2, "projector": 1e-2},
        "wings": {"rank": 4, "system_keys": False, "gate": "paper"},
        "data": {"sources": [{"jsonl": str(data), "images": str(data.parent)}]},
        "steps": 2,
        "batch_size": 2,
    }
    recipe = parse_recipe(
        {
            "name": "roles",
            "output_dir": str(host.parent / "run"),
            "device": "cpu",
            "host": {"path": str(host)},
            "stages": [stage],
        }
    )
    return train(recipe, quiet=True).stages[-1].model


def test_a_recipe_trains_without_keys_of_the_system_prompt(trained: Path, data: Path) -> None:
    rows = [json.loads(line) for line in (data.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    (graft,) = alula.grafts_of(alula.load_model(trained).model).values()
    assert not graft.config.system_keys


def test_evaluation_and_chat_tell_the_model_whose_turn_it_is(trained: Path) -> None:
    model, processor = alula.load_model(trained)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.rpartition(".")[2] == "up" or ".up." in name:
                weight.normal_(std=0.5)
    talk = Conversation(model, processor, max_new_tokens=5)
    talk.instruct("be brief")
    said = talk.ask("what?", lambda text: None).text
    messages = [say("system", "be brief"), say("user", "what?")]
    batch = Collator(processor, train=False, roles=True)([Sample("p", messages)])
    roles = batch.pop("token_roles")
    assert {Role(role) for role in roles[0].tolist()} == {Role.SYSTEM, Role.USER, Role.ASSISTANT}
    seam = next(iter(alula.grafts_of(model).values())).seam
    tokens = TokenMap.from_modalities(torch.zeros_like(roles), roles=roles)
    with seam.given_tokens(tokens):
        ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, roles.shape[1] :]
    assert said == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_an_evaluation_asks_a_model_that_leaves_the_system_prompt_out(trained: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(trained)
    path = tmp_path / "ask.jsonl"
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "red"},
    ]
    path.write_text("".join(json.dumps({"id": str(n), "messages": messages}) + "\n" for n in range(3)))
    result = evaluate(model, processor, [data_task(path, name="mine")], max_new_tokens=3)
    assert len(result.tasks["mine"].items) == 3
    processor.chat_template = MERGED.replace("m['content']", "m['content'][0]['text']").replace(
        "messages[0]['content']", "messages[0]['content'][0]['text']"
    )
    with pytest.raises(UsageError, match="cannot be told"):
        evaluate(model, processor, [data_task(path, name="mine")], max_new_tokens=3)


def test_an_audit_tells_turns_apart(host: Path, data: Path, tmp_path: Path) -> None:
    plan = Plan(
        output=tmp_path / "out",
        model=str(host),
        data=data,
        images=data.parent,
        batch_size=2,
        controls=False,
        sections=("attention", "geometry", "lens", "overlap"),
        probes={
            "attention": {"system": "apart", "queries": "assistant"},
            "geometry": {"text": "assistant"},
            "lens": {"text": "user"},
            "overlap": {"streams": ["system", "user", "assistant"]},
        },
    )
    result = audit(plan, alula.load_model)
    assert result.measured == 6
    curves = result.results["attention"].curves["main"]
    assert min(point.value for point in curves["system"]) > 0
    pairs = ["attention.system=apart", "attention.queries=assistant", "overlap.streams=[system, user]"]
    assert probe_settings(pairs) == {
        "attention": {"system": "apart", "queries": "assistant"},
        "overlap": {"streams": ["system", "user"]},
    }
    for wrong_pair in ("attention=apart", "attention.system", "attention.system="):
        with pytest.raises(UsageError, match=r"is not SECTION\.NAME=VALUE"):
            probe_settings([wrong_pair])
    with pytest.raises(UsageError, match="given twice"):
        probe_settings(["lens.text=user", "lens.text=all"])
    with pytest.raises(UsageError, match="no section 'attention' is measured"):
        Plan(output=tmp_path, model="m", sections=("lens",), probes={"attention": {}})
    wrong = Plan(
        output=tmp_path / "w",
        model=str(host),
        data=data,
        images=data.parent,
        sections=("lens",),
        probes={"lens": {"txt": "user"}},
    )
    with pytest.raises(UsageError, match="txt"):
        audit(wrong, alula.load_model)
