"""Energy of one inference: what is spent while it runs again and again, less what idling takes.

Idle is measured before and after every round of inferences, so that a machine that warms up or
wakes does not count as work. The rounds are independent of one another, so their scatter tells the
sampling error; what it cannot tell is how right the meter itself is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from secateur.core.errors import DeviceError
from secateur.core.progress import track
from secateur.devices.energy import Meter, Spent

NOISE = 2.0  # standard errors that a figure must be above nothing
ROUNDING = 1e-9  # share of a power: a steady sensor's readings differ by their sums' rounding alone


@dataclass(frozen=True)
class EnergyProtocol:
    """``rounds`` of ``seconds`` of inferences, each between two halves of idling.

    ``settle``: seconds after each change between idling and working that are not counted; sensors
    and clocks follow with a delay.
    """

    rounds: int = 5
    seconds: float = 1.0
    settle: float = 0.2


@dataclass(frozen=True)
class Energy:
    """Millijoules of one inference above idle, and their standard error over the rounds.

    ``covers``: what of the machine the meter sees. ``within_noise``: the figure is no more than
    two standard errors above nothing, or work takes no more power than idling.
    """

    per_inference_mj: float
    standard_error_mj: float
    within_noise: bool
    idle_w: float
    busy_w: float
    inferences: int
    rounds: int
    meter: str
    covers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-like data."""
        return asdict(self)


@dataclass(frozen=True)
class Round:
    """What was spent while idling around ``inferences``, and during them."""

    idle: Spent
    busy: Spent
    inferences: int

    @property
    def per_inference_mj(self) -> float:
        """Millijoules of one inference above idle."""
        above = self.busy.joules - self.idle.watts * self.busy.seconds
        return 1000 * above / self.inferences


def measure_energy(
    call: Callable[[], object], meter: Meter, protocol: EnergyProtocol | None = None
) -> Energy:
    """Measure one inference's energy with a meter.

    Raises:
        DeviceError: the meter stopped answering, or its counters stand still.
    """
    protocol = protocol or EnergyProtocol()
    turns = track(range(protocol.rounds), "measuring energy", protocol.rounds)
    rounds = [_round(call, meter, protocol) for _ in turns]
    return summarise_energy(rounds, meter.name, meter.covers)


def summarise_energy(rounds: Sequence[Round], meter: str, covers: tuple[str, ...]) -> Energy:
    """Return one inference's energy from two rounds or more of a meter of that name.

    Raises:
        DeviceError: its counters stand still.
    """
    if not any(each.busy.joules for each in rounds):
        raise DeviceError(
            f"{meter} stands still while the machine works",
            hint="run `secateur bench` on the machine itself, not in a virtual one",
        )
    found = np.array([each.per_inference_mj for each in rounds])
    error = float(found.std(ddof=1) / np.sqrt(len(found)))
    idle_w = float(np.mean([each.idle.watts for each in rounds]))
    busy_w = float(np.mean([each.busy.watts for each in rounds]))
    none_seen = busy_w <= (1 + ROUNDING) * idle_w
    return Energy(
        per_inference_mj=float(found.mean()),
        standard_error_mj=error,
        within_noise=none_seen or bool(found.mean() <= NOISE * error),
        idle_w=idle_w,
        busy_w=busy_w,
        inferences=sum(each.inferences for each in rounds),
        rounds=len(rounds),
        meter=meter,
        covers=covers,
    )


def _round(call: Callable[[], object], meter: Meter, protocol: EnergyProtocol) -> Round:
    before = _idle(meter, protocol)
    _repeat(call, protocol.settle)
    done: list[int] = []
    busy = meter.spent_by(lambda: done.append(_repeat(call, protocol.seconds)))
    after = _idle(meter, protocol)
    idle = Spent(before.joules + after.joules, before.seconds + after.seconds)
    return Round(idle, busy, done[0])


def _idle(meter: Meter, protocol: EnergyProtocol) -> Spent:
    time.sleep(protocol.settle)
    return meter.spent_by(lambda: time.sleep(protocol.seconds / 2))


def _repeat(call: Callable[[], object], seconds: float) -> int:
    """Call again and again for that long; return how often."""
    until, count = time.perf_counter() + seconds, 0
    while not count or time.perf_counter() < until:
        call()
        count += 1
    return count
