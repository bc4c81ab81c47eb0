"""Models that packages bring, by name: the entry point group ``alula.models``.

An entry is a function of one argument, the part that is wanted (``"llm"``, ``"vision"`` or ``"audio"``), that returns
the directory it lies in; alula's second distribution brings ``fledgling``.
"""

from __future__ import annotations

import os

from alula import plugins
from alula.errors import HostError


def resolve(identifier: str, part: str) -> str:
    """The directory of ``part`` where ``identifier`` is such a name; any other identifier as it is.

    Raises:
        HostError: the name is one of alula-fledgling's, which is not installed; the model lacks the part.
        UsageError: the package that brings it does not load.
    """
    locate = plugins.load(plugins.MODELS, identifier) if "/" not in identifier else None
    if locate is not None:
        return str(locate(part))
    remedy = plugins.remedy(plugins.MODELS, identifier)
    if remedy is not None and not os.path.exists(identifier):
        raise HostError(f"{identifier!r} comes with a package that is not installed", remedy=remedy)
    return identifier
