"""Which batch norm follows which layer."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.core.model import evaluating


def following_norms(model: nn.Module, image: Tensor) -> dict[str, nn.Module]:
    """Return, per layer, the batch norm that reads its output tensor directly."""
    made: dict[tuple[int, int], str] = {}
    alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
    found: dict[str, nn.Module] = {}

    def after(name: str, output: Tensor) -> None:
        made[id(output), output._version] = name
        alive.append(output)

    def before(norm: nn.Module, tensor: Tensor) -> None:
        key = id(tensor), tensor._version  # an in-place activation between raises the version
        if key in made:
            found[made[key]] = norm

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: after(name, out))
            )
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(lambda m, args: before(m, args[0])))
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found
