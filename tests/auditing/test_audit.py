"""`alula audit` on saved random models of every supported kind: whole, resumable, bounded, and honest about errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

import alula
from alula.anatomy import Anatomy
from alula.auditing import SECTIONS, Audit, Plan, audit, audit_json, audit_report, memory
from alula.auditing import run as audit_run
from alula.auditing.sections.text import BARE
from alula.cli import app as cli
from alula.errors import AlulaError, DataError, HostError, UsageError
from alula.probes import watch
from alula_fledgling.microworld import export_llava, visual_items
from tests import zoo
from tests.hosts import tiny

PROBING = tuple(name for name in SECTIONS if name != "text")


def figures(result: Audit) -> dict[str, Any]:
    """What two audits of the same model and data must agree on."""
    record = audit_json(result)
    return {key: record[key] for key in (*SECTIONS, "findings", "controls", "data", "words")}


def test_measurements_lie_where_earlier_versions_put_them(small: tuple[Plan, Audit]) -> None:
    """An audit that an earlier version began goes on, and readers of audit.json find what they found."""
    folder = small[0].output / "measured"
    (checkpoint,) = (folder / "model").iterdir()
    assert {path.stem for path in checkpoint.glob("*.safetensors")} == {
        "attention", "alignment", "geometry", "lens", "overlap"
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"model", "noise", "untrained"}
    assert small[0].facts()["sections"] == ["text", "attention", "alignment", "geometry", "lens", "overlap"]
    record = audit_json(small[1])
    assert set(record) == {
        "format", "model", "base", "model_class", "parameters", "layers", "device", "dtype", "created", "command",
        "seconds", "settings", "environment", "data", "findings", "text", "attention", "alignment", "geometry", "lens",
        "overlap", "controls", "words", "memory",
    }  # fmt: skip
    nothing = audit_json(replace(small[1], results={}))
    assert [nothing[name] for name in SECTIONS] == [None] * 6
    assert nothing["controls"] == nothing["words"] == {}


def test_every_section_is_measured_and_json(small: tuple[Plan, Audit]) -> None:
    record = json.loads(json.dumps(audit_json(small[1]), allow_nan=False))
    assert [finding["section"] for finding in record["findings"]] == list(SECTIONS)
    assert all(record[name] for name in SECTIONS)
    assert set(record["controls"]) == {"noise", "untrained"}
    assert record["data"]["measured"] == 24 == record["attention"]["samples"]
    assert record["text"]["base_asked_in_model_words"]
    # a random LLM around which a host was built says in text what it said before, whatever that is
    assert record["text"]["paired"]["tasks"][BARE]["identical_answers"] == 10


def test_the_report_stands_alone(small: tuple[Plan, Audit]) -> None:
    html = audit_report(small[1])
    assert not re.search(r'(src|href)="(?!#|data:|https://arxiv\.org)', html)
    for finding in audit_json(small[1])["findings"]:
        assert finding["title"] in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()
    assert "however many samples" in html


@pytest.mark.parametrize("kind", ["qwen", "wings", "lora"])
def test_other_kinds_of_models(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(kind)
    plan = Plan(
        output=tmp_path, model=str(model) if kind != "qwen" else kind, samples=6, batch_size=3, sections=PROBING
    )
    result = audit(plan, alula.load_model if kind != "qwen" else lambda name: model)
    assert result.measured == 6
    assert "text" not in result.results
    # Qwen-VL merges patches inside its tower and has no connector to start afresh
    assert set(result.results["alignment"].controls) == ({"noise"} if kind == "qwen" else {"noise", "untrained"})
    assert ("total" in result.results["attention"].shift) == (kind == "wings")
    assert audit_report(result)


def test_a_finished_audit_runs_no_model_again(small: tuple[Plan, Audit]) -> None:
    def load(name: str) -> Any:
        loaded = alula.load_model(name)

        def run(*arguments: Any) -> None:
            raise AssertionError("run again")

        loaded.model.register_forward_pre_hook(run)
        return loaded

    assert figures(audit(small[0], load)) == figures(small[1])
    assert len(list((small[0].output / "measured" / "model").iterdir())) == 1


def test_an_audit_killed_at_any_stage_goes_on_to_the_same_figures(llava: Path, llm: Path, tmp_path: Path) -> None:
    """What a kill leaves behind is what lay on disk at that moment: the directory is copied before every forward."""
    plan = Plan(output=tmp_path / "whole", model=str(llava), base=str(llm), samples=5, items=3, batch_size=2)
    left = []

    def photographed(name: str) -> Any:
        loaded = alula.load_model(name)

        def copied(*arguments: Any) -> None:
            left.append(tmp_path / f"left-{len(left):03d}")
            shutil.copytree(plan.output, left[-1])

        loaded.model.register_forward_pre_hook(copied)
        return loaded

    whole = figures(audit(plan, photographed, checkpoint_seconds=0))
    passes, texts = left[:9], left[9:]
    for stage in (passes[1], passes[5], texts[0], texts[-1]):
        (stage / "unusable.jsonl").write_text('{"file": "torn')
        (stage / "measured" / "model" / ".00000002-x.partial").mkdir(parents=True)
        again = audit(plan.model_copy(update={"output": stage}), alula.load_model, checkpoint_seconds=0)
        assert figures(again) == whole, stage.name


@pytest.mark.parametrize("change", ["picture", "template", "device"])
def test_what_changed_since_a_kill_is_not_mixed_in(llava: Path, tmp_path: Path, change: str, monkeypatch: Any) -> None:
    data = export_llava(visual_items(4, split="test", seed=0), tmp_path / "mine")
    plan = Plan(
        output=tmp_path / "out", model=str(llava), data=data, images=tmp_path / "mine" / "images",
        batch_size=1, sections=("lens",),
    )  # fmt: skip

    def load(stop_at: int, template: str = "") -> Any:
        def loading(name: str) -> Any:
            loaded, passed = alula.load_model(name), []
            loaded.processor.chat_template = template + loaded.processor.chat_template

            def count(*arguments: Any) -> None:
                passed.append(1)
                if len(passed) == stop_at:
                    raise KeyboardInterrupt

            loaded.model.register_forward_pre_hook(count)
            return loaded

        return loading

    with pytest.raises(KeyboardInterrupt):
        audit(plan, load(3), checkpoint_seconds=0)
    if change == "picture":
        first = tmp_path / "mine" / "images" / json.loads(data.read_text())[0]["image"]
        Image.new("RGB", Image.open(first).size, (1, 2, 3)).save(first)
    if change == "device":
        found = audit_run.conditions
        monkeypatch.setattr(
            audit_run, "conditions", lambda *about: found(*about).model_copy(update={"device": "elsewhere"})
        )
    told = "another device" if change == "device" else "other conversations, pictures, chat template or processor"
    with pytest.raises(UsageError, match=f"holds the measurements of {told}"):
        audit(plan, load(0, "hello " if change == "template" else ""))
    if change == "device":
        monkeypatch.undo()
        assert audit(plan, load(0)).measured == 4


def test_pictures_that_came_back_are_usable_again(llava: Path, tmp_path: Path) -> None:
    data = export_llava(visual_items(2, split="test", seed=0), tmp_path / "mine")
    picture = next((tmp_path / "mine" / "images").glob("*"))
    plan = Plan(
        output=tmp_path / "out", model=str(llava), data=data, images=tmp_path / "mine" / "images",
        batch_size=2, sections=("lens",),
    )  # fmt: skip

    def killed(name: str) -> Any:
        loaded = alula.load_model(name)

        def stop(*arguments: Any) -> None:
            raise KeyboardInterrupt

        loaded.model.register_forward_pre_hook(stop)
        return loaded

    picture.rename(tmp_path / "away")
    with pytest.raises(KeyboardInterrupt):
        audit(plan, killed)
    assert picture.name in (plan.output / "unusable.jsonl").read_text()
    (tmp_path / "away").rename(picture)
    result = audit(plan, alula.load_model)
    assert (result.measured, result.unusable) == (2, 0)


def test_conversations_beyond_the_context_are_unusable(llava: Path, tmp_path: Path) -> None:
    def bounded(name: str) -> Any:
        loaded = alula.load_model(name)
        loaded.model.config.text_config.max_position_embeddings = 60
        return loaded

    result = audit(Plan(output=tmp_path, model=str(llava), samples=12, sections=("lens",)), bounded)
    assert result.measured
    assert result.measured + result.unusable == 12
    assert "more than the model's context of 60" in (tmp_path / "unusable.jsonl").read_text()


def test_settings_of_the_template_reach_everything_that_is_asked(llava: Path, tmp_path: Path) -> None:
    def opening(name: str) -> Any:
        loaded = alula.load_model(name)
        loaded.processor.chat_template = "{{ greeting or '' }}" + loaded.processor.chat_template
        return loaded

    def plan(output: str, **template: Any) -> Plan:
        return Plan(
            output=tmp_path / output, model=str(llava), samples=2, items=2, sections=("text", "lens"), template=template
        )

    plain, greeted = audit(plan("plain"), opening), audit(plan("greeted", greeting="hello there"), opening)
    assert figures(plain)["lens"] != figures(greeted)["lens"]
    hashes = [result.results["text"].run.tasks[BARE].items[0].prompt_hash for result in (plain, greeted)]
    assert hashes[0] != hashes[1]
    assert "hello there" in audit_report(greeted)
    with pytest.raises(UsageError, match="without effect"):
        audit(plan("other", farewell="bye"), opening)


def test_other_weights_and_other_settings_are_refused(llava: Path, tmp_path: Path) -> None:
    plan = Plan(output=tmp_path / "out", model=str(llava), samples=2, sections=("attention",))
    audit(plan, alula.load_model)
    with pytest.raises(UsageError, match="other settings"):
        audit(plan.model_copy(update={"samples": 3}), alula.load_model)

    def changed(name: str) -> Any:
        loaded = alula.load_model(name)
        with torch.no_grad():
            loaded.model.lm_head.weight.mul_(2)
        return loaded

    with pytest.raises(UsageError, match="other weights"):
        audit(plan, changed)


def test_the_memory_bound_is_true_and_does_not_grow() -> None:
    model = zoo.build("llava-qwen3")
    options = {"keep": 4}
    measurements = [section.measurement for section in SECTIONS.values() if section.measurement is not None]
    probes = [each.probe(**options) for each in measurements]
    sizes = []
    with watch(model, probes), torch.no_grad():
        for seed in range(8):
            model(**zoo.batch("llava-qwen3", "3I4I2", "2I5", "4I3", "2I6", seed=seed))
            sizes.append(memory.held(probes))
    assert len(set(sizes[1:])) == 1, sizes
    slack = len(probes) * 64 * 1024
    bound = memory.bound(zip(measurements, probes, strict=True), Anatomy.of(model))
    assert sizes[-1] <= bound - slack, "the formula alone must hold"
    assert bound - slack <= 3 * sizes[-1], "a bound that says nothing"


def test_own_conversations_and_own_questions(llava: Path, tmp_path: Path) -> None:
    export_llava(visual_items(6, split="test", seed=0), tmp_path / "mine")
    questions = tmp_path / "questions.jsonl"
    talk = [{"role": "user", "content": "one plus two?"}, {"role": "assistant", "content": "3"}]
    questions.write_text("\n".join(json.dumps({"id": str(n), "messages": talk}) for n in range(3)))
    broken = json.loads((tmp_path / "mine" / "data.json").read_text())
    broken[0]["image"] = "gone.png"
    (tmp_path / "mine" / "data.json").write_text(json.dumps(broken))
    plan = Plan(
        output=tmp_path / "out", model=str(llava), data=tmp_path / "mine" / "data.json",
        images=tmp_path / "mine" / "images", text=questions, samples=20, batch_size=2, sections=("text", "lens"),
    )  # fmt: skip
    result = audit(plan, alula.load_model)
    assert (result.measured, result.unusable) == (5, 1)
    assert len(result.results["text"].run.tasks[BARE].items) == 3
    assert "questions.jsonl" in audit_report(result)
    assert "text_bare" not in audit_report(result)
    assert result.results["text"].after_image is None


def test_questions_that_show_something_are_no_text_questions(llava: Path, tmp_path: Path) -> None:
    """A text LLM could not be asked them, which was told after the model had been."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is it?"}]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "black"}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "one", "messages": talk}))
    plan = Plan(output=tmp_path / "out", model=str(llava), text=tmp_path / "own.jsonl", sections=("text",))
    with pytest.raises(UsageError, match="question 'one' shows something") as caught:
        audit(plan, alula.load_model)
    assert "--data" in str(caught.value.remedy)


