"""Method teal: what its stages train, pairs both ways, and what is left behind: an adapter that writes pictures."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile
from transformers import TrainerCallback

import alula
from alula.codes import CodesProcessor, KMeansCodes, VQCodes, VQConfig, load_codes
from alula.data import Collator, open_source
from alula.errors import HostError, RecipeError, UsageError
from alula.hosts import load_host
from alula.loading import load_model
from alula.serving import Conversation
from alula.serving.terminal import Terminal, in_blocks
from alula.training import load_recipe, train
from alula.training.codes import CodesRecipe, fit_codes
from alula.training.methods.teal import Teal, TealSpec, Turning, turned
from tests.training.conftest import MakeRecipe

SOURCE = {"microworld": "caption"}


class Hashes(TrainerCallback):
    """Names of tensors that a stage changed."""

    def __init__(self) -> None:
        self.before: dict[str, str] = {}
        self.changed: list[set[str]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = _hashes(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = _hashes(kwargs["model"])
        self.changed.append({name for name in after if after[name] != self.before[name]})


def _hashes(model: Any) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One to read pictures by, and another to write them."""
    folder = tmp_path_factory.mktemp("codes")
    common: dict[str, Any] = {"source": SOURCE, "items": 24}
    reading = {"encoder": "fledgling", "size": 12, "random": True}
    writing = {"size": 8, "width": 4, "grid": 2, "patch": 20, "hidden": 8, "steps": 5, "batch_size": 4}
    made = fit_codes(CodesRecipe(**common, output_dir=str(folder / "read"), k_means=reading))
    assert isinstance(made, KMeansCodes)
    assert isinstance(fit_codes(CodesRecipe(**common, output_dir=str(folder / "write"), vq=writing)), VQCodes)
    return {"seen": str(folder / "read"), "drawn": str(folder / "write")}


@pytest.fixture(scope="module")
def trained(
    codes: dict[str, str], host_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Hashes]:
    """Both stages, two steps each."""
    run, hashes = tmp_path_factory.mktemp("teal") / "run", Hashes()
    common = {"method": "teal", "data": {"sources": [SOURCE]}, "steps": 2, "batch_size": 4}
    raw = {
        "name": "test",
        "output_dir": str(run),
        "device": "cpu",
        "host": {"path": str(host_directory)},
        "stages": [
            {**common, "name": "align", "train": {"teal.projections": 1e-2}, "teal": {"codes": codes}},
            {**common, "name": "tune", "train": {"teal.projections": 1e-2, "teal.embeddings": 1e-2,
                                                "teal.bias_norm": 1e-2}},
        ],
    }  # fmt: skip
    from alula.training import parse_recipe

    train(parse_recipe(raw), callbacks=[hashes])
    return run, hashes


def test_each_stage_trains_what_it_says(trained: tuple[Path, Hashes]) -> None:
    _, hashes = trained
    align, tune = hashes.changed
    of_codes = {f"{name}.{part}" for name in ("seen", "drawn") for part in ("inward", "outward")}
    assert {".".join(name.split(".")[-2:]) for name in align} <= of_codes
    assert {name.split(".")[-1] for name in align} == {"inward", "outward"}
    assert all(".alula.teal." in name for name in tune)
    kinds = {name.split(".alula.teal.")[1].split(".")[0] for name in tune}
    assert kinds == {"seen", "drawn", "scales", "biases", "gains"}


def test_the_adapter_comes_back_with_its_codes(trained: tuple[Path, Hashes], codes: dict[str, str]) -> None:
    run, _ = trained
    model, processor = load_model(run / "final")
    assert isinstance(processor, CodesProcessor)
    assert list(processor.codes) == ["seen", "drawn"]
    graft: Any = alula.grafts_of(model)["teal"]
    assert graft.vocabulary == processor.vocabulary
    assert processor.codes["drawn"].fingerprint() == load_codes(codes["drawn"]).fingerprint()
    sample = open_source(SOURCE)[0]
    batch = Collator(processor)([sample])
    ids = batch["input_ids"][0]
    (found,) = processor.vocabulary.found(ids.tolist())
    picture = sample.images[0].load()
    assert (found.name, found.codes.tolist()) == ("seen", processor.codes["seen"].encode([picture])[0].tolist())
    assert not graft.vocabulary.is_code(batch["labels"].clamp_min(0)).any()
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == graft.vocabulary.size
    assert len(processor.tokenizer) == graft.vocabulary.size


def test_a_stage_goes_on_with_the_codes_of_the_stage_before_alone(
    trained: tuple[Path, Hashes], codes: dict[str, str], host_directory: Path
) -> None:
    changed = VQCodes(VQConfig(size=8, width=4, grid=2, patch=20, hidden=8), seed=1)
    folder = changed.save(trained[0].parent / "others")
    host = load_host(host_directory)
    settings = TealSpec(codes={**codes, "drawn": str(folder)})
    given: dict[str, Any] = {"base": str(host_directory), "train_projector": False, "seed": 0}
    with pytest.raises(RecipeError, match="'drawn' are not those that the stage before"):
        Teal().put_on(host, settings, previous=trained[0] / "final", **given)


