"""Small models and data that tests build in front of the reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from secateur.bench.latency import Protocol
from secateur.core.model import ModelInput, MultiTaskModel
from secateur.core.task import Task
from torch import Tensor, nn
from torch.nn import functional

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SECATEUR_DATA", REPOSITORY.parent / "shared" / "data"))

TASKS = (
    Task("segmentation", "seg", "segmentation", "segmentation", classes=8),
    Task("depth", "depth", "depth", "depth"),
    Task("room", "room", "classification", "room", classes=4),
)
SPEC = ModelInput(3, 32, 48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


FULL_PROTOCOL, SHORT_PROTOCOL = Protocol.__init__.__defaults__, (5.0, 0.05, 20)


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Measure latency for a moment where nobody says how long: three seconds a build add up."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Protocol.__init__, "__defaults__", SHORT_PROTOCOL)
        yield


@pytest.fixture
def full_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as long as users do."""
    monkeypatch.setattr(Protocol.__init__, "__defaults__", FULL_PROTOCOL)


class TinyNet(nn.Module):
    """Residual and depth-wise blocks, a concat, and three heads: what groups have to survive."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(3 * width)
        self.depthwise = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(3 * width)
        self.project = nn.Conv2d(3 * width, width, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.seg_mix = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.seg = nn.Conv2d(2 * width, 8, 1)
        self.depth_mix = nn.Conv2d(2 * width, width, 1)
        self.depth = nn.Conv2d(width, 1, 1)
        self.room_hidden = nn.Linear(2 * width, 2 * width)
        self.room = nn.Linear(2 * width, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.stem_norm(self.stem(image)))
        y = functional.relu6(self.expand_norm(self.expand(x)))
        y = functional.relu6(self.depthwise_norm(self.depthwise(y)))
        x = x + self.project_norm(self.project(y))
        z = functional.silu(self.down(x))
        up = functional.interpolate(z, scale_factor=2.0, mode="bilinear")
        seg = self.seg(functional.relu(self.seg_mix(torch.cat([x, up], 1))))
        depth = self.depth(torch.sigmoid(self.depth_mix(z)))
        room = self.room(functional.gelu(self.room_hidden(z.mean((2, 3)))))
        return {"seg": seg, "depth": depth, "room": room}


def tiny_model(width: int = 16, seed: int = 0) -> MultiTaskModel:
    """A TinyNet with random weights and batch-norm statistics far from 0 and 1."""
    torch.manual_seed(seed)
    model = MultiTaskModel(TinyNet(width), TASKS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture
def model() -> MultiTaskModel:
    return tiny_model()


@pytest.fixture
def example() -> Tensor:
    return SPEC.example(2)


@pytest.fixture(scope="session", autouse=True)
def _no_library_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Builds of fixtures that outlive a test add their cuts here."""
    os.environ["SECATEUR_LIBRARY"] = str(tmp_path_factory.mktemp("library"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's cache or library."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECATEUR_LIBRARY", str(tmp_path / "library"))


def need_data(name: str) -> Path:
    """Return a data set's folder, or skip saying what is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} in {DATA}: set SECATEUR_DATA")
    return path


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was built once, with its own cache."""
    from cli_run import make_project

    folder = tmp_path_factory.mktemp("project")
    recipe = make_project(folder)
    subprocess.run(
        [sys.executable, "-m", "secateur", "build", recipe, "--out", folder / "out",
         "--cache", folder / "cache"],
        check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    return folder


@pytest.fixture
def bundle(project: Path, tmp_path: Path) -> Path:
    """A copy of the built bundle, free to be damaged."""
    return Path(shutil.copytree(project / "out/x86-64-cpu/fp32", tmp_path / "bundle"))
