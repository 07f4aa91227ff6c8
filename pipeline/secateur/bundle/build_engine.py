#!/usr/bin/env python3
"""Build this bundle's TensorRT engine, on the device that is to run it.

    python3 build_engine.py [--batch N | MIN:OPT:MAX] [--workspace MIB] [--dla CORE] [--sparse]

Needs Python 3.8 and TensorRT 10.3 to 11.x, or tensorrt-rtx; nothing of Secateur. The precision is
in model.onnx: every build is strongly typed. What the command line leaves open is as the recipe
wanted it, in engine_options.json. Writes beside it model.engine, engine.json (what it
was built by, on and with; unknown is null), layers.json (each layer, the ONNX nodes it came from,
the tasks that need it) and timing.cache. As a module: ``build(folder, options)``; before an engine
is opened: ``check_engine(engine, device_facts(trt), {name: sha256(path)})``.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from secateur.bundle.engine_device import (
    SCHEMA_VERSION,
    check_engine,
    cuda_facts,
    device_facts,
    file_digest,
)
from secateur.bundle.engine_errors import (
    NOT_READABLE,
    BuildProblem,
    EngineProblem,
    explain,
    explain_parsing,
    room,
)
from secateur.bundle.engine_layers import engine_rows, join_rows, network_rows
from secateur.bundle.engine_options import all_options, batch_sizes, node_table, read_table
from secateur.bundle.engine_progress import progress_monitor
from secateur.bundle.engine_supervise import end_with_supervisor, supervised
from secateur.bundle.engine_tensorrt import load_tensorrt, process_logger

WORKSPACE_SHARE = 0.5  # of the free memory: the builder itself and the weights need the rest
MIB = 1 << 20


class Differences:
    """All that differs between TensorRT 10.3 to 11.x and TensorRT-RTX; nothing else asks."""

    def __init__(self, trt):
        rtx = trt.__name__ == "tensorrt_rtx"
        # Its number is 1 in TensorRT 10, 0 in 11 and RTX, where every network is strongly typed.
        self.strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.timing_cache = not rtx  # RTX times nothing: its kernels are chosen at run time
        self.adjust_for_dla = trt.OnnxParserFlag.__members__.get("ADJUST_FOR_DLA")  # 10.16 has it
        self._capabilities = trt.ComputeCapability.__members__ if rtx else None

    def aim(self, config, capabilities):
        """Build for given compute capabilities; only RTX can."""
        names = ["SM" + text.replace(".", "") for text in capabilities]
        unknown = [name for name in names if name not in (self._capabilities or ())]
        if unknown:
            raise BuildProblem(
                "cannot build for {}: this TensorRT builds for {}".format(
                    ", ".join(unknown), sorted(self._capabilities or ["the GPU at hand"])
                )
            )
        if names:
            config.num_compute_capabilities = len(names)
            for index, name in enumerate(names):
                config.set_compute_capability(self._capabilities[name], index)


class Job:
    """One build: the module, what was asked for, and what failures are explained with."""

    def __init__(self, trt, options, nodes):
        self.trt, self.options, self.nodes = trt, options, nodes
        self.differences = Differences(trt)
        self.logger = process_logger(trt)
        del self.logger.lines[:]
        cuda = cuda_facts()
        self.free = cuda["memory_free"]
        self.workspace = self.free and int(self.free * WORKSPACE_SHARE)
        if options["workspace_mib"]:
            self.workspace = options["workspace_mib"] * MIB
        self.words = {"version": trt.__version__, "room": room(self.free, self.workspace)}

    def problem(self, text=None):
        """The BuildProblem for TensorRT's own words, by default the errors it logged."""
        errors = [line for severity, line in self.logger.lines if severity != "WARNING"]
        return BuildProblem(explain(text or "\n".join(errors), self.words))

    def serialized(self, builder, network, config):
        """The bytes of the engine; meanwhile its steps are told on stderr."""
        config.progress_monitor = monitor = progress_monitor(self.trt)
        try:
            plan = builder.build_serialized_network(network, config)
            if plan is not None:
                return bytes(plan)
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise self.problem("{}: {}".format(type(error).__name__, error)) from error
        if monitor.stopped:
            raise KeyboardInterrupt
        raise self.problem()


