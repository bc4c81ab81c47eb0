"""Settings for the whole suite: one thread per worker, no network, quiet libraries."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes of their own, too
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads that wait for one another while both cores are busy

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch._dynamo import guards
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import alula_fledgling
from alula_fledgling.weights import ELSEWHERE
from tests import zoo

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
guards.profile_guard_manager = lambda *_: 0.0  # it flushes the caches to time guards, for a log


def pytest_collection() -> None:
    """Until all is imported and collected, no collection of garbage looks through ever more of it."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: later collections of garbage leave it out."""
    gc.collect()
    gc.freeze()
    gc.enable()
    # pytest comes to listen at every logger that does not propagate, six times a test and there are sixty of torch's;
    # and where somebody listens at one of them, torch writes down all it compiles
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(autouse=True)
def _seed() -> None:
    zoo.reseed(0)


@pytest.fixture
def transformers_says(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers warns of, also of what it warned of in this process before and says but once."""
    library: Any = transformers_logging.get_logger("transformers")
    library.warning_once.__func__.cache_clear()
    library.addHandler(caplog.handler)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    yield caplog
    library.removeHandler(caplog.handler)
    transformers_logging.set_verbosity(level)


@pytest.fixture(scope="session")
def shallow_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fledgling of three layers of six: real weights for tests of what is done with them, not of how well."""
    folder = copytree(alula_fledgling.directory(), tmp_path_factory.mktemp("fledgling") / "shallow")
    model = AutoModelForCausalLM.from_pretrained(folder / "llm")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers, model.config.layer_types = 3, model.config.layer_types[:3]
    model.save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="module")
def shallow(shallow_files: Path) -> Iterator[None]:
    """The fledgling is the shallow one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ELSEWHERE, str(shallow_files))
        yield


_KILLED = """
import os, signal, sys
from alula.files import atomic_directory, atomic_file

with {"file": atomic_file, "directory": atomic_directory}[sys.argv[2]](sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed_while_writing() -> Callable[..., None]:
    """Let a process be killed while it writes a file, or a directory: the kind is the second argument."""

    def kill(target: Path, kind: str = "file") -> None:
        before = set(target.parent.glob("*")) if target.parent.exists() else set()
        done = subprocess.run([sys.executable, "-c", _KILLED, str(target), kind], timeout=30)
        assert done.returncode == -signal.SIGKILL
        assert len(set(target.parent.glob("*")) - before) == 1

    return kill
