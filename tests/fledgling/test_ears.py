"""The fledgling's ears: what they are told, and what the shipped ones tell."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import ASTModel

import alula_fledgling as fledgling
from alula_fledgling.microworld.sounds import Sound, Tone, render_sound
from alula_fledgling.raising.ears import EarPlan, labels_of, moments, probe_ears, raise_ears, spectrograms


def test_labels_say_where_it_is_loud() -> None:
    sound = Sound((Tone("violin", 3), Tone("bottle", 20), Tone("kettle", 8)), late=160)
    told = labels_of(sound)
    wave = np.abs(render_sound(sound).astype(float))
    loud = np.array([wave[(start := column * 8 * 160 + 8 * 160) : start + 400].max() > 1500 for column in range(15)])
    assert (loud == (told[0] > 0)).mean() > 0.85  # but for the moments in which a tone begins or ends
    assert [int(source) for source in dict.fromkeys(told[0])] == [1, 0, 4, 2] or set(told[0]) == {0, 1, 2, 4}
    assert set(told[1][told[0] > 0]) == {3, 20, 8}
    assert (told[1][told[0] == 0] == -100).all()
    assert np.array_equal(labels_of(sound, 8)[0, 1:], told[0, :-1])  # one column later


def test_moments_are_averaged_over_frequency() -> None:
    rows = torch.randn(2, 2 + 4 * 15, 6)
    naive = torch.stack([rows[:, 2 + column :: 15].mean(1) for column in range(15)], dim=1)
    torch.testing.assert_close(moments(rows), naive)


def test_the_same_seed_raises_the_same_ears() -> None:
    plan = EarPlan(steps=2, batch_size=4)
    one, two = (raise_ears(plan, seed=1, device=torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_shipped_ears_hear() -> None:
    tower = ASTModel.from_pretrained(fledgling.part_directory("audio"), dtype=torch.float32).eval()
    spectra = spectrograms([Sound((Tone("violin", 3),))])
    assert spectra.shape == (1, tower.config.max_length, tower.config.num_mel_bins)
    probe = probe_ears(tower, num_sounds=150, seed=5)
    assert probe["test"]["source"] > 0.9
    assert probe["test"]["height"] > 0.95
    assert probe["unseen"]["source"] > 0.4  # chance: a fifth
    card = json.loads((fledgling.directory() / "audio" / "card.json").read_text())
    assert card["parameters"] == tower.num_parameters()
    assert card["probe"]["test"]["source"] == pytest.approx(probe["test"]["source"], abs=0.1)
