"""Which contents are held out."""

from __future__ import annotations

import hashlib

HELD_OUT_ONE_IN = 8
"""One content in this many belongs to the held-out split."""


def split_of(*content: object) -> str:
    """Which split a content belongs to: ``"test"`` for one in eight, by a hash of the content alone.

    A content decides its split whoever draws it and with whatever seed, so the splits are disjoint by construction.
    """
    digest = hashlib.blake2b("|".join(map(str, content)).encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"
