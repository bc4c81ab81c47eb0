"""Decoders that differ from Llama in more than names: sinks, dropped keywords, hybrids, factors, other angles."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import alula
from alula import ExpertsConfig, WingsConfig
from alula.anatomy import Anatomy
from alula.errors import HostError
from alula.policies import Skip, Withdraw
from alula.probes import AttentionShift, Overlap
from alula.seam import LayerView, Phase, Point, install
from alula.tokens import TokenMap
from tests.grafts.common import wake

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ONE_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
_CONFIGS: dict[str, Any] = {
    "gpt_oss": lambda: hf.GptOssConfig(
        **_COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **_ONE_WINDOW
    ),
    "nemotron": lambda: hf.NemotronConfig(**_COMMON),
    "stablelm": lambda: hf.StableLmConfig(**_COMMON, use_parallel_residual=True),
    "lfm2": lambda: hf.Lfm2Config(**_COMMON, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    "granite": lambda: hf.GraniteConfig(**_COMMON, residual_multiplier=0.22, logits_scaling=4.0),
    "gemma4_text": lambda: hf.Gemma4TextConfig(
        **_COMMON, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0, num_kv_shared_layers=0, **_ONE_WINDOW
    ),
    "llama4_text": lambda: hf.Llama4TextConfig(
        **_COMMON,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        moe_layers=[1],
    ),
    "cohere2": lambda: hf.Cohere2Config(**_COMMON, **_ONE_WINDOW),
    "glm": lambda: hf.GlmConfig(**_COMMON, head_dim=8),
    "helium": lambda: hf.HeliumConfig(**_COMMON, head_dim=8),
}
IDS = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
IMAGES = torch.zeros_like(IDS)
IMAGES[:, 5:8] = 1
PROMPT = {"input_ids": IDS, "attention_mask": MASK}


def built(name: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(_CONFIGS[name](), attn_implementation=attention)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.dim() > 1 else None
    for layer in Anatomy.of(model).layers:
        if hasattr(layer, "layer_scalar"):
            layer.layer_scalar.fill_(0.5)
    return model.eval()


@torch.no_grad()
def asked(model: Any, **more: Any) -> Tensor:
    return model(**{**PROMPT, **more}).logits


def seeing() -> dict[str, TokenMap]:
    return {"token_map": TokenMap.from_modalities(IMAGES, MASK)}


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron", "stablelm", "lfm2", "granite", "gemma4_text", "llama4_text"])
@torch.no_grad()
def test_wings_keep_every_promise(name: str) -> None:
    model = built(name)
    before, text = asked(model), {"token_map": TokenMap.from_modalities(torch.zeros_like(IDS), MASK)}
    graft = alula.attach(model, WingsConfig(rank=4, router="mass"))
    torch.testing.assert_close(asked(model, **seeing()), before, atol=1e-5, rtol=1e-4)  # fresh
    wake(graft)
    assert torch.equal(asked(model, **text), before)
    heard = asked(model, **seeing())
    assert not torch.allclose(heard[0, 8:], before[0, 8:], atol=1e-3)
    alone = model(input_ids=IDS[1:, 3:], token_map=TokenMap.from_modalities(IMAGES[1:, 3:])).logits
    torch.testing.assert_close(heard[1:, 3:], alone, atol=1e-4, rtol=1e-3)  # of the padding beside it it knows nothing
    first = model(
        input_ids=IDS[:, :10], attention_mask=MASK[:, :10], use_cache=True, token_map=_cut(seeing()["token_map"])
    )
    later = model(input_ids=IDS[:, 10:], attention_mask=MASK, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(
        torch.cat([first.logits, later], 1)[MASK.bool()], heard[MASK.bool()], atol=1e-4, rtol=1e-3
    )
    alula.detach(model)
    assert torch.equal(asked(model), before)


def _cut(tokens: TokenMap) -> TokenMap:
    return tokens.pick(torch.arange(10).expand(2, -1))


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron", "gemma4_text", "lfm2"])
@torch.no_grad()
def test_sums_of_attention_are_those_of_the_weights_that_the_host_hands_out(name: str) -> None:
    weights = built(name, "eager")(**PROMPT, output_attentions=True).attentions
    model = built(name)
    before = asked(model)

    class Sums:
        separate_pass = True
        found: dict[int, Tensor] = {}  # noqa: RUF012

        def key_values(self, view: LayerView) -> Tensor:
            return IMAGES[..., None].float()

        def on_sums(self, view: LayerView, sums: Tensor) -> None:
            self.found[view.layer] = sums

    seam = install(model, "sums")
    attended = Anatomy.of(model).attended
    handles = [seam.request_sums(layer, Sums()) for layer in attended]
    torch.testing.assert_close(asked(model), before, atol=0, rtol=0)
    for handle in handles:
        handle.remove()
    seam.release("sums")
    for layer, of_layer in zip(attended, weights[-len(attended) :], strict=True):
        expected = (of_layer * IMAGES[:, None, None]).sum(-1).transpose(1, 2)
        got = Sums.found[layer][..., 0]
        torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-4)
    if name == "gpt_oss":  # the sink has the rest
        assert float(weights[0].sum(-1)[MASK.bool()[:, None].expand(-1, 4, -1)].mean()) < 0.95


@pytest.mark.parametrize("name", ["granite", "gemma4_text"])
@torch.no_grad()
def test_points_show_what_halves_add_before_the_factors_of_their_layer(name: str) -> None:
    model, seen = built(name), dict[str, Tensor]()
    seam = install(model, "test")
    for point in (Point.BLOCK_INPUT, Point.ATTENTION, Point.MLP, Point.BLOCK_OUTPUT):
        seam.on(point, 1, lambda _, hidden, at=str(point): seen.update({at: hidden}), phase=Phase.READ, owner="test")
    asked(model)
    each, whole = (0.22, 1.0) if name == "granite" else (1.0, 0.5)
    total = whole * (seen["block_input"] + each * (seen["attention"] + seen["mlp"]))
    torch.testing.assert_close(seen["block_output"], total, atol=1e-5, rtol=1e-4)


def test_a_hybrid_is_served_in_the_layers_that_have_attention() -> None:
    model = built("lfm2")
    assert Anatomy.of(model).attended == (1,)
    assert sorted(alula.attach(model, WingsConfig(rank=2)).layers) == [1]
    alula.detach(model)
    with pytest.raises(HostError, match="decoder layer 0 has no attention: conv stands in its place") as caught:
        alula.attach(model, WingsConfig(rank=2, layers=(0, 1)))
    assert "layers=1" in str(caught.value.remedy)
    with pytest.raises(HostError, match="layer 0 has no attention"), Skip(part="mlp", layers=(0,)).on(model):
        asked(model)
    assert not hasattr(model, "alula")
    before = asked(model)
    with Withdraw(layer=1).on(model):
        assert not torch.allclose(asked(model, **seeing()), before, atol=1e-3)
    graft = alula.attach(model, ExpertsConfig(rank=2, targets=("mlp",)))
    assert {path.split("__")[0] for path in graft.layers[0].experts} == {"feed_forward"}
    alula.detach(model)
    probe = AttentionShift()
    with probe.on(model):
        asked(model, **seeing())
    assert len(probe.result().curves["main"]["image"]) == 1


@torch.no_grad()
def test_an_mlp_that_hands_out_more_than_it_adds_may_add_nothing() -> None:
    for name in ("gpt_oss", "llama4_text"):
        model = built(name)
        with Skip(part="mlp", layers=(1,), tokens="all").on(model):
            skipped = asked(model, **seeing())
        seam = install(model, "test")
        seam.on(Point.MLP, 1, lambda _, hidden: torch.zeros_like(hidden), phase=Phase.EDIT, owner="test")
        torch.testing.assert_close(skipped, asked(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["glm", "helium", "cohere2", "llama4_text", "gpt_oss", "gemma4_text"])
@torch.no_grad()
def test_angles_in_halves_turn_as_the_hosts_own_do(name: str) -> None:
    """Queries as the host turns them against queries turned by halves: where it turns neighbors, in another order."""
    model = built(name)
    anatomy, heads = Anatomy.of(model), torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    given = anatomy.rope_at(1, torch.arange(7)[None], torch.zeros(1, 7, 32))
    module: Any = import_module(type(model).__module__)
    tables = anatomy.rope(given)
    assert tables is not None
    width = tables[0].shape[-1]
    heads = torch.randn(1, 2, 7, max(width, 8), generator=torch.Generator().manual_seed(0))
    if isinstance(given, Tensor):
        theirs = module.apply_rotary_emb(heads.transpose(1, 2), heads.transpose(1, 2), given)[0].transpose(1, 2)
    elif name == "gemma4_text":
        theirs = module.apply_rotary_pos_emb(heads, *given)
    else:
        theirs = module.apply_rotary_pos_emb(heads, heads, *given)[0]
    turned, rest = heads[..., :width], heads[..., width:]
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    order = order if anatomy.turns_neighbors else torch.arange(width)
    one, other = turned[..., order].chunk(2, -1)
    (cos, _), (sin, _) = (table[:, None].chunk(2, -1) for table in tables)
    ours = torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
    torch.testing.assert_close(
        torch.cat([theirs[..., :width][..., order], theirs[..., width:]], -1), torch.cat([ours, rest], -1)
    )


def test_what_lacks_tokens_or_hands_on_keys_is_refused_by_that_reason() -> None:
    layers = {"num_hidden_layers": 4, "layer_types": _ONE_WINDOW["layer_types"] * 2, "num_kv_shared_layers": 2}
    shared = hf.Gemma4TextConfig(**{**_COMMON, **layers}, head_dim=8, hidden_size_per_layer_input=0)
    with torch.device("meta"), pytest.raises(HostError, match="attend to the keys of earlier ones"):
        Anatomy.of(hf.AutoModelForCausalLM.from_config(shared))
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**_COMMON, "cross_attention_layers": [1]}
    with torch.device("meta"):
        mllama = hf.MllamaForConditionalGeneration(
            hf.MllamaConfig(vision_config={**vision, "num_global_layers": 1}, text_config=text)
        )
    with (
        pytest.raises(HostError, match="cross-attention: what it sees reaches its layers by cross-att") as caught,
        Overlap().on(mllama),
    ):
        raise AssertionError("it was served")
    assert "all probes (none needs less)" in str(caught.value.remedy)
