"""Regions: what is painted over in an image is what its tokens are found to hold, through the processors' own code."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn

from alula.errors import AlulaError, HostError, UsageError
from alula.steering import Box, Mask, Polygon, Prompt, Whole
from tests import zoo
from tests.auditing.conftest import QWEN_TEMPLATE, PicturesOnly
from tests.hosts import tiny

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def tokenizer(*special: str) -> Any:
    made = tiny.tokenizer(None, extra_special_tokens={"image_token": "<image>"})
    made.add_tokens([AddedToken(token, special=True) for token in ("<image>", *special)])
    return made


def llava() -> tuple[Any, Any]:
    """Whose images are resized by their shorter side and cropped to a square."""
    made = tokenizer()
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images, made, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**DECODER, vocab_size=len(made)),
        image_token_id=made.convert_tokens_to_ids("<image>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    """Whose images come once as a whole and once in tiles."""
    made, grid = tokenizer(), [[32, 64], [64, 32], [64, 64]]
    side = {"height": 32, "width": 32}
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=grid)
    processor = hf.LlavaNextProcessor(
        images, made, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=hf.LlamaConfig(**DECODER, vocab_size=len(made)),
        image_token_id=made.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def qwen() -> tuple[Any, Any]:
    """Whose images keep their shape, four patches to a token, in windows."""
    made = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    model = zoo.build("qwen2_5_vl")
    model.resize_token_embeddings(len(made))
    for key in ("vision_start", "vision_end"):
        setattr(model.config, f"{key}_token_id", made.convert_tokens_to_ids(f"<|{key}|>"))
    for key in ("image", "video"):
        setattr(model.config, f"{key}_token_id", made.convert_tokens_to_ids(f"<|{key}_pad|>"))
    pixels = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096})
    return model, PicturesOnly(pixels, made, QWEN_TEMPLATE)


def gemma3() -> tuple[Any, Any]:
    """Whose patches are averaged, four to a token."""
    made = tiny.gemma3_host()
    return made.model, made.processor


FAMILIES = {made.__name__: made for made in (llava, llava_next, qwen, gemma3)}


def local(model: Any) -> Any:
    """The model with a tower in which no patch sees another, so that a token is of its own pixels alone."""
    made = copy.deepcopy(model).eval()
    tower = next(getattr(made.model, name) for name in ("vision_tower", "visual") if hasattr(made.model, name))
    for name, module in tower.named_modules():
        if name.endswith(("out_proj", "attn.proj")) and isinstance(module, nn.Linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return made


def features(model: Any, inputs: Any) -> Tensor:
    """(tokens, d) of all images of one sample, in the order of their placeholders."""
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    with torch.no_grad():
        found = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    return torch.cat([each.flatten(0, -2) for each in found.pooler_output])


def inputs_of(processor: Any, images: list[Any], **options: Any) -> Any:
    sign = getattr(processor, "boi_token", processor.image_token)
    return processor(images=[images], text=[f"{sign * len(images)} what is it?"], return_tensors="pt", **options)


def said(images: list[Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def painted_over(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    other = image.copy()
    other.paste((255, 0, 0), box)
    return other


def shares_of(model: Any, processor: Any, images: list[Any], region: Any, **options: Any) -> Tensor:
    """(image tokens,) what share of each lies in a region."""
    inputs = inputs_of(processor, images, **({"images_kwargs": options} if options else {}))
    inputs["input_ids"] = torch.as_tensor(inputs["input_ids"])
    prompt = Prompt(model, processor, {**inputs, "attention_mask": None}, said(images), **options)
    marked = [
        prompt.marks(regions=[type(region)(**{**vars(region), "share": share})])[0] for share in (1e-6, 0.5, 0.999)
    ]
    holds = inputs["input_ids"][0] == prompt.placeholders["image"]
    assert not any(marks[~holds].any() for marks in marked)
    return sum(share * marks[holds].clamp(0, 1) for share, marks in zip((0.2, 0.3, 0.5), marked, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 80)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_painted_corner_is_found(family: str, size: tuple[int, int]) -> None:
    """Tokens that a region covers change when it is painted over, tokens that it does not touch stay as they are."""
    model, processor = FAMILIES[family]()
    model, (width, height) = local(model), size
    boxes = [
        (0, 0, width // 2, height // 2),
        (width // 2, height // 4, width, height),
        (width // 4, 0, width // 2, height),
    ]
    images = [picture(width, height), picture(48, 64, seed=1)]
    before = features(model, inputs_of(processor, images))
    for box in boxes:
        after = features(model, inputs_of(processor, [painted_over(images[0], box), images[1]]))
        shares = shares_of(model, processor, images, Box(*box))
        changed = (after - before).abs().amax(dim=-1) > 1e-4
        assert len(shares) == len(before)
        assert shares.any()
        assert changed[shares >= 0.5].all()
        assert not changed[shares == 0].any()
        covered = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
        if family == "qwen" and width % 16 == 0:  # nothing is cropped: the share of tokens is that of pixels
            first = (width // 8) * (height // 8)
            assert abs(float((shares[:first] >= 0.5).float().mean()) - covered) < 0.15


def test_crops_of_gemma3() -> None:
    """Pan and scan: an image as a whole and crops of it, whose tokens follow one another."""
    model, processor = gemma3()
    model, image = local(model), picture(128, 32)
    how = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4}
    how |= {"pan_and_scan_min_ratio_to_activate": 1.2}
    box = (0, 0, 32, 32)
    images = processor.image_processor
    one, other = (images([[each]], return_tensors="pt", **how) for each in (image, painted_over(image, box)))
    assert len(one["pixel_values"]) == 5
    before, after = features(model, one), features(model, other)
    told = inputs_of(processor, [image], images_kwargs=how)
    prompt = Prompt(model, processor, told, said([image]), **how)
    holds = told["input_ids"][0] == prompt.placeholders["image"]
    marks = prompt.marks(regions=[Box(*box)])[0][holds] > 0
    changed = (after - before).abs().amax(dim=-1) > 1e-4
    assert changed[marks].all()
    assert (
        marks.view(5, 4).any(dim=1).tolist()
        == changed.view(5, 4).any(dim=1).tolist()
        == [True, True, False, False, False]
    )


def test_a_large_polygon_is_painted_strip_by_strip() -> None:
    painted = Polygon([(0, 0), (300, 0), (0, 200)]).paint(200, 400)
    rows = np.arange(200) + 0.5
    assert np.abs(painted.sum(axis=1) - 300 * (1 - rows / 200)).max() < 1  # the same line through all strips


def test_shapes_of_regions() -> None:
    """A polygon and a mask of a rectangle are the rectangle; what they cover in part counts by its share."""
    model, processor = qwen()
    images = [picture(64, 48)]
    prompt = Prompt(model, processor, tensors(inputs_of(processor, images)), said(images))
    grid = prompt.marks(regions=[Box(8, 8, 40, 32)])
    holds = prompt.ids[0] == prompt.placeholders["image"]
    assert torch.equal(grid[0][holds].view(6, 8)[1:4, 1:5], torch.ones(3, 4))
    assert grid.sum() == 12
    values = np.zeros((48, 64), bool)
    values[8:32, 8:40] = True
    for region in (
        Polygon([(8, 8), (40, 8), (40, 32), (8, 32)]),
        Mask(values),
        Mask(Image.fromarray(values)),
        Box(5, 5, 43.9, 35.9),
    ):
        assert torch.equal(prompt.marks(regions=[region]), grid), region
    wider = prompt.marks(regions=[Box(5, 5, 43, 35, share=0.1)])
    assert wider.sum() == 6 * 5
    triangle = prompt.marks(regions=[Polygon([(0, 0), (64, 0), (0, 48)])])[0][holds].view(6, 8)
    assert triangle[0, 0]
    assert not triangle[5, 7]
    assert 18 <= triangle.sum() <= 28
    speck = prompt.marks(regions=[Box(17, 17, 18, 18, weight=-1)])[0][holds].view(6, 8)
    assert speck[2, 2] == -1
    assert speck.abs().sum() == 1


def tensors(inputs: Any) -> dict[str, Any]:
    return {name: torch.as_tensor(value) for name, value in inputs.items()}


def test_batches_and_whole_images() -> None:
    """Each sample's own regions, of its own images; whole images need no messages."""
    model, processor = llava()
    chats = [[picture(64, 64), picture(48, 64, seed=1)], [picture(64, 48, seed=2)]]
    processor.tokenizer.padding_side = "left"
    text = ["<image> and <image>?", "<image>?"]
    inputs = processor(images=chats, text=text, return_tensors="pt", padding=True)
    prompt = Prompt(model, processor, inputs, [said(images) for images in chats])
    marks = prompt.marks(regions=[[Box(0, 0, 32, 64, image=1)], [Box(0, 0, 64, 24)]])
    holds = [(row == prompt.placeholders["image"]).nonzero()[:, 0] for row in prompt.ids]
    first, second = marks[0][holds[0]].view(2, 4, 4), marks[1][holds[1]].view(4, 4)
    assert not first[0].any()
    assert first[1, :, :2].all()
    assert not first[1, :, 3].any()
    assert second[:2].all()
    assert not second[2:].any()
    plain = Prompt(model, processor, inputs)
    assert plain.marks(regions=Whole()).sum() == 3 * 16
    one = plain.marks(regions=[[Whole(index=1)], [Whole("image", 0)]])
    assert one[0][holds[0][16:]].all()
    assert one.sum() == 2 * 16


