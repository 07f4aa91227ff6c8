"""The command line: verbs to functions; it prints and never computes."""
