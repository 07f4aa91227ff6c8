"""Rendered rooms, embedded and deterministic: RGB, segmentation, depth, normals, room class.

Image ``i`` of a split is drawn from its own seed, so a sample never depends on which others were
read. Nothing is downloaded or stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from secateur.core.errors import DataError
from secateur.core.files import value_digest
from secateur.data.sample import Array, Reader, Sample
from secateur.data.scene_render import Decal, Pattern, Scene, Solid, Surface, render

CLASSES = ("floor", "ceiling", "wall", "door", "window", "box", "sphere", "cylinder")
ROOMS = ("office", "gallery", "warehouse", "bathroom")
CLASS_NAMES = {"segmentation": CLASSES, "room": ROOMS}
FIRST_SEED = {"train": 0, "test": 1_000_000, "calibration": 2_000_000}
VERSION = 1  # raise when a change alters what is drawn, so that caches notice


@dataclass(frozen=True)
class Style:
    """How a room class tends to look; every single cue also occurs elsewhere."""

    walls: tuple[Pattern, ...]
    floors: tuple[Pattern, ...]
    hue: tuple[float, float, float]
    objects: tuple[int, int]
    mix: tuple[float, float, float]  # box, sphere, cylinder
    height: tuple[float, float]


STYLES = {
    "office": Style(("plain", "stripes"), ("speckle", "plain"), (0.75, 0.72, 0.62), (4, 8),
                    (0.8, 0.1, 0.1), (2.4, 2.9)),
    "gallery": Style(("plain",), ("stripes", "plain"), (0.85, 0.85, 0.85), (2, 5),
                     (0.2, 0.5, 0.3), (3.0, 4.0)),
    "warehouse": Style(("brick",), ("speckle", "checker"), (0.62, 0.42, 0.33), (6, 11),
                       (0.6, 0.05, 0.35), (3.2, 4.5)),
    "bathroom": Style(("checker", "brick"), ("checker",), (0.62, 0.78, 0.85), (2, 6),
                      (0.3, 0.2, 0.5), (2.2, 2.7)),
}  # fmt: skip


def create(
    root: Path, split: str, count: int | None = None, height: int = 96, width: int = 128
) -> Reader:
    """Open a split: ``train`` (1600 rooms), ``test`` (200) or ``calibration`` (200).

    ``root`` is not used. ``count`` limits or extends the split.
    """
    if split not in FIRST_SEED:
        raise DataError(f"scenes has no split '{split}'", hint=f"splits: {', '.join(FIRST_SEED)}")
    size = count if count is not None else {"train": 1600}.get(split, 200)
    return Scenes(FIRST_SEED[split], size, height, width)


class Scenes:
    """Rooms ``first_seed .. first_seed + count - 1``."""

    def __init__(self, first_seed: int, count: int, height: int, width: int) -> None:
        self._first, self._count = first_seed, count
        self._size = (height, width)
        self.fingerprint = value_digest(["scenes", VERSION, first_seed, count, height, width])

    def __len__(self) -> int:
        return self._count

    @property
    def label_names(self) -> frozenset[str]:
        return frozenset({"segmentation", "depth", "normals", "room"})

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._count:
            raise IndexError(index)
        seed = self._first + index
        scene, room = draw_scene(seed)
        picture = render(scene, *self._size)
        labels: dict[str, Array] = {
            "segmentation": picture.label,
            "depth": picture.depth,
            "normals": picture.normal,
            "room": np.array(room),
        }
        return Sample(f"scene{seed:07d}", picture.image, labels)


def draw_scene(seed: int) -> tuple[Scene, int]:
    """Draw the room of ``seed`` and its class index."""
    rng = np.random.default_rng(seed)
    room = int(rng.integers(len(ROOMS)))
    style = STYLES[ROOMS[room]]
    size = (rng.uniform(2.0, 4.5), rng.uniform(*style.height) / 2, rng.uniform(2.5, 5.0))
    eye = rng.uniform(1.1, 1.7)
    # The camera stands near one wall, 0.5 m in, and looks along the room; y = 0 is its height.
    centre = (0.0, eye - size[1], size[2] - 0.5)
    floor_y = eye
    walls = Surface(
        label=2,
        colour=_near(style.hue, rng),
        second=_near((0.45,) * 3, rng),
        pattern=_pick(style.walls, rng),
        period=rng.uniform(0.4, 0.8),
    )
    shell = Solid("room", centre, size, walls)
    things = _furniture(style, size, centre, floor_y, rng)
    floor = Surface(
        label=0,
        colour=_near((0.45, 0.36, 0.28), rng),
        second=_near((0.65, 0.6, 0.55), rng),
        pattern=_pick(style.floors, rng),
        period=rng.uniform(0.5, 1.0),
    )
    ceiling = Surface(1, _near((0.9, 0.9, 0.88), rng, 0.05))
    decals = _decals(size, centre, floor_y, rng)
    scene = Scene(
        solids=(shell, *things),
        floor=floor,
        ceiling=ceiling,
        decals=decals,
        lamp=(
            rng.uniform(-1, 1) * size[0] / 2,
            centre[1] - 0.8 * size[1],
            centre[2] + rng.uniform(-0.5, 0.5) * size[2],
        ),
        camera=(rng.uniform(-0.5, 0.5) * size[0], 0.0, 0.0),
        heading=rng.uniform(-0.5, 0.5),
        pitch=rng.uniform(-0.25, 0.1),
        focal=rng.uniform(0.75, 0.95),
        noise_seed=seed,
        ambient=rng.uniform(0.25, 0.45),
    )
    return scene, room


def _near(
    colour: tuple[float, ...], rng: np.random.Generator, spread: float = 0.13
) -> tuple[float, float, float]:
    r, g, b = np.clip(np.asarray(colour) + rng.uniform(-spread, spread, 3), 0.05, 0.98)
    return float(r), float(g), float(b)


def _pick(patterns: tuple[Pattern, ...], rng: np.random.Generator) -> Pattern:
    """Mostly the style's own pattern; one in five from any style."""
    anything: tuple[Pattern, ...] = ("plain", "checker", "stripes", "brick", "speckle")
    pool = patterns if rng.random() < 0.8 else anything
    return pool[int(rng.integers(len(pool)))]


