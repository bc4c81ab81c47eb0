"""What a stage computes: loss, gradients, learning rates, precision, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, TrainerCallback

import alula
from alula.anatomy import Anatomy
from alula.data import Collator
from alula.data.records import RecordFile
from alula.errors import AlulaError, DataError, RecipeError, UsageError
from alula.hosts import build_host, load_host, save_host
from alula.seam.dialect import cache_of
from alula.training import check, train
from alula.training.datasets import open_data
from alula_fledgling.microworld import export_jsonl, text_items, visual_items
from tests.data.test_collate import LLAVA_TEMPLATE
from tests.hosts import tiny
from tests.training.conftest import LastModel, MakeRecipe, batch_of, rows

UNEVEN = {
    "sources": [{"microworld": "caption"}, {"microworld": "visual"}],
    "text_replay": {"ratio": 0.4, "sources": [{"microworld": "text"}]},
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(next(directory.glob("*model.safetensors")))


def big_batch_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_accumulated_loss_and_gradients_are_the_big_batchs(recipe: MakeRecipe, micro: int) -> None:
    """Micro-batches with very different numbers of supervised tokens, against one batch through plain torch."""
    made = recipe(
        method="full",
        train={"llm": 1e-2, "projector": 1e-2},
        data=UNEVEN,
        batch_size=8,
        micro_batch_size=micro,
        steps=1,
        clip=None,
        schedule={"kind": "constant", "warmup": 0},
    )
    batch = batch_of(made, 0)
    spread = (batch["labels"] != -100).sum(dim=1)
    assert spread.max() >= 5 * spread.min()
    model = load_host(made.host.path or "").model
    loss = big_batch_loss(model, batch)
    loss.backward()
    trained = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained]))
    seen = _Gradients()
    train(made, callbacks=[seen], quiet=True)
    row = rows(Path(made.output_dir))[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    own = dict(model.named_parameters())
    assert seen.gradients.keys() == {name for name in own if "vision_tower" not in name}
    for name, gradient in seen.gradients.items():
        torch.testing.assert_close(gradient, own[name].grad, rtol=1e-4, atol=1e-7)


def test_a_stock_template_without_a_stop_token_still_teaches_to_stop(
    recipe: MakeRecipe, host_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = load_host(host_directory)
    made.processor.chat_template = LLAVA_TEMPLATE
    path = str(save_host(made, tmp_path / "llava"))
    run = recipe({"host": {"path": path}}, method="full", train={"llm": 1e-3, "projector": 1e-3}, steps=1, clip=None)
    batch = batch_of(run, 0)
    stop = made.processor.tokenizer.eos_token_id
    assert (batch["labels"] == stop).any(dim=1).all()
    loss = big_batch_loss(load_host(run.host.path or "").model, batch)
    caplog.clear()
    train(run, quiet=True)
    assert rows(Path(run.output_dir))[0]["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert "ends answers with no stop token" in caplog.text


class _Gradients(TrainerCallback):
    """Copies the gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            named = kwargs["model"].named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.requires_grad}


class _Kernels(TrainerCallback):
    """Notes whether optimizers are fused."""

    def __init__(self) -> None:
        self.fused: set[Any] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fused = {group["fused"] for group in kwargs["optimizer"].param_groups}


