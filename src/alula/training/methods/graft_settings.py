"""A graft's settings as a section of a recipe: refused by key where the graft's own config refuses them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import PydanticCustomError

from alula.errors import UsageError
from alula.grafts import GraftConfig


def read_by(config: type[GraftConfig]) -> Callable[[Any, ValidatorFunctionWrapHandler], Any]:
    """A validator that builds ``config`` from a section; pydantic by itself would turn '8' into 8."""

    def refusal(settings: Mapping[str, Any]) -> str | None:
        try:
            config.from_dict(settings)
        except UsageError as error:
            return error.message
        return None

    def read(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, Mapping):
            return check(value)
        with contextlib.suppress(UsageError):  # of what pydantic made of the values; those given are reported below
            check(value)
        try:
            return config.from_dict(value)
        except UsageError as error:
            message = error.message.removeprefix(f"{config.graft_type}: ")
            message += f" ({error.remedy})" if error.remedy else ""
            key = next((key for key in value if refusal({key: value[key]}) == error.message), None)
        if key is None:  # two settings that do not go together
            raise ValueError(message)
        problem = PydanticCustomError("setting", "{message}", {"message": message})
        details: Any = [{"type": problem, "loc": (key,), "input": value[key]}]
        raise ValidationError.from_exception_data(config.graft_type, details)

    return read
