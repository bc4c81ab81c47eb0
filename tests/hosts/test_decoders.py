"""Every decoder that `build_host` builds a host around takes grafts, taps and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GraniteConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    MambaConfig,
)

import alula
from alula import WingsConfig
from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.hosts import Host, build_host
from alula.seam.taps import taps
from tests.grafts.common import wake
from tests.hosts import tiny

every_decoder = pytest.mark.parametrize("family", tiny.DECODERS)


def built(family: str) -> Host:
    return build_host(tiny.decoder(family), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())


def asked(host: Host, text: str = "what is it?") -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return dict(host.processor(text=["<image>" + text], images=[Image.fromarray(noise)], return_tensors="pt"))


@every_decoder
@torch.no_grad()
def test_wings_decode_as_without_a_cache_and_leave_text_its_bits(family: str) -> None:
    host = built(family)
    model: Any = host.model.eval()
    images = asked(host)
    text = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    before, plain = model(**images).logits, model(**text).logits
    wake(alula.attach(model, WingsConfig(rank=4)))
    whole = model(**images).logits
    assert (whole - before).abs().max() > 1e-3
    assert torch.equal(model(**text).logits, plain)

    length = images["input_ids"].shape[1]
    first = model(
        **{
            **images,
            "input_ids": images["input_ids"][:, : length - 3],
            "attention_mask": images["attention_mask"][:, : length - 3],
        },
        use_cache=True,
    )
    steps, cache = [first.logits], first.past_key_values
    for at in range(length - 3, length):
        step = model(
            input_ids=images["input_ids"][:, at : at + 1],
            attention_mask=images["attention_mask"][:, : at + 1],
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=2e-5, rtol=1e-4)


@every_decoder
@torch.no_grad()
def test_taps_read_what_the_stream_is_made_of(family: str) -> None:
    host = built(family)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    points = ["block_input", "attention", "mlp", "block_output"]
    with taps(host.model, points, lambda event: seen.update({(event.layer, str(event.point)): event.hidden})):
        host.model(**asked(host))
    for layer in range(Anatomy.of(host.model).num_layers):
        inside, attention, mlp, out = (seen[layer, point] for point in points)
        torch.testing.assert_close(inside + attention + mlp, out, atol=1e-5, rtol=1e-4)


@every_decoder
def test_one_step_moves_the_graft_and_nothing_else(family: str) -> None:
    host = built(family)
    model: Any = host.model.train()
    graft = wake(alula.attach(model, WingsConfig(rank=4)))
    own = {id(parameter) for parameter in graft.parameters()}
    model.requires_grad_(False)
    for parameter in graft.parameters():
        parameter.requires_grad_(True)
    before = [parameter.detach().clone() for parameter in graft.parameters()]
    optimizer = torch.optim.SGD(graft.parameters(), lr=0.1)
    inputs = asked(host)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert any(not torch.equal(now, then) for now, then in zip(graft.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in own)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GraniteMoeConfig(**tiny.GROUPED, vocab_size=64), "layer 0 consists of block_sparse_moe, input_layernorm"),
        (JetMoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "layer 0 consists of input_layernorm, mlp"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "layer 0 consists of mixer, norm"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_decoders_that_are_put_together_otherwise_are_refused(config: Any, said: str) -> None:
    with pytest.raises(HostError, match=said):
        Anatomy.of(AutoModelForCausalLM.from_config(config))


def test_an_encoder_and_a_decoder_are_refused_by_that_reason() -> None:
    shape: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=32, **shape))
    with pytest.raises(HostError, match="it is an encoder and a decoder: what it sees reaches its layers by cross-att"):
        Anatomy.of(model)


def test_a_decoder_like_any_other_is_known_by_its_structure() -> None:
    plain = AutoModelForCausalLM.from_config(GraniteConfig(**tiny.GROUPED, vocab_size=64, residual_multiplier=1.0))
    assert Anatomy.of(plain).num_layers == 2


class Angles(nn.Module):
    """Rotary tables in which the angles stand as `layout` puts them."""

    def __init__(self, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, hidden: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = self.layout(places[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001]))
        return angles.cos(), angles.sin()


def test_angles_in_pairs_are_told_and_handed_out_in_halves() -> None:
    model = tiny.decoder("llama")
    halves, pairs = Angles(lambda it: torch.cat([it, it], -1)), Angles(lambda it: it.repeat_interleave(2, -1))
    places = torch.arange(5)[None]
    for rotary in (halves, pairs):
        model.model.rotary_emb = rotary
        told = Anatomy.of(model).rope(rotary(torch.zeros(1), places))
        assert told is not None
        for table, expected in zip(told, halves(torch.zeros(1), places), strict=True):
            assert torch.equal(table, expected)


def test_other_angles_are_refused() -> None:
    model = tiny.decoder("llama")
    model.model.rotary_emb = Angles(lambda it: torch.cat([it, 2 * it], -1))
    with pytest.raises(HostError, match="neither in two equal halves nor in pairs"):
        Anatomy.of(model)
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(HostError, match="in a way of their own"):
        Anatomy.of(model)


@every_decoder
@torch.no_grad()
def test_padding_beside_a_sample_changes_nothing(family: str) -> None:
    host = built(family)
    model: Any = host.model.eval()
    wake(alula.attach(model, WingsConfig(rank=4)))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    host.processor.tokenizer.padding_side = "left"
    texts = ["<image>what is it?", "<image>what do you see left of the blue circle?"]
    image = Image.fromarray(noise)
    both = host.processor(text=texts, images=[image, image], padding=True, return_tensors="pt")
    alone = host.processor(text=texts[:1], images=[image], return_tensors="pt")
    length = alone["input_ids"].shape[1]
    assert length < both["input_ids"].shape[1]
    places = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # absolute positions do not count padding
    padded = model(**both, position_ids=places).logits[0, -length:]
    torch.testing.assert_close(padded, model(**alone).logits[0], atol=2e-5, rtol=1e-4)