def _furniture(
    style: Style,
    size: tuple[float, float, float],
    centre: tuple[float, float, float],
    floor_y: float,
    rng: np.random.Generator,
) -> list[Solid]:
    solids = []
    for _ in range(int(rng.integers(*style.objects))):
        kind = ("box", "sphere", "cylinder")[int(rng.choice(3, p=style.mix))]
        radius, tall = rng.uniform(0.15, 0.5), rng.uniform(0.2, 0.9)
        x = centre[0] + rng.uniform(-0.85, 0.85) * (size[0] - radius)
        z = rng.uniform(1.4, max(1.6, 2 * size[2] - 1.0 - radius))
        surface = Surface(
            label=CLASSES.index(kind),
            colour=_near((0.5, 0.5, 0.5), rng, 0.45),
            second=_near((0.5, 0.5, 0.5), rng, 0.45),
            pattern=_pick(("plain",), rng),
            period=0.25,
        )
        if kind == "sphere":
            at, half = (x, floor_y - radius, z), (radius, radius, radius)
        elif kind == "cylinder":
            at, half = (x, floor_y - tall, z), (0.7 * radius, tall, 0.7 * radius)
        else:
            at, half = (x, floor_y - tall, z), (radius, tall, rng.uniform(0.15, 0.5))
        solids.append(Solid(kind, at, half, surface, rng.uniform(0, np.pi)))  # type: ignore[arg-type]
    return solids


def _decals(
    size: tuple[float, float, float],
    centre: tuple[float, float, float],
    floor_y: float,
    rng: np.random.Generator,
) -> list[Decal]:
    decals = []
    for wall in (0, 1, 3):
        if rng.random() < 0.35:
            continue
        door = rng.random() < 0.5
        reach, middle = (size[0], centre[0]) if wall == 0 else (size[2], centre[2])
        half = rng.uniform(0.4, 0.55) if door else rng.uniform(0.4, 1.0)
        at = middle + rng.uniform(-0.7, 0.7) * (reach - half)
        if door:
            height = (floor_y - rng.uniform(1.9, 2.1), floor_y)
            surface = Surface(3, _near((0.4, 0.26, 0.15), rng), _near((0.5, 0.35, 0.2), rng))
        else:
            height = (floor_y - rng.uniform(1.7, 2.0), floor_y - rng.uniform(0.8, 1.0))
            pane = _near((0.7, 0.85, 0.97), rng, 0.04)
            surface = Surface(4, pane, (0.9, 0.95, 1.0), "stripes", 0.8)
        decals.append(Decal(wall, (at - half, at + half), height, surface))
    return decals
