"""Stages of MKS2: what they train and leave alone, what they learn from, and the order in which they make sense."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import alula
from alula.data import Collator, open_source
from alula.errors import HostError, RecipeError, UsageError
from alula.grafts import MKS2Config
from alula.grafts.mks2.retrieval import CaptionPairs, RetrievalHead
from alula.hosts import load_host
from alula.seam import marked
from alula.training import check, load_recipe, train
from alula.training.contrast import info_nce
from alula.training.methods.mks2 import MKS2Spec
from alula.training.metrics import read_rows
from tests import zoo
from tests.forked import Forked, ended
from tests.grafts.common import wake
from tests.training.conftest import MakeRecipe

STORE = {
    "name": "store",
    "method": "mks2",
    "train": {},
    "mks2": {"memory_width": 8, "rank": 2, "retrieval": 16},
    "data": {"sources": [{"microworld": "caption"}]},
}
MIX = {
    "name": "mix",
    "method": "mks2",
    "train": {},
    "mks2": {"mode": "mix"},
    "data": {"sources": [{"microworld": "visual"}, {"microworld": "text"}]},
}


class Hashes(TrainerCallback):
    """Of every tensor of the model before and after each stage."""

    def __init__(self) -> None:
        self.before: list[dict[str, str]] = []
        self.changed: list[set[str]] = []
        self.names: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(_hashes(kwargs["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = _hashes(kwargs["model"])
        assert after.keys() == self.before[-1].keys()
        self.names |= {*after}
        self.changed.append({name for name, digest in after.items() if digest != self.before[-1][name]})


def _hashes(model: Any) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        ({}, {".mks2.lora.", ".mks2.router."}),
        # of the last layer's image tokens nothing is read, so that their memory there could learn nothing
        ({"route": "modality", "lora": "parallel", "store": "beside", "layers": [0]}, {".mks2.lora."}),
        ({"retrieval": None, "layers": [0]}, {".mks2.lora.", ".mks2.router."}),
    ],
)
def test_each_stage_changes_what_it_trains_and_nothing_else(
    recipe: MakeRecipe, settings: dict[str, Any], mixes: set[str]
) -> None:
    store = {**STORE, "mks2": {**STORE["mks2"], **settings}}  # type: ignore[dict-item]
    hashes = Hashes()
    mix = {**MIX, "train": {"mks2": 1e-2}}
    result = train(recipe(stages=[{**store, "train": {"mks2": 1e-2, "projector": 1e-2}}, mix]), callbacks=[hashes])
    compared = {".mks2.retrieval."} if settings.get("retrieval", 16) is not None else set()
    for changed, parts in zip(
        hashes.changed, [{".mks2.memory.", "multi_modal_projector", *compared}, mixes], strict=True
    ):
        trained = {name for name in hashes.names if any(part in name for part in parts)}
        assert changed == trained
    model, _ = alula.load_model(str(result.final))
    (graft,) = alula.grafts_of(model).values()
    assert graft.config.mode == "mix"  # type: ignore[attr-defined]


def test_stage_one_learns_captions_and_images_by_heart(recipe: MakeRecipe) -> None:
    """Eight pairs: the caption loss falls, every caption finds its picture, and the LLM has not moved by a bit."""
    rates = {"mks2": 1e-2, "projector": 1e-2}
    data = {"sources": [{"microworld": "caption", "limit": 8}]}
    made = recipe(stages=[{**STORE, "train": rates, "data": data}], batch_size=8, steps=40, save_every=1000)
    hashes = Hashes()
    result = train(made, callbacks=[hashes])
    rows = read_rows(result.directory / "metrics.jsonl")
    assert rows[-1]["losses"]["contrast"] < 0.2 < 1.5 < rows[0]["losses"]["contrast"]
    first, last = (row["loss"] - row["losses"]["contrast"] for row in (rows[0], rows[-1]))
    assert last < 0.7 * first
    assert not [name for name in hashes.changed[0] if ".alula." not in name and "projector" not in name]
    host = alula.load_model(str(result.final))
    (graft,) = alula.grafts_of(host.model).values()
    source = open_source({"microworld": "caption", "limit": 8})
    batch = Collator(host.processor, descriptions=True)([source[index] for index in range(8)])
    captions = graft.embed_captions(batch["input_ids"][8:], batch["attention_mask"][8:])  # type: ignore[attr-defined]
    images = graft.embed_images({"pixel_values": batch["pixel_values"]})  # type: ignore[attr-defined]
    assert (captions @ images.T).argmax(dim=1).tolist() == batch["describes"][8:].tolist() == list(range(8))


def test_weights_of_the_losses(recipe: MakeRecipe) -> None:
    """Each counts with its own: of the first step, before anything is learnt."""

    def first(run: dict[str, Any] | None = None, cache: Any = None, **settings: Any) -> dict[str, Any]:
        stage = {**STORE, "mks2": {**STORE["mks2"], **settings}, "feature_cache": cache}  # type: ignore[dict-item]
        made = recipe(run, [stage], steps=1)
        return read_rows(train(made, resume=False).directory / "metrics.jsonl")[0]

    plain, both, none = first(), first(bidirectional=True), first(contrast_weight=0)
    caption, contrast = none["loss"], plain["losses"]["contrast"]
    assert "losses" not in none
    assert plain["loss"] == pytest.approx(caption + contrast, rel=1e-5)
    assert both["losses"]["contrast"] != pytest.approx(contrast, rel=1e-4)
    recomputed = first({"gradient_checkpointing": True}, {"memory_mb": 8})  # features that no tower made just now
    assert recomputed["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    weighted = first(caption_weight=0.5, contrast_weight=3)
    assert weighted["loss"] == pytest.approx(0.5 * caption + 3 * contrast, rel=1e-5)


def test_descriptions_are_rows_of_their_own(host_directory: Path) -> None:
    host = load_host(host_directory)
    one, text = open_source({"microworld": "caption"})[0], open_source({"microworld": "text"})[0]
    two = open_source({"microworld": "visual"})[3]
    samples = [text, one, two]
    batch = Collator(host.processor, descriptions=True)(samples)
    plain = Collator(host.processor)(samples)
    rows = int((batch["describes"] >= 0).sum())
    assert batch["describes"].tolist() == [-1, -1, -1, 0, 1][: 3 + rows]
    for key, value in plain.items():
        if key != "pixel_values":
            assert torch.equal(batch[key][:3], value), key
    answer = plain["labels"][1][plain["labels"][1] != -100].tolist()
    row, mask = batch["input_ids"][3], batch["attention_mask"][3].bool()
    begins = [host.processor.tokenizer.bos_token_id] if plain["input_ids"][1][0] == row[0] else []
    assert row[mask].tolist() == [*begins, *answer]
    assert (batch["labels"][3:] == -100).all()
    with pytest.raises(UsageError, match="of training batches"):
        Collator(host.processor, descriptions=True, train=False)


# -- the contrast --------------------------------------------------------------------------------------------------


def pairs(count: int, width: int = 6, *, scale: float = 5.0, item: list[int] | None = None, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    captions, images = (
        torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    chosen = torch.tensor(list(range(count)) if item is None else item)
    images = images[chosen.clamp(min=0)]
    return CaptionPairs(captions, images, chosen, torch.tensor(scale, dtype=torch.float64))


def naive(given: CaptionPairs, *, both: bool) -> float:
    """Caption by caption, as the paper writes it."""
    total, count = 0.0, len(given.item)

    def score(caption: int, image: int) -> float:
        return math.exp(float(given.scale) * float(given.captions[caption] @ given.images[image]))

    for i in range(count):
        if given.item[i] < 0:
            continue
        others = [j for j in range(count) if given.item[j] >= 0 and (j == i or given.item[j] != given.item[i])]
        to_images = -math.log(score(i, i) / sum(score(i, j) for j in others))
        to_captions = -math.log(score(i, i) / sum(score(j, i) for j in others))
        total += (to_images + to_captions) / 2 if both else to_images
    return total


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("item", [None, [0, -1, 2, 2, 0, -1, 1]])
def test_the_contrast_is_the_papers(both: bool, item: list[int] | None) -> None:
    given = pairs(7, item=item)
    assert float(info_nce(given, bidirectional=both)) == pytest.approx(naive(given, both=both), rel=1e-9)


def test_the_contrast_at_its_ends() -> None:
    aligned = CaptionPairs(torch.eye(8), torch.eye(8), torch.arange(8), torch.tensor(1 / 0.07))
    assert float(info_nce(aligned, bidirectional=True)) / 8 < 1e-4
    flat = info_nce(aligned._replace(scale=torch.tensor(0.0)), bidirectional=False) / 8
    assert float(flat) == pytest.approx(math.log(8))
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    loss = float(info_nce(aligned, bidirectional=False))
    together = CaptionPairs(aligned.captions[order], aligned.images[order], aligned.item[order], aligned.scale)
    assert float(info_nce(together, bidirectional=False)) == pytest.approx(loss, rel=1e-5)
    apart = aligned._replace(captions=aligned.captions[order])
    assert float(info_nce(apart, bidirectional=False)) > loss + 1
    nothing = aligned._replace(item=torch.full((8,), -1))
    assert float(info_nce(nothing, bidirectional=True)) == 0


def test_the_temperature_is_bounded_and_finds_its_way_back() -> None:
    head = RetrievalHead(4, 4, 4, torch.zeros(1))
    given = torch.randn(3, 4), torch.randn(3, 2, 4), torch.arange(3)
    assert float(head(*given).scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        head.log_scale.fill_(6.0)
    for sign, slope in ((1.0, 100.0), (-1.0, 0.0)):
        head.zero_grad()
        scale = head(*given).scale
        assert float(scale.detach()) == pytest.approx(100)
        (sign * scale).backward()
        assert head.log_scale.grad is not None
        assert float(head.log_scale.grad) == pytest.approx(slope)


ROWS = ((slice(0, 4), slice(0, 3), [0, 1, -1, 2]), (slice(4, 7), slice(3, 6), [0, 2, 1]))
"""of each process: its samples, its images, and which of these a sample describes"""


def of_process(rank: int | None, store: str = "") -> list[Tensor]:
    """Loss and gradients, one way and both, added up over two processes; None: of one that has all pairs."""
    found = []
    if rank is not None:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for bidirectional in (False, True):
            torch.manual_seed(0)
            head, states, features = RetrievalHead(5, 4, 6, torch.zeros(1)), torch.randn(7, 5), torch.randn(6, 3, 4)
            rows, images, item = (slice(7), slice(6), [0, 1, -1, 2, 3, 5, 4]) if rank is None else ROWS[rank]
            loss = info_nce(head(states[rows], features[images], torch.tensor(item)), bidirectional=bidirectional)
            loss.backward()
            found += [loss.detach(), *(p.grad for p in head.parameters() if p.grad is not None)]
        if rank is not None:
            for value in found:
                distributed.all_reduce(value)
    finally:
        if rank is not None:
            distributed.destroy_process_group()
    return found


def test_two_processes_are_one_big_batch(tmp_path: Path) -> None:
    """Negatives of both, and gradients that add up to those of one process that has all pairs."""
    other = Forked(lambda: print(of_process(1, str(tmp_path / "store"))))
    ours = of_process(0, str(tmp_path / "store"))
    ended(other, seconds=120)
    expected = of_process(None)
    assert len(expected) == len(ours) == 8
    for one, two in zip(expected, ours, strict=True):
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)


def test_gradients_of_the_contrast_pass_through_a_layer_whose_weights_are_sharded_again(tmp_path: Path) -> None:
    """Backward comes to the pairs before it comes to the layer's output, which has its weights gathered."""
    inputs = zoo.batch("llava-llama", "3I2", "I4", "5", "3", side="right")
    inputs["describes"] = torch.tensor([-1, -1, 0, 1])

    def slopes(*, sharded: bool) -> dict[str, Tensor]:
        model = zoo.build("llava-llama").train()
        graft: Any = wake(alula.attach(model, MKS2Config(mode="store", memory_width=6, rank=2, retrieval=5)))
        if sharded:
            for layer in model.model.language_model.layers:
                fully_shard(layer)
            fully_shard(model)
        kept: list[Any] = []
        graft.seam.at_end(lambda ctx: kept.append(graft.pairs(ctx)), mark="kept")
        with marked("kept"):
            logits = model(**inputs, use_cache=False).logits
        (logits.square().mean() + info_nce(kept[0], bidirectional=True)).backward()
        found = {name: p.grad for name, p in model.named_parameters() if ".retrieval." in name or ".memory." in name}
        return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items() if g is not None}

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found, expected = slopes(sharded=True), slopes(sharded=False)
    finally:
        distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    assert sum(".retrieval." in name for name in found) == 3
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, atol=1e-6, rtol=1e-4)


