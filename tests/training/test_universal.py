"""Progressive alignment: a stage trains the media it names and nothing else, and experts are grown from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alula.errors import AlulaError, RecipeError, UsageError
from alula.hosts import build_host, load_host, save_host
from alula.hosts.universal import grow_experts
from alula.training import load_recipe, parse_recipe, train
from alula.training.datasets import open_data
from tests.hosts import tiny
from tests.hosts.universal.making import PROJECTION
from tests.training.test_connectors import changed

SOURCES = {
    "image": {"microworld": "caption"},
    "video": {"microworld": "film_caption"},
    "audio": {"microworld": "sound_caption"},
}
MEDIA = ("image", "video", "audio", "response")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = build_host(
        tiny.decoder("llama", tied=True), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer(), encoder="universal",
        modalities=MEDIA, connector_options={**PROJECTION, "experts": 1},
        modality_options={"audio": {"bins": 32, "moments": 128}, "video": {"frames": 2}, "response": {"voxels": 9}},
    )  # fmt: skip
    return save_host(host, tmp_path_factory.mktemp("hosts") / "host")


def recipe(source: Path, directory: Path, *stages: dict[str, Any]) -> Any:
    common = {"method": "universal", "steps": 2, "batch_size": 6, "schedule": {"kind": "constant", "warmup": 0}}
    named = [{"name": f"s{number}", **common, **stage} for number, stage in enumerate(stages)]
    return parse_recipe(
        {"name": "t", "output_dir": str(directory), "device": "cpu", "host": {"path": str(source)}, "stages": named}
    )


def aligning(*media: str, **settings: Any) -> dict[str, Any]:
    return {
        "universal": {"media": list(media), **settings},
        "train": {"projector": 1e-2},
        "data": {"sources": [SOURCES[medium] for medium in media]},
    }


def test_stages_train_exactly_what_they_say(source: Path, tmp_path: Path) -> None:
    instruct = {"method": "full", "train": {"llm": 1e-3}, "data": {"sources": list(SOURCES.values())}}
    stages = [aligning("image"), {**aligning("image", "video", "audio", experts=3), "batch_size": 12}, instruct]
    result = train(recipe(source, tmp_path / "run", *stages), quiet=True)
    first, second, third = (stage.model for stage in result.stages)
    assert changed(source, first) == {"image", "shared"}
    grown: Any = load_host(second).model
    assert grown.config.projection_shape.experts == 3
    before, after = load_host(first).model.state_dict(), grown.state_dict()
    prefix = "model.multi_modal_projector."
    learnt = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.removeprefix(prefix).split(".")[0] for name in learnt} == {"image", "video", "audio", "shared"}
    assert all(name.startswith(prefix) for name in learnt)
    added = {name.removeprefix(prefix) for name in after.keys() - before.keys()}
    assert {name.split(".")[0] for name in added} == {"image", "video", "audio", "response", "shared"}
    assert all(name.startswith("shared.") or ".router." in name for name in added)
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in changed(second, third))
    assert changed(second, third) >= {"model.language_model.layers.0.mlp.down_proj.weight"}


def test_a_stage_that_grows_resumes_where_it_was(source: Path, tmp_path: Path) -> None:
    """What no checkpoint holds, the routers of media that are not trained, is drawn alike again."""
    stage = {**aligning("image", "audio", experts=2, start="random"), "save_every": 1}
    straight = train(recipe(source, tmp_path / "a", stage), quiet=True).final
    run = recipe(source, tmp_path / "b", {**stage, "steps": 2})
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[_StopAfter(1)], quiet=True)
    resumed = train(run, quiet=True).final
    assert changed(straight, resumed) == set()


class _StopAfter:
    """Ends a session behind a step, as a person does."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    raise KeyboardInterrupt

        return Stop()


@torch.no_grad()
def test_copied_experts_compute_what_one_did(source: Path) -> None:
    grown, one = load_host(source).model, load_host(source).model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(list(one.get_image_features(pixels).pooler_output))
    grow_experts(grown, 3, seed=4)
    torch.testing.assert_close(
        torch.stack(list(grown.get_image_features(pixels).pooler_output)), expected, atol=1e-5, rtol=1e-5
    )
    other: Any = load_host(source).model
    grow_experts(other, 3, start="random", seed=4)
    assert not torch.allclose(torch.stack(list(other.get_image_features(pixels).pooler_output)), expected, atol=1e-2)
    for model, settings, message in (
        (grown, {"experts": 3}, "has 3 experts already"),
        (one, {"experts": 1}, "no more than there are"),
        (one, {"experts": 2, "start": "cold"}, "no start is called 'cold'"),
        (tiny.decoder("llama"), {"experts": 2}, "has no experts to grow"),
    ):
        with pytest.raises(UsageError, match=message):
            grow_experts(model, **settings)


def test_peft_trains_the_projection_and_gives_it_back(source: Path, tmp_path: Path) -> None:
    stage = {
        "method": "lora", "train": {"lora": 1e-3, "projector": 1e-2},
        "data": {"sources": [SOURCES["image"], SOURCES["audio"]]},
    }  # fmt: skip
    final = train(recipe(source, tmp_path / "run", stage), quiet=True).final
    kept = {name for name in load_file(final / "adapter_model.safetensors") if "projector" in name}
    assert len(kept) == sum("projector" in name for name in load_host(source).model.state_dict())


def test_wrong_stages_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AlulaError, match="reads no 'smell'"):
        recipe(source, tmp_path, aligning("image") | {"universal": {"media": ["smell"]}})
    with pytest.raises(RecipeError, match=r"takes image, video, audio, response, not points"):
        train(recipe(source, tmp_path / "a", aligning("image") | {"universal": {"media": ["points"]}}), quiet=True)
    plain = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    stock = save_host(plain, tmp_path / "stock")
    with pytest.raises(RecipeError, match="has no universal encoder"):
        train(recipe(stock, tmp_path / "b", aligning("image")), quiet=True)


@pytest.mark.parametrize("name", ["universal", "onellm-7b"])
def test_the_shipped_recipes_replay_earlier_media_evenly(name: str) -> None:
    shipped = load_recipe(f"recipes/{name}.yaml")
    aligned: set[str] = set()
    *alignment, instruction = shipped.stages
    for stage in alignment:
        media = set(stage.settings.media)
        assert media > aligned
        aligned = media
        assert set(stage.learning_rates) == {"connector.shared", *(f"connector.{medium}" for medium in media)}
        assert len(stage.data.sources) == len(media)
        assert len({source.weight for source in stage.data.sources}) == 1
        if name == "universal":
            mixture = open_data(stage.data, seed=0)
            kinds = [sample.media()[0].noun for sample in (mixture[place] for place in range(256))]
            counts = [kinds.count(kind) for kind in set(kinds)]
            assert len(counts) == len(media)
            assert max(counts) - min(counts) <= 1
    assert aligned == set(shipped.host.modalities or ())
    assert [stage.settings.experts for stage in alignment][:2] == [None, 3]
    assert set(instruction.learning_rates) == {"llm"}
