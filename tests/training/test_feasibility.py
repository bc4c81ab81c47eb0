"""What a check refuses before anything is built: settings that a host or the disk does not go with."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, MllamaConfig, TrainerCallback

import alula
from alula.cli import app as cli
from alula.errors import AlulaError, DataError, HostError, RecipeError, UsageError
from alula.evaluation.likelihood.engine import log_likelihoods
from alula.hosts import CustomTower
from alula.hosts.custom import CustomTowerConfig
from alula.training import ReadSource, check, parse_recipe, train
from alula_fledgling.tasks import native_tasks
from tests import media_hosts, zoo
from tests.hosts import tiny
from tests.training.conftest import rows

Plain = Callable[..., dict[str, Any]]

# changes of the only stage (a Llama of two layers, 32 wide) -> the key at fault, and what is said
STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (
        {"method": "wings", "train": {}, "wings": {"rank": 4, "layers": [99]}},
        r"only\.wings\.layers: layer 99",
    ),
    "wings rank": ({"method": "wings", "train": {}, "wings": {"rank": 65}}, r"only\.wings\.rank: 65 .*\n.*at most 64"),
    "lora rank": ({"method": "lora", "train": {}, "lora": {"rank": 33}}, r"only\.lora\.rank: 33 .*\n.*at most 32"),
    "targets": ({"method": "lora", "train": {}, "lora": {"targets": ["wq"]}}, r"only\.lora\.targets: `wq`.*\n.*q_proj"),
    "disk": ({"feature_cache": {"disk": "/dev/null/there"}}, r"only\.feature_cache\.disk: .*a file stands where"),
}


@pytest.mark.parametrize("case", STAGES)
def test_settings_the_host_does_not_go_with(plain: Plain, case: str) -> None:
    changes, told = STAGES[case]
    with pytest.raises(RecipeError, match=r"^stages\." + told):
        check(plain(**changes))


def test_places_that_cannot_be_written(plain: Plain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "thesis.txt").write_text("mine")
    for place, told in (
        (tmp_path / "file", "output_dir: .*a file stands where a directory is meant"),
        (tmp_path / "file" / "run", "output_dir: .*a file stands where a directory is meant"),
        (tmp_path / ("x" * 300), "output_dir: .*the name is too long"),
        (tmp_path / "strangers", "not empty and holds no run"),
    ):
        with pytest.raises(UsageError, match=told):
            check({**plain(), "output_dir": str(place)})


# changes of a host of two fledgling parts -> what is said
HOSTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such model": ({"llm": "./nowhere"}, "llm ./nowhere: no such directory"),
    "no such tower": ({"vision": "./nowhere"}, "vision ./nowhere: no such directory"),
    "connector": ({"connector": "mlp3x_gelu"}, "connector: .*3 linear layers"),
    "options": (
        {"connector": "queries", "connector_options": {"width": 9}},
        "connector_options: 8 heads do not divide",
    ),
    "feature layer": ({"feature_layer": 99}, "feature_layer: the tower has hidden states"),
    "a host twice": ({"shared": True}, "shared, .* have no meaning for an image host"),
}


@pytest.mark.parametrize("case", HOSTS)
def test_hosts_that_cannot_be_joined(plain: Plain, case: str) -> None:
    changes, told = HOSTS[case]
    check({**plain(), "host": {"llm": "fledgling", "vision": "fledgling"}})
    with pytest.raises(AlulaError, match=told):
        check({**plain(), "host": {"llm": "fledgling", "vision": "fledgling", **changes}})


def test_a_tower_whose_package_is_not_there(plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CustomTowerConfig(
        source="alula.real.towers:EfficientNetLite", image_size=64, tokens=4, hidden_size=1280, is_grid=True
    )
    CustomTower(config).save_pretrained(tmp_path / "tower")
    recipe = {**plain(), "host": {"llm": "fledgling", "vision": str(tmp_path / "tower")}}
    check(recipe)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(HostError, match="made by a package that is not installed"):
        check(recipe)


@pytest.fixture
def bloom(plain: Plain, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Recipes on a decoder whose layers no graft knows."""
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")

    def make(**stage: Any) -> dict[str, Any]:
        host = {"llm": str(tmp_path / "llm"), "vision": "fledgling"}
        return {**plain(**{"steps": 2, "batch_size": 2, "save_every": 1, **stage}), "host": host}

    return make


