"""Raising a fledgling: parts against independent computations, and two steps of everything end to end."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3ForCausalLM,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from alula.errors import HostError, PathError
from alula.hosts import names as known
from alula_fledgling import weights as installed
from alula_fledgling.cli import fledgling as command
from alula_fledgling.microworld import Scene, Thing, text_items
from alula_fledgling.raising.curriculum import Curriculum, lessons
from alula_fledgling.raising.head_start import give_head_start
from alula_fledgling.raising.muon import Muon, orthogonalise
from alula_fledgling.raising.raising import Upbringing
from alula_fledgling.raising.schooling import answer_places, foreign_tokens, language_model_config, rate_factor
from alula_fledgling.raising.tokenizer import learn_tokenizer
from alula_fledgling.raising.tower import patch_labels, pictures, pixels


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(0, num_items=2000)


def test_tokenizer_is_a_function_of_its_seed(tokenizer):
    assert learn_tokenizer(0, num_items=2000).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 1024


def test_saved_tokenizer_reloads_and_agrees(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for item in text_items(50, split="test", seed=0):
        messages = list(item.messages)
        rendered = again.apply_chat_template(messages, tokenize=False)
        assert rendered == tokenizer.apply_chat_template(messages, tokenize=False)
        assert again(rendered)["input_ids"] == tokenizer(rendered)["input_ids"]


def test_labels_of_lessons_are_the_templates_assistant_mask(tokenizer):
    """Without distractions every turn is learned; then the labels are what the chat template marks."""
    batch = next(lessons(tokenizer, Curriculum(length=96, distraction=0.0), seed=0, batch_size=4))
    assert batch.ids.shape == batch.labels.shape == (4, 96)
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        text = tokenizer.decode(ids)
        turns = [turn.split("<|im_end|>")[0] for turn in text.split("<|im_start|>")[1:]]
        messages = [dict(zip(("role", "content"), turn.split(" ", 1), strict=True)) for turn in turns if " " in turn]
        marked = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        expected = np.where(marked["assistant_masks"], marked["input_ids"], -100)
        assert (labels[: len(expected)] == expected[: len(labels)])[:-1].all()


def test_answers_about_pictures_nobody_can_see_are_not_learned(tokenizer):
    batch = next(lessons(tokenizer, Curriculum(length=144, distraction=1.0), seed=0, batch_size=8))
    image = tokenizer.get_vocab()["<image>"]
    assert (batch.ids == image).any()
    assert 0.03 < (batch.labels != -100).mean() < 0.2
    assert not (batch.labels == image).any()


def test_texts_apart_do_not_see_each_other(tokenizer):
    """A lesson of several texts gives every text the logits it has alone."""
    batch = next(lessons(tokenizer, Curriculum(length=96, apart=True, distraction=0.0), seed=0, batch_size=2))
    model = Qwen3ForCausalLM(language_model_config(tokenizer)).eval()
    ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
    with torch.no_grad():
        packed = model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions, use_cache=False).logits
        for row, starts in enumerate(positions == 0):
            edges = [*starts.nonzero().flatten().tolist(), 96]
            assert len(edges) > 2
            for first, last in itertools.pairwise(edges):
                alone = model(ids[row : row + 1, first:last]).logits[0]
                torch.testing.assert_close(packed[row, first:last], alone, atol=1e-5, rtol=1e-5)


def test_turns_of_a_dialogue_count_on():
    tokenizer = learn_tokenizer(0, num_items=2000)
    tokenizer(["a", "a longer text"], padding=True)  # a tokenizer that has padded once would go on doing so
    batch = next(lessons(tokenizer, Curriculum(length=96), seed=0, batch_size=3))
    assert (batch.positions == np.arange(96)).all()
    assert not (batch.ids == tokenizer.pad_token_id).any()


def test_tokens_of_long_answers_count_less(tokenizer):
    batch = next(lessons(tokenizer, Curriculum(length=96, apart=True, distraction=0.0), seed=1, batch_size=16))
    assert ((batch.weights > 0) == (batch.labels != -100)).all()
    for labels, weights in zip(batch.labels, batch.weights, strict=True):
        answers = np.split(np.arange(96), np.flatnonzero(np.diff((labels != -100).astype(int))) + 1)
        for answer in answers:
            if labels[answer[0]] != -100:
                assert weights[answer] == pytest.approx(len(answer) ** -0.35)


def test_a_story_is_asked_about_several_times(tokenizer):
    shares = {"deduction": 1.0, "two_hop": 1.0, "reading": 1.0, "lookup": 1.0}
    curriculum = Curriculum(length=96, apart=True, distraction=0.0, shares=shares)
    batch = next(lessons(tokenizer, curriculum, seed=0, batch_size=32))
    texts = [text for ids in batch.ids for text in re.split(r"(?=<.im_start.>user)", tokenizer.decode(ids))]
    assert any(text.count(".") < 2 and "?" in text for text in texts)  # a question with no story of its own


def test_a_fresh_model_looks_back_and_finds(tokenizer):
    """With no step of training: what stood so far before, and what followed an earlier occurrence of the word."""
    model = Qwen3ForCausalLM(language_model_config(tokenizer)).eval()
    model.set_attn_implementation("eager")
    give_head_start(model)
    same, found, others = [], [], []
    for names in itertools.permutations((" Ben", " Eva", " Ida", " Tom"), 3):
        text = "{} lives in Nambia.{} lives in Umbra.{} lives in Wexa. Where is{}".format(*names, names[1])
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        words = [tokenizer.decode(token) for token in ids[0]]
        seen = [
            layer[0, :, -1] for layer in model(ids, output_attentions=True).attentions
        ]  # (heads, tokens) of the last
        for layer, head, distance in ((0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4)):
            assert seen[layer][head, -1 - distance] > 0.9
        first, asked, third = (words.index(name) for name in names)
        same.append(seen[1][2][[asked, -1]].sum())
        # heads 0 and 2 of a layer find what is one or two, and three or four, after the word
        for layer, (head, after) in itertools.product((2, 3), ((0, (1, 2)), (2, (3, 4)))):
            found.append(sum(seen[layer][head, asked + distance] for distance in after))
            others.append(
                sum(seen[layer][head, place + distance] for place in (first, third) for distance in after) / 2
            )
    assert torch.stack(same).mean() > 0.5
    assert torch.stack(found).mean() > 3 * torch.stack(others).mean()


def test_answer_places_are_the_predicting_positions():
    labels = torch.full((2, 10), -100)
    labels[0, 4], labels[1, 9], labels[1, 0] = 7, 8, 9
    weights = torch.rand(2, 10) * (labels != -100)
    places, answers, counted = answer_places(labels, weights, share=0.2)
    assert places.shape == answers.shape == counted.shape == (4,)
    found = {(p, a, w) for p, a, w in zip(*(each.tolist() for each in (places, answers, counted)), strict=True) if w}
    # a first token has nothing before it to be predicted from
    assert found == {(3, 7, weights[0, 4].item()), (18, 8, weights[1, 9].item())}


def test_foreign_rows_replace_image_tokens_only():
    embeddings = torch.nn.Embedding(12, 8)
    ids = torch.tensor([[1, 3, 3, 5], [2, 2, 2, 2]])
    rows = foreign_tokens(embeddings, ids, 3, torch.Generator().manual_seed(0))
    assert torch.equal(rows[1], embeddings(ids[1]))
    assert torch.equal(rows[0, [0, 3]], embeddings(ids[0, [0, 3]]))
    assert torch.cdist(rows[0, 1:3], embeddings.weight).min() > 1e-3


def test_rate_rises_stays_and_falls():
    factors = [rate_factor(step, 100, 0.1, 0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1.0 == factors[30]
    assert factors[-1] == pytest.approx(0.02)
    assert factors[75] == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8)])
def test_orthogonalise_keeps_directions_and_evens_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    aligned = torch.einsum("nij,nij->n", orthogonalise(x), u @ vh) / min(shape[1:])
    assert (aligned > 0.8).all()


def test_muon_goes_down():
    torch.manual_seed(0)
    weight, goal = torch.nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
    optimiser = Muon([weight], lr=0.05)
    losses = []
    for _ in range(100):
        loss = (weight - goal).pow(2).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.05 * losses[0]


def test_patch_labels_stand_where_things_are():
    scene = Scene((Thing("red", "heart", "large", 0), Thing("blue", "ring", "small", 5)))
    labels = patch_labels(scene)
    assert np.flatnonzero(labels["colour"]).tolist() == [0, 14]
    assert labels["colour"][[0, 14]].tolist() == [1, 3]
    assert not labels["digit"].any()
    # the patch labelled does show the thing
    difference = (pixels([scene]) - pixels([Scene(())])).abs().sum(1)[0]
    patches = difference.reshape(5, 8, 5, 8).sum((1, 3)).flatten()
    assert (patches[[0, 14]] > 0).all()


def test_the_tower_is_never_shown_an_unseen_pair():
    from alula_fledgling.microworld.scenes import UNSEEN_PAIRS

    source = pictures("train", seed=0, numbers=0.0)
    assert not any(thing.pair in UNSEEN_PAIRS for _ in range(1000) for thing in next(source).things)


def test_two_steps_end_to_end(tmp_path, monkeypatch):
    import typer

    app = typer.Typer()
    command.register(app)
    output = tmp_path / "bird"
    arguments = ["fledgling", "raise", "--output", str(output), "--steps", "2", "--tower-steps", "2"]
    arguments += ["--ear-steps", "2", "--layers", "4"]
    run = CliRunner().invoke(app, [*arguments, "--items", "2", "--precision", "float32", "--json"])
    assert run.exit_code == 0, run.output
    card = json.loads(run.stdout)
    assert card == json.loads((output / "card.json").read_text())
    assert set(card["text"]) == {"bare", "after words", "after foreign rows"}
    config = AutoModelForCausalLM.from_pretrained(output / "llm").config
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 4)
    assert SiglipVisionModel.from_pretrained(output / "vision").config.image_size == 40
    AutoTokenizer.from_pretrained(output / "llm")
    AutoImageProcessor.from_pretrained(output / "vision")
    assert [path.name for path in tmp_path.iterdir()] == ["bird"]
    shown = CliRunner().invoke(app, ["fledgling", "show", str(output)])
    assert shown.exit_code == 0
    assert "arithmetic" in shown.stdout
    shipped = installed.digest()
    installed.digest.cache_clear()
    monkeypatch.setenv(installed.ELSEWHERE, str(output))
    assert known.resolve("fledgling", "llm") == str(output / "llm")
    assert installed.digest() != shipped
    installed.digest.cache_clear()
    with pytest.raises(HostError, match="has no demo"):
        installed.part_directory(installed.DEMO)


@pytest.mark.parametrize("what", ["raise", "ears"])
def test_other_things_are_not_raised_over(tmp_path, what):
    """As the sources of this very package, which are in ./fledgling of a clone."""
    import typer

    app = typer.Typer()
    command.register(app)
    (tmp_path / "pyproject.toml").write_text("mine")
    run = CliRunner().invoke(app, ["fledgling", what, "--output", str(tmp_path)])
    assert isinstance(run.exception, PathError)
    assert "would be lost" in str(run.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


def test_the_help_tells_the_plans_defaults():
    import typer

    app = typer.Typer()
    command.register(app)
    plan = Upbringing()
    said = " ".join(CliRunner().invoke(app, ["fledgling", "raise", "--help"], terminal_width=300).output.split())
    for number in (plan.schooling.steps, plan.schooling.layers, plan.tower.steps, plan.ears.steps):
        assert f"(default: {number:,})" in said


def test_plans_are_plain_data():
    json.dumps(dataclasses.asdict(Upbringing()))
