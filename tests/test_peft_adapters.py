"""PEFT adapters as trainers leave them: with a processor beside them, with resized embeddings, or damaged."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import alula
from alula.errors import AdapterError, AlulaError
from alula.hosts import save_host
from tests.hosts import tiny

TOKENS = len(tiny.tokenizer())
MARK = "{# of the training #}"
QUERY = r".*(language_model|model)\.layers.*q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, a decoder, and a decoder with tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    save_host(
        alula.build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()), folder / "host"
    )
    for name in ("untied", "tied"):
        tiny.decoder("llama", tied=name == "tied").save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    return folder


def tuned(base: Path, place: Path, *, added: int = 0, **settings: Any) -> tuple[Any, Any]:
    """A LoRA adapter of `base` in `place`, whose embeddings got `added` rows before; the model and its processor."""
    model, processor = alula.load_model(base)
    if added:
        model.resize_token_embeddings(len(model.get_input_embeddings().weight) + added, mean_resizing=False)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": QUERY, **settings}))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(place)
    return peft_model.eval(), processor


def said(model: Any, *ids: int) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, *ids]])).logits


# -- processors -------------------------------------------------------------------------------------------------------


def _all_of_it(processor: Any, place: Path) -> None:
    processor.chat_template = MARK + processor.chat_template
    processor.save_pretrained(place)


def _the_tokenizer(processor: Any, place: Path) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.chat_template = MARK + processor.chat_template
    tokenizer.save_pretrained(place)


def _the_template(processor: Any, place: Path) -> None:
    (place / "chat_template.jinja").write_text(MARK + processor.chat_template)


@pytest.mark.parametrize("save", [_all_of_it, _the_tokenizer, _the_template])
@pytest.mark.parametrize("base", ["host", "untied"])
def test_what_prepared_the_training_prepares_the_use(
    bases: Path, tmp_path: Path, base: str, save: Callable[[Any, Path], None]
) -> None:
    _, processor = tuned(bases / base, tmp_path)
    save(processor, tmp_path)
    model, own = alula.load_model(tmp_path)
    assert own.chat_template.startswith(MARK)
    assert getattr(own, "tokenizer", own).chat_template.startswith(MARK)  # by which the harness asks
    assert not alula.load_model(bases / base).processor.chat_template.startswith(MARK)
    content = [{"type": "image", "image": Image.new("RGB", (32, 32), "red")}] if base == "host" else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}] if content else "what?"}]
    inputs = own.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_a_processor_beside_a_graft_counts_too(bases: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(bases / "host")
    alula.attach(model, alula.WingsConfig(rank=2))
    processor.chat_template = MARK + processor.chat_template
    alula.save_adapter(model, tmp_path / "adapter", base=bases / "host", processor=processor)
    assert alula.load_model(tmp_path / "adapter").processor.chat_template.startswith(MARK)
    rows = len(model.get_input_embeddings().weight)
    processor.tokenizer.add_tokens([f"<{i}>" for i in range(rows - len(processor.tokenizer))])
    processor.tokenizer.add_tokens(["<one>", "<two>"])
    alula.save_adapter(model, tmp_path / "adapter", base=bases / "host", processor=processor)
    with pytest.raises(AdapterError, match=r"none for '<one>', '<two>'\n.*save_host"):
        alula.load_model(tmp_path / "adapter")


def test_tokens_that_the_base_itself_has_no_embeddings_for_are_none_of_the_adapters(
    bases: Path, tmp_path: Path
) -> None:
    """The tokenizer of Gemma-3's text models names an image token behind the last embedding."""
    tokenizer = tiny.tokenizer(extra_special_tokens=["<image_soft_token>"])
    tiny.decoder("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert len(alula.load_model(tmp_path / "adapter").processor) == TOKENS + 1
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="none for '<one>'\n"):
        alula.load_model(tmp_path / "adapter")


