"""The age and gender network of face-api.js: a real multi-task model trained by somebody else.

Architecture: ``TinyXception`` with two main blocks and two linear layers (face-api.js,
``src/xception/TinyXception.ts`` and ``src/ageGenderNet/AgeGenderNet.ts``, MIT; after Chollet,
Xception, arXiv 1610.02357). There is no batch norm; activations come before the separable
convolutions. TensorFlow's "same" padding at stride 2 and an even size adds one row and one column
at the bottom and the right.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import ModelError, first_line
from secateur.core.model import ModelInput

MEAN_RGB = (122.782, 117.001, 104.298)  # of pixels in 0..255; they divide by 255 afterwards
AGE_GENDER_INPUT = ModelInput(
    3, 112, 112, (MEAN_RGB[0] / 255, MEAN_RGB[1] / 255, MEAN_RGB[2] / 255), (1.0, 1.0, 1.0)
)


class _Separable(nn.Module):
    """Depth-wise 3x3 without bias, then point-wise 1x1 with one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pw = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw(self.dw(x))
        return y


class _Reduction(nn.Module):
    """Two separable convolutions and a max-pool beside a strided 1x1: half the size."""

    def __init__(self, inputs: int, outputs: int, *, activate: bool = True) -> None:
        super().__init__()
        self.activate = activate
        self.c0 = _Separable(inputs, outputs)
        self.c1 = _Separable(outputs, outputs)
        self.exp = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c0(torch.relu(x) if self.activate else x)
        y = self.c1(torch.relu(y))
        # At an even size, ceil_mode is "same": the last window hangs over and ignores what is not
        # there. An explicit pad of -inf would say so too, but no quantiser can calibrate on it.
        y = functional.max_pool2d(y, 3, 2, ceil_mode=True)
        z: Tensor = y + self.exp(x)
        return z


class _Main(nn.Module):
    """Three separable convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c0 = _Separable(channels, channels)
        self.c1 = _Separable(channels, channels)
        self.c2 = _Separable(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c0(torch.relu(x))
        y = self.c1(torch.relu(y))
        z: Tensor = self.c2(torch.relu(y)) + x
        return z


class AgeGender(nn.Module):
    """Shapes: images (N, 3, 112, 112) -> age (N, 1) in years, gender (N, 2) logits, male first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 32, 3, stride=2)
        self.r0 = _Reduction(32, 64, activate=False)  # its input is activated already
        self.r1 = _Reduction(64, 128)
        self.m0 = _Main(128)
        self.m1 = _Main(128)
        self.r2 = _Reduction(128, 256)
        self.sep = _Separable(256, 512)
        self.age = nn.Linear(512, 1)
        self.gender = nn.Linear(512, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.conv_in(functional.pad(images, (0, 1, 0, 1))))
        x = self.m1(self.m0(self.r1(self.r0(x))))
        features = torch.relu(self.sep(self.r2(x))).mean(dim=(2, 3))  # (N, 512)
        return {"age": self.age(features), "gender": self.gender(features)}


def age_gender(weights: str | Path | None = None) -> AgeGender:
    """Return the network, with the weights of a safetensors file that has exactly its keys.

    Its input is ``AGE_GENDER_INPUT``.

    Raises:
        ModelError: the file cannot be read, or holds other weights.
    """
    network = AgeGender()
    if weights is not None:
        try:
            network.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"{weights} does not hold the age and gender network: {first_line(error)}",
                hint="give faceapi_age_gender.safetensors: the weights of face-api.js in torch's "
                "layout",
            ) from error
    return network
