"""load_host, save_host, describe: strict about what is there, clear about what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import alula
from alula.errors import AlulaError, HostError, UsageError
from alula.hosts import Host, build_host, describe, load_host, save_host
from tests.hosts import tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "host"
    tower = tiny.TOWERS["clip"][0]
    save_host(build_host(tiny.decoder("llama", tied=True), tower, tokenizer=tiny.tokenizer()), folder)
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "host")
    return tmp_path / "host"


def test_a_round_trip_changes_nothing(good: Path, tmp_path: Path) -> None:
    first = load_host(good)
    save_host(first, tmp_path / "again")
    second = load_host(str(tmp_path / "again"))
    assert not second.model.training
    state = second.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())
    for name in ("config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (good / name).read_bytes()


def test_a_loaded_processor_marks_what_the_assistant_said(good: Path) -> None:
    """transformers asks the tokenizer for its backend, which loading must not overwrite with the image processor's."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "first"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "second"}]},
    ]
    for host in (load_host(good), load_host(good)):
        host.processor.save_pretrained(good)  # a second round trip must not carry the mistake along either
        marks = host.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        assert sum(marks[0] if isinstance(marks[0], list) else marks) > 0


def test_weights_are_loaded_by_several_threads_as_by_one(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users load them: all other tests load by one thread (see conftest)."""
    by_one = load_host(good).model.state_dict()
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    by_several = load_host(good).model.state_dict()
    assert by_one.keys() == by_several.keys()
    assert all(torch.equal(weight, by_several[name]) for name, weight in by_one.items())


def test_dtype_is_a_choice(good: Path) -> None:
    assert load_host(good).model.dtype == torch.float32
    assert load_host(good, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_saving_replaces_a_host_only_when_complete(copy: Path) -> None:
    before = sorted(path.name for path in copy.iterdir())
    host = load_host(copy)

    class Unsaveable:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_host(Host(host.model, Unsaveable()), copy)  # type: ignore[arg-type]
    assert sorted(path.name for path in copy.iterdir()) == before
    assert [path.name for path in copy.parent.iterdir()] == ["host"]


def test_nothing_is_saved_over_what_is_no_model(good: Path, tmp_path: Path) -> None:
    host = load_host(good)
    for name, write in {
        "host": lambda where: save_host(host, where),
        "adapter": lambda where: alula.save_adapter(host.model, where, base=good),
    }.items():
        mine = tmp_path / name
        mine.mkdir()
        if name == "adapter":
            alula.attach(host.model, alula.WingsConfig(rank=2))
        write(mine)  # an empty directory holds nothing
        write(mine)  # a model is replaced
        for file in mine.iterdir():
            file.unlink()
        (mine / "diary.txt").write_text("mine")
        with pytest.raises(UsageError, match="other things than a model"):
            write(mine)
        assert [file.name for file in mine.iterdir()] == ["diary.txt"]


def test_nothing_is_saved_over_another_model(good: Path, copy: Path, tmp_path: Path) -> None:
    """An earlier state of the same host is replaced; another host, a bare LLM and an adapter are not."""
    host = load_host(copy)
    with torch.no_grad():
        next(host.model.parameters()).add_(1.0)
    save_host(host, copy)
    assert torch.equal(next(load_host(copy).model.parameters()), next(host.model.parameters()))
    wide = tiny.decoder("llama", tied=True, intermediate_size=96)
    other = build_host(wide, tiny.TOWERS["clip"][0], tokenizer=tiny.tokenizer())
    wide.save_pretrained(tmp_path / "llm")
    alula.attach(host.model, alula.WingsConfig(rank=2))
    alula.save_adapter(host.model, tmp_path / "adapter", base=good)
    for name, told in {
        "host": r"host: holds another host.*text_config\.intermediate_size is 48, .* 96\n.*overwrite=True",
        "llm": r"llm: holds another host.*architectures is \['LlamaForCausalLM'\].*LlavaForConditionalGeneration",
        "adapter": r"adapter: holds an adapter",
    }.items():
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(UsageError, match=told):
            save_host(other, tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
        save_host(other, tmp_path / name, overwrite=True)
        assert load_host(tmp_path / name).model.config.text_config.intermediate_size == 96
    with pytest.raises(UsageError, match="holds a whole model"):
        alula.save_adapter(host.model, copy, base=copy)
    assert load_host(copy).model.config.text_config.intermediate_size == 96


def test_broken_directories_name_the_file(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()

    def refused(reason: str) -> None:
        with pytest.raises(HostError, match=reason):
            load_host(copy)

    weights.write_bytes(whole[: len(whole) // 2])
    refused(r"model\.safetensors: the weights cannot be read")
    weights.write_bytes(b"")
    refused(r"model\.safetensors: the weights cannot be read")
    weights.unlink()
    (copy / "training_args.bin").write_bytes(b"a Trainer's, and no weights")
    refused("holds no weights")
    weights.symlink_to(copy / "gone")
    refused(r"model\.safetensors: is a link that leads nowhere")
    weights.unlink()

    weights.write_bytes(whole)
    state = load_file(weights)
    gone = "model.multi_modal_projector.linear_2.weight"
    save_file({key: value for key, value in state.items() if key != gone}, weights, {"format": "pt"})
    refused(f"lack 1 parameters, the first '{gone}'")
    save_file({**state, gone: torch.zeros(3, 3)}, weights, {"format": "pt"})
    refused("shape|cannot be loaded")
    weights.write_bytes(whole)

    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"model-00001-of-00002\.safetensors: a shard that the index names is missing")
    (copy / "model.safetensors.index.json").unlink()

    for name in ("processor_config.json", "tokenizer.json", "config.json"):
        kept = (copy / name).read_text()
        (copy / name).write_text(kept[:20])
        refused(f"{name}: is not readable JSON")
        (copy / name).unlink()
        refused("processor" if name != "config.json" else r"no config\.json")
        (copy / name).write_text(kept)
    load_host(copy)


def _fields(config: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from _fields(value, (*before, name))


@pytest.mark.parametrize("value", ["x", {"a": 1}, None])
def test_values_of_other_types_are_named(copy: Path, value: Any) -> None:
    """Every third field of the whole configuration; either the host does without, or it is told which one it is."""
    whole = (copy / "config.json").read_text()
    told: list[tuple[str, str]] = []
    for path in list(_fields(json.loads(whole)))[::3]:
        config = json.loads(whole)
        part = config
        for name in path[:-1]:
            part = part[name]
        if type(part[path[-1]]) is type(value):
            continue
        part[path[-1]] = value
        (copy / "config.json").write_text(json.dumps(config))
        try:
            load_host(copy)
        except HostError as error:
            told.append((path[-1], str(error)))
    assert len(told) > 5
    assert [(name, text) for name, text in told if name not in text] == []


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("processor_config", "image_token"),
        ("tokenizer_config", "model_max_length"),
        ("generation_config", "pad_token_id"),
    ],
)
def test_other_files_with_values_of_other_types_are_named(copy: Path, file: str, field: str) -> None:
    path = copy / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: {"a": 1}}))
    with pytest.raises(HostError, match=rf"{file}\.json"):
        load_host(copy)


def test_a_part_that_is_null_is_not_the_default_of_its_class(copy: Path) -> None:
    """transformers would make a decoder of seven billion random parameters first."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "text_config": None}))
    for load in (load_host, alula.load_model):
        with pytest.raises(HostError, match="text_config is null"):
            load(copy)


def test_what_is_no_host_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no such directory"):
        load_host(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="is a file"):
        load_host(tmp_path / "file")
    tiny.decoder("llama").save_pretrained(tmp_path / "llm")
    with pytest.raises(HostError, match=r"takes no images.*\n.*build_host"):
        load_host(tmp_path / "llm")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(HostError, match=r"alula\.load_model"):
        load_host(tmp_path / "adapter")


def test_a_host_is_no_language_model(good: Path) -> None:
    with pytest.raises(AlulaError, match="already takes images"):
        build_host(good, tiny.TOWERS["clip"][0])


def test_a_description_counts_every_parameter_once(good: Path) -> None:
    host = load_host(good)
    host.model.model.vision_tower.requires_grad_(False)
    told = describe(host)
    assert told.parameters == host.model.num_parameters()
    assert {part.name: part.trainable == part.parameters for part in told.parts} == {
        "vision_tower": False,
        "multi_modal_projector": True,
        "language_model": True,
        "lm_head": True,
    }
    assert (told.tokens_per_image, told.image_size, told.tied, told.dtype) == (16, 32, True, "float32")
    assert json.loads(json.dumps(told.as_dict()))["parameters"] == told.parameters
    assert f"{told.parameters:,}" in str(told)


def test_other_hosts_can_be_described() -> None:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config={**tiny.GROUPED, "vocab_size": 99}, vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration(config)
    told = describe(Host(model, None))  # type: ignore[arg-type]  # its processor needs a hub's files and is not read
    assert [part.name for part in told.parts] == ["visual", "language_model", "lm_head"]
    assert told.parameters == model.num_parameters()
    assert told.tokens_per_image is None
    assert "depends on the image" in str(told)
