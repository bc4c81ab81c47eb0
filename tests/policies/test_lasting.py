"""Policies on a host for good: in every forward, gone without a trace, copied and saved with the host."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alula
from alula.errors import AdapterError, UsageError
from alula.evaluation.conditions import fingerprint
from alula.hosts import save_host
from alula.policies import Policy, Prune, Skip, Withdraw, policies_of, put_policies, read_policies, save_policies
from alula.seam import find
from tests import zoo
from tests.grafts.common import CONFIGS, run, wake
from tests.grafts.test_stock_saving import inputs, logits
from tests.hosts import tiny
from tests.policies.test_placement import forwards
from tests.policies.test_withdraw import LAYERS, LAYOUTS

POLICIES: dict[str, Policy] = {
    "withdraw": Withdraw(layer=1),
    "prune": Prune(stages=((1, 0.5),)),
    "skip": Skip(part="mlp", layers=(1, 2)),
}
every_case = pytest.mark.parametrize("case", POLICIES)


def built() -> tuple[Any, dict[str, Tensor]]:
    return zoo.build("llava-llama", layers=LAYERS), zoo.batch("llava-llama", *LAYOUTS)


@every_case
def test_it_does_what_it_does_in_a_block_and_goes_without_a_trace(case: str) -> None:
    model, batch = built()
    bare, config = run(model, "llava-llama", batch), model.config.to_dict()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with POLICIES[case].on(model):
        expected = run(model, "llava-llama", batch)
    attached = POLICIES[case].attach(model)
    assert torch.equal(run(model, "llava-llama", batch), expected)
    assert {name: each.policy for name, each in policies_of(model).items()} == {case: POLICIES[case]}
    attached.detach()
    assert policies_of(model) == {}
    assert find(model) is None
    assert forwards(model) == []
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert model.config.to_dict() == config
    assert torch.equal(run(model, "llava-llama", batch), bare)


@every_case
def test_every_thread_feels_it_and_one_may_do_without(case: str) -> None:
    model, batch = built()
    bare = run(model, "llava-llama", batch)
    attached = POLICIES[case].attach(model)
    held = run(model, "llava-llama", batch)
    with ThreadPoolExecutor(1) as pool, attached.disabled():
        assert not attached.enabled
        assert torch.equal(run(model, "llava-llama", batch), bare)
        assert torch.equal(pool.submit(run, model, "llava-llama", batch).result(), held)
    assert attached.enabled
    assert torch.equal(run(model, "llava-llama", batch), held)


def test_another_may_take_its_place_for_one_request() -> None:
    model, batch = built()
    with Withdraw(layer=3).on(model):
        expected = run(model, "llava-llama", batch)
    with Withdraw(layer=3).on(model), Withdraw(layer=2).on(model):
        both = run(model, "llava-llama", batch)
    attached = Withdraw(layer=2).attach(model)
    with attached.disabled(), Withdraw(layer=3).on(model):
        assert torch.equal(run(model, "llava-llama", batch), expected)
    with Withdraw(layer=3).on(model):
        assert torch.equal(run(model, "llava-llama", batch), both)


@every_case
def test_a_copy_has_its_own(case: str) -> None:
    model, batch = built()
    bare = run(model, "llava-llama", batch)
    POLICIES[case].attach(model)
    held = run(model, "llava-llama", batch)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, "llava-llama", batch), held)
    policies_of(twin)[case].detach()
    assert torch.equal(run(twin, "llava-llama", batch), bare)
    assert torch.equal(run(model, "llava-llama", batch), held)
    assert policies_of(twin) == {}
    again = copy.deepcopy(model)
    policies_of(model)[case].detach()
    assert torch.equal(run(again, "llava-llama", batch), held)


def test_it_stands_beside_grafts() -> None:
    model, batch = built()
    graft = wake(alula.attach(model, CONFIGS["mass"]))
    grafted = run(model, "llava-llama", batch)
    with Withdraw(layer=1).on(model):
        expected = run(model, "llava-llama", batch)
    attached = Withdraw(layer=1).attach(model)
    assert torch.equal(run(model, "llava-llama", batch), expected)
    with pytest.raises(UsageError, match="'wings' is already in use"):
        Withdraw(layer=1).attach(model, "wings")
    attached.detach()
    assert torch.equal(run(model, "llava-llama", batch), grafted)
    assert set(alula.grafts_of(model)) == {"wings"}
    graft.detach()


def test_taken_off_twice_it_leaves_the_next_of_its_name_alone() -> None:
    model = zoo.build("llava-llama", layers=LAYERS)
    first = Withdraw(layer=1).attach(model)
    first.detach()
    second = Withdraw(layer=2).attach(model)
    first.detach()
    assert policies_of(model) == {"withdraw": second}
    assert model.config.alula_policies["withdraw"]["layer"] == 2
    second.detach()
    second.detach()
    assert find(model) is None


def test_names_are_taken_once_and_what_does_not_fit_leaves_nothing() -> None:
    model, _ = built()
    Withdraw(layer=1).attach(model)
    with pytest.raises(UsageError, match="'withdraw' is already in use"):
        Withdraw(layer=2).attach(model)
    Withdraw(layer=2).attach(model, "later")
    with pytest.raises(UsageError, match="cannot name a policy"):
        Withdraw(layer=2).attach(model, "two words")
    with pytest.raises(UsageError, match="withdrawal at layer 9"):
        Withdraw(layer=9).attach(model, "outside")
    assert set(policies_of(model)) == set(model.config.alula_policies) == {"withdraw", "later"}
    with pytest.raises(UsageError, match=r"outside: layer: withdrawal at layer 9"):
        put_policies(model, {"one": Withdraw(layer=1), "outside": Withdraw(layer=9)})
    assert policies_of(model) == {}
    assert find(model) is None


def test_records_of_answers_are_told_apart_by_what_holds() -> None:
    model, _ = built()
    bare = fingerprint(model)
    attached = Withdraw(layer=1).attach(model)
    held = fingerprint(model)
    with attached.disabled():
        assert fingerprint(model) == bare
        with Withdraw(layer=1).on(model):
            assert fingerprint(model) == held
    assert held != bare


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lasting") / "host"
    return save_host(
        alula.build_host(tiny.decoder("llama"), tiny.TOWERS["siglip"][0], tokenizer=tiny.tokenizer()), path
    )


SAVED: dict[str, Callable[[Any, Any, Path], Any]] = {
    "save_pretrained": lambda model, processor, folder: (
        model.save_pretrained(folder),
        processor.save_pretrained(folder),
    ),
    "save_host": lambda model, processor, folder: save_host((model, processor), folder),
}


@pytest.mark.parametrize("how", SAVED)
def test_saved_with_the_host_it_comes_back(host: Path, tmp_path: Path, how: str) -> None:
    model, processor = alula.load_model(host)
    Withdraw(layer=1).attach(model)
    Skip(part="mlp", layers=(0,)).attach(model, "thrifty")
    SAVED[how](model, processor, tmp_path / "saved")
    again = alula.load_model(tmp_path / "saved").model
    assert {name: each.policy for name, each in policies_of(again).items()} == {
        name: each.policy for name, each in policies_of(model).items()
    }
    assert torch.equal(logits(again), logits(model))
    bare = alula.load_model(tmp_path / "saved", policies={}).model
    assert policies_of(bare) == {}
    assert torch.equal(logits(bare), logits(alula.load_model(host).model))
    SAVED[how](bare, processor, tmp_path / "without")  # what was left out does not come back
    assert policies_of(alula.load_model(tmp_path / "without").model) == {}


def test_saved_with_an_adapter_it_comes_back_and_comes_before_the_bases(host: Path, tmp_path: Path) -> None:
    model, processor = alula.load_model(host)
    Withdraw(layer=1).attach(model, "of_base")
    save_host((model, processor), tmp_path / "base")
    loaded = alula.load_model(tmp_path / "base")
    wake(alula.attach(loaded.model, CONFIGS["mass"]))
    alula.save_adapter(loaded.model, tmp_path / "first", base=tmp_path / "base")
    assert set(policies_of(alula.load_model(tmp_path / "first").model)) == {"of_base"}
    put_policies(loaded.model, {"own": Skip(part="mlp", layers=(1,))})
    alula.save_adapter(loaded.model, tmp_path / "second", base=tmp_path / "base")
    again = alula.load_model(tmp_path / "second").model
    assert set(policies_of(again)) == {"own"}
    assert torch.equal(logits(again), logits(loaded.model))


def test_a_file_of_policies_goes_with_any_model(host: Path, tmp_path: Path) -> None:
    model = alula.load_model(host).model
    with pytest.raises(UsageError, match="no policies to save"):
        save_policies(model, tmp_path / "none.json")
    expected: dict[str, Policy] = {"withdraw": Withdraw(layer=1)}
    put_policies(model, expected)
    file = save_policies(model, tmp_path / "policies.json")
    assert read_policies(file) == expected == read_policies(save_policies(expected, tmp_path / "other.json"))
    again = alula.load_model(host, policies=file).model
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        assert inputs(again)["input_ids"].shape == (1, 20)


BROKEN: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not readable as JSON"),
    "another key": ('{"alula_policies": {}, "layer": 3}', "unknown key 'layer'"),
    "no key": ("{}", "it lacks 'alula_policies'"),
    "a list": ('{"alula_policies": []}', "settings by name"),
    "a number": ('{"alula_policies": {"one": 3}}', "settings by name"),
    "another setting": (
        '{"alula_policies": {"one": {"policy_type": "withdraw", "layer": 1, "depth": 2}}}',
        r"one\.depth: unknown key",
    ),
    "another policy": ('{"alula_policies": {"one": {"policy_type": "none"}}}', "no policy of type 'none'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_is_read_strictly(tmp_path: Path, what: str) -> None:
    text, told = BROKEN[what]
    (tmp_path / "policies.json").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_policies(tmp_path / "policies.json")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "settings by name"),
        ({"one": {"policy_type": "withdraw", "layer": 1, "depth": 2}}, r"config\.json: .*one\.depth: unknown key"),
        ({"one": {"policy_type": "withdraw", "layer": 9}}, "withdrawal at layer 9"),
    ],
)
def test_a_saved_host_is_read_strictly(host: Path, tmp_path: Path, settings: Any, told: str) -> None:
    model, processor = alula.load_model(host)
    save_host((model, processor), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "alula_policies": settings}))
    with pytest.raises(AdapterError, match=told):
        alula.load_model(tmp_path / "saved")
    assert policies_of(alula.load_model(tmp_path / "saved", policies={}).model) == {}
