"""Grafts in training: gradients, checkpointing, half precision, LoRA beside them, compiled decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import alula
from alula import TokenMap, WingsConfig
from alula.errors import AlulaError
from alula.grafts.wings import LoRRA
from alula.seam.dialect import cache_keyword, cache_of_output
from tests import zoo
from tests.grafts.common import CONFIGS, covering, grafted, run, token_map, wake

CACHE = cache_keyword()

LAYOUTS = ("3I4", "6", "I2I1")


def _loss(model: Any, host: str, inputs: dict[str, Tensor]) -> Tensor:
    """Next-token loss in the model's own precision (transformers' own goes through float32)."""
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids >= 57), -100)[:, 1:]
    options = {"token_map": token_map(inputs)} if host in zoo.TEXT else {}
    logits = model(**inputs, **options, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _gradients(model: Any, graft: Any, host: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, host, inputs).backward()
    return {name: p.grad.clone() for name, p in graft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False], ids=["host frozen", "host trained"])
@pytest.mark.parametrize(("host", "config"), covering(("llama", "gemma2", *zoo.HOSTS), list(CONFIGS)))
def test_checkpointed_gradients_equal_plain_ones(host: str, config: str, frozen: bool) -> None:
    model, graft = grafted(host, config)
    model.requires_grad_(not frozen)
    for parameter in graft.parameters():
        parameter.requires_grad_(True)
    model.train()
    inputs = zoo.batch(host, *LAYOUTS, side="right")
    plain = _gradients(model, graft, host, inputs)
    assert plain.keys() == dict(graft.named_parameters()).keys()
    # where a learner's softmax is saturated (Gemma scales its input tokens up), queries and keys may get exactly 0
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if ".q." not in name and ".k." not in name)
    model.gradient_checkpointing_enable()
    recomputed = _gradients(model, graft, host, inputs)
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_reentrant_checkpointing_is_refused() -> None:
    model, _ = grafted("llava-llama", "mass")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(AlulaError, match="reentrant"):
        _loss(model, "llava-llama", zoo.batch("llava-llama", "3I4"))


@pytest.mark.parametrize(
    ("host", "config"), [("llama", "mass"), ("llava-gemma3", "attention"), ("qwen2_5_vl", "paper")]
)
def test_gradients_equal_finite_differences(host: str, config: str) -> None:
    model, graft = grafted(host, config)
    model.double()
    inputs = zoo.batch(host, "2I2")
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    gradients = _gradients(model, graft, host, inputs)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in graft.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        step, losses = 2e-3, []  # the host's norms go through float32, so smaller steps drown in rounding
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                losses.append(_loss(model, host, inputs))
                parameter.sub_(sign * step * direction)
        numeric = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((gradients[name] * direction).sum(), numeric, atol=3e-4, rtol=1e-2)


@pytest.mark.parametrize("head_dim", [2, 4], ids=["values written out", "values never made"])
def test_learner_gradients_equal_finite_differences_in_float64(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    module = LoRRA(8, head_dim, 2, dtype=torch.float64)
    parameters = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    query, keys = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    counts = torch.tensor([[0, 2, 5], [1, 3, 4]])

    def call(query: Tensor, keys: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (query, keys, counts))

    inputs = [x.requires_grad_(True) for x in (query, keys, *parameters)]
    assert torch.autograd.gradcheck(call, inputs, atol=1e-6)


def test_a_fresh_graft_learns_from_its_first_step() -> None:
    model = zoo.build("llava-llama").train()
    graft = alula.attach(model, CONFIGS["mass"])
    inputs = zoo.batch("llava-llama", *LAYOUTS, side="right")
    gradients = _gradients(model, graft, "llava-llama", inputs)
    assert all(gradients[name].abs().max() > 0 for name in gradients if name.endswith("visual.o.up"))
    model.requires_grad_(False)
    for parameter in graft.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(graft.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = _loss(model, "llava-llama", inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_batch_of_text_has_a_backward() -> None:
    """Nothing is active and nothing breaks: the loss has a graph through the host alone."""
    model, graft = grafted("llava-llama", "mass")
    model.train()
    assert _gradients(model, graft, "llava-llama", zoo.batch("llava-llama", "5", "7", side="right")) == {}


def test_dropout_is_for_training_only() -> None:
    settings = alula.WingsConfig(rank=4, dropout=0.5)
    model, _ = grafted("llava-llama", settings)
    inputs = zoo.batch("llava-llama", "3I4")
    quiet = run(model, "llava-llama", inputs)
    assert torch.equal(run(model, "llava-llama", inputs), quiet)
    model.train()
    assert not torch.equal(run(model, "llava-llama", inputs), run(model, "llava-llama", inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("host", "config"), covering(("llama", "gemma2", *zoo.HOSTS), list(CONFIGS), each=2))
def test_half_precision_hosts(host: str, config: str, dtype: torch.dtype) -> None:
    """A half-precision host keeps a float32 graft; results are those of float32 up to that precision."""
    model, _ = grafted(host, config)
    inputs = zoo.batch(host, *LAYOUTS)
    exact = run(model, host, inputs)
    half = zoo.build(host).to(dtype)
    graft = wake(alula.attach(half, CONFIGS[config]))
    assert {p.dtype for p in graft.parameters()} == {torch.float32}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    out = run(half, host, inputs)
    assert out.dtype == dtype
    valid = inputs["attention_mask"].bool()
    error = (out.float() - exact)[valid].abs().mean() / exact[valid].abs().mean()
    assert error < (0.06 if dtype == torch.bfloat16 else 0.01)
    half.to(torch.float32)
    assert torch.isfinite(run(half, host, zoo.batch(host, *LAYOUTS))[valid]).all()


@pytest.mark.parametrize("config", ["mass", "paper"])
def test_autocast(config: str) -> None:
    model, graft = grafted("llava-llama", config)
    model.train()
    inputs = zoo.batch("llava-llama", *LAYOUTS, side="right")
    plain = _gradients(model, graft, "llava-llama", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _gradients(model, graft, "llava-llama", inputs)
    for name, gradient in plain.items():
        assert torch.cosine_similarity(gradient.flatten(), mixed[name].flatten(), dim=0) > 0.97, name


class TestLora:
    def _lora(self, model: Any) -> Any:
        torch.manual_seed(2)
        wrapped = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8, init_lora_weights=False)
        )
        return wrapped.eval()

    @pytest.mark.parametrize("host", ["llama", "gemma3", "llava-qwen3", "qwen2_5_vl"])
    def test_order_does_not_matter(self, host: str) -> None:
        inputs = zoo.batch(host, *LAYOUTS)
        first = self._lora(zoo.build(host))
        wake(alula.attach(first, CONFIGS["mass"]))
        second, _ = grafted(host, "mass")
        second = self._lora(second)
        torch.testing.assert_close(run(first, host, inputs), run(second, host, inputs))
        assert not torch.allclose(run(first, host, inputs), run(grafted(host, "mass")[0], host, inputs), atol=1e-2)

    def test_each_comes_off_without_the_other(self) -> None:
        host = "llava-llama"
        inputs = zoo.batch(host, *LAYOUTS)
        plain = run(zoo.build(host), host, inputs)
        model = self._lora(zoo.build(host))
        lora_only = run(model, host, inputs)
        wake(alula.attach(model, CONFIGS["mass"]))
        with model.disable_adapter():
            torch.testing.assert_close(run(model, host, inputs), run(grafted(host, "mass")[0], host, inputs))
        alula.detach(model)
        assert torch.equal(run(model, host, inputs), lora_only)
        wake(alula.attach(model, CONFIGS["mass"]))
        bare = model.unload()
        torch.testing.assert_close(run(bare, host, inputs), run(grafted(host, "mass")[0], host, inputs))
        alula.detach(bare)
        assert torch.equal(run(bare, host, inputs), plain)

    def test_both_train_and_generate(self) -> None:
        host = "llava-llama"
        model, graft = grafted(host, "mass")
        model = self._lora(model).train()
        for parameter in graft.parameters():
            parameter.requires_grad_(True)
        inputs = zoo.batch(host, *LAYOUTS, side="right")
        gradients = _gradients(model, graft, host, inputs)
        assert gradients.keys() == dict(graft.named_parameters()).keys()
        lora = [p for n, p in model.named_parameters() if "lora_" in n and "language_model" in n]
        assert lora
        assert all(p.grad is not None for p in lora)
        model.eval()
        left = zoo.batch(host, *LAYOUTS)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**left, **options), model.generate(**left, **options, use_cache=False))

    def test_lora_does_not_find_its_way_into_the_graft(self) -> None:
        model, graft = grafted("llava-llama", "mass")
        names = [name for name, _ in graft.named_parameters()]
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        assert [name for name, _ in graft.named_parameters()] == names


def _compiled(host: str, config: str, backend: str) -> tuple[Any, Any]:
    """A grafted model and its copy with a compiled decoder."""
    model, _ = grafted(host, config)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    alula.grafts_of(twin)["wings"].seam.anatomy.decoder.compile(backend=backend)
    return model, twin


@pytest.mark.parametrize(
    ("host", "config", "backend"),
    [
        pytest.param("llava-qwen3", "attention", "aot_eager", marks=pytest.mark.slow),
        pytest.param("gemma3", "paper", "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_decoder(host: str, config: str, backend: str) -> None:
    model, twin = _compiled(host, config, backend)
    for layouts in (("3I4", "6"), ("5", "8")):
        inputs = zoo.batch(host, *layouts)
        torch.testing.assert_close(run(twin, host, inputs), run(model, host, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["llava-gemma3", "qwen2_5_vl"])
def test_a_compiled_host(host: str) -> None:
    """The whole of it, with the merging of images and the seam's bookkeeping inside what is compiled."""
    model, _ = grafted(host, "mass")
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    for layouts in (("3I4", "I2I1"), ("5",)):
        inputs = zoo.batch(host, *layouts)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_gradients_through_a_compiled_decoder() -> None:
    host = "llava-llama"
    models = _compiled(host, "mass", "aot_eager")
    inputs = zoo.batch(host, *LAYOUTS, side="right")
    theirs, ours = (_gradients(m.train(), alula.grafts_of(m)["wings"], host, inputs) for m in models)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_compiled_decoder_goes_on_behind_a_cache() -> None:
    """A prompt in pieces of many lengths: what grows with every piece is not compiled anew for each."""
    model, twin = _compiled("llama", "mass", "eager")
    inputs = zoo.batch("llama", "3I9II30")
    tokens = token_map(inputs)
    with torch.no_grad():
        expected = model(**inputs, token_map=tokens).logits
        cache, logits, start = None, [], 0
        for size in (9, 10, 11, 12):
            piece = slice(start, start + size)
            part = TokenMap.from_modalities(tokens.modality[:, piece])
            out = twin(input_ids=inputs["input_ids"][:, piece], **{CACHE: cache}, token_map=part)
            cache, start = cache_of_output(out), start + size
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, :start], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["1I1", "3I9"], ids=["few tokens", "many tokens"])
def test_dropout_drops_without_gradients_too(layout: str) -> None:
    model, _ = grafted("llama", WingsConfig(rank=4, dropout=0.5))
    inputs = zoo.batch("llama", layout)
    assert torch.equal(run(model, "llama", inputs), run(model, "llama", inputs))
    model.train()
    assert not torch.equal(run(model, "llama", inputs), run(model, "llama", inputs))
    model.eval()
    assert torch.equal(run(model, "llama", inputs), run(model, "llama", inputs))
