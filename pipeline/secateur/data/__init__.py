"""Readers, one file each, and the transforms that turn their samples into batches."""

NOT_ENTRIES = frozenset({"sample", "transforms", "labels", "loading", "archive", "scene_render"})
