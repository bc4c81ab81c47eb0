"""Named pipes in place of files: refused by name at once, where opening one would wait for ever."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alula
from alula.data import Quarantine, open_source
from alula.data.annotations import read_questions
from alula.data.errors import RecordError
from alula.errors import AlulaError, FilesError
from alula.evaluation.journal import Journal
from alula.evaluation.mentions import ObjectWords
from alula.evaluation.results import RunResult
from alula.probes import AttentionShift
from alula.training.layout import RunDirectory
from alula.training.metrics import read_rows
from tests.hosts import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLM on disk with an adapter on it."""
    root = tmp_path_factory.mktemp("models")
    llm = tiny.decoder("llama")
    llm.save_pretrained(root / "llm")
    tiny.tokenizer().save_pretrained(root / "llm")
    alula.attach(llm, alula.WingsConfig(rank=2))
    alula.save_adapter(llm, root / "adapter", base="../llm")
    return root


def refused(action: Callable[[], Any], pipe: Path) -> None:
    """Assert that ``action`` ends by an error naming ``pipe``, within seconds."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert errors, f"waits for {pipe}"
    assert isinstance(errors[0], AlulaError), errors[0]
    assert "a named pipe, not a file" in str(errors[0])
    assert errors[0].where == str(pipe)


@pytest.mark.parametrize(
    ("directory", "file"),
    [("llm", "model.safetensors"), ("llm", "tokenizer.json"), ("llm", "generation_config.json"), ("llm", "merges.txt"),
     ("adapter", "adapter_model.safetensors"), ("adapter", "adapter_config.json")],
)  # fmt: skip
def test_in_model_directories(model: Path, tmp_path: Path, directory: str, file: str) -> None:
    for name in ("llm", "adapter"):
        shutil.copytree(model / name, tmp_path / name)
    pipe = tmp_path / directory / file
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    refused(lambda: alula.load_model(tmp_path / directory), pipe)
    if directory == "adapter":
        refused(lambda: alula.load_adapter(alula.load_model(tmp_path / "llm").model, tmp_path / directory), pipe)


READERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda pipe: open_source({"jsonl": str(pipe)}),
    "llava": lambda pipe: open_source({"llava": str(pipe)}),
    "parquet": lambda pipe: open_source({"dataset": str(pipe)}),
    "pope": lambda pipe: list(read_questions(pipe, images=pipe.parent)),
    "synonyms": ObjectWords.read,
    "results": RunResult.load,
    "journal": lambda pipe: Journal(pipe, {}),
    "probe": AttentionShift.load,
    "metrics": read_rows,
    "quarantine": lambda pipe: Quarantine(pipe).add(RecordError("bad")),
    "unusable": lambda pipe: Quarantine(pipe).entries(),
}


@pytest.mark.parametrize("name", READERS)
def test_in_place_of_data_and_records(tmp_path: Path, name: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(lambda: READERS[name](pipe), pipe)


def test_in_a_dataset_and_in_place_of_a_lock(tmp_path: Path) -> None:
    for folder, file in (("saved", "state.json"), ("run", ".lock")):
        (tmp_path / folder).mkdir()
        os.mkfifo(tmp_path / folder / file)
    refused(lambda: open_source({"dataset": str(tmp_path / "saved")}), tmp_path / "saved" / "state.json")
    with pytest.raises(FilesError, match="named pipe"), RunDirectory(tmp_path / "run").locked():
        pass
