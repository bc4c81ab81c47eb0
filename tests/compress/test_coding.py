"""Directories without their zeros: to the bit what they were, read by alula, refused by everybody else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import alula
from alula import coding
from alula.compress import WeightPruning, decode, encode, is_coded, prune
from alula.errors import HostError, UsageError
from alula.hosts import load_host
from tests.hosts import tiny


def bits(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        (value.dtype, value.shape) == (b[key].dtype, b[key].shape)
        and torch.equal(value.reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8))
        for key, value in a.items()
    )


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host in bfloat16, half of whose decoder's matrices are zero, and whose embeddings are few."""
    path = tmp_path_factory.mktemp("coding") / "half"
    decoder = tiny.decoder("qwen3", intermediate_size=512, num_hidden_layers=6)
    model, processor = alula.build_host(decoder, tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer())
    model.to(torch.bfloat16).generation_config.repetition_penalty = 1.5
    prune(model, WeightPruning(method="magnitude", sparsity=0.5, per="output"))
    alula.save_host((model, processor), path)
    return path


@pytest.fixture(scope="module")
def coded(half: Path) -> Path:
    encode(half, half.parent / "coded")
    return half.parent / "coded"


def test_it_pays(half: Path, coded: Path, tmp_path: Path) -> None:
    matrices = sum(value.nbytes for name, value in bits(half).items() if "proj.weight" in name and "language" in name)
    found = encode(half, tmp_path / "again")
    assert found.plain_bytes == sum(value.nbytes for value in bits(half).values())
    assert found.plain_bytes - found.coded_bytes == pytest.approx(matrices * (1 - 0.5 - 1 / 16), rel=0.005)
    size = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (half, coded)}
    assert size[coded] / size[half] == pytest.approx(found.share, abs=0.02)  # beside names in headers
    assert not list(coded.glob("model*"))


def test_alula_reads_it_to_the_bit(half: Path, coded: Path) -> None:
    for load in (alula.load_model, load_host):
        plain, model = load(half).model, load(coded).model
        assert same_bits(dict(plain.state_dict()), dict(model.state_dict()))
        assert type(model) is type(plain)
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert model.name_or_path == model.config.name_or_path == str(coded)
        assert model.generation_config.to_dict() == plain.generation_config.to_dict()
        assert model.generation_config.repetition_penalty == 1.5
        own, other = model.config.to_dict(), plain.config.to_dict()
        assert {**own, "_name_or_path": ""} == {**other, "_name_or_path": ""}
    assert alula.load_model(coded, dtype=torch.float32).model.dtype == torch.float32


def test_a_text_model(tmp_path: Path) -> None:
    model = tiny.decoder("llama", tied=True)
    prune(model, WeightPruning(method="magnitude", sparsity=0.8))
    model.save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    encode(tmp_path / "plain", tmp_path / "plain")  # in its own place
    assert is_coded(tmp_path / "plain")
    loaded = alula.load_model(tmp_path / "plain").model
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_others_refuse_it(coded: Path) -> None:
    """A format that others take for another, or for none, gives random weights (findings/)."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(coded)


def test_an_ordinary_directory_comes_back(half: Path, coded: Path, tmp_path: Path, monkeypatch: Any) -> None:
    decode(coded, tmp_path / "plain")
    assert same_bits(bits(half), bits(tmp_path / "plain"))
    assert {path.name for path in half.iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert same_bits(dict(model.state_dict()), dict(alula.load_model(half).model.state_dict()))

    monkeypatch.setattr(coding, "_FILE_BYTES", 1 << 16)  # several files
    encode(half, tmp_path / "parts")
    assert len([*(tmp_path / "parts").glob("coded-*")]) > 3
    decode(tmp_path / "parts", tmp_path / "whole")
    assert same_bits(bits(half), bits(tmp_path / "whole"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert same_bits(dict(model.state_dict()), dict(alula.load_model(tmp_path / "parts").model.state_dict()))


def test_every_kind_of_number(tmp_path: Path) -> None:
    """Negative zeros, numbers that are none, integers, scalars, nothing at all, sizes that fill no byte."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        value = torch.randn(7, 9, generator=generator).to(dtype)
        value.view(torch.uint8)[:5] = 0
        value.view(torch.uint8)[6, -1] = 0x80  # -0.0, or a number that is nearly nothing
        tensors[f"a.{dtype}"] = value
    tensors |= {
        "nan": torch.full((40,), float("nan")),
        "b": torch.arange(40),
        "c": torch.zeros(()),
        "d": torch.zeros(0, 3),
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    save_file(tensors, plain / "model.safetensors")
    encode(plain, tmp_path / "coded")
    assert same_bits(coding.read_coded(tmp_path / "coded"), tensors)


def test_what_transformers_would_load_is_what_is_coded(half: Path, tmp_path: Path) -> None:
    """Not shards of an earlier model, which the index does not name; and nothing that is no weight's stays behind."""
    weights, path = bits(half), tmp_path / "plain"
    shutil.copytree(half, path, ignore=shutil.ignore_patterns("model*"))
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, path / file, {"format": "pt"})
    save_file(
        {name: torch.ones_like(value) for name, value in weights.items()}, path / "model-00003-of-00003.safetensors"
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "pytorch_model.bin").write_bytes(b"of an earlier model")
    encode(path, path / "coded")  # inside of it
    assert same_bits(coding.read_coded(path / "coded"), weights)
    own = {file.name for file in (path / "coded").iterdir()}
    kept = {file.name for file in half.iterdir()} - {"model.safetensors"}
    assert own == {*kept, coding.MANIFEST, "coded-00001.safetensors"}
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(HostError, match="a shard that the index names is missing"):
        encode(path, tmp_path / "target")


