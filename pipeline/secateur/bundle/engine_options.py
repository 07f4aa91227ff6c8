"""What an engine is to be built with, read and checked; travels inside build_engine.py.

Standard library only, Python 3.8.
"""

import argparse
import json
import re

from secateur.bundle.engine_errors import BuildProblem

OPTIONS = "engine_options.json"  # of a bundle: changes to DEFAULTS
DEFAULTS = {"batch": [1, 1, 1], "workspace_mib": None, "dla": None, "dla_only": False,
            "sparse": False, "tf32": True, "level": None, "compute_capabilities": []}  # fmt: skip


def is_whole(value, least, most=1 << 31):
    """Whether a value is a whole number within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_batch(value):
    """Whether a value is [least, best, most]."""
    whole = isinstance(value, list) and all(is_whole(size, 1) for size in value)
    return whole and len(value) == 3 and value == sorted(value)


def is_capability(value):
    """Whether a value is a compute capability such as 8.6."""
    return isinstance(value, str) and re.match(r"\d{1,2}\.\d$", value) is not None


def is_switch(value):
    """Whether a value is true or false."""
    return isinstance(value, bool)


RULES = {  # what an option must be, and how a message says it
    "batch": (is_batch, "N, or MIN:OPT:MAX from small to large"),
    "workspace_mib": (lambda value: value is None or is_whole(value, 1), "MiB, 1 at least"),
    "dla": (lambda value: value is None or is_whole(value, 0), "the number of a core, from 0"),
    "dla_only": (is_switch, "true or false"),
    "sparse": (is_switch, "true or false"),
    "tf32": (is_switch, "true or false"),
    "level": (lambda value: value is None or is_whole(value, 0, 5), "0 to 5"),
    "compute_capabilities": (
        lambda value: isinstance(value, list) and all(map(is_capability, value)), "as 8.6",
    ),
}  # fmt: skip


def batch_sizes(text):
    """``4`` or ``1:4:16`` -> [least, best, most]."""
    sizes = [int(part) for part in text.split(":")]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    if not is_batch(sizes):
        raise argparse.ArgumentTypeError("give N, or MIN:OPT:MAX from small to large")
    return sizes


def read_table(path):
    """The content of a JSON file, or {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("it is no table")
        return found
    except (ValueError, RecursionError) as error:
        raise BuildProblem("{} is damaged ({}): copy it again".format(path, error)) from error


def all_options(folder, given):
    """The defaults, changed by the bundle's own options and then by those ``given``."""
    own = read_table(folder / OPTIONS)
    for name in sorted(own):
        if name not in DEFAULTS:
            raise BuildProblem(
                "{} has an option {} that this builder does not know: copy the whole bundle "
                "again".format(OPTIONS, name)
            )
    options = {**DEFAULTS, **own, **given}
    for name, (fits, words) in RULES.items():
        if not fits(options[name]):
            raise BuildProblem("{} is {!r}, give {}".format(name, options[name], words))
    if options["dla_only"] and options["dla"] is None:
        raise BuildProblem("dla_only needs a core: give --dla CORE, too")
    return options


def node_table(folder):
    """{ONNX node: the tasks that need it}, of the bundle's nodes.json; {} where there is none."""
    path = folder / "nodes.json"
    nodes = read_table(path).get("nodes", {})
    if not isinstance(nodes, dict) or not all(isinstance(tasks, list) for tasks in nodes.values()):
        raise BuildProblem("{} is damaged (it is no table of nodes): copy it again".format(path))
    return nodes
