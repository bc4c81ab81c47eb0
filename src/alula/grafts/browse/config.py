"""Settings of browse-and-concentrate."""

from __future__ import annotations

from typing import ClassVar

from alula.grafts.base import GraftConfig
from alula.settings import Bool


class BrowseConfig(GraftConfig):
    """How a condition enters the connector.

    Attributes:
        bias: the condition's linear map has a bias, as published. Without one a condition of zero is the host's own
            encoding, whatever was trained; with one it is what training made of "no condition".
    """

    graft_type: ClassVar[str] = "browse"

    bias: Bool = False
