"""Which policies are on a host for good, and the JSON they are kept in.

A host's own config says it (``alula_policies`` in ``config.json``), an adapter's says it of the host it was saved from
(in ``adapter_config.json``), and a file by itself is for models that are somebody else's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alula.anatomy import unwrap
from alula.errors import UsageError
from alula.files import regular, telling, write_json
from alula.policies.base import Attached, Policy, in_blocks
from alula.policies.registry import policy_of
from alula.seam import POLICIES, find

_EXAMPLE = '{"alula_policies": {"withdraw": {"policy_type": "withdraw", "layer": 16}}}'


def policies_of(model: nn.Module) -> dict[str, Attached]:
    """The policies that are on `model` for good, by name."""
    seam = find(model)
    return {} if seam is None else {name: each for name, each in seam.owners.items() if isinstance(each, Attached)}


def active_policies(model: nn.Module) -> list[Policy]:
    """The policies that hold for forwards of `model` that this thread begins now, for good or in a block."""
    return [each.policy for each in policies_of(model).values() if each.enabled] + in_blocks(unwrap(model))


def put_policies(model: nn.Module, policies: Mapping[str, Policy]) -> None:
    """Have these policies on `model` for good, by name, in the place of those that are.

    Raises:
        UsageError, HostError: as `Policy.attach`, with the name. None is on the model then.
    """
    for there in policies_of(model).values():
        there.detach()
    config = getattr(unwrap(model), "config", None)
    if hasattr(config, POLICIES):  # of a model that was loaded without those it was saved with
        delattr(config, POLICIES)
    try:
        for name, policy in policies.items():
            try:
                policy.attach(model, name)
            except UsageError as error:
                where = ": ".join(filter(None, (name, error.where)))
                raise UsageError(error.message, where=where, remedy=error.remedy) from error
    except BaseException:
        for there in policies_of(model).values():
            there.detach()
        raise


def policies_from(settings: Any, *, where: str) -> dict[str, Policy]:
    """The policies of saved settings by name, as they stand in JSON under ``alula_policies``.

    Args:
        where: they were saved, for errors.

    Raises:
        UsageError: anything that is no policy, or settings that one does not have, with the key.
    """
    if not isinstance(settings, Mapping) or not all(isinstance(each, Mapping) for each in settings.values()):
        raise UsageError(
            f"policies are an object of settings by name, not {json.dumps(settings, default=str)[:80]}",
            where=where,
            remedy=f"write {_EXAMPLE}",
        )
    return {name: policy_of(each, where=f"{where}: {name}") for name, each in settings.items()}


def save_policies(policies: nn.Module | Mapping[str, Policy], file: str | os.PathLike[str]) -> Path:
    """Write policies to a JSON file, which `load_model` takes beside a model.

    Args:
        policies: a model, for those that are on it for good; or policies by name.
        file: is replaced.

    Raises:
        UsageError: there are none.
    """
    if isinstance(policies, nn.Module):
        policies = {name: attached.policy for name, attached in policies_of(policies).items()}
    if not policies:
        raise UsageError("there are no policies to save", remedy="policy.attach(model) first, or give some by name")
    return write_json(file, {POLICIES: {name: policy.to_dict() for name, policy in policies.items()}})


def read_policies(file: str | os.PathLike[str]) -> dict[str, Policy]:
    """The policies of a file that `save_policies` wrote, by name.

    Raises:
        UsageError: it cannot be read, holds another key, or settings that are none. FilesError: no regular file.
    """
    path = Path(file)
    try:
        with telling(path):
            found = json.loads(regular(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not readable as JSON: {error}", where=str(path), remedy=f"write {_EXAMPLE}") from None
    strange = sorted(found.keys() - {POLICIES}) if isinstance(found, dict) else ["no object"]
    if strange or POLICIES not in found:
        raise UsageError(
            f"{'unknown key ' + repr(strange[0]) if strange else f'it lacks {POLICIES!r}'}",
            where=str(path),
            remedy=f"write {_EXAMPLE}",
        )
    return policies_from(found[POLICIES], where=str(path))