@pytest.mark.parametrize("method", ["prefix", "wings", "experts", "mks2"])
def test_methods_that_know_layers_are_refused_before_a_host_of_others_is_built(
    bloom: Plain, tmp_path: Path, method: str
) -> None:
    with pytest.raises(RecipeError, match=r"decoder type 'bloom'\) is not supported: its attention") as caught:
        train(bloom(method=method, train={}), quiet=True)
    assert caught.value.where == "stages.only.method"
    assert "projector, full, lora train any decoder" in str(caught.value.remedy)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert not (tmp_path / "run" / "host").exists()


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("projector", {"projector": 1e-2}),
        ("full", {"llm": 1e-3, "projector": 1e-2}),
        ("lora", {"lora": 1e-2, "projector": 1e-2}),
    ],
)
def test_what_needs_no_layers_trains_any_decoder(
    bloom: Plain, tmp_path: Path, method: str, rates: dict[str, float]
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    raw = bloom(method=method, train=rates, feature_cache={"memory_mb": 8})
    train(raw, quiet=True)
    other = {**raw, "output_dir": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        train(other, callbacks=[Stop()], quiet=True)
    train(other, quiet=True)
    final, again = tmp_path / "run" / "final", tmp_path / "again" / "final"
    assert rows(tmp_path / "run") == rows(tmp_path / "again")
    weights = [load_file(next(folder.glob("*model.safetensors"))) for folder in (final, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    trained = any("lora" in name or "h.0" in name for name in weights[0])
    assert trained
    host = alula.load_model(final)
    result = alula.evaluate(host.model, host.processor, native_tasks(["visual"], n=1), max_new_tokens=2)
    assert len(result.tasks["visual"].items) == 1
    [found] = log_likelihoods(host.model, [([1, 2], [3])], batch_size=1, pad=0)
    with torch.no_grad():
        logits = host.model(input_ids=torch.tensor([[1, 2]])).logits
    assert found == pytest.approx(float(logits[0, -1].log_softmax(-1)[3]), abs=1e-5)


@pytest.mark.parametrize("method", ["full", "wings"])
def test_what_sees_by_cross_attention_is_refused_for_every_method(plain: Plain, tmp_path: Path, method: str) -> None:
    MllamaConfig(text_config={"vocab_size": 64, "pad_token_id": 0}).save_pretrained(tmp_path / "host")
    save_file({}, tmp_path / "host" / "model.safetensors")  # its layers are asked before its weights are read
    raw = plain(method=method, train={})
    with pytest.raises(HostError, match="its layers have cross-attention: what it sees reaches its layers by"):
        check({**raw, "host": {"path": str(tmp_path / "host")}})


def test_probes_of_a_budget_need_layers(bloom: Plain) -> None:
    retention = {"text": {"microworld": "text"}, "pictures": {"microworld": "visual"}, "items": 2}
    with pytest.raises(RecipeError, match=r"probes: .*bloom") as caught:
        check({**bloom(), "retention": retention})
    assert (caught.value.where, caught.value.remedy) == ("retention.probes", "probes: false")
    check({**bloom(), "retention": {"text": retention["text"], "items": 2, "probes": False}})


def test_a_prefix_on_a_host_that_takes_none_is_refused_by_the_check(plain: Plain, tmp_path: Path) -> None:
    zoo.build("qwen2_5_vl").save_pretrained(tmp_path / "host")
    raw = plain(method="prefix", train={"prefix": 1e-3})
    with pytest.raises(HostError, match="M-RoPE"):
        check({**raw, "host": {"path": str(tmp_path / "host")}})


def test_a_host_that_makes_all_logits_is_not_asked_for_some(plain: Plain, tmp_path: Path) -> None:
    media_hosts.video_llama_3().model.save_pretrained(tmp_path / "host")
    with pytest.raises(RecipeError, match=r"^stages\.only\.logits: VideoLlama3\w+ makes logits of all positions"):
        check({**plain(logits="supervised"), "host": {"path": str(tmp_path / "host")}})


PUBLISHED = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- for part in message['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_a_template_that_rewrites_answers_is_refused_by_the_check(
    plain: Plain, host_directory: Path, tmp_path: Path
) -> None:
    """Training would refuse it once the weights are loaded."""
    own = tmp_path / "own"
    shutil.copytree(host_directory, own)
    (own / "chat_template.jinja").write_text("{{ messages[0]['content'] | length }}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^host\.path: .*does not mark what the assistant says") as caught:
        check({**plain(), "host": {"path": str(own)}})
    assert "{% generation %}" in str(caught.value.remedy)
    # one without markers, as published models have, is marked
    (own / "chat_template.jinja").write_text(PUBLISHED, encoding="utf-8")
    check({**plain(), "host": {"path": str(own)}})
    with pytest.raises(RecipeError, match=r"^host\.path: template: mood: .*does not read it"):
        check({**plain(), "template": {"mood": "fine"}})


def test_a_good_recipe_is_read_and_nothing_written(plain: Plain, tmp_path: Path) -> None:
    raw = plain(method="lora", train={}, lora={"rank": 4, "targets": ["q_proj", "down_proj"]})
    assert check(raw) == parse_recipe(raw)
    assert not (tmp_path / "run").exists()


def answered(path: Path, bad: dict[int, Any], count: int) -> dict[str, Any]:
    """A source of so many records, some of which are replaced."""
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "word"}]
    records = [bad.get(n, {"id": f"r{n}", "messages": turns}) for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"jsonl": str(path)}


MUTE = {"id": "mute", "messages": [{"role": "user", "content": "say"}]}
LOST = {
    "id": "lost",
    "messages": [{"role": "user", "content": "<image> say"}, {"role": "assistant", "content": "word"}],
    "images": ["nowhere.png"],
}


def test_bad_records_are_told_with_file_and_line(plain: Plain, tmp_path: Path) -> None:
    """Of the structure and of media; those of the text replay, which holds no pictures, too."""
    good = answered(tmp_path / "good.jsonl", {}, 3)
    bad = answered(tmp_path / "bad.jsonl", {4: MUTE, 7: LOST}, 9)
    check(plain(data={"sources": [good]}))
    told: list[ReadSource] = []
    with pytest.raises(DataError, match=r"^stages\.only\.data\.sources\.1: 2 of 9 cannot be learnt from") as stop:
        check(plain(data={"sources": [good, bad]}), told=told.append)
    assert [(source.size, source.read) for source in told] == [(3, 3)]
    for line, name in ((5, "mute"), (8, "lost")):
        assert re.search(rf"bad\.jsonl:{line}: .*\(record {name}\)", str(stop.value))
    assert "on_bad=skip" in str(stop.value)
    shown = answered(tmp_path / "shown.jsonl", {1: {**LOST, "images": [str(tmp_path / "grey.png")]}}, 2)
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    check(plain(data={"sources": [good, shown]}))
    with pytest.raises(DataError, match=r"text_replay\.sources\.0: 1 of 2 cannot .*\n.*shown\.jsonl:2: .*an image"):
        check(plain(data={"sources": [good], "text_replay": {"ratio": 0.5, "sources": [shown]}}))
    assert not Path(plain()["output_dir"]).exists()


@pytest.mark.parametrize("record", [MUTE, LOST], ids=["mute", "lost"])
@pytest.mark.parametrize("section", ["validation", "retention.text", "retention.pictures"])
def test_bad_records_that_a_run_is_measured_with_are_told(
    plain: Plain, tmp_path: Path, section: str, record: dict[str, Any]
) -> None:
    """By the check with all of them, and by a run before its first step. No stage steps over them or is told to."""
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    shown = {**LOST, "id": "shown", "images": [str(tmp_path / "grey.png")]}
    text = answered(tmp_path / "text.jsonl", {}, 3)
    pictures = answered(tmp_path / "pictures.jsonl", dict.fromkeys(range(3), shown), 3)
    if section == "retention.pictures" and record is MUTE:
        record = {**shown, "messages": shown["messages"][:1]}
    bad = answered(tmp_path / "bad.jsonl", {0: shown, 1: shown} if section == "retention.pictures" else {}, 2)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "bad.jsonl").read_text() + json.dumps(record) + "\n")
    asked = {"retention.text": text, "retention.pictures": pictures, "validation": text}
    told: list[ReadSource] = []
    for each in ({}, {section: bad}):
        named = {**asked, **each}
        raw = {
            **plain(data={"sources": [text]}, on_bad="skip"),
            "validation": {"sources": [named["validation"]], "samples": 3},
            "retention": {"min": 0.5, "text": named["retention.text"], "pictures": named["retention.pictures"]},
        }
        if not each:
            check(raw, told=told.append)
            continue
        text_alone = section == "retention.text" and record is LOST  # which opening it tells
        with pytest.raises(DataError, match="not text alone" if text_alone else rf"^{section}: 1 of 3") as stop:
            check(raw)
        assert "bad.jsonl:3" in str(stop.value)
        assert "on_bad" not in str(stop.value)
        with pytest.raises(DataError, match=r"bad\.jsonl:3") as stop:
            train(raw, quiet=True)
        assert "on_bad" not in str(stop.value)
        assert text_alone or not rows(Path(raw["output_dir"]))
    assert [(source.key, source.read) for source in told[1:]] == [
        ("validation", 3),
        ("retention.text", 3),
        ("retention.pictures", 3),
    ]


