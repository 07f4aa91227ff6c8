"""How dense outputs become colours, in contact sheets and in video."""

from __future__ import annotations

from functools import lru_cache

import matplotlib
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Maps = NDArray[np.generic]
GREY = np.array([90, 90, 90], np.uint8)
DEPTH_MAP = "viridis_r"  # near is bright


@lru_cache
def palette(classes: int) -> Picture:
    """Return the (classes, 3) colours of a segmentation."""
    wheel = matplotlib.colormaps["tab20"]
    return (255 * np.array([wheel(i % 20)[:3] for i in range(classes)])).astype(np.uint8)


def class_picture(labels: Maps, classes: int, ignore_index: int) -> Picture:
    """Return the (H, W, 3) colours of (H, W) class indices; grey where they are ignored."""
    colours = palette(classes)
    known = (labels != ignore_index)[..., None]
    indices = np.clip(np.asarray(labels, np.int64), 0, classes - 1)
    return np.asarray(np.where(known, colours[indices], GREY), np.uint8)


def depth_picture(metres: Maps, low: float, high: float) -> Picture:
    """Return the (H, W, 3) colours of (H, W) metres between two bounds; NaN is the lower."""
    share = np.clip((np.asarray(metres, np.float32) - low) / max(high - low, 1e-6), 0, 1)
    return _depth_colours()[np.asarray(255 * np.nan_to_num(share) + 0.5, np.uint8)]


@lru_cache
def _depth_colours() -> Picture:
    colours: Picture = matplotlib.colormaps[DEPTH_MAP](np.arange(256), bytes=True)[:, :3]
    return colours


def normals_picture(vectors: NDArray[np.float32]) -> Picture:
    """Return the (H, W, 3) colours ``(n + 1) / 2`` of vectors, made unit length."""
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    return unit_bytes((vectors / np.maximum(length, 1e-6) + 1) / 2)


def edges_picture(probability: Maps) -> Picture:
    """Return the (H, W, 3) greys of (H, W) probabilities."""
    return unit_bytes(np.asarray(probability)[..., None].repeat(3, 2))


def unit_bytes(share: Maps) -> Picture:
    """Return 0..1 as 0..255."""
    return np.asarray(255 * np.clip(np.asarray(share, np.float32), 0, 1), np.uint8)
