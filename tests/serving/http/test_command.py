"""``alula serve``: from the command line to answers and back."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from alula.cli import serve as command
from alula.errors import AlulaError, UsageError
from alula.serving.http import listen

ALULA = [sys.executable, "-m", "alula", "serve"]


@pytest.mark.slow
def test_a_demo_begins_answers_and_ends(tmp_path: Path) -> None:
    """The whole way in a process of its own: the fledgling, put together, asked, stopped by Ctrl-C."""
    alone = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = [*ALULA, "--demo", "--port", "0"]

    def heeded() -> None:  # jobs in the background of a shell are started with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(demo, stderr=subprocess.PIPE, text=True, env=alone, preexec_fn=heeded) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            assert next(lines).startswith("loading; it will answer at http://127.0.0.1:")
            first = next(line for line in lines if line.startswith("http://"))
            assert "fledgling, fledgling+wings" in first
            url = first.split()[0]
            with urllib.request.urlopen(f"{url}/alula/v1/samples") as response:
                samples = json.load(response)["samples"]
            assert {bool(sample["media"]) for sample in samples} == {True, False}
            content = [{"type": "text", "text": "What do you get for 5 minus 3?"}]
            body = {"model": "fledgling+wings", "messages": [{"role": "user", "content": content}], "temperature": 0}
            request = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
            assert answer["choices"][0]["message"]["content"].strip() == "2"
            assert answer["alula"]["computed_by"] == "fledgling"
            with urllib.request.urlopen(streamed(url, "fledgling")) as response:
                assert response.readline().startswith(b"data: ")
                process.send_signal(signal.SIGINT)  # twice, while an answer is on its way: it is ended, and told so
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                response.read()
            assert process.wait(60) == 130
            left = [line for line in process.stderr.read().splitlines() if line]
            assert len(left) == 2, left  # for clients, and this
            assert left[-1].endswith("stopped")
            assert not list(tmp_path.iterdir())  # what was put together
        finally:
            process.kill()


def streamed(url: str, model: str) -> urllib.request.Request:
    """A request for an answer that is long to come."""
    body = {"model": model, "messages": [{"role": "user", "content": "say it"}], "stream": True, "n": 8}
    data = json.dumps({**body, "max_tokens": 400, "temperature": 2, "top_p": 1}).encode()
    return urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})


def test_sigterm_ends_it_as_an_exception_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, command._ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_port_in_use_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AlulaError, match="is in use") as told:
            run("no-such-model", port=taken.getsockname()[1])
        assert told.value.exit_code == 1
    with pytest.raises(UsageError, match="cannot listen"):
        listen("203.0.113.1", 0)


def run(*models: str, **options: Any) -> None:
    command.serve(list(models) or None, **options)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ([], {}, "which model"),
        (["a"], {"host": "0.0.0.0"}, "every machine"),
        (["a"], {"allow_host": ["10.0.0.1"]}, "no name of a host"),
        (["a"], {"allow_origin": ["*"]}, "no origin"),
        (["a"], {"server_name": ["a b"]}, "no name of a host"),
        (["a"], {"allow_load": True}, "without a directory"),
        (["a"], {"device": "toaster"}, "toaster"),
        (["a=b", "a=c"], {}, "two models"),
        (["=b"], {}, "no directory|no name of a model"),
        (["fledgling=b"], {"demo": True}, "two models"),
        (["ADAPTER"], {}, "is an adapter, and the model that it is put on is not served"),
        (["a=b", "ADAPTER", "ADAPTER"], {}, "two models are called 'a.wings'"),
        (["a=b"], {"bank": Path("bank")}, "reads demonstrations"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(
    models: list[str], options: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "wings" / "final"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=said):
        run(*(str(adapter) if each == "ADAPTER" else each for each in models), **{"port": 0, **options})
    assert capsys.readouterr().err == ""


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-of-the-tests\n")
    file.chmod(0o600)
    monkeypatch.delenv(command.TOKEN, raising=False)
    assert command._token(None) is None
    assert command._token(file) == "a-token-of-the-tests"
    monkeypatch.setenv(command.TOKEN, "another-token-of-the-tests")
    assert command._token(None) == "another-token-of-the-tests"
    file.write_text("short")
    with pytest.raises(UsageError, match="a token has"):
        run("a", token_file=file)
    for mode in (0o644, 0o640):
        file.chmod(mode)
        with pytest.raises(UsageError, match=f"its mode is 0{mode:o}") as told:
            run("a", token_file=file)
        assert told.value.remedy == f"chmod 600 {file}"


def test_a_demo_shows_the_real_model_where_it_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.REAL, raising=False)
    assert command._prepared() == []
    monkeypatch.setenv(command.REAL, str(tmp_path))
    assert command._prepared() == []
    place = tmp_path / "models" / "smollm2-135m-instruct"
    place.mkdir(parents=True)
    assert command._prepared() == [f"real={place}"]


def test_a_missing_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(UsageError, match="fastapi") as told:
        run("a")
    assert told.value.remedy == "pip install 'alula[serve]'"


def test_help_loads_neither_torch_nor_the_server() -> None:
    program = (
        "import sys\nfrom alula.cli import app\nsys.argv = ['alula', 'serve', '--help']\n"
        "try:\n    app.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--allow-host" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
