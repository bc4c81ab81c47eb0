"""Runs that are killed, really killed, and go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from alula.errors import DataError, RecipeError, UsageError
from alula.training import check, inputs, layout, train
from alula.training.checkpoint import SEAL, is_complete, newest, prune, seal
from alula.training.layout import RunDirectory
from alula.training.metrics import read_rows, rewind
from tests.forked import Forked
from tests.training.conftest import MakeRecipe, rows

STEPS = 12
WINGS: dict[str, Any] = {
    "method": "wings",
    "train": {"wings": 1e-2, "projector": 1e-2},
    "wings": {"rank": 4, "dropout": 0.1},  # dropout: the random state has to come back too
    "data": {
        "sources": [{"microworld": "visual"}],
        "text_replay": {"ratio": 0.25, "sources": [{"microworld": "text"}]},
    },
    "batch_size": 4,
    "micro_batch_size": 2,
}


class _Stop(TrainerCallback):
    """Raises at the end of a step, as an interrupt would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class _Kill(_Stop):
    """Kills the process at the end of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def stopped(made: Any, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(made, callbacks=[_Stop(step)], quiet=True)


@pytest.mark.parametrize(
    ("stop", "feature_cache"), [(1, None), (4, {"memory_mb": 1}), (5, None), (5, {"memory_mb": 1})]
)
def test_an_interrupted_run_ends_with_the_same_rows_and_weights(
    recipe: MakeRecipe, stop: int, feature_cache: dict[str, Any] | None
) -> None:
    """Stopped before the first checkpoint, at one, and after one."""
    options = {**WINGS, "steps": 7, "save_every": 3, "feature_cache": feature_cache}
    whole = train(recipe(**options), quiet=True)
    broken = recipe(run={"output_dir": f"{whole.directory}-broken"}, **options)
    stopped(broken, stop)
    result = train(broken, resume="auto", quiet=True)
    assert rows(result.directory) == rows(whole.directory)
    left, right = (load_file(r.final / "adapter_model.safetensors") for r in (whole, result))
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_finished_stages_are_not_run_again(recipe: MakeRecipe) -> None:
    made = recipe(stages=[{"name": "one"}, {"name": "two"}])
    with pytest.raises(KeyboardInterrupt):
        train(made, callbacks=[_StopInStage("02-two")], quiet=True)
    before = (Path(made.output_dir) / "stages/01-one/stage.json").stat().st_mtime_ns
    result = train(made, quiet=True)
    assert [stage.skipped for stage in result.stages] == [True, False]
    assert (result.directory / "stages/01-one/stage.json").stat().st_mtime_ns == before
    assert [row["stage"] for row in rows(result.directory)] == ["one"] * 3 + ["two"] * 3


def lessons(path: Path, *answers: str) -> None:
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


def test_a_run_whose_data_changed_is_refused(
    recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "lessons.jsonl", tmp_path / "words.jsonl", tmp_path / "later.jsonl"]
    one, words, later = files
    for file in files:
        lessons(file, "one", "two", "six")
    replay = {"ratio": 0.5, "sources": [{"jsonl": str(words)}]}
    first = {"name": "first", "data": {"sources": [{"jsonl": str(one)}], "text_replay": replay}, "save_every": 1}
    made = recipe(stages=[first, {**first, "name": "second", "data": {"sources": [{"jsonl": str(later)}]}}])
    stopped(made, 1)  # before the first checkpoint
    lessons(one, "six", "two")
    stopped(made, 2)  # with nothing learned yet, it began with these
    for file, key in [(one, "data.sources.0"), (words, "text_replay.sources.0"), (later, "second.data.sources.0")]:
        was = file.read_text()
        file.write_text(was.replace("six", "ten"))
        with pytest.raises(UsageError, match=rf"other data: {file} .*{key}.* same size, other content"):
            train(made, quiet=True)
        lessons(file, "one")
        with pytest.raises(UsageError, match=rf"{file} .* had [0-9,]+ bytes, now [0-9,]+"):
            train(made, quiet=True)
        file.write_text(was)
        os.utime(file)  # written anew, with the same content
    with pytest.raises(KeyboardInterrupt):
        train(made, callbacks=[_StopInStage("02-second")], quiet=True)
    one.unlink()  # of a stage that is done
    lessons(later, "one")
    with pytest.raises(UsageError, match=rf"{later} .*second.data"):
        train(made, quiet=True)
    (Path(made.output_dir) / "data.json").unlink()  # as a run of an earlier alula
    capfd.readouterr()
    assert [stage.skipped for stage in train(made).stages] == [True, False]
    assert "what its data were" in " ".join(capfd.readouterr().err.split())
    later.unlink()
    assert train(made, quiet=True).was_done


def test_data_that_change_while_the_run_is_at_an_earlier_stage(recipe: MakeRecipe, tmp_path: Path) -> None:
    lessons(file := tmp_path / "later.jsonl", "one", "two")

    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lessons(file, "two", "one")

    class Rewrite(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "first" in args.output_dir:
                os.utime(file, (0, state.global_step))

    stages = [{"name": "first"}, {"name": "second", "data": {"sources": [{"jsonl": str(file)}]}}]
    made = recipe(stages=stages)
    with pytest.raises(UsageError, match=rf"{file} \(stages.second"):
        train(made, callbacks=[Change()], quiet=True)
    lessons(file, "one", "two")
    again = recipe({"output_dir": str(tmp_path / "again")}, stages=stages)
    assert len(train(again, callbacks=[Rewrite()], quiet=True).stages) == 2  # the same content, written anew


def test_shards_that_come_and_go_are_named(recipe: MakeRecipe, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "one"}]
    table = datasets.Dataset.from_list([{"messages": turns}] * 3)
    for name in ("train-0", "train-1", "test-0"):
        table.to_parquet(tmp_path / "set" / f"{name}.parquet")
    table.save_to_disk(tmp_path / "saved")
    sources = [{"dataset": str(tmp_path / "set"), "split": "train"}, {"dataset": str(tmp_path / "saved")}]
    made = recipe(data={"sources": sources}, save_every=1)
    stopped(made, 2)
    (tmp_path / "set" / "test-0.parquet").unlink()  # is not read
    (tmp_path / "set" / "train-1.parquet").rename(tmp_path / "set" / "train-2.parquet")
    with pytest.raises(UsageError, match=r"train-1.parquet .* is no longer there"):
        train(made, quiet=True)
    (tmp_path / "set" / "train-2.parquet").rename(tmp_path / "set" / "train-1.parquet")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"left by a map")
    assert train(made, quiet=True).final.is_dir()


def test_long_files_are_told_apart_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_BLOCK", 8)
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    mark = inputs._digest(tmp_path / "file", 40)
    for place, seen in [(0, True), (199, True), (50, True), (20, False)]:
        (tmp_path / "file").write_bytes(content[:place] + b"!" + content[place + 1 :])
        assert (inputs._digest(tmp_path / "file", 40) != mark) is seen
        assert inputs._digest(tmp_path / "file", 200) != inputs._digest(tmp_path / "file", 40)


class _StopInStage(TrainerCallback):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage in args.output_dir and state.global_step == 2:
            raise KeyboardInterrupt


def test_incomplete_checkpoints_are_not_trusted_and_go_away(recipe: MakeRecipe) -> None:
    options = {**WINGS, "steps": 7, "save_every": 2, "keep_checkpoints": 3}
    whole = train(recipe(**options), quiet=True)
    broken = recipe(run={"output_dir": f"{whole.directory}-broken"}, **options)
    stopped(broken, 7)
    checkpoints = Path(broken.output_dir) / "stages/01-only/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (checkpoints / "checkpoint-6" / SEAL).unlink()  # killed before the seal
    optimizer = checkpoints / "checkpoint-4" / "optimizer.pt"  # damaged afterwards
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert newest(checkpoints) == checkpoints / "checkpoint-2"
    result = train(broken, quiet=True)
    assert rows(result.directory) == rows(whole.directory)


def test_what_a_kill_leaves_is_removed_by_the_same_command(
    recipe: MakeRecipe, killed_while_writing: Callable[..., None]
) -> None:
    """Killed before the recipe has its name, while the model is exported, and between a stage's record and its end."""
    made = recipe()
    run = RunDirectory(Path(made.output_dir))
    killed_while_writing(run.recipe)
    assert train(made, quiet=True).final.is_dir()
    stage = run.stages(made)[0]
    names = sorted(path.relative_to(run.root) for path in run.root.rglob("*"))
    (stage.checkpoints / "checkpoint-3").mkdir(parents=True)
    stage.within_budget.touch()
    killed_while_writing(stage.model, "directory")
    killed_while_writing(run.final)
    killed_while_writing(run.metrics)
    assert train(made, quiet=True).was_done
    assert sorted(path.relative_to(run.root) for path in run.root.rglob("*")) == names