def test_refusals() -> None:
    model, processor = llava()
    images = [picture(96, 32)]
    inputs = inputs_of(processor, images)
    prompt = Prompt(model, processor, inputs, said(images))
    cases: list[tuple[Any, str]] = [
        (Box(0, 0, 8, 8), "no token holds a part"),
        (Box(0, 0, 97, 8), "no part of an image of 96 by 32"),
        (Box(0, 0, 8, 8, image=1), "no image 1: the sample has 1"),
        (Polygon([(0, 0), (1, 1)]), "no polygon"),
        (Polygon([(4, 4), (12, 12), (28, 28)]), "no area"),
        (Polygon([(4, 4), (4, 4), (36, 20)]), "no area"),
        (Mask(np.ones((96, 32))), "does not fit an image of 32 rows"),
        (Mask(np.zeros((32, 96))), "from 0 to 1"),
        (Whole("audio"), "no audio 0"),
        ("all", "a str is no region"),
    ]
    for region, message in cases:
        with pytest.raises(UsageError, match=message) as caught:
            prompt.marks(regions=[region])
        assert caught.value.remedy
    with pytest.raises(UsageError, match="what the prompt was made of is not known"):
        Prompt(model, processor, inputs).marks(regions=[Box(0, 0, 8, 8)])
    with pytest.raises(UsageError, match="does not hold it"):
        Prompt(model, processor, inputs, said([None])).marks(regions=[Box(0, 0, 8, 8)])
    with pytest.raises(UsageError, match="do not make the 16 image tokens"):
        Prompt(model, processor, inputs, said(images * 2)).marks(regions=[Box(40, 0, 50, 8)])
    for wrong in ({"weight": 2}, {"share": 0}, {"left": "a"}):
        with pytest.raises(AlulaError):
            Box(**{"left": 0, "top": 0, "right": 8, "bottom": 8, **wrong})
    strange = copy.copy(model)
    strange.config = copy.deepcopy(model.config)
    strange.config.model_type = "somebody_elses"
    with pytest.raises(HostError, match="which part of an image"):
        Prompt(strange, processor, inputs, said(images)).marks(regions=[Box(40, 0, 50, 8)])
