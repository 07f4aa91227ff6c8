"""How wide something is after a cut: a linear function of what each group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Width:
    """``fixed + sum(times * kept[group])`` channels over the pairs ``(group, times)`` of ``of``.

    Groups are numbered as in the sequence that they were found in; ``of`` is sorted by them.
    """

    fixed: int
    of: tuple[tuple[int, int], ...] = ()

    def __call__(self, kept: Sequence[int]) -> int:
        """Return the width when group ``g`` keeps ``kept[g]`` channels."""
        return self.fixed + sum(times * kept[group] for group, times in self.of)

    def __add__(self, other: Width) -> Width:
        """Return the width of both side by side."""
        total = dict(self.of)
        for group, times in other.of:
            total[group] = total.get(group, 0) + times
        return Width(self.fixed + other.fixed, tuple(sorted(total.items())))

    def __mul__(self, factor: int) -> Width:
        """Return the width of ``factor`` copies."""
        return Width(self.fixed * factor, tuple((group, t * factor) for group, t in self.of))
