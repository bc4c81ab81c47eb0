"""What was uploaded, for a while: in memory, under ids that nobody guesses, the oldest going first."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alula.errors import quoted
from alula.serving.http.problems import Problem

SCHEME = "alula-upload"
"""of the addresses that stand for uploads in requests"""


@dataclass(frozen=True)
class Upload:
    """A medium that was uploaded.

    Attributes:
        id: under which requests name it.
        medium: a name of `alula.media`.
        content: the file.
        facts: what is told of it.
        expires: seconds since 1970.
    """

    id: str
    medium: str
    content: bytes
    facts: dict[str, Any]
    expires: float

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            "object": "alula.upload",
            "url": f"{SCHEME}:{self.id}",
            "medium": self.medium,
            "bytes": len(self.content),
            **self.facts,
            "expires": int(self.expires),
        }


class Uploads:
    """The uploads there are; belongs to the event loop.

    Args:
        most: how many.
        most_bytes: how many bytes together.
        seconds: for which each is kept.
        clock: seconds since 1970.
    """

    def __init__(self, *, most: int, most_bytes: int, seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.most, self.most_bytes, self.seconds, self._clock = most, most_bytes, seconds, clock
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def put(self, medium: str, content: bytes, facts: dict[str, Any]) -> Upload:
        """Keep a file."""
        upload = Upload(f"up-{secrets.token_urlsafe(18)}", medium, content, facts, self._clock() + self.seconds)
        self._kept[upload.id] = upload
        self.sweep()
        return upload

    def get(self, name: str, param: str) -> Upload:
        """The upload of that id.

        Raises:
            Problem: there is none, or no longer.
        """
        self.sweep()
        found = self._kept.get(name)
        if found is None:
            raise Problem(
                f"there is no upload {quoted(name, 60)}",
                param=param,
                code="upload_not_found",
                remedy=f"uploads are kept for {self.seconds / 60:,.0f} minutes at most: upload it again",
            )
        return found

    def drop(self, name: str) -> None:
        """Forget one.

        Raises:
            Problem: 404, there is none.
        """
        self.sweep()
        if self._kept.pop(name, None) is None:
            raise Problem(f"there is no upload {quoted(name, 60)}", status=404, code="upload_not_found")

    def sweep(self) -> None:
        """Forget those that expired, and the oldest of too many."""
        now = self._clock()
        for name in [name for name, each in self._kept.items() if each.expires <= now]:
            del self._kept[name]
        while len(self._kept) > self.most or sum(len(each.content) for each in self._kept.values()) > self.most_bytes:
            self._kept.popitem(last=False)
