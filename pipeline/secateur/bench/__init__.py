"""Measure: per-task accuracy, latency by the protocol, and the pictures people look at."""