def test_a_template_that_marks_no_answers_is_asked_all_the_same(llava: Path, llm: Path, tmp_path: Path) -> None:
    def load(path: str) -> Any:
        loaded = alula.load_model(path)
        if path == str(llava):
            loaded.processor.chat_template = (
                "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content[-1].text }}<|im_end|>{% endfor %}"
            )
        return loaded

    own = tmp_path / "questions.jsonl"
    talk = [{"role": "user", "content": "one plus two?"}, {"role": "assistant", "content": "3"}]
    own.write_text(json.dumps({"messages": talk}))
    plan = Plan(output=tmp_path / "out", model=str(llava), base=str(llm), text=own, sections=("text",))
    result = audit(plan, load)
    told = result.results["text"]
    assert told.run.tasks[BARE].ratios == []
    assert told.pairs.tasks[BARE].figures == {}
    (note,) = [note for note in told.run.tasks[BARE].notes if "weighed" in note]
    assert note.startswith("references not weighed: LlavaProcessor.chat_template: the chat template does not mark")
    assert "remedy" not in note
    assert note in audit_report(result).replace("&#39;", "'")


def test_one_conversation_is_reported_as_far_as_it_says_anything(llava: Path, tmp_path: Path) -> None:
    result = audit(Plan(output=tmp_path, model=str(llava), samples=1, sections=PROBING), alula.load_model)
    html = audit_report(result)
    assert "<svg" in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()
    found = {
        finding["section"]: finding["status"] for finding in json.loads(json.dumps(audit_json(result)))["findings"]
    }
    assert found["alignment"] == found["overlap"] == "open"


