"""Numbers computed by the authors' published code (tests/golden/wings.safetensors), on a tiny Qwen1.5-shaped decoder.

Where that code and the method agree, alula's own arithmetic gives them; elsewhere `compat="published"` does. Image
features were recorded behind the projector, so they enter as input tokens, and, where the published training wants the
features of a blank image, through a LLaVA host whose projector is solved to give them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import alula
from alula import TokenMap, WingsConfig
from alula.errors import AlulaError, HostError, UsageError
from alula.grafts.wings import LoRRA
from alula.grafts.wings.learners import Angles
from alula.grafts.wings.router import PublishedRouter
from tests import zoo
from tests.grafts.common import run, true_positions, wake

GOLDEN = Path(__file__).parents[2] / "golden"
NUMBERS = load_file(GOLDEN / "wings.safetensors")
GEOMETRY = json.loads((GOLDEN / "wings.json").read_text())["geometry"]
IMAGE_TOKENS, HEADS = GEOMETRY["image_tokens"], GEOMETRY["heads"]
HEAD_DIM = GEOMETRY["hidden"] // HEADS
PLACEHOLDER = -200
PUBLISHED = WingsConfig(compat="published", rank=GEOMETRY["lora_dim"], system_tokens=GEOMETRY["system_prompt_length"])
STAGE_1 = WingsConfig(compat="published", rank=GEOMETRY["lora_dim"], learners=("visual",))
TEXT = WingsConfig(rank=GEOMETRY["lora_dim"], learners=("textual",), gate="paper")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def angles(position: Tensor) -> Angles:
    """RoPE angles of (B, tokens) positions, base `rope_theta`."""
    frequencies = GEOMETRY["rope_theta"] ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    table = (position[..., None] * frequencies).repeat(1, 1, 2)
    return Angles.of(table.cos(), table.sin())


def weights(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}/w."): v for k, v in NUMBERS.items() if k.startswith(f"{prefix}/w.")}


def qwen_config(layers: int = GEOMETRY["layers"]) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=GEOMETRY["hidden"],
        num_attention_heads=HEADS,
        num_key_value_heads=GEOMETRY["kv_heads"],
        num_hidden_layers=layers,
        intermediate_size=GEOMETRY["ffn"],
        vocab_size=GEOMETRY["vocab"],
        rope_theta=GEOMETRY["rope_theta"],
        rms_norm_eps=GEOMETRY["rms_eps"],
        tie_word_embeddings=False,
        pad_token_id=None,
    )


def graft_weights(stored: dict[str, Tensor], settings: WingsConfig) -> dict[str, Tensor]:
    """The published names of a graft's weights, under ours."""
    found = {}
    for name, value in stored.items():
        learner = "visual" if ".attn_pool." in name else "textual" if ".attn_t_pool." in name else None
        if learner in settings.learners:
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            _, projection, factor, _ = rest.split(".")
            found[f"layers.{layer}.{learner}.{projection[0]}.{('down', 'up')[int(factor)]}"] = value
        elif ".reweight_module." in name and len(settings.learners) == 2:
            layer = name.removeprefix("model.layers.").split(".", 1)[0]
            found[f"layers.{layer}.router.{name.rsplit('.', 1)[1]}"] = value
    return found


def dress(model: Any, stored: dict[str, Tensor], settings: WingsConfig) -> Any:
    """Attach the graft and give it the recorded weights."""
    graft = alula.attach(model, settings)
    with torch.no_grad():
        graft.load_state_dict(graft_weights(stored, settings))
    return graft


def decoder(prefix: str, settings: WingsConfig) -> Any:
    stored = weights(prefix)
    model = Qwen2ForCausalLM(qwen_config()).eval()
    known = model.state_dict()
    assert known.keys() <= stored.keys()
    model.load_state_dict({name: stored[name] for name in known})
    dress(model, stored, settings)
    return model


def tokens_of(case: str, model: Any) -> tuple[Tensor, Tensor, TokenMap]:
    """(B, S, d) input tokens, (B, S) mask and map of a recorded case, right-padded."""
    embed = model.get_input_embeddings()
    samples = []
    for i in range(2):
        ids = NUMBERS.get(f"{case}/ids{i}")
        if ids is None:
            continue
        parts, kinds = [], []
        for token in ids.tolist():
            if token == PLACEHOLDER:
                parts.append(NUMBERS[f"{case}/image_features"][i])
                kinds += [1] * IMAGE_TOKENS
            else:
                parts.append(embed(torch.tensor([token])))
                kinds.append(0)
        samples.append((torch.cat(parts), torch.tensor(kinds)))
    longest = max(len(kinds) for _, kinds in samples)
    mask = torch.stack([(torch.arange(longest) < len(kinds)).long() for _, kinds in samples])
    tokens = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x, _ in samples])
    kinds = torch.stack([torch.nn.functional.pad(k, (0, longest - len(k))) for _, k in samples])
    if f"{case}/pad" in NUMBERS:
        assert torch.equal(mask, NUMBERS[f"{case}/pad"])
    return tokens, mask, TokenMap.from_modalities(kinds, mask)