def parse(job, builder, model):
    """Return the network that model.onnx's bytes describe."""
    trt = job.trt
    network = builder.create_network(job.differences.strongly_typed)
    parser = trt.OnnxParser(network, job.logger)
    if job.options["dla"] is not None and job.differences.adjust_for_dla is not None:
        parser.set_flag(job.differences.adjust_for_dla)
    if not parser.parse(model):
        if not parser.num_errors:
            raise job.problem()
        fault = parser.get_error(0)
        raise BuildProblem(
            explain_parsing(
                fault.code().name,
                fault.desc(),
                (fault.node_name(), fault.node_operator()),
                job.nodes.get(fault.node_name(), []),
                job.words,
            )
        )
    if not network.num_outputs:
        raise BuildProblem(NOT_READABLE)
    return network


def add_profile(job, builder, network, config):
    """Say which batch sizes a network with a dynamic batch is built for."""
    batch, dynamic = job.options["batch"], False
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise BuildProblem(
                "input {} is {}: only the batch may be dynamic; export the model with fixed "
                "height and width".format(tensor.name, shape)
            )
        if shape[0] >= 0 and set(batch) != {shape[0]}:
            raise BuildProblem(
                "model.onnx has a fixed batch of {0}: give --batch {0}".format(shape[0])
            )
        if shape[0] < 0:
            dynamic = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in batch))
    if dynamic:
        config.add_optimization_profile(profile)


def configure(job, builder, network, cache_bytes):
    """Return the builder's configuration."""
    trt, options = job.trt, job.options
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if options["level"] is not None:
        config.builder_optimization_level = options["level"]
    if options["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not options["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options["dla"] is not None:
        use_dla(job, builder, config)
    job.differences.aim(config, options["compute_capabilities"])
    add_profile(job, builder, network, config)
    if job.differences.timing_cache:
        cache = config.create_timing_cache(cache_bytes)
        if cache is None or not config.set_timing_cache(cache, False):  # another device's
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def use_dla(job, builder, config):
    """Put what can run there on a DLA core, the rest on the GPU unless ``dla_only``."""
    trt, batch = job.trt, job.options["batch"]
    if job.options["dla"] >= builder.num_DLA_cores:
        raise BuildProblem(
            "no DLA core {} here: TensorRT {} finds {} on this device; leave out --dla".format(
                job.options["dla"], trt.__version__, builder.num_DLA_cores
            )
        )
    if batch[0] != batch[2]:
        raise BuildProblem("a DLA takes one batch size only: give --batch {}".format(batch[2]))
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = job.options["dla"]
    if not job.options["dla_only"]:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def layer_table(job, network, plan):
    """{"of", "layers"}: of the "engine", or of the "network" where that cannot be opened."""
    trt = job.trt
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    tasks = [tensor.name for tensor in outputs]
    runtime = trt.Runtime(job.logger)
    opened = runtime.deserialize_cuda_engine(plan)
    if opened is None:
        return {"of": "network", "layers": join_rows(network_rows(network), job.nodes, tasks)}
    inspector = opened.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return {"of": "engine", "layers": join_rows(engine_rows(text), job.nodes, tasks)}


def write_whole(path, data):
    """Write bytes under a temporary name, then rename: a killed build leaves no half file."""
    handle, name = tempfile.mkstemp(prefix="." + path.name + ".tmp-", dir=str(path.parent))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, str(path))
    except BaseException:
        os.unlink(name)
        raise


def write_table(path, value):
    """Write indented JSON."""
    write_whole(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("utf-8"))


def read_model(folder):
    """The bytes of model.onnx, which must be the manifest's where there is one."""
    model = folder / "model.onnx"
    if not model.is_file():
        raise BuildProblem("there is no {}: run the build_engine.py of a bundle".format(model))
    table = folder / "manifest.json"
    try:
        manifest = read_table(table)
        wanted = manifest and manifest["files"]["model.onnx"]["sha256"]
    except (KeyError, TypeError) as error:
        raise BuildProblem("{} does not name model.onnx: copy it again".format(table)) from error
    if manifest and wanted != file_digest(model):
        raise BuildProblem("model.onnx is not the file of this manifest; copy it again")
    return model.read_bytes()


