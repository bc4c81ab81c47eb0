"""Vision towers of one's own, in a module that can be imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A small convolutional net: pixels (N, 3, 32, 32) -> a feature map (N, width, 4, 4)."""

    def __init__(self, width: int = 12, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=groups)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(self.norm(self.stem(pixels)).relu())


class Pooled(Net):
    """The same, as six tokens (N, 6, width): no square grid."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(super().forward(pixels), (2, 3)).flatten(2).transpose(1, 2)


class Computing(Net):
    """Its constructor computes with numbers, as those of stochastic depth and of positions do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.orthogonal_(self.body.weight)  # which no half precision has
        self.rates = [float(rate) for rate in torch.arange(4) / 4]
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.rates[1] * super().forward(pixels - self.mean)


class Stating(Net):
    """It saves something that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class Projecting(nn.Module):
    """A linear layer behind a batch norm: pixels (N, 3, 32, 32) -> tokens (N, 16, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, stride=8)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.Linear(12, 12)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.norm(self.stem(pixels)).flatten(2).transpose(1, 2))


class Forgetful(Net):
    """It keeps something beside its weights that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scale * super().forward(pixels)


class Summing(Net):
    """It gives a vector per picture."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).mean(dim=(2, 3))


class Text(nn.Module):
    """It takes no pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def settled(net: nn.Module) -> nn.Module:
    """The module with averages of batch norms that are not those it began with."""
    with torch.no_grad():
        net.train()(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    return net.eval()


class Square(Net):
    """That no test builds a host of."""


class Tied(Net):
    """Two of its linear maps are one."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(12, 12), nn.Linear(12, 12)
        self.back.weight = self.there.weight

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = super().forward(pixels).movedim(1, -1)
        return self.back(self.there(tokens).tanh()).movedim(-1, 1)
