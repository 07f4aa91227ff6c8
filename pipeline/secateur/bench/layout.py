"""Where panels lie on a video frame: the arrangement that shows the most picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

SMALLEST = 32  # pixels; a panel is never narrower


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from its upper left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), as arrays have it."""
        return self.height, self.width

    def moved(self, x: int, y: int) -> Box:
        """Return the box shifted by (x, y)."""
        return Box(self.x + x, self.y + y, self.width, self.height)


def arrange(count: int, room: tuple[int, int], aspect: float, gap: int) -> tuple[Box, ...]:
    """Return ``count`` boxes of width over height ``aspect`` within ``room`` (width, height).

    Either a grid, or the first one large and the others in twos below it.
    """
    candidates = [_grid(count, columns, room, aspect, gap) for columns in range(1, count + 1)]
    if count >= 3 and count % 2:
        candidates.append(_one_large(count, room, aspect, gap))
    return max(candidates, key=lambda boxes: sum(box.width * box.height for box in boxes))


def extent(boxes: tuple[Box, ...]) -> tuple[int, int]:
    """Return the (width, height) that boxes take up from (0, 0)."""
    return max(b.x + b.width for b in boxes), max(b.y + b.height for b in boxes)


def _grid(
    count: int, columns: int, room: tuple[int, int], aspect: float, gap: int
) -> tuple[Box, ...]:
    rows = math.ceil(count / columns)
    widest = (room[0] - (columns - 1) * gap) / columns
    highest = (room[1] - (rows - 1) * gap) / rows
    width = max(SMALLEST, int(min(widest, highest * aspect)))
    height = max(1, round(width / aspect))
    return tuple(
        Box((i % columns) * (width + gap), (i // columns) * (height + gap), width, height)
        for i in range(count)
    )


def _one_large(count: int, room: tuple[int, int], aspect: float, gap: int) -> tuple[Box, ...]:
    rows = (count - 1) // 2
    # A small one is half as wide as the large one, less the gap between two of them.
    width = min(
        room[0], (room[1] - rows * gap + rows * gap / (2 * aspect)) * aspect / (1 + rows / 2)
    )
    small = max(SMALLEST, int((width - gap) / 2))
    large = 2 * small + gap
    return tuple(_one_large_boxes(count, large, small, aspect, gap))


def _one_large_boxes(count: int, large: int, small: int, aspect: float, gap: int) -> Iterator[Box]:
    top, height = round(large / aspect), max(1, round(small / aspect))
    yield Box(0, 0, large, top)
    for i in range(count - 1):
        yield Box((i % 2) * (small + gap), top + gap + (i // 2) * (height + gap), small, height)
