"""What lies on the server's disk: adapters that come and go, reports that are shown; nobody leaves the folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from safetensors.torch import save_file
from starlette.testclient import TestClient

from alula.errors import UsageError
from alula.serving.engine import Engine
from alula.serving.http import Entry, Settings, adapter_name, lineup
from tests.serving.http.conftest import ASK, CHAT, client_of

LOAD, UNLOAD = "/alula/v1/models/load", "/alula/v1/models/unload"


@pytest.fixture(scope="module")
def loading(engine: Engine, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder = tmp_path_factory.mktemp("allowed")
    shutil.copytree(parts / "adapters", folder / "adapters")
    (folder / "adapters" / "empty").mkdir()
    (folder / "adapters" / "leads-out").symlink_to(parts / "host")
    shutil.copytree(parts / "host", folder / "beside")
    return client_of(engine, Settings(may_load=True, adapters=folder / "adapters"))


def test_an_adapter_comes_and_goes(loading: TestClient) -> None:
    assert loading.get("/alula/v1/adapters").json()["data"] == [
        {"path": "wings/final", "type": "adapter", "loaded_as": None}
    ]
    made = loading.post(LOAD, json={"name": "base+new", "path": "wings/final"})
    assert (made.status_code, made.json()["id"], made.json()["alula"]["base"]) == (201, "base+new", "base")
    assert loading.get("/alula/v1/adapters").json()["data"][0]["loaded_as"] == "base+new"
    body = {"model": "base+new", "messages": ASK, "max_tokens": 2}
    assert loading.post(CHAT, json=body).status_code == 200
    again = loading.post(LOAD, json={"name": "base+new", "path": "wings/final"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "name_taken")
    for name in ("base", "base+wings"):  # from elsewhere, as the server was started
        kept = loading.post(UNLOAD, json={"name": name})
        assert (kept.status_code, kept.json()["error"]["code"]) == (403, "unloading_not_allowed")
        assert loading.get(f"/v1/models/{name}").status_code == 200
    assert loading.post(UNLOAD, json={"name": "base+new"}).json() == {"name": "base+new", "unloaded": True}
    assert loading.post(CHAT, json=body).status_code == 404
    assert loading.post(UNLOAD, json={"name": "base+new"}).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["../beside", "wings/../../beside", "leads-out", "empty", "none", "/etc", "", "\x00", "a" * 5_000, "~", "wings"],
)
def test_nothing_outside_of_the_folder_is_loaded(loading: TestClient, path: str) -> None:
    found = loading.post(LOAD, json={"name": "base+x", "path": path})
    assert found.status_code in (400, 404)
    assert found.json()["error"]["param"] == "path"


@pytest.mark.parametrize("name", ["x", "none+x", "base+wings+x", "../x", "", "a b", "+x"])
def test_an_adapter_is_called_after_a_base(loading: TestClient, name: str) -> None:
    found = loading.post(LOAD, json={"name": name, "path": "wings/final"})
    if name == "base+wings+x":  # on the base as well
        assert found.status_code == 201
        loading.post(UNLOAD, json={"name": name})
    else:
        assert (found.status_code, found.json()["error"]["param"]) == (400, "name")


def test_what_cannot_be_loaded_is_told_without_the_servers_folders(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    save_file({}, tmp_path / "empty" / "model.safetensors")  # without one the refusal is a sentence of our own
    client = client_of(engine, Settings(may_load=True, adapters=tmp_path))
    found = client.post(LOAD, json={"name": "empty", "path": "empty"})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, "not_loadable", "path")
    assert "Unrecognized model in empty." in error["message"]  # transformers names the whole path
    assert str(tmp_path) not in found.text


def test_nothing_is_loaded_where_that_was_not_allowed(client: TestClient) -> None:
    for response in (
        client.get("/alula/v1/adapters"),
        client.post(LOAD, json={"name": "base+x", "path": "wings/final"}),
        client.post(UNLOAD, json={"name": "base+wings"}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (403, "loading_not_allowed")


# -- reports -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(engine: Engine, tmp_path: Path) -> tuple[TestClient, Path]:
    runs = tmp_path / "runs"
    (runs / "one" / "audit").mkdir(parents=True)
    (runs / "one" / "report.html").write_text("<title>Wings &amp; base</title><script>1</script>")
    (runs / "one" / "audit" / "page a?b#c.html").write_text("no title")
    (runs / "one" / "weights.bin").write_bytes(b"secret")
    (runs / ".hidden").mkdir()
    (runs / ".hidden" / "report.html").write_text("secret")
    (tmp_path / "outside.html").write_text("secret")
    (runs / "link.html").symlink_to(tmp_path / "outside.html")
    (runs / "way-out").symlink_to(tmp_path)
    os.mkfifo(runs / "pipe.html")
    return client_of(engine, Settings(runs=runs, token="a-token-of-the-tests")), runs


def entries(client: TestClient) -> list[dict[str, Any]]:
    found = client.get("/alula/v1/runs", headers={"authorization": "Bearer a-token-of-the-tests"}).json()
    assert found["folder"] == "runs"
    return list(found["entries"])


def test_reports_open_by_their_signed_address_in_a_sandbox(shown: tuple[TestClient, Path]) -> None:
    client, _ = shown
    found = {entry["path"]: entry for entry in entries(client)}
    assert set(found) == {"one/report.html", "one/audit/page a?b#c.html"}
    assert (found["one/report.html"]["title"], found["one/report.html"]["kind"]) == ("Wings & base", "report")
    assert found["one/audit/page a?b#c.html"]["kind"] == "audit"
    for entry in found.values():
        page = client.get(entry["url"])  # no token: a tab shows none
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert policy.startswith("sandbox allow-scripts")
        assert "allow-same-origin" not in policy
        assert "default-src 'none'" in policy


def test_no_other_file_opens(shown: tuple[TestClient, Path]) -> None:
    client, runs = shown
    url = next(entry["url"] for entry in entries(client) if entry["path"] == "one/report.html")
    base, key = url.split("?key=")[0].removesuffix("one/report.html"), url.split("?key=")[1]
    for path in ("one/weights.bin", "../outside.html", "link.html", "way-out/outside.html", ".hidden/report.html"):
        for given in (key, "", "x", "\u00e9"):
            found = client.get(f"{base}{quote(path, safe='')}", params={"key": given})
            assert (found.status_code, "secret" in found.text) == (404, False), path
    assert client.get(url.split("?")[0]).status_code == 404
    # what became a link since it was listed
    (runs / "one" / "report.html").unlink()
    (runs / "one" / "report.html").symlink_to(runs.parent / "outside.html")
    assert client.get(url).status_code == 404


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_of_what_is_served(tmp_path: Path) -> None:
    adapter = tmp_path / "runs" / "wings" / "final"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    found = lineup([str(adapter), f"base+mine={adapter}", "base=some/host", "org/bird", "fledgling"])
    assert [entry.called for entry in found] == ["base", "bird", "fledgling", "wings", "base+mine"]
    assert adapter_name(found[3], ["base"]) == "base+wings"
    with pytest.raises(UsageError, match=rf"could be put on any of a, b\n.*such as a\+wings={adapter}"):
        adapter_name(Entry(None, str(adapter)), ["a", "b"])
    with pytest.raises(UsageError, match=rf"is an adapter, .* not served\n.*alula serve BASE {adapter}"):
        adapter_name(Entry(None, str(adapter)), [])
    for wrong in (["a=x", "a=y"], ["x/a", "y/a"], ["a b=x"], ["a="]):
        with pytest.raises(UsageError):
            lineup(wrong)
    assert lineup(["runs/a=b/final"])[0].path == "runs/a=b/final"
