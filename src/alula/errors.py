"""Errors a user can act on: what went wrong, where, and the remedy. Bad input raises nothing but these."""

from __future__ import annotations

import re

_OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class AlulaError(Exception):
    """Base class of the errors alula raises on purpose.

    Args:
        message: what is wrong, naming the offending value.
        where: the file, line, key or module it concerns.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.message, self.where, self.remedy = message, where, remedy
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text}\n  remedy: {remedy}" if remedy else text)

    def __reduce__(self) -> tuple[object, ...]:
        # data workers send errors across processes; BaseException's own reduce loses keyword-only arguments
        return _rebuild, (type(self), self.message, self.where, self.remedy)


def _rebuild(cls: type[AlulaError], message: str, where: str | None, remedy: str | None) -> AlulaError:
    return cls(message, where=where, remedy=remedy)


def visible(text: str) -> str:
    """Return ``text`` with what a terminal would obey as escapes: control characters, turned reading directions, halves
    of characters. Ends of lines stay.

    Names of files, ids and texts of records may hold anything.
    """
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(value: object, most: int = 120) -> str:
    """Return ``value`` as Python writes it, its middle left out where that takes more than ``most`` characters.

    What records and files hold may be of any length.
    """
    if isinstance(value, str) and len(value) > most:
        value = value[:most] + value[-most:]  # only the ends are shown
    if isinstance(value, bytes) and len(value) > most:
        value = value[:most] + value[-most:]
    text = repr(value)
    kept = (most - 5) // 2
    return text if len(text) <= most else f"{text[:kept]} ... {text[-kept:]}"


class UsageError(AlulaError):
    """The call itself is off: an unknown name, an impossible combination, a missing argument."""

    exit_code = 2


class FilesError(AlulaError):
    """What the file system refused: no space, no permission, a broken device, something that is no regular file."""


class PathError(FilesError, UsageError):
    """A path that cannot be what it is meant for: a file in place of a directory, a name that is too long."""


class RecipeError(UsageError):
    """A recipe that does not say something runnable."""


class DataError(AlulaError):
    """A record or media file that cannot be used."""


class HostError(AlulaError):
    """A model (or a directory that should hold one) that alula does not know how to take."""


class SeamError(AlulaError):
    """transformers, or whoever called it, does something the seam does not know: an error instead of wrong numbers."""


class AdapterError(AlulaError):
    """An adapter that does not fit the model it is loaded into, or a directory that is not one."""


class BankError(AlulaError):
    """A bank of demonstrations that belongs to another model, or a record of it that cannot be used."""


class CodesError(AlulaError):
    """A discrete tokenizer that cannot be read, or items or codes that it cannot take."""


class EvaluationError(AlulaError):
    """Results that cannot be compared or scored."""
