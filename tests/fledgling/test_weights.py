"""The shipped fledgling: plain transformers load it, it fits its budget, and it knows what its card says."""

import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel

import alula_fledgling as fledgling
from alula.errors import HostError
from alula.hosts import names
from alula_fledgling.microworld import TEXT_FAMILIES, render, score, text_items, visual_items
from alula_fledgling.raising.examination import examine_directory
from alula_fledgling.weights import ELSEWHERE


@pytest.fixture(scope="module")
def llm():
    folder = fledgling.directory() / "llm"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_the_weights_fit_into_sixteen_megabytes():
    """Those of the fledgling; what `alula serve --demo` puts upon them is counted by itself."""
    files = [path for path in fledgling.directory().rglob("*") if path.is_file()]
    demo = [path for path in files if path.is_relative_to(fledgling.directory() / "demo")]
    assert sum(path.stat().st_size for path in set(files) - set(demo)) <= 16 * 2**20
    assert 0 < sum(path.stat().st_size for path in demo) <= 2 * 2**20
    assert {"card.json", "README.md"} <= {path.name for path in files}


def test_its_card_covers_every_family():
    assert set(fledgling.card()["text"]["bare"]["families"]) == set(TEXT_FAMILIES)


def test_its_card_passes_the_bar():
    bare = fledgling.card()["text"]["bare"]
    assert bare["mean"] >= 0.95
    assert bare["lowest"] >= 0.85


def test_it_was_raised_within_fifteen_minutes():
    assert fledgling.card()["seconds"]["total"] <= 15 * 60


def test_it_is_a_stock_qwen3_with_uncommon_heads(llm):
    config = llm[0].config
    assert type(llm[0]).__name__ == "Qwen3ForCausalLM"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim != config.hidden_size // config.num_attention_heads


def test_it_answers_as_its_card_says(llm):
    model, tokenizer = llm
    items = list(text_items(100, split="test", seed=4242))
    prompts = [
        tokenizer.apply_chat_template(list(item.messages[:-1]), tokenize=False, add_generation_prompt=True)
        for item in items
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    right = sum(
        score(item.family, item.targets[-1].answer, answer) for item, answer in zip(items, answers, strict=True)
    )
    # 100 answers at the card's rate p scatter by sqrt(p (1 - p) / 100) < 0.03; three of those
    assert right / 100 >= fledgling.card()["text"]["bare"]["mean"] - 0.09


def test_the_template_takes_strings_lists_and_images_and_marks_answers(llm):
    tokenizer = llm[1]
    as_list = [
        {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
    ]
    as_string = [{"role": m["role"], "content": m["content"][0]["text"]} for m in as_list]
    assert tokenizer.apply_chat_template(as_list, tokenize=False) == tokenizer.apply_chat_template(
        as_string, tokenize=False
    )
    marked = tokenizer.apply_chat_template(as_list, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == " 5<|im_end|>"
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = tokenizer.apply_chat_template(picture, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user<image> What is it?<|im_end|><|im_start|>assistant"


def test_any_text_survives_the_tokenizer(llm):
    tokenizer = llm[1]
    for text in (
        "  two  blanks\n\tand a tab",
        "Stra\u00dfe \u4f60\u597d \U0001f426",
        "4096 = 2**12",
        "<image> <|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("4096")["input_ids"]) == 4  # digits one by one


def test_its_eyes_see_what_the_processor_gives():
    folder = fledgling.directory() / "vision"
    tower, processor = SiglipVisionModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    scene = next(visual_items(1, split="train", seed=0)).messages[0]["content"][0]["image"].scene
    pixels = processor(images=render(scene), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 40, 40)
    with torch.no_grad():
        assert tower(pixels).last_hidden_state.shape == (1, 25, 128)


def test_probes_read_attributes_off_its_rows():
    for split, least in (("test", 0.9), ("unseen", 0.8)):
        probe = fledgling.card()["tower_probe"][split]
        assert min(probe.values()) >= least, probe


def test_a_name_is_a_brought_model_and_nothing_else_is():
    assert names.resolve("Qwen/Qwen3-0.6B", "llm") == "Qwen/Qwen3-0.6B"
    assert names.resolve("fledgling", "vision") == str(fledgling.part_directory("vision"))
    with pytest.raises(HostError, match="no part 'ears'"):
        names.resolve("fledgling", "ears")


def test_a_folder_without_a_card_is_refused(tmp_path, monkeypatch):
    with pytest.raises(HostError, match=r"card\.json is missing"):
        fledgling.card(tmp_path)
    monkeypatch.setenv(ELSEWHERE, str(tmp_path))
    with pytest.raises(HostError, match=r"card\.json is missing"):
        names.resolve("fledgling", "llm")


@pytest.mark.parametrize(
    ("card", "told"), [('{"x', "is damaged, no JSON"), ("[1]", "of something else"), ('{"class": "ASTModel"}', "else")]
)
def test_a_card_of_something_else_is_told(tmp_path, card, told):
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(HostError, match=told):
        fledgling.card(tmp_path)


def test_a_part_that_is_missing_is_told_with_the_variable_that_names_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "bird"
    shutil.copytree(fledgling.directory(), folder)
    (folder / "llm" / "model.safetensors").unlink()
    with pytest.raises(HostError, match=r"no llm/model\.safetensors"):
        examine_directory(folder, num_items=1, device=torch.device("cpu"))
    monkeypatch.setenv(ELSEWHERE, str(folder))
    with pytest.raises(HostError, match=r"no llm/model\.safetensors") as caught:
        fledgling.directory()
    assert f"{ELSEWHERE}={folder}" in str(caught.value)
    (folder / "llm" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(HostError, match="cannot be read"):
        examine_directory(folder, num_items=1, device=torch.device("cpu"))
