"""Reading off a model what may move its scores."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alula.errors import UsageError
from alula.evaluation.results import Conditions
from alula.grafts import Graft
from alula.hosts.decoding import Decoding
from alula.policies import active_policies
from alula.seam import find

_PACKAGES = ("alula", "torch", "transformers", "peft", "tokenizers", "numpy", "pillow", "scipy")
_SAMPLES = 64


def conditions(
    model: nn.Module, decoding: Decoding, batch_size: int, template: Mapping[str, Any] | None = None
) -> Conditions:
    """Return the circumstances of a run of ``model``, whose chat template was told ``template``."""
    parameter = next(model.parameters())
    return Conditions(
        decoding=decoding,
        batch_size=batch_size,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=_device(parameter.device),
        backend=_backend(getattr(model, "config", None)),
        versions=versions(),
        template=dict(template or {}),
        policies=[policy.to_dict() for policy in active_policies(model)],
    )


def decisive(state: Conditions) -> dict[str, Any]:
    """Return what answers and measurements may hang on besides weights and inputs: begun under one, they are not gone
    on with under another, since the result names one of each."""
    names = ("torch", "transformers", "peft", "alula")
    return {
        **{key: getattr(state, key) for key in ("dtype", "device", "backend")},
        "versions": {name: state.versions.get(name) for name in names},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that take part in an answer."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(model: nn.Module) -> str:
    """Return a sha256 (hex) over every weight's name, shape, dtype and some 64 evenly spaced values, and over which
    grafts and PEFT adapters speak and which policies hold, with what settings.

    It tells two checkpoints under one name apart without reading all of a large model; it is no proof of equality.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(flat[::step].double().cpu().numpy().tobytes())
    if spoken := _adapters(model) | _policies(model):
        digest.update(json.dumps(spoken, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _adapters(model: nn.Module) -> dict[str, Any]:
    """What is put on the model besides its weights: the same weights answer otherwise when it is silent."""
    seam = find(model)
    held = {} if seam is None else seam.owners
    found: dict[str, Any] = {
        name: [graft.enabled, graft.config.to_dict()] for name, graft in held.items() if isinstance(graft, Graft)
    }
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if tuned:
        found["peft"] = sorted({f"{layer.disable_adapters} {layer.active_adapters}" for layer in tuned})
    return found


def _policies(model: nn.Module) -> dict[str, Any]:
    """What holds for the model's forwards now, in whatever order it came."""
    held = sorted(json.dumps(policy.to_dict(), sort_keys=True) for policy in active_policies(model))
    return {"policies": held} if held else {}


def _backend(config: Any) -> dict[str, str]:
    if config is None:
        return {}
    found = {"model": str(getattr(config, "_attn_implementation", None))}
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            found[name.removesuffix("_config")] = str(getattr(sub, "_attn_implementation", None))
    return found


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def refuse_steps(model: Any) -> None:
    """Raise a UsageError where a policy tells steps from prompts: weighed in one forward, all would be prompt."""
    for policy in active_policies(model):
        if policy.goes_by_steps:
            raise UsageError(
                "is another in steps than in prompts, and options are weighed in one forward, without steps",
                where=f"policy {policy.policy_type}",
                remedy="leave it out, or weigh reference answers (references), which are said step by step",
            )
