"""The trial at loading tells hosts that batches change from those that they do not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralForCausalLM

import alula
from alula.errors import HostError
from alula.seam.dialect import cache_keyword
from alula.serving.engine import Engine, Limits, Request, Sampling
from alula.serving.engine.resident import Resident, Served
from alula.serving.engine.trial import why_alone
from tests import media_hosts, zoo
from tests.hosts import tiny
from tests.serving.engine.conftest import asked, llm, rendered, tokens_of, told
from tests.test_sharing import LONGROPE


def why(model: Any) -> str | None:
    """What the trial finds of a model in memory."""
    said: dict[str, Any] = {"path": "", "base": None, "kind": "text", "adapter": None, "takes": frozenset()}
    served = Served("m", **said, exact_gate=False, context=None, loading={}, created=0, batched=True)
    return why_alone(Resident(served, model, tiny.tokenizer()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "llava-mistral", "qwen2_5_vl"])
def test_most_are_alike(name: str) -> None:
    assert why(zoo.build(name)) is None


def test_positions_that_begin_at_one_are_found_out() -> None:
    """Those of PaliGemma, which counts them by itself where none are given."""
    text = media_hosts.text("gemma", head_dim=8, vocab_size=64, pad_token_id=0, eos_token_id=1)
    parts = {"vision_config": {**media_hosts.siglip(), "projection_dim": 32}, "text_config": text}
    host = media_hosts.build("paligemma", **parts, projection_dim=32, hidden_size=32, image_token_id=60, vocab_size=64)
    assert "computed at once" in (why(host) or "")


class Marking(MistralForCausalLM):
    """Has `changed` change what its forwards are given: how many tokens there are, and how many in the cache."""

    changed: Any

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **further: Any
    ) -> Any:
        given, cache = {"attention_mask": attention_mask, "position_ids": position_ids}, further[cache_keyword()]
        given = self.changed(given, cache, *input_ids.shape, cache.get_seq_length())
        return super().forward(input_ids=input_ids, **given, **further)


def sees_padding(given: dict[str, Any], cache: Any, samples: int, count: int, known: int) -> dict[str, Any]:
    """Of prompts of several samples."""
    return given | ({"attention_mask": None} if samples > 1 and count > 1 else {})


def begins_anew(given: dict[str, Any], cache: Any, samples: int, count: int, known: int) -> dict[str, Any]:
    """Positions count from 0 in each forward of more than a token."""
    return given | ({"position_ids": torch.arange(count)[None]} if count > 1 and known else {})


def by_the_longest(given: dict[str, Any], cache: Any, samples: int, count: int, known: int) -> dict[str, Any]:
    """A new token's position is how long the cache is, padding included."""
    return given | ({"position_ids": torch.full((samples, 1), known)} if count == 1 else {})


def padded_in_the_window(given: dict[str, Any], cache: Any, samples: int, count: int, known: int) -> dict[str, Any]:
    """Padding is barred as long as all is in the window."""
    return given | ({"attention_mask": None} if samples > 1 and known > 16 else {})


def counts_for_itself(given: dict[str, Any], cache: Any, samples: int, count: int, known: int) -> dict[str, Any]:
    """Positions of a piece are counted on in an attribute of the cache, which no crop knows of."""
    before = getattr(cache, "counted", 0)
    cache.counted = before + count
    return given | ({"position_ids": before + torch.arange(count)[None]} if count > 1 and samples == 1 else {})


@pytest.mark.parametrize(
    ("changed", "way"),
    [
        (lambda given, *_: given, None),
        (sees_padding, "prompts of different lengths computed at once"),
        (begins_anew, "a prompt computed in pieces"),
        (by_the_longest, "answers continued as one batch"),
        (padded_in_the_window, "answers continued as one batch"),
        (counts_for_itself, "a prompt that goes on from what was kept of another"),
    ],
)
def test_each_way_is_tried(changed: Any, way: str | None) -> None:
    """By decoders whose `generate` is right, and who are wrong on one way alone."""
    torch.manual_seed(0)
    is_windowed = changed is padded_in_the_window
    config = tiny.decoder("mistral").config
    config.sliding_window, config.initializer_range = 16 if is_windowed else None, 0.3
    model = Marking(config).eval()
    model.changed = changed
    assert why(model) == (way and f"{way} did not come to what `generate` comes to")


ROTATIONS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": LONGROPE,
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotary_angles_that_go_by_the_length(tmp_path: Path, kind: str) -> None:
    """Answers of one that is long, one beside it and one that becomes long, on a model scaled in each way there is."""
    changes = {"original_max_position_embeddings": 32} if kind == "longrope" else {}
    family = "phi3" if kind == "longrope" else "llama"
    rotations = {"rope_theta": 10000.0, **ROTATIONS[kind]}
    # dynamic scaling begins behind the positions that the model has
    most = {"max_position_embeddings": 32} if kind == "dynamic" else {}
    llm(tmp_path, family, rope_parameters=rotations, initializer_range=0.3, **changes, **most)
    asks = [(asked("two words"), 6), (asked("how many green triangles are there? " * 4), 12), (asked("two words"), 24)]
    asks.insert(2, (asked("how many green triangles are there? " * 2), 6))
    wanted = []
    for messages, count in asks:
        inputs = rendered(tmp_path, messages)
        fresh = alula.load_model(tmp_path).model  # angles stay where an earlier prompt left them
        found = fresh.generate(**inputs, max_new_tokens=count, do_sample=False)
        wanted.append(found[0, inputs["input_ids"].shape[1] :].tolist())
    with Engine(Limits(prefill_tokens=16)) as engine:
        served = engine.load("m", tmp_path)
        assert served.batched == (kind not in ("dynamic", "longrope"))
        assert served.batched or kind in (served.why_alone or "")
        handles = [engine.submit(Request("m", each, sampling=Sampling(max_tokens=count))) for each, count in asks * 2]
        assert [tokens_of(handle)[0] for handle in handles] == wanted * 2


SETTINGS = [
    ({"num_beams": 3}, "refused"),
    ({"penalty_alpha": 0.6}, "refused"),
    ({"typical_p": 0.5, "do_sample": True}, "refused"),
    ({"token_healing": True}, "refused"),
    ({"no_repeat_ngram_size": 2}, "alone"),
    ({"min_new_tokens": 5}, "alone"),
    ({"stop_strings": ["wo"]}, "together"),
    ({"temperature": 0.7, "do_sample": True, "top_k": 5, "cache_implementation": "dynamic"}, "together"),
]


def test_generation_settings_are_kept_or_refused(tmp_path: Path) -> None:
    """None is left out unsaid."""
    path = llm(tmp_path / "m", "llama")
    plain = GenerationConfig.from_pretrained(path)
    for settings, outcome in SETTINGS:
        GenerationConfig(**{**plain.to_diff_dict(), **settings}).save_pretrained(path)
        with Engine() as engine:
            if outcome == "refused":
                with pytest.raises(HostError, match=next(iter(settings))):
                    engine.load("m", path)
                continue
            assert engine.load("m", path).batched == (outcome == "together"), settings
            if "no_repeat_ngram_size" in settings:
                tokens = told(engine, "m", asked("two words"), 40)
                assert len(set(itertools.pairwise(tokens))) == len(tokens) - 1
            if "stop_strings" in settings:
                text, end = engine.submit(Request("m", prompt="two words", sampling=Sampling(stop=["never"]))).result()
                assert "wo" not in text
                assert end.reason in ("stop", "length")
