"""Talking about films and sounds, and evaluating on them: from files to answers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alula.data import DepthError
from alula.errors import HostError, UsageError
from alula.evaluation import compare, evaluate
from alula.evaluation.prompts import takes
from alula.hosts import Host, build_host
from alula.reports import comparison_outcome, experiment_table
from alula.serving import Conversation, Terminal
from alula_fledgling.microworld import export_jsonl, film_items, sense_items, sound_items
from alula_fledgling.tasks import default_tasks, native_tasks
from tests.hosts import tiny
from tests.hosts.universal import making
from tests.serving.made import sensing


@pytest.fixture(scope="module")
def host() -> Host:
    return sensing()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = [*film_items(1, split="test", seed=0), *sound_items(1, split="test", seed=0)]
    return export_jsonl(items, tmp_path_factory.mktemp("media") / "set").parent


def terminal(host: Host) -> Terminal:
    conversation = Conversation(host.model, host.processor, max_new_tokens=4)
    return Terminal(
        conversation,
        interactive=False,
    )


def test_films_and_sounds_can_be_talked_about(host: Host, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = terminal(host)
    film, sound = next((files / "films").iterdir()), next((files / "sounds").iterdir())
    assert talk._line(f"/video {film}")
    assert talk._line(f"/audio {sound}")
    assert [kind for kind, _ in talk.conversation.waiting] == ["video", "audio"]
    assert talk._line("what do you see?")
    assert talk.conversation.waiting == []
    assert [part["type"] for part in talk.conversation.messages[0]["content"]] == ["video", "audio", "text"]
    assert talk._line("and now?")
    assert len(talk.conversation.messages) == 4
    with pytest.raises(UsageError, match="which video"):
        talk._line("/video")
    assert talk._line("a <video> of lines")  # the word, not the place of a film
    assert talk.conversation.messages[4]["content"] == [{"type": "text", "text": "a <video> of lines"}]


def test_what_was_attached_can_be_let_go(host: Host, files: Path) -> None:
    """A clip that the model refuses spoils no later question, and costs no turn."""
    talk = terminal(host)
    assert talk._line("what?")
    talk.conversation.attach_clip("audio", np.zeros(16000 * 60, np.float32))  # longer than the tower hears
    for _ in range(2):
        with pytest.raises(HostError):
            talk._line("what do you hear?")
    assert talk._line("/detach")
    assert talk._line("and now?")
    assert len(talk.conversation.messages) == 4


def test_other_media_are_read_with_what_is_said_behind_their_files(tmp_path: Path) -> None:
    """Points, depth and motion of the microworld, by a host with one encoder for all."""
    items = [next(sense_items(medium, 1, split="test", seed=0)) for medium in ("points", "depth", "motion")]
    folder = export_jsonl(items, tmp_path / "set").parent
    cloud, depth, ride = (next((folder / name).iterdir()) for name in ("clouds", "depth", "motion"))
    talk = terminal(making.host())
    assert talk._line(f"/points {cloud}")
    with pytest.raises(DepthError, match="without a unit"):
        talk._line(f"/depth {depth}")
    with pytest.raises(UsageError, match="no unit of depth"):
        talk._line(f"/depth {depth} unit=feet")
    assert talk._line(f"/depth {depth} unit=mm")
    assert talk._line(f"/motion {ride} start=0 seconds=2")
    assert [kind for kind, _ in talk.conversation.waiting] == ["points", "depth", "motion"]
    assert talk.conversation.waiting[2][1].shape == (40, 6)  # at the rate of the host
    assert talk._line("what is it?")
    assert [part["type"] for part in talk.conversation.messages[0]["content"]] == ["points", "depth", "motion", "text"]


def test_models_that_take_none_say_so(files: Path) -> None:
    plain = build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    with pytest.raises(HostError, match="takes no videos"):
        terminal(plain)._line(f"/video {next((files / 'films').iterdir())}")
    with pytest.raises(UsageError, match="shows videos, but LlavaProcessor takes image only"):
        evaluate(plain.model, plain.processor, native_tasks(["film"], n=2))


def test_tasks_over_films_and_sounds_are_answered_and_kept(host: Host) -> None:
    assert default_tasks(takes(host.processor))[-4:] == ("film", "film_unseen", "sound", "sound_unseen")
    result = evaluate(host.model, host.processor, native_tasks(["film", "sound"], n=6), max_new_tokens=3)
    for name in ("film", "sound"):
        items = result.tasks[name].items
        assert len(items) == 6
        assert len({item.prompt_hash for item in items}) == 6
    shown = result.tasks["film"].items[0].prompt[0].content[0].image
    assert shown is not None
    assert shown.startswith("data:image/png")
    assert result.tasks["sound"].items[0].prompt[0].content[0].text == "[a sound of 20,480 samples]"
    outcome = comparison_outcome(compare(result, result), command="", seconds=0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(experiment_table(outcome))
    shown = console.export_text()
    assert "films (6): right" in shown
    assert "sounds (6): right" in shown
