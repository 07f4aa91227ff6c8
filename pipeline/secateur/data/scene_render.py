"""A small ray caster: boxes, spheres, upright cylinders and a room's planes, lit by one lamp.

World axes: x right, y down, z forward; metres. The camera frame is the same after a turn about
the vertical axis, so normals are given as the camera sees them, pointing towards the camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (P, 3)
Values = NDArray[np.float32]  # (P,)
FAR = np.float32(1e6)
Pattern = Literal["plain", "checker", "stripes", "brick", "speckle"]


@dataclass(frozen=True)
class Surface:
    """What a solid looks like and which class it is."""

    label: int
    colour: tuple[float, float, float]
    second: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pattern: Pattern = "plain"
    period: float = 0.5


@dataclass(frozen=True)
class Solid:
    """``kind`` with ``centre`` and half sizes; a sphere uses half[0] as its radius, a cylinder
    half[0] as radius and half[1] as half height; a room is a box seen from inside."""

    kind: Literal["room", "box", "sphere", "cylinder"]
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    surface: Surface
    turn: float = 0.0  # radians about the vertical axis


@dataclass(frozen=True)
class Decal:
    """A rectangle on one of the room's four walls (0: +z, 1: +x, 2: -z, 3: -x)."""

    wall: int
    along: tuple[float, float]
    height: tuple[float, float]
    surface: Surface


@dataclass(frozen=True)
class Scene:
    """``solids[0]`` is the room; its surfaces are ``floor``, ``ceiling`` and its own for walls."""

    solids: Sequence[Solid]
    floor: Surface
    ceiling: Surface
    decals: Sequence[Decal]
    lamp: tuple[float, float, float]
    camera: tuple[float, float, float]
    heading: float
    pitch: float
    focal: float  # in image widths
    noise_seed: int = 0
    ambient: float = 0.35


@dataclass
class _Hits:
    """The nearest hit so far of each ray."""

    distance: Values
    normal: Vectors
    solid: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))


@dataclass(frozen=True)
class Rendered:
    """``image`` (H, W, 3) uint8, ``label`` (H, W) uint8, ``depth`` (H, W) metres along the optical
    axis, ``normal`` (H, W, 3) unit vectors in the camera frame."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    depth: Values
    normal: Vectors


def render(scene: Scene, height: int, width: int) -> Rendered:
    """Cast one ray per pixel, shade with Lambert's law, and a shadow ray towards the lamp."""
    origin = np.asarray(scene.camera, np.float32)
    local = _camera_rays(height, width, scene.focal)
    turn = _rotation(scene.heading, scene.pitch)
    rays = local @ turn.T
    hits = _cast(scene.solids, np.broadcast_to(origin, rays.shape), rays)
    points = origin + rays * hits.distance[:, None]
    label, albedo = _appearance(scene, hits, points)
    light = _light(scene, hits, points)
    rng = np.random.default_rng(scene.noise_seed)
    colour = albedo * light[:, None] + rng.normal(0, 0.012, albedo.shape)
    image = (255 * np.clip(colour, 0, 1) ** (1 / 1.8)).astype(np.uint8)
    return Rendered(
        image.reshape(height, width, 3),
        label.reshape(height, width),
        (hits.distance * local[:, 2]).reshape(height, width).astype(np.float32),
        (hits.normal @ turn).reshape(height, width, 3).astype(np.float32),
    )


def _camera_rays(height: int, width: int, focal: float) -> Vectors:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    flat = np.stack(
        [
            (x + 0.5 - width / 2) / (focal * width),
            (y + 0.5 - height / 2) / (focal * width),
            np.ones_like(x),
        ],
        axis=-1,
    ).reshape(-1, 3)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True), np.float32)


def _rotation(heading: float, pitch: float) -> NDArray[np.float32]:
    c, s = np.cos(heading), np.sin(heading)
    cp, sp = np.cos(pitch), np.sin(pitch)
    about_y = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return np.asarray(about_y @ about_x, np.float32)


def _cast(solids: Sequence[Solid], origins: Vectors, rays: Vectors) -> _Hits:
    best = _Hits(
        np.full(len(rays), FAR, np.float32),
        np.zeros((len(rays), 3), np.float32),
        np.zeros(len(rays), np.int16),
    )
    for number, solid in enumerate(solids):
        turn = _rotation(solid.turn, 0.0)
        start = (origins - np.asarray(solid.centre, np.float32)) @ turn  # into the solid's frame
        along = rays @ turn
        distance, normal = _INTERSECT[solid.kind](start, along, np.asarray(solid.half, np.float32))
        nearer = (distance > 1e-3) & (distance < best.distance)
        best.distance = np.where(nearer, distance, best.distance)
        best.normal = np.where(nearer[:, None], normal @ turn.T, best.normal)
        best.solid = np.where(nearer, np.int16(number), best.solid)
    return best


def _slabs(start: Vectors, along: Vectors, half: Vectors) -> tuple[Vectors, Vectors]:
    safe = np.where(np.abs(along) < 1e-7, np.float32(1e-7), along)
    first, second = (-half - start) / safe, (half - start) / safe
    return np.minimum(first, second), np.maximum(first, second)


def _axis_normal(axis: NDArray[np.intp], sign: Vectors) -> Vectors:
    normal = np.zeros_like(sign)
    rows = np.arange(len(axis))
    normal[rows, axis] = sign[rows, axis]
    return normal


def _hit_box(start: Vectors, along: Vectors, half: Vectors) -> tuple[Values, Vectors]:
    near, far = _slabs(start, along, half)
    enter, leave = near.max(axis=1), far.min(axis=1)
    distance = np.where((enter < leave) & (enter > 0), enter, FAR)
    return distance, _axis_normal(near.argmax(axis=1), -np.sign(along))


