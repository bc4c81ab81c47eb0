"""The released weights and data themselves, in a directory of `alula real prepare` that is named: ALULA_REAL=DIR."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from alula.auditing import Plan, Status, audit, findings
from alula.data import MixtureSpec, open_mixture
from alula.hosts import build_host, load_host, save_host
from alula.loading import load_model
from alula.real.held_out import TEST, VALIDATION
from alula.real.things import words_of

if "ALULA_REAL" not in os.environ:
    pytest.skip("no prepared directory is named (ALULA_REAL)", allow_module_level=True)
ROOT = Path(os.environ["ALULA_REAL"])
MODELS = ROOT / "models"


def samples(name: str, split: str):
    source = {"sources": [{"jsonl": str(ROOT / "data" / name / f"{split}.jsonl")}]}
    return open_mixture(MixtureSpec.model_validate(source))


def test_the_language_model_speaks() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "smollm2-135m-instruct").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2-135m-instruct")
    said = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**given, max_new_tokens=10, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_whisper_writes_down_spoken_captions() -> None:
    model = WhisperForConditionalGeneration.from_pretrained(MODELS / "whisper-tiny.en").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "whisper-tiny.en")
    extractor = WhisperFeatureExtractor.from_pretrained(MODELS / "whisper-tiny.en")
    start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    heard, known = 0, 0
    mixture = samples("speech", "train")
    for position in range(len((ROOT / "data/speech/train.jsonl").read_text().splitlines())):
        sample = mixture[position]
        if sample.meta.get("language") != "en" or known == 20:
            continue
        wave = sample.media("audio")[0].load(16000)
        features = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_features"]
        ids = model.generate(features, decoder_input_ids=torch.tensor([start]), max_length=24, do_sample=False)[0]
        word = words_of(sample.messages[1]["content"][0]["text"])[-1]
        heard += word in tokenizer.decode(ids, skip_special_tokens=True).lower()
        known += 1
    assert known == 20
    assert heard >= 8  # half of the words of the first twenty, exactly; by chance it would be none


def test_one_host_of_all_three(tmp_path: Path) -> None:
    whisper = WhisperForConditionalGeneration.from_pretrained(MODELS / "whisper-tiny.en").eval()
    extractor = WhisperFeatureExtractor(chunk_length=30)
    host = build_host(
        str(MODELS / "smollm2-135m-instruct"),
        str(MODELS / "efficientnet-lite0"),
        audio=str(MODELS / "whisper-tiny.en"),
        dtype=torch.float32,
    )
    save_host(host, tmp_path / "host")
    host = load_host(tmp_path / "host")
    picture = Image.new("RGB", (60, 40), "red")
    given = host.processor(text=["<image> what is it?"], images=[[picture]], return_tensors="pt")
    assert (given["input_ids"] == host.model.config.image_token_id).sum().item() == 49
    tower = AutoModel.from_pretrained(MODELS / "efficientnet-lite0").eval()
    seen = tower(given["pixel_values"]).last_hidden_state
    assert torch.equal(host.model.model.vision_tower(given["pixel_values"]).last_hidden_state, seen)
    wave = samples("sounds", "test")[0].media("audio")[0].load(16000)[:160000]
    heard = host.processor(text=["<audio> what is it?"], audio=[wave], return_tensors="pt")
    assert (heard["input_ids"] == host.model.config.audio_token_id).sum().item() == 150
    features = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_features"]
    expected = whisper.model.encoder(features).last_hidden_state
    assert torch.equal(host.model.model.audio_tower(heard["input_features"]).last_hidden_state, expected)


def test_an_audit_tells_that_a_fresh_host_kept_its_words(tmp_path: Path) -> None:
    llm = MODELS / "smollm2-135m-instruct"
    save_host(build_host(str(llm), str(MODELS / "efficientnet-lite0"), dtype=torch.float32), tmp_path / "host")
    asked = (("What is the capital of France?", "Paris"), ("How many days are there in a week?", "seven"))
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in asked
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    plan = Plan(
        output=tmp_path / "audit", model=str(tmp_path / "host"), base=str(llm), data=ROOT / "data/stamps/test.jsonl",
        text=tmp_path / "text.jsonl", samples=4, batch_size=4, sections=("text", "attention", "alignment", "overlap"),
    )  # fmt: skip
    told = {found.section: found for found in findings(audit(plan, load_model))}
    assert set(told) == {"text", "attention", "alignment", "overlap"}
    assert told["text"].status is Status.FINE  # it answers in sentences, which no reference has, as the base does
    assert "character for character" in told["text"].says


@pytest.mark.parametrize("name", ["stamps", "emoji", "speech", "sounds"])
def test_no_thing_of_the_test_is_trained_on(name: str) -> None:
    folder = ROOT / "data" / name
    splits = {}
    for split in ("train", "validation", "test"):
        records = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        english = [each for each in records if each.get("language", "en") == "en"]
        splits[split] = {word for each in english for word in words_of(each["messages"][1]["content"])}
    assert not splits["train"] & (TEST | VALIDATION)
    assert not splits["validation"] & TEST
    assert splits["test"] & TEST
