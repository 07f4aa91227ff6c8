"""Words and small shapes for video frames, drawn once with Pillow and laid onto arrays."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Picture = NDArray[np.uint8]
INK: Colour = (236, 240, 245)
DIM: Colour = (148, 158, 172)
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


class Sprite(NamedTuple):
    """``colour`` (h, w, 3) and its ``cover`` (h, w, 1), 0 for nothing to 1 for all of it."""

    colour: NDArray[np.float32]
    cover: NDArray[np.float32]

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.cover.shape[1])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.cover.shape[0])


@lru_cache(maxsize=64)
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(_FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size
    )


@lru_cache(maxsize=512)
def text(words: str, size: int, colour: Colour, *, bold: bool = False) -> Sprite:
    """Return one line; its height is the font's, so that lines of a size stand level."""
    font = _font(size, bold)
    ascent, descent = font.getmetrics()
    mask = Image.new("L", (max(1, int(font.getlength(words) + 1)), ascent + descent))
    ImageDraw.Draw(mask).text((0, 0), words, font=font, fill=255)
    return _sprite(np.asarray(mask), colour)


def fitted(words: str, size: int, colour: Colour, width: int, *, bold: bool = False) -> Sprite:
    """Return as much of a line as fits into ``width`` pixels, and ``…`` for the rest."""
    whole = text(words, size, colour, bold=bold)
    while whole.width > width and words:
        words = words[:-1]
        whole = text(f"{words.rstrip(' ,·')}…", size, colour, bold=bold)
    return whole


OPACITY = 0.72  # of the plate under a line


@lru_cache(maxsize=128)
def chip(words: str, size: int, ink: Colour, ground: Colour) -> Sprite:
    """Return a line on a rounded plate that lets some of the picture through."""
    line = text(words, size, ink)
    x, y = round(0.6 * size), round(0.28 * size)
    plate = rounded(line.width + 2 * x, line.height + 2 * y, ground, round(0.45 * size))
    cover = plate.cover * np.float32(OPACITY)
    colour = np.full((*cover.shape[:2], 3), ground, np.float32)
    inside = np.s_[y : y + line.height, x : x + line.width]
    share = line.cover
    colour[inside] = colour[inside] * (1 - share) + line.colour * share
    cover[inside] = np.maximum(cover[inside], share)
    return Sprite(colour, cover)


@lru_cache(maxsize=128)
def rounded(width: int, height: int, colour: Colour, radius: int) -> Sprite:
    """Return a filled rectangle with smooth round corners."""
    scale = 4
    mask = Image.new("L", (width * scale, height * scale))
    box = (0, 0, width * scale - 1, height * scale - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius * scale, fill=255)
    return _sprite(np.asarray(mask.resize((width, height), Image.Resampling.BOX)), colour)


def _sprite(mask: Picture, colour: Colour) -> Sprite:
    cover = np.asarray(mask[..., None] / 255, np.float32)
    return Sprite(np.full((*mask.shape, 3), colour, np.float32), cover)


def lay(canvas: Picture, sprite: Sprite, x: int, y: int) -> None:
    """Draw a sprite with its upper left corner at (x, y); what lies outside is cut off."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + sprite.width, canvas.shape[1]), min(y + sprite.height, canvas.shape[0])
    if right <= left or bottom <= top:
        return
    part = np.s_[top - y : bottom - y, left - x : right - x]
    under = canvas[top:bottom, left:right]
    cover = sprite.cover[part]
    under[...] = (under * (1 - cover) + sprite.colour[part] * cover + 0.5).astype(np.uint8)