def _hit_room(start: Vectors, along: Vectors, half: Vectors) -> tuple[Values, Vectors]:
    _, far = _slabs(start, along, half)
    return far.min(axis=1), _axis_normal(far.argmin(axis=1), -np.sign(along))


def _hit_sphere(start: Vectors, along: Vectors, half: Vectors) -> tuple[Values, Vectors]:
    b = (start * along).sum(axis=1)
    inside = b * b - (start * start).sum(axis=1) + half[0] ** 2
    distance = np.where(inside > 0, -b - np.sqrt(np.maximum(inside, 0)), FAR)
    distance = np.where(distance > 0, distance, FAR)
    return distance, (start + along * np.minimum(distance, 1e3)[:, None]) / half[0]


def _hit_cylinder(start: Vectors, along: Vectors, half: Vectors) -> tuple[Values, Vectors]:
    a = np.maximum(along[:, 0] ** 2 + along[:, 2] ** 2, 1e-9)
    b = start[:, 0] * along[:, 0] + start[:, 2] * along[:, 2]
    c = start[:, 0] ** 2 + start[:, 2] ** 2 - half[0] ** 2
    inside = b * b - a * c
    side = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, FAR)
    height = start[:, 1] + along[:, 1] * side
    side = np.where((side > 0) & (np.abs(height) < half[1]), side, FAR)
    vertical = np.where(np.abs(along[:, 1]) < 1e-7, np.float32(1e-7), along[:, 1])
    cap = (-np.sign(vertical) * half[1] - start[:, 1]) / vertical
    at = start + along * cap[:, None]
    on_cap = (cap > 0) & (at[:, 0] ** 2 + at[:, 2] ** 2 < half[0] ** 2)
    cap = np.where(on_cap, cap, FAR)
    distance = np.minimum(side, cap)
    point = start + along * np.minimum(distance, 1e3)[:, None]
    round_normal = point * np.array([1, 0, 1], np.float32) / half[0]
    flat_normal = np.zeros_like(point)
    flat_normal[:, 1] = -np.sign(vertical)
    return distance, np.where((cap < side)[:, None], flat_normal, round_normal)


_INTERSECT = {
    "box": _hit_box, "room": _hit_room, "sphere": _hit_sphere, "cylinder": _hit_cylinder,
}  # fmt: skip


def _appearance(scene: Scene, hits: _Hits, points: Vectors) -> tuple[NDArray[np.uint8], Vectors]:
    """Return each ray's class and its colour before light."""
    label = np.zeros(len(points), np.uint8)
    albedo = np.zeros((len(points), 3), np.float32)

    def paint(mask: NDArray[np.bool_], surface: Surface) -> None:
        label[mask] = surface.label
        albedo[mask] = _texture(surface, points[mask], hits.normal[mask])

    for number, solid in enumerate(scene.solids):
        paint(hits.solid == number, solid.surface)
    in_room = hits.solid == 0
    paint(in_room & (hits.normal[:, 1] < -0.5), scene.floor)
    paint(in_room & (hits.normal[:, 1] > 0.5), scene.ceiling)
    for decal in scene.decals:
        paint(in_room & _on_decal(decal, hits.normal, points), decal.surface)
    return label, albedo


def _on_decal(decal: Decal, normal: Vectors, points: Vectors) -> NDArray[np.bool_]:
    axis, sign = ((2, -1), (0, -1), (2, 1), (0, 1))[decal.wall]
    across = points[:, 0 if axis == 2 else 2]
    here: NDArray[np.bool_] = (
        (normal[:, axis] * sign > 0.5)
        & (across > decal.along[0])
        & (across < decal.along[1])
        & (points[:, 1] > decal.height[0])
        & (points[:, 1] < decal.height[1])
    )
    return here


def _texture(surface: Surface, points: Vectors, normal: Vectors) -> Vectors:
    """Return colours of a world-space pattern in the plane that ``normal`` faces."""
    facing = np.abs(normal).argmax(axis=1)
    u = np.where(facing == 0, points[:, 2], points[:, 0]) / surface.period
    v = np.where(facing == 1, points[:, 2], points[:, 1]) / surface.period
    if surface.pattern == "checker":
        mix = (np.floor(u) + np.floor(v)) % 2
    elif surface.pattern == "stripes":
        mix = np.floor(2 * u) % 2
    elif surface.pattern == "brick":
        shifted = u + 0.5 * (np.floor(2 * v) % 2)
        mix = ((shifted % 1 < 0.06) | (2 * v % 1 < 0.12)).astype(np.float32)
    elif surface.pattern == "speckle":
        mix = (np.sin(37 * u + 11 * np.sin(23 * v)) * np.sin(41 * v + 7 * u) > 0.4) * 0.5
    else:
        mix = np.zeros_like(u)
    first, second = np.asarray(surface.colour), np.asarray(surface.second)
    return np.asarray(first + (second - first) * np.asarray(mix)[:, None], np.float32)


def _light(scene: Scene, hits: _Hits, points: Vectors) -> Values:
    lamp = np.asarray(scene.lamp, np.float32)
    towards = lamp - points
    distance = np.linalg.norm(towards, axis=1)
    towards = towards / distance[:, None]
    lambert = np.maximum((hits.normal * towards).sum(axis=1), 0)
    start = points + hits.normal * np.float32(0.01)
    blocked = _cast(scene.solids[1:], start, towards).distance < distance - 0.05
    falloff = 1 / (1 + 0.03 * distance**2)
    direct = (1 - scene.ambient) * lambert * falloff * ~blocked
    return np.asarray(scene.ambient + direct, np.float32)
