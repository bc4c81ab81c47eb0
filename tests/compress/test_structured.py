"""Parts taken out: chosen as loops choose them, without any other effect, and loaded by everybody."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import alula
from alula.compress import Removal, WeightPruning, find_mask, remove
from alula.errors import DataError, HostError, UsageError
from alula.probes import Overlap
from tests import zoo
from tests.compress.common import captured, decoder_of, linears, same, samples, state
from tests.hosts import tiny


def logits(model: Any, name: str) -> list[Tensor]:
    with torch.no_grad():
        return [model(**sample).logits for sample in samples(name)]


def column_scores(model: Any, name: str, index: int, path: str) -> Tensor:
    """(in,) sums over outputs of |w| times the norm of the input, in float64."""
    matrix = linears(decoder_of(model))[index][path]
    x = torch.cat([captured(model, {path: matrix}, sample)[path] for sample in samples(name)]).double()
    return (matrix.weight.detach().double().abs() * x.norm(dim=0)).sum(dim=0)


def saved_and_loaded(model: Any, auto: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return auto.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("llama", AutoModelForCausalLM),
        ("qwen3", AutoModelForCausalLM),
        ("gemma2", AutoModelForCausalLM),
        ("gemma3", AutoModelForCausalLM),
        ("opt", AutoModelForCausalLM),
        ("gpt_neox", AutoModelForCausalLM),
        ("llava-mistral", AutoModelForImageTextToText),
        ("qwen2_5_vl", AutoModelForImageTextToText),
        ("qwen3_vl", AutoModelForImageTextToText),
    ],
)
def test_channels(name: str, auto: Any, tmp_path: Path) -> None:
    """Those with the lowest scores go, layer by layer behind what went before, and nothing else changes."""
    model, naive = zoo.build(name), zoo.build(name)
    found = remove(model, Removal(mlp=0.25, multiple_of=4), samples(name))
    width = (
        naive.config.get_text_config().ffn_dim if name == "opt" else naive.config.get_text_config().intermediate_size
    )
    assert set(found.channels) == {0, 1}
    down = {"opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}.get(name, "mlp.down_proj")
    for index, gone in found.channels.items():
        layers = naive.gpt_neox.layers if name == "gpt_neox" else decoder_of(naive).layers
        matrix = layers[index].get_submodule(down)
        x = torch.cat([captured(naive, {down: matrix}, sample)[down] for sample in samples(name)]).double()
        scores = (matrix.weight.detach().double().abs() * x.norm(dim=0)).sum(dim=0)
        assert list(gone) == sorted(scores.argsort()[: width // 4].tolist())
        matrix.weight.data[:, list(gone)] = 0
    expected, own = logits(naive, name), logits(model, name)
    loaded = saved_and_loaded(model, auto, tmp_path)
    for a, b, c in zip(expected, own, logits(loaded, name), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b, c, atol=0, rtol=0)
    assert found.parameters_after == sum(p.numel() for p in loaded.parameters()) < found.parameters_before
    assert list(found.config.values()) == [width - width // 4]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "llava-qwen3"])
def test_heads_leave_in_groups(name: str, tmp_path: Path) -> None:
    model, naive = zoo.build(name), zoo.build(name)
    found = remove(model, Removal(heads=0.5), samples(name))
    text = model.config.get_text_config()
    assert (text.num_attention_heads, text.num_key_value_heads) == (2, 1)
    for index, gone in found.heads.items():
        scores = column_scores(naive, name, index, "self_attn.o_proj").view(2, -1).sum(dim=1)
        assert list(gone) == [int(scores.argmin())]
        weight = linears(decoder_of(naive))[index]["self_attn.o_proj"].weight
        weight.data.view(len(weight), 2, -1)[:, list(gone)] = 0
    auto = AutoModelForImageTextToText if name.startswith("llava") else AutoModelForCausalLM
    loaded = saved_and_loaded(model, auto, tmp_path)
    for a, b, c in zip(logits(naive, name), logits(model, name), logits(loaded, name), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b, c, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "auto"), [("gemma3", AutoModelForCausalLM), ("llava-llama", AutoModelForImageTextToText)]
)
def test_blocks(name: str, auto: Any, tmp_path: Path) -> None:
    model, naive = zoo.build(name, layers=4), zoo.build(name, layers=4)
    stream = []
    for index, layer in enumerate(decoder_of(naive).layers):
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].double()))
        logits(naive, name)
        handle.remove()
        written = sum(column_scores(naive, name, index, p).sum() for p in ("self_attn.o_proj", "mlp.down_proj"))
        stream.append(float(written / torch.cat(seen).norm()))
    found = remove(model, Removal(blocks=1), samples(name))
    gone = stream.index(min(stream))
    assert found.blocks == (gone,)
    kept = [layer for index, layer in enumerate(decoder_of(naive).layers) if index != gone]
    inner = decoder_of(naive)
    inner.layers = torch.nn.ModuleList(kept)
    inner.config.num_hidden_layers = 3
    if getattr(inner.config, "layer_types", None):
        inner.config.layer_types = [kind for index, kind in enumerate(inner.config.layer_types) if index != gone]
    loaded = saved_and_loaded(model, auto, tmp_path)
    for a, b, c in zip(logits(naive, name), logits(model, name), logits(loaded, name), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
        torch.testing.assert_close(b, c, atol=0, rtol=0)
    generated = [each.generate(**samples(name)[0], max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*generated)


def test_all_at_once(tmp_path: Path) -> None:
    """A host through alula's own loader, probed, pruned and tuned like any other."""
    path = tmp_path / "smaller"
    decoder = tiny.decoder("qwen3", num_hidden_layers=4)
    model, processor = alula.build_host(decoder, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    inputs = [processor(text="what do you see?", return_tensors="pt")]
    removal = Removal(mlp=0.3, heads=0.5, blocks=1, method="wanda")
    found = remove(model.to(torch.bfloat16), removal, inputs)
    assert len(found.channels) == len(found.heads) == 3
    alula.save_host((model, processor), path)
    loaded = alula.load_model(path).model
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.config.text_config.to_dict()["num_hidden_layers"] == 3
    assert find_mask(loaded, WeightPruning(sparsity=0.5), inputs).sparsity > 0.4
    graft = alula.attach(loaded, alula.WingsConfig(rank=4))
    loaded(**inputs[0])
    graft.detach()


def test_magnitude_needs_no_data() -> None:
    model = zoo.build("llama")
    expected = decoder_of(model).layers[1].mlp.down_proj.weight.abs().sum(dim=0).argsort()[:8].sort().values
    found = remove(model, Removal(mlp=0.25, method="magnitude"))  # 12 of 48, but those left are a multiple of 8
    assert list(found.channels[1]) == expected.tolist()


def test_a_share_is_not_a_part_less_than_it_says() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4
    )  # fmt: skip
    found = remove(LlamaForCausalLM(config), Removal(mlp=0.29, multiple_of=1, method="magnitude"))
    assert len(found.channels[0]) == 29


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, inputs = zoo.build("llama", layers=4), samples("llama")
    with torch.no_grad():
        decoder_of(model).layers[3].mlp.down_proj.weight[0, 0] = float("inf")
    before, config = state(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(DataError, match=r"layers\.3\.mlp\.down_proj has weights that are not finite"):
        remove(model, Removal(mlp=0.25), inputs)
    assert same(before, state(model))
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({"mlp": 0.01}, "nothing would be removed"),
        ({"mlp": 0.1}, "0, 8 at a time"),
        ({"heads": 0.3}, "nothing would be removed"),
        ({"blocks": 2}, "nothing would be left"),
    ],
)
def test_counts_that_cannot_be(removal: Any, message: str) -> None:
    model = zoo.build("llama")
    before = state(model)
    with pytest.raises(UsageError, match=message):
        remove(model, Removal(**removal), samples("llama"))
    assert same(before, state(model))