# -- the parts ----------------------------------------------------------------------------------------------------


def lorra() -> LoRRA:
    module = LoRRA(GEOMETRY["hidden"], HEAD_DIM, GEOMETRY["lora_dim"])
    stored = weights("lorra")
    with torch.no_grad():
        for name in "qkvo":
            module.get_submodule(name).down.copy_(stored[f"{name}_proj.0.weight"])
            module.get_submodule(name).up.copy_(stored[f"{name}_proj.1.weight"])
    return module


@pytest.mark.parametrize("case", ["lorra_visual", "lorra_text"])
def test_lorra(case: str) -> None:
    query, keys = NUMBERS[f"{case}/query"], NUMBERS[f"{case}/kv"]
    counts = torch.full(query.shape[:2], keys.shape[1])
    if case == "lorra_text":
        counts = (NUMBERS[f"{case}/main_mask"][:, 0, :, : keys.shape[1]] == 0).sum(dim=-1)
    out = lorra()(
        query,
        keys,
        counts,
        query_angles=angles(NUMBERS[f"{case}/pos_q"].expand(len(keys), -1)),
        key_angles=angles(NUMBERS[f"{case}/pos_k"]),
    )
    close(out, NUMBERS[f"{case}/out"])


def test_published_router() -> None:
    stored, probabilities = weights("router"), NUMBERS["router/attn_probs"]
    router = PublishedRouter(GEOMETRY["router_width_module"], device=torch.device("cpu"), dtype=torch.float32)
    router.load_state_dict({"weight": stored["linear.weight"], "bias": stored["linear.bias"]})
    columns = router.key_values(TokenMap.text(2, probabilities.shape[-1]))
    sums = torch.einsum("bhqk,bkc->bqhc", probabilities, columns)
    close(router(sums), NUMBERS["router/out"])


@pytest.mark.parametrize(("case", "prefix"), [("layer", "lm/w.model.layers.0"), ("layer_lite", "layer_lite/w")])
def test_a_layer(case: str, prefix: str) -> None:
    """A decoder layer with its learners, fed with recorded hidden states and recorded features as keys."""
    hidden = NUMBERS[f"{case}/hidden_in"]
    mask = NUMBERS.get(f"{case}/pad", torch.ones(hidden.shape[:2], dtype=torch.long))
    tokens, kinds = torch.zeros_like(hidden), torch.zeros(hidden.shape[:2], dtype=torch.long)
    for name, kind in (("img", 1), ("txt", 0)):
        features = NUMBERS[f"{case}/{'image' if kind else 'text'}_features"]
        for sample, places in enumerate(NUMBERS[f"{case}/pos_{name}"]):
            tokens[sample, places], kinds[sample, places] = features[sample], kind
    model = Qwen2ForCausalLM(qwen_config()).train()
    stored = {k.removeprefix(f"{prefix}."): v for k, v in NUMBERS.items() if k.startswith(f"{prefix}.")}
    first, second = model.model.layers
    second.load_state_dict({name: stored[name] for name in second.state_dict()})
    settings = WingsConfig(
        compat="published",
        rank=GEOMETRY["lora_dim"],
        system_tokens=GEOMETRY["system_prompt_length"],
        layers=(1,),
        router_tokens=stored["reweight_module.linear.weight"].shape[1],
    )
    dress(model, {f"model.layers.1.{name}": value for name, value in stored.items()}, settings)
    first.register_forward_hook(lambda m, a, o: hidden)  # the recorded states, whatever the first layer made
    out: list[Tensor] = []
    second.register_forward_hook(lambda m, a, o: out.append(o))
    with torch.no_grad():
        model(inputs_embeds=tokens, attention_mask=mask, token_map=TokenMap.from_modalities(kinds, mask))
    valid = mask.bool()
    close(out[0][valid], NUMBERS[f"{case}/out"][valid])


# -- whole models: where the method and the published code agree ---------------------------------------------------


def test_text_without_an_image() -> None:
    """alula's own arithmetic: a textual learner, always on, alone."""
    model = decoder("lm", TEXT)
    with torch.no_grad():
        logits = model(NUMBERS["lm_textonly_infer/ids0"][None]).logits
    close(logits, NUMBERS["lm_textonly_infer/logits"])


