"""The newest releases that alula's tests have been run on, and a word to those who are ahead of them."""

from __future__ import annotations

import functools
import logging
from importlib import metadata

from packaging.version import Version

logger = logging.getLogger(__name__)

TESTED = {"transformers": "5.24.0", "peft": "0.21.2"}
"""As `docs/results/versions.md` has them: raised when `make test-versions` is green on newer ones."""


@functools.cache
def tell_untested() -> None:
    """Warn once per process of packages that are newer than the newest release tested."""
    newer = {name: version for name in TESTED if (version := newer_than_tested(name, metadata.version(name)))}
    if newer:
        logger.warning(
            "%s: newer than what alula was tested on (%s). A release may rename what alula reads: "
            "`make test-versions` in alula's checkout says whether this one is read rightly.",
            ", ".join(f"{name} {version}" for name, version in newer.items()),
            ", ".join(f"{name} {TESTED[name]}" for name in newer),
        )


def newer_than_tested(name: str, installed: str) -> str | None:
    """The installed release where it is newer than the newest one tested, else None.

    A pre-release or a development version of a release that was tested is not newer; one of a later release is. What
    stands behind a "+" names a build, not a release.
    """
    return installed if Version(Version(installed).public) > Version(TESTED[name]) else None