def test_the_optimizer_step_is_adamw_with_one_rate_per_part(recipe: MakeRecipe) -> None:
    """Three steps against torch's AdamW run by hand, with decay on matrices only."""
    rates = {"llm": 3e-3, "projector": 2e-2}
    made = recipe(
        method="full",
        train=rates,
        data=UNEVEN,
        weight_decay=0.1,
        clip=0.5,
        schedule={"kind": "linear", "warmup": 2},
    )
    seen = _Kernels()
    result = train(made, callbacks=[seen], quiet=True)
    assert seen.fused == {True}  # one kernel a parameter: six times as fast on a CPU
    model = load_host(made.host.path or "").model
    groups = []
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(False)
            continue
        part = "projector" if "projector" in name else "llm"
        decay = 0.1 if parameter.ndim == 2 else 0.0
        groups.append({"params": [parameter], "peak": rates[part], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for step, factor in enumerate((0.0, 0.5, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        loss = big_batch_loss(model, batch_of(made, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        row = rows(result.directory)[step]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["lr"] == pytest.approx({part: rate * factor for part, rate in rates.items()})
    for name, value in AutoModelForImageTextToText.from_pretrained(result.final).named_parameters():
        torch.testing.assert_close(value, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-6)


def test_weights_with_gaps_between_their_rows_are_trained_as_others(recipe: MakeRecipe, tmp_path: Path) -> None:
    """An old file of weights keeps views as views, and they stay that when they are loaded."""
    made = recipe(method="full", train={"llm": 1e-2, "projector": 1e-2})
    plain = weights(train(made, quiet=True).final)
    host = copytree(made.host.path or "", tmp_path / "old")
    state = load_file(host / "model.safetensors")
    gaps = {n: torch.cat([w, w], dim=1)[:, : w.shape[1]] for n, w in state.items() if n.endswith("q_proj.weight")}
    torch.save({**state, **gaps}, host / "pytorch_model.bin")
    (host / "model.safetensors").unlink()
    loaded = dict(load_host(host).model.named_parameters())
    assert {name for name, weight in loaded.items() if not weight.is_contiguous()} == set(gaps)
    old = made.model_copy(
        update={"host": made.host.model_copy(update={"path": str(host)}), "output_dir": str(tmp_path / "run-old")}
    )
    found = weights(train(old, quiet=True).final)
    assert found.keys() == plain.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


METHODS: dict[str, dict[str, Any]] = {
    "projector": {"train": {"projector": 1e-2}},
    "full": {"train": {"llm": 1e-3, "projector": 1e-2, "tower": 1e-3}},
    "lora": {"train": {"lora": 1e-2, "projector": 1e-2}, "lora": {"rank": 4}},
    "prefix": {"train": {"prefix": 1e-2, "projector": 1e-2}, "prefix": {"tokens": 5}},
    "wings": {"train": {"wings": 1e-2, "projector": 1e-2}, "wings": {"rank": 4}},
}
TUNED_TOGETHER = {"train": {"wings": 1e-2, "projector": 1e-2, "llm": 1e-3}, "wings": {"rank": 4}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_exactly_its_parts_and_gives_the_trained_model_back(
    recipe: MakeRecipe, method: str
) -> None:
    made = recipe(method=method, data=UNEVEN, **METHODS[method])
    seen = LastModel(batch_of(made, 5))
    result = train(made, callbacks=[seen], quiet=True)
    table = json.loads((result.directory / "stages/01-only/parameters.json").read_text())
    assert {row["part"] for row in table["rows"]} == set(made.stages[0].learning_rates)
    base = load_host(made.host.path or "").model
    model, processor = alula.load_model(result.final)
    assert seen.logits is not None
    with torch.no_grad():
        again = model(**seen.batch).logits
    assert torch.equal(again, seen.logits)
    before = dict(base.named_parameters())
    frozen = {"projector": ("language_model", "vision_tower"), "full": ()}.get(
        method, ("language_model", "vision_tower")
    )
    after = {_plain_name(name): value for name, value in model.named_parameters()}
    for name, value in before.items():
        if any(part in name for part in frozen):
            assert torch.equal(after[name], value), name
        if "projector" in name:
            assert not torch.equal(after[name], value), name
    assert processor.tokenizer.chat_template == load_host(made.host.path or "").processor.tokenizer.chat_template


def _plain_name(name: str) -> str:
    """The host's own name of a weight: LoRA's wrapper adds two levels, that of prompts one."""
    inner = name.removeprefix("base_model.")
    inner = inner.removeprefix("model.") if inner.startswith(("model.model.", "model.lm_head")) else inner
    return inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def test_lora_is_stock_peft_and_stays_out_of_the_tower(recipe: MakeRecipe, host_directory: Path) -> None:
    from peft import PeftModel

    made = recipe(method="lora", **METHODS["lora"])
    result = train(made, quiet=True)
    names = set(weights(result.final))
    assert any("lora_A" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    assert {name for name in names if "lora_" not in name} == {
        f"base_model.model.model.multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")
    }
    model = AutoModelForImageTextToText.from_pretrained(host_directory)
    peft = PeftModel.from_pretrained(model, str(result.final))
    assert sum("lora_A" in name for name, _ in peft.named_parameters()) == 14
    asked = recipe(
        run={"output_dir": made.output_dir + "2"}, **{**METHODS["lora"], "lora": {"tower": True}}, method="lora"
    )
    assert any("vision_tower" in name for name in weights(train(asked, quiet=True).final))


@pytest.mark.parametrize("tied", [True, False])
def test_lora_with_embeddings_and_head(recipe: MakeRecipe, tied: bool, tmp_path: Path) -> None:
    """Both are trained whole (as one where they are one), are saved, and stock PEFT gives the trained model back."""
    from peft import PeftModel

    host = build_host(tiny.decoder("llama", tied=tied), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    place = save_host(host, tmp_path / "host")
    made = recipe(
        run={"host": {"path": str(place)}},
        method="lora",
        lora={"rank": 4, "embeddings": True},
        train={"lora": 1e-2, "embeddings": 1e-2},
        data={"sources": [{"microworld": "visual", "text_only": True}]},
    )
    seen = LastModel(batch_of(made, 5))
    result = train(made, callbacks=[seen], quiet=True)
    model, _ = alula.load_model(result.final)
    assert seen.logits is not None
    with torch.no_grad():
        assert torch.equal(model(**seen.batch).logits, seen.logits)
        stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(place), str(result.final)).eval()
        torch.testing.assert_close(stock(**seen.batch).logits, seen.logits)
    before = Anatomy.of(load_host(place).model)
    ends = [end.modules_to_save["default"].weight for end in (Anatomy.of(model).embeddings, Anatomy.of(model).head)]
    assert (ends[0].data_ptr() == ends[1].data_ptr()) is tied
    assert not torch.equal(ends[0], before.embeddings.weight)
    assert not torch.equal(ends[1], before.head.weight)
    table = json.loads((result.directory / "stages/01-only/parameters.json").read_text())
    sizes = {row["part"]: row["parameters"] for row in table["rows"]}
    assert sizes["embeddings"] == before.embeddings.weight.numel() * (1 if tied else 2)


def test_embeddings_are_named_twice_or_not_at_all(recipe: MakeRecipe) -> None:
    assert recipe(method="lora", train={}).stages[0].learning_rates == {"lora": 2e-4, "projector": 2e-5}
    asked = recipe(method="lora", train={}, lora={"embeddings": True})
    assert asked.stages[0].learning_rates == {"lora": 2e-4, "projector": 2e-5, "embeddings": 2e-4}
    with pytest.raises(RecipeError, match="`embeddings` does nothing under these settings"):
        recipe(method="lora", train={"lora": 1e-3, "embeddings": 1e-3})
    with pytest.raises(RecipeError, match="name both or neither"):
        recipe(method="lora", train={"lora": 1e-3}, lora={"embeddings": True})


def test_a_prefix_is_stock_peft_and_reaches_text_only_prompts(recipe: MakeRecipe, host_directory: Path) -> None:
    from peft import PeftModel

    result = train(recipe(method="prefix", **METHODS["prefix"]), quiet=True)
    stored = weights(result.final)
    projector = [
        f"base_model.model.multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")
    ]
    assert set(stored) == {"prompt_embeddings", *projector}
    base = AutoModelForImageTextToText.from_pretrained(host_directory).eval()
    text = base.config.text_config
    assert stored["prompt_embeddings"].shape == (
        5,
        2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim,
    )
    prompt = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        before = base(**prompt).logits
        tuned = PeftModel.from_pretrained(base, str(result.final)).eval()
        after = tuned(**prompt).logits
        assert not torch.equal(after, before)
        assert torch.equal(alula.load_model(result.final).model(**prompt).logits, after)


def test_generating_after_a_prefix_equals_the_whole_forward(recipe: MakeRecipe) -> None:
    """Greedy tokens with the cache, padded on the left and with images, against one uncached forward over them."""
    made = recipe(method="prefix", data=UNEVEN, **METHODS["prefix"])
    model, processor = alula.load_model(train(made, quiet=True).final)
    mixture = open_data(made.stages[0].data, seed=1)
    samples = [mixture[n] for n in range(6)]
    prompts = [replace(sample, messages=sample.messages[:1]) for sample in samples]
    batch = Collator(processor, train=False)(prompts)
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(prompts), 4, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        whole = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        logits = model(**whole, pixel_values=batch["pixel_values"]).logits
    expected = logits[:, -5:-1].argmax(dim=-1)
    assert torch.equal(tokens[:, -4:], expected)


def test_a_stage_can_go_on_from_a_prefix(recipe: MakeRecipe) -> None:
    stages = [
        {"name": "first", "method": "prefix", **METHODS["prefix"]},
        {"name": "more", "method": "prefix", "train": {"prefix": 1e-2}},
    ]
    result = train(recipe(stages=stages), quiet=True)
    first, more = (weights(result.directory / f"stages/{name}/model") for name in ("01-first", "02-more"))
    assert first.keys() == more.keys()
    changed = {name for name, value in first.items() if not torch.equal(value, more[name])}
    assert changed == {"prompt_embeddings"}  # the projector is frozen in the last stage, and still inside
    alula.load_model(result.final)


def test_wings_and_the_decoder_trained_together_come_back_together(recipe: MakeRecipe) -> None:
    made = recipe(method="wings", data=UNEVEN, **TUNED_TOGETHER)
    seen = LastModel(batch_of(made, 5))
    result = train(made, callbacks=[seen], quiet=True)
    model, _ = alula.load_model(result.final)
    assert seen.logits is not None
    with torch.no_grad():
        assert torch.equal(model(**seen.batch).logits, seen.logits)
    host = result.directory / "stages/01-only/host"
    assert not any("alula" in name for name in weights(host))
    tuned, base = (load_host(str(path)).model for path in (host, made.host.path))
    changed = {
        name for name, value in base.named_parameters() if not torch.equal(value, dict(tuned.named_parameters())[name])
    }
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_a_stage_can_go_on_from_wings_on_a_tuned_decoder(recipe: MakeRecipe) -> None:
    stages = [
        {"name": "first", "method": "wings", **METHODS["wings"]},
        {"name": "both", "method": "wings", "train": TUNED_TOGETHER["train"]},
        {"name": "more", "method": "wings", "train": {"wings.visual": 1e-3}},
    ]
    result = train(recipe(stages=stages), quiet=True)
    config = json.loads((result.final / "adapter_config.json").read_text())
    assert (result.final / config["base_model_name_or_path"]).resolve() == result.directory / "stages/02-both/host"
    alula.load_model(result.final)


def test_outputs_are_plain_directories_for_auto_classes(recipe: MakeRecipe, host_directory: Path) -> None:
    result = train(recipe(method="full", **METHODS["full"]), quiet=True)
    assert result.final.is_symlink()
    model = AutoModelForImageTextToText.from_pretrained(result.final)
    base = AutoModelForImageTextToText.from_pretrained(host_directory)
    assert {**model.config.to_dict(), "_name_or_path": ""} == {**base.config.to_dict(), "_name_or_path": ""}
    assert AutoProcessor.from_pretrained(result.final).chat_template
    assert not (result.directory / "stages/01-only/checkpoints").exists()


def test_the_next_stage_starts_from_the_last_ones_output(recipe: MakeRecipe) -> None:
    stages = [
        {"name": "align"},
        {"name": "tune", "method": "wings", **METHODS["wings"]},
        {"name": "more", "method": "wings", "train": {"wings.visual": 1e-3}},
    ]
    result = train(recipe(stages=stages), quiet=True)
    align, tune, more = (result.directory / f"stages/0{n + 1}-{s['name']}/model" for n, s in enumerate(stages))
    projector = "host.model.multi_modal_projector.linear_1.weight"
    first, second = weights(tune), weights(more)
    assert not torch.equal(weights(align)[projector.removeprefix("host.")], first[projector])
    assert torch.equal(first[projector], second[projector])  # frozen in the last stage, and still inside
    for name, value in first.items():
        assert torch.equal(value, second[name]) == (".visual." not in name), name
    assert (result.directory / "latest").resolve() == more.resolve() == result.final.resolve()


@pytest.mark.parametrize("method", ["full", "lora", "wings"])
def test_gradient_checkpointing_changes_no_number(recipe: MakeRecipe, method: str) -> None:
    options = {**METHODS[method], "method": method, "data": UNEVEN, "steps": 2}
    kept = train(recipe(**options), quiet=True)
    run = {"gradient_checkpointing": True, "output_dir": f"{kept.directory}-recomputed"}
    watch = _Checkpointing()
    recomputed = train(recipe(run=run, **options), callbacks=[watch], quiet=True)
    assert watch.on
    for left, right in zip(rows(kept.directory), rows(recomputed.directory), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "recompute"), [("full", False), ("lora", True), ("prefix", False), ("wings", False), ("wings", True)]
)
def test_training_steps_build_no_cache(recipe: MakeRecipe, host_directory: Path, method: str, recompute: bool) -> None:
    """The Trainer switches it off in the host's own config only, and a decoder reads another one."""
    watch = _Caches()
    run = {"gradient_checkpointing": recompute}
    made = recipe(run=run, method=method, data=UNEVEN, steps=1, **METHODS[method])
    result = train(made, callbacks=[watch], quiet=True)
    assert watch.training
    assert {type(cache) for cache in watch.training} == ({DynamicCache} if method == "prefix" else {type(None)})
    assert None not in watch.answering  # `generate` still has its cache
    if method == "full":
        saved, before = (json.loads((path / "config.json").read_text()) for path in (result.final, host_directory))
        assert saved == before


class _Caches(TrainerCallback):
    """The cache every forward hands to the decoder's first layer."""

    def __init__(self) -> None:
        self.training: list[Any] = []
        self.answering: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def see(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
            (self.training if layer.training else self.answering).append(cache_of(kwargs, where="layer"))

        Anatomy.of(kwargs["model"]).layers[0].register_forward_pre_hook(see, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].eval().generate(input_ids=torch.tensor([[7, 8]]), max_new_tokens=2)


class _Checkpointing(TrainerCallback):
    on = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on = any(getattr(module, "gradient_checkpointing", False) for module in kwargs["model"].modules())


def test_bf16_is_autocast_over_float32_weights(recipe: MakeRecipe) -> None:
    options = {**METHODS["full"], "method": "full", "data": UNEVEN}
    full = train(recipe(**options), quiet=True)
    half = train(recipe(run={"precision": "bf16", "output_dir": str(full.directory) + "2"}, **options), quiet=True)
    assert {value.dtype for value in weights(half.final).values()} == {torch.float32}
    for left, right in zip(rows(full.directory), rows(half.directory), strict=True):
        assert left["loss"] != right["loss"]
        assert left["loss"] == pytest.approx(right["loss"], rel=0.02)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(recipe: MakeRecipe) -> None:
    options = {**METHODS["wings"], "method": "wings"}
    runs = [
        train(recipe(run={"seed": seed, "output_dir": f"{recipe().output_dir}-{n}"}, **options), quiet=True)
        for n, seed in enumerate((1, 1, 2))
    ]
    first, second, third = (weights(run.final) for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, third[name]) for name, value in first.items())
    assert rows(runs[0].directory) == rows(runs[1].directory)


def test_the_template_is_told_what_the_recipe_says(recipe: MakeRecipe, tmp_path: Path) -> None:
    asking = "strftime_now('%d.%m.%Y')"
    losses = []
    for number, (date, told, recorded) in enumerate(
        [
            (asking, {"date": "2025-01-02"}, {"date": "2025-01-02"}),
            ("'02.01.2025'", None, {}),
            (asking, None, {"date": "2024-07-26"}),
        ]
    ):
        template = "{{- '<|im_start|>system\n' + @DATE@ + '<|im_end|>\n' -}}".replace("@DATE@", date) + tiny.CHATML
        host = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer(template))
        path = save_host(host, tmp_path / f"host-{number}")
        run = {"host": {"path": str(path)}, "output_dir": str(tmp_path / f"run-{number}"), "template": told}
        stage = train(recipe(run=run, steps=1), quiet=True).stages[0]
        losses.append(stage.loss)
        assert json.loads((stage.model.parent / "stage.json").read_text())["template"] == recorded
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(UsageError, match="without effect"):
        train(recipe(run={"template": {"enable_thinking": False}}, steps=1), quiet=True)


def test_a_part_this_model_lacks_is_an_error(recipe: MakeRecipe) -> None:
    made = recipe(method="wings", train={"wings.textual": 1e-3}, wings={"learners": ["visual"]})
    with pytest.raises(RecipeError, match=r"`wings\.textual` matches no parameter"):
        train(made, quiet=True)
    made = recipe(run={"output_dir": made.output_dir + "2"}, method="lora", train={}, lora={"targets": ["qq_proj"]})
    with pytest.raises(RecipeError, match="`qq_proj` names no linear layer"):
        train(made, quiet=True)


def test_a_loss_that_is_no_number_stops_the_run(recipe: MakeRecipe) -> None:
    made = recipe(method="full", train={"llm": 10.0, "projector": 10.0}, steps=40, clip=None)
    made = made.model_copy(update={"precision": "bf16"})
    poison = _Poison()
    with pytest.raises(AlulaError, match="the loss is nan at step 2"):
        train(made, callbacks=[poison], quiet=True)
    assert not (Path(made.output_dir) / "final").exists()


class _Poison(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(float("nan"))


def test_epochs_count_the_sources(recipe: MakeRecipe) -> None:
    sources = [{"microworld": "visual", "limit": 10}, {"microworld": "caption", "limit": 6}]
    made = recipe(steps=None, epochs=2, data={"sources": sources})
    assert train(made, quiet=True).stages[0].steps == 8
    endless = recipe(steps=None, epochs=1)
    with pytest.raises(RecipeError, match="never ends"):
        check(endless, resume=False)
    with pytest.raises(DataError):
        check(recipe(data={"sources": [{"jsonl": "nowhere.jsonl"}]}), resume=False)


@pytest.mark.parametrize(("source", "told"), [("text", ["projector"]), ("visual", [])])
def test_a_part_that_no_gradient_reached_is_told(
    recipe: MakeRecipe, capfd: pytest.CaptureFixture[str], source: str, told: list[str]
) -> None:
    """A projector in a stage of text alone stays as it is, whatever its rate."""
    made = recipe(method="full", train={"projector": 1e-2, "llm": 1e-3}, data={"sources": [{"microworld": source}]})
    train(made)
    words = " ".join(capfd.readouterr().err.split())
    assert [part for part in ("projector", "llm") if f"no gradient reached {part} in any step" in words] == told
    assert words.count("no gradient reached") == len(told)


def test_an_output_directory_is_never_mixed_up(recipe: MakeRecipe) -> None:
    made = recipe()
    with pytest.raises(UsageError, match="no run to resume"):
        train(made, resume=True, quiet=True)
    train(made, quiet=True)
    assert train(made, quiet=True).was_done
    with pytest.raises(UsageError, match=r"stages\.0\.steps was 3, now 4"):
        train(recipe(steps=4), quiet=True)
    assert len(rows(train(recipe(steps=4), resume=False, quiet=True).directory)) == 4
    foreign = Path(made.output_dir + "-foreign")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all my work")
    for resume in ("auto", False):
        with pytest.raises(UsageError, match="holds no run"):
            train(recipe(run={"output_dir": str(foreign)}), resume=resume, quiet=True)  # type: ignore[arg-type]
    assert [path.name for path in foreign.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_the_run_says_what_it_ran_on(recipe: MakeRecipe) -> None:
    made = recipe()
    result = train(made, quiet=True)
    train(made, quiet=True)
    sessions = json.loads((result.directory / "environment.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["versions"]["torch"] == torch.__version__
    assert sessions[0]["machine"]["torch_threads"] == torch.get_num_threads()
    assert sessions[0]["seeds"] == {"only": 0}


@pytest.mark.parametrize(
    ("words", "bound", "message"),
    [(40, {"max_length": 40}, "more than max_length 40"), (600, {}, "more than the model's context of 512")],
)
def test_bad_records_stop_the_run_or_are_stepped_over(
    recipe: MakeRecipe, plain: Callable[..., Any], tmp_path: Path, words: int, bound: dict[str, int], message: str
) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": "say"},
                {"role": "assistant", "content": "word " * (words if n == 2 else 1)},
            ]
        }
        for n in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {
        "data": {"sources": [{"jsonl": str(tmp_path / "data.jsonl")}]},
        **bound,
        "method": "full",
        "train": {"llm": 1e-3},
    }
    with pytest.raises(DataError, match=message):
        train(recipe(**options), quiet=True)
    made = recipe(run={"output_dir": str(tmp_path / "skip")}, on_bad="skip", **options)
    result = train(made, quiet=True)
    quarantined = (result.directory / "stages/01-only/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in quarantined] == [3]


def test_every_source_is_opened_once(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing a large file takes its time: what was opened to be checked is what is trained and measured with."""
    texts = [export_jsonl(text_items(8, split="train", seed=seed), tmp_path / str(seed)) for seed in range(4)]
    pictures = export_jsonl(visual_items(4, split="train", seed=0), tmp_path / "pictures")
    opened: list[Path] = []
    index = RecordFile.__init__
    monkeypatch.setattr(RecordFile, "__init__", lambda self, path: (opened.append(Path(path)), index(self, path))[1])
    first, second, replay, asked = ({"jsonl": str(path)} for path in texts)
    made = recipe(
        {"retention": {"measure": "likelihood", "text": asked, "pictures": {"jsonl": str(pictures)}}},
        stages=[
            {"name": "one", "data": {"sources": [first], "text_replay": {"ratio": 0.5, "sources": [replay]}}},
            {"name": "two", "data": {"sources": [second]}, "on_bad": "skip"},
        ],
    )
    assert len(train(made, quiet=True).stages) == 2
    assert sorted(opened) == sorted([*texts, pictures])
