"""Scores: what counts as the same answer."""

import pytest

from alula_fledgling.microworld import score, text_items, visual_items


@pytest.mark.parametrize("answer", ["top left", " Top  left.", "TOP LEFT", "top\nleft"])
def test_case_space_and_full_stop_do_not_matter(answer):
    assert score("position", "top left", answer)


@pytest.mark.parametrize("answer", ["", "top", "left", "top left corner", "top left and right", "bottom left"])
def test_other_words_do(answer):
    assert not score("position", "top left", answer)


def test_captions_match_in_any_order_but_whole():
    gold = "a small red circle at the top, a large blue ring at the left and a small red cross at the right"
    assert score("caption", gold, gold)
    swapped = "A large blue ring at the left, a small red cross at the right and a small red circle at the top."
    assert score("caption", gold, swapped)
    assert not score("caption", gold, "a small red circle at the top and a large blue ring at the left")
    assert not score("caption", gold, gold.replace("small red cross", "large red cross"))
    assert not score("caption", gold, f"{gold} and a small red cross at the right")
    # other families know no such freedom
    assert not score("sorting", "1 and 2", "2 and 1")


def test_gold_answers_score_and_others_do_not():
    for item in [*text_items(100, split="test", seed=0), *visual_items(80, split="test", seed=0)]:
        target = item.targets[-1]
        assert score(target.family, target.answer, target.answer.upper() + ".")
        assert not score(target.family, target.answer, f"not {target.answer}")
