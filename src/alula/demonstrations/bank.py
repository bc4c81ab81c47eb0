"""Fused tokens on disk: each demonstration is encoded once, by whoever needs it first.

A bank is a directory: ``bank.json`` says of which host, map and dtype it is, and ``records/KEY.safetensors`` holds one
demonstration, KEY being a hash of its picture, words, map, host and dtype. Records are written under another name and
renamed when whole, so any number of processes may fill one bank and read from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alula.anatomy import unwrap
from alula.chat_template import TemplateSettings
from alula.demonstrations.demonstration import Demonstration
from alula.demonstrations.encoding import Shot, aim_of, encode
from alula.draws import Draw
from alula.errors import BankError
from alula.files import atomic_file, contents, read_json, regular, telling, write_json
from alula.grafts.aim import AimGraft
from alula.grafts.storage import digest_of
from alula.inputs import Intake
from alula.seam import DECLARED, NAME, POLICIES, declared

_FORMAT = 1
_FACTS = ("dtype", "host", "map")
_OF_RECORD = ("picture", "question", "answer", "question_ids", "answer_ids", "sha256", *_FACTS)
_REMEDY = "remove that file: the demonstration is encoded again when it is asked for"


class Bank:
    """A directory of encoded demonstrations, of one host, map and dtype.

    Args:
        directory: made when the first demonstration is added.
        model: a host with an AIM graft (`alula.AimConfig`).
        processor: its processor, or an `Intake`.
        name: of the graft, where there are several.

    Raises:
        UsageError: the model has no such graft. BankError: the directory is the bank of another host, map or dtype,
            which is named, or none. FilesError: the file system refuses.
    """

    def __init__(
        self, directory: str | os.PathLike[str], model: nn.Module, processor: Any, *, name: str | None = None
    ) -> None:
        self.directory = Path(directory)
        self.model, self.intake, self.name = model, Intake.of(processor), name
        aim = aim_of(model, name)
        self.facts = {
            "host": _host(model, aim, self.intake),
            "map": _map(aim),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        self._check()

    @property
    def records(self) -> Path:
        """Where records are."""
        return self.directory / "records"

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """Keys of the demonstrations that are there, sorted."""
        if not self.records.is_dir():
            return []
        return [path.stem for path in contents(self.records) if path.suffix == ".safetensors"]

    def key(self, demonstration: Demonstration) -> str:
        """What a demonstration is found by in this bank."""
        return _key(demonstration.fingerprint(), demonstration.question, demonstration.answer, self.facts)

    def __contains__(self, demonstration: object) -> bool:
        return isinstance(demonstration, Demonstration) and self._path(self.key(demonstration)).exists()

    def encoded(
        self,
        demonstrations: Sequence[Demonstration],
        *,
        batch_size: int = 16,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Shot]:
        """Shots of demonstrations: those that are there are read, others are encoded and written first.

        Args:
            batch_size: demonstrations that are encoded in one forward.
            on_done: called with how many were encoded, batch by batch.

        Raises:
            BankError: a record is damaged, or of another host, map or dtype; the file is named.
        """
        keys = [self.key(demonstration) for demonstration in demonstrations]
        missing = {
            key: demonstration
            for key, demonstration in zip(keys, demonstrations, strict=True)
            if not self._path(key).exists()
        }
        wanted = [*missing.items()]
        for start in range(0, len(wanted), batch_size):
            some = wanted[start : start + batch_size]
            shots = encode(self.model, self.intake, [each for _, each in some], name=self.name, batch_size=batch_size)
            for (key, demonstration), shot in zip(some, shots, strict=True):
                self._write(key, demonstration, shot)
            if on_done is not None:
                on_done(len(some))
        return [self.read(key) for key in keys]

    def shots(self, count: int, *, seed: int = 0) -> list[Shot]:
        """So many of the demonstrations that are there, drawn without replacement; the first of more are the same.

        Raises:
            BankError: there are fewer, or one cannot be used.
        """
        keys = self.keys()
        if count > len(keys):
            raise BankError(
                f"{count} shots are asked for, and {len(keys)} demonstrations are there",
                where=str(self.directory),
                remedy="fill it: alula bank MODEL DATA --output DIRECTORY; or ask for fewer",
            )
        Draw("shots", seed).shuffle(keys)
        return [self.read(key) for key in keys[:count]]

    def read(self, key: str) -> Shot:
        """The demonstration of a key, on the CPU.

        Raises:
            BankError: it is not there, damaged, or of another host, map or dtype.
        """
        path = self._path(key)
        if not path.exists():
            raise BankError("no such record", where=str(path), remedy="add the demonstration: Bank.encoded")
        try:
            with telling(path), safe_open(regular(path), "pt") as stored:
                told, fused = stored.metadata() or {}, stored.get_tensor("fused")
        except SafetensorError as error:
            raise BankError(f"is damaged: {error}", where=str(path), remedy=_REMEDY) from None
        if lacking := [name for name in _OF_RECORD if name not in told]:
            raise BankError(f"is no record: it lacks {lacking[0]!r}", where=str(path), remedy=_REMEDY)
        _refuse_others(told, self.facts, path)
        try:
            question_ids, answer_ids = (
                tuple(map(int, json.loads(told[f"{part}_ids"]))) for part in ("question", "answer")
            )
        except (ValueError, TypeError):
            raise BankError("is damaged: its token ids cannot be read", where=str(path), remedy=_REMEDY) from None
        is_whole = (
            fused.dim() == 2
            and len(fused) == len(question_ids) + len(answer_ids)
            and told["sha256"] == _sha(fused)
            and key == _key(told["picture"], told["question"], told["answer"], self.facts)
        )
        if not is_whole:
            raise BankError("is damaged: it does not hold what it says", where=str(path), remedy=_REMEDY)
        return Shot(told["question"], told["answer"], question_ids, answer_ids, fused, key)

    def _write(self, key: str, demonstration: Demonstration, shot: Shot) -> None:
        if not (self.directory / "bank.json").exists():
            write_json(self.directory / "bank.json", {"format": _FORMAT, **self.facts})
        self._check()
        fused = shot.fused.detach().cpu().contiguous()
        told = {
            "picture": demonstration.fingerprint(),
            "question": shot.question,
            "answer": shot.answer,
            "question_ids": json.dumps(shot.question_ids),
            "answer_ids": json.dumps(shot.answer_ids),
            "sha256": _sha(fused),
            **self.facts,
        }
        with atomic_file(self._path(key)) as partial:
            save_file({"fused": fused}, partial, told)

    def _path(self, key: str) -> Path:
        return self.records / f"{key}.safetensors"

    def _check(self) -> None:
        """Refuse a directory that is another's."""
        facts = self.directory / "bank.json"
        is_other = not facts.exists() and self.directory.is_dir() and bool(contents(self.directory))
        if facts.exists():  # asked once more where something else is there: another process may have begun the bank
            told = read_json(facts)
            if not isinstance(told, dict) or told.get("format") != _FORMAT:
                raise BankError("is no bank of this version", where=str(facts), remedy="name another directory")
            _refuse_others(told, self.facts, facts)
        elif is_other:
            raise BankError(
                "holds something else than a bank", where=str(self.directory), remedy="name another directory"
            )


