"""Text turns behind images, held to what the run's start says to them bare."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula.data import IGNORED, Collator, Mixture, RecordError, Sample, message_text, open_source
from alula.data.soft_labels import KEYS, SoftLabels
from alula.errors import DataError, HostError, RecipeError, UsageError
from alula.hosts import load_host
from alula.training import check, parse_recipe, train
from alula.training.distillation import HeldMixture, Lessons
from alula.training.distillation.loss import divergence
from alula.training.losses import Loss
from alula.training.methods import METHODS
from alula.training.recipe import Distill
from tests.training.conftest import MakeRecipe, rows

QUESTIONS = {"microworld": "text"}
HELD: dict[str, Any] = {
    "method": "experts",
    "train": {"experts": 1e-2, "projector": 1e-2},
    "experts": {"tokens": "seen", "rank": 4},
    "distill": {"prompts": QUESTIONS, "count": 12, "max_new_tokens": 6, "candidates": 8, "share": 0.5},
    "batch_size": 4,
    "steps": 4,
}


def soft(rng: torch.Generator, tokens: int, candidates: int, vocabulary: int) -> SoftLabels:
    logprobs, ids = torch.randn(tokens, vocabulary, generator=rng).log_softmax(-1).topk(candidates, dim=-1)
    return SoftLabels(ids[:, 0], ids, logprobs)


def batch_of(labels: list[SoftLabels], first: list[int]) -> dict[str, Tensor]:
    from alula.data.soft_labels import joined

    return joined(list(zip(first, labels, strict=True)))


@pytest.mark.parametrize("candidates", [1, 3, 7])
def test_divergence_is_that_of_a_loop_over_tokens(candidates: int) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = [soft(rng, 3, candidates, 7), soft(rng, 2, candidates, 7)]
    logits = torch.randn(2, 6, 7, generator=rng)
    found = divergence(logits, batch_of(labels, [2, 6 + 4]))
    expected = 0.0
    for row, start, label in ((0, 2, labels[0]), (1, 4, labels[1])):
        mean = 0.0
        for token in range(len(label.ids)):
            q = logits[row, start + token - 1].double().softmax(-1)
            p = label.logprobs[token].double().exp()
            kept = [float(q[number]) for number in label.candidates[token]]
            mean += sum(
                float(a) * (float(a.log()) - torch.tensor(b).log().item()) for a, b in zip(p, kept, strict=True)
            )
            rest = 1 - float(p.sum())
            if candidates < 7:
                mean += rest * (torch.tensor(rest).log().item() - torch.tensor(1 - sum(kept)).log().item())
        expected += mean / len(label.ids)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_divergence_is_nothing_from_itself_and_less_with_fewer_candidates() -> None:
    rng = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(1, 4, 9, generator=rng), torch.randn(1, 4, 9, generator=rng)
    found = []
    for candidates in (2, 5, 9):
        logprobs, ids = teacher[0, :3].log_softmax(-1).topk(candidates, dim=-1)
        batch = batch_of([SoftLabels(ids[:, 0], ids, logprobs)], [1])
        assert divergence(teacher, batch).item() == pytest.approx(0, abs=1e-6)
        found.append(divergence(student, batch).item())
    assert 0 < found[0] <= found[1] <= found[2]
    p, q = teacher[0, :3].log_softmax(-1), student[0, :3].log_softmax(-1)
    whole = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found[2] == pytest.approx(whole.item(), rel=1e-5)
    assert divergence(student, {}).item() == 0


def test_gradients_stay_finite_where_the_candidates_have_all_of_the_probability() -> None:
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    label = SoftLabels(torch.tensor([2]), torch.tensor([[2, 0]]), torch.tensor([[0.0, -torch.inf]]).clamp(min=-1e4))
    loss = divergence(logits, batch_of([label], [1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 2] < 0


def visual(index: int = 0) -> Sample:
    return open_source({"microworld": "visual"})[index]


def lesson(collate: Collator, question: str = "2 + 2 ?", answer: str = "4") -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    labels = collate([Sample("t", copy.deepcopy(turns))])["labels"][0]
    ids = labels[labels != IGNORED]
    size = len(ids)
    turns[1]["soft"] = SoftLabels(ids, ids[:, None].repeat(1, 3), torch.full((size, 3), -1.0))
    return turns


@pytest.mark.parametrize("side", ["left", "right"])
def test_soft_labels_stand_where_their_tokens_are_predicted(host_directory: Path, side: Any) -> None:
    processor = load_host(host_directory).processor
    collate = Collator(processor, padding_side=side)
    held = lesson(collate)
    before = [*held, *visual().messages]
    plain = visual(1)
    batch = collate([Sample("a", [*visual().messages, *held]), plain, Sample("b", before)])
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    told, size = held[1]["soft"], len(held[1]["soft"].ids)
    places = batch["soft_positions"] + 1
    assert torch.equal(ids[places], told.ids.repeat(2))
    assert (labels[places] == IGNORED).all()
    assert torch.equal(batch["soft_weights"], torch.full((2 * size,), 1 / size))
    assert batch["soft_candidates"].shape == batch["soft_logprobs"].shape == (2 * size, 3)
    # what the visual turns teach is what it was
    alone = collate([visual()])["labels"][0]
    assert (batch["labels"][0] != IGNORED).sum() == (alone != IGNORED).sum() == (batch["labels"][2] != IGNORED).sum()
    assert not set(KEYS) & set(collate([plain]))


def test_soft_labels_of_other_tokens_are_refused(host_directory: Path) -> None:
    collate = Collator(load_host(host_directory).processor)
    held = lesson(collate)
    held[1]["content"][0]["text"] = "5"
    with pytest.raises(RecordError, match="other tokens"):
        collate([Sample("a", [*visual().messages, *held])])


def lessons_of(collate: Collator) -> Lessons:
    made = [lesson(collate, f"{n} + {n} ?", str(2 * n)) for n in range(3)]
    soft_labels = [turns[1]["soft"] for turns in made]
    return Lessons(
        questions=tuple(turns[0]["content"][0]["text"] for turns in made),
        answers=tuple(turns[1]["content"][0]["text"] for turns in made),
        lengths=torch.tensor([len(each.ids) for each in soft_labels]),
        ids=torch.cat([each.ids for each in soft_labels]),
        candidates=torch.cat([each.candidates for each in soft_labels]),
        logprobs=torch.cat([each.logprobs for each in soft_labels]),
    )


@pytest.mark.parametrize("order", ["behind", "between"])
def test_a_share_of_the_samples_with_media_hold_a_text_turn(host_directory: Path, order: Any) -> None:
    collate = Collator(load_host(host_directory).processor)
    mixture = Mixture.with_text_replay([open_source({"microworld": "visual"})], [open_source(QUESTIONS)], 0.25)
    spec = Distill(share=0.4, order=order)
    held = HeldMixture(mixture, lessons_of(collate), spec=spec, seed=3)
    shown = holding = 0
    for position in range(600):
        sample, plain = held[position], mixture[position]
        assert list(map(message_text, held[position].messages)) == list(map(message_text, sample.messages))
        soft_at = [number for number, turn in enumerate(sample.messages) if "soft" in turn]
        shown += bool(plain.media())
        if not soft_at:
            assert list(map(message_text, sample.messages)) == list(map(message_text, plain.messages))
            continue
        assert [ref.fingerprint() for ref in sample.images] == [ref.fingerprint() for ref in plain.images]
        assert sample.messages[0]["content"][0]["type"] == "image"
        assert soft_at == [len(sample.messages) - 1 if order == "behind" else 1]
        holding += 1
    assert holding / shown == pytest.approx(0.4, abs=0.06)
    collate([held[position] for position in range(16)])
    other = HeldMixture(mixture, lessons_of(collate), spec=spec, seed=4)
    assert any(len(other[n].messages) != len(held[n].messages) for n in range(50))


def test_the_lessons_are_what_the_start_says_without_an_image(recipe: MakeRecipe, host_directory: Path) -> None:
    result = train(recipe(**HELD), quiet=True)
    (directory,) = (result.directory / "distillation").iterdir()
    lessons = Lessons.load(directory)
    record = json.loads((result.directory / "stages/01-only/stage.json").read_text())
    assert record["distill"] == lessons.counts()
    assert record["distill"]["questions"] == len(lessons) <= 12
    host = load_host(host_directory, dtype=torch.float32)
    tokenizer: Any = host.processor.tokenizer
    language: Any = host.model.get_decoder()
    for index in range(len(lessons)):
        chat = [{"role": "user", "content": [{"type": "text", "text": lessons.questions[index]}]}]
        given: Any = host.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = host.model.generate(**given, do_sample=False, max_new_tokens=6, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == lessons.answers[index].strip()
        labels = lessons.labels(index)
        ids = torch.cat([given["input_ids"][0], labels.ids])[None]
        with torch.no_grad():
            logits = host.model.lm_head(language(input_ids=ids).last_hidden_state)[0]
        expected, tokens = logits[given["input_ids"].shape[1] - 1 : -1].log_softmax(-1).topk(8)
        torch.testing.assert_close(labels.logprobs, expected, atol=1e-5, rtol=1e-4)
        assert (labels.candidates == tokens).float().mean() > 0.9  # ties aside


@pytest.mark.parametrize("method", ["experts", "full", "lora", "wings", "projector"])
def test_any_method_can_be_held(recipe: MakeRecipe, method: str) -> None:
    part = {"full": "llm", "projector": "projector"}.get(method, method)
    stage = {**HELD, "method": method, "train": {part: 1e-2}, "steps": 2}
    if method != "experts":
        stage.pop("experts")
    result = train(recipe(**stage), quiet=True)
    for row in rows(result.directory):
        assert row["losses"]["distill"] >= 0
        assert row["loss"] >= row["losses"]["distill"]


def test_untrained_the_divergence_is_that_of_an_image_before_the_question(recipe: MakeRecipe, plain: Any) -> None:
    """At the first step nothing was learnt; over micro-batches it is the same; the weight counts."""
    options = {**HELD, "steps": 1, "clip": None, "schedule": {"kind": "constant", "warmup": 0}}
    whole = rows(train(recipe(**options), quiet=True).directory)[0]
    raw = plain(**options, micro_batch_size=1)
    raw["output_dir"] += "-micro"
    split = rows(train(parse_recipe(raw), quiet=True).directory)[0]
    assert whole["losses"]["distill"] > 0
    assert split["losses"]["distill"] == pytest.approx(whole["losses"]["distill"], rel=1e-4)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    raw = plain(**{**options, "distill": {**HELD["distill"], "weight": 3.0}})
    raw["output_dir"] += "-heavy"
    heavy = rows(train(parse_recipe(raw), quiet=True).directory)[0]
    assert heavy["loss"] - whole["loss"] == pytest.approx(2 * whole["losses"]["distill"], rel=1e-3)


def test_held_words_drift_less(recipe: MakeRecipe, plain: Any) -> None:
    """Two trainings on the same pictures, one of them held: the divergence at the end is told by the same measure."""
    options = {**HELD, "steps": 60, "batch_size": 8, "train": {"experts": 3e-2}}
    held = train(recipe(**{**options, "distill": {**HELD["distill"], "share": 1.0, "weight": 4.0}}), quiet=True)
    raw = plain(**{**options, "distill": {**HELD["distill"], "share": 1.0, "weight": 1e-6}})
    raw["output_dir"] += "-free"
    free = train(parse_recipe(raw), quiet=True)
    tails = [sum(row["losses"]["distill"] for row in rows(run.directory)[-10:]) / 10 for run in (held, free)]
    assert tails[0] < 0.5 * tails[1]


def test_answers_are_asked_for_once(recipe: MakeRecipe, plain: Any, tmp_path: Path) -> None:
    shared = {**HELD, "distill": {**HELD["distill"], "cache": str(tmp_path / "cache")}, "steps": 1}
    first = train(recipe(**shared), quiet=True)
    (made,) = (tmp_path / "cache").iterdir()
    before = os.stat(made / "lessons.safetensors").st_mtime_ns
    raw = plain(**shared)
    raw["output_dir"] += "-again"
    again = train(parse_recipe(raw), quiet=True)
    assert os.stat(made / "lessons.safetensors").st_mtime_ns == before
    assert rows(first.directory) == rows(again.directory)
    assert not list((first.directory / "distillation").glob("*"))
    longer = copy.deepcopy(raw)
    longer["stages"][0]["distill"]["candidates"] = 4
    longer["output_dir"] += "-other"
    train(parse_recipe(longer), quiet=True)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_lessons_are_told(recipe: MakeRecipe, plain: Any, tmp_path: Path) -> None:
    shared = {**HELD, "distill": {**HELD["distill"], "cache": str(tmp_path / "cache")}, "steps": 1}
    train(recipe(**shared), quiet=True)
    (made,) = (tmp_path / "cache").iterdir()
    (made / "lessons.safetensors").write_bytes(b"no tensors")
    raw = plain(**shared)
    raw["output_dir"] += "-again"
    with pytest.raises(DataError, match="holds no answers to distill from") as caught:
        train(parse_recipe(raw), quiet=True)
    assert str(made) in str(caught.value.where)


def test_the_model_writes_its_own_questions(recipe: MakeRecipe) -> None:
    """Random weights write random words, which are questions like any other; alike for the same seed."""
    own = {**HELD["distill"], "prompts": None, "count": 6, "max_new_tokens": 128}
    result = train(recipe(**{**HELD, "distill": own, "steps": 2}), quiet=True)
    (directory,) = (result.directory / "distillation").iterdir()
    lessons = Lessons.load(directory)
    assert 1 <= len(lessons) <= 6
    assert len(set(lessons.questions)) == len(lessons)
    assert all("<|" not in question for question in lessons.questions)


def test_a_model_that_writes_no_questions_is_told(tmp_path: Path) -> None:
    """The fledgling was taught answers only: it ends a user's turn at once."""
    raw = {
        "name": "mute",
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "host": {"llm": "fledgling", "vision": "fledgling"},
        "stages": [
            {
                "name": "only",
                "method": "projector",
                "data": {"sources": [{"microworld": "visual"}]},
                "steps": 1,
                "batch_size": 2,
                "distill": {"count": 32},
            }
        ],
    }
    with pytest.raises(HostError, match="hardly trained to write what users say") as caught:
        train(parse_recipe(raw), quiet=True)
    assert "jsonl" in str(caught.value.remedy)


