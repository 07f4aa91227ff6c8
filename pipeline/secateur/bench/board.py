"""One frame of the demonstration: models side by side, every task drawn, latencies above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.bench.colours import (
    Picture,
    class_picture,
    depth_picture,
    edges_picture,
    normals_picture,
    palette,
)
from secateur.bench.layout import Box, arrange, extent
from secateur.bench.legend import ROW, DepthRange, Legend, Shown, entries_of, flow
from secateur.bench.lettering import DIM, INK, Colour, chip, fitted, lay, rounded, text
from secateur.bench.wording import milliseconds
from secateur.data.labels import DENSE

Answers = Mapping[str, NDArray[np.generic]]
GROUND, PLATE = (15, 18, 24), (12, 14, 18)
ACCENTS: tuple[Colour, ...] = ((168, 184, 206), (94, 204, 150))  # parent, cut
FULL_HD = (1920, 1080)
NARROWEST = 880  # of a full-size board: the heading needs it
OPACITY = 0.6  # of a segmentation over its image
LEGEND_ROWS = 2
FIGURES, SIDE_FIGURES = 300, 140  # room for figures at the right of a heading
FASTER_BEYOND = 0.02


@dataclass(frozen=True)
class Side:
    """A model: what it is called, and a few words on its size."""

    title: str
    detail: str
    accent: Colour


@dataclass(frozen=True)
class Readout:
    """A side's median milliseconds and frames per second, lately."""

    p50_ms: float
    fps: float


