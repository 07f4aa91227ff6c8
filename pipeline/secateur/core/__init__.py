"""The nouns every room shares: tasks, models, channel groups, plans, errors, files."""
