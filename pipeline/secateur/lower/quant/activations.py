"""Run a model image by image and keep statistics of every activation, nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from secateur.core.errors import CalibrationError, first_line
from secateur.core.files import atomic_path, file_sha256
from secateur.lower.quant.graph import Graph
from secateur.lower.quant.statistics import TensorStatistics

SAVE_EVERY = 64  # images between two saved states

Images = NDArray[np.float32]
ReadImages = Callable[[], Iterable[Images]]
Called = Callable[[int], str]  # what the user knows the image at a position as


def by_position(position: int) -> str:
    """Call an image by its place among those that were read."""
    return f"calibration image {position}"


class ActivationStatistics:
    """Statistics of all activations of one model over the images seen so far.

    ``model`` is the SHA-256 of the ONNX file, ``images_digest`` a chained SHA-256 over the images
    in order: it does not depend on how they came in batches. ``results`` are the tensors that the
    model gives, and those that an operator only moves into them.
    """

    def __init__(self, model: str, results: Iterable[str] = ()) -> None:
        self.model = model
        self.results = frozenset(results)
        self.images = 0
        self.images_digest = ""
        self.tensors: dict[str, TensorStatistics] = {}

    def for_model(self, model: str) -> ActivationStatistics:
        """Return the same statistics under another model's SHA-256: one with the same tensors."""
        found = copy.copy(self)
        found.model = model
        return found

    def save(self, path: Path) -> None:
        """Write everything to ``path`` (.npz), whole or not at all."""
        arrays: dict[str, Any] = {
            f"{kind}/{name}": array
            for name, statistics in self.tensors.items()
            for kind, array in statistics.state().items()
        }
        facts = {"model": self.model, "results": sorted(self.results),
                 "images": self.images, "digest": self.images_digest}  # fmt: skip
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, facts=np.array(json.dumps(facts)), **arrays)

    @staticmethod
    def load(path: Path) -> ActivationStatistics | None:
        """Read what ``save`` wrote; None when there is nothing that can be read."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                found = ActivationStatistics(facts["model"], facts["results"])
                found.images, found.images_digest = facts["images"], facts["digest"]
                names = [key.partition("/")[2] for key in stored if key.startswith("counts/")]
                for name in names:
                    parts = {kind: stored[f"{kind}/{name}"] for kind in ("numbers", "counts")}
                    found.tensors[name] = TensorStatistics.from_state(parts)
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            return None
        return found


def observe(
    model: Path, read: ReadImages, *, state: Path | None = None, called: Called = by_position
) -> ActivationStatistics:
    """Return the statistics of every float activation of ``model``.

    ``read`` starts to read the images: batches of any size, (N, C, H, W), as the network takes
    them. One image runs at a time: memory is that of one image's activations. With ``state``
    statistics are saved every SAVE_EVERY images and at the end; a later call with the same model
    and images goes on from there (it reads what was counted, to know that it is the same, but does
    not run it). Errors name an image as it is ``called``.

    Raises:
        CalibrationError: there are fewer than two different images, an image is constant or not
            finite, the model cannot run them, or an activation is NaN or +infinite.
    """
    probe = _Probe(model, called=called)
    fresh = ActivationStatistics(file_sha256(model), probe.results)
    statistics = _continued(fresh, read, state, called)
    done = statistics.images
    digest, different = "", set()
    for position, image in enumerate(_single_images(read())):
        own = image_digest(image, called(position))
        different.add(own)
        digest = _chained(digest, own)
        if position < done:
            continue
        probe.count(image, position, statistics.tensors)
        statistics.images, statistics.images_digest = position + 1, digest
        if state is not None and (position + 1) % SAVE_EVERY == 0:
            statistics.save(state)
    check_different(statistics.images, different)
    if state is not None and statistics.images > done:
        statistics.save(state)
    return statistics


def _continued(
    fresh: ActivationStatistics, read: ReadImages, state: Path | None, called: Called
) -> ActivationStatistics:
    """Return what an earlier run counted of the same model and images, else ``fresh``."""
    earlier = ActivationStatistics.load(state) if state is not None else None
    if earlier is None or earlier.model != fresh.model:
        return fresh
    digest = ""
    for position, image in enumerate(islice(_single_images(read()), earlier.images)):
        digest = _chained(digest, image_digest(image, called(position)))
    return earlier if digest == earlier.images_digest else fresh


def _single_images(batches: Iterable[Images]) -> Iterator[Images]:
    """Yield (1, C, H, W) float32 images."""
    for batch in batches:
        for position in range(len(batch)):
            yield np.ascontiguousarray(batch[position : position + 1], dtype=np.float32)


def image_digest(image: Images, called: str) -> str:
    """Return the digest of one image (1, C, H, W), which must be fit to calibrate on.

    Raises:
        CalibrationError: it is not.
    """
    if image.ndim != 4:
        raise CalibrationError(
            f"{called} has shape {image.shape[1:]}, expected (C, H, W)",
            hint="give batches of shape (N, C, H, W)",
        )
    if not np.isfinite(image).all():
        raise CalibrationError(
            f"{called} has {int((~np.isfinite(image)).sum())} NaN or infinite "
            f"values of {image.size}",
            hint="check its file and the preprocessing (mean, std, division by zero)",
        )
    flat = image.reshape(image.shape[1], -1)
    if (flat.min(axis=1) == flat.max(axis=1)).all():
        raise CalibrationError(
            f"{called} is constant: every pixel is {np.array2string(flat[:, 0], precision=3)}",
            hint="leave it out: a black frame or a reader that failed says nothing about ranges",
        )
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()


def check_different(images: int, digests: Collection[str]) -> None:
    """Raise when so many images were read and all are the same one.

    Raises:
        CalibrationError: they are, or there was none.
    """
    if len(digests) < 2:
        raise CalibrationError(
            f"calibration read {images} images, {len(digests)} of them different; "
            "one image says nothing about the range of others",
            hint="give at least 32 different images of what the model will see",
        )


def _chained(digest: str, own: str) -> str:
    return hashlib.sha256(f"{digest}{own}".encode()).hexdigest()


class _Probe:
    """A session that gives every float activation of one image.

    Marking them as outputs keeps ONNX Runtime from fusing across them; one thread makes sums come
    in one order.
    """

    def __init__(
        self, model: Path, wanted: Collection[str] | None = None, called: Called = by_position
    ) -> None:
        self.called = called
        graph_model = onnx.load(model)
        self.results = Graph(graph_model).results()
        outputs = {value.name for value in graph_model.graph.output}
        for node in graph_model.graph.node:
            names = [name for name in node.output if name and name not in outputs
                     and (wanted is None or name in wanted)]  # fmt: skip
            # Without a type: ONNX Runtime infers it, and says it below.
            graph_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                graph_model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exception types share no base
            raise CalibrationError(
                f"ONNX Runtime cannot load {model}: {first_line(error)}",
                hint="calibrate on the fp32 ONNX that secateur exported",
            ) from error
        self._input = self._session.get_inputs()[0].name
        self._names = [
            output.name for output in self._session.get_outputs()
            if output.type == "tensor(float)" and (wanted is None or output.name in wanted)
        ]  # fmt: skip

    def count(
        self, image: Images, position: int, tensors: MutableMapping[str, TensorStatistics]
    ) -> None:
        """Add one image's activations to ``tensors``."""
        for name, values in self.run(image, position).items():
            if values.size and not tensors.setdefault(name, TensorStatistics()).add(values):
                raise CalibrationError(
                    f"activation '{name}' is NaN or +infinite on {self.called(position)}",
                    hint="the fp32 model itself fails there: check its weights and the input",
                )

    def run(self, image: Images, position: int) -> dict[str, Images]:
        """Return the activations of one image, itself among them."""
        try:
            # Without names it would give all outputs.
            arrays = self._session.run(self._names, {self._input: image}) if self._names else []
        except Exception as error:  # as above
            raise CalibrationError(
                f"the model cannot run {self.called(position)} of shape {image.shape}: "
                f"{first_line(error)}",
                hint="give images of the size that the model was exported for",
            ) from error
        return {self._input: image, **dict(zip(self._names, arrays, strict=True))}


def watch(model: Path, images: Images, wanted: Collection[str]) -> Iterator[dict[str, Images]]:
    """Yield, image by image, the activations of ``model`` that are ``wanted`` (and the image).

    Raises:
        CalibrationError: the model cannot run the images.
    """
    probe = _Probe(model, wanted)
    for position, image in enumerate(_single_images([images])):
        yield probe.run(image, position)
