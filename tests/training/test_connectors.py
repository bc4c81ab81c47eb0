"""Recipes over films and sounds: the named connector learns and nothing else, cached or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alula
from alula.anatomy import Anatomy
from alula.errors import HostError, RecipeError
from alula.hosts import build_host, load_host, save_host
from alula.training import Recipe, parse_recipe, train
from tests.hosts import tiny
from tests.hosts.test_multimodal import EARS_FOR_MICROWORLD, SMALL
from tests.training.conftest import LastModel, batch_of, rows

FILM, SOUND, TEXT = {"microworld": "film"}, {"microworld": "sound_caption"}, {"microworld": "text"}


@pytest.fixture(scope="module", params=["queries", "mlp2x_gelu"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = SMALL if request.param == "queries" else None
    host = build_host(
        tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], request.param, tokenizer=tiny.tokenizer(),
        audio=EARS_FOR_MICROWORLD, video=True, connector_options=options,
    )  # fmt: skip
    return save_host(host, tmp_path_factory.mktemp("hosts") / "host")


def recipe(source: Path, directory: Path, *stages: dict) -> Recipe:
    common = {"method": "projector", "steps": 3, "batch_size": 6, "schedule": {"kind": "constant", "warmup": 0}}
    named = [{"name": f"s{number}", **common, **stage} for number, stage in enumerate(stages)]
    raw = {"name": "t", "output_dir": str(directory), "device": "cpu", "host": {"path": str(source)}, "stages": named}
    return parse_recipe(raw)


def changed(before: Path, after: Path) -> set[str]:
    """Names of the connectors, and anything else by its full name, whose weights differ."""
    old, new = load_host(before).model.state_dict(), load_host(after).model.state_dict()
    prefix = "model.multi_modal_projector."
    names = {name for name in old if not torch.equal(old[name], new[name])}
    return {name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else name for name in names}


def test_single_task_stages_train_one_connector_each(source: Path, tmp_path: Path) -> None:
    result = train(
        recipe(
            source,
            tmp_path / "run",
            {"train": {"connector.video": 1e-2}, "data": {"sources": [FILM]}},
            {"train": {"connector.audio": 1e-2}, "data": {"sources": [SOUND]}},
        ),
        quiet=True,
    )
    first, second = (stage.model for stage in result.stages)
    assert changed(source, first) == {"video"}
    assert changed(first, second) == {"audio"}


def test_all_connectors_learn_from_a_mixture_with_text(source: Path, tmp_path: Path) -> None:
    replay = {"ratio": 0.3, "sources": [TEXT]}
    sources = [FILM, SOUND, {"microworld": "visual"}]
    stage = {"train": {"projector": 1e-2}, "data": {"sources": sources, "text_replay": replay}, "steps": 4}
    result = train(recipe(source, tmp_path / "run", stage), quiet=True)
    assert changed(source, result.final) == {"image", "video", "audio"}


def test_cached_features_train_alike(source: Path, tmp_path: Path) -> None:
    data = {"sources": [{**FILM, "limit": 4}, {**SOUND, "limit": 4}]}
    curves = []
    for number, cache in enumerate((None, {"memory_mb": 64, "disk": str(tmp_path / "features")})):
        stage = {"train": {"projector": 1e-2}, "data": data, "feature_cache": cache}
        train(recipe(source, tmp_path / f"run{number}", stage), quiet=True)
        curves.append([row["loss"] for row in rows(tmp_path / f"run{number}")])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert len(list((tmp_path / "features").iterdir())) == 2  # one folder per tower


def test_a_shared_connector_is_one_part(tmp_path: Path) -> None:
    host = build_host(
        tiny.decoder("llama"), tiny.TOWERS["siglip"][0], "queries", tokenizer=tiny.tokenizer(),
        audio=EARS_FOR_MICROWORLD, video=True, connector_options=SMALL, shared=True,
    )  # fmt: skip
    source = save_host(host, tmp_path / "host")
    stage = {"train": {"connector.shared": 1e-2}, "data": {"sources": [FILM, SOUND]}}
    result = train(recipe(source, tmp_path / "run", stage), quiet=True)
    assert changed(source, result.final) == {"shared"}
    wrong = {"train": {"connector.audio": 1e-2}, "data": {"sources": [SOUND]}}
    with pytest.raises(RecipeError, match=r"`connector\.audio` matches no parameter"):
        train(recipe(source, tmp_path / "other", wrong), quiet=True)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_peft_methods_train_connectors_and_give_them_back(source: Path, tmp_path: Path, method: str) -> None:
    """Vectors per frame and learned queries too, which are bare parameters."""
    stage = {"method": method, "train": {method: 1e-3, "projector": 1e-2}, "data": {"sources": [FILM, SOUND]}}
    made = recipe(source, tmp_path / "run", stage)
    seen = LastModel(batch_of(made, 5))
    final = train(made, callbacks=[seen], quiet=True).final
    before = {name for name in load_host(source).model.state_dict() if "multi_modal_projector" in name}
    kept = {
        name[name.index("model.multi_modal") :]
        for name in load_file(final / "adapter_model.safetensors")
        if "projector" in name
    }
    assert kept == before
    with torch.no_grad():
        told = alula.load_model(final).model(**seen.batch).logits
    # where weights lie in memory moves the last bits of attention on some processors
    torch.testing.assert_close(told, seen.logits, atol=1e-4, rtol=1e-4)


def test_every_method_trains_gemma3s_projector_and_gives_it_back(tmp_path: Path) -> None:
    """It is a bare parameter, which PEFT's own "all-linear" leaves out; a prefix is refused."""
    source = save_host(tiny.gemma3_host(), tmp_path / "host")
    data = {"sources": [{"microworld": "visual"}]}
    weight = "mm_input_projection_weight"
    before = load_host(source).model.get_parameter(f"model.multi_modal_projector.{weight}")
    for method, part in (
        ("projector", {}),
        ("full", {"llm": 1e-3}),
        ("lora", {"lora": 1e-3}),
        ("wings", {"wings": 1e-3}),
    ):
        made = recipe(source, tmp_path / method, {"method": method, "train": {"projector": 1e-2, **part}, "data": data})
        seen = LastModel(batch_of(made, 5))
        model = alula.load_model(train(made, callbacks=[seen], quiet=True).final).model
        after = {name.split(".")[-1]: p for name, p in model.named_parameters() if "original_module" not in name}
        assert not torch.equal(after[weight], before), method
        with torch.no_grad():
            assert torch.equal(model(**seen.batch).logits, seen.logits), method
    only_lora = recipe(source, tmp_path / "only", {"method": "lora", "train": {"lora": 1e-3}, "data": data})
    model = alula.load_model(train(only_lora, quiet=True).final).model
    assert torch.equal(Anatomy.of(model).projector.mm_input_projection_weight, before)
    prefix = recipe(source, tmp_path / "prefix", {"method": "prefix", "train": {"prefix": 1e-3}, "data": data})
    with pytest.raises(HostError, match="token_type_ids"):
        train(prefix, quiet=True)


def test_recipes_say_what_a_host_is_made_of() -> None:
    stage = {"name": "a", "method": "projector", "steps": 1, "data": {"sources": [FILM]}}
    host = {"llm": "fledgling", "vision": "fledgling", "audio": "fledgling", "video": True, "connector": "queries"}
    made = parse_recipe({"name": "t", "output_dir": "o", "host": host, "stages": [stage]})
    assert made.stages[0].learning_rates == {"projector": 1e-3}
    with pytest.raises(RecipeError, match="takes a finished host as it is"):
        parse_recipe({"name": "t", "output_dir": "o", "host": {"path": "x", "video": True}, "stages": [stage]})
