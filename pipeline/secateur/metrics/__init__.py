"""Task kinds, one file each: the loss, the metrics with their direction, label-free targets."""

NOT_ENTRIES = frozenset({"kind", "delta"})
