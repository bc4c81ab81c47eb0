"""A model directory as stock transformers reads it, in a process that cannot import alula.

Run as a program (``python -I stock.py DIRECTORY``); it prints one JSON object. It knows nothing of alula on purpose.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any

_SIDE, _WIDE = 64, 96


class _Refusing(MetaPathFinder):
    """Import of alula fails, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("alula", "alula_fledgling"):
            raise ModuleNotFoundError(f"no {name} here")


def loaded(directory: str) -> dict[str, Any]:
    """What came of loading model, tokenizer and processor by the Auto classes."""
    import transformers as hf
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = hf.AutoConfig.from_pretrained(directory)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, output_loading_info=True, dtype="auto")
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(directory)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "sees": sees,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "backend": bool(model.is_backend_compatible()) if hasattr(model, "is_backend_compatible") else None,
        "rows": model.get_input_embeddings().weight.shape[0],
        "highest_id": max(tokenizer.get_vocab().values()),
        "template": bool(tokenizer.chat_template),
    }
    return found | (_processed(directory, config) if sees else {})


def adapted(directory: str, base: str) -> dict[str, Any]:
    """What came of loading a LoRA by PEFT, onto a base by the Auto classes."""
    import transformers as hf
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = type(hf.AutoConfig.from_pretrained(base)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto: Any = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype="auto"), directory)
    wanted: Any = get_peft_model_state_dict(model)
    given = load_file(f"{directory}/adapter_model.safetensors")
    return {
        "class": type(model.get_base_model()).__name__,
        "missing": sorted(set(wanted) - set(given)),
        "unexpected": sorted(set(given) - set(wanted)),
        "mismatched": sorted(name for name in set(given) & set(wanted) if given[name].shape != wanted[name].shape),
    }


def _processed(directory: str, config: Any) -> dict[str, Any]:
    import numpy as np
    import transformers as hf

    processor: Any = hf.AutoProcessor.from_pretrained(directory, backend="pil")
    token = getattr(processor, "image_token", None)
    found = {
        "processor": type(processor).__name__,
        "image_processor": hasattr(processor, "image_processor"),
        "image_token": token,
        "template": bool(getattr(processor, "chat_template", None)),
    }
    if token is None or not found["image_processor"]:
        return found
    picture = np.full((_SIDE, _SIDE, 3), 127, np.uint8)
    inputs = processor(images=[picture], text=[token], return_tensors="pt")
    wanted = getattr(config, "image_token_id", None)
    if wanted is None:
        wanted = getattr(config, "image_token_index", None)
    found["image_tokens"] = int((inputs["input_ids"] == wanted).sum())
    wide = np.full((_SIDE, _WIDE, 3), 127, np.uint8)
    pixels = [processor.image_processor(images=[each], return_tensors="pt")["pixel_values"] for each in (picture, wide)]
    if all(each.ndim == 4 for each in pixels):  # of one image each, not patches of it
        found["pixels"] = sorted({(each.shape[2], each.shape[3]) for each in pixels})
    try:
        counted: Any = processor._get_num_multimodal_tokens(image_sizes=[[_SIDE, _SIDE]])
        found["counted"] = int(counted["num_image_tokens"][0])
    except Exception as error:  # stock processors fail here in ways of their own
        found["counting"] = _said(error)
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def main(arguments: list[str]) -> None:
    sys.meta_path.insert(0, _Refusing())
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        said = adapted(*arguments) if len(arguments) == 2 else loaded(*arguments)
    except Exception as error:  # whatever stands there
        said = {"error": _said(error)}
    print("\n" + json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
