"""Forget the weights and keep the architecture."""

from __future__ import annotations

import copy

import torch
from torch import nn

from secateur.core.model import MultiTaskModel


def reinitialised(model: MultiTaskModel, seed: int) -> MultiTaskModel:
    """Return a copy of ``model`` with fresh random weights and batch-norm statistics.

    Training a cut architecture from scratch often matches fine-tuning what is left of the
    parent's weights, given the same steps or more (arXiv 2304.06840). Layers draw their own
    initialisation (``reset_parameters``); parameters of a module without one (position
    embeddings, layer scales) are drawn normally with the mean and spread they have.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in module.parameters(recurse=False):
                    _redraw(parameter)
    return fresh


def _redraw(parameter: nn.Parameter) -> None:
    spread, mean = torch.std_mean(parameter, correction=0)
    parameter.copy_(mean + spread * torch.randn_like(parameter))