def test_grafts_in_a_checkpoint_are_read(half: Path, tmp_path: Path) -> None:
    loaded = alula.load_model(half)
    graft = alula.attach(loaded.model, alula.WingsConfig(rank=4))
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.processor.save_pretrained(tmp_path / "plain")
    encode(tmp_path / "plain", tmp_path / "coded")
    again = alula.load_model(tmp_path / "coded").model
    assert same_bits(dict(again.state_dict()), dict(loaded.model.state_dict()))
    graft.detach()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_weights_of_two_kinds(coded: Path, half: Path, tmp_path: Path) -> None:
    """A model was saved into a coded directory: what was coded is not taken for it."""
    path = tmp_path / "coded"
    shutil.copytree(coded, path)
    alula.load_model(half).model.save_pretrained(path)
    for read in (alula.load_model, lambda path: decode(path, tmp_path / "target")):
        with pytest.raises(HostError, match=r"coded weights and model\.safetensors"):
            read(path)


def test_nothing_to_gain(half: Path, coded: Path, tmp_path: Path) -> None:
    model = tiny.decoder("llama")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="no tensor becomes smaller"):
        encode(tmp_path / "dense", tmp_path / "target")
    with pytest.raises(UsageError, match="coded already"):
        encode(coded, tmp_path / "target")
    with pytest.raises(HostError, match="not coded"):
        decode(half, tmp_path / "target")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match="nothing to code"):
        encode(tmp_path / "empty", tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "empty"}  # nothing half-written


@pytest.mark.parametrize("broken", ["version", "manifest", "escape", "missing", "cut", "bits", "shape", "stranger"])
def test_damage(broken: str, coded: Path, tmp_path: Path) -> None:
    path = tmp_path / "coded"
    shutil.copytree(coded, path)
    manifest, file = json.loads((path / coding.MANIFEST).read_text()), path / "coded-00001.safetensors"
    tensors = load_file(file)
    name = next(name.removeprefix("kept/") for name in tensors if name.startswith("kept/"))
    match broken:
        case "version":
            manifest["alula_coding"] = 2
        case "manifest":
            del manifest["tensors"][name]["shape"]
        case "escape":
            manifest["tensors"][name]["file"] = "../coded/coded-00001.safetensors"
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:-5])
        case "bits":
            tensors[f"kept/{name}"][0] ^= 255
            tensors[f"kept/{name}"][1] = 0
            save_file(tensors, file)
        case "shape":
            manifest["tensors"][name]["shape"][0] += 8
        case "stranger":
            save_file({**tensors, "plain/other": torch.zeros(1)}, file)
    (path / coding.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HostError):
        alula.load_model(path)
    with pytest.raises(HostError):
        decode(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_weights_that_are_missing_are_named(coded: Path, tmp_path: Path) -> None:
    path = tmp_path / "coded"
    shutil.copytree(coded, path)
    manifest, file = json.loads((path / coding.MANIFEST).read_text()), path / "coded-00001.safetensors"
    name = next(name for name in manifest["tensors"] if name.endswith("up_proj.weight"))
    del manifest["tensors"][name]
    (path / coding.MANIFEST).write_text(json.dumps(manifest))
    save_file({key: value for key, value in load_file(file).items() if not key.endswith(name)}, file)
    with pytest.raises(HostError, match="the weights lack 1 parameters"):
        alula.load_model(path)
