"""What is handed on computes what it computed, and lies in one place: merged, exported, pushed."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import alula
from alula.cli import app as cli
from alula.compress import WeightPruning, decode, encode, prune
from alula.errors import AdapterError, AlulaError, HostError, UsageError
from alula.exporting import export_model, merge_model, push_model
from alula.grafts.experts import export_lora
from alula.hosts import save_host
from alula.policies import Skip, Withdraw, policies_of, put_policies
from tests.hosts import tiny

PICTURE = {"type": "image", "image": Image.new("RGB", (32, 32), "red")}
PROJECTOR = ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, and a LoRA, a Wings and a prefix adapter of it."""
    root = tmp_path_factory.mktemp("exporting")
    host = alula.build_host(tiny.decoder("qwen3"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    save_host(host, root / "host")
    model, processor = alula.load_model(root / "host")
    alula.attach(model, alula.WingsConfig(rank=2))
    scramble(model)
    alula.save_adapter(model, root / "wings", base=root / "host", processor=processor)
    for name, config in {
        "lora": LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)", modules_to_save=PROJECTOR),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }.items():
        model = get_peft_model(alula.load_model(root / "host").model, config)
        scramble(model)
        model.peft_config["default"].base_model_name_or_path = "../host"
        model.save_pretrained(root / name)
    return root


def scramble(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or ".alula." in name:
                parameter.normal_(std=0.3)


def logits(model: Any, processor: Any) -> torch.Tensor:
    messages = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_a_merged_host_is_stock_and_computes_what_the_adapter_did(models: Path, tmp_path: Path, capsys: Any) -> None:
    before = logits(*alula.load_model(models / "lora"))
    out = merge_model(models / "lora", tmp_path / "merged")
    assert not (out / "adapter_config.json").exists()
    stock = AutoModelForImageTextToText.from_pretrained(out)
    after = logits(stock, AutoProcessor.from_pretrained(out, backend="pil"))
    assert torch.allclose(before, after, atol=1e-4)
    plain = logits(*alula.load_model(models / "host"))
    assert not torch.allclose(plain, after, atol=1e-2)  # the adapter did something
    # by hand: W + B A * alpha / r, and the projector as a whole
    own, base = (dict(each.named_parameters()) for each in (stock, alula.load_model(models / "host").model))
    name = "model.language_model.layers.0.self_attn.q_proj"
    adapter = dict(alula.load_model(models / "lora").model.named_parameters())
    a, b = (adapter[f"base_model.model.{name}.lora_{each}.default.weight"] for each in "AB")
    assert torch.allclose(own[f"{name}.weight"], base[f"{name}.weight"] + b @ a * 8 / 4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("wings", AdapterError, "wings acts on some tokens"),
        ("prefix", AdapterError, "changes no weight"),
        ("host", UsageError, "nothing to merge"),
    ],
)
def test_what_is_no_change_of_weights_is_not_merged(
    models: Path, tmp_path: Path, name: str, error: type[AlulaError], said: str
) -> None:
    with pytest.raises(error, match=said):
        merge_model(models / name, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["host", "lora", "wings"])
def test_an_exported_model_needs_nothing_beside_it(models: Path, tmp_path: Path, name: str) -> None:
    before = logits(*alula.load_model(models / name))
    (tmp_path / "final").symlink_to(models / name)  # as runs name their models
    export_model(tmp_path / "final", tmp_path / "here" / "mine")
    moved = shutil.move(tmp_path / "here" / "mine", tmp_path / "elsewhere")
    assert torch.equal(logits(*alula.load_model(moved)), before)
    again = export_model(moved, tmp_path / "again")  # what was exported is a model like any other
    assert torch.equal(logits(*alula.load_model(again)), before)


def test_what_cannot_be_handed_on_is_said(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies inside"):
        export_model(models / "wings", models / "wings" / "copy")
    with pytest.raises(UsageError, match="no directory here"):
        export_model("nowhere/final", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match="not a model directory"):
        export_model(tmp_path / "empty", tmp_path / "out")
    alone = tmp_path / "alone"
    shutil.copytree(models / "wings", alone)
    with pytest.raises(UsageError, match="is not there"):
        export_model(alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_host_has_the_policies_of_its_adapter(models: Path, tmp_path: Path) -> None:
    """Those that the adapter was saved with come before its host's."""
    model, processor = alula.load_model(models / "host")
    put_policies(model, {"of_host": Withdraw(layer=1)})
    save_host((model, processor), tmp_path / "host")
    shutil.copytree(models / "lora", tmp_path / "lora")
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    own = {"own": Skip(part="mlp", layers=(1,)).to_dict()}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**said, "alula_policies": own}))
    before = alula.load_model(tmp_path / "lora")
    after = alula.load_model(merge_model(tmp_path / "lora", tmp_path / "merged"))
    assert set(policies_of(after.model)) == {"own"}
    assert torch.allclose(logits(*before), logits(*after), atol=1e-4)


def test_nothing_is_written_over_what_a_model_is_made_of(models: Path, tmp_path: Path) -> None:
    """Over its own host a merged model would be changed twice by the adapter, which still lies there."""
    before = logits(*alula.load_model(models / "lora"))
    for write in (merge_model, export_model):
        for target in (models / "host", models / "host" / "inside", models / "lora", models):
            with pytest.raises(UsageError, match="lies inside"):
                write(models / "lora", target)
        (tmp_path / write.__name__).mkdir()
        (tmp_path / write.__name__ / "diary.txt").write_text("mine")
        with pytest.raises(UsageError, match="other things than a model"):
            write(models / "lora", tmp_path / write.__name__)
        assert (tmp_path / write.__name__ / "diary.txt").read_text() == "mine"
    assert torch.equal(logits(*alula.load_model(models / "lora")), before)


def test_what_lies_beside_an_adapter_comes_along(models: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(models / "lora", own)
    shutil.copytree(models / "host", tmp_path / "host")
    (own / "host").mkdir()
    (own / "host" / "notes.txt").write_text("of the adapter")
    (own / "host" / "gone").symlink_to("nowhere")
    out = export_model(own, tmp_path / "out")
    assert [file.name for file in (out / "host").iterdir()] == ["notes.txt"]
    assert torch.equal(logits(*alula.load_model(out)), logits(*alula.load_model(own)))
    said = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "."}))
    with pytest.raises(UsageError, match="names itself"):
        export_model(own, tmp_path / "again")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one commit asks of it; what was committed is in ``files``."""

    repositories: ClassVar[dict[str, dict[str, Any]]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    token = "hf_of_the_test"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._say(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = asked
            self._say(200, {"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(sent)["files"]]
            self._say(200, {"files": [{**each, "shouldIgnore": False} for each in files]})
        elif "/commit/" in self.path:
            for each in map(json.loads, sent.splitlines()):
                if each["key"] == "file":
                    self.files[each["value"]["path"]] = base64.b64decode(each["value"]["content"])
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            where = f"http://{self.headers['Host']}/{repository}/commit/{'0' * 40}"
            self._say(200, {"commitOid": "0" * 40, "commitUrl": where, "success": True})
        else:
            self._say(200, {"errors": [], "warnings": []})  # /api/validate-yaml

    def _say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_loads_where_it_is_fetched(models: Path, tmp_path: Path, hub: str) -> None:
    where = push_model(models / "wings", "me/my-wings", private=True, api=HfApi(endpoint=hub, token=Hub.token))
    assert where.startswith(hub)
    asked = Hub.repositories["me/my-wings"]  # releases of huggingface_hub say it one way or the other
    assert asked.get("visibility") == "private" or asked.get("private") is True
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "host/config.json"} <= Hub.files.keys()
    for name, content in Hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(*alula.load_model(tmp_path)), logits(*alula.load_model(models / "wings")))
    assert sorted(path.name for path in models.iterdir()) == ["host", "lora", "prefix", "wings"]  # nothing is left


def test_a_hub_that_refuses_is_told(models: Path, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(AlulaError, match="the hub refuses") as raised:
        push_model(models / "host", "me/mine", api=HfApi(endpoint=hub, token="hf_wrong"))
    assert "hf auth login" in (raised.value.remedy or "")
    with pytest.raises(AlulaError, match="the hub refuses"):
        push_model(models / "host", "me/mine/too/deep", api=HfApi(endpoint=hub, token=Hub.token))
    assert Hub.files == {}
    with pytest.raises(AlulaError, match="cannot be reached"):
        push_model(models / "host", "me/mine", api=HfApi(endpoint="http://127.0.0.1:9", token=Hub.token))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["alula", "push", str(models / "host"), "me/mine"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "offline" in capsys.readouterr().err


def test_no_saver_replaces_what_is_not_its_own(models: Path, tmp_path: Path) -> None:
    """Notes, a folder beside a model (checkpoints, a repository, the host that an export brought along), a model of
    another kind; of its own kind it does."""
    host = alula.load_model(models / "host")
    model, _ = alula.load_model(models / "wings")
    seen, _ = alula.load_model(models / "host")
    alula.attach(seen, alula.ExpertsConfig(rank=2, tokens="seen"))
    prune(host.model, WeightPruning(method="magnitude", sparsity=0.6))
    half, coded = save_host(host, tmp_path / "half"), tmp_path / "coded"
    encode(half, coded)
    savers: dict[str, tuple[Callable[[Path], Any], Path]] = {  # and what it replaces
        "save_host": (lambda path: save_host(host, path), models / "host"),
        "save_host, told to": (lambda path: save_host(host, path, overwrite=True), models / "wings"),
        "save_adapter": (lambda path: alula.save_adapter(model, path), models / "wings"),
        "export_lora": (lambda path: export_lora(seen, path), models / "lora"),
        "merge_model": (lambda path: merge_model(models / "lora", path), models / "wings"),
        "export_model": (lambda path: export_model(models / "lora", path), models / "wings"),
        "encode": (lambda path: encode(half, path), models / "host"),
        "decode": (lambda path: decode(coded, path), models / "host"),
    }
    for name, (save, own) in savers.items():
        there = tmp_path / name
        for held, told in {
            "notes": "other things than a model",
            "checkpoint-5": "checkpoint-5/ beside a model",
            ".git": r"\.git/ beside a model",
        }.items():
            if held != "notes":
                shutil.copytree(own, there)
            (there / held).mkdir(parents=True)
            (there / held / "kept").write_text("kept")
            before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
            with pytest.raises(UsageError, match=told):
                save(there)
            assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
            shutil.rmtree(there)
        shutil.copytree(own, there)
        (there / "old").write_text("")
        save(there)
        assert not (there / "old").exists()
    kinds = {"host": "a whole model|other host", "wings": r"wings, this|an adapter", "lora": r"lora, this|an adapter"}
    for name in ("save_host", "save_adapter", "export_lora"):
        save, own = savers[name]
        for other in kinds.keys() - {own.name}:
            shutil.copytree(models / other, tmp_path / name / other)
            with pytest.raises(UsageError, match=kinds[other]):
                save(tmp_path / name / other)
    both = shutil.copytree(models / "lora", tmp_path / "both")
    shutil.copytree(models / "host", both, dirs_exist_ok=True)
    with pytest.raises(UsageError, match="holds an adapter"):
        save_host(host, both)


def test_an_adapter_is_not_saved_over_the_host_it_lies_around(models: Path, tmp_path: Path) -> None:
    """An exported one that was tuned on, under its own name."""
    out = export_model(models / "wings", tmp_path / "out")
    model, processor = alula.load_model(out)
    with pytest.raises(UsageError, match="host/ beside a model"):
        alula.save_adapter(model, out)
    alula.load_model(alula.save_adapter(model, tmp_path / "further", processor=processor))
    export_model(models / "wings", out)  # it brings its own


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(models: Path, tmp_path: Path) -> None:
    """A directory on another disk, there or not yet."""
    host = alula.load_model(models / "host")
    for name in ("there", "new"):
        link, disk = tmp_path / name, tmp_path / "disk" / name
        link.symlink_to(disk)
        if name == "there":
            shutil.copytree(models / "host", disk)
            (disk / "old").write_text("")
        assert save_host(host, link) == link
        assert link.is_symlink()
        assert not (disk / "old").exists()
        assert sorted(path.name for path in disk.iterdir()) == sorted(path.name for path in link.iterdir())
        alula.load_model(link)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new", "there"]


def test_a_host_is_saved_whatever_is_around_it(models: Path, tmp_path: Path) -> None:
    """Compiled, and over what stock transformers saved; with an adapter of PEFT on it, it is none."""
    model, processor = alula.load_model(models / "host")
    stock = tmp_path / "stock"
    model.save_pretrained(stock)
    facts = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({key: facts[key] for key in facts if key != "architectures"}))
    for saved in (model, torch.compile(model)):
        save_host((saved, processor), stock)
        assert alula.load_model(stock).model.state_dict().keys() == model.state_dict().keys()
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = get_peft_model(alula.load_model(models / "host").model, lora)
    with pytest.raises(UsageError, match="adapter of PEFT"):
        save_host((wrapped, processor), tmp_path / "wrapped")
    with pytest.raises(UsageError, match="Linear is no model of transformers"):
        save_host((torch.nn.Linear(1, 1), processor), tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
