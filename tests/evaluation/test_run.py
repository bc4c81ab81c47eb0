"""Running tasks: what is asked, what comes back, and that batching, padding and stopping change nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import alula
from alula.errors import EvaluationError, UsageError
from alula.evaluation import (
    Decoding,
    HarnessTasks,
    ItemTask,
    RunResult,
    TaskItem,
    compare,
    evaluate,
    exact_match,
    run_harness,
    runner,
)
from alula.evaluation.journal import Journal
from alula.evaluation.results import ItemResult
from alula_fledgling.tasks import native_tasks
from tests.silence import silenced


def user(text: str, *images: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


class Lazy:
    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def load(self) -> Image.Image:
        return self.image


def text_task(n: int = 9) -> ItemTask:
    items = [
        TaskItem(f"i{k}", "odd" if k % 2 else "even", [user("count " + "x" * (3 * k + 1))], "zz") for k in range(n)
    ]
    return ItemTask("plain", "plain text", items, exact_match, max_new_tokens=6)


def image_task(picture: Image.Image, n: int = 5) -> ItemTask:
    items = [TaskItem(f"v{k}", "look", [user("see" * (k + 1), *[Lazy(picture)] * (k % 3))], "q") for k in range(n)]
    return ItemTask("look", "looking", items, exact_match, max_new_tokens=5)


def answers(result: RunResult) -> dict[str, list[str]]:
    return {name: [item.answer for item in task.items] for name, task in result.tasks.items()}


@pytest.mark.parametrize("size", ["batch_size", "max_new_tokens"])
def test_batches_and_answers_of_no_size_are_refused(llm: Any, tokenizer: Any, size: str) -> None:
    sizes: dict[str, Any] = {size: 0}
    for ask in (
        lambda: evaluate(llm, tokenizer, [text_task()], **sizes),
        lambda: run_harness(llm, tokenizer, HarnessTasks(["t"]), **sizes),
    ):
        with pytest.raises(UsageError, match=f"{size}: must be at least 1, not 0"):
            ask()


def test_answers_are_those_of_unbatched_greedy_generation(host: Any, processor: Any, picture: Image.Image) -> None:
    tasks = [text_task(), image_task(picture)]
    result = evaluate(host, processor, tasks, batch_size=4)
    for task in tasks:
        for item, got in zip(task.items(), result.tasks[task.name].items, strict=True):
            images = [part["image"].load() for part in item.messages[0]["content"] if part["type"] == "image"]
            prompt = f"<|user|>{'<image>' * len(images)}{item.messages[0]['content'][-1]['text']}<|end|><|assistant|>"
            inputs = processor(text=prompt, images=images or None, return_tensors="pt")
            output = host.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
            expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert got.id == item.id
            assert got.answer == expected


def test_what_is_attached_takes_part(host: Any, processor: Any, picture: Image.Image) -> None:
    tasks = [text_task(), image_task(picture)]
    with silenced(host, processor.tokenizer.eos_token_id):
        found = answers(evaluate(host, processor, tasks, batch_size=3))
    assert {answer for of_task in found.values() for answer in of_task} == {""}
    assert {answer for of_task in answers(evaluate(host, processor, tasks)).values() for answer in of_task} != {""}


def test_batch_size_does_not_change_answers(host: Any, processor: Any, picture: Image.Image) -> None:
    tasks = [text_task(), image_task(picture)]
    assert answers(evaluate(host, processor, tasks, batch_size=1)) == answers(
        evaluate(host, processor, tasks, batch_size=8)
    )


def test_text_llm_with_its_tokenizer(llm: Any, tokenizer: Any, processor: Any) -> None:
    result = evaluate(llm, tokenizer, [text_task()], name="llm")
    assert result.model == "llm"
    assert result.conditions.dtype == "float32"
    assert result.conditions.backend["model"] == "sdpa"
    assert {"torch", "transformers", "alula", "python"} <= set(result.conditions.versions)


def test_an_answer_cut_at_the_limit_says_so(llm: Any, tokenizer: Any) -> None:
    short = evaluate(llm, tokenizer, [text_task()], max_new_tokens=2).tasks["plain"]
    assert short.max_new_tokens == 2
    long = evaluate(llm, tokenizer, [text_task()], max_new_tokens=40).tasks["plain"]
    for one, two in zip(short.items, long.items, strict=True):
        assert two.answer.startswith(one.answer)
        assert one.truncated == (len(two.answer) > 2 or two.truncated)


def test_host_and_llm_ask_the_same(llm: Any, host: Any, tokenizer: Any, processor: Any) -> None:
    first = evaluate(llm, tokenizer, [text_task()]).tasks["plain"].items
    second = evaluate(host, processor, [text_task()]).tasks["plain"].items
    assert [item.prompt_hash for item in first] == [item.prompt_hash for item in second]


def test_prompt_hash_sees_pixels(host: Any, processor: Any, picture: Image.Image) -> None:
    other = picture.copy()
    other.putpixel((3, 3), (1, 2, 3))
    first, second = (evaluate(host, processor, [image_task(image)]).tasks["look"].items for image in (picture, other))
    same = [one.prompt_hash == two.prompt_hash for one, two in zip(first, second, strict=True)]
    assert same == [True, False, False, True, False]  # k % 3 images each


def test_images_for_a_plain_tokenizer_are_refused_before_any_work(llm: Any, tokenizer: Any, picture: Any) -> None:
    with pytest.raises(UsageError, match=r"'look'.*takes text only"):
        evaluate(llm, tokenizer, [text_task(), image_task(picture)])


def test_no_chat_template(llm: Any, tokenizer: Any) -> None:
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(UsageError, match="no chat template"):
        evaluate(llm, bare, [text_task()])


def test_lora_wrapped_model(llm: Any, tokenizer: Any) -> None:
    wrapped = get_peft_model(copy.deepcopy(llm), LoraConfig(target_modules=["q_proj", "v_proj"]))
    plain, tuned = evaluate(llm, tokenizer, [text_task()]), evaluate(wrapped, tokenizer, [text_task()])
    assert answers(plain) == answers(tuned)  # LoRA starts at zero
    assert plain.fingerprint != tuned.fingerprint


def test_modes_are_left_as_found(llm: Any, tokenizer: Any) -> None:
    llm.train()
    llm.lm_head.eval()
    evaluate(llm, tokenizer, [text_task(2)])
    assert llm.training
    assert not llm.lm_head.training
    llm.eval()


def test_checkpoint_generation_defaults_do_not_leak(llm: Any, tokenizer: Any) -> None:
    expected = answers(evaluate(llm, tokenizer, [text_task()]))
    llm.generation_config.update(do_sample=True, temperature=0.3, top_k=3, repetition_penalty=1.9, max_length=3)
    try:
        assert answers(evaluate(llm, tokenizer, [text_task()])) == expected
    finally:
        llm.generation_config.update(
            do_sample=None, temperature=None, top_k=None, repetition_penalty=None, max_length=None
        )


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(llm: Any, tokenizer: Any) -> None:
    before = torch.random.get_rng_state()
    runs = [
        answers(evaluate(llm, tokenizer, [text_task()], decoding=Decoding(do_sample=True, seed=s))) for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_generated_history_quotes_own_answers(llm: Any, tokenizer: Any) -> None:
    first = TaskItem("a", "f", [user("hello")], "gold")
    second = TaskItem("b", "f", [user("hello"), assistant("gold"), user("again")], "x", follows=((1, "a"),))
    given = TaskItem("b", "f", second.messages, "x")
    own = evaluate(llm, tokenizer, [ItemTask("t", "t", [first, second], exact_match, 5)]).tasks["t"].items
    gold = evaluate(llm, tokenizer, [ItemTask("t", "t", [first, given], exact_match, 5)]).tasks["t"].items
    assert own[1].prompt[1].content[0].text == own[0].answer
    assert own[1].prompt_hash == gold[1].prompt_hash  # comparable: the hash is of what was given, not of what was said
    with pytest.raises(EvaluationError, match="does not come before"):
        evaluate(llm, tokenizer, [ItemTask("t", "t", [second, first], exact_match)])


def test_result_file_round_trip(tmp_path: Path, host: Any, processor: Any, picture: Image.Image) -> None:
    result = evaluate(host, processor, [image_task(picture)])
    assert RunResult.load(result.save(tmp_path / "run.json")) == result
    thumbnails = [part.image for item in result.tasks["look"].items for part in item.prompt[0].content if part.image]
    assert len(thumbnails) == 4
    assert thumbnails[0].startswith("data:image/png;base64,")
    (tmp_path / "other.json").write_text(json.dumps({"format": "alula-run-1"}))
    with pytest.raises(EvaluationError, match=r"other.json: is no RunResult: model"):
        RunResult.load(tmp_path / "other.json")


class KilledError(Exception):
    """Stands for a kill."""


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, llm: Any, tokenizer: Any, monkeypatch: Any) -> None:
    whole = evaluate(llm, tokenizer, [text_task(20)], batch_size=4)
    calls = 0
    generate = llm.generate

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KilledError
        return generate(*args, **kwargs)

    journal = tmp_path / "answers.jsonl"
    monkeypatch.setattr(llm, "generate", dying)
    with pytest.raises(KilledError):
        evaluate(llm, tokenizer, [text_task(20)], batch_size=4, journal=journal)
    with journal.open("a") as stream:
        stream.write('{"task": "plain", "item": {"id": "i')  # torn by the kill
    resumed = evaluate(llm, tokenizer, [text_task(20)], batch_size=4, journal=journal)
    assert calls == 3 + 3  # two batches were kept, three answered anew
    assert resumed.tasks == whole.tasks
    lenient = replace(text_task(20), scorer=lambda item, answer: 1.0)
    again = evaluate(llm, tokenizer, [lenient], batch_size=4, journal=journal)
    assert calls == 6  # nothing is answered twice, but everything is scored as it is asked now
    assert again.tasks["plain"].accuracy == 1


def test_a_journal_of_another_model_is_refused(tmp_path: Path, llm: Any, host: Any, tokenizer: Any) -> None:
    journal = tmp_path / "answers.jsonl"
    evaluate(llm, tokenizer, [text_task(2)], journal=journal)
    with pytest.raises(EvaluationError, match=r"changed since: the model \(its weights, .*\n.*--output"):
        evaluate(host, tokenizer, [text_task(2)], journal=journal)
    with pytest.raises(EvaluationError, match=r"changed since: the settings of decoding\n"):
        evaluate(llm, tokenizer, [text_task(2)], journal=journal, decoding=Decoding(num_beams=2))
    journal.write_text(journal.read_text() + "{}\n")
    with pytest.raises(EvaluationError, match=r"answers.jsonl:4: is damaged"):
        evaluate(llm, tokenizer, [text_task(2)], journal=journal)


def test_a_journal_outlives_odd_characters_and_any_kill(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    odd = ItemResult(id="1", family="f", prompt_hash="h", gold="", answer="one\u2028two\x85three", score=0.0)
    Journal(path, {"fingerprint": "x"}).add(
        "task", [odd, odd.model_copy(update={"id": "2", "answer": "\u00e9t\u00e9"})]
    )
    whole = path.read_bytes()
    assert Journal(path, {"fingerprint": "x"}).finished("task", "1", "h") == odd
    for cut in range(1, 60):  # also inside a character of several bytes
        path.write_bytes(whole[:-cut])
        resumed = Journal(path, {"fingerprint": "x"})
        assert resumed.finished("task", "1", "h") == odd
        assert resumed.finished("task", "2", "h") is None


def test_answers_that_were_edited_are_not_taken(tmp_path: Path, llm: Any, tokenizer: Any) -> None:
    journal = tmp_path / "answers.jsonl"
    evaluate(llm, tokenizer, [text_task(3)], journal=journal)
    written = journal.read_text().splitlines(keepends=True)
    edited = json.loads(written[2])
    edited["item"]["answer"] = edited["item"]["gold"]
    other = tmp_path / "other.jsonl"
    evaluate(copy.deepcopy(llm).double(), tokenizer, [text_task(3)], journal=other)
    for line, told in (
        (json.dumps(edited) + "\n", "is not as it was written"),
        (other.read_text().splitlines(keepends=True)[2], "is not as it was written"),  # of another model
        (written[2].replace('"check"', '"cheque"'), "is damaged"),
        ("[1]\n", "is damaged"),
    ):
        journal.write_text("".join([*written[:2], line, *written[3:]]))
        with pytest.raises(EvaluationError, match=rf"answers.jsonl:3: {told}"):
            evaluate(llm, tokenizer, [text_task(3)], journal=journal)
    journal.write_text("".join([*written[:2], *written[3:]]))  # one question is asked again
    assert len(evaluate(llm, tokenizer, [text_task(3)], journal=journal).tasks["plain"].items) == 3


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ('{"journal": 3}', "not a journal"),
        ('{"journal": ["fingerprint"]}', "not a journal"),
        ('"journal"', "not a journal"),
        ("[" * 100_000, "not a journal"),
        ("", "not a journal"),
        ('{"journal": {"fingerprint": "x"}}', "another version"),
        ('{"journal": {"fingerprint": []}, "version": 2}', "another run"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_is_no_journal(tmp_path: Path, header: str, told: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(header + "\n")
    with pytest.raises(EvaluationError, match=told):
        Journal(path, {"fingerprint": "x"})


def test_a_journal_of_other_circumstances_is_refused(
    tmp_path: Path, llm: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    journal = tmp_path / "answers.jsonl"
    evaluate(llm, tokenizer, [text_task(2)], journal=journal)
    found = runner.conditions

    def elsewhere(*arguments: Any) -> Any:
        return found(*arguments).model_copy(update={"device": "another"})

    monkeypatch.setattr(runner, "conditions", elsewhere)
    with pytest.raises(EvaluationError, match=r"changed since: the device \('cpu', now 'another'\)\n"):
        evaluate(llm, tokenizer, [text_task(2)], journal=journal)


def test_results_without_tasks_or_items_are_no_results(tmp_path: Path, llm: Any, tokenizer: Any) -> None:
    result = evaluate(llm, tokenizer, [text_task(2)])
    for key, found in (("tasks", {**result.model_dump(), "tasks": {}}), ("items", result.model_dump())):
        if key == "items":
            found["tasks"]["plain"]["items"] = []
        (tmp_path / "run.json").write_text(json.dumps(found))
        with pytest.raises(EvaluationError, match=rf"is no RunResult: .*{key}"):
            RunResult.load(tmp_path / "run.json")


def test_a_journal_tells_a_graft_that_speaks_from_one_that_is_silent(
    tmp_path: Path, host: Any, processor: Any, picture: Image.Image
) -> None:
    graft = alula.attach(host, alula.WingsConfig(rank=2))
    try:
        evaluate(host, processor, [image_task(picture, 2)], journal=tmp_path / "answers.jsonl")
        with graft.disabled(), pytest.raises(EvaluationError, match="another run"):
            evaluate(host, processor, [image_task(picture, 2)], journal=tmp_path / "answers.jsonl")
    finally:
        alula.detach(host)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no tasks"),
        ([text_task(), text_task()], "two tasks are called 'plain'"),
        ([ItemTask("none", "none", [], exact_match)], "has no items"),
        ([ItemTask("twice", "t", [text_task(1).items()[0]] * 2, exact_match)], "two items have the id 'i0'"),
    ],
)
def test_bad_task_lists(llm: Any, tokenizer: Any, tasks: list[Any], message: str) -> None:
    with pytest.raises((UsageError, EvaluationError), match=message):
        evaluate(llm, tokenizer, tasks)


def test_a_prompt_must_end_with_the_user() -> None:
    with pytest.raises(EvaluationError, match="must end with a user turn"):
        TaskItem("a", "f", [user("hi"), assistant("ho")], "x")


def test_microworld_tasks_run_on_an_image_host(host: Any, processor: Any) -> None:
    result = evaluate(host, processor, native_tasks(n=8), max_new_tokens=3, batch_size=16)
    assert list(result.tasks) == ["text_bare", "text_after_image", "visual", "visual_unseen", "dialogue"]
    assert all(task.items for task in result.tasks.values())


def test_grafted_host_answers_like_its_host_while_the_graft_is_fresh(host: Any, processor: Any, picture: Any) -> None:
    grafted = copy.deepcopy(host)
    alula.attach(grafted, alula.WingsConfig(rank=4))
    tasks = [text_task(), image_task(picture)]
    before, after = evaluate(host, processor, tasks, name="host"), evaluate(grafted, processor, tasks, name="wings")
    assert answers(before) == answers(after)
    assert before.fingerprint != after.fingerprint
    pairs = compare(before, after)
    assert all(result.identical_answers == result.overall.n for result in pairs.tasks.values())
