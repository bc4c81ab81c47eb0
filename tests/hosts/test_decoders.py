"""Every decoder that `build_host` builds a host around takes grafts, taps and a step of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GptOssConfig, GraniteConfig, MambaConfig

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
        (GraniteConfig(**tiny.GROUPED, vocab_size=64, residual_multiplier=0.22), "has residual_multiplier beside"),
        (GptOssConfig(**tiny.GROUPED, vocab_size=64, num_local_experts=2), "has sinks beside"),
        (CohereConfig(**tiny.GROUPED, vocab_size=64), "layer 0 consists of input_layernorm, mlp, self_attn"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "attention interface"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_decoders_that_are_put_together_otherwise_are_refused(config: Any, said: str) -> None:
    with pytest.raises(HostError, match=said):
        Anatomy.of(AutoModelForCausalLM.from_config(config))


def test_a_decoder_like_any_other_is_known_by_its_structure() -> None:
    plain = AutoModelForCausalLM.from_config(GraniteConfig(**tiny.GROUPED, vocab_size=64, residual_multiplier=1.0))
    assert Anatomy.of(plain).num_layers == 2


def test_angles_that_do_not_come_in_halves_are_refused() -> None:
    model = tiny.decoder("llama")

    class Interleaved(nn.Module):
        def forward(self, hidden: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = (places[..., None] * torch.tensor([1.0, 0.1, 0.01, 0.001])).repeat_interleave(2, dim=-1)
            return angles.cos(), angles.sin()

    Anatomy.of(model)
    model.model.rotary_emb = Interleaved()
    with pytest.raises(HostError, match="two equal halves"):
        Anatomy.of(model)