def test_a_pair_turned_round_is_learnt_as_codes(trained: tuple[Path, Hashes]) -> None:
    _, processor = load_model(trained[0] / "final")
    sample = open_source(SOURCE)[0]
    other = turned(sample, processor)
    assert other is not None
    batch = Collator(processor)([other])
    learnt = batch["labels"][0][batch["labels"][0] != -100].tolist()
    (found,) = processor.vocabulary.found(learnt)
    drawn = processor.vocabulary["drawn"]
    assert found.name == "drawn"
    assert found.complete
    assert learnt[: drawn.length] == drawn.ids(found.codes.tolist())
    assert found.codes.tolist() == processor.codes["drawn"].encode([sample.images[0].load()])[0].tolist()
    assert turned(other, processor) is None
    silent = replace(sample, messages=[sample.messages[0], {**sample.messages[1], "train": False}])
    assert turned(silent, processor) is None
    typed = {"role": "user", "content": [{"type": "text", "text": "<drawn:3> </drawn>"}]}
    (ids,) = processor.apply_chat_template([[typed]], tokenize=True, return_dict=True)["input_ids"]
    assert processor.vocabulary.found(ids) == []  # letters that people type are letters


@pytest.mark.parametrize("name", ["image", "image_token", "end"])
def test_codes_are_learnt_where_they_are_written_whatever_their_name(
    name: str, codes: dict[str, str], host_directory: Path
) -> None:
    host = load_host(host_directory)  # its placeholder is <image>, which texts may hold as a word
    text = host.model.get_input_embeddings().weight.shape[0]
    processor = CodesProcessor.over(host.processor, text, {name: load_codes(codes["drawn"])})
    other = turned(open_source(SOURCE)[0], processor)
    assert other is not None
    asked = Collator(processor, train=False)([replace(other, messages=other.messages[:1])])["input_ids"][0].tolist()
    whole = Collator(processor)([other])["input_ids"][0].tolist()
    its = processor.vocabulary[name]
    assert whole[: len(asked)] == asked
    assert whole[len(asked)] == its.begin  # nothing stands between a prompt and what `generate` has come at once
    assert whole[len(asked) + its.length - 1] == its.end


def test_chat_draws_and_saves(
    trained: tuple[Path, Hashes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = load_model(trained[0] / "final")
    talk = Conversation(model, processor, max_new_tokens=4)
    terminal = Terminal(talk, interactive=True)
    for line in ("/draw a red circle", "/draw a blue ring", "what is it?"):
        terminal._line(line)
    assert Image.open("drawn-1.png").size == Image.open("drawn-2.png").size == (40, 40)
    assert "\u2580" in capsys.readouterr().out
    assert talk.messages[1]["role"] == "assistant"
    with pytest.raises(HostError, match="writes no audio clips"):
        terminal._line("/play a violin")
    plain = Conversation(*alula.build_host("fledgling", "fledgling"), max_new_tokens=4)
    with pytest.raises(HostError, match="writes no images"):
        plain.written_by("image")


def test_chat_saves_what_it_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    host = alula.build_host("fledgling", "fledgling", audio="fledgling")
    config = VQConfig(kind="audio", size=4, width=2, hidden=8, samples=1024, hop=64, bands=16, spectra=4, places=True)
    codes = {"sounded": VQCodes(config, seed=0).eval()}
    alula.attach(host.model, alula.TealConfig.of(codes))
    processor = CodesProcessor.over(host.processor, host.model.get_input_embeddings().weight.shape[0], codes)
    terminal = Terminal(Conversation(host.model, processor, max_new_tokens=3), interactive=False)
    terminal._line("/play a low violin")
    rate, wave = wavfile.read("sounded-1.wav")
    assert (rate, wave.shape, wave.dtype) == (16000, (1024,), np.int16)


def test_pairs_of_captions_alone_are_turned_round(trained: tuple[Path, Hashes]) -> None:
    _, processor = load_model(trained[0] / "final")
    turning = Turning(processor, 1.0, 0, ["microworld-caption"])
    caption, question = (replace(open_source({"microworld": name})[0], position=0) for name in ("caption", "visual"))
    assert turning.shown(question) is question
    assert turning.shown(caption) is not caption
    with pytest.raises(RecipeError, match="no source is called 'captions'"):
        Teal().check_sources(TealSpec(captions=["captions"]), ["microworld-caption"])
    with pytest.raises(UsageError, match="nothing is turned round"):
        TealSpec(captions=["a"], write=0)


def test_pictures_in_a_terminal_are_two_pixels_a_character() -> None:
    shown = in_blocks(Image.fromarray(np.array([[[255, 0, 0]], [[0, 0, 255]], [[1, 2, 3]]], dtype=np.uint8)))
    assert shown == "\x1b[38;2;255;0;0;48;2;0;0;255m\u2580\x1b[0m\n\x1b[38;2;1;2;3;48;2;1;2;3m\u2580\x1b[0m\n"


def test_recipes_that_make_no_sense_are_refused(recipe: MakeRecipe, codes: dict[str, str], tmp_path: Path) -> None:
    data = {"sources": [SOURCE]}
    with pytest.raises(RecipeError, match="does nothing"):
        recipe(method="teal", train={"teal.bias_norm": 1e-3, "teal.projections": 1e-3}, data=data,
               teal={"codes": codes, "bias_norm": False})  # fmt: skip
    with pytest.raises(RecipeError, match=r"no codes_config\.json"):
        train(recipe(method="teal", train={}, data=data, teal={"codes": {"image": str(tmp_path)}}))
    with pytest.raises(RecipeError, match="no codes are named"):
        train(recipe(method="teal", train={}, data=data))


def test_shipped_recipes_are_runnable() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    assert [stage.method for stage in load_recipe(recipes / "teal.yaml").stages] == ["teal", "teal"]
    from alula.training.codes import load_codes_recipe

    assert load_codes_recipe(recipes / "codes.yaml").vq is not None
