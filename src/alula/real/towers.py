"""Vision towers of packages, under classes of alula's, so that directories with them load anywhere the package is."""

from __future__ import annotations

from torch import Tensor, nn

from alula.errors import HostError


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite up to its last feature map (Tan and Le, 2019; the Lite variants are Google's of 2020).

    Pixels (N, 3, H, W), scaled to -1..1 -> (N, 1280, H / 32, W / 32), by the package ``efficientnet-lite-pytorch``.

    Args:
        variant: ``efficientnet-lite0`` to ``efficientnet-lite4``.
    """

    def __init__(self, variant: str = "efficientnet-lite0") -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise HostError(
                "the tower is made by a package that is not installed",
                where="vision",
                remedy="pip install --no-deps efficientnet-lite-pytorch",
            ) from error
        self.net = EfficientNet.from_name(variant)
        self.net._fc = nn.Identity()  # of a tower nothing behind the map is needed

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.extract_features(pixels)
