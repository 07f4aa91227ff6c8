#!/usr/bin/env python3
"""Run this bundle: images in, one array per task out.

    python3 run.py IMAGE [IMAGE ...] [--out DIR] [--full-size] [--json] [--runtime NAME]

Needs numpy, opencv-python-headless and the manifest's runtime (onnxruntime or ncnn); nothing of
Secateur. Writes one .npz per image with the network's own outputs; --full-size also decodes them
(class maps, metres, unit normals, probabilities) at the image's size. As a module:
``Runner(folder).predict(image_rgb)``.

Where build_engine.py has built an engine, that runs instead: it needs TensorRT and the CUDA runtime
(cuda-python, or libcudart), not onnxruntime, and is refused if it does not fit the device.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

try:
    import cv2
    import numpy as np
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}: pip install numpy opencv-python-headless", file=sys.stderr)
    sys.exit(2)

from secateur.bundle.engine_errors import EngineProblem
from secateur.bundle.engine_run import EngineSession, has_engine
from secateur.bundle.ncnn_run import NcnnProblem, NcnnSession

MANIFEST_SCHEMA = 1
CHANNELS = 128
DENSE_KINDS = ("segmentation", "depth", "normals", "edges")


class BundleMismatch(Exception):
    """The files beside this runner are not the ones the manifest was written for."""


def preprocess(image, contract):
    """(h, w, 3) uint8 RGB -> (1, C, H, W) float32, exactly as in training."""
    height, width = contract["height"], contract["width"]
    if image.shape[:2] != (height, width):
        how = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
        image = cv2.resize(image, (width, height), interpolation=how)
    pixels = image.astype(np.float32) / 255.0
    if contract["layout"] == "BGR":
        pixels = pixels[:, :, ::-1]
    mean = np.asarray(contract["mean"], np.float32)
    std = np.asarray(contract["std"], np.float32)
    normal = (pixels - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)[None]


def resized(maps, size):
    """(C, h, w) -> (height, width, C), by parts: OpenCV 5 takes 128 channels at a time."""
    parts = [
        cv2.resize(np.ascontiguousarray(part.transpose(1, 2, 0)), (size[1], size[0]),
                   interpolation=cv2.INTER_LINEAR).reshape(*size, -1)
        for part in (maps[at : at + CHANNELS] for at in range(0, len(maps), CHANNELS))
    ]  # fmt: skip
    return np.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def decode(output, task, size):
    """One task's output (1, ...) -> what a user wants, dense ones at ``size`` = (height, width)."""
    kind = task["kind"]
    if kind in DENSE_KINDS:
        maps = resized(output[0], size)
        if kind in ("depth", "edges"):
            maps = maps[:, :, 0]
        if kind == "segmentation":
            return maps.argmax(axis=2).astype(np.uint8 if maps.shape[2] <= 256 else np.uint16)
        if kind == "normals":
            return maps / np.maximum(np.linalg.norm(maps, axis=2, keepdims=True), 1e-6)
        return 1 / (1 + np.exp(-maps)) if kind == "edges" else maps
    if kind == "classification":
        shifted = np.exp(output[0] - output[0].max())
        return shifted / shifted.sum()
    return 1 / (1 + np.exp(-output[0])) if kind == "multilabel" else output[0]


def checked_onnx(folder, manifest):
    """The bytes of model.onnx, which must be those of the manifest."""
    data = (folder / "model.onnx").read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["files"]["model.onnx"]["sha256"]:
        raise BundleMismatch("model.onnx is not the file of this manifest; copy it again")
    return data


class OnnxSession:
    """The bundle's ONNX file on the CPU."""

    batches = True  # whether ``run`` takes several images at a time

    def __init__(self, folder, manifest, threads):
        import onnxruntime

        data = checked_onnx(folder, manifest)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # The pass named here breaks int8 between fp16 nodes (ONNX Runtime 1.31).
        try:
            self.session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"],
                disabled_optimizers=["WeightBiasQuantization"],
            )  # fmt: skip
        except Exception as error:  # its own types share no base
            built = manifest.get("versions", {}).get("onnxruntime", "another version")
            raise BundleMismatch(
                f"onnxruntime {onnxruntime.__version__} cannot load model.onnx, which was built "
                f"with {built}: {str(error).splitlines()[0]}"
            ) from error
        self.input_name, self.notes = manifest["input"]["name"], []
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, inputs):
        return dict(zip(self.outputs, self.session.run(self.outputs, {self.input_name: inputs})))