def test_a_placeholder_of_another_id_is_refused(bases: Path, tmp_path: Path) -> None:
    tuned(bases / "host", tmp_path)
    tiny.tokenizer(extra_special_tokens=["<one>", "<image>"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the image placeholder the id"):
        alula.load_model(tmp_path)


# -- embeddings -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "both trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one trained": {"modules_to_save": ["embed_tokens"]},
    "some tokens": {},
    "LoRA": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}
LOST = {("host", "one trained"), ("host", "some tokens")}
"""What PEFT leaves out of the adapter on image hosts, whose vocabulary it does not find: new rows, so a refusal."""


@pytest.mark.parametrize(
    ("base", "way"),
    [(base, way) for base in ("host", "untied", "tied") for way in WAYS if (base, way) != ("host", "LoRA")],
)
def test_resized_embeddings_come_back_or_are_refused(bases: Path, tmp_path: Path, base: str, way: str) -> None:
    rows = len(alula.load_model(bases / base).model.get_input_embeddings().weight)
    settings = {**WAYS[way], "trainable_token_indices": [rows, rows + 1]} if way == "some tokens" else WAYS[way]
    model, processor = tuned(bases / base, tmp_path, added=8, **settings)
    if base == "host" and way == "untouched":
        tokenizer = processor.tokenizer
        tokenizer.add_tokens([f"<{i}>" for i in range(rows + 8 - len(tokenizer))])
        processor.save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match=r"its tokenizer has \d+ tokens"):
            alula.load_model(tmp_path)
    elif (base, way) in LOST:
        with pytest.raises(AdapterError, match=r"token embeddings, this one has|cannot put it on this base"):
            alula.load_model(tmp_path)
    else:
        again = alula.load_model(tmp_path).model
        assert torch.equal(said(again, rows, rows + 1), said(model, rows, rows + 1))


def test_a_base_that_was_resized_afterwards(bases: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.decoder("llama").save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    whole, _ = tuned(base, tmp_path / "whole", **WAYS["both trained"])
    tuned(base, tmp_path / "part", **WAYS["one trained"])
    grown = tiny.decoder("llama")
    grown.resize_token_embeddings(TOKENS + 8)
    grown.save_pretrained(base)
    assert torch.equal(said(alula.load_model(tmp_path / "whole").model), said(whole))
    with pytest.raises(AdapterError, match=rf"with {TOKENS} token embeddings, this one has {TOKENS + 8}.*lm_head"):
        alula.load_model(tmp_path / "part")


def test_tied_embeddings_that_learn_together(bases: Path, tmp_path: Path) -> None:
    """PEFT adds the update twice when it merges these; loaded, it counts once."""
    model, _ = tuned(bases / "tied", tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert torch.equal(said(alula.load_model(tmp_path).model), said(model))


# -- damage -----------------------------------------------------------------------------------------------------------


def _weights(place: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(place / "adapter_model.safetensors")
    change(weights)
    save_file(weights, place / "adapter_model.safetensors", {"format": "pt"})


def _first(weights: dict[str, Tensor]) -> str:
    return min(name for name in weights if "lora_A" in name)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (lambda p: _weights(p, lambda w: w[_first(w)].fill_(math.nan)), "lora_A.weight holds .* NaN"),
    "whole numbers": (lambda p: _weights(p, lambda w: w.update({_first(w): w[_first(w)].long()})), "of type int64"),
    "fp8": (
        lambda p: _weights(p, lambda w: w.update({_first(w): w[_first(w)].to(torch.float8_e4m3fn)})),
        "of type float8",
    ),
    "another shape": (lambda p: _weights(p, lambda w: w.update({_first(w): torch.ones(2, 3)})), "do not fit.*lora_A"),
    "cut off": (
        lambda p: (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-9]),
        "damaged weights",
    ),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "weights are missing"),
    "a setting that is no number": (
        lambda p: (p / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": NaN}'),
        "not readable as JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(bases: Path, tmp_path: Path, damage: str) -> None:
    tuned(bases / "untied", tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    with pytest.raises(AdapterError, match=message) as caught:
        alula.load_model(tmp_path)
    assert caught.value.remedy
    assert facts["peft_type"] == "LORA"


def test_settings_of_other_types_are_named(bases: Path, tmp_path: Path) -> None:
    tuned(bases / "untied", tmp_path)
    whole = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in whole:
        for value in ("x", 3, [], {}):
            (tmp_path / "adapter_config.json").write_text(json.dumps({**whole, field: value}))
            try:
                alula.load_model(tmp_path)
            except AlulaError as error:
                told = str(error)
                if (field, value) == ("base_model_name_or_path", "x"):  # a model that there could be
                    continue
                assert any(word in told for word in (field, "adapter_config.json", "weights")), (field, value)