def test_text_without_an_image_in_compat_mode() -> None:
    model = decoder("lm", PUBLISHED)
    with torch.no_grad():
        logits = model(NUMBERS["lm_textonly_infer/ids0"][None]).logits
    close(logits, NUMBERS["lm_textonly_infer/logits"])


# -- whole models: the published arithmetic -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "prefix", "settings", "training"),
    [
        ("lm_image_single", "lm", PUBLISHED, False),
        ("lm_image_single", "lm", PUBLISHED, True),
        ("lm_image_batch", "lm", PUBLISHED, True),
        ("lm_stage1", "stage1", STAGE_1, False),
        ("lm_stage1", "stage1", STAGE_1, True),
    ],
)
def test_images(case: str, prefix: str, settings: WingsConfig, training: bool) -> None:
    model = decoder(prefix, settings).train(training)
    tokens, mask, kinds = tokens_of(case, model)
    with torch.no_grad():
        logits = model(inputs_embeds=tokens, attention_mask=mask, token_map=kinds).logits
    valid = mask.bool()
    close(logits[valid], NUMBERS[f"{case}/logits"][valid])


@pytest.mark.parametrize(("case"), ["lm_image_batch", "lm_image_single"])
def test_routes(case: str) -> None:
    """The router's weights inside the model."""
    model = decoder("lm", PUBLISHED).train()
    routes = []
    for layer in model.model.layers:
        layer.alula["wings"].router.register_forward_hook(lambda m, a, o: routes.append(o))
    tokens, mask, kinds = tokens_of(case, model)
    with torch.no_grad():
        model(inputs_embeds=tokens, attention_mask=mask, token_map=kinds)
    valid = mask.bool()
    for i, route in enumerate(routes):
        close(route[valid], NUMBERS[f"{case}/route{i}"][valid])


def llava(case: str) -> tuple[Any, dict[str, Tensor], TokenMap]:
    """The recorded decoder as a LLaVA host whose projector gives the recorded features of the images.

    A random tower sees the pictures (a blank one for samples without an image); the projector's last layer is the exact
    solution of "hidden activations to recorded features".
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=qwen_config(), image_token_id=60, image_seq_length=IMAGE_TOKENS
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "position" in name else 0.1)
        model.model.multi_modal_projector.linear_1.weight.normal_(std=0.3)
    stored = weights("lm")
    text = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
    known = model.model.language_model.state_dict()
    model.model.language_model.load_state_dict({name: text[name] for name in known})
    model.lm_head.load_state_dict({"weight": stored["lm_head.weight"]})

    features = NUMBERS[f"{case}/image_features"]
    ids = [NUMBERS[f"{case}/ids{i}"].tolist() for i in range(len(features))]
    has_image = [PLACEHOLDER in sample for sample in ids]
    pictures = torch.stack([torch.randn(3, 12, 12) if has else torch.zeros(3, 12, 12) for has in has_image])
    projector = model.model.multi_modal_projector
    hidden: list[Tensor] = []
    handle = projector.act.register_forward_hook(lambda m, a, o: hidden.append(o))
    with torch.no_grad():
        model.get_image_features(pixel_values=pictures)
        handle.remove()
        solution = torch.linalg.pinv(hidden[0].flatten(0, 1).double()) @ features.flatten(0, 1).double()
        projector.linear_2.weight.copy_(solution.T)
        projector.linear_2.bias.zero_()
        made = torch.stack(list(model.get_image_features(pixel_values=pictures).pooler_output))
    torch.testing.assert_close(made, features, atol=2e-6, rtol=1e-5)

    expanded = [
        [t for token in sample for t in ([60] * IMAGE_TOKENS if token == PLACEHOLDER else [token])] for sample in ids
    ]
    longest = max(map(len, expanded))
    inputs = {
        "input_ids": torch.tensor([sample + [0] * (longest - len(sample)) for sample in expanded]),
        "attention_mask": NUMBERS[f"{case}/pad"],
    }
    if any(has_image):
        inputs["pixel_values"] = pictures[torch.tensor(has_image)]
    kinds = [[k for token in sample for k in ([1] * IMAGE_TOKENS if token == PLACEHOLDER else [0])] for sample in ids]
    tokens = torch.tensor([sample + [0] * (longest - len(sample)) for sample in kinds])
    dress(model, stored, PUBLISHED)
    return model, inputs, TokenMap.from_modalities(tokens, inputs["attention_mask"])


@pytest.mark.parametrize(
    "case", ["lm_image_single", "lm_image_batch", "lm_mixed_batch", "lm_textonly_train", "lm_textonly_train_short"]
)
def test_training_batches_through_a_llava_host(case: str) -> None:
    """Blank images, blinded queries, doubled sums: what the published training computes, from pixels on."""
    model, inputs, tokens = llava(case)
    model.train()
    mask = inputs["attention_mask"].bool()
    if (tokens.modality == 0)[inputs["input_ids"] == 60].any():
        # a recorded text happens to hold the placeholder's id: hand the tokens over as they are
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        if "pixel_values" in inputs:
            pictures = model.get_image_features(pixel_values=inputs.pop("pixel_values")).pooler_output
            embeds = embeds.masked_scatter((tokens.modality == 1)[..., None], torch.cat(list(pictures)))
        inputs["inputs_embeds"] = embeds
    with torch.no_grad():
        logits = model(**inputs, token_map=tokens).logits
    close(logits[mask], NUMBERS[f"{case}/logits"][mask])


# -- the released arithmetic as a citizen of this library -------------------------------------------------------------


def host() -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA host with released arithmetic, and a left-padded batch of an image sample and two text samples."""
    model = zoo.build("llava-qwen2")
    graft = wake(alula.attach(model, WingsConfig(compat="published", rank=4, system_tokens=2, router_tokens=64)))
    assert graft.config.router == "attention"
    return model, zoo.batch("llava-qwen2", "5I4", "7", "12")


