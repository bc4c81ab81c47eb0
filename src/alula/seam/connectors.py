"""Connectors that are told something about the picture they pass on: one vector per image, added inside of them.

Shapes: N images, P tower tokens of an image, T decoder tokens of it, D the decoder's width, w that of what is added.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from alula.anatomy import Anatomy
from alula.errors import HostError


@runtime_checkable
class Shiftable(Protocol):
    """A connector that takes a vector per image by itself, as those of alula's own hosts do."""

    @property
    def shift_width(self) -> int:
        """w: that of its queries, where it has some, else of its hidden layer."""

    def of_images(self, features: Tensor, shift: Tensor) -> Tensor:
        """(N, T, D) of images, told (N, w)."""


Conditioned = LlavaMultiModalProjector | Shiftable


def conditioned_connector(anatomy: Anatomy) -> Conditioned:
    """The connector of a host's images, one whose inside is known.

    Raises:
        HostError: the host has none.
    """
    if anatomy.projector is not None and "shared" not in getattr(anatomy.projector, "_modules", ()):
        connector, config = anatomy.image_connector, anatomy.host.config
        if isinstance(connector, Shiftable):
            return connector
        is_llava = isinstance(anatomy.host, LlavaForConditionalGeneration)
        # Pixtral's images are of any size and come side by side in one row
        if (
            is_llava
            and config.vision_config.model_type != "pixtral"
            and isinstance(connector, LlavaMultiModalProjector)
        ):
            return connector
    raise HostError(
        f"{type(anatomy.host).__name__} has no connector of images whose queries or hidden layer are known",
        remedy="take a host that alula.build_host made, with connectors not shared between media, or a LLaVA-1.5 model "
        "with images of one size",
    )


def shift_width(connector: Conditioned) -> int:
    """w: that of the queries, where the connector has some, else of its hidden layer."""
    return connector.shift_width if isinstance(connector, Shiftable) else int(connector.linear_1.out_features)


def conditioned(connector: Conditioned, features: Tensor, shift: Tensor) -> Tensor:
    """(N, T, D) what a connector makes of images.

    Args:
        features: (N, P, width) from the tower.
        shift: (N, w) added to all queries of an image, or, where there are none, to its hidden layer before the
            activation. A shift of zero gives the connector's own bits.
    """
    if isinstance(connector, Shiftable):
        return connector.of_images(features, shift)
    stock: Any = connector
    made: Tensor = stock.linear_2(stock.act(stock.linear_1(features) + shift[:, None]))
    return made
