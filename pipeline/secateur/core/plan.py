"""The cut as data: what each group keeps, what it costs and what it loses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from secateur.core.channels import Axis, ChannelGroup
from secateur.core.errors import PlanError

OF_SOLVER = ("solver", "gap")
OF_BLOCKS = ("removed",)


@dataclass(frozen=True)
class GroupCut:
    """``kept`` are positions 0..width-1 within the group, ascending."""

    name: str
    width: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PrunePlan:
    """A cut that can be printed, compared and stored; applying it is another step.

    ``lost`` is, per task, the share of its importance that goes (0..1). ``macs_*`` are
    multiply-accumulates of one image. ``removed`` are residual blocks that go whole, ``cuts`` those
    of the groups of the network without them. ``solver`` chose the widths ("exact", "greedy" or
    "search"); no choice of the widths it was offered loses less, within the budgets, than this
    one's loss times 1 - ``gap`` (None where that is not known). The loss is of fused scores as the
    solver was given them: balanced between groups, and in some plans to a power.
    """

    cuts: tuple[GroupCut, ...]
    macs_before: int
    macs_after: int
    budget_macs: int
    channel_grid: int
    criterion: str
    fusion: str
    lost: Mapping[str, float]
    solver: str = ""
    gap: float | None = None
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-like data; what it does not know is left out."""
        unknown = (() if self.solver else OF_SOLVER) + (() if self.removed else OF_BLOCKS)
        return {key: value for key, value in asdict(self).items() if key not in unknown}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PrunePlan:
        """Read what ``to_json`` wrote; what ``secateur plan --json`` says beside it is passed over.

        Raises:
            PlanError: a field is missing or has another form.
        """
        try:
            cuts = tuple(
                GroupCut(cut["name"], int(cut["width"]), tuple(int(c) for c in cut["kept"]))
                for cut in data["cuts"]
            )
            own = [field.name for field in fields(PrunePlan) if field.name != "cuts"]
            rest = {key: data[key] for key in own if key in data}
            rest["removed"] = tuple(str(name) for name in data.get("removed", ()))
            return PrunePlan(cuts=cuts, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"this is not a plan: {error!r}", hint="build the bundle that it lies in again"
            ) from error


def dropped_indices(
    groups: Sequence[ChannelGroup], plan: PrunePlan
) -> dict[tuple[str, Axis], set[int]]:
    """Return, per layer and axis, the positions that ``plan`` drops there."""
    kept = {cut.name: set(cut.kept) for cut in plan.cuts}
    dropped: dict[tuple[str, Axis], set[int]] = {}
    for group in groups:
        for member in group.members:
            gone = dropped.setdefault((member.layer, member.axis), set())
            for channel, places in enumerate(member.indices):
                if channel not in kept[group.name]:
                    gone.update(places)
    return dropped


def dropped_of_parameters(groups: Sequence[ChannelGroup], plan: PrunePlan) -> dict[str, set[int]]:
    """Return, per parameter outside of such layers, the positions dropped on its last axis."""
    kept = {cut.name: set(cut.kept) for cut in plan.cuts}
    dropped: dict[str, set[int]] = {}
    for group in groups:
        for name in group.parameters:
            gone = dropped.setdefault(name, set())
            gone.update(place for number, place in enumerate(group.channels)
                        if number not in kept[group.name])  # fmt: skip
    return dropped


def groups_after(groups: Sequence[ChannelGroup], plan: PrunePlan) -> tuple[ChannelGroup, ...]:
    """Return the groups of the network that ``plan`` leaves, without looking for them again.

    Those that one channel is left of are among them.
    """
    kept = {cut.name: cut.kept for cut in plan.cuts}
    gone = {at: sorted(places) for at, places in dropped_indices(groups, plan).items()}
    of_root: dict[str, set[int]] = {}
    for group in groups:
        stay = {group.channels[channel] for channel in kept[group.name]}
        of_root.setdefault(group.root, set()).update({*group.channels} - stay)

    def moved(places: Iterable[int], dropped: Sequence[int]) -> tuple[int, ...]:
        return tuple(place - bisect_left(dropped, place) for place in places)

    return tuple(
        replace(
            group,
            channels=moved(
                (group.channels[channel] for channel in kept[group.name]),
                sorted(of_root[group.root]),
            ),
            members=tuple(
                replace(
                    member,
                    indices=tuple(
                        moved(member.indices[channel], gone[member.layer, member.axis])
                        for channel in kept[group.name]
                    ),
                )
                for member in group.members
            ),
        )
        for group in groups
    )