def test_evaluation_does_not_depend_on_the_batch() -> None:
    model, inputs = host()
    together = run(model, "llava-qwen2", inputs, position_ids=true_positions(inputs))
    for i, layout in enumerate(("5I4", "7", "12")):
        alone = zoo.batch("llava-qwen2", layout, seed=i)
        if "pixel_values" in alone:
            alone["pixel_values"] = inputs["pixel_values"]
        valid = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(together[i][valid], run(model, "llava-qwen2", alone)[0], atol=5e-5, rtol=1e-4)


def test_generation_recomputes_and_a_cache_is_refused_where_it_would_lie() -> None:
    model, inputs = host()
    image = {name: value[:1] for name, value in inputs.items()}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(AlulaError, match="cannot continue a cache") as caught:
        model.generate(**image, **options)
    assert "use_cache=False" in str(caught.value.remedy)
    generated = model.generate(**image, **options, use_cache=False)
    for n in range(generated.shape[1] - 4, generated.shape[1]):
        begun = {**image, "input_ids": generated[:, :n], "attention_mask": torch.ones(1, n)}
        assert run(model, "llava-qwen2", begun)[0, -1].argmax() == generated[0, n]
    text = zoo.batch("llava-qwen2", "7")
    assert torch.equal(model.generate(**text, **options), model.generate(**text, **options, use_cache=False))


def test_every_released_parameter_gets_a_gradient() -> None:
    model, _ = host()
    model.train()
    inputs = zoo.batch("llava-qwen2", "5I4", "7", side="right")
    model(**inputs).logits.square().mean().backward()
    for name, parameter in alula.grafts_of(model)["wings"].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("layout", "side", "training", "message"),
    [
        (("2I2I3",), "right", False, "one image per sample"),
        (("I5",), "right", False, "at the very start"),
        (("3I2", "5"), "left", True, "padding on the right"),
        (("3I60",), "right", False, "weights for"),
    ],
)
def test_what_the_released_code_cannot_do_is_refused(
    layout: tuple[str, ...], side: str, training: bool, message: str
) -> None:
    model, _ = host()
    inputs = zoo.batch("llava-qwen2", *layout, side=side)
    with pytest.raises(UsageError, match=message):
        run(model.train(training), "llava-qwen2", inputs)


def test_blank_images_need_a_tower() -> None:
    model = decoder("lm", PUBLISHED).train()
    with pytest.raises(HostError, match="blank image"):
        model(NUMBERS["lm_textonly_infer/ids0"][None])


@pytest.mark.parametrize(
    "wrong", [{"router": "constant"}, {"gain": 3.0}, {"learners": ("textual",)}, {"compat": "reference"}]
)
def test_settings_the_released_code_does_not_have(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        WingsConfig(**{"compat": "published", **wrong})


def test_system_rows_belong_to_compat() -> None:
    with pytest.raises(UsageError, match="system_tokens"):
        WingsConfig(system_tokens=3)


def test_compat_survives_a_save(tmp_path: Path) -> None:
    model, inputs = host()
    alula.save_adapter(model, tmp_path / "adapter")
    again = zoo.build("llava-qwen2")
    alula.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(run(again, "llava-qwen2", inputs), run(model, "llava-qwen2", inputs))