def test_captions_are_read_at_their_end_on_whichever_side_they_are_padded() -> None:
    model = zoo.build("llava-llama")
    graft: Any = wake(alula.attach(model, MKS2Config(memory_width=6, rank=2, retrieval=5, layers=(0,))))
    right, left = (zoo.batch("llava-llama", "4", "9", side=side) for side in ("right", "left"))
    found = graft.embed_captions(right["input_ids"], right["attention_mask"])
    assert found.shape == (2, 5)
    wider = {key: torch.nn.functional.pad(right[key], (0, 3)) for key in ("input_ids", "attention_mask")}
    for other in (left, wider):
        again = graft.embed_captions(other["input_ids"], other["attention_mask"])
        torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-5)
    kept: list[Tensor] = []
    hook = model.model.language_model.layers[-1].register_forward_hook(lambda *given: kept.append(given[2]))
    with graft.using("store"), torch.no_grad():
        model(**zoo.batch("llava-llama", "4"))
    hook.remove()
    ours = kept[0][0, -1] @ graft.layers[1].retrieval.caption.T
    torch.testing.assert_close(found[0], ours / ours.norm(), atol=1e-5, rtol=1e-5)
    bare = alula.attach(zoo.build("llava-llama"), MKS2Config())
    with pytest.raises(UsageError, match="without weights for retrieval"):
        bare.embed_captions(right["input_ids"], right["attention_mask"])  # type: ignore[attr-defined]
    with pytest.raises(HostError, match="no connector between vision tower and decoder"):
        alula.attach(zoo.build("qwen2_5_vl"), MKS2Config(retrieval=5))


