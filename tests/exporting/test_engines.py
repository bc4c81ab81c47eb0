"""What other engines are given is stock and computes the same; what they would not take is refused with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
)

import alula
from alula.cli import app as cli
from alula.errors import HostError, UsageError
from alula.exporting import ENGINES, Requirement, check_for, export_for, merge_model, stock
from alula.exporting.older import readable_before_5
from alula.exporting.plain import countable, make_plain, published_names
from alula.hosts import names as known
from alula.hosts import save_host
from alula.policies import Withdraw, put_policies
from tests.hosts import tiny

PICTURE = Image.new("RGB", (40, 30), "red")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host of a SigLIP tower, one of DINOv2 and a linear connector, and a LoRA and experts of the first."""
    root = tmp_path_factory.mktemp("engines")
    for name, tower, connector in (("host", "siglip", "mlp2x_gelu"), ("dino", "dinov2", "linear")):
        host = alula.build_host(
            tiny.decoder("qwen3"), tiny.TOWERS[tower][0], connector=connector, tokenizer=tiny.tokenizer()
        )
        save_host(host, root / name)
    torch.manual_seed(0)
    for tokens in ("seen", "image"):
        model = alula.load_model(root / "host").model
        alula.attach(model, alula.ExpertsConfig(rank=2, tokens=tokens))
        scramble(model, ".alula.")
        alula.save_adapter(model, root / tokens, base=root / "host")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)")
    model = get_peft_model(alula.load_model(root / "host").model, lora)
    scramble(model, "lora_")
    model.peft_config["default"].base_model_name_or_path = "../host"
    model.save_pretrained(root / "lora")
    return root


