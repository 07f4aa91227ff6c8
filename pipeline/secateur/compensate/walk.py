"""Walk a parent and its cut network side by side, layer by layer, over chunks of images.

Each chunk's forward pass is a coroutine (greenlet) that pauses at every layer of interest. So all
chunks can be looked at for one layer, the layer changed, and the same passes resumed: memory
holds each chunk's live activations, never those of all layers, and nothing is computed twice.
Gradients must be off around the whole walk: the switch is the thread's, not the coroutine's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from secateur.core.model import MultiTaskModel


@dataclass(frozen=True)
class Stop:
    """Where a pass pauses: ``tensor`` is a layer's output (parent) or input (cut network).

    ``partner`` is what will be added to the layer's output further on, if anything (see
    ``residual``).
    """

    layer: str
    tensor: Tensor
    partner: Tensor | None


class Walk:
    """One forward pass over one chunk of images; ``next`` runs on to the next stop."""

    def __init__(
        self,
        model: MultiTaskModel,
        images: Tensor,
        layers: Collection[str],
        partners: Mapping[str, tuple[str, str]],
        *,
        at_output: bool,
    ) -> None:
        self._partners = partners
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._images = images
        self._model = model
        self._layers = set(layers)
        self._at_output = at_output
        self._pass = self._caller = greenlet(self._run)

    def next(self) -> Stop:
        """Run to the next layer of interest."""
        self._caller = getcurrent()
        stop: Stop = self._pass.switch()
        return stop

    def finish(self) -> None:
        """Run to the end of the pass, where its hooks are taken off."""
        while not self._pass.dead:
            self._pass.switch()

    def _run(self) -> None:
        modules = dict(self._model.named_modules())
        watched = set(self._partners.values())
        hooks = []
        for name, module in modules.items():
            if ("in", name) in watched:
                hooks.append(module.register_forward_pre_hook(self._note(("in", name))))
            if ("out", name) in watched:
                hooks.append(module.register_forward_hook(self._note(("out", name))))
            if name in self._layers:
                hooks.append(self._pause_at(name, module))
        try:
            self._model(self._images)
        finally:
            for hook in hooks:
                hook.remove()

    def _pause_at(self, name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        if self._at_output:
            return module.register_forward_hook(lambda _m, _i, out: self._pause(name, out))
        return module.register_forward_pre_hook(lambda _m, args: self._pause(name, args[0]))

    def _pause(self, name: str, tensor: Tensor) -> None:
        if getcurrent() is not self._pass:  # another chunk's pass runs through the same module
            return
        partner = self._seen.get(self._partners[name]) if name in self._partners else None
        self._caller.switch(Stop(name, tensor, partner))

    def _note(self, key: tuple[str, str]) -> object:
        def note(
            _module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None
        ) -> None:
            if getcurrent() is self._pass:
                self._seen[key] = args[0] if output is None else output

        return note