class Board:
    """Draws frames of one size: ``shape`` (height, width), both even, as encoders want.

    ``frame_size`` is the video's (height, width); ``limit`` the largest board (width, height).
    """

    def __init__(
        self,
        title: str,
        subtitle: str,
        sides: Sequence[Side],
        tasks: Sequence[Shown],
        frame_size: tuple[int, int],
        limit: tuple[int, int] = FULL_HD,
    ) -> None:
        self.title, self.subtitle, self.sides, self.tasks = title, subtitle, sides, tasks
        self.frame_size, self.limit = frame_size, limit
        self.unit = limit[1] / FULL_HD[1]
        self.margin, self.gap = self._px(28), self._px(10)
        self.head, self.side_head = self._px(92), self._px(72)
        dense = [shown for shown in self.tasks if shown.task.kind in DENSE]
        plain = not any(shown.task.kind == "segmentation" for shown in dense)
        pointed = any(shown.task.kind == "keypoints" for shown in self.tasks)
        # The plain frame where nothing else shows it and something has to be written on it.
        self.panels: list[Shown | None] = [None] if plain and (pointed or not dense) else []
        self.panels += [s for s in dense if s.task.kind == "segmentation"]
        self.panels += [s for s in dense if s.task.kind != "segmentation"]
        self.depths = {s.task.name: DepthRange() for s in dense if s.task.kind == "depth"}
        self._lay_out()
        self._background: Picture = self._still()

    def size_of(self, task: str) -> tuple[int, int] | None:
        """Return the (height, width) that a dense task is wanted at; None for any other."""
        for shown, box in zip(self.panels, self.boxes, strict=True):
            if shown is not None and shown.task.name == task:
                return box.size
        return None

    def draw(
        self,
        frame: Picture,
        answers: Sequence[Answers],
        readouts: Sequence[Readout | None],
        note: str = "",
    ) -> Picture:
        """Return the (height, width, 3) RGB board for an RGB frame.

        ``answers``: per side, the decoded outputs, dense ones at ``size_of``; a task that a side
        lacks is left out. ``readouts``: None until there is something to tell.
        """
        board: Picture = self._background.copy()
        for name, depth in self.depths.items():
            first = next((each[name] for each in answers if name in each), None)
            if first is not None:
                depth.follow(first)
        for index, outputs in enumerate(answers):
            x = self._side_x(index)
            for number, (shown, box) in enumerate(zip(self.panels, self.boxes, strict=True)):
                place = box.moved(x, self.top)
                board[place.y : place.y + place.height, place.x : place.x + place.width] = (
                    self._panel(frame, shown, outputs, box.size)
                )
                self._label(board, shown, place)
                if number == 0:
                    self._words(board, outputs, place)
            if (readout := readouts[index]) is not None:
                self._figures(board, readout, x)
        self._heading(board, readouts, note)
        self.legend.numbers(board, self.depths)
        return board

    # What never moves

    def _px(self, pixels: float) -> int:
        return max(1, round(pixels * self.unit))

    def _lay_out(self) -> None:
        """Find sizes: fewer rows of legend leave more room for panels."""
        height, width = self.frame_size
        count = len(self.sides)
        between = self._px(24)
        across = (self.limit[0] - 2 * self.margin - (count - 1) * between) // count
        entries = entries_of([s for s in self.panels if s is not None], self._px)
        for rows in range(LEGEND_ROWS + 1):
            legend = rows * self._px(ROW) + self.margin
            down = self.limit[1] - self.head - self.side_head - legend - self.gap
            self.boxes = arrange(len(self.panels), (across, down), width / height, self.gap)
            self.side_width, tall = extent(self.boxes)
            used = count * self.side_width + (count - 1) * between
            wide = max(used + 2 * self.margin, self._px(NARROWEST))
            placed, complete = flow(entries, (wide - 2 * self.margin, rows), self._px)
            if complete:
                break
        self.between, self.left = between, (wide - used) // 2
        self.top = self.head + self.side_head
        corner = self.margin, self.top + tall + self._px(16)
        self.legend = Legend(placed, corner, self._px)
        self.shape = _even(self.top + tall + self.gap + legend), _even(wide)

    def _side_x(self, index: int) -> int:
        return self.left + index * (self.side_width + self.between)

    def _still(self) -> Picture:
        board = np.empty((*self.shape, 3), np.uint8)
        board[:] = GROUND
        room = self.shape[1] - 2 * self.margin - self._px(FIGURES)
        title = fitted(self.title, self._px(28), INK, room, bold=True)
        lay(board, title, self.margin, self._px(22))
        lay(board, fitted(self.subtitle, self._px(16), DIM, room), self.margin, self._px(60))
        for index, side in enumerate(self.sides):
            x = self._side_x(index)
            lay(board, rounded(self.side_width, self._px(3), side.accent, 1), x, self.head)
            room = self.side_width - self._px(SIDE_FIGURES)
            name = fitted(side.title, self._px(24), side.accent, room, bold=True)
            lay(board, name, x, self.head + self._px(10))
            detail = fitted(side.detail, self._px(15), DIM, room)
            lay(board, detail, x, self.head + self._px(42))
        self.legend.still(board)
        return board

    # What each frame brings

    def _panel(
        self, frame: Picture, shown: Shown | None, outputs: Answers, size: tuple[int, int]
    ) -> Picture:
        if shown is not None and shown.task.name not in outputs:
            empty = np.full((*size, 3), PLATE, np.uint8)
            words = text("not a task of this model", self._px(18), DIM)
            lay(empty, words, (size[1] - words.width) // 2, (size[0] - words.height) // 2)
            return empty
        if shown is None or shown.task.kind == "segmentation":
            shrinks = size[0] < frame.shape[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            picture = np.asarray(cv2.resize(frame, size[::-1], interpolation=how), np.uint8)
            if shown is None:
                return picture
            task = shown.task
            colours = class_picture(outputs[task.name], task.classes or 1, task.ignore_index)
            blended = cv2.addWeighted(colours, OPACITY, picture, 1 - OPACITY, 0)
            return np.asarray(blended, np.uint8)
        answer = np.asarray(outputs[shown.task.name], np.float32).reshape(*size, -1)
        if shown.task.kind == "depth":
            depth = self.depths[shown.task.name]
            return depth_picture(answer[:, :, 0], depth.low, depth.high)
        if shown.task.kind == "normals":
            return normals_picture(answer)
        return edges_picture(answer[:, :, 0])

    def _label(self, board: Picture, shown: Shown | None, place: Box) -> None:
        words = "camera" if shown is None else shown.task.name
        plate = chip(words, self._px(15), INK, PLATE)
        lay(board, plate, place.x + self._px(10), place.y + self._px(10))

    def _words(self, board: Picture, outputs: Answers, place: Box) -> None:
        """Write what is no map onto the first panel: lines from its lower end up, and points."""
        y = place.y + place.height - self._px(10)
        for shown in reversed(self.tasks):
            name, kind = shown.task.name, shown.task.kind
            if kind in DENSE or name not in outputs:
                continue
            if kind == "keypoints":
                self._points(board, outputs[name], place)
                continue
            plate = chip(spoken(shown, outputs[name]), self._px(18), INK, PLATE)
            y -= plate.height
            lay(board, plate, place.x + self._px(10), y)
            y -= self._px(6)

    def _points(self, board: Picture, points: NDArray[np.generic], place: Box) -> None:
        diameter = self._px(14)
        for number, (x, y) in enumerate(np.asarray(points, np.float32).reshape(-1, 2)):
            if not (0 <= x <= 1 and 0 <= y <= 1):  # NaN too: a point that is not there
                continue
            red, green, blue = (int(v) for v in palette(20)[number % 20])
            at = (
                place.x + round(float(x) * place.width) - diameter // 2,
                place.y + round(float(y) * place.height) - diameter // 2,
            )
            rim = rounded(diameter + 4, diameter + 4, (255, 255, 255), diameter // 2 + 2)
            lay(board, rim, at[0] - 2, at[1] - 2)
            lay(board, rounded(diameter, diameter, (red, green, blue), diameter // 2), *at)

    def _figures(self, board: Picture, readout: Readout, x: int) -> None:
        big = text(milliseconds(readout.p50_ms), self._px(26), INK, bold=True)
        small = text(f"{readout.fps:.0f} frames/s", self._px(15), DIM)
        right = x + self.side_width
        lay(board, big, right - big.width, self.head + self._px(8))
        lay(board, small, right - small.width, self.head + self._px(42))

    def _heading(self, board: Picture, readouts: Sequence[Readout | None], note: str) -> None:
        right = self.shape[1] - self.margin
        words = text(note, self._px(16), DIM)
        lay(board, words, right - words.width, self._px(60))
        if len(readouts) == 2 and readouts[0] is not None and readouts[1] is not None:
            verdict = speed(readouts[0].p50_ms / readouts[1].p50_ms)
            sprite = text(verdict, self._px(28), self.sides[1].accent, bold=True)
            lay(board, sprite, right - sprite.width, self._px(22))


def spoken(shown: Shown, answer: NDArray[np.generic]) -> str:
    """Return a classification, several labels or plain numbers in words."""
    values = np.ravel(np.asarray(answer, np.float32))
    kind, name = shown.task.kind, shown.task.name
    if kind == "classification":
        best = int(values.argmax())
        return f"{name}: {_named(shown, best)}  {100 * values[best]:.0f} %"
    if kind == "multilabel":
        present = [_named(shown, int(i)) for i in np.flatnonzero(values > 0.5)]
        return f"{name}: {', '.join(present) or 'none'}"
    return f"{name}: {'  '.join(f'{value:.3g}' for value in values[:4])}"


def speed(ratio: float) -> str:
    """Return what a ratio of latencies, first over second, says of the second."""
    if abs(ratio - 1) <= FASTER_BEYOND:
        return "as fast"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def _named(shown: Shown, index: int) -> str:
    return shown.names[index] if index < len(shown.names) else f"class {index}"


def _even(pixels: int) -> int:
    return pixels + pixels % 2