def shots_in(
    directory: str | os.PathLike[str],
    model: nn.Module,
    processor: Any,
    count: int | None = None,
    *,
    seed: int = 0,
    template: TemplateSettings | None = None,
) -> list[Shot]:
    """Shots of a bank that is there.

    Args:
        count: how many, drawn by ``seed``; None: all.
        template: variables for the chat template, which the bank was filled under.

    Raises:
        BankError: there is no bank, or as `Bank` and `Bank.shots`.
    """
    if not (Path(directory) / "bank.json").is_file():
        raise BankError(
            "holds no bank", where=os.fspath(directory), remedy="fill one: alula bank MODEL DATA --output DIRECTORY"
        )
    bank = Bank(directory, model, Intake.of(processor, template))
    return bank.shots(len(bank) if count is None else count, seed=seed)


def _refuse_others(told: Mapping[str, Any], facts: Mapping[str, str], path: Path) -> None:
    """Raise a BankError where something was encoded otherwise than this model would."""
    for name in _FACTS:
        if told.get(name) != facts[name]:
            detail = f": {told.get(name)}, and this model computes in {facts[name]}" if name == "dtype" else ""
            raise BankError(
                f"was encoded with another {name}{detail}",
                where=str(path),
                remedy="load the model that filled it: its adapter, dtype, template settings, and nothing else "
                "attached; or fill another directory by alula bank",
            )


def _key(picture: str, question: str, answer: str, facts: Mapping[str, str]) -> str:
    parts = [picture, question, answer, *(facts[name] for name in _FACTS)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _host(model: nn.Module, aim: AimGraft, intake: Intake) -> str:
    """What of a host states depend on: weights (those of other grafts and adapters included), grafts and policies by
    their settings, and how words and pictures become its inputs: processor, tokenizer, chat template."""
    host: Any = unwrap(model)
    own = {name: value for name, value in host.state_dict().items() if f".{NAME}.{aim.name}." not in name}
    settings = {name: told for name, told in declared(host.config, DECLARED).items() if name != aim.name}
    parts = [
        type(host).__name__,
        digest_of(own),
        settings,
        declared(host.config, POLICIES),
        intake.processor.to_dict() if intake.is_multimodal else None,
        _words(intake.tokenizer),
        {name: value for name, value in intake.keywords.items() if name != "chat_template"},
        intake.keywords.get("chat_template", intake.chat_template),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _words(tokenizer: Any) -> Any:
    """How a tokenizer reads words: all that the fast one is made of, but for what calls leave in it; of another its
    vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    told: dict[str, Any] = json.loads(backend.to_str())
    return {name: value for name, value in told.items() if name not in ("padding", "truncation")}


def _map(aim: AimGraft) -> str:
    """Of the map: its settings and every bit of its weights."""
    digest = hashlib.sha256(json.dumps(aim.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(aim.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_sha(value.detach()).encode())
    return digest.hexdigest()


def _sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
