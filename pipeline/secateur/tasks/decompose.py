"""Who uses which parameter, layer, channel group and MAC: found by use, never by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.core.channels import ChannelGroup
from secateur.core.errors import ModelError
from secateur.core.model import MultiTaskModel, evaluating
from secateur.tasks.graph import trace_outputs
from secateur.tasks.trace import Recording, record

Users = frozenset[str]
Amounts = Mapping[str, Mapping[Users, int]]


@dataclass(frozen=True)
class TaskUse:
    """Who uses what: a user is a task whose output is computed from it.

    ``parameters``: each parameter's users. ``layers``: each submodule with parameters or MACs of
    its own, in execution order, and the users of any of these. ``params`` (elements) and ``macs``
    (of one image) split each layer's amount by its users: a layer run once per task has MACs of
    each task but parameters of all. ``groups``: each channel group's users, ``channels`` its width
    under them. What no task uses has the empty set.
    """

    tasks: tuple[str, ...]
    parameters: Mapping[str, Users]
    layers: Mapping[str, Users]
    params: Amounts
    macs: Amounts
    groups: Mapping[str, Users]
    channels: Amounts

    def of(self, name: str, amounts: Amounts) -> int:
        """Return the whole amount of one layer or group."""
        return sum(amounts.get(name, {}).values())

    def private(self, task: str, amounts: Amounts) -> int:
        """Return the amount only ``task`` uses: what dropping it saves."""
        return _sum(amounts, lambda users: users == {task})

    def used(self, task: str, amounts: Amounts) -> int:
        """Return the whole amount that ``task`` uses."""
        return _sum(amounts, lambda users: task in users)

    def shared(self, task: str, count: int, amounts: Amounts) -> int:
        """Return the amount that ``task`` and exactly ``count - 1`` others use."""
        return _sum(amounts, lambda users: task in users and len(users) == count)

    def shared_by(self, count: int, amounts: Amounts) -> int:
        """Return the amount used by exactly ``count`` tasks; 0 gives what nobody uses."""
        return _sum(amounts, lambda users: len(users) == count)


def decompose(
    model: MultiTaskModel, example: Tensor, groups: Sequence[ChannelGroup] = ()
) -> TaskUse:
    """Return which tasks depend on which part of ``model``, on one image of ``example``.

    The forward pass is recorded operator by operator, so hard sharing, branches, adapters and
    heads that read each other need no description; frozen and detached parts count as used. A
    concat of heads that is split again is seen through where torch.fx can trace the model. MACs
    are ``torch.utils.flop_counter`` halved.

    Raises:
        ModelError: a part of the model is TorchScript.
    """
    image = example[:1]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with evaluating(model):  # the graph shares the model's modules, so their mode is kept here
        whole, recordings = model, []
        try:
            traced, narrowed = trace_outputs(model.network, image)
            whole = MultiTaskModel(traced, model.tasks).eval() if narrowed else model
        except ModelError:  # control flow may depend on values: two images tell more than one
            recordings = [record(model, -image)]
        recordings.insert(0, record(whole, image))
    own = {name: names[id(parameter)] for name, parameter in whole.named_parameters()}
    parameters: dict[str, Users] = dict.fromkeys(names.values(), frozenset())
    for recording in recordings:
        for name, number in recording.parameters.items():
            parameters[own[name]] |= recording.users[number]
    params = _params(model, parameters)
    modules = {id(module): name for name, module in model.named_modules()}
    known = {name: modules.get(id(module), name) for name, module in whole.named_modules()}
    macs = _macs(recordings[0], known)
    layers = _layers(model, recordings[0], params, macs)
    users = {group.name: _group_users(group, layers) for group in groups}
    return TaskUse(
        tasks=tuple(task.name for task in model.tasks),
        parameters=parameters,
        layers=layers,
        params=params,
        macs=macs,
        groups=users,
        channels={group.name: {users[group.name]: group.width} for group in groups},
    )


def _params(model: MultiTaskModel, users: Mapping[str, Users]) -> Amounts:
    params: dict[str, dict[Users, int]] = defaultdict(lambda: defaultdict(int))
    for name, parameter in model.named_parameters():
        params[name.rpartition(".")[0]][users[name]] += parameter.numel()
    return {layer: dict(split) for layer, split in params.items()}


def _macs(recording: Recording, known: Mapping[str, str]) -> Amounts:
    macs: dict[str, dict[Users, int]] = defaultdict(lambda: defaultdict(int))
    for layer, users, count in zip(recording.layers, recording.users, recording.macs, strict=True):
        if count:
            macs[known[layer]][users] += count
    return {layer: dict(split) for layer, split in macs.items()}


def _layers(
    model: MultiTaskModel, recording: Recording, params: Amounts, macs: Amounts
) -> dict[str, Users]:
    """Return each layer's users, in the order the layers first run; idle ones come last."""
    first: dict[str, int] = {}
    for call in recording.calls:
        first[call.module] = min(
            call.operations.start, first.get(call.module, len(recording.users))
        )
    own = [name for name, _ in model.named_modules() if name in params or name in macs]
    own.sort(key=lambda name: first.get(name, len(recording.users)))
    return {name: frozenset().union(*params.get(name, {}), *macs.get(name, {})) for name in own}


def _group_users(group: ChannelGroup, layers: Mapping[str, Users]) -> Users:
    """Return the tasks that read a group's channels: users of a maker *and* of a reader.

    A layer's output may be split among tasks, or a reader run once per task, so neither end
    alone is enough.
    """
    ends: dict[str, set[str]] = {"in": set(), "out": set()}
    for member in group.members:
        ends[member.axis] |= layers.get(member.layer, frozenset())
    if not ends["in"]:
        return frozenset(ends["out"])
    return frozenset(ends["in"] & ends["out"])


def _sum(amounts: Amounts, wanted: Callable[[Users], bool]) -> int:
    return sum(
        count for split in amounts.values() for users, count in split.items() if wanted(users)
    )