def test_questions_to_distill_from_that_are_none_are_told_before_anything_is_written(
    plain: Plain, tmp_path: Path
) -> None:
    """By the check, and by a run before it asks a model."""
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    shown = {**LOST, "id": "shown", "images": [str(tmp_path / "grey.png")]}
    text = answered(tmp_path / "text.jsonl", {1: MUTE}, 3)  # their answers are not looked at
    check(plain(data={"sources": [text]}, on_bad="skip", distill={"prompts": text}))
    for bad, told in (
        (answered(tmp_path / "bad.jsonl", {2: shown}, 3), r"bad\.jsonl:3: is not text alone"),
        ({"jsonl": str(tmp_path / "none.jsonl")}, "cannot be read"),
    ):
        raw = plain(data={"sources": [text]}, distill={"prompts": bad}, on_bad="skip")
        for refused in (check, train):
            with pytest.raises(DataError, match=told) as stop:
                refused(raw)
            assert str(stop.value).startswith("stages.only.distill.prompts") or "none.jsonl" in str(stop.value)
            assert not (Path(raw["output_dir"]) / "recipe.yaml").exists()


def test_bad_records_of_a_stage_that_skips_them_are_told_unless_there_are_no_others(
    plain: Plain, tmp_path: Path
) -> None:
    some, all_of_them = (answered(tmp_path / f"{n}.jsonl", dict.fromkeys(range(n), MUTE), 4) for n in (1, 4))
    told: list[ReadSource] = []
    check(plain(data={"sources": [some, {"microworld": "visual"}]}, on_bad="skip"), told=told.append)
    assert [(source.size, source.read, [bad.line for bad in source.bad]) for source in told] == [
        (4, 4, [1]),
        (None, 0, []),
    ]
    with pytest.raises(DataError, match="4 of 4 cannot be learnt from"):
        check(plain(data={"sources": [all_of_them]}, on_bad="skip"))


