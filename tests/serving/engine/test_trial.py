"""The trial at loading tells hosts that batches change from those that they do not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers import GenerationConfig

import alula
from alula.errors import HostError
from alula.serving.engine import Engine, Limits, Request, Sampling
from alula.serving.engine.trial import is_alike
from tests import media_hosts, zoo
from tests.serving.engine.conftest import asked, llm, rendered, tokens_of, told
from tests.test_sharing import LONGROPE

IDS = list(range(1, 9))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "llava-mistral", "qwen2_5_vl"])
def test_most_are_alike(name: str) -> None:
    assert is_alike(zoo.build(name), IDS)


def test_positions_that_begin_at_one_are_found_out() -> None:
    """Those of PaliGemma, which counts them by itself where none are given."""
    text = media_hosts.text("gemma", head_dim=8, vocab_size=64, pad_token_id=0, eos_token_id=1)
    parts = {"vision_config": {**media_hosts.siglip(), "projection_dim": 32}, "text_config": text}
    host = media_hosts.build("paligemma", **parts, projection_dim=32, hidden_size=32, image_token_id=60, vocab_size=64)
    assert not is_alike(host, IDS)


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
