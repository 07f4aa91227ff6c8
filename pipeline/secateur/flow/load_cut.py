"""The cut handed back as a network of the user's own code: to train on, look into or cut again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.bundle.manifest import Manifest
from secateur.bundle.read import check_files, read_bundle
from secateur.bundle.write import CUT_FILE, SURGERY
from secateur.core.errors import BuildError, BundleError, VerifyError, first_line
from secateur.core.model import MultiTaskModel, evaluating
from secateur.core.surgery import Surgery
from secateur.flow.job import keep_tasks
from secateur.flow.recipe import parse_recipe
from secateur.flow.verify import PARITY_TOLERANCE, own_input, own_outputs
from secateur.lower import compare_outputs
from secateur.prune import restore_cut
from secateur.prune.blocks import NETWORK


def load_cut(bundle: Path | str, parent: nn.Module) -> nn.Module:
    """Return the fp32 network that a bundle was lowered from, on the CPU, in eval mode.

    ``parent`` is what the recipe's factory returns; its weights do not matter, it is left as it is.
    Where all its tasks were kept, the result is of its own class, else what the kept tasks need
    of it. ``forward`` takes (N, C, H, W) images, normalised as the recipe says.

    Raises:
        BundleError: it is no bundle, or one of an older Secateur.
        PlanError: ``parent`` is of another architecture than the network that was cut.
        VerifyError: a file of the bundle was altered, or the network does not answer as it did
            when the bundle was built.
    """
    folder = Path(bundle)
    manifest = read_bundle(folder)
    check_files(folder, manifest)
    state, surgery = _read(folder)
    recipe = parse_recipe(manifest.recipe, folder / "recipe.yaml", unset=True)
    whole = MultiTaskModel(copy.deepcopy(parent).cpu(), recipe.all_tasks()).eval()
    selected, _ = keep_tasks(recipe, whole)
    cut = restore_cut(selected, surgery, state)
    _check(cut, folder, manifest)
    return cut.network


def _read(folder: Path) -> tuple[dict[str, Tensor], Surgery]:
    path = folder / CUT_FILE
    if not path.exists():
        raise BundleError(f"{folder} has no {CUT_FILE}", hint="build it again")
    try:
        with safe_open(path, "pt") as stream:
            surgery = Surgery.from_json(json.loads((stream.metadata() or {})[SURGERY]))
            names = list(stream.keys())
            return {f"{NETWORK}{name}": stream.get_tensor(name) for name in names}, surgery
    except (SafetensorError, KeyError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be read: {first_line(error)}", hint="build the bundle again"
        ) from error


def _check(cut: MultiTaskModel, folder: Path, manifest: Manifest) -> None:
    """Compare the network's outputs with those that the bundle was built with.

    Raises:
        VerifyError: they differ.
    """
    with evaluating(cut):
        outputs = cut(torch.from_numpy(own_input(folder, manifest)))
    found = {name: tensor.numpy() for name, tensor in outputs.items()}
    try:
        compare_outputs(own_outputs(folder, manifest), found, tolerance=PARITY_TOLERANCE)
    except BuildError as error:
        raise VerifyError(
            f"the network of {folder} does not answer as it did when it was built: {error.message}",
            hint="give the parent as it was then: its code may have changed, or an argument of "
            f"{manifest.parent['factory']}",
        ) from error
