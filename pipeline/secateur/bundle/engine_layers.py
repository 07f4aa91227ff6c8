"""A table of an engine's layers, joined to ONNX nodes and tasks; travels inside other files.

Standard library only, Python 3.8. A row is a layer: {"name", "type", "inputs", "outputs": [{"name",
"format"}], "metadata", "tactic"}; joined, its metadata have become "onnx" and "tasks".
"""

import json
import re


def engine_rows(text):
    """The rows of IEngineInspector's JSON (10.x and 11.x: they differ outside of "Layers")."""
    rows = []
    for entry in json.loads(text).get("Layers", []):
        if not isinstance(entry, dict):  # the engine keeps its layers' names only
            entry = {"Name": entry}
        rows.append(
            {
                "name": entry.get("Name", ""),
                "type": entry.get("LayerType"),
                "inputs": [value.get("Name") for value in entry.get("Inputs", [])],
                "outputs": [
                    {
                        "name": value.get("Name"),
                        "format": value.get("Format/Datatype") or value.get("Datatype"),
                    }
                    for value in entry.get("Outputs", [])
                ],
                "metadata": entry.get("Metadata", ""),
                "tactic": entry.get("TacticName"),
            }
        )
    return rows


def network_rows(network):
    """The rows of a parsed network, before fusion: all there is where no engine can be opened."""
    rows = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        rows.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "inputs": [tensor.name for tensor in inputs if tensor is not None],
                "outputs": [
                    {"name": tensor.name, "format": tensor.dtype.name} for tensor in outputs
                ],
                "metadata": layer.metadata,
                "tactic": None,
            }
        )
    return rows


def onnx_nodes(name, metadata, known):
    """The ONNX nodes of a layer: those its metadata names, else the known ones in its name."""
    found = re.findall(r"\[ONNX Layer: (.*?)\](?=\x1e|\[|\s|$)", metadata or "")
    if not found:
        found = [part for part in re.split(r"\.\.\.|[\s,+()\[\]{}|]+", name) if part in known]
    return list(dict.fromkeys(found))


def join_rows(rows, nodes, tasks):
    """Give each row its ONNX nodes and the tasks that need it.

    ``nodes`` maps an ONNX node to its tasks, ``tasks`` are the network's outputs. A layer of no
    known node (a constant, a reformat) is needed by the tasks of those that read it.
    """
    joined = []
    for row in rows:
        found = onnx_nodes(row["name"], row["metadata"], nodes)
        kept = {key: value for key, value in row.items() if key != "metadata"}
        joined.append(
            {**kept, "onnx": found, "tasks": {t for n in found for t in nodes.get(n, [])}}
        )
    readers = {}
    for row in joined:
        for name in row["inputs"]:
            readers.setdefault(name, []).append(row)
    known = [bool(row["tasks"]) for row in joined]
    changed = True
    while changed:  # backwards over the layers; an engine's order is one that can be run
        changed = False
        for row, given in zip(reversed(joined), reversed(known)):
            names = [tensor["name"] for tensor in row["outputs"]]
            needed = {name for name in names if name in tasks}
            needed |= {t for name in names for r in readers.get(name, []) for t in r["tasks"]}
            if not given and not needed <= row["tasks"]:
                row["tasks"] |= needed
                changed = True
    return [{**row, "tasks": sorted(row["tasks"])} for row in joined]
