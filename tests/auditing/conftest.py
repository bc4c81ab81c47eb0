"""Saved models of every kind an audit takes, with random weights, and one small audit that several tests read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
from tokenizers import AddedToken

import alula
from alula.auditing import Audit, Plan, audit
from alula.evaluation.defaults import register
from alula.hosts import save_host
from alula_fledgling.defaults import FledglingDefaults
from tests import zoo
from tests.hosts import tiny


class TinyDefaults(FledglingDefaults):
    """The tiny models of these tests are shown and asked the microworld's conversations, as the fledgling is."""

    here = False
    """whether a test of audits runs: to those of other packages in the same process nobody knows these models"""

    def knows(self, tokenizer: Any) -> bool:
        return self.here and tokenizer.get_vocab().items() >= tiny.tokenizer().get_vocab().items()


register("tiny", TinyDefaults())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:  # before fixtures of the session, which audit too
    TinyDefaults.here = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    TinyDefaults.here = False


QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As such models ship it: nothing marks what the assistant says."""


class PicturesOnly(hf.ProcessorMixin):
    """Qwen-VL's processor without its film half, which needs torchvision."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token_ids = [tokenizer.convert_tokens_to_ids(self.image_token)]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> hf.BatchFeature:
        pixels = self.image_processor(images=images, return_tensors="pt") if images else {}
        counts = iter((pixels["image_grid_thw"].prod(dim=-1) // 4).tolist() if images else [])
        texts = [re.sub(re.escape(self.image_token), lambda _: self.image_token * next(counts), one) for one in text]
        ids = self.tokenizer(texts).input_ids
        rows = {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "mm_token_type_ids": [[int(token in self.image_token_ids) for token in row] for row in ids],
        }
        return hf.BatchFeature({**rows, **pixels})


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audited") / "llm"
    tiny.decoder("llama", seed=1).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llava(llm: Path) -> Path:
    """A stock LLaVA directory around `llm`."""
    path = llm.parent / "llava"
    model, tokenizer = alula.load_model(llm)
    save_host(alula.build_host(model, tiny.TOWERS["clip"][0], tokenizer=tokenizer), path)
    return path


@pytest.fixture(scope="session")
def qwen() -> tuple[Any, Any]:
    """A random Qwen2.5-VL and what feeds it."""
    tokenizer = tiny.tokenizer(None)
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    model = zoo.build("qwen2_5_vl")
    model.resize_token_embeddings(len(tokenizer))
    for key, token in zip(("vision_start", "vision_end", "image", "video"), special, strict=True):
        setattr(model.config, f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    pixels = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096})
    return model, PicturesOnly(pixels, tokenizer, QWEN_TEMPLATE)


@pytest.fixture(scope="session")
def wings(llava: Path) -> Path:
    path = llava.parent / "wings"
    loaded = alula.load_model(llava)
    alula.attach(loaded.model, alula.WingsConfig(rank=2))
    alula.save_adapter(loaded.model, path, base=llava)
    return path


@pytest.fixture(scope="session")
def lora(llava: Path) -> Path:
    path = llava.parent / "lora"
    loaded = alula.load_model(llava)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["linear_1", "linear_2"])
    model = peft.get_peft_model(loaded.model, config)
    model.peft_config["default"].base_model_name_or_path = str(llava)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small(llava: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Audit]:
    """An audit of `llava` against `llm`."""
    output = tmp_path_factory.mktemp("audit") / "out"
    plan = Plan(output=output, model=str(llava), base=str(llm), samples=24, items=10, batch_size=6)
    return plan, audit(plan, alula.load_model)
