"""A pre-trained trunk with a closed-form head for a new task: what a user has before any cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from secateur import zoo
from secateur.vote.inherit import class_targets, ridge_head
from torch import nn
from vote.tasks import Cifar
from vote.training import LOGIT

PARENTS = Path(__file__).resolve().parents[1] / "parents"


def pretrained(network: str) -> nn.Module:
    """Return the network as it was trained, for its 80 classes."""
    model: nn.Module = getattr(zoo, network)()
    state = load_file(PARENTS / f"{network}.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


def probed(network: str, fine: Sequence[int]) -> nn.Module:
    """Return its trunk, unchanged, with a linear head fitted to the training images of classes."""
    model = pretrained(network)
    own = Cifar(Path(os.environ["SECATEUR_DATA"]) / "cifar100_sub").images(tuple(fine), "train")
    body = model.get_submodule("body")
    with torch.no_grad():
        features = np.concatenate([body(part).numpy() for part in own.parts()])
    weight, bias = ridge_head(features, class_targets(own.labels.numpy(), len(fine)))
    new = nn.Linear(weight.shape[1], len(fine))
    new.weight.data = LOGIT * torch.from_numpy(weight).float()
    new.bias.data = LOGIT * torch.from_numpy(bias).float()
    model.head = new
    return model
