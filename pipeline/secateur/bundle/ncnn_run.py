"""Runs this bundle's ncnn files; travels inside run.py. numpy and ncnn only."""

import hashlib

import numpy as np

NCNN_FILES = ("model.ncnn.param", "model.ncnn.bin")


class NcnnProblem(Exception):
    """The bundle's ncnn files cannot be run here."""


class NcnnSession:
    """The ncnn files in ``folder``, checked against the manifest, one image at a time.

    ``outputs`` are the names of what ``run`` returns. The precision is what the files say.
    """

    batches = False

    def __init__(self, folder, manifest, threads):
        for name in NCNN_FILES:
            record = manifest["files"].get(name)
            if record is None:
                raise NcnnProblem(f"this bundle has no {name}: build it with `runtime: ncnn`")
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != record["sha256"]:
                raise NcnnProblem(f"{name} is not the file of this manifest; copy it again")
        try:
            import ncnn
        except ImportError as error:
            raise NcnnProblem(
                "this needs ncnn, which is not installed (pip install ncnn); "
                "--runtime onnxruntime runs model.onnx instead"
            ) from error
        self.ncnn, self.net, self.notes = ncnn, ncnn.Net(), []
        self.net.opt.num_threads = threads
        self.net.opt.use_vulkan_compute = False
        layers, weights = (str(folder / name) for name in NCNN_FILES)
        if self.net.load_param(layers) != 0 or self.net.load_model(weights) != 0:
            raise NcnnProblem(
                f"ncnn {ncnn.__version__} cannot load the model; it was converted for "
                f"{manifest['versions'].get('ncnn', 'another version')}"
            )
        (self.input_name,) = self.net.input_names()
        self.outputs = list(self.net.output_names())

    def run(self, inputs):
        """(1, C, H, W) array -> {output: array of shape (1, ...)}."""
        extractor, found = self.net.create_extractor(), {}
        extractor.input(self.input_name, self.ncnn.Mat(inputs[0]))
        for name in self.outputs:
            status, array = extractor.extract(name)
            if status != 0:
                raise NcnnProblem(f"ncnn stopped at '{name}' with status {status}")
            found[name] = np.array(array)[None]
        return found
