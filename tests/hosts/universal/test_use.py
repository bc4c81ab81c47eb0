"""Chat, evaluation, probes and audits take universal hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from alula.data import Collator, ImageRef, Sample
from alula.data.samples import MEDIA as REFERENCES
from alula.evaluation import evaluate, prompts
from alula.evaluation.generation import put
from alula.evaluation.prompts import takes
from alula.hosts import Host
from alula.inputs import Intake
from alula.media import MEDIA
from alula.probes import Geometry, watch
from alula.serving import Conversation
from alula_fledgling.tasks import default_tasks, native_tasks
from tests.hosts.universal.making import ALL, TURNS, host, inputs, item, said


@pytest.fixture(scope="module")
def whole() -> Host:
    return host("siglip")


def test_it_says_what_it_takes_and_at_which_rate(whole: Host) -> None:
    intake = Intake(whole.processor)
    assert intake.takes == takes(whole.processor) == {*ALL}
    assert intake.loading("motion") == {"rate": 20}
    assert intake.loading("video") == {"frames": 3}
    assert intake.loading("points") == {}
    few = Intake(host("siglip", ("image",)).processor)
    assert few.takes == {"image"}
    assert few.loading("motion") == {}


def test_prompts_are_told_apart_by_what_they_hold(whole: Host) -> None:
    intake = Intake(whole.processor)
    turns = [said(("points", item("points", seed)), "?") for seed in (0, 1, 0)]
    one, other, same = (intake.render(turn).hash for turn in turns)
    assert one == same != other
    depth = item("depth")
    views = [
        [{"role": "user", "content": [{"type": "depth", "depth": depth, "image": item("image", n)}]}] for n in (0, 1)
    ]
    assert len({intake.render(view).hash for view in views}) == 2
    kept = prompts.turns(TURNS[3] + TURNS[1])
    assert [part.text for part in kept[0].content[:3]] == [
        "[a motion recording of 40 x 6 values]",
        "[a motion recording of 40 x 6 values]",
        "[a brain response of 20 values]",
    ]
    assert str(kept[1].content[3].image).startswith("data:image/png")  # of depth


def test_what_readers_hand_over_goes_into_batches(tmp_path: Path) -> None:
    """Files of the media that transformers knows nothing of, with a picture beside the depth, to a loss."""
    made = host("siglip")
    content = []
    for medium in ("points", "depth", "normals", "motion", "response"):
        np.save(tmp_path / f"{medium}.npy", item(medium))
        options = {"motion": {"rate": 20, "acceleration": "m/s^2", "rotation": "rad/s"}}.get(medium, {})
        content.append({"type": medium, medium: REFERENCES[medium].from_path(tmp_path / f"{medium}.npy", **options)})
    content[1]["image"] = ImageRef.from_object(item("image"))
    told = {"role": "assistant", "content": [{"type": "text", "text": "two words"}]}
    sample = Sample("one", [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}, told])
    batch = Collator(made.processor)([sample, sample])
    expected = inputs(made, [said(*((medium, item(medium)) for medium in ("points", "normals", "motion", "response")))])
    for medium in ("points", "normals", "motion", "response"):
        keyword = MEDIA[medium].inputs[0]
        torch.testing.assert_close(batch[keyword][:1], expected[keyword])
    assert not torch.equal(batch["depth_values"][0, 0], batch["depth_values"][0, 1])
    assert bool(torch.isfinite(made.model(**batch).loss))


def test_a_picture_beside_nothing_is_refused(whole: Host) -> None:
    with pytest.raises(ValueError, match="depth_images are beside depth maps, and there are none"):
        whole.processor(text="what?", depth_images=[item("image")])


def test_items_can_be_talked_about(whole: Host) -> None:
    talk = Conversation(whole.model, whole.processor, max_new_tokens=3)
    for medium in ("points", "motion", "depth"):
        talk.attach_clip(medium, item(medium))
    assert talk.ask("what do you see?", lambda text: None).tokens == 3
    assert talk.ask("and now?", lambda text: None).tokens == 3
    assert [part["type"] for part in talk.messages[0]["content"]] == ["points", "motion", "depth", "text"]


def test_questions_are_answered(whole: Host) -> None:
    made = host("siglip", ("image", "video"))
    result = evaluate(made.model, made.processor, native_tasks(["film", "visual"], n=4), max_new_tokens=2)
    assert {name: len(task.items) for name, task in result.tasks.items()} == {"film": 4, "visual": 4}


def test_what_a_host_takes_is_asked_about(whole: Host) -> None:
    further = ("points", "points_unseen", "depth", "normals", "motion", "response", "response_unseen")
    assert default_tasks(takes(whole.processor))[-len(further) :] == further
    names = ("points", "points_unseen", "depth", "depth_pictured", "normals_pictured", "motion", "response")
    tasks = native_tasks(names, n=3)
    for task in tasks:
        for asked in task.items():
            (part,) = (part for part in asked.messages[0]["content"] if part["type"] != "text")
            assert part["type"] == task.name.split("_")[0]
            assert ("image" in part) is task.name.endswith("pictured")
            assert task.score(asked, asked.gold) == 1
    others = ("response", "motion", "normals_pictured")  # of other shapes than the tiny host's
    sizes = [task for task in tasks if task.name not in others]
    result = evaluate(whole.model, whole.processor, sizes, max_new_tokens=2)
    assert {name: len(found.items) for name, found in result.tasks.items()} == {task.name: 3 for task in sizes}
    assert len({item.prompt_hash for item in result.tasks["points"].items}) == 3


def test_half_precision_is_given_points_as_they_are() -> None:
    made = host("siglip")
    model: Any = made.model.bfloat16()
    asked = [Intake(made.processor).render(turn) for turn in TURNS]
    with put(model, asked, GenerationConfig(pad_token_id=0, max_new_tokens=2)) as given:
        assert given["point_values"].dtype == torch.float32
        assert given["pixel_values"].dtype == torch.bfloat16
        assert len(model.generate(**given, max_new_tokens=2)) == len(TURNS)


@torch.no_grad()
def test_probes_know_the_media(whole: Host) -> None:
    batch: dict[str, Any] = inputs(whole, TURNS)
    probe = Geometry()
    with watch(whole.model, [probe]):
        whole.model(**batch)
    found = probe.result()
    kinds = {"text", "points", "audio", "depth", "image", "motion", "response", "normals", "video"}
    assert set(found.sites["stream"].kinds) == kinds
    assert np.isfinite(found.sites["stream"].kinds["points"].norms["median"][0].value)
