"""Targets: what is known of each device, with sources."""
