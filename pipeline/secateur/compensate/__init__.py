"""Refit the kept weights on a few unlabelled images, so that they do what the cut ones did."""

from secateur.compensate.refit import RefitSettings, refit, refit_layers, refit_sparse, views

__all__ = ["RefitSettings", "refit", "refit_layers", "refit_sparse", "views"]