class Runner:
    """Loads the bundle in ``folder`` after checking the model against the manifest.

    ``how`` is "onnxruntime", "ncnn" or "tensorrt"; by default an engine that was built here is
    used, else the manifest's runtime.
    """

    def __init__(self, folder, threads=None, how=None):
        folder = Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest.get("schema_version") != MANIFEST_SCHEMA:
            raise BundleMismatch(
                f"manifest schema {self.manifest.get('schema_version')}, this runner reads "
                f"{MANIFEST_SCHEMA}; use the run.py of the same bundle"
            )
        self.tasks = self.manifest["tasks"]
        self.names = [task["name"] for task in self.tasks]
        how = how or ("tensorrt" if has_engine(folder) else self.manifest["runtime"])
        if how == "tensorrt":
            checked_onnx(folder, self.manifest)
            self.session = EngineSession(folder)
        else:
            kind = NcnnSession if how == "ncnn" else OnnxSession
            self.session = kind(folder, self.manifest, threads or self.manifest["threads"])
        got = self.session.outputs
        if sorted(got) != sorted(self.names):
            raise BundleMismatch(f"the model gives {got}, the manifest says {self.names}")

    def predict(self, image):
        """(h, w, 3) uint8 RGB -> {task: network output of shape (1, ...)}."""
        outputs = self.session.run(preprocess(image, self.manifest["input"]))
        return {name: outputs[name] for name in self.names}

    def decode(self, outputs, size):
        """Decode ``predict``'s outputs for an image of ``size`` = (height, width)."""
        return {task["name"]: decode(outputs[task["name"]], task, size) for task in self.tasks}


def read_rgb(path):
    """Read an image file as (h, w, 3) uint8 RGB."""
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:  # more pixels than it takes
        raise ValueError(f"cannot read image {path}: {str(error).strip()}") from error
    if image is None:
        raise ValueError(f"cannot read image {path}")
    return np.ascontiguousarray(image[:, :, ::-1])


def result_files(images, out):
    """One file in ``out`` per image, by its name; further images of a name are numbered."""
    found = []
    for path in images:
        target, number = out / f"{path.stem}.npz", 1
        while target in found:
            number += 1
            target = out / f"{path.stem}-{number}.npz"
        found.append(target)
    return found


def main(arguments=None):
    line = argparse.ArgumentParser(description="Run this bundle on images.")
    line.add_argument("images", nargs="+", type=Path)
    line.add_argument("--out", type=Path, default=Path(), help="where the .npz files go")
    line.add_argument("--threads", type=int, help="intra-op threads (default: the manifest's)")
    line.add_argument(
        "--runtime",
        choices=("onnxruntime", "ncnn", "tensorrt"),
        help="default: tensorrt where an engine was built, else the manifest's",
    )
    line.add_argument("--full-size", action="store_true", help="also decode at the image's size")
    line.add_argument("--json", action="store_true", help="print one JSON line per image")
    options = line.parse_args(arguments)
    try:
        runner = Runner(Path(__file__).resolve().parent, options.threads, options.runtime)
        for note in runner.session.notes:
            print(f"note: {note}", file=sys.stderr)
        options.out.mkdir(parents=True, exist_ok=True)
        for path, target in zip(options.images, result_files(options.images, options.out)):
            start = time.perf_counter()
            image = read_rgb(path)
            outputs = runner.predict(image)
            arrays = dict(outputs)
            if options.full_size:
                decoded = runner.decode(outputs, image.shape[:2])
                arrays.update({f"{name}_decoded": array for name, array in decoded.items()})
            np.savez_compressed(target, **arrays)
            shapes = {name: list(array.shape) for name, array in arrays.items()}
            row = {"image": str(path), "out": str(target), "outputs": shapes,
                   "ms": round(1000 * (time.perf_counter() - start), 2)}  # fmt: skip
            print(json.dumps(row) if options.json else f"{path} -> {target}  {shapes}")
    except (BundleMismatch, EngineProblem, NcnnProblem, OSError, ValueError, ImportError,
            KeyError) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
