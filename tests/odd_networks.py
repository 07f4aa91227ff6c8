"""Networks that are legal and rare; each of them once ended a build in a traceback."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class NormLast(nn.Module):
    """A classifier whose last layer is a norm over (N, C) logits."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.hidden, self.room, self.last = nn.Linear(16, 32), nn.Linear(32, 4), last

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.norm(self.stem(image))).mean((2, 3))
        return {"room": self.last(self.room(functional.relu(self.hidden(x))))}


class Shuffle(nn.Module):
    """A residual block that knows its width by number, so that none of its channels can go."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.a, self.norm = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        n, _, h, w = y.shape
        y = y.reshape(n, 4, self.width // 4, h, w).transpose(1, 2)
        return x + y.reshape(n, self.width, h, w)


class Plain(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width)
        self.b = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(functional.relu(self.norm(self.a(x))))


class Blocks(nn.Module):
    """A stem, residual blocks and a classifier; the stem's channels are fixed by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.p, self.s, self.q = Plain(16), Shuffle(16), Plain(16)
        self.room = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.q(self.s(self.p(functional.relu(self.stem(image)))))
        return {"room": self.room(x.mean((2, 3)))}


class Grid(nn.Module):
    """Coordinates, which depend on no image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], 1, *x.shape[-2:])


class FixedGrid(nn.Module):
    """The same, written so that torch.export takes the batch size for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 1, *x.shape[-2:])


class Coordinates(nn.Module):
    """A network that reads coordinates beside the image (CoordConv)."""

    def __init__(self, grid: type[nn.Module] = Grid) -> None:
        super().__init__()
        self.grid, self.stem = grid(), nn.Conv2d(4, 16, 3, 2, 1)
        self.more, self.room = nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.stem(torch.cat([image, self.grid(image)], 1)))
        return {"room": self.room(functional.relu(self.more(x)).mean((2, 3)))}


class Before(nn.Module):
    """A residual block with its norms before its convolutions, which have no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.a = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False)
        self.two = nn.BatchNorm2d(2 * width)
        self.b = nn.Conv2d(2 * width, width, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(functional.relu(self.one(x)))
        return x + self.b(functional.relu(self.two(y)))


class PreActivation(nn.Module):
    """A ResNet as of arXiv 1603.05027: what adds into the stream has neither bias nor norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.body, self.norm = nn.Sequential(Before(16), Before(16)), nn.BatchNorm2d(16)
        self.room, self.depth = nn.Linear(16, 4), nn.Conv2d(16, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.norm(self.body(self.stem(image))))
        return {"room": self.room(x.mean((2, 3))), "depth": self.depth(x)}


def batch_norm_last() -> nn.Module:
    return NormLast(nn.BatchNorm1d(4))


def layer_norm_last() -> nn.Module:
    return NormLast(nn.LayerNorm(4))


def fixed_batch() -> nn.Module:
    return Coordinates(FixedGrid)


def pre_activation() -> nn.Module:
    """With norms that are not the identity, so that a refit has something to add."""
    network = PreActivation()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, 0, 0.3)
    return network
