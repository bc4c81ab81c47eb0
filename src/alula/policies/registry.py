"""Which policies there are. A policy's own file registers it; saved settings are read by what is registered.

Packages installed beside alula add theirs by the entry point group ``alula.policies``: each names a module that calls
`register` when it is imported, under the policy's type. It is imported when a policy of that type is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from alula.errors import UsageError
from alula.plugins import Registry
from alula.policies.base import Policy
from alula.settings import refusal

_POLICIES: Registry[type[Policy]] = Registry("alula.policies", "policy of type")
P = TypeVar("P", bound=type[Policy])


def register(policy: P) -> P:
    """Make a policy known under its ``policy_type``; returns it, so that it also decorates the class.

    Raises:
        UsageError: another policy has that type.
    """
    _POLICIES.register(policy.policy_type, policy)
    return policy


def policy_types() -> tuple[str, ...]:
    """Types of the policies there are, those of other packages included."""
    return _POLICIES.names()


def policy_of(settings: Mapping[str, Any], *, where: str = "policy") -> Policy:
    """The policy of saved settings, see `Policy.to_dict`.

    Raises:
        UsageError: no such policy, or settings that it does not have, with the key.
    """
    name = settings.get("policy_type")
    kind = _POLICIES.get(name)
    if kind is None:
        raise UsageError(
            f"there is no policy of type {name!r}"
            if "policy_type" in settings
            else "the key 'policy_type' is required",
            where=where,
            remedy=f"policy_type is one of: {', '.join(policy_types()) or 'none is installed'}",
        )
    given = {key: value for key, value in settings.items() if key != "policy_type"}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise refusal(error, kind, given, where=lambda path: ".".join(filter(None, (where, path)))) from None