def test_what_cannot_be_held_is_refused(recipe: MakeRecipe, plain: Any, tmp_path: Path) -> None:
    text_only = recipe(**{**HELD, "data": {"sources": [QUESTIONS]}})
    with pytest.raises(RecipeError, match="shows anything") as caught:
        train(text_only, quiet=True)
    assert caught.value.where == "stages.only.distill"
    with pytest.raises(DataError, match="is not text alone"):
        train(
            recipe(
                **{**HELD, "distill": {"prompts": {"microworld": "visual"}}}, run={"output_dir": str(tmp_path / "b")}
            ),
            quiet=True,
        )
    for key, value in (
        ("share", 0),
        ("share", 1.5),
        ("order", "before"),
        ("weight", 0),
        ("temperature", 1),
        ("prompts", "file.jsonl"),
    ):
        raw = plain(**{**HELD, "distill": {**HELD["distill"], key: value}})
        with pytest.raises(RecipeError, match=key):
            check(raw)


def test_a_template_that_writes_earlier_answers_otherwise_takes_them_last_only(host_directory: Path) -> None:
    host = load_host(host_directory)
    mixture = Mixture([open_source({"microworld": "visual"})])

    def check_order(order: Any) -> None:
        collate = Collator(host.processor)
        HeldMixture(mixture, lessons_of(collate), spec=Distill(order=order), seed=0).check(collate, "here")

    check_order("behind")
    check_order("between")
    host.processor.chat_template = (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{%- generation -%}"
        "{{- part['text'] + ('' if loop.last and message == messages[-1] else ' .') + '<|im_end|>' -}}"
        "{%- endgeneration -%}"
        "{%- else -%}{{- part['text'] + '<|im_end|>' -}}{%- endif -%}"
        "{%- endfor -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    check_order("behind")
    with pytest.raises(RecipeError, match="other tokens") as caught:
        check_order("between")
    assert caught.value.remedy == "order: behind"


def test_a_held_run_goes_on_where_it_was_stopped(recipe: MakeRecipe) -> None:
    from tests.training.test_resume import stopped

    options = {**HELD, "steps": 5, "save_every": 2}
    whole = train(recipe(**options), quiet=True)
    broken = recipe(run={"output_dir": f"{whole.directory}-broken"}, **options)
    stopped(broken, 3)
    asked = {
        path: path.stat().st_mtime_ns for path in (Path(broken.output_dir) / "distillation").rglob("*.safetensors")
    }
    assert asked
    result = train(broken, resume="auto", quiet=True)
    assert rows(result.directory) == rows(whole.directory)
    assert {path: path.stat().st_mtime_ns for path in asked} == asked
    start: Callable[..., Any] = alula.load_model
    assert type(start(result.final).model) is type(start(whole.final).model)


def test_a_loss_of_that_name_is_not_replaced(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(type(METHODS["full"])):  # type: ignore[misc]
        def losses(self, tuned: Any, settings: Any) -> dict[str, Loss]:
            return {"distill": Loss(lambda outputs, batch, context: outputs["logits"].sum() * 0, 1.0)}

    monkeypatch.setitem(METHODS, "full", Named())
    stage = {**HELD, "method": "full", "train": {"llm": 1e-2}, "steps": 1}
    stage.pop("experts")
    with pytest.raises(UsageError, match="a loss of its own called distill"):
        train(recipe(**stage), quiet=True)
