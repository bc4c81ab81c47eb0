"""What references to media share: where the content is, and a stable name for it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from alula.data.errors import BadSampleError
from alula.errors import quoted
from alula.files import irregular

_SHOWN = 120
"""Most characters of a name that messages show."""


@runtime_checkable
class LoadableArray(Protocol):
    """Anything that makes its own frames or samples: ``load()`` returns an array (a microworld clip does)."""

    def load(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class MediaRef:
    """An image, video, audio clip, point cloud ... not yet decoded; picklable.

    Attributes:
        name: what error messages call it.
        paths: candidate files, the first that exists is meant.
        data: encoded bytes.
        maker: a picklable callable returning the decoded content.
        key: what identifies the result of ``maker``.
    """

    noun: ClassVar[str]
    error: ClassVar[type[BadSampleError]]
    decoding: ClassVar[str]
    """Changes when decoding changes, so that features cached under old fingerprints are not reused."""
    options: ClassVar[tuple[str, ...]] = ()
    """What a content part may say beside the medium: how it is to be read."""
    files: ClassVar[tuple[str, ...]] = ()
    """Those of them that name a file."""

    name: str
    paths: tuple[str, ...] = ()
    data: bytes | None = field(default=None, repr=False)
    maker: Callable[[], Any] | None = field(default=None, repr=False)
    key: str | None = None

    @classmethod
    def from_path(
        cls, path: str | os.PathLike[str], *, roots: Sequence[str | os.PathLike[str]] = (), **limits: Any
    ) -> Self:
        """A file; a relative ``path`` is looked for under each of ``roots`` (default: the working directory).

        Args:
            limits: further fields, such as ``max_pixels`` of a picture.
        """
        name = os.fspath(path)
        paths = tuple(os.path.abspath(os.path.join(root, name)) for root in (roots or (".",)))
        return cls(name, paths=tuple(dict.fromkeys(paths)), **limits)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "<bytes>", **limits: Any) -> Self:
        """Encoded content held in memory; ``limits`` as in `from_path`.

        Raises:
            BadSampleError: ``data`` is no bytes.
        """
        if not isinstance(data, bytes):
            raise cls.error(
                f"the bytes of {cls.noun} {quoted(name)} are {type(data).__name__}: {quoted(data)}",
                remedy="JSON holds no bytes: name a file, or inline images as base64",
            )
        return cls(name, data=data, **limits)

    @classmethod
    def _from_loadable(cls, value: Any, **options: Any) -> Self:
        fingerprint = getattr(value, "fingerprint", None)
        key = str(fingerprint()) if callable(fingerprint) else None
        return cls(f"<{type(value).__name__}>", maker=value.load, key=key, **options)

    @classmethod
    def fields_said(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Fields by what a content part says of its `options`.

        Raises:
            BadSampleError: values that they cannot have.
        """
        return dict(said)

    def said(self) -> dict[str, Any]:
        """What was said of the options, by name."""
        return {name: value for name in self.options if (value := getattr(self, name)) is not None}

    @property
    def told(self) -> str:
        """What it is and what it is called, for error messages."""
        return f"{self.noun} {quoted(self.name, _SHOWN)}"

    @property
    def path(self) -> str | None:
        """The file this refers to: the first candidate that exists, else the first candidate, else None."""
        return next((path for path in self.paths if os.path.isfile(path)), self.paths[0] if self.paths else None)

    def fingerprint(self) -> str:
        """A short stable name of the content, without decoding where possible.

        From path, size and modification time for files; from the bytes; from the maker's key. Features of a frozen
        tower can be cached under it.

        Raises:
            BadSampleError: the file is missing.
        """
        digest = hashlib.sha256(f"{self.noun}{self.decoding}".encode())
        if said := self.said():
            digest.update(f"said\0{said}\0".encode())
        if self.data is not None:
            digest.update(b"bytes\0" + self.data)
        elif self.paths:
            path, size = self._existing()
            digest.update(f"file\0{path}\0{size}\0{os.stat(path).st_mtime_ns}".encode())
        elif self.key is not None:
            digest.update(f"made\0{self.key}".encode())
        else:
            array = np.ascontiguousarray(self._made())
            digest.update(f"array\0{array.shape}{array.dtype}\0".encode() + array.tobytes())
        return digest.hexdigest()[:32]

    def _made(self) -> np.ndarray:
        """What ``maker`` makes, as an array."""
        assert self.maker is not None
        return np.asarray(self.maker())

    def _stream(self) -> str | io.BytesIO:
        """What a decoder opens.

        Raises:
            BadSampleError: missing or empty.
        """
        source: str | io.BytesIO
        if self.data is not None:
            source, size = io.BytesIO(self.data), len(self.data)
        else:
            source, size = self._existing()
        if size == 0:
            raise self.error(f"{self.told} is empty (0 bytes)")
        return source

    def _encoded(self) -> bytes:
        """The whole file."""
        source = self._stream()
        if isinstance(source, io.BytesIO):
            return source.getvalue()
        with open(source, "rb") as stream:
            return stream.read()

    def _existing(self) -> tuple[str, int]:
        path = self.path
        if path is None:
            raise self.error(f"{self.told} has neither file nor content")
        try:
            if (kind := irregular(path)) is not None:
                raise self.error(f"{self.told} is {kind}, not a file")
            return path, os.stat(path).st_size
        except ValueError:  # NUL, or half a surrogate pair
            raise self.error(f"{self.told}: no file can have such a name") from None
        except OSError:
            places = " nor ".join(self.paths) if len(self.name) <= _SHOWN else "of such a name"
            raise self.error(
                f"{self.told} is missing: no file {places}",
                remedy="give the folder that holds the media (`images:` in a source, --images on the command line)",
            ) from None