def test_pictures_are_compared_by_a_copy_and_in_half_precision_and_nothing_is_left_behind() -> None:
    model = zoo.build("llava-llama")
    graft: Any = wake(alula.attach(model, MKS2Config(memory_width=6, rank=2, retrieval=5)))
    pixels = zoo.pixels("llava-llama", 3)
    found = graft.embed_images(pixels)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    features = model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = features.mean(dim=1) @ graft.layers[1].retrieval.image.T
    torch.testing.assert_close(found, torch.nn.functional.normalize(ours, dim=1), atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(model).bfloat16()
    again = alula.grafts_of(twin)["mks2"].embed_images({"pixel_values": pixels["pixel_values"].bfloat16()})  # type: ignore[attr-defined]
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, found, atol=0.05, rtol=0.05)
    alula.detach(model)
    assert not model.model.multi_modal_projector._forward_pre_hooks


# -- what recipes may say ------------------------------------------------------------------------------------------


def test_rates_and_settings_of_stages(recipe: MakeRecipe) -> None:
    made = recipe(stages=[STORE, MIX])
    store, mix = made.stages
    assert store.learning_rates.keys() == {"mks2.memory", "mks2.retrieval", "projector"}
    assert mix.learning_rates.keys() == {"mks2.lora", "mks2.router"}
    assert mix.settings.rank == 2
    assert mix.settings.mode == "mix"
    short = recipe(stages=[{**STORE, "train": {"mks2": 1e-3}}, {**MIX, "train": {"mks2": 2e-3, "projector": 1e-4}}])
    assert short.stages[0].learning_rates == {"mks2.memory": 1e-3, "mks2.retrieval": 1e-3}
    assert short.stages[1].learning_rates == {"mks2.lora": 2e-3, "mks2.router": 2e-3, "projector": 1e-4}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([MIX], "`mix` mixes a memory that holds nothing: put a stage of mode `store` before it"),
        (
            [{**MIX, "train": {"mks2.memory": 1e-3, "mks2.lora": 1e-3}}, {**STORE, "mks2": {"mode": "store"}}],
            "`store` stores into a memory that was mixed already",
        ),
        ([STORE, {**MIX, "mks2": {"mode": "mix", "rank": 4}}], "of whose settings it may change `mode`"),
        ([{**STORE, "train": {"mks2.lora": 1e-3}}], "`mks2.lora` does nothing under these settings"),
        ([STORE, {**MIX, "train": {"mks2.retrieval": 1e-3}}], "`mks2.retrieval` does nothing"),
        ([{**STORE, "mks2": {"mode": "text"}}], 'mode="text" is the host'),
        ([{**STORE, "mks2": {"retrieval": None, "bidirectional": True}}], "retrieval is null"),
        ([{**STORE, "mks2": {"retrieval": None, "caption_weight": 0}}], "nothing is learnt"),
        ([{**STORE, "mks2": {"memory_width": 0}}], "memory_width"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: MakeRecipe, stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(stages=stages)
    assert said in str(caught.value)


def test_text_skill_is_no_budget_where_there_is_no_mlp(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="retention: `store` has no MLP while it stores"):
        recipe({"retention": {"min": 0.9}}, [STORE])
    beside = {**STORE, "mks2": {**STORE["mks2"], "store": "beside"}}  # type: ignore[dict-item]
    assert recipe({"retention": {"min": 0.9}}, [beside]).retention is not None


def test_a_router_that_is_not_there_is_not_trained(recipe: MakeRecipe) -> None:
    store = {**STORE, "mks2": {**STORE["mks2"], "route": "modality"}}  # type: ignore[dict-item]
    assert recipe(stages=[store, MIX]).stages[1].learning_rates.keys() == {"mks2.lora"}
    with pytest.raises(RecipeError, match=r"`mks2\.router` does nothing"):
        recipe(stages=[store, {**MIX, "train": {"mks2.router": 1e-3}}])


def test_the_page_names_every_setting_and_its_recipe_is_legal(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "mks2.md").read_text()
    for name in MKS2Spec.model_fields:
        assert f"`{name}`" in page, name
    example, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    compile(example, "mks2.md", "exec")
    (written,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    head = "name: page\noutput_dir: runs/page\nhost: {llm: fledgling, vision: fledgling}\n"
    (tmp_path / "page.yaml").write_text(head + written)
    made = load_recipe(tmp_path / "page.yaml")
    assert [stage.settings.mode for stage in made.stages] == ["store", "mix"]


def test_the_recipe_in_the_repository_can_be_run() -> None:
    made = check(Path(__file__).parents[2] / "recipes" / "mks2.yaml")
    assert [(stage.method, stage.settings.mode) for stage in made.stages] == [("mks2", "store"), ("mks2", "mix")]
