"""Secateur cuts pre-trained multi-task vision models to the tasks and the device at hand."""

__version__ = "0.1.0"