def build(folder, options=None, trt=None):
    """Build the engine of the bundle in ``folder``; return what engine.json says.

    ``options`` are changes to the bundle's own. Raises BuildProblem, with one sentence.
    """
    folder, started = Path(folder), time.time()
    options = all_options(folder, options or {})
    model = read_model(folder)
    nodes = node_table(folder)
    trt = trt or load_tensorrt()
    job = Job(trt, options, nodes)
    for name in ("engine.json", "layers.json"):  # they must not vouch for another engine
        if (folder / name).exists():
            (folder / name).unlink()
    try:
        builder = trt.Builder(job.logger)
    except (TypeError, RuntimeError) as error:  # pybind11: the library's factory gave nothing
        raise job.problem("CUDA error: {}".format(error)) from error
    network = parse(job, builder, model)
    cache_file = folder / "timing.cache"
    config = configure(
        job, builder, network, cache_file.read_bytes() if cache_file.is_file() else b""
    )
    parsed = time.time()
    plan = job.serialized(builder, network, config)
    built = time.time()
    if job.differences.timing_cache:
        cache = config.get_timing_cache()
        write_whole(cache_file, bytes(cache.serialize()))
    write_whole(folder / "model.engine", plan)
    table = layer_table(job, network, plan)
    write_table(folder / "layers.json", table)
    files = {name: file_digest(folder / name) if (folder / name).is_file() else None
             for name in ("model.onnx", "model.engine", "timing.cache")}  # fmt: skip
    engine = {
        "schema_version": SCHEMA_VERSION,
        "device": device_facts(trt),
        "files": files,
        "options": {**options, "workspace_mib": job.workspace and job.workspace // MIB},
        "bytes": len(plan),
        "layers": len(table["layers"]),
        "layers_of": table["of"],
        "seconds": {"parse": round(parsed - started, 3), "build": round(built - parsed, 3)},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built)),
    }
    write_table(folder / "engine.json", engine)
    return engine


def arguments():
    """The command line."""
    line = argparse.ArgumentParser(description="Build this bundle's TensorRT engine.")
    add = line.add_argument
    add("--batch", type=batch_sizes, help="N or MIN:OPT:MAX (default 1)")
    add("--workspace", dest="workspace_mib", type=int, metavar="MIB",
        help="scratch memory a kernel may use (default: half of the free memory)")  # fmt: skip
    add("--dla", type=int, metavar="CORE", help="run there what can; the rest runs on the GPU")
    add("--dla-only", action="store_true", default=None, help="with --dla: nothing on the GPU")
    add("--sparse", action="store_true", default=None, help="use kernels for 2:4 sparse weights")
    add("--no-tf32", dest="tf32", action="store_false", default=None, help="fp32 means fp32")
    add("--level", type=int, choices=range(6), help="how long the builder may search (default 3)")
    add("--compute-capability", dest="compute_capabilities", action="append", metavar="X.Y",
        help="tensorrt-rtx only: build for this GPU; may be repeated")  # fmt: skip
    add("--check", action="store_true", help="say whether the engine here fits this device")
    add("--json", action="store_true", help="print engine.json's content")
    add("--in-this-process", dest="alone", action="store_true", help=argparse.SUPPRESS)
    return line


def check(folder):
    """Compare the engine in ``folder`` with this device; raise BuildProblem if it must not run."""
    try:
        engine = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
        files = {name: file_digest(folder / name) for name in ("model.onnx", "model.engine")}
    except (OSError, ValueError) as error:
        raise BuildProblem("no engine to check ({}): build it first".format(error)) from error
    facts = device_facts(load_tensorrt())
    found = check_engine(engine, facts, files)
    for field, built, here, refuse in found:
        print("{}: built {}, here {}{}".format(field, built, here, "" if refuse else " (slower)"))
    if any(difference.refuse for difference in found):
        raise BuildProblem("the engine does not fit this device: build it again here")
    print("model.engine fits this device, {} {}".format(facts["runtime"], facts["tensorrt"]))


def main(argv=None):
    """Run the command line; return 0, or 2 after one sentence on stderr."""
    words = sys.argv[1:] if argv is None else argv
    options = vars(arguments().parse_args(words))
    folder = Path(__file__).resolve().parent
    only_check, as_json, alone = (options.pop(name) for name in ("check", "json", "alone"))
    try:
        if sys.version_info < (3, 8):
            raise BuildProblem("Python {} is too old: 3.8 is needed".format(sys.version.split()[0]))
        if only_check:
            check(folder)
            return 0
        if not alone:
            return supervised(Path(__file__).resolve(), [*words, "--in-this-process"])
        end_with_supervisor()
        given = {name: value for name, value in options.items() if value is not None}
        engine = build(folder, given)
    except EngineProblem as problem:
        print("error: {}".format(problem), file=sys.stderr)
        return 2
    except MemoryError:
        print("error: memory ran out: close what else runs, or add swap", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print("error: {}: {}; free some space, or copy the bundle to a folder of your own".format(
            error.filename or folder, error.strerror or error), file=sys.stderr)  # fmt: skip
        return 2
    said = "model.engine: {bytes} bytes, {layers} layers, {seconds[build]} s, "
    said += "{device[runtime]} {device[tensorrt]}"
    print(json.dumps(engine) if as_json else said.format(**engine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