def scramble(model: torch.nn.Module, those: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if those in name:
                parameter.normal_(std=0.3)


def inputs_of(processor: Any) -> Any:
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def asked(engine: str, directory: Path, said: Any = None) -> dict[str, Requirement]:
    """What an engine asks of a plain directory, in this process."""
    said = stock.loaded(str(directory)) if said is None else said
    return {each.what: each for each in ENGINES[engine].asks(directory, said)}


def test_vllm_is_given_a_stock_model_under_published_names(models: Path, tmp_path: Path) -> None:
    """`export_for` loads it in a process of its own that cannot import alula."""
    verdict = export_for(models / "lora", tmp_path / "out", "vllm")
    assert verdict.accepted
    assert all(each.met for each in verdict.requirements)
    assert "read 2026-" in verdict.source
    out = tmp_path / "out"
    names = load_file(out / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names  # as llava-hf's checkpoints have it
    assert "language_model.model.embed_tokens.weight" in names
    assert not [file.name for file in out.iterdir() if file.name.startswith(".")]
    assert "_name_or_path" not in (out / "config.json").read_text()
    merged = AutoModelForImageTextToText.from_pretrained(merge_model(models / "lora", tmp_path / "merged"))
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    before, after = (AutoProcessor.from_pretrained(each, backend="pil") for each in (tmp_path / "merged", out))
    inputs = inputs_of(after)
    assert torch.equal(inputs["pixel_values"], inputs_of(before)["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, merged.eval()(**inputs).logits)


def test_llava_counts_tokens_as_vllm_wants_it(models: Path, tmp_path: Path) -> None:
    """`LlavaProcessor` reads a crop size, which SigLIP's image processor has not."""
    stays = stock.loaded(str(models / "host"))
    assert "counting" in stays
    assert "counted" not in stays
    make_plain(models / "host", tmp_path / "out", part="all", dtype="bfloat16")
    assert countable(tmp_path / "out")
    written = stock.loaded(str(tmp_path / "out"))
    assert written["counted"] == written["image_tokens"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_pictures_of_another_size_than_the_towers_are_told(models: Path, tmp_path: Path) -> None:
    what = "pictures of its tower's size (vision_config.image_size), which its LLaVA holds them to"
    out = make_plain(models / "host", tmp_path / "out", part="all", dtype=None)
    countable(out)
    side = json.loads((out / "config.json").read_text())["vision_config"]["image_size"]
    said = stock.loaded(str(out))
    assert said["pixels"] == [(side, side)]
    assert asked("vllm", out, said)[what].met
    file = out / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["size"] = settings["image_processor"]["crop_size"] = {"height": side, "width": 2 * side}
    file.write_text(json.dumps(settings))
    found = asked("vllm", out)
    assert found[what].met is None
    assert found[what].found == f"its LLaVA wants {side} x {side} pixels, and the processor makes {side} x {2 * side}"
    (of_class,) = (each for name, each in found.items() if name.startswith("a model class of vLLM's own"))
    assert found[what].found in of_class.found


def test_what_vllm_has_no_class_for_goes_by_its_backend(models: Path) -> None:
    whole = asked("vllm", models / "dino")
    (found,) = (each for what, each in whole.items() if "Transformers backend" in what and "class" in what)
    assert found.met
    assert "no tower dinov2" in found.found
    assert "no activation 'linear'" in found.found
    assert "--model-impl transformers" in found.found


ROPES: dict[str, tuple[Any, dict[str, Any]]] = {
    # transformers 4 computes the same numbers from these (tools/older.py)
    "theta": ({"rope_type": "default"}, {}),
    "scaled": ({"rope_type": "linear", "factor": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "partial": ({"rope_type": "default", "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", ROPES)
def test_releases_before_5_are_told_of_positions_and_tokens(tmp_path: Path, name: str) -> None:
    rope, told = ROPES[name]
    AutoTokenizer.from_pretrained(known.resolve("fledgling", "llm")).save_pretrained(tmp_path)
    settings = {"rope_theta": 5e5, **rope}
    kind = Phi3Config if "partial" in name else LlamaConfig
    config = kind(pad_token_id=0, rope_parameters=settings)
    config.save_pretrained(tmp_path)
    assert readable_before_5(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in ("rope_theta", *told)} == {"rope_theta": 5e5, **told}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(said["extra_special_tokens"], dict)
    assert not {"backend", "is_local"} & said.keys()
    before = (tmp_path / "config.json").read_bytes()
    assert readable_before_5(tmp_path)  # nothing is left to do
    assert (tmp_path / "config.json").read_bytes() == before


def test_full_and_sliding_layers_have_bases_of_their_own(tmp_path: Path) -> None:
    full, sliding = (
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        {"rope_type": "default", "rope_theta": 2e4},
    )
    rope = {"full_attention": full, "sliding_attention": sliding}
    Gemma3TextConfig(rope_parameters=rope, num_hidden_layers=2).save_pretrained(tmp_path)
    assert readable_before_5(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 2e4)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_llama_cpp_takes_words_and_says_why_not_pictures(models: Path, tmp_path: Path) -> None:
    whole = asked("llama.cpp", models / "dino")["a tower and connector that --mmproj takes"]
    assert whole.met is False
    assert "Pixtral's tower alone, and this is dinov2" in whole.found
    assert "--part text" in whole.remedy
    older = asked("llama.cpp", models / "host")["a tower and connector that --mmproj takes"]
    assert older.met is None  # not told: nobody tried
    assert "Pixtral's tower alone; siglip_vision_model" in older.found
    assert "legacy-models/convert_image_encoder_to_gguf.py, which was not tried" in older.found
    out = make_plain(models / "lora", tmp_path / "out", part="text", dtype=None)
    told = {what: each.met for what, each in asked("llama.cpp", out).items()}
    assert told.pop("a pre-tokenizer that it knows") is None
    assert "a place in GGUF for every weight of the decoder" in told
    assert all(told.values())
    text, host = AutoModelForCausalLM.from_pretrained(out).eval(), alula.load_model(models / "lora").model
    ids = AutoTokenizer.from_pretrained(out)("a red square", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(text(ids).logits, host(input_ids=ids).logits, atol=1e-4)
    weights = load_file(out / "model.safetensors")
    save_file({**weights, "model.layers.0.rider.weight": torch.zeros(1)}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "spiral"}}))
    odd = [each for each in asked("llama.cpp", out, FINE).values() if each.met is False]
    assert [each.found for each in odd] == ["rope_type spiral", "none for model.layers.0.rider.weight"]


FINE = {"class": "Qwen3ForCausalLM", "highest_id": 1, "rows": 2, "template": True, "sees": False}


def test_a_lora_keeps_pefts_layout(models: Path, tmp_path: Path) -> None:
    """Experts from the first picture on are one, too: put on requests with pictures, as vLLM can."""
    verdict = export_for(models / "seen", tmp_path / "seen", "peft")
    assert verdict.accepted
    told = {each.what: each for each in verdict.requirements}
    assert "--default-mm-loras" in told["for vLLM: put on requests with pictures alone"].found
    out = tmp_path / "seen"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "host"
    base = AutoModelForImageTextToText.from_pretrained(out / "host")
    model = PeftModel.from_pretrained(base, str(out)).eval()
    own, processor = alula.load_model(models / "seen")
    inputs = inputs_of(processor)
    start = int(inputs["input_ids"][0].tolist().index(model.config.image_token_index))
    cut = {
        "input_ids": inputs["input_ids"][:, start:],
        "attention_mask": inputs["attention_mask"][:, start:],
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():  # a prompt that begins with its picture
        assert torch.allclose(model(**cut).logits, own(**cut).logits, atol=1e-4)


def test_what_vllm_makes_of_a_lora_is_told(models: Path, tmp_path: Path) -> None:
    host = alula.load_model(models / "host").model
    config = LoraConfig(r=32, use_dora=True, target_modules=["v_proj", "q_proj"], rank_pattern={"v_proj": 4})
    get_peft_model(host, config).save_pretrained(tmp_path / "dora")
    shutil.copytree(models / "host", tmp_path / "host")
    facts = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": "../host"}))
    verdict = export_for(tmp_path / "dora", tmp_path / "out", "peft")
    told = {each.what: each for each in verdict.requirements if each.what.startswith("for vLLM") and not each.met}
    one, decoder, rank = told.values()
    assert one.found.startswith("use_dora, rank_pattern")
    assert "vision_tower" in decoder.found
    assert rank.remedy == "--max-lora-rank 32"


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("image", "vllm", "experts acts on some tokens"),
        ("image", "peft", "experts of 'image', rank 2 acts on some tokens"),
        ("policy", "llama.cpp", "the policy slow, which takes work"),
        ("strange", "transformers", "alula_tower is a class of alula's"),
        ("host", "peft", "without an adapter"),
    ],
)
def test_what_cannot_be_exported_says_why(models: Path, tmp_path: Path, name: str, engine: str, said: str) -> None:
    source = models / name
    if name == "policy":
        model, processor = alula.load_model(models / "host")
        put_policies(model, {"slow": Withdraw(layer=1)})
        source = save_host((model, processor), tmp_path / name)
    if name == "strange":
        source = tmp_path / name
        shutil.copytree(models / "host", source)
        config = json.loads((source / "config.json").read_text())
        config["vision_config"] = {"model_type": "alula_tower"}
        (source / "config.json").write_text(json.dumps(config))
    verdict = check_for(source, engine)
    assert not verdict.accepted
    (unmet,) = verdict.unmet
    assert said in unmet.found
    assert unmet.remedy
    with pytest.raises(HostError, match=f"{engine} does not take it"):
        export_for(source, tmp_path / "out", engine)
    assert not (tmp_path / "out").exists()


def test_names_of_shards_follow_in_the_index(models: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(models / "host")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    processor.save_pretrained(tmp_path)
    before = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert published_names(tmp_path)
    assert not published_names(tmp_path)  # nothing is left to do
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


def test_the_command_says_each_requirement(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["alula", "export", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    host = str(models / "host")
    assert run(str(models / "image"), "--for", "vllm", "--check") == 1
    assert "acts on some" in " ".join(capsys.readouterr().out.split())
    for words in ([host, "--check"], [host], [host, str(tmp_path / "a"), "--for", "vllm", "--check"]):
        assert run(*words) == 2
    assert run(host, str(tmp_path / "a"), "--part", "text") == 2
    assert run(host, "--for", "ollama", "--check") == 2
    assert "one of vllm, llama.cpp, transformers, peft" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="other things than a model"):
        export_for(host, tmp_path / "mine", "vllm")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