def test_calls_that_mean_nothing() -> None:
    model = zoo.build("llama")
    with pytest.raises(UsageError, match="nothing is to be removed"):
        Removal()
    with pytest.raises(UsageError, match="mlp removes none"):
        Removal(heads=0.5, multiple_of=64)
    with pytest.raises(UsageError, match="looks at no tokens"):
        Removal(mlp=0.5, method="magnitude", tokens="text")
    with pytest.raises(UsageError, match="needs calibration data"):
        remove(model, Removal(mlp=0.5))
    with pytest.raises(UsageError, match="looks at no data"):
        remove(model, Removal(mlp=0.5, method="magnitude"), samples("llama"))
    with Overlap().on(model), pytest.raises(UsageError, match="something is attached"):
        remove(model, Removal(mlp=0.5), samples("llama"))


@pytest.mark.parametrize(
    ("name", "removal", "message"),
    [
        ("phi3", {"mlp": 0.5}, "not of single matrices"),
        ("phi3", {"heads": 0.5}, r"no self_attn\.q_proj in every layer"),
        ("qwen3_moe", {"mlp": 0.5}, "not of single matrices"),
        ("gpt2", {"blocks": 1}, "not of single matrices"),
        ("olmo2", {"heads": 0.5}, "looks at all heads together"),
        ("qwen2_5_vl", {"heads": 0.5}, "cannot say the new sizes"),
        ("opt", {"heads": 0.5}, "cannot say the new sizes"),
        ("qwen3_vl", {"blocks": 1}, "numbers its layers"),
    ],
)
def test_hosts_that_cannot_be_made_smaller_so(name: str, removal: Any, message: str) -> None:
    model = zoo.build(name)
    before = state(model)
    with pytest.raises(HostError, match=message):
        remove(model, Removal(**removal), samples(name))
    assert same(before, state(model))


def test_numbers_of_heads_that_a_class_refuses() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(HostError, match=r"cannot say the new sizes(.|\n)*\[1, 2\] key heads left"):
        remove(model, Removal(heads=0.25), samples("llama"))


def test_adapters_come_off_first() -> None:
    adapted = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(HostError, match="is inside an adapter"):
        remove(adapted, Removal(mlp=0.5), samples("llama"))