def tree(root: Path) -> dict[str, bytes | None]:
    """All that a run's directory holds, by name: contents of files, None for folders."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.name != ".lock"}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def poem(path: Path, words: int) -> dict[str, Any]:
    """Data of one record with an answer of so many words."""
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "word " * words}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return {"sources": [{"jsonl": str(path)}]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": {"sources": [{"jsonl": "nowhere.jsonl"}]}}, DataError),  # when data are opened
        ({"method": "lora", "train": {}, "lora": {"targets": ["nothing"]}}, RecipeError),  # when models are looked at
        (
            {"method": "wings", "train": {"wings.textual": 1e-3}, "wings": {"learners": ["visual"]}},
            RecipeError,
        ),  # built
        ("long", DataError),  # when the first record is read
    ],
)
def test_a_run_that_cannot_begin_leaves_the_one_it_would_replace(
    recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, error: type[Exception]
) -> None:
    if change == "long":
        change = {"data": poem(tmp_path / "long.jsonl", 600), "method": "full", "train": {"llm": 1e-3}}
    finished = train(recipe(), quiet=True)
    before = tree(finished.directory)
    with pytest.raises(error):
        train(recipe(**change), resume=False)
    assert tree(finished.directory) == before
    assert "holds the earlier one as it was" in " ".join(capfd.readouterr().err.split())
    assert train(recipe(), quiet=True).was_done


def test_a_run_that_starts_over_replaces_the_earlier_one_with_its_first_checkpoint(recipe: MakeRecipe) -> None:
    """Interrupted before it, the earlier run is what is there; interrupted after it, the new one goes on."""
    finished = train(recipe(), quiet=True)
    before = tree(finished.directory)
    other = recipe(steps=4, save_every=2)
    for step, left in ((1, 3), (3, 4)):
        with pytest.raises(KeyboardInterrupt):
            train(other, callbacks=[_Stop(step)], resume=False, quiet=True)
        assert (tree(finished.directory) == before) == (step == 1)
        steps = recipe(steps=left, **({"save_every": 2} if left == 4 else {}))
        assert train(steps, quiet=True).was_done == (step == 1)
    assert len(rows(finished.directory)) == 4
    assert not [path for path in finished.directory.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_a_killed_run_that_started_over_does_not_cost_the_earlier_one(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after any of the moves that set the earlier run aside, and after any of those that bring it back."""
    finished = train(recipe(), quiet=True)
    before, other = tree(finished.directory), recipe(steps=4)
    moves, rename = 0, Path.rename

    def last(self: Path, target: Any) -> Path:
        nonlocal moves
        moves -= 1
        if moves < 0:
            raise KeyboardInterrupt  # and so again for whoever would bring it back: nobody does after a kill
        return rename(self, target)

    for killed_after in range(16):
        for killed_again_after in (99, killed_after // 2):
            with monkeypatch.context() as patched:
                patched.setattr(Path, "rename", last)
                for allowed in (killed_after, killed_again_after):
                    moves = allowed
                    with pytest.raises((KeyboardInterrupt, RecipeError)):
                        train(recipe(method="lora", train={}, lora={"targets": ["nothing"]}), resume=False, quiet=True)
            assert train(recipe(), quiet=True).was_done
            assert tree(finished.directory).keys() == before.keys()
    assert len(rows(train(other, resume=False, quiet=True).directory)) == 4


def test_a_check_says_of_what_a_kill_left_what_the_next_session_says(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Of a run that started over, killed at any moment; of data that changed; of a run that is not there."""
    lessons(tmp_path / "one.jsonl", "one", "two")
    data = {"sources": [{"jsonl": str(tmp_path / "one.jsonl")}]}
    full: dict[str, Any] = {"method": "full", "train": {"llm": 1e-3}, "data": data}
    earlier, other = recipe(**full), recipe(**full, steps=4)
    with pytest.raises(UsageError, match="no run to resume"):
        check(earlier, resume=True)
    finished = train(earlier, quiet=True)

    for killed_after in range(9):
        start_over_killed(other, killed_after)
        left = tree(finished.directory)
        for resume in ("auto", True):
            check(earlier, resume=resume)
            with pytest.raises(UsageError, match=r"another recipe: stages\.0\.steps was 3, now 4"):
                check(other, resume=resume)
        assert tree(finished.directory) == left
        with pytest.raises(UsageError, match=r"another recipe: stages\.0\.steps was 3, now 4"):
            train(other, quiet=True)
        assert train(earlier, quiet=True).was_done
    made = recipe(**full, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(made, callbacks=[_Stop(2)], resume=False, quiet=True)
    check(made)
    lessons(tmp_path / "one.jsonl", "one", "six")
    for again in (check, train):
        with pytest.raises(UsageError, match=r"other data: .*one\.jsonl"):
            again(made)
    check(made, resume=False)


def start_over_killed(recipe: Any, moves: int) -> None:
    """Start a run over, killed after so many moves of the earlier one's parts, or else in its first step."""

    def run() -> None:
        rename, left = Path.rename, moves

        def last(self: Path, target: Any) -> Path:
            nonlocal left
            left -= ".earlier" in Path(target).parts
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Path, "rename", last)
            train(recipe, callbacks=[_Kill(1)], resume=False, quiet=True)

    assert Forked(run).done().returncode == -signal.SIGKILL


def test_the_lock_ends_with_its_process_and_not_with_the_data_workers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with contextlib.ExitStack() as stack:
        with run.locked():
            worker = os.fork()
            if worker == 0:  # as a data worker, which finds out some seconds later that its parent was killed
                signal.pause()
            stack.callback(os.waitpid, worker, 0)
            stack.callback(os.kill, worker, signal.SIGKILL)
            assert not lockable_elsewhere(run)
            with pytest.raises(UsageError, match="another process is training here"), run.locked():
                pass
            assert not lockable_elsewhere(run)  # still
        assert lockable_elsewhere(run)


def lockable_elsewhere(run: RunDirectory) -> bool:
    """Whether another process can hold the run."""
    other = os.fork()
    if other == 0:
        layout._held.clear()
        try:
            with run.locked():
                os._exit(0)
        except UsageError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0


def test_sealing_and_pruning(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w" * step)
        assert not is_complete(folder)
        seal(folder)
        assert is_complete(folder)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "something-else").mkdir()
    prune(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-30", "something-else"}
    assert newest(tmp_path, clean=True) == tmp_path / "checkpoint-20"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "something-else"}


def test_metrics_are_rewound_over_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = [
        {"stage": "a", "step": 1},
        {"stage": "a", "step": 2},
        {"stage": "b", "step": 1},
        {"stage": "b", "step": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in written) + '{"stage": "b", "st')
    assert read_rows(path) == written
    assert read_rows(path, "b") == written[2:]
    rewind(path, "b", 1)
    assert read_rows(path) == written[:3]
    rewind(path, "c", 0)
    assert read_rows(path) == written[:3]
    assert read_rows(path, "c") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_loses_nothing(plain: Callable[..., Any], tmp_path: Path) -> None:
    """`kill -9` during a step, during the writing of a checkpoint, and during the export; then one run to the end."""
    raw = plain(**WINGS, steps=STEPS, save_every=4)
    raw["stages"].append({**raw["stages"][0], "name": "more", "wings": None, "steps": 2})
    whole = train({**raw, "output_dir": str(tmp_path / "whole")}, quiet=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    run = Path(raw["output_dir"])
    metrics, checkpoints = run / "metrics.jsonl", run / "stages/01-only/checkpoints"
    moments: list[Callable[[], bool]] = [
        lambda: len(read_rows(metrics)) >= 6,  # in a step
        lambda: (checkpoints / "checkpoint-8").exists(),  # the directory is there, its files are being written
        lambda: any(run.glob("stages/01-only/.model-*")) or (run / "stages/01-only/model").exists(),  # exporting
    ]
    for moment in moments:
        kill_at(file, moment)
        assert not (run / "final").exists()
    result = json.loads(cli(file, check=True).stdout)
    assert [stage["skipped"] for stage in result["stages"]].count(False) >= 1
    assert rows(run) == rows(whole.directory)
    left, right = (load_file(Path(d) / "final/adapter_model.safetensors") for d in (run, whole.directory))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert not list(run.rglob("checkpoint-*"))
    assert not list(run.rglob(".*.partial"))
    again = cli(file, check=True, json_too=False)
    assert "nothing to do" in again.stdout


def cli(file: Path, *, check: bool, json_too: bool = True) -> subprocess.CompletedProcess[str]:
    done = Forked.command("train", file, *(["--json"] if json_too else [])).done()
    assert done.returncode == 0 or not check, done.stderr
    return done


def kill_at(file: Path, moment: Callable[[], bool]) -> None:
    """Start the run in a process of its own and kill it as soon as ``moment`` has come."""
    process = Forked.command("train", file)
    deadline = time.monotonic() + 120
    while not moment():
        if process.over or time.monotonic() > deadline:
            pytest.fail(f"the moment never came: {process.kill().stderr[-2000:]}")
        time.sleep(0.0005)
    assert process.kill().returncode == -signal.SIGKILL


def test_settings_that_came_later_do_not_make_it_another_recipe(recipe: MakeRecipe) -> None:
    """A run of an earlier version, whose recipe does not name what was not yet there, goes on."""
    options = {**WINGS, "steps": 5, "save_every": 2}
    broken = recipe(**options)
    stopped(broken, 3)
    path = Path(broken.output_dir) / "recipe.yaml"
    written = yaml.safe_load(path.read_text())
    for key in ("distill", "feature_cache", "betas"):
        del written["stages"][0][key]
    written["host"]["connector"] = "mlp2x_gelu"  # as earlier versions wrote
    path.write_text(yaml.safe_dump(written))
    assert train(broken, quiet=True).stages[0].steps == 5
    del written["stages"][0]["schedule"]
    written["stages"][0]["weight_decay"] = 0.1
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(UsageError, match=r"another recipe: stages\.0\.weight_decay was 0\.1, now 0\.0"):
        train(broken, quiet=True)
