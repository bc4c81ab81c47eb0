"""Films and sounds: answers worked out again from pixels and samples, splits, unseen combinations, files."""

import json
import re
import wave

import numpy as np
import pytest
from PIL import Image

from alula.errors import UsageError
from alula_fledgling.microworld import (
    FILM_FAMILIES,
    IMAGE_SIZE,
    SOUND_FAMILIES,
    export_jsonl,
    export_llava,
    film_items,
    sound_items,
)
from alula_fledgling.microworld.films import DIRECTIONS, NUM_FRAMES, UNSEEN_MOVES, Actor, Film, render_film
from alula_fledgling.microworld.render import BACKGROUNDS, INK
from alula_fledgling.microworld.scenes import SHAPES, UNSEEN_PAIRS
from alula_fledgling.microworld.sounds import (
    NUM_SAMPLES,
    SAMPLE_RATE,
    UNSEEN_VOICES,
    Sound,
    SoundClip,
    Tone,
    onset,
    render_sound,
)


def clip(item):
    part = item.messages[0]["content"][0]
    return part[part["type"]]


def question(item):
    return item.messages[0]["content"][1]["text"]


def tracks(film):
    """Colour -> centre (x, y) of its pixels per frame, NaN where it is not to be seen; from the pixels alone."""
    frames = render_film(film).astype(int)
    found = {}
    for colour in {actor.colour for actor in film.actors}:
        close = np.abs(frames - np.array(INK[colour])).sum(-1) < 40
        found[colour] = [np.argwhere(frame)[:, ::-1].mean(0) if frame.any() else np.full(2, np.nan) for frame in close]
    return {colour: np.array(track) for colour, track in found.items()}


def alone(film):
    """Films in which colours tell things apart."""
    return len({actor.colour for actor in film.actors}) == len(film.actors)


def test_films_show_what_their_answers_say():
    checked = 0
    for item in film_items(400, split="test", seed=3):
        film, answer = clip(item).film, item.targets[0].answer
        if not alone(film):
            continue
        seen, asked = tracks(film), question(item)
        named = [actor for actor in film.actors if actor.name in asked]
        path = {actor.name: seen[actor.colour] for actor in film.actors}
        if item.family == "direction":
            x, y = np.nansum(np.diff(path[named[0].name], axis=0), axis=0)
            way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("downwards" if y > 0 else "upwards")
            assert way == answer
        elif item.family == "speed":
            travel = {actor.name: np.abs(np.diff(path[actor.name], axis=0)).sum() for actor in named}
            assert (max if "faster" in asked else min)(travel, key=travel.get) == answer
        elif item.family == "order":
            gone = {a.name: np.isnan(path[a.name][:, 0]).sum() * (1 if a.act == "appears" else -1) for a in named}
            assert (min if "first" in asked else max)(gone, key=gone.get) == answer
        elif item.family == "event":
            missing = np.isnan(path[answer][:, 0])
            assert missing[0] if "appears" in asked else missing[-1]
        elif item.family == "mover":
            moved = [a for a in film.actors if np.nansum(np.abs(np.diff(path[a.name], axis=0))) > 3]
            assert answer in (moved[0].colour, moved[0].shape, moved[0].name)
        elif item.family == "number":
            there = {"first": 0, "last": -1}
            at = next((frame for word, frame in there.items() if word in asked), None)
            moves = sum(np.nansum(np.abs(np.diff(p, axis=0))) > 3 for p in path.values())
            count = moves if at is None else sum(not np.isnan(p[at, 0]) for p in path.values())
            assert str(count) == answer
        elif item.family == "presence":
            assert answer == ("yes" if named else "no")
        else:
            assert sorted(re.findall("|".join(path), answer)) == sorted(path)
        checked += 1
    assert checked > 250


def test_order_of_frames_decides():
    """Backwards, a film shows the opposite: what moved left moves right, what appeared leaves."""
    actor = Actor("red", "heart", "large", 1, "moves", "left", "slow", start=28)
    back = Actor("red", "heart", "large", 1, "moves", "right", "slow", start=28 - (NUM_FRAMES - 1))
    forward = render_film(Film((actor,), "horizontal"))
    assert np.array_equal(forward[::-1], render_film(Film((back,), "horizontal")))
    assert not np.array_equal(forward[::-1], forward)
    comes = Film((Actor("red", "heart", "large", 1, "appears", frame=3),), "vertical")
    goes = Film((Actor("red", "heart", "large", 1, "leaves", frame=NUM_FRAMES - 3),), "vertical")
    assert np.array_equal(render_film(comes)[::-1], render_film(goes))


def test_every_way_at_both_speeds_stays_inside():
    for item in film_items(600, split="train", seed=1):
        film = clip(item).film
        for actor in film.actors:
            places = [at for at in map(actor.at, range(NUM_FRAMES)) if at is not None]
            assert all(7 <= at <= 33 for at in places)
        assert len({actor.lane for actor in film.actors}) == len(film.actors)
        corner = render_film(film)[:, 0, 0]
        assert (corner == BACKGROUNDS[film.background]).all()