def test_records_are_read_evenly_up_to_a_bound_which_is_told(
    plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"

    def said(bad: dict[int, Any], *options: str) -> tuple[int, str]:
        long = answered(tmp_path / "long.jsonl", bad, 12_000)
        stage = plain(data={"sources": [long]})
        file.write_text(yaml.safe_dump({**stage, "stages": [*stage["stages"], {**stage["stages"][0], "name": "more"}]}))
        monkeypatch.setattr(sys, "argv", ["alula", "train", str(file), "--check", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out + printed.err

    code, words = said({})
    assert code == 0
    assert len(re.findall(r"data\.sources\.0: 1,000 of 12,000, spread evenly", words)) == 2
    sources = json.loads(said({}, "--json")[1])["sources"]
    assert [(source["size"], source["read"], source["bad"]) for source in sources] == [(12_000, 1000, [])] * 2
    for place in (0, 11_999):
        code, words = said({place: MUTE})
        assert code == 1
        assert "1 of 1,000 that were read (it holds 12,000)" in words
        assert f"long.jsonl:{place + 1}: " in words
    code, words = said(dict.fromkeys(range(6000, 7000), MUTE))
    assert 70 < int(re.findall(r"(\d+) of 1,000 that were read", words)[0]) < 100
    assert re.search(r"and \d\d more", words)
