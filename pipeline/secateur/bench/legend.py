"""What the colours of a video frame mean: classes, metres, directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from secateur.bench.colours import Picture, depth_picture, palette
from secateur.bench.lettering import DIM, INK, Sprite, lay, rounded, text
from secateur.core.task import Task

Pixels = Callable[[float], int]  # of a length on a full-size board
SIZE, ROW, NUMBER, RAMP = 16, 34, 58, 150  # type, row, a number of metres, the bar of depth
MORE = 110  # room for how many are missing


@dataclass(frozen=True)
class Shown:
    """A task and the names of its classes."""

    task: Task
    names: tuple[str, ...] = ()


@dataclass
class DepthRange:
    """Metres that the colours of depth span: follows the scene slowly, the same for every side."""

    low: float = 0.0
    high: float = 0.0
    slowness: float = 0.95

    def follow(self, metres: NDArray[np.generic]) -> None:
        """Move towards the 2nd and 98th percentile of a map."""
        known = np.asarray(metres, np.float32)
        known = known[np.isfinite(known)]
        if not known.size:
            return
        low, high = (float(v) for v in np.percentile(known, (2, 98)))
        if self.high <= self.low:
            self.low, self.high = low, high
        else:
            self.low += (1 - self.slowness) * (low - self.low)
            self.high += (1 - self.slowness) * (high - self.high)


class Entry(NamedTuple):
    """Sprites that stay on one row. ``depth`` names the task of a bar that gets numbers."""

    sprites: Sequence[Sprite]
    depth: str = ""


class Placed(NamedTuple):
    """A sprite at ``x`` of a row; ``depth`` as in its entry, on the bar itself."""

    sprite: Sprite
    x: int
    row: int
    depth: str = ""


def entries_of(tasks: Sequence[Shown], px: Pixels) -> list[Entry]:
    """Return what is to be explained of dense tasks; classes last, as there may be many."""
    found, size = list[Entry](), px(SIZE)
    for shown in sorted(tasks, key=lambda shown: shown.task.kind == "segmentation"):
        task = shown.task
        if task.kind == "segmentation":
            for name, (red, green, blue) in zip(
                shown.names, palette(task.classes or 1).tolist(), strict=False
            ):
                swatch = rounded(size, size, (red, green, blue), px(4))
                found.append(Entry([swatch, text(name, size, INK)]))
        elif task.kind == "depth":
            found.append(Entry([text(task.name, size, DIM), _depth_bar(px)], task.name))
        elif task.kind == "normals":
            words = f"{task.name}: red to the right, green down, blue away"
            found.append(Entry([text(words, size, DIM)]))
    return found


def flow(entries: Sequence[Entry], room: tuple[int, int], px: Pixels) -> tuple[list[Placed], bool]:
    """Set entries in ``room`` = (pixels, rows); return them and whether all found a place.

    Where they did not, the end of the last row says how many are missing.
    """
    placed, x, row = list[Placed](), 0, 0
    for number, (sprites, depth) in enumerate(entries):
        length = sum(s.width for s in sprites) + px(8) * (len(sprites) - 1)
        last = row == room[1] - 1 and number < len(entries) - 1
        if x and x + length > room[0] - (px(MORE) if last else 0):
            if row < room[1] - 1:
                x, row = 0, row + 1
            else:
                words = text(f"and {len(entries) - number} more", px(SIZE), DIM)
                return [*placed, Placed(words, x, row)], False
        if row >= room[1]:
            return placed, False
        for sprite in sprites:
            placed.append(Placed(sprite, x, row, depth if sprite is sprites[-1] else ""))
            x += sprite.width + px(8)
        x += px(12)
    return placed, True


class Legend:
    """Placed entries with their upper left corner at ``corner`` = (x, y) of a board."""

    def __init__(self, placed: Sequence[Placed], corner: tuple[int, int], px: Pixels) -> None:
        self._placed, self._corner, self._px = placed, corner, px

    def still(self, board: Picture) -> None:
        """Draw what never changes."""
        for each in self._placed:
            lay(board, each.sprite, *self._place(each, each.sprite.height))

    def numbers(self, board: Picture, ranges: Mapping[str, DepthRange]) -> None:
        """Write the metres that a bar of depth spans now on both sides of it."""
        for each in self._placed:
            if each.depth:
                span, room, gap = ranges[each.depth], self._px(NUMBER), self._px(6)
                low, high = (text(f"{v:.1f} m", self._px(15), INK) for v in (span.low, span.high))
                x, y = self._place(each, low.height)
                lay(board, low, x + room - gap - low.width, y)
                lay(board, high, x + each.sprite.width - room + gap, y)

    def _place(self, each: Placed, height: int) -> tuple[int, int]:
        """Return the corner of something of that height, centred on the entry's row."""
        x, y = self._corner
        return x + each.x, y + each.row * self._px(ROW) + (self._px(26) - height) // 2


def _depth_bar(px: Pixels) -> Sprite:
    """Return a bar of depth's colours with room for a number on each side."""
    height, inner, number = px(14), px(RAMP), px(NUMBER)
    ramp = depth_picture(np.linspace(0, 1, inner)[None].repeat(height, 0), 0, 1)
    colour = np.zeros((height, inner + 2 * number, 3), np.float32)
    cover = np.zeros((height, inner + 2 * number, 1), np.float32)
    colour[:, number : number + inner] = ramp
    cover[:, number : number + inner] = rounded(inner, height, (0, 0, 0), px(4)).cover
    return Sprite(colour, cover)