def test_sounds_hold_what_their_answers_say():
    """Tones counted by loudness, and their pitch by the strongest partial's spectral line."""
    for item in sound_items(120, split="test", seed=2, families=["tones", "interval"]):
        sound, wave_ = clip(item).sound, clip(item).load().astype(float)
        loud = [np.abs(wave_[(at := onset(sound, place)) : at + 4000]).max() > 3000 for place in range(4)]
        assert sum(loud) == len(sound.tones)
        if item.family == "tones":
            assert item.targets[0].answer == str(sum(loud))
            continue
        pitch = []
        for place in (0, len(sound.tones) - 1):
            part = wave_[onset(sound, place) + 400 :][:3500] * np.hanning(3500)
            spectrum = np.abs(np.fft.rfft(part, 1 << 15))
            pitch.append(np.fft.rfftfreq(1 << 15, 1 / SAMPLE_RATE)[spectrum.argmax()])
        assert item.targets[0].answer == ("higher" if pitch[1] > pitch[0] else "lower")


def test_sources_sound_different_and_samples_are_reproducible():
    waves = {source: render_sound(Sound((Tone(source, 5),))) for source in ("violin", "kettle", "hammer", "bottle")}
    spectra = {source: np.abs(np.fft.rfft(wave_)) for source, wave_ in waves.items()}
    for source, spectrum in spectra.items():
        for other, second in spectra.items():
            likeness = spectrum @ second / np.linalg.norm(spectrum) / np.linalg.norm(second)
            assert (likeness > 0.99) == (source == other)
    sound = Sound((Tone("bottle", 20), Tone("hammer", 3)), 100, 6, 12345)
    assert render_sound(sound).dtype == np.int16
    assert render_sound(sound).shape == (NUM_SAMPLES,)
    assert np.array_equal(SoundClip(sound).load(), render_sound(sound))
    assert np.abs(render_sound(sound)).max() < 32767


@pytest.mark.parametrize("items", [film_items, sound_items])
def test_splits_share_no_content(items):
    def contents(split, n):
        return {getattr(clip(item), "film", None) or clip(item).sound for item in items(n, split=split, seed=0)}

    def told(things):
        return {thing.content for thing in things if len(getattr(thing, "tones", "xx")) > 1}

    train, test = contents("train", 3000), contents("test", 500)
    assert told(train).isdisjoint(told(test))
    assert train.isdisjoint(test)
    assert len(test) > 400


def test_unseen_combinations_are_in_no_training_item_and_in_every_unseen_one():
    for split in ("train", "test"):
        for item in film_items(800, split=split, seed=4):
            assert not any(a.pair in UNSEEN_PAIRS or a.move in UNSEEN_MOVES for a in clip(item).film.actors)
            assert not any(" ".join(pair) in question(item) for pair in UNSEEN_PAIRS)
        for item in sound_items(800, split=split, seed=4):
            assert not any(tone.voice in UNSEEN_VOICES for tone in clip(item).sound.tones)
    for item in film_items(400, split="unseen", seed=4):
        new = [a for a in clip(item).film.actors if a.pair in UNSEEN_PAIRS or a.move in UNSEEN_MOVES]
        assert len(new) == 1
        if item.family in ("direction", "speed", "order"):
            assert new[0].name in question(item)
    for item in sound_items(400, split="unseen", seed=4):
        assert any(tone.voice in UNSEEN_VOICES for tone in clip(item).sound.tones)


def test_every_part_of_an_unseen_move_is_seen():
    assert {move[0] for move in UNSEEN_MOVES} == set(SHAPES)
    moves = {a.move for item in film_items(3000, split="train", seed=0) for a in clip(item).film.actors if a.direction}
    assert len(moves) == len(SHAPES) * len(DIRECTIONS) * 2 - len(UNSEEN_MOVES)


def test_answers_are_balanced():
    for items, families in (
        (film_items, ["presence", "direction"]),
        (sound_items, ["hearing", "interval", "height"]),
    ):
        for family in families:
            answers = [item.targets[0].answer for item in items(600, split="train", seed=0, families=[family])]
            shares = [answers.count(answer) / 600 for answer in set(answers)]
            assert max(shares) < 1.25 / len(shares)
    assert len(FILM_FAMILIES) == 8
    assert len(SOUND_FAMILIES) == 7


def test_exported_files_give_back_every_frame_and_sample(tmp_path):
    items = [*film_items(8, split="train", seed=0), *sound_items(7, split="train", seed=0)]
    path = export_jsonl(items, tmp_path / "set")
    for line, item in zip(path.read_text().splitlines(), items, strict=True):
        part = json.loads(line)["messages"][0]["content"][0]
        file = path.parent / part[part["type"]]
        if part["type"] == "video":
            with Image.open(file) as film:
                assert film.n_frames == NUM_FRAMES or len(set(map(bytes, clip(item).load()))) < NUM_FRAMES
                frames = []
                for number in range(film.n_frames):
                    film.seek(number)
                    frames.append(np.asarray(film.convert("RGB")))
            assert np.array_equal(np.stack(frames)[-1], clip(item).load()[-1])
            assert frames[0].shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        else:
            with wave.open(str(file)) as sound:
                assert sound.getframerate() == SAMPLE_RATE
                samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
            assert np.array_equal(samples, clip(item).load())
    with pytest.raises(UsageError, match="no place for video"):
        export_llava(items[:1], tmp_path / "llava")
