"""How much each channel matters to each task: criteria, one file each, and the bank of scores."""

NOT_ENTRIES = frozenset({"agreement", "bank", "criterion", "directions", "passes", "places",
                         "reach", "running_sums", "single_weights"})  # fmt: skip
