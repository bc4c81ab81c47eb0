"""Contrasts: next tokens told against a run that does not see, or sees badly. Nothing is shifted.

Classifier-free guidance with what is highlighted absent, and visual contrastive decoding (Leng et al., CVPR 2024,
arXiv 2311.16922): ``(1 + a) log p - a log p_distorted`` with ``guidance = 1 + a``, among tokens that are plausible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from alula.errors import UsageError
from alula.items import FEATURES, brings_media
from alula.media import MEDIA
from alula.settings import Number, Settings
from alula.steering.block import Highlight
from alula.steering.guidance import Guided
from alula.steering.shift import finite, shift

GUIDANCE, PLAUSIBILITY = 2.0, 0.1
_OUT_OF_SIGHT = -1000.0  # of logits of attention: what is left is none, also in half precision


class Hidden(Settings):
    """The second run does not see what is highlighted: no token attends to it. Positions stay as they are. A highlight
    of ``Whole("image")`` is classifier-free guidance with the image absent.

    Attributes:
        plausibility: tokens with less than this share of the probability of the likeliest are out of the question; 0:
            none is.
    """

    plausibility: Annotated[Number, Field(ge=0, le=1)] = PLAUSIBILITY

    def place(self, block: Highlight, strength: float | None, guidance: float | None) -> None:
        guided = Guided(block, _guidance(strength, guidance), plausibility=self.plausibility)
        block.seam.request_contrast(guided, mark=block.first)
        shift(block, _OUT_OF_SIGHT, second=True)


@dataclass(frozen=True, eq=False)
class Distorted:
    """The second run is given other pixels, by which all of an image is contrasted: neither spans nor regions.

    Attributes:
        inputs: of the model, for the same prompt, with other pixels: those of blurred images, or `noised` ones.
        plausibility: see `Hidden`.
    """

    inputs: Mapping[str, Any]
    plausibility: float = PLAUSIBILITY

    def place(self, block: Highlight, strength: float | None, guidance: float | None) -> None:
        if block.marks is not None:
            raise UsageError(
                "spans and regions have no effect where pixels are distorted",
                remedy="leave them out, or give by=Hidden(), which hides what is highlighted",
            )
        if not brings_media(self.inputs) or "input_ids" not in self.inputs:
            raise UsageError("distorted inputs hold no ids and pixels", remedy="give all that the processor returned")
        if not 0 <= finite("plausibility", self.plausibility) <= 1:
            raise UsageError(f"a plausibility of {self.plausibility} is not in 0 to 1")
        guided = _Distorting(block, _guidance(strength, guidance), plausibility=self.plausibility, everywhere=True)
        guided.distorted = self.inputs
        block.seam.request_contrast(guided, mark=block.first)


class _Distorting(Guided):
    """Guided by a run on other pixels, where a prompt's own are given."""

    distorted: Mapping[str, Any]

    def changed(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        changed = super().changed(given)
        if not brings_media(given):
            return changed
        ids = given.get("input_ids")
        if ids is None or len(ids) != len(self.distorted["input_ids"]):
            raise UsageError(
                f"the distorted inputs are of {len(self.distorted['input_ids'])} samples, the forward of "
                f"{'embeddings' if ids is None else len(ids)}",
                remedy="give those of this very prompt; beams and several samples of one go with by=Hidden()",
            )
        media = {keyword for medium in MEDIA.values() for keyword in medium.inputs}
        # `generate` has let go of what says how its pixels lie
        lacking = self.distorted.keys() - {"input_ids", "attention_mask"} - given.keys()
        others = {name: value for name, value in self.distorted.items() if name in media or name in lacking}
        return {**others, **({FEATURES: None} if FEATURES in given else {})}


def noised(inputs: Mapping[str, Any], step: int = 500, *, seed: int = 0) -> dict[str, Any]:
    """Inputs whose pixels went so many of a thousand steps of diffusion, as in visual contrastive decoding.

    Args:
        inputs: of a model.
        step: 0 to 999; the paper takes 500 (or 999, of which nothing is left).
        seed: of the noise.

    Raises:
        UsageError: no such step, or no pixels.
    """
    if not 0 <= step < 1000:
        raise UsageError(f"step {step} is not one of 0 to 999")
    kept = torch.cumprod(1 - (torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5), dim=0)[step]
    names = [keyword for medium in MEDIA.values() if medium.tower == "vision" for keyword in medium.inputs]
    pixels = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}
    if not pixels:
        raise UsageError("there are no pixels to distort")
    generator = torch.Generator().manual_seed(seed)

    def distort(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values)
        return kept.sqrt().to(values) * values + (1 - kept).sqrt().to(values) * noise

    return {**inputs, **{name: distort(values) for name, values in pixels.items()}}


def _guidance(strength: float | None, guidance: float | None) -> float:
    if strength is not None:
        raise UsageError("strength has no effect: nothing is shifted", remedy="leave it out; guidance is what there is")
    value = GUIDANCE if guidance is None else finite("guidance", guidance)
    if value == 1:
        raise UsageError("guidance=1 has no effect: that is the first run as it is", remedy="give more than 1")
    return value
