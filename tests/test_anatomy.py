"""Anatomy: every host of the matrix gives up its parts; the rest is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.tokens import Modality
from tests import zoo


@pytest.mark.parametrize("name", zoo.ALL)
def test_parts_of_every_host(name: str) -> None:
    model = zoo.build(name)
    anatomy = Anatomy.of(model)
    assert anatomy.host is model
    assert anatomy.num_layers == 2
    assert anatomy.hidden_size == 32
    assert anatomy.embeddings is model.get_input_embeddings()
    assert anatomy.head is model.get_output_embeddings()
    assert isinstance(anatomy.final_norm, nn.Module)
    parts = {id(anatomy.layers[0].get_submodule(n)) for n, _ in anatomy.layers[0].named_modules() if n}
    for part in ("attention", "attention_out", "mlp", "mlp_out", "attention_norm", "mlp_norm"):
        if getattr(anatomy.family, part) is None:
            with pytest.raises(HostError, match=r"no norm of its own|no MLP module"):
                getattr(anatomy, part)(0)
        else:
            assert id(getattr(anatomy, part)(0)) in parts
    q_width = anatomy.num_heads * anatomy.head_dim
    assert any(
        p.shape[0] in (q_width, q_width + 2 * anatomy.num_kv_heads * anatomy.head_dim)
        for p in anatomy.attention(0).parameters()
    )
    if name in zoo.HOSTS:
        assert isinstance(anatomy.tower, nn.Module)
        assert anatomy.placeholders[Modality.IMAGE] == zoo.IMAGE
    else:
        assert anatomy.tower is None
        assert anatomy.placeholders == {}
    assert (anatomy.projector is not None) == name.startswith("llava")


@pytest.mark.parametrize("name", zoo.ALL)
def test_what_joins_the_stream_adds_up_to_the_block(name: str) -> None:
    """block output = block input + attention_out + mlp_out: the parts named are the parts that act."""
    model = zoo.build(name)
    anatomy, seen = Anatomy.of(model), {}

    def keep(key: str):
        def hook(module, args, output):
            seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    def enter(module, args, kwargs):
        seen["input"] = args[0] if args else kwargs["hidden_states"]

    anatomy.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    anatomy.layers[0].register_forward_hook(keep("output"))
    anatomy.attention_out(0).register_forward_hook(keep("attention"))
    anatomy.mlp_out(0).register_forward_hook(keep("mlp"))
    with torch.no_grad():
        model(**zoo.batch(name, "3I4" if name in zoo.HOSTS else "9"))
    total = seen["input"] + seen["attention"] + seen["mlp"].view_as(seen["input"])
    torch.testing.assert_close(total, seen["output"], atol=1e-5, rtol=1e-5)


def test_peft_wrappers_are_looked_through() -> None:
    model = zoo.build("llava-llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert Anatomy.of(wrapped).host is model


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BloomForCausalLM, BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)),
        (
            FalconForCausalLM,
            FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        ),
        (MptForCausalLM, MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2)),
    ],
)
def test_unsupported_hosts_are_named(cls: type, config: object) -> None:
    with pytest.raises(
        HostError, match=rf"{cls.__name__}.*does not go through transformers' attention interface"
    ) as caught:
        Anatomy.of(cls(config))
    assert "layers like those of Llama" in str(caught.value.remedy)


def test_something_that_is_no_model_is_named() -> None:
    with pytest.raises(HostError, match="Linear is not a transformers model"):
        Anatomy.of(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["llava-llama", "qwen2_5_vl"])
def test_rows_per_item(name: str) -> None:
    anatomy = Anatomy.of(zoo.build(name))
    inputs = zoo.pixels(name, 3)
    assert anatomy.tokens_per_item(inputs, torch.ones(3, 4)) == [4, 4, 4]
    assert anatomy.tokens_per_item(inputs, torch.ones(1, 13)) is None
    assert anatomy.tokens_per_item({}, torch.ones(3, 4)) is None


def test_layer_indices_are_counted_from_either_end_and_others_refused() -> None:
    anatomy = Anatomy.of(zoo.build("llama"))
    count = anatomy.num_layers
    assert anatomy.layer_indices() == list(range(count))
    assert anatomy.layer_indices([-1, 0]) == [count - 1, 0]
    for beyond in (count, -count - 1):
        with pytest.raises(UsageError, match=f"layer {beyond} does not exist"):
            anatomy.layer_indices([beyond])
