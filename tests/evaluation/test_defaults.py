"""What a model is asked when nothing is named: its own questions where it comes with some, and never another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import alula
import alula_fledgling as fledgling
from alula.auditing import Plan, audit
from alula.errors import RecipeError, UsageError
from alula.evaluation import ChoiceTask, choose_tasks, defaults_for
from alula.evaluation.defaults import register
from alula.hosts import build_host, save_host
from alula.training import check
from alula_fledgling.defaults import DEFAULTS
from tests.hosts import tiny


def test_models_of_the_fledgling_are_known_by_their_words(tokenizer: Any) -> None:
    own = AutoTokenizer.from_pretrained(fledgling.part_directory("llm"))
    host = alula.build_host("fledgling", "fledgling", video=True, audio="fledgling")
    for known in (own, host.processor, host.processor.tokenizer):
        assert defaults_for(known) is DEFAULTS
    assert defaults_for(tokenizer) is None
    words = own.get_vocab()
    assert not DEFAULTS.knows(_Words({**words, "the": words["the"] + 1} if "the" in words else {}))


def test_they_are_asked_about_what_they_take() -> None:
    names = {
        video: [task.name for task in choose_tasks(alula.build_host("fledgling", "fledgling", video=video)[1], n=2)]
        for video in (False, True)
    }
    assert names[False] == ["text_bare", "text_after_image", "visual", "visual_unseen", "dialogue"]
    assert names[True] == [*names[False], "film", "film_unseen"]
    own = AutoTokenizer.from_pretrained(fledgling.part_directory("llm"))
    assert [task.name for task in choose_tasks(own, n=2)] == ["text_bare", "text_after_text"]


def test_any_other_model_is_asked_what_its_user_names_and_nothing_else(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no questions come with this model"):
        choose_tasks(tokenizer)
    assert [task.name for task in choose_tasks(tokenizer, names=["text_bare"], n=2)] == ["text_bare"]
    assert choose_tasks(tokenizer, more=True) == []


def test_audits_and_retention_refuse_alike(folders: Path, tmp_path: Path) -> None:
    host = folders / "host"
    plans = {
        "--data: say what to show": Plan(output=tmp_path / "a", model=str(host), sections=("lens",)),
        "--text: say what to ask": Plan(output=tmp_path / "b", model=str(host), sections=("text",)),
    }
    for said, plan in plans.items():
        with pytest.raises(UsageError, match=said):
            audit(plan, alula.load_model)
        assert not plan.output.exists()
    stage = {"name": "only", "method": "full", "steps": 1, "data": {"sources": [{"microworld": "text"}]}}
    built = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    marked = save_host(built, tmp_path / "host")
    recipe = {"name": "a", "output_dir": str(tmp_path / "run"), "host": {"path": str(marked)}, "stages": [stage]}
    for retention, key in (
        ({}, "retention.text"),
        ({"text": {"microworld": "text"}}, "retention.pictures"),
    ):
        with pytest.raises(RecipeError, match=f"{key}: no .* come with this model"):
            check({**recipe, "retention": retention})
    check({**recipe, "retention": {"text": {"microworld": "text"}, "probes": False}})


class _Words:
    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> Mapping[str, int]:
        return self.vocabulary


class _Mine:
    """Questions of a user's own for models with the word ``my-own-word``."""

    def knows(self, tokenizer: Any) -> bool:
        return "my-own-word" in tokenizer.get_vocab()

    def tasks(self, takes: frozenset[str]) -> Sequence[str]:
        return ["text_bare"]

    def retention(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return {"jsonl": "text.jsonl"}, {"jsonl": "seen.jsonl"}

    def truthfulness(self, n: int | None, seed: int) -> Sequence[ChoiceTask]:
        return []

    def audited(self) -> tuple[str, Sequence[Mapping[str, Any]]]:
        return "mine", [{"jsonl": "seen.jsonl"}]


def test_questions_of_ones_own_are_registered() -> None:
    mine = _Mine()
    register("mine", mine)
    assert defaults_for(_Words({"my-own-word": 0})) is mine
    assert defaults_for(_Words({"word": 0})) is None
