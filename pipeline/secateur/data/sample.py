"""What a reader gives: one image and its labels, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Sample:
    """One image with its labels.

    ``image``: (H, W, 3) uint8 RGB. ``labels`` by name; their form follows the task kind:

    ============== =========================== ========================================
    kind           array                       means
    ============== =========================== ========================================
    segmentation   (h, w) integer              class; ``ignore_index`` where unknown
    depth          (h, w) float                metres; 0 where unknown
    normals        (h, w, 3) float             unit vectors; 0 where unknown
    edges          (h, w) float                1 edge, 0 none, 255 unknown
    classification () integer                  class
    multilabel     (C,) float                  1 or 0 per class
    regression     (D,) float                  values; NaN where unknown
    keypoints      (K, 2) float                x, y in 0..1; NaN where not visible
    ============== =========================== ========================================

    Dense labels may have another size than the image: each is resized on its own.
    """

    id: str
    image: NDArray[np.uint8]
    labels: Mapping[str, Array] = field(default_factory=dict)


class Reader(Protocol):
    """An indexed data set. ``fingerprint`` changes whenever a sample could."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    @property
    def label_names(self) -> frozenset[str]: ...