@pytest.mark.parametrize("good", [1, 0])
def test_batches_of_unusable_conversations_are_passed_over(llava: Path, tmp_path: Path, good: int) -> None:
    records = json.loads(export_llava(visual_items(4, split="test", seed=0), tmp_path / "mine").read_text())
    for record in records[good:]:
        record["image"] = "gone.png"
    (tmp_path / "mine" / "data.json").write_text(json.dumps(records))
    plan = Plan(
        output=tmp_path / "out", model=str(llava), data=tmp_path / "mine" / "data.json",
        images=tmp_path / "mine" / "images", batch_size=1, sections=("lens",),
    )  # fmt: skip
    if not good:
        with pytest.raises(DataError, match="none of the 4 conversations"):
            audit(plan, alula.load_model)
        return
    result = audit(plan, alula.load_model)
    assert (result.measured, result.unusable) == (1, 3)


def test_errors_say_what_to_do(llava: Path, llm: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> AlulaError:
        with pytest.raises(AlulaError) as caught:
            audit(Plan(**{"output": tmp_path / "out", "model": str(llava), "samples": 2, **options}), alula.load_model)
        return caught.value

    words = tmp_path / "words.jsonl"
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    words.write_text(json.dumps({"messages": talk}))
    error = run(data=words)
    assert isinstance(error, DataError)
    assert "no conversation shows an image" in error.message
    assert isinstance(run(model=str(llm), output=tmp_path / "llm"), HostError)
    assert "no section 'tekst'" in run(sections=("tekst",)).message
    assert "text answers alone" in run(base=str(llm), sections=("lens",)).message


def test_an_unsupported_decoder_is_named(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "bloom", tiny.tokenizer()
    config = hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=len(tokenizer), tie_word_embeddings=False)
    llm = hf.AutoModelForCausalLM.from_config(config).eval()
    alula.hosts.save_host(alula.build_host(llm, tiny.TOWERS["clip"][0], tokenizer=tokenizer), path)
    with pytest.raises(HostError, match="bloom"):
        audit(Plan(output=tmp_path / "out", model=str(path), samples=2), alula.load_model)


def test_the_command(small: tuple[Plan, Audit], llava: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    arguments = ["--output", tmp_path, "--samples", 4, "--sections", "attention,overlap", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["alula", "audit", str(llava), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "audit.json").read_text())
    assert [finding["section"] for finding in printed["findings"]] == ["attention", "overlap"]
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_the_page_runs(llava: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "usage" / "audit.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.replace("runs/mine/final", str(llava)).replace("samples=64", "samples=8"), names)
    assert capsys.readouterr().out.count("\n") == 2
    assert "<svg" in names["html"]
